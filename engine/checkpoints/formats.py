"""The formats of checkpoints that are converted, and which of them a file or folder holds."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from gemcut.engine.checkpoints import flax, gemma_pytorch, huggingface
from gemcut.engine.checkpoints.stored_tensors import FLOATS, Entry, Slot
from gemcut.engine.config.model_config import ModelConfig
from gemcut.engine.execution.weights import checkpoint_tensors


@dataclass(frozen=True)
class Format:
    """One kind of checkpoint: its files, and how they are read and written."""

    single: str
    shard: str
    index: str
    find_files: Callable[[Path], list[Path]]
    open_tensors: Callable[[Path], Any]
    match: Callable[[Path, Any, ModelConfig], dict[str, Entry]]
    slots: Callable[[ModelConfig], Iterator[Slot]]
    write: Callable[[Path, Mapping[str, Callable[[], Tensor]]], None]


def _find_huggingface(path: Path) -> list[Path]:
    names = (huggingface.SINGLE, huggingface.INDEX)
    return [path / name for name in names if (path / name).exists()][:1]


def _match_huggingface(path: Path, opened: Any, config: ModelConfig) -> dict[str, Entry]:
    stored = huggingface.match_tensors(path, opened, config)
    names = ("BF16", "F32", "F16", "F64")
    dtypes: dict[str, torch.dtype] = dict(zip(names, FLOATS, strict=True))
    return {
        name: Entry(str(tensor), tensor.shape, dtypes[tensor.dtype], tensor.load)
        for name, tensor in stored.items()
    }


def _huggingface_slots(config: ModelConfig) -> Iterator[Slot]:
    return (Slot(part.name, part.shape, (part,)) for part in checkpoint_tensors(config))


def _write_huggingface(file: Path, tensors: Mapping[str, Callable[[], Tensor]]) -> None:
    made = {name: make() for name, make in tensors.items()}
    save_file(made, file, metadata={"format": "pt"})


FORMATS = {
    "huggingface": Format(
        single=huggingface.SINGLE,
        shard=huggingface.SHARD,
        index=huggingface.INDEX,
        find_files=_find_huggingface,
        open_tensors=huggingface.read_headers,
        match=_match_huggingface,
        slots=_huggingface_slots,
        write=_write_huggingface,
    ),
    "original": Format(
        single=gemma_pytorch.SINGLE,
        shard=gemma_pytorch.SHARD,
        index=gemma_pytorch.INDEX,
        find_files=gemma_pytorch.find_files,
        open_tensors=gemma_pytorch.open_tensors,
        match=gemma_pytorch.match,
        slots=gemma_pytorch.slots,
        write=gemma_pytorch.write,
    ),
    "flax": Format(
        single=flax.SINGLE,
        shard=flax.SHARD,
        index=flax.INDEX,
        find_files=flax.find_files,
        open_tensors=flax.open_tensors,
        match=flax.match,
        slots=flax.slots,
        write=flax.write,
    ),
}


def detect_format(source: Path, asked: str | None = None) -> str:
    """The name of the format at `source`; ValueError where there is none, or several."""
    if not source.exists():
        raise ValueError(f"{source}: no such file or folder")
    if source.suffix == ".safetensors" and not source.is_dir():
        raise ValueError(f"{source}: give the folder that holds it, with its config.json")
    if asked is not None:
        return asked  # its reader says what it misses
    found = {name: form.find_files(source) for name, form in FORMATS.items()}
    names = [name for name, files in found.items() if files]
    if len(names) > 1:
        listed = ", ".join(f"{found[name][0].name} ({name})" for name in names)
        raise ValueError(f"{source}: holds {listed}; say with --from which to convert")
    if not names:
        wanted = [each for form in FORMATS.values() for each in (form.single, form.index)]
        raise ValueError(
            f"{source}: holds no weights that are known here: "
            f"{', '.join(wanted)}, or another .ckpt file"
        )
    return names[0]
