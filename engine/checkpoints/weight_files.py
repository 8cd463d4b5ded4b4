"""Weight files on disk: one file, or shards with an index that names the file of each tensor.

Here they are checked before they are read, divided into shards, and renamed into place when they
are written.
"""

import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from gemcut.engine.checkpoints.stored_tensors import StoredTensor
from gemcut.engine.checks import shorten
from gemcut.engine.config.config_file import LFS_POINTER, read_json_object


def check_file(file: Path) -> None:
    """Nothing, or ValueError where `file` cannot be read or is a git-lfs pointer."""
    try:
        with file.open("rb") as raw:
            start = raw.read(len(LFS_POINTER))
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror})") from None
    if start == LFS_POINTER:
        raise ValueError(f"{file}: a git-lfs pointer, not the file itself; run `git lfs pull`")


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


def check_index(index: Path, listed: Mapping[str, str], held: Mapping[str, str]) -> None:
    """Nothing, or ValueError where an index and the files that it names disagree."""
    for key in listed.keys() | held.keys():
        if listed.get(key) != held.get(key):
            raise ValueError(
                f"{index}: {key} is listed in {listed.get(key, 'no file')}, "
                f"but held by {held.get(key, 'none')}"
            )


def read_shards(
    index: Path, suffix: str, read: Callable[[Path], dict[str, StoredTensor]]
) -> dict[str, StoredTensor]:
    """Every tensor of the files that an index names, which must agree with it."""
    weight_map = read_weight_map(index, suffix)
    found: dict[str, StoredTensor] = {}
    for name in sorted(set(weight_map.values())):
        for key, tensor in read(index.parent / name).items():
            if key in found:
                raise ValueError(f"{index.parent}: {found[key].place} and {tensor.place} repeat")
            found[key] = tensor
    held = {key: tensor.place.partition(":")[0] for key, tensor in found.items()}
    check_index(index, weight_map, held)
    return found


def divide_into_shards(
    sizes: Mapping[str, int], max_shard_bytes: int, single: str, shard: str
) -> dict[str, list[str]]:
    """File name -> the tensors in that file, in order; `sizes` are their bytes.

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
    """The content of the index file of several shards."""
    weight_map = {name: file for file, names in shards.items() for name in names}
    return {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}


@contextmanager
def renamed(file: Path) -> Iterator[Path]:
    """A path to write to, which becomes `file` when the writing has succeeded."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(file: Path, values: dict[str, Any]) -> None:
    """Write a JSON file under a temporary name, and rename it."""
    with renamed(file) as temporary:
        temporary.write_text(json.dumps(values, indent=2, allow_nan=False) + "\n")


def byte_bar(label: str, total: int) -> tqdm:
    """A progress bar of `total` bytes, shown on a terminal alone."""
    return tqdm(
        total=total,
        desc=label,
        unit="B",
        unit_scale=True,
        leave=False,
        disable=not sys.stderr.isatty(),
    )
