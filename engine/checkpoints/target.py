"""The target of a conversion: its tensors and files, their writing, and the move into place.

Files are written to a folder inside the target.  A shard is in memory at a time, of Flax a tensor.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from gemcut.engine.checkpoints.formats import FORMATS, Format
from gemcut.engine.checkpoints.source import CONFIG, Source
from gemcut.engine.checkpoints.stored_tensors import TensorSpec, name_of, pieces
from gemcut.engine.checkpoints.weight_files import (
    byte_bar,
    divide_into_shards,
    index_of,
    write_json,
)
from gemcut.engine.config.model_config import ModelConfig
from gemcut.engine.execution.weights import checkpoint_tensors


@dataclass(frozen=True)
class Target:
    """What is written to a folder: a config, and tensors in the files of one format."""

    folder: Path
    form: Format
    config: ModelConfig
    dtypes: dict[str, torch.dtype]  # of each checkpoint tensor, the embedding's first
    specs: dict[str, TensorSpec]
    sizes: dict[str, int]  # bytes of each of the format's tensors
    shards: dict[str, list[str]]  # file -> the format's tensors in it

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors."""
        return sum(self.sizes.values())


def lay_out(
    source: Source, folder: Path, form: Format, dtype: torch.dtype | None, max_shard_bytes: int
) -> Target:
    """The target for the tensors of `source`, in `folder` and in format `form`."""
    dtypes = _choose_dtypes(source, dtype)
    config = replace(source.config, dtype=name_of(next(iter(dtypes.values()))))
    specs = {spec.name: spec for spec in form.tensor_specs(source.config)}
    sizes = _sizes(specs, dtypes)
    shards = divide_into_shards(sizes, max_shard_bytes, form.SINGLE, form.SHARD)
    return Target(folder, form, config, dtypes, specs, sizes, shards)


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


def _sizes(specs: Mapping[str, TensorSpec], dtypes: Mapping[str, torch.dtype]) -> dict[str, int]:
    """The bytes of each of the format's tensors."""
    sizes = {}
    for spec in specs.values():
        kinds = {dtypes[tensor.name] for tensor in spec.members}
        if len(kinds) > 1:
            names = " and ".join(sorted(map(name_of, kinds)))
            raise ValueError(f"{spec.name} would join {names}; give --dtype bfloat16 or float32")
        sizes[spec.name] = torch.Size(spec.shape).numel() * kinds.pop().itemsize
    return sizes


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
    stage: Path, target: Target, source: Source, companions: Mapping[str, Path]
) -> list[str]:
    """Write all files to folder `stage`; the names of tensors that hold a NaN or an infinity."""
    if target.nbytes > (free := shutil.disk_usage(stage).free):
        raise OSError(
            f"{target.folder}: the result takes {target.nbytes / 1e9:.2f} GB, "
            f"{free / 1e9:.2f} GB are free"
        )
    nonfinite = _write_weights(stage, target, source)
    for name, file in companions.items():
        shutil.copyfile(file, stage / name)
    write_json(stage / CONFIG, target.config.to_dict())
    return [name for name in target.dtypes if name in nonfinite]


def _write_weights(stage: Path, target: Target, source: Source) -> set[str]:
    nonfinite: set[str] = set()
    with byte_bar("converting", target.nbytes) as bar:

        def make(spec: TensorSpec) -> Tensor:
            tensors = []
            for member in spec.members:
                tensor = source.read(member, target.dtypes[member.name])
                if not all(piece.isfinite().all() for piece in pieces(tensor)):
                    nonfinite.add(member.name)
                tensors.append(tensor)
            whole = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
            bar.update(whole.nbytes)
            return whole.T.contiguous() if spec.transposed else whole

        for name, held in target.shards.items():
            makers = {key: partial(make, target.specs[key]) for key in held}
            _write_file(target.form, stage / name, makers)
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
