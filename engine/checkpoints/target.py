"""The target of a conversion: its tensors and files, their writing, and the move into place.

Files are written to a folder inside the target.  A shard is in memory at a time, of Flax a tensor.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from gemcut.engine.checkpoints.compressed_target import (
    config_to_write,
    layout_to_write,
    part_sizes,
    parts_of,
)
from gemcut.engine.checkpoints.formats import FORMATS, Format
from gemcut.engine.checkpoints.source import CONFIG, Source
from gemcut.engine.checkpoints.stored_tensors import TensorSpec, name_of, pieces
from gemcut.engine.checkpoints.stored_weights import Layout, check_finite, check_quantization
from gemcut.engine.checkpoints.weight_files import (
    byte_bar,
    divide_into_shards,
    index_of,
    write_json,
)
from gemcut.engine.config.model_config import ModelConfig
from gemcut.engine.config.quantization_config import read_quantization
from gemcut.engine.execution.weights import checkpoint_tensors


@dataclass(frozen=True)
class Target:
    """What is written to a folder: a config, and tensors in the files of one format."""

    folder: Path
    form: Format
    config: ModelConfig
    dtypes: dict[str, torch.dtype]  # of each checkpoint tensor, the embedding's first
    specs: dict[str, TensorSpec]  # of each tensor in the files; several of a quantised one
    sizes: dict[str, int]  # bytes of each tensor in the files
    shards: dict[str, list[str]]  # file -> the tensors in it
    layouts: dict[str, Layout]  # of the checkpoint tensors that are quantised

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors."""
        return sum(self.sizes.values())


def lay_out(
    source: Source,
    folder: Path,
    form: Format,
    dtype: torch.dtype | None,
    max_shard_bytes: int,
    quantization: str | None = None,
) -> Target:
    """The target for the tensors of `source`, in `folder` and in format `form`."""
    check_quantization(quantization, source.config)
    dtypes = _choose_dtypes(source, dtype)
    layouts: dict[str, Layout] = {}
    for tensor in checkpoint_tensors(source.config) if quantization is not None else ():
        layout = layout_to_write(str(quantization), tensor, dtypes[tensor.name])
        if layout is not None:
            layouts[tensor.name] = layout
    config = replace(
        source.config,
        dtype=name_of(next(iter(dtypes.values()))),
        quantization=read_quantization(quantization and config_to_write(quantization)),
    )
    specs: dict[str, TensorSpec] = {}
    sizes: dict[str, int] = {}
    for spec in form.tensor_specs(config):
        found = _sizes(spec, dtypes, layouts)
        sizes |= found
        specs |= dict.fromkeys(found, spec)
    shards = divide_into_shards(sizes, max_shard_bytes, form.SINGLE, form.SHARD)
    return Target(folder, form, config, dtypes, specs, sizes, shards, layouts)


def _choose_dtypes(source: Source, asked: torch.dtype | None) -> dict[str, torch.dtype]:
    """The dtype in which each checkpoint tensor is written, the embedding's first."""
    if asked is not None and asked not in (torch.bfloat16, torch.float32):
        raise ValueError(f"dtype {name_of(asked)} is refused: give bfloat16 or float32")
    scaled = any(stored.scaler is not None for stored in source.stored.values())
    chosen = asked or (torch.bfloat16 if scaled else None)
    dtypes = {
        tensor.name: chosen or source.holder(tensor).dtype
        for tensor in checkpoint_tensors(source.config)
    }
    for name, dtype in dtypes.items():
        if dtype == torch.float16:
            raise ValueError(
                f"{source.path}: {name} is float16, which Gemma's activations overflow; "
                f"give --dtype bfloat16 or float32"
            )
    return dtypes


def _sizes(
    spec: TensorSpec, dtypes: Mapping[str, torch.dtype], layouts: Mapping[str, Layout]
) -> dict[str, int]:
    """The tensors in the files that hold one of the format's, and the bytes of each."""
    if spec.name in layouts:
        return part_sizes(spec.name, spec.shape, layouts[spec.name])
    kinds = {dtypes[tensor.name] for tensor in spec.members}
    if len(kinds) > 1:
        names = " and ".join(sorted(map(name_of, kinds)))
        raise ValueError(f"{spec.name} would join {names}; give --dtype bfloat16 or float32")
    return {spec.name: torch.Size(spec.shape).numel() * kinds.pop().itemsize}


@contextmanager
def staging_folder(target: Path) -> Iterator[Path]:
    """A new folder in `target`, removed at the end; `target` too, where it was made for nothing."""
    made = not target.exists()
    target.mkdir(parents=True, exist_ok=True)
    stage = target / f".convert-{os.getpid()}.tmp"
    try:
        stage.mkdir()
        yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        if made:
            with suppress(OSError):  # not empty: it holds the result
                target.rmdir()


def write_files(
    stage: Path, target: Target, source: Source, companions: Mapping[str, Path | bytes]
) -> list[str]:
    """Write all files to folder `stage`; the names of tensors that hold a NaN or an infinity."""
    if target.nbytes > (free := shutil.disk_usage(stage).free):
        raise OSError(
            f"{target.folder}: the result takes {target.nbytes / 1e9:.2f} GB, "
            f"{free / 1e9:.2f} GB are free"
        )
    nonfinite = _write_weights(stage, target, source)
    for name, file in companions.items():
        if isinstance(file, bytes):
            (stage / name).write_bytes(file)
        else:
            shutil.copyfile(file, stage / name)
    write_json(stage / CONFIG, target.config.to_dict())
    return [name for name in target.dtypes if name in nonfinite]


def _write_weights(stage: Path, target: Target, source: Source) -> set[str]:
    nonfinite: set[str] = set()
    with byte_bar("converting", target.nbytes) as bar:

        @lru_cache(maxsize=1)  # the parts of a quantised matrix are written one after another
        def make_all(spec: TensorSpec) -> dict[str, Tensor]:
            tensors = []
            for member in spec.members:
                tensor = source.read(member, target.dtypes[member.name])
                if not all(piece.isfinite().all() for piece in pieces(tensor)):
                    nonfinite.add(member.name)
                tensors.append(tensor)
            whole = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
            if (layout := target.layouts.get(spec.name)) is not None:
                check_finite(spec.name, whole)
                return parts_of(spec.name, layout.quantize(whole))
            return {spec.name: whole.T.contiguous() if spec.transposed else whole}

        def make(name: str) -> Tensor:
            made = make_all(target.specs[name])[name]
            bar.update(made.nbytes)
            return made

        for name, held in target.shards.items():
            _write_file(target.form, stage / name, {key: partial(make, key) for key in held})
    if len(target.shards) > 1:
        write_json(stage / target.form.INDEX, index_of(target.shards, target.sizes))
    return nonfinite


def _write_file(form: Format, file: Path, tensors: Mapping[str, Callable[[], Tensor]]) -> None:
    try:
        form.write_file(file, tensors)
    except (SafetensorError, RuntimeError) as error:  # how they report a full disk
        raise OSError(
            f"{file}: cannot be written ({next(iter(str(error).splitlines()), '')})"
        ) from None


def move_into_place(stage: Path, target: Path) -> None:
    """Move the files to their places, config.json last; weights of an earlier conversion go."""
    (target / CONFIG).unlink(missing_ok=True)
    for form in FORMATS.values():
        numbered = form.SHARD.replace("{:05d}", "[0-9]*")
        for file in (target / form.SINGLE, target / form.INDEX, *target.glob(numbered)):
            file.unlink(missing_ok=True)
    for file in sorted(stage.iterdir(), key=lambda file: file.name == CONFIG):
        shutil.copymode(stage / CONFIG, file)  # only their owner may read safetensors' files
        os.replace(file, target / file.name)
