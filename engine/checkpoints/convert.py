"""Conversion of checkpoints: Hugging Face safetensors, the original pickles, Flax msgpack.

1. The source's headers are read and held against its config, which is a config.json, a published
   size by name, or the published size that its shapes are those of.
2. Shards are written to a folder inside the target, from the memory-mapped source: a shard is in
   memory at a time, of Flax a tensor.
3. What was written is read back, and every tensor compared, bit for bit, with the source's.
4. Only then the files take their places, config.json last.  Before that the target is as it was.
"""

import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from gemcut.engine.checkpoints.formats import FORMATS, Format, detect_format
from gemcut.engine.checkpoints.hub import FILES, resolve_checkpoint
from gemcut.engine.checkpoints.huggingface import (
    check_file,
    index_of,
    pieces,
    plan_shards,
    write_json,
)
from gemcut.engine.checkpoints.stored_tensors import Entry, Slot, name_of, read_rows, same_bits
from gemcut.engine.config.config_file import key_of, read_json_object
from gemcut.engine.config.model_config import PUBLISHED, ModelConfig
from gemcut.engine.execution.weights import CheckpointTensor, checkpoint_tensors
from gemcut.tokenizer import Tokenizer

CONFIG, TOKENIZER = "config.json", "tokenizer.model"
COMPANIONS = (
    TOKENIZER,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)
SUFFIXES = (".ckpt", ".pth", ".pt", ".bin", ".msgpack", ".safetensors", ".json")
# Of no influence on what the model computes: a config given and one found may differ in them.
BOOKKEEPING = {
    "attention_dropout", "initializer_range", "use_cache", "dtype", "architectures", "id2label",
    "extra",
}  # fmt: skip


@dataclass(frozen=True)
class Source:
    """An open checkpoint whose tensors are exactly those of its config."""

    config: ModelConfig
    entries: dict[str, Entry]  # by slot
    slots: dict[str, tuple[Slot, int]]  # by part: where it stands, and its first row there
    left_aside: int  # tensors of the files that are no part of the language model

    def entry(self, part: CheckpointTensor) -> Entry:
        return self.entries[self.slots[part.name][0].name]

    def read(self, part: CheckpointTensor, dtype: torch.dtype) -> Tensor:
        slot, start = self.slots[part.name]
        stop = start + part.shape[0]
        entry = self.entries[slot.name]
        return read_rows(entry, start, stop, dtype, transposed=slot.transposed)


@dataclass(frozen=True)
class Converted:
    """What a conversion has done."""

    target: Path
    source_format: str
    target_format: str
    config: ModelConfig
    inferred: str | None  # the published size that the shapes gave
    tensors: int  # written, read back and compared
    nbytes: int
    files: tuple[str, ...]
    nonfinite: tuple[str, ...]  # parts that hold a NaN or an infinity
    left_aside: int


def convert(
    source: str | Path,
    target: str | Path,
    *,
    to: str = "huggingface",
    source_format: str | None = None,
    config: str | Path | None = None,
    dtype: torch.dtype | None = None,
    tokenizer: str | Path | None = None,
    max_shard_bytes: int = 5 * 10**9,
    overwrite: bool = False,
) -> Converted:
    """Write the model at `source`, a file or folder, to folder `target` in format `to`.

    Formats are huggingface, original and flax; the source's is seen from its files.  `config` is a
    config.json, its folder or a published size.  Tensors keep their dtype unless `dtype` is given;
    int8 ones become bfloat16.  ValueError or OSError say what is wrong; the target is then as it
    was.
    """
    for name in (to, source_format):
        if name is not None and name not in FORMATS:
            raise ValueError(f"format {name!r} is not supported; there are {', '.join(FORMATS)}")
    source, target = _locate(source), Path(target).expanduser()
    source_format = detect_format(source, source_format)
    form = FORMATS[source_format]
    _check_target(source, target, overwrite)
    companions = _find_companions(source, tokenizer)
    opened, inferred = _open(source, form, config)
    dtypes = _choose_dtypes(source, opened, dtype)
    embedding = next(iter(dtypes.values()))
    written_config = replace(opened.config, dtype=name_of(embedding))

    new_form = FORMATS[to]
    slots = {slot.name: slot for slot in new_form.slots(opened.config)}
    sizes = _sizes(slots, dtypes)
    total = sum(sizes.values())
    shards = plan_shards(sizes, max_shard_bytes, new_form.single, new_form.shard)
    nonfinite: set[str] = set()
    with _staging(target) as stage:
        if total > (free := shutil.disk_usage(stage).free):
            raise OSError(
                f"{target}: the result takes {total / 1e9:.2f} GB, {free / 1e9:.2f} GB are free"
            )
        with _bar("converting", total) as bar:

            def make(slot: Slot) -> Tensor:
                tensors = [opened.read(part, dtypes[part.name]) for part in slot.parts]
                for part, tensor in zip(slot.parts, tensors, strict=True):
                    if not all(piece.isfinite().all() for piece in pieces(tensor)):
                        nonfinite.add(part.name)
                whole = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
                bar.update(whole.nbytes)
                return whole.T.contiguous() if slot.transposed else whole

            for name, held in shards.items():
                tensors = {key: lambda slot=slots[key]: make(slot) for key in held}
                _write(new_form, stage / name, tensors)
        if len(shards) > 1:
            write_json(stage / new_form.index, index_of(shards, sizes))
        for name, file in companions.items():
            shutil.copyfile(file, stage / name)
        write_json(stage / CONFIG, written_config.to_dict())
        _verify(target, stage, new_form, opened, dtypes, written_config)
        _publish(stage, target)
    return Converted(
        target=target,
        source_format=source_format,
        target_format=to,
        config=written_config,
        inferred=inferred,
        tensors=len(dtypes),
        nbytes=total,
        files=tuple(shards),
        nonfinite=tuple(name for name in dtypes if name in nonfinite),
        left_aside=opened.left_aside,
    )


def _locate(source: str | Path) -> Path:
    """A file or folder; or what `resolve_checkpoint` finds, which never fetches a pickle."""
    path = Path(source).expanduser()
    if path.exists() or isinstance(source, Path) or path.suffix in SUFFIXES:
        return path
    return resolve_checkpoint(source, files=[*FILES, *COMPANIONS])


def _folder(source: Path) -> Path:
    return source if source.is_dir() else source.parent


def _check_target(source: Path, target: Path, overwrite: bool) -> None:
    if target.resolve() == _folder(source).resolve():
        raise ValueError(f"{target}: the source is there; give another folder")
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target}: a file; the target is a folder")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise ValueError(f"{target}: not empty; --overwrite replaces the model in it")


def _find_companions(source: Path, tokenizer: str | Path | None) -> dict[str, Path]:
    """The files to copy beside the weights, by their names there."""
    folder = _folder(source)
    found = {name: folder / name for name in COMPANIONS if (folder / name).is_file()}
    if tokenizer is not None:
        found[TOKENIZER] = Path(tokenizer).expanduser()
        check_file(found[TOKENIZER])
        Tokenizer.from_file(found[TOKENIZER])
    for file in found.values():
        check_file(file)
    return found


def _open(source: Path, form: Format, given: str | Path | None) -> tuple[Source, str | None]:
    """The source under its config, and the name of the published size it was taken for."""
    opened = form.open_tensors(source)
    beside = _config_beside(source)
    inferred = None
    if given is not None:
        config = _config_given(given)
        if beside is not None:
            _check_agreement(source, config, beside)
            config = beside  # with its bookkeeping
    elif beside is not None:
        config = beside
    else:
        inferred = _infer(source, form, opened)
        config = PUBLISHED[inferred]
    entries = form.match(source, opened, config)
    slots: dict[str, tuple[Slot, int]] = {}
    for slot in form.slots(config):
        start = 0
        for part in slot.parts:
            slots[part.name] = (slot, start)
            start += part.shape[0]
    used = sum(1 if entry.scaler is None else 2 for entry in entries.values())
    return Source(config, entries, slots, len(opened) - used), inferred


def _config_beside(source: Path) -> ModelConfig | None:
    file = _folder(source) / CONFIG
    # Without a model_type it is another program's.
    if not file.exists() or "model_type" not in read_json_object(file):
        return None
    return ModelConfig.from_file(file)


def _config_given(given: str | Path) -> ModelConfig:
    if given in PUBLISHED:
        return PUBLISHED[str(given)]
    if not Path(given).expanduser().exists():
        raise ValueError(
            f"config {str(given)!r} is neither a file nor a published size: {', '.join(PUBLISHED)}"
        )
    return ModelConfig.from_file(Path(given).expanduser())


def _check_agreement(source: Path, given: ModelConfig, beside: ModelConfig) -> None:
    one, other = asdict(given), asdict(beside)
    if differing := [name for name in one if name not in BOOKKEEPING and one[name] != other[name]]:
        name = differing[0]
        more = f", and {len(differing) - 1} more differ" if differing[1:] else ""
        raise ValueError(
            f"{_folder(source) / CONFIG}: {key_of(name)} is {other[name]}, "
            f"but {one[name]} in the config given{more}"
        )


def _infer(source: Path, form: Format, opened: Any) -> str:
    fits = []
    for name, config in PUBLISHED.items():
        with suppress(ValueError):
            form.match(source, opened, config)
            fits.append(name)
    if len(fits) == 1:
        return fits[0]
    raise ValueError(
        f"{source}: no {CONFIG} beside it, and its tensors are those of "
        f"{' and '.join(fits) or 'no published size'}; give --config, a config.json or one of "
        f"{', '.join(PUBLISHED)}"
    )


def _choose_dtypes(path: Path, source: Source, asked: torch.dtype | None) -> dict[str, torch.dtype]:
    """The dtype in which each part is written, the embedding's first."""
    if asked is not None and asked not in (torch.bfloat16, torch.float32):
        raise ValueError(f"dtype {name_of(asked)} is refused: give bfloat16 or float32")
    scaled = any(entry.scaler is not None for entry in source.entries.values())
    chosen = asked or (torch.bfloat16 if scaled else None)
    dtypes = {
        part.name: chosen or source.entry(part).dtype for part in checkpoint_tensors(source.config)
    }
    for name, dtype in dtypes.items():
        if dtype == torch.float16:
            raise ValueError(
                f"{path}: {name} is float16, which Gemma's activations overflow; "
                f"give --dtype bfloat16 or float32"
            )
    return dtypes


def _sizes(slots: Mapping[str, Slot], dtypes: Mapping[str, torch.dtype]) -> dict[str, int]:
    """The bytes of each tensor to be written."""
    sizes = {}
    for slot in slots.values():
        kinds = {dtypes[part.name] for part in slot.parts}
        if len(kinds) > 1:
            names = " and ".join(sorted(map(name_of, kinds)))
            raise ValueError(f"{slot.name} would join {names}; give --dtype bfloat16 or float32")
        sizes[slot.name] = torch.Size(slot.shape).numel() * kinds.pop().itemsize
    return sizes


def _write(form: Format, file: Path, tensors: Mapping[str, Callable[[], Tensor]]) -> None:
    try:
        form.write(file, tensors)
    except (SafetensorError, RuntimeError) as error:  # how they report a full disk
        raise OSError(
            f"{file}: cannot be written ({next(iter(str(error).splitlines()), '')})"
        ) from None


def _verify(
    target: Path,
    stage: Path,
    form: Format,
    source: Source,
    dtypes: Mapping[str, torch.dtype],
    config: ModelConfig,
) -> None:
    """Nothing, or ValueError where the files do not hold what was to be written."""
    try:
        written, _ = _open(stage, form, None)
    except ValueError as error:
        raise ValueError(f"{target}: cannot be read back; nothing was kept ({error})") from None
    if written.config != config:
        raise ValueError(f"{target}: {CONFIG} reads back as another config; nothing was kept")
    with _bar("verifying", sum(map(_nbytes(dtypes), checkpoint_tensors(config)))) as bar:
        for part in checkpoint_tensors(config):
            meant = source.read(part, dtypes[part.name])
            if not same_bits(written.read(part, written.entry(part).dtype), meant):
                raise ValueError(
                    f"{target}: {part.name} reads back otherwise than it was written; "
                    f"nothing was kept"
                )
            bar.update(meant.nbytes)


def _nbytes(dtypes: Mapping[str, torch.dtype]) -> Callable[[CheckpointTensor], int]:
    return lambda part: torch.Size(part.shape).numel() * dtypes[part.name].itemsize


@contextmanager
def _staging(target: Path) -> Iterator[Path]:
    """A new folder in `target`, gone at the end; `target` too, where it was made for nothing."""
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


def _publish(stage: Path, target: Path) -> None:
    """Move the files to their places; weights of an earlier conversion go."""
    (target / CONFIG).unlink(missing_ok=True)
    for form in FORMATS.values():
        numbered = form.shard.replace("{:05d}", "[0-9]*")
        for file in (target / form.single, target / form.index, *target.glob(numbered)):
            file.unlink(missing_ok=True)
    for file in sorted(stage.iterdir(), key=lambda file: file.name == CONFIG):
        shutil.copymode(stage / CONFIG, file)  # safetensors' files are readable to no one else
        os.replace(file, target / file.name)


def _bar(label: str, total: int) -> tqdm:
    return tqdm(
        total=total,
        desc=label,
        unit="B",
        unit_scale=True,
        leave=False,
        disable=not sys.stderr.isatty(),
    )
