"""Loading of a checkpoint: config, tokenizer, Weights, and a search for non-finite values.

It is a folder in Hugging Face's format, or a GGUF file.

Tensors are copied one at a time out of the memory-mapped file into their rows of the fused ones, so
that the model is in memory once; quantised or not (stored_weights.py).
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemcut.engine.checkpoints.compressed_cache import stored_scales
from gemcut.engine.checkpoints.compressed_tensors import config_layouts
from gemcut.engine.checkpoints.gguf_choice import is_gguf
from gemcut.engine.checkpoints.gguf_model import (
    gguf_config,
    gguf_layouts,
    gguf_settings,
    gguf_tokenizer,
    gguf_weights,
    nonfinite_in_gguf,
)
from gemcut.engine.checkpoints.huggingface import (
    match_weights,
    open_named,
    open_tensors,
    require_files,
)
from gemcut.engine.checkpoints.lora import Adapter
from gemcut.engine.checkpoints.safetensor_headers import open_file
from gemcut.engine.checkpoints.stored_tensors import pieces
from gemcut.engine.checkpoints.stored_weights import check_quantization, fill_weights
from gemcut.engine.checks import warn_caller
from gemcut.engine.config.generation_file import published_settings, settings_of
from gemcut.engine.config.model_config import ModelConfig
from gemcut.engine.config.quantization_config import CACHE_NOTE
from gemcut.engine.execution.cache_scales import Scales
from gemcut.engine.execution.weight_layouts import Layouts
from gemcut.engine.execution.weights import Weights, checkpoint_tensors, made_layouts, plain
from gemcut.tokenizer import Tokenizer
from gemcut.tokenizer.chat import check_template
from gemcut.tokenizer.tokenizer_files import JSON_FILE, MODEL_FILE


def load_config(path: Path) -> ModelConfig:
    """The config of a folder or a GGUF file."""
    return gguf_config(path) if is_gguf(path) else ModelConfig.from_file(path)


def load_settings(path: Path) -> dict[str, Any]:
    """The settings of sampling that a folder or a GGUF file publishes."""
    return settings_of(gguf_settings(path)) if is_gguf(path) else published_settings(path)


def expected_layouts(
    config: ModelConfig, quantization: str | None, path: Path | None = None
) -> Layouts:
    """The layouts of a model's weights by its config and what is asked for; errors as in loading.

    Those of a quantised checkpoint are what quantization_config says, with bfloat16 scales; those
    of a GGUF file, `path`, are its tensors'.
    """
    check_quantization(quantization, config)
    if path is not None and is_gguf(path):
        return gguf_layouts(path, config, quantization)
    return config_layouts(config) if quantization is None else made_layouts(config, quantization)


def load_cache_scales(path: Path, config: ModelConfig, device: torch.device) -> Scales | None:
    """The scales of a KV cache in fp8 that a checkpoint holds, checked; None where it has none."""
    if config.quantization is None or config.quantization.cache_strategy is None:
        return None
    scales = stored_scales(open_named(path, config), config, config.quantization.cache_strategy)
    if scales is None:
        warn_caller(
            f"{path}: kv_cache_scheme is there, but no scales of keys and values: those of "
            "the weights take their place"
        )
        return None
    return [(keys.to(device), values.to(device)) for keys, values in scales]


def load_checkpoint(
    path: str | Path,
    config: ModelConfig,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    quantization: str | None = None,
    dequantize: bool = False,
    any_head: bool = False,
    new_head: Callable[[str, Tensor], object] | None = None,
    has_cache_scales: bool = False,
    adapter: Adapter | None = None,
) -> Weights:
    """The weights at `path`, on `device` in `dtype`; ValueError names what is at fault.

    Matrices that are quantised in the files stay so, and with `dequantize` become floats.
    `quantization` quantises those of a plain checkpoint: "int8", "int4" or "fp8".

    Expects exactly the tensors of `config`.  Left aside are rotary buffers of old files, and what
    belongs to the vision part of a multimodal Gemma 3; with `any_head`, for models that stop at
    hidden states, heads too.  `new_head` fills a classifier's tensors where the files have none.
    With `has_cache_scales` those are in use, and no warning says that they are left aside.
    `adapter` was opened for this config; the weights are then those of its own.
    """
    if dtype == torch.float16:
        raise ValueError("dtype float16 is refused: Gemma's activations overflow it; use bfloat16")
    if not dtype.is_floating_point:
        raise ValueError(f"dtype {dtype} is refused: weights are bfloat16 or float32")
    check_quantization(quantization, config)
    folder = Path(path)
    may_lack = new_head is not None
    if is_gguf(folder):
        stored = gguf_weights(folder, config, dtype)
    else:
        stored = match_weights(folder, open_tensors(folder), config, any_head or may_lack, may_lack)
    for note in () if config.quantization is None else config.quantization.notes:
        if note != CACHE_NOTE or not has_cache_scales:
            warn_caller(f"{folder}: {note}")
    if adapter is not None:
        stored, config = adapter.merge(stored), adapter.config
    weights = fill_weights(
        config,
        stored,
        device=device,
        dtype=dtype,
        quantization=quantization,
        dequantize=dequantize,
    )
    for tensor in checkpoint_tensors(config):
        if tensor.name not in stored:
            assert new_head is not None
            new_head(tensor.name, plain(tensor.of(weights)))
    return weights


def find_nonfinite(path: str | Path) -> list[str]:
    """The names of the tensors at `path` that hold a NaN or an infinity."""
    if is_gguf(Path(path)):
        return nonfinite_in_gguf(Path(path))
    return nonfinite_in(require_files(Path(path)))


def nonfinite_in(files: Iterable[Path]) -> list[str]:
    """The same of safetensors files."""
    found = []
    for file in files:
        with open_file(file) as shard:
            for key in sorted(shard.keys()):
                tensor = shard.get_tensor(key)
                if tensor.is_floating_point() and not all(
                    piece.float().isfinite().all() for piece in pieces(tensor)
                ):
                    found.append(key)
    return found


def load_tokenizer(folder: Path, config: ModelConfig) -> Tokenizer:
    """The tokenizer of a checkpoint, checked with its chat template, before weights are read."""
    tokenizer = open_tokenizer(folder)
    tokenizer.check_embedding(config.vocab_size)
    check_template(tokenizer)
    return tokenizer


def open_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a folder or a GGUF file."""
    if is_gguf(folder):
        return gguf_tokenizer(folder)
    if not any((folder / name).is_file() for name in (MODEL_FILE, JSON_FILE)):
        raise ValueError(
            f"{folder} holds neither {MODEL_FILE} nor {JSON_FILE}; with skip_tokenizer_init=True "
            "an engine takes token ids alone"
        )
    return Tokenizer.from_file(folder)
