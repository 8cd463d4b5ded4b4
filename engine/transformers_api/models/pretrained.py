"""The base of all documented models: config, weights, files, device and dtype."""

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from gemcut.engine.checkpoints.hub import FILES, resolve_checkpoint
from gemcut.engine.checkpoints.huggingface import is_head
from gemcut.engine.checkpoints.load import load_checkpoint
from gemcut.engine.checkpoints.save import save_checkpoint
from gemcut.engine.checks import refuse_unknown
from gemcut.engine.config.model_config import ModelConfig
from gemcut.engine.execution.model import Gemma
from gemcut.engine.execution.weights import Weights, checkpoint_tensors, empty_weights
from gemcut.engine.placement import (
    choose_device,
    choose_device_map,
    choose_dtype,
    choose_ops,
    in_temporary_thread,
)
from gemcut.engine.transformers_api.models.arrays import converter_to_kind_of
from gemcut.engine.transformers_api.models.caches import StaticCache
from gemcut.engine.transformers_api.models.configs import PreTrainedConfig
from gemcut.engine.transformers_api.models.forward import Run
from gemcut.engine.transformers_api.models.inputs import check_cache_position, read_batch, read_ids

M = TypeVar("M", bound="PreTrainedModel")
F = TypeVar("F", bound=Callable[..., Any])

ATTENTIONS = (None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
# options of transformers that change nothing here, and their accepted values
GRANTED = {"low_cpu_mem_usage": (True, False), "trust_remote_code": (True, False)}
GRANTED |= {"use_safetensors": (True, None), "local_files_only": (False,)}


def on_its_device(compute: F) -> F:
    """A method of a model, without gradients and on the model's device: Triton launches there."""

    @wraps(compute)
    def computed(self: "PreTrainedModel", *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad(), torch.accelerator.device_index(self.device.index):
            return compute(self, *args, **kwargs)

    return computed  # pyright: ignore[reportReturnType]  # it is called as `compute` is


class PreTrainedModel:
    """A model for inference: nothing that `forward` computes can be differentiated.

    One call at a time; `Engine` serves many callers.
    """

    config_class: ClassVar[type[PreTrainedConfig]]
    is_bare: ClassVar[bool] = False  # it yields hidden states and has no head

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
        chosen = _choose_dtype(dtype or torch.float32, config, target)
        weights = empty_weights(model_config, device=target, dtype=chosen)
        for tensor in checkpoint_tensors(model_config):
            _initialise(tensor.name, tensor.of(weights), config.initializer_range)
        if config.pad_token_id is not None:
            weights.embedding[config.pad_token_id] = 0
        self._set_up(config, model_config, weights, ops)

    def _set_up(
        self, config: PreTrainedConfig, model_config: ModelConfig, weights: Weights, ops: str
    ) -> None:
        self.config = config
        self._ops_name = ops
        self._gemma = Gemma(model_config, weights, choose_ops(ops, weights.embedding.device))

    @classmethod
    def from_pretrained(
        cls: type[M],
        pretrained_model_name_or_path: str | Path,
        *,
        config: PreTrainedConfig | None = None,
        dtype: str | torch.dtype | None = None,
        torch_dtype: str | torch.dtype | None = None,
        device_map: str | int | torch.device | Mapping[str, Any] | None = None,
        attn_implementation: str | None = None,
        quantization_config: Any = None,
        ops: str = "auto",
        **overrides: Any,
    ) -> M:
        """The model in "demo", a folder or a Hugging Face id.

        dtype: "auto", the default, is that of the stored weights.  device_map: "auto" is a GPU
        where there is one; None is the CPU, and `to` moves the model.  attn_implementation is
        accepted, but attention is always gemcut's.  Keywords of the config override it.  A
        classifier's head that the files lack is made at random, with a warning; any other weight
        that is missing is an error.
        """
        if quantization_config is not None:
            raise NotImplementedError("quantization_config is not there yet; leave it out")
        if attn_implementation not in ATTENTIONS:
            raise ValueError(
                f"attn_implementation {attn_implementation!r} is unknown; "
                f"{', '.join(map(repr, ATTENTIONS[1:]))} all stand for gemcut's own"
            )
        for name in [name for name in overrides if name in GRANTED]:
            if (value := overrides.pop(name)) not in GRANTED[name]:
                raise NotImplementedError(f"{name}={value!r} is not supported; leave it out")
        own = inspect.signature(cls.from_pretrained).parameters
        known = {*own, *GRANTED, *cls.config_class.parameters, "num_labels"}
        refuse_unknown(f"{cls.__name__}.from_pretrained", overrides, known)
        folder = resolve_checkpoint(pretrained_model_name_or_path, files=FILES)
        if config is None:
            config = cls.config_class.from_pretrained(folder, **overrides)
        elif overrides:
            raise ValueError(f"give config or {next(iter(overrides))}, not both")
        if not isinstance(config, cls.config_class):
            raise ValueError(
                f"config is a {type(config).__name__}, not {cls.config_class.__name__}"
            )
        target = choose_device_map(device_map)
        chosen = _choose_dtype(dtype or torch_dtype or "auto", config, target)
        choose_ops(ops, target)  # refuses before the weights are loaded
        model_config = cls._model_config(config)
        made: list[str] = []

        def make(name: str, tensor: Tensor) -> None:
            _initialise(name, tensor, config.initializer_range)
            made.append(name)

        def load() -> M:
            weights = load_checkpoint(
                folder,
                model_config,
                device=target,
                dtype=chosen,
                any_head=cls.is_bare,
                new_head=None if model_config.classifier is None else make,
            )
            model = cls.__new__(cls)
            model._set_up(config, model_config, weights, ops)
            model._read_more(folder)
            return model

        model = in_temporary_thread(load) if target.type == "cpu" else load()
        if made:
            warnings.warn(
                f"{folder} has no {' and no '.join(made)}: made at random; train it before use",
                stacklevel=2,
            )
        return model

    def _read_more(self, folder: Path) -> None:
        """Read what a subclass needs of a checkpoint beside config and weights."""

    @classmethod
    def from_config(cls: type[M], config: PreTrainedConfig, **options: Any) -> M:
        """The same as calling the class: a model with random weights."""
        return cls(config, **options)

    def save_pretrained(
        self, save_directory: str | Path, *, max_shard_size: int = 5 * 10**9
    ) -> None:
        """Write config.json and the weights to a folder, for this package and transformers.

        max_shard_size: bytes of one file.
        """
        more = ("problem_type", "output_hidden_states", "output_attentions", "tie_word_embeddings")
        values = self.config.to_dict()
        save_checkpoint(
            save_directory,
            self._model_config(self.config),
            self._gemma.weights,
            max_shard_bytes=max_shard_size,
            more_config={name: values[name] for name in more if name in values},
        )

    @classmethod
    def _model_config(cls, config: PreTrainedConfig) -> ModelConfig:
        model_config = config.model_config(cls.__name__.removeprefix("Flax"))
        return replace(model_config, tie_word_embeddings=True) if cls.is_bare else model_config

    # Weights

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self._gemma.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights and of hidden states."""
        return self._gemma.dtype

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """The weights, each with its name in a checkpoint."""
        prefix = "model." if self.is_bare else ""
        for tensor in checkpoint_tensors(self._gemma.config):
            if not (self.is_bare and is_head(tensor.name)):
                yield tensor.name.removeprefix(prefix), tensor.of(self._gemma.weights)

    def parameters(self) -> Iterator[Tensor]:
        """The weights."""
        return (tensor for _, tensor in self.named_parameters())

    def state_dict(self) -> dict[str, Tensor]:
        """The weights by name; they are views, so that changing one changes the model."""
        return dict(self.named_parameters())

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Copy weights in; ValueError names one that is missing, unknown or misshapen."""
        own = self.state_dict()
        for name in own.keys() ^ state_dict.keys():
            what = "missing" if name in own else "not part of the model"
            raise ValueError(f"state_dict: {name} is {what}")
        for name, tensor in own.items():
            if state_dict[name].shape != tensor.shape:
                raise ValueError(
                    f"state_dict: {name} is {list(state_dict[name].shape)}, "
                    f"must be {list(tensor.shape)}"
                )
        for name, tensor in own.items():
            tensor.copy_(state_dict[name])

    def num_parameters(self) -> int:
        """Elements of all weights; tied ones count once."""
        return sum(tensor.numel() for tensor in self.parameters())

    def get_input_embeddings(self) -> "Embedding":
        """A function from ids to `inputs_embeds`: it scales the table's rows as the model does."""
        return Embedding(self._gemma)

    def to(self: M, *places: Any, device: Any = None, dtype: Any = None) -> M:
        """Move the model to a device, convert it to a dtype, or both."""
        for place in places:
            if isinstance(place, torch.dtype):
                dtype = place
            else:
                device = place
        target = self.device if device is None else choose_device(device)
        chosen = self.dtype if dtype is None else choose_dtype(dtype, target)
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

    def _run(
        self,
        input_ids: Any,
        attention_mask: Any,
        position_ids: Any,
        past_key_values: Any,
        inputs_embeds: Any,
        use_cache: bool | None,
        *,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        cache_position: Any = None,
        return_dict: bool | None = None,
        **unknown: Any,
    ) -> Run:
        """A call whose arguments are all checked."""
        config = self.config
        refuse_unknown(f"{type(self).__name__}.forward", unknown, self._keywords())

        def wanted(asked: bool | None, default: bool) -> bool:
            return default if asked is None else asked

        if past_key_values is not None and not isinstance(past_key_values, StaticCache):
            raise ValueError(
                f"past_key_values is a {type(past_key_values).__name__}; give what an earlier call "
                f"returned, init_cache(batch_size, max_length), or gemcut.engine.DynamicCache()"
            )
        has_cache = past_key_values is not None or wanted(use_cache, config.use_cache)
        cache = past_key_values if past_key_values is not None else StaticCache(config)
        batch = read_batch(
            self._gemma,
            cache,
            input_ids,
            attention_mask,
            position_ids,
            inputs_embeds,
            may_be_packed=not has_cache,
        )
        check_cache_position(cache_position, cache.get_seq_length(), batch.shape[1], self.device)
        return Run(
            self._gemma,
            batch,
            cache,
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


class Embedding:
    """The input embeddings of a model: ids [B, T] -> [B, T, D], scaled."""

    def __init__(self, gemma: Gemma) -> None:
        self._gemma = gemma

    @property
    def weight(self) -> Tensor:
        """The table [V, D], not scaled."""
        return self._gemma.weights.embedding

    def __call__(self, input_ids: Any) -> Any:
        ids = read_ids("input_ids", input_ids, self._gemma)
        return converter_to_kind_of(input_ids)(
            self._gemma.embed(ids.flatten()).view(*ids.shape, -1)
        )


def _initialise(name: str, tensor: Tensor, std: float) -> None:
    """Initial weights, in place: norms are offsets from one, so tensors of one axis are zero."""
    if tensor.dim() == 1:
        tensor.zero_()
    else:
        tensor.normal_(0.0, std)


def _choose_dtype(dtype: Any, config: PreTrainedConfig, device: torch.device) -> torch.dtype:
    """The dtype asked for; "auto" is that of the stored weights."""
    return choose_dtype(config.dtype or torch.float32 if dtype == "auto" else dtype, device)
