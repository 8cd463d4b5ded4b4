"""`from_pretrained`, `from_config` and `save_pretrained` of the documented models."""

import copy
import inspect
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from gemcut.engine.checkpoints.hub import (
    HUB_OPTIONS,
    check_holds_model,
    resolve_checkpoint,
    take_hub_options,
)
from gemcut.engine.checkpoints.load import load_checkpoint
from gemcut.engine.checkpoints.save import save_checkpoint
from gemcut.engine.checks import read_size, refuse_unknown, shorten
from gemcut.engine.config.model_config import ModelConfig
from gemcut.engine.execution.weights import Weights
from gemcut.engine.placement import (
    choose_device_map,
    choose_dtype,
    choose_ops,
    in_temporary_thread,
)
from gemcut.engine.transformers_api.models.base_config import PreTrainedConfig
from gemcut.engine.transformers_api.models.parameters import Parameters

M = TypeVar("M", bound="Loading")

# Options of transformers that ask for nothing here, with the values that may be given.
_LOADING = {
    "low_cpu_mem_usage": (None, True, False),
    "use_safetensors": (None, True),
    "weights_only": (None, True, False),
    "output_loading_info": (None, False),
    "ignore_mismatched_sizes": (None, False),
    "quantization_config": (None,),
    "load_in_8bit": (None, False),
    "load_in_4bit": (None, False),
    "gguf_file": (None,),
    "variant": (None,),
    "from_tf": (None, False),
    "from_flax": (None, False),
    "state_dict": (None,),
    "generation_config": (None,),
    "key_mapping": (None,),
    "max_memory": (None,),
    "offload_folder": (None,),
    "offload_state_dict": (None, False),
    "offload_buffers": (None, False),
    "tp_plan": (None,),
    "tp_size": (None,),
    "device_mesh": (None,),
    "use_flash_attention_2": (None, False),
    "use_kernels": (None, False),
}
_SAVING = {
    "is_main_process": (True,),
    "state_dict": (None,),
    "push_to_hub": (None, False),
    "safe_serialization": (None, True),
    "variant": (None,),
    "token": (None,),
    "save_peft_format": (True, False),
    "save_original_format": (True, False),
}
_HINTS = {
    "use_safetensors": "`gemcut convert` reads pickles",
    "safe_serialization": "weights are written as safetensors",
    "gguf_file": "`gemcut convert` makes a folder of safetensors of it",
    "output_loading_info": "a missing or unknown weight is an error",
    "ignore_mismatched_sizes": "a weight of another shape is an error",
    "state_dict": "use load_state_dict, then save",
    "from_flax": "`gemcut convert` reads Flax's files",
    "push_to_hub": "upload the folder with huggingface_hub",
    "generation_config": "set model.generation_config",
}


class Loading(Parameters):
    """A model that comes from files and goes back to them."""

    config_class: ClassVar[type[PreTrainedConfig]]
    config: PreTrainedConfig

    def _set_up(
        self, config: PreTrainedConfig, model_config: ModelConfig, weights: Weights, ops: str
    ) -> None:
        """Become the model of these weights."""
        raise NotImplementedError

    @classmethod
    def from_pretrained(
        cls: type[M],
        pretrained_model_name_or_path: str | Path,
        *,
        config: PreTrainedConfig | str | Path | None = None,
        dtype: str | torch.dtype | None = None,
        torch_dtype: str | torch.dtype | None = None,
        device_map: str | int | torch.device | Mapping[str, Any] | None = None,
        attn_implementation: str | None = None,
        ops: str = "auto",
        **options: Any,
    ) -> M:
        """The model in "demo", a folder or a Hugging Face id.

        dtype: "auto", the default, is that of the stored weights.  device_map: "auto" is a GPU
        where there is one; None is the CPU, and `to` moves the model.  attn_implementation is
        accepted, but attention is always gemcut's.  token, revision, cache_dir, local_files_only,
        force_download and subfolder are those of huggingface_hub.  Keywords of the config override
        it.  A classifier's head that the files lack is made at random, with a warning; any other
        weight that is missing is an error.
        """
        from_hub = take_hub_options(options)
        _take_neutral(options, _LOADING)
        own = inspect.signature(cls.from_pretrained).parameters
        known = {
            *own,
            *HUB_OPTIONS,
            *_LOADING,
            *cls.config_class.parameters,
            "num_labels",
            "label2id",
        }
        refuse_unknown(f"{cls.__name__}.from_pretrained", options, known)
        folder = resolve_checkpoint(pretrained_model_name_or_path, **from_hub)
        check_holds_model(folder)
        if isinstance(config, str | Path):
            config = cls.config_class.from_pretrained(config, **options)
        elif config is None:
            config = cls.config_class.from_pretrained(folder, **options)
        elif options:
            raise ValueError(f"give config or {next(iter(options))}, not both")
        else:
            config = copy.deepcopy(config)  # the model's own: it gets a name and a dtype
        if not isinstance(config, cls.config_class):
            raise ValueError(
                f"config is a {type(config).__name__}, not {cls.config_class.__name__}"
            )
        if attn_implementation is not None:
            config._attn_implementation = attn_implementation
        target = choose_device_map(device_map)
        chosen = choose_stored_dtype(dtype or torch_dtype or "auto", config, target)
        choose_ops(ops, target)  # refuses before the weights are loaded
        model_config = cls._model_config(config)
        made: list[str] = []

        def make(name: str, tensor: Tensor) -> None:
            initialise(name, tensor, config.initializer_range)
            made.append(name)

        def load() -> M:
            weights = load_checkpoint(
                folder,
                model_config,
                device=target,
                dtype=chosen,
                dequantize=True,
                any_head=cls.is_bare,
                new_head=None if model_config.classifier is None else make,
            )
            model = cls.__new__(cls)
            model._set_up(config, model_config, weights, ops)
            model._read_more(folder)
            return model

        # A thread of its own is also free of what the caller has set for his: a default device,
        # inference mode, autocast.
        model = in_temporary_thread(load)
        config.name_or_path, config.dtype = pretrained_model_name_or_path, chosen
        if made:
            warnings.warn(
                f"{folder} has no {' and no '.join(made)}: made at random; train it before use",
                stacklevel=2,
            )
        return model

    def _read_more(self, folder: Path) -> None:
        """Read what a subclass needs of a checkpoint beside config and weights."""

    @classmethod
    def from_config(
        cls: type[M],
        config: PreTrainedConfig,
        *,
        dtype: str | torch.dtype | None = None,
        torch_dtype: str | torch.dtype | None = None,
        attn_implementation: str | None = None,
        trust_remote_code: bool | None = None,
        **options: Any,
    ) -> M:
        """The same as calling the class: a model with random weights."""
        if attn_implementation is not None:
            config._attn_implementation = attn_implementation
        if (chosen := dtype or torch_dtype) not in (None, "auto"):
            config.torch_dtype = chosen
        return cls(config, dtype=chosen, **options)  # pyright: ignore[reportCallIssue]

    def save_pretrained(
        self, save_directory: str | Path, *, max_shard_size: int | str = "5GB", **options: Any
    ) -> None:
        """Write config.json and the weights to a folder, for this package and transformers.

        max_shard_size: bytes of one file, as a number or as in "500MB".
        """
        _take_neutral(options, _SAVING)
        known = {"save_directory", "max_shard_size", *_SAVING}
        refuse_unknown(f"{type(self).__name__}.save_pretrained", options, known)
        more = ("problem_type", "output_hidden_states", "output_attentions", "tie_word_embeddings")
        values = self.config.to_dict()
        save_checkpoint(
            save_directory,
            self._model_config(self.config),
            self._gemma.weights,
            max_shard_bytes=read_size("max_shard_size", max_shard_size),
            more_config={name: values[name] for name in more if name in values},
        )

    @classmethod
    def _model_config(cls, config: PreTrainedConfig) -> ModelConfig:
        model_config = config.model_config(cls.__name__.removeprefix("Flax"))
        return replace(model_config, tie_word_embeddings=True) if cls.is_bare else model_config


def initialise(name: str, tensor: Tensor, std: float) -> None:
    """Initial weights, in place: norms are offsets from one, so tensors of one axis are zero."""
    if tensor.dim() == 1:
        tensor.zero_()
    else:
        tensor.normal_(0.0, std)


def choose_stored_dtype(dtype: Any, config: PreTrainedConfig, device: torch.device) -> torch.dtype:
    """The dtype asked for; "auto" is that of the stored weights."""
    return choose_dtype(config.dtype or torch.float32 if dtype == "auto" else dtype, device)


def _take_neutral(options: dict[str, Any], neutral: Mapping[str, tuple[Any, ...]]) -> None:
    """Take out keywords that ask for nothing; NotImplementedError where one asks for something."""
    for name in [name for name in options if name in neutral]:
        if (value := options.pop(name)) not in neutral[name]:
            hint = _HINTS.get(name, "leave it out")
            raise NotImplementedError(f"{name}={shorten(value)} is not supported; {hint}")
