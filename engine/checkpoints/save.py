"""Saving of Weights as a Hugging Face checkpoint."""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from gemcut.engine.checkpoints.huggingface import INDEX, SHARD, SINGLE
from gemcut.engine.checkpoints.stored_tensors import name_of
from gemcut.engine.checkpoints.weight_files import (
    divide_into_shards,
    index_of,
    renamed,
    write_json,
)
from gemcut.engine.config.model_config import ModelConfig
from gemcut.engine.execution.weights import Weights, checkpoint_tensors, plain


def save_checkpoint(
    path: str | Path,
    config: ModelConfig,
    weights: Weights,
    *,
    tokenizer_file: str | Path | None = None,
    max_shard_bytes: int = 5 * 10**9,
    more_config: Mapping[str, Any] | None = None,
) -> None:
    """Write config.json, weights and tokenizer to folder `path`, for this package and transformers.

    More than `max_shard_bytes` become several files and an index.  Each file is written under a
    temporary name and renamed, config.json last; weight files of an earlier save are removed.
    `more_config` goes to config.json too.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    views: dict[str, Tensor] = {}
    for tensor in checkpoint_tensors(config):
        view = plain(tensor.of(weights))
        if view.shape != tensor.shape:
            raise ValueError(
                f"{tensor.name} is {tuple(view.shape)}, the config says {tensor.shape}"
            )
        views[tensor.name] = view

    sizes = {name: view.nbytes for name, view in views.items()}
    shards = divide_into_shards(sizes, max_shard_bytes, SINGLE, SHARD)
    for file, names in shards.items():
        tensors = {name: views[name].detach().cpu().contiguous() for name in names}
        with renamed(folder / file) as temporary:
            save_file(tensors, temporary, metadata={"format": "pt"})
    if len(shards) > 1:
        write_json(folder / INDEX, index_of(shards, sizes))
    stale = {folder / SINGLE, folder / INDEX, *folder.glob("model-*-of-*.safetensors")}
    written = (*shards, *([INDEX] if len(shards) > 1 else []))
    for file in stale - {folder / name for name in written}:
        file.unlink(missing_ok=True)

    if tokenizer_file is not None:
        with renamed(folder / "tokenizer.model") as temporary:
            shutil.copyfile(tokenizer_file, temporary)
    dtype = name_of(weights.embedding.dtype)
    values = replace(config, dtype=dtype, quantization=None).to_dict()
    write_json(folder / "config.json", {**values, **(more_config or {})})
