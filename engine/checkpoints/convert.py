"""Conversion of checkpoints: Hugging Face safetensors, the original pickles, Flax msgpack, GGUF.

1. The source's headers are read and held against its config (source.py).
2. Shards are written to a folder inside the target, from the memory-mapped source (target.py).
3. The written files are read back, and every tensor compared, bit for bit, with the source's.
4. Only then the files are moved into place, config.json last.  Before that the target is as it was.

formats.py lists the formats; each is one module.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from gemcut.engine.checkpoints.formats import FORMATS, SOURCES, detect_format
from gemcut.engine.checkpoints.source import (
    CONFIG,
    Source,
    find_companions,
    find_source,
    folder_of,
    open_source,
    with_adapter,
)
from gemcut.engine.checkpoints.stored_tensors import same_bits
from gemcut.engine.checkpoints.target import (
    Target,
    lay_out,
    move_into_place,
    staging_folder,
    write_files,
)
from gemcut.engine.checkpoints.weight_files import byte_bar
from gemcut.engine.config.model_config import ModelConfig
from gemcut.engine.execution.weights import checkpoint_tensors
from gemcut.kernels.quantized_weight import dequantized


@dataclass(frozen=True)
class Converted:
    """The result of a conversion."""

    target: Path
    source_format: str
    target_format: str
    config: ModelConfig
    inferred: str | None  # the published size that the shapes gave
    tensors: int  # written, read back and compared
    nbytes: int
    files: tuple[str, ...]
    nonfinite: tuple[str, ...]  # tensors that hold a NaN or an infinity
    left_aside: int


def convert(
    source: str | Path,
    target: str | Path,
    *,
    to: str = "huggingface",
    source_format: str | None = None,
    config: str | Path | None = None,
    dtype: torch.dtype | None = None,
    quantization: str | None = None,
    lora: str | Path | None = None,
    tokenizer: str | Path | None = None,
    max_shard_bytes: int = 5 * 10**9,
    overwrite: bool = False,
) -> Converted:
    """Write the model at `source`, a file or folder, to folder `target` in format `to`.

    Formats are huggingface, original and flax, and of a source gguf too; the source's is seen from
    its files.  `config` is a config.json, its folder or a published size.  Tensors keep their dtype
    unless `dtype` is given; int8 ones, and those of a GGUF file, become bfloat16.  `quantization`
    is int8, int4 or fp8: the matrices of layers are written as compressed-tensors has them
    (compressed_target.py).  `lora` is a folder or Hugging Face id of an adapter, which is merged
    into weights in Hugging Face's format (lora.py).  ValueError or OSError say what is wrong; the
    target is then as it was.
    """
    for name, known in ((to, FORMATS), (source_format, SOURCES)):
        if name is not None and name not in known:
            raise ValueError(f"format {name!r} is not supported; there are {', '.join(known)}")
    if quantization is not None and to != "huggingface":
        raise ValueError(f"quantization {quantization!r} has no place in format {to!r}")
    path, folder = find_source(source), Path(target).expanduser()
    source_format = detect_format(path, source_format)
    if lora is not None and source_format != "huggingface":
        raise ValueError(
            f"an adapter is merged into weights in Hugging Face's format, and {path} is in that of "
            f"{source_format}; convert it first"
        )
    _check_target(path, folder, overwrite)
    companions = find_companions(path, tokenizer)
    opened = open_source(path, SOURCES[source_format], config)
    opened = opened if lora is None else with_adapter(opened, lora)

    new = lay_out(opened, folder, FORMATS[to], dtype, max_shard_bytes, quantization)
    with staging_folder(folder) as stage:
        nonfinite = write_files(stage, new, opened, companions)
        verify(stage, new, opened)
        move_into_place(stage, folder)
    return Converted(
        target=folder,
        source_format=source_format,
        target_format=to,
        config=new.config,
        inferred=opened.inferred,
        tensors=len(new.dtypes),
        nbytes=new.nbytes,
        files=tuple(new.shards),
        nonfinite=tuple(nonfinite),
        left_aside=opened.left_aside,
    )


def _check_target(source: Path, target: Path, overwrite: bool) -> None:
    """Nothing, or ValueError where `target` must not be written."""
    if target.resolve() == folder_of(source).resolve():
        raise ValueError(f"{target}: the source is there; give another folder")
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target}: a file; the target is a folder")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise ValueError(f"{target}: not empty; --overwrite replaces the model in it")


def verify(stage: Path, target: Target, source: Source) -> None:
    """Nothing, or ValueError where the files in `stage` do not hold what they should."""
    try:
        written = open_source(stage, target.form)
    except ValueError as error:
        raise ValueError(
            f"{target.folder}: cannot be read back; nothing was kept ({error})"
        ) from None
    if written.config != target.config:
        raise ValueError(
            f"{target.folder}: {CONFIG} reads back as another config; nothing was kept"
        )
    with byte_bar("verifying", target.nbytes) as bar:
        for tensor in checkpoint_tensors(target.config):
            meant, dtype = source.read(tensor, target.dtypes[tensor.name]), None
            if (layout := target.layouts.get(tensor.name)) is not None:
                dtype = torch.float32  # holds what it stands for without rounding
                meant = dequantized(layout.quantize(meant), dtype)
            found = written.read(tensor, dtype or written.holder(tensor).dtype)
            if not same_bits(found, meant):
                raise ValueError(
                    f"{target.folder}: {tensor.name} reads back otherwise than it was written; "
                    f"nothing was kept"
                )
            bar.update(meant.nbytes)
