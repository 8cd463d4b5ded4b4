"""Checkpoints on disk: safetensors in, safetensors out, and nothing but what the model expects.

A file is judged by its header before a byte is allocated: transformers fills a missing weight with
random numbers and drops one that it does not know; here both are errors.  Tensors are then copied
one at a time out of the memory-mapped file into their rows of the fused ones, so that the model is
in memory once.
"""

import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from gemcut.engine.checks import check_int, shorten
from gemcut.engine.config.config_file import LFS_POINTER, as_token_ids, read_json_object
from gemcut.engine.config.model_config import ModelConfig
from gemcut.engine.execution.weights import (
    CheckpointTensor,
    Weights,
    checkpoint_tensors,
    empty_weights,
)

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = "model-{:05d}-of-{:05d}.safetensors"
FLOATS = {"BF16": 2, "F32": 4, "F16": 2, "F64": 8}  # safetensors' names, and bytes an element
PIECE = 2**25  # elements copied or examined at a time

# Multimodal Gemma 3: `language_model.model.layers` on the Hub, `model.language_model.layers` as
# transformers 5 saves it.
_TEXT_PREFIX = re.compile(r"^(model\.)?language_model\.(model\.)?")
_VISION = re.compile(r"^(model\.)?(vision_tower|multi_modal_projector)\.")
_BARE = re.compile(r"^(?=(embed_tokens|layers|norm)\.)")  # what is saved without a head
_BUFFER = re.compile(r"rotary_emb\.inv_freq$")  # old files; rope.py computes it


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as its file's header describes it."""

    file: Path
    key: str  # its name there
    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.file.name}: {self.key}"

    def load(self) -> Tensor:
        """The tensor itself, from the memory-mapped file."""
        with _open(self.file) as shard:
            return shard.get_tensor(self.key)


def load_checkpoint(
    path: str | Path,
    config: ModelConfig,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    any_head: bool = False,
    new_head: Callable[[str, Tensor], object] | None = None,
) -> Weights:
    """The weights in folder `path`, on `device` in `dtype`; ValueError names what is at fault.

    Expects exactly the tensors of `config`.  Left aside are rotary buffers of old files, and what
    belongs to the vision part of a multimodal Gemma 3; with `any_head`, for who looks at hidden
    states alone, heads too.  `new_head` fills a classifier's tensors where the files have none.
    """
    if dtype == torch.float16:
        raise ValueError("dtype float16 is refused: Gemma's activations overflow it; use bfloat16")
    if not dtype.is_floating_point:
        raise ValueError(f"dtype {dtype} is refused: weights are bfloat16 or float32")
    folder = Path(path)
    may_lack = new_head is not None
    stored = match_tensors(folder, read_headers(folder), config, any_head or may_lack, may_lack)
    expected = {part.name: part for part in checkpoint_tensors(config)}
    new = [part for name, part in expected.items() if name not in stored]

    try:
        weights = empty_weights(config, device=device, dtype=dtype)
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        size = config.num_parameters() * dtype.itemsize
        raise MemoryError(
            f"the weights take {size / 1e9:.2f} GB in {dtype}, which {device} does not have"
        ) from error
    by_file: dict[Path, list[tuple[str, CheckpointTensor]]] = {}
    for name, tensor in stored.items():
        by_file.setdefault(tensor.file, []).append((tensor.key, expected[name]))
    size = sum(torch.Size(x.shape).numel() * FLOATS[x.dtype] for x in stored.values())
    with tqdm(
        total=size,
        desc="loading",
        unit="B",
        unit_scale=True,
        leave=False,
        disable=not sys.stderr.isatty(),
    ) as bar:
        for file, entries in by_file.items():
            with _open(file) as shard:
                for key, part in entries:
                    source = shard.get_tensor(key)
                    for piece, target in zip(pieces(source), pieces(part.of(weights)), strict=True):
                        target.copy_(piece)
                        bar.update(piece.nbytes)
    for part in new:
        assert new_head is not None
        new_head(part.name, part.of(weights))
    return weights


def is_head(name: str) -> bool:
    """Whether a tensor of a checkpoint stands behind the last norm."""
    return name.startswith(("lm_head.", "score."))


def find_nonfinite(path: str | Path) -> list[str]:
    """The names of the tensors in folder `path` that hold a NaN or an infinity."""
    found = []
    for file in _shards(Path(path)):
        with _open(file) as shard:
            for key in sorted(shard.keys()):
                tensor = shard.get_tensor(key)
                if tensor.is_floating_point() and not all(
                    piece.float().isfinite().all() for piece in pieces(tensor)
                ):
                    found.append(key)
    return found


def read_generation_config(path: str | Path) -> dict[str, Any]:
    """The object in generation_config.json of folder `path`, empty where there is no such file."""
    file = Path(path) / "generation_config.json"
    return read_json_object(file) if file.exists() else {}


def stop_token_ids(path: str | Path, config: ModelConfig) -> tuple[int, ...]:
    """The ids that end a generation: those of config.json and of generation_config.json."""
    more = as_token_ids(read_generation_config(path).get("eos_token_id"))
    for token_id in more:
        check_int("generation_config.json: eos_token_id", token_id, 0, config.vocab_size - 1)
    return tuple(dict.fromkeys(config.eos_token_ids + more))


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
    for part in checkpoint_tensors(config):
        view = part.of(weights)
        if view.shape != part.shape:
            raise ValueError(f"{part.name} is {tuple(view.shape)}, the config says {part.shape}")
        views[part.name] = view

    sizes = {name: view.nbytes for name, view in views.items()}
    shards = plan_shards(sizes, max_shard_bytes, SINGLE, SHARD)
    for file, names in shards.items():
        tensors = {name: views[name].detach().cpu().contiguous() for name in names}
        with _renamed(folder / file) as temporary:
            save_file(tensors, temporary, metadata={"format": "pt"})
    if len(shards) > 1:
        write_json(folder / INDEX, index_of(shards, sizes))
    stale = {folder / SINGLE, folder / INDEX, *folder.glob("model-*-of-*.safetensors")}
    for file in stale - {
        folder / name for name in (*shards, *([INDEX] if len(shards) > 1 else []))
    }:
        file.unlink(missing_ok=True)

    if tokenizer_file is not None:
        with _renamed(folder / "tokenizer.model") as temporary:
            shutil.copyfile(tokenizer_file, temporary)
    dtype = str(weights.embedding.dtype).removeprefix("torch.")
    values = replace(config, dtype=dtype).to_dict()
    write_json(folder / "config.json", {**values, **(more_config or {})})


def plan_shards(
    sizes: Mapping[str, int], max_shard_bytes: int, single: str, shard: str
) -> dict[str, list[str]]:
    """File name -> the tensors it shall hold, in order; `sizes` are their bytes.

    One file is called `single`; of several each is `shard`, with its number and their count in it.
    """
    groups: list[list[str]] = [[]]
    size = 0
    for name, nbytes in sizes.items():
        if size and size + nbytes > max_shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += nbytes
    if len(groups) == 1:
        return {single: groups[0]}
    return {shard.format(i, len(groups)): group for i, group in enumerate(groups, start=1)}


def index_of(shards: Mapping[str, list[str]], sizes: Mapping[str, int]) -> dict[str, Any]:
    """What an index file says of several shards."""
    weight_map = {name: file for file, names in shards.items() for name in names}
    return {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}


def _shards(folder: Path) -> list[Path]:
    """The files that hold the weights; a single file comes first, as in transformers."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    if not (folder / INDEX).exists():
        hint = ""
        if any(any(folder.glob(f"*.{kind}")) for kind in ("bin", "ckpt", "pth", "msgpack")):
            hint = "; pickles and Flax's msgpack are read by `gemcut convert` alone"
        raise ValueError(f"{folder}: holds neither {SINGLE} nor {INDEX}{hint}")
    return sorted({folder / name for name in read_weight_map(folder / INDEX).values()})


def read_weight_map(index: Path, suffix: str = "safetensors") -> dict[str, str]:
    """Tensor -> file of an index; ValueError for a file that is not in the index's own folder."""
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: weight_map {shorten(weight_map)} is not an object with entries")
    for name, file in weight_map.items():
        # A bare name only.  (The Hub's cache links files elsewhere, so links are not followed up.)
        if not isinstance(file, str) or not re.fullmatch(rf"[\w.-]+\.{suffix}", file):
            raise ValueError(
                f"{index}: {name} is in {shorten(file)}, which is no {suffix} file of its folder"
            )
    return weight_map


def check_file(file: Path) -> None:
    """Nothing, or ValueError where `file` cannot be read or is a git-lfs pointer."""
    try:
        with file.open("rb") as raw:
            start = raw.read(len(LFS_POINTER))
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror})") from None
    if start == LFS_POINTER:
        raise ValueError(f"{file}: a git-lfs pointer, not the file itself; run `git lfs pull`")


def _open(file: Path) -> Any:
    check_file(file)
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{file}: damaged or cut short ({error})") from None


def read_headers(folder: Path) -> list[StoredTensor]:
    """Every tensor in the folder's weight files; an index must agree with the files it names."""
    found: dict[str, StoredTensor] = {}
    for file in _shards(folder):
        with _open(file) as shard:
            for key in sorted(shard.keys()):
                if key in found:
                    raise ValueError(
                        f"{folder}: {key} is in {found[key].file.name} and {file.name}"
                    )
                header = shard.get_slice(key)
                found[key] = StoredTensor(
                    file, key, tuple(header.get_shape()), str(header.get_dtype())
                )
    if not (folder / SINGLE).exists():
        held = {key: tensor.file.name for key, tensor in found.items()}
        check_index(folder / INDEX, read_weight_map(folder / INDEX), held)
    return list(found.values())


def check_index(index: Path, listed: Mapping[str, str], held: Mapping[str, str]) -> None:
    """Nothing, or ValueError where an index and the files that it names disagree."""
    for key in listed.keys() | held.keys():
        if listed.get(key) != held.get(key):
            raise ValueError(
                f"{index}: {key} is listed in {listed.get(key, 'no file')}, "
                f"but held by {held.get(key, 'none')}"
            )


def match_tensors(
    folder: Path,
    tensors: list[StoredTensor],
    config: ModelConfig,
    any_head: bool = False,
    may_lack_head: bool = False,
) -> dict[str, StoredTensor]:
    """The tensors of the language model by name: exactly those of `config`, or ValueError.

    With `any_head` other heads may stand there too; with `may_lack_head` the own may be missing.
    """
    stored = _by_model_name(tensors, config)
    expected = {part.name: part for part in checkpoint_tensors(config)}
    if any_head:
        stored = {name: x for name, x in stored.items() if name in expected or not is_head(name)}
    elif config.tie_word_embeddings:
        _check_tied_head(stored)
    if may_lack_head:
        expected = {n: part for n, part in expected.items() if n in stored or not is_head(n)}
    _check(folder, stored, expected)
    return stored


def _by_model_name(tensors: list[StoredTensor], config: ModelConfig) -> dict[str, StoredTensor]:
    """The tensors of the language model by the names that `checkpoint_tensors` gives them."""
    stored: dict[str, StoredTensor] = {}
    for tensor in tensors:
        if _BUFFER.search(tensor.key):
            continue
        name = tensor.key
        if config.model_type == "gemma3_text":
            if _VISION.match(name):
                continue
            name = _TEXT_PREFIX.sub("", name)
        name = _BARE.sub("model.", name)
        if name in stored:
            raise ValueError(f"{stored[name]} and {tensor} are the same weight")
        stored[name] = tensor
    return stored


def _check_tied_head(stored: dict[str, StoredTensor]) -> None:
    """Drop a head that repeats the tied embedding: some trainers write it out."""
    head, embedding = stored.get("lm_head.weight"), stored.get("model.embed_tokens.weight")
    if head is None or embedding is None:
        return
    if (head.shape, head.dtype) == (embedding.shape, embedding.dtype):
        both = zip(pieces(head.load()), pieces(embedding.load()), strict=True)
        if all(torch.equal(a, b) for a, b in both):
            del stored["lm_head.weight"]
            return
    raise ValueError(f"{head} differs from the embedding, but tie_word_embeddings is true")


def _check(
    folder: Path, stored: dict[str, StoredTensor], expected: dict[str, CheckpointTensor]
) -> None:
    if missing := [name for name in expected if name not in stored]:
        raise ValueError(f"{folder}: {first_of(missing)} missing")
    if extra := [str(stored[name]) for name in stored if name not in expected]:
        raise ValueError(f"{folder}: {first_of(extra)} not part of the model")
    for name, tensor in stored.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(
                f"{folder}: {tensor} is {list(tensor.shape)}, "
                f"the config says {list(expected[name].shape)}"
            )
        if tensor.dtype not in FLOATS:
            raise ValueError(
                f"{folder}: {tensor} is {tensor.dtype}; supported are {', '.join(FLOATS)}"
            )


def first_of(names: list[str]) -> str:
    """The first of some names, how many more there are, and the verb."""
    if len(names) == 1:
        return f"{names[0]} is"
    return f"{names[0]} and {len(names) - 1} more are"


def pieces(tensor: Tensor) -> tuple[Tensor, ...]:
    """Views that bound the buffer of a copy that converts, or of a test of every element."""
    rows = torch.atleast_1d(tensor)  # a foreign file may hold a scalar, or no rows
    row_size = max(1, rows.numel() // max(1, rows.shape[0]))
    return rows.split(max(1, PIECE // row_size))


@contextmanager
def _renamed(file: Path) -> Iterator[Path]:
    """A path to write to, which becomes `file` when the writing has succeeded."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(file: Path, values: dict[str, Any]) -> None:
    """Write a JSON file under a temporary name, and rename it."""
    with _renamed(file) as temporary:
        temporary.write_text(json.dumps(values, indent=2, allow_nan=False) + "\n")
