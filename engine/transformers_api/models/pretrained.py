"""The base of all documented models: how one is made, moved, copied and called."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from typing import Any, TypeVar

import torch

from gemcut.engine.checks import check_int, refuse_unknown, shorten
from gemcut.engine.config.model_config import ModelConfig
from gemcut.engine.execution.model import Gemma
from gemcut.engine.execution.weights import Weights, checkpoint_tensors, empty_weights, plain
from gemcut.engine.placement import choose_device, choose_dtype, choose_ops, undisturbed
from gemcut.engine.transformers_api.models.arrays import converter_to_kind_of
from gemcut.engine.transformers_api.models.base_config import PreTrainedConfig
from gemcut.engine.transformers_api.models.caches import StaticCache, one_cache
from gemcut.engine.transformers_api.models.forward import Run
from gemcut.engine.transformers_api.models.inputs import check_cache_position, read_batch
from gemcut.engine.transformers_api.models.loading import (
    Loading,
    choose_stored_dtype,
    initialise,
)
from gemcut.engine.transformers_api.models.parameters import Embedding, resized

M = TypeVar("M", bound="PreTrainedModel")
F = TypeVar("F", bound=Callable[..., Any])


def on_its_device(compute: F) -> F:
    """A method of a model, undisturbed by what the caller has set in torch.

    torch.compile runs it as it is: kernels and caches are nothing that it could trace.
    """

    def run(self: "PreTrainedModel", *args: Any, **kwargs: Any) -> Any:
        self._check_config()
        with undisturbed(self.device):
            return compute(self, *args, **kwargs)

    @wraps(compute)
    def computed(self: "PreTrainedModel", *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(run)(self, *args, **kwargs)
        return run(self, *args, **kwargs)

    return computed  # pyright: ignore[reportReturnType]  # it is called as `compute` is


class PreTrainedModel(Loading):
    """A model for inference: nothing that `forward` computes can be differentiated.

    Any number of threads may call it at once: each call has a state of its own.
    """

    base_model_prefix = "model"
    main_input_name = "input_ids"
    framework = "pt"
    training = False

    def __init__(
        self,
        config: PreTrainedConfig,
        *,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device = "cpu",
        ops: str = "auto",
    ) -> None:
        """A model with random weights, distributed as transformers' are before training."""
        if not isinstance(config, self.config_class):
            raise ValueError(
                f"{type(self).__name__} needs a {self.config_class.__name__}, "
                f"not {type(config).__name__}"
            )
        model_config, target = self._model_config(config), choose_device(device)
        chosen = choose_stored_dtype(dtype or torch.float32, config, target)
        with torch.inference_mode(False):  # weights may change later, outside that mode
            weights = empty_weights(model_config, device=target, dtype=chosen)
        for tensor in checkpoint_tensors(model_config):
            initialise(tensor.name, plain(tensor.of(weights)), config.initializer_range)
        if config.pad_token_id is not None:
            plain(weights.embedding)[config.pad_token_id] = 0
        self._set_up(config, model_config, weights, ops)

    def _set_up(
        self, config: PreTrainedConfig, model_config: ModelConfig, weights: Weights, ops: str
    ) -> None:
        self.config = config
        self._ops_name = ops
        self._fixed = config.fixed_values(model_config.classifier is not None)
        self._gemma = Gemma(model_config, weights, choose_ops(ops, weights.embedding.device))

    def _check_config(self) -> None:
        """Nothing, or ValueError where a value of the config has changed that no call reads."""
        for name, made_with in self._fixed.items():
            if (value := getattr(self.config, name)) != made_with:
                raise ValueError(
                    f"config.{name} is {shorten(value)}, but the model was made with "
                    f"{shorten(made_with)}: save the config, and load the model again with it"
                )

    def __getstate__(self) -> dict[str, Any]:
        own = {name: x for name, x in vars(self).items() if not name.startswith("_")}
        return own | {
            "_made_of": (self.config, self._gemma.config, self._gemma.weights, self._ops_name)
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._set_up(*state.pop("_made_of"))
        vars(self).update(state)

    def to(self: M, *places: Any, device: Any = None, dtype: Any = None) -> M:
        """Move the model to a device, convert it to a dtype, or both."""
        for place in places:
            if isinstance(place, torch.dtype):
                dtype = place
            else:
                device = place
        target = self.device if device is None else choose_device(device)
        chosen = self.dtype if dtype is None else choose_dtype(dtype, target)
        self._check_config()
        weights = self._gemma.weights.to(target, chosen)
        self._set_up(self.config, self._gemma.config, weights, self._ops_name)
        return self

    def cuda(self: M) -> M:
        """Move the model to the GPU."""
        return self.to("cuda")

    def cpu(self: M) -> M:
        """Move the model to the CPU."""
        return self.to("cpu")

    def float(self: M) -> M:
        """Convert the model to float32."""
        return self.to(torch.float32)

    def bfloat16(self: M) -> M:
        """Convert the model to bfloat16."""
        return self.to(torch.bfloat16)

    def half(self: M) -> M:
        """ValueError: Gemma's activations overflow float16."""
        return self.to(torch.float16)

    def eval(self: M) -> M:
        """The model itself: it is never in training."""
        return self

    def train(self: M, mode: bool = True) -> M:
        """The model itself for `train(False)`; NotImplementedError otherwise."""
        if mode:
            raise NotImplementedError("gemcut runs models and does not train them")
        return self

    def requires_grad_(self: M, requires_grad: bool = True) -> M:
        """The model itself for `requires_grad_(False)`; NotImplementedError otherwise."""
        return self.train(requires_grad)

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> Embedding:
        """Give the vocabulary another size: new rows are the mean of the old ones, or random.

        pad_to_multiple_of rounds the size up.  A head of its own is resized too.
        """
        self._check_config()
        old = self._gemma.weights
        size = old.embedding.shape[0] if new_num_tokens is None else new_num_tokens
        check_int("new_num_tokens", size, 1, 2**31 - 1)
        if pad_to_multiple_of is not None:
            check_int("pad_to_multiple_of", pad_to_multiple_of, 1, 2**20)
            size = -(-size // pad_to_multiple_of) * pad_to_multiple_of
        std = None if mean_resizing else self.config.initializer_range
        table = resized(plain(old.embedding), size, std)
        tied = old.lm_head is old.embedding
        head = table if tied else resized(plain(old.head_table), size, std)
        model_config = replace(self._gemma.config, vocab_size=size)
        setattr(self.config, "vocab_size", size)  # noqa: B010
        weights = replace(old, embedding=table, lm_head=head)
        self._set_up(self.config, model_config, weights, self._ops_name)
        return self.get_input_embeddings()

    # What programs ask of a model

    @property
    def name_or_path(self) -> str:
        """What `from_pretrained` was given."""
        return self.config.name_or_path

    @property
    def base_model(self) -> "PreTrainedModel":
        """The decoder without a head: of a model that has none, itself."""
        return self

    def get_decoder(self) -> "PreTrainedModel":
        """The same, by another name."""
        return self.base_model

    @classmethod
    def can_generate(cls) -> bool:
        """Whether it has `generate`."""
        return False

    def set_attn_implementation(self, attn_implementation: str) -> None:
        """Write the name to the config; attention is gemcut's whatever its name."""
        self.config._attn_implementation = attn_implementation

    # Calls

    def init_cache(self, batch_size: int, max_length: int) -> StaticCache:
        """An empty cache of `batch_size` rows of `max_length` columns, allocated now."""
        cache = StaticCache(self.config, max_length, batch_size)
        cache.prepare(self._gemma.config, batch_size, 0, self.device, self.dtype)
        return cache

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The same as `forward`."""
        return self.forward(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Defined by subclasses; NotImplementedError here."""
        raise NotImplementedError(
            f"{type(self).__name__} has no forward; use one of its subclasses"
        )

    @contextmanager
    def _run(
        self,
        input_ids: Any,
        attention_mask: Any,
        position_ids: Any,
        past_key_values: Any,
        inputs_embeds: Any,
        use_cache: bool | None,
        *,
        cache: Any = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        cache_position: Any = None,
        return_dict: bool | None = None,
        **unknown: Any,
    ) -> Iterator[Run]:
        """A call whose arguments are all checked; within it the cache is this call's alone."""
        config = self.config
        refuse_unknown(f"{type(self).__name__}.forward", unknown, self._keywords())

        def wanted(asked: bool | None, default: bool) -> bool:
            return default if asked is None else asked

        given = one_cache(past_key_values, cache)
        has_cache = given is not None or wanted(use_cache, config.use_cache)
        held = StaticCache(config) if given is None else given
        with held.in_use():
            batch = read_batch(
                self._gemma,
                held,
                input_ids,
                attention_mask,
                position_ids,
                inputs_embeds,
                may_be_packed=not has_cache,
            )
            check_cache_position(cache_position, held.get_seq_length(), batch.shape[1], self.device)
            yield Run(
                self._gemma,
                batch,
                held,
                returns_cache=has_cache,
                output_hidden_states=wanted(output_hidden_states, config.output_hidden_states),
                output_attentions=wanted(output_attentions, config.output_attentions),
                kind=converter_to_kind_of(inputs_embeds if input_ids is None else input_ids),
                as_mapping=wanted(return_dict, config.return_dict),
            )

    def _keywords(self) -> set[str]:
        """The keywords that `forward` takes."""
        taken = inspect.signature(self._run).parameters | inspect.signature(self.forward).parameters
        return {name for name, x in taken.items() if x.kind is not inspect.Parameter.VAR_KEYWORD}
