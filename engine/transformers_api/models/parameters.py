"""The weights of a documented model as its users see them: by name, counted, replaced."""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gemcut.engine.checkpoints.huggingface import is_head
from gemcut.engine.execution.model import Gemma
from gemcut.engine.execution.weights import checkpoint_tensors, plain
from gemcut.engine.transformers_api.models.arrays import converter_to_kind_of
from gemcut.engine.transformers_api.models.inputs import read_ids


class LoadedKeys(NamedTuple):
    """What `load_state_dict` did not find, and what it had no place for."""

    missing_keys: list[str]
    unexpected_keys: list[str]


class Parameters:
    """What a model tells of its weights."""

    _gemma: Gemma
    is_bare: ClassVar[bool] = False  # it yields hidden states and has no head

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self._gemma.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights and of hidden states."""
        return self._gemma.dtype

    @property
    def vocab_size(self) -> int:
        """Rows of the embeddings."""
        return self._gemma.config.vocab_size

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """The weights, each with its name in a checkpoint."""
        prefix = "model." if self.is_bare else ""
        for tensor in checkpoint_tensors(self._gemma.config):
            if not (self.is_bare and is_head(tensor.name)):
                yield tensor.name.removeprefix(prefix), plain(tensor.of(self._gemma.weights))

    def parameters(self) -> Iterator[Tensor]:
        """The weights."""
        return (tensor for _, tensor in self.named_parameters())

    def named_buffers(self) -> Iterator[tuple[str, Tensor]]:
        """Nothing: what follows from the config is no buffer here."""
        return iter(())

    def state_dict(self) -> dict[str, Tensor]:
        """The weights by name; they are views, so that changing one changes the model."""
        return dict(self.named_parameters())

    def load_state_dict(
        self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False
    ) -> LoadedKeys:
        """Copy weights in -> the names that are missing and those that are no part of the model.

        ValueError where there are any, unless strict is False, and where a shape is another.
        With `assign` the weights have to be of the model's dtype: they are copied all the same.
        A tied head may be there too, as transformers' models have it, equal to the embeddings.
        """
        own = self.state_dict()
        table, head = "model.embed_tokens.weight", "lm_head.weight"
        if head in state_dict and head not in own and table in own and table in state_dict:
            if not torch.equal(state_dict[head], state_dict[table]):
                raise ValueError(
                    f"state_dict: {head} differs from {table}, but tie_word_embeddings is true"
                )
            state_dict = {name: x for name, x in state_dict.items() if name != head}
        keys = LoadedKeys(
            [name for name in own if name not in state_dict],
            [name for name in state_dict if name not in own],
        )
        for name in (*keys.missing_keys, *keys.unexpected_keys) if strict else ():
            what = "missing" if name in own else "not part of the model"
            raise ValueError(f"state_dict: {name} is {what}")
        given = {name: tensor for name, tensor in own.items() if name in state_dict}
        for name, tensor in given.items():
            if state_dict[name].shape != tensor.shape:
                raise ValueError(
                    f"state_dict: {name} is {list(state_dict[name].shape)}, "
                    f"must be {list(tensor.shape)}"
                )
            if assign and state_dict[name].dtype != tensor.dtype:
                raise ValueError(
                    f"state_dict: {name} is {state_dict[name].dtype}, and the model "
                    f"{tensor.dtype}: convert the model by `to` before assign=True"
                )
        with torch.no_grad():
            for name, tensor in given.items():
                tensor.copy_(state_dict[name])
        return keys

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Elements of all weights; tied ones count once, and none can be trained."""
        if only_trainable:
            return 0
        table = plain(self._gemma.weights.embedding).data_ptr() if exclude_embeddings else None
        return sum(tensor.numel() for tensor in self.parameters() if tensor.data_ptr() != table)

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Bytes of all weights; there are no other buffers."""
        return sum(tensor.nbytes for tensor in self.parameters())

    def get_input_embeddings(self) -> "Embedding":
        """A function from ids to `inputs_embeds`: it scales the table's rows as the model does."""
        return Embedding(self._gemma)

    def get_output_embeddings(self) -> "Head | None":
        """The language-model head, where the model has one."""
        return None

    def tie_weights(self) -> None:
        """Nothing: tied weights are one tensor here."""


class Embedding:
    """The input embeddings of a model: ids [B, T] -> [B, T, D], scaled."""

    def __init__(self, gemma: Gemma) -> None:
        self._gemma = gemma

    @property
    def weight(self) -> Tensor:
        """The table [V, D], not scaled."""
        return plain(self._gemma.weights.embedding)

    def __call__(self, input_ids: Any) -> Any:
        ids = read_ids("input_ids", input_ids, self._gemma)
        return converter_to_kind_of(input_ids)(
            self._gemma.embed(ids.flatten()).view(*ids.shape, -1)
        )


class Head:
    """The language-model head: states [..., D] -> scores [..., V], without the softcap."""

    bias = None

    def __init__(self, gemma: Gemma) -> None:
        self._gemma = gemma

    @property
    def weight(self) -> Tensor:
        """Its matrix [V, D]; the embeddings' own where they are tied."""
        return plain(self._gemma.weights.head_table)

    def __call__(self, states: Tensor) -> Tensor:
        return F.linear(states, self.weight)


def resized(table: Tensor, size: int, std: float | None) -> Tensor:
    """A table [V, D] of `size` rows: new ones are the mean, or random with deviation `std`."""
    with torch.inference_mode(False), torch.no_grad():
        new = table.new_empty(size, table.shape[1])
        kept = min(size, table.shape[0])
        new[:kept] = table[:kept]
        if std is None:
            new[kept:] = table.float().mean(0).to(table.dtype)
        else:
            new[kept:].normal_(0.0, std)
        return new
