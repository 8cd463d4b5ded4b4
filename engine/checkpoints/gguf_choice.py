"""Which GGUF file of a folder or a repository is meant: the only one, or the one that is named.

As llama.cpp's users write it, owner/name:Q4_0 is the file of that quantisation; a name is known by
its end, in either case.  Part of no choice are the images' part of a model (mmproj) and importance
matrices.
"""

import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

SUFFIX = ".gguf"
_OTHERS = re.compile(r"mmproj|imatrix")
_LATER_PART = re.compile(r"-(?!00001)\d{5}-of-\d{5}\.gguf$")


def is_gguf(path: Path) -> bool:
    """Whether a path names a GGUF file."""
    return path.suffix == SUFFIX


def split_tag(model: str) -> tuple[str, str | None]:
    """A model's name, and what stands after the last colon."""
    name, colon, tag = model.rpartition(":")
    return (name, tag) if name and colon and tag and "/" not in tag else (model, None)


def choose_file(model: str, names: Iterable[str], tag: str | None) -> str | None:
    """The GGUF file of `model` among these names; None where there is none and none is asked for.

    ValueError lists them where several are meant, or none is.
    """
    found = sorted(
        name
        for name in names
        if name.endswith(SUFFIX)
        and not _OTHERS.search(PurePosixPath(name).name.lower())
        and not _LATER_PART.search(name)
    )
    meant = [name for name in found if tag is None or _is_meant(name, tag)]
    if len(meant) == 1:
        return meant[0]
    if tag is None and not found:
        return None
    base, listed = model.removesuffix(f":{tag}"), ", ".join(found) or "none"
    if not meant:
        raise ValueError(f"{base} holds no GGUF file {tag!r}; it holds {listed}")
    stem = PurePosixPath(meant[0]).stem
    short = stem.rpartition("-")[2]
    ask = short if [_is_meant(name, short) for name in found].count(True) == 1 else stem
    raise ValueError(
        f"{base} holds the GGUF files {', '.join(meant)}; say which, as in {base}:{ask}"
    )


def _is_meant(name: str, tag: str) -> bool:
    """Whether a tag is a file's name or its quantisation."""
    stem, tag = name.lower().removesuffix(SUFFIX), tag.lower().removesuffix(SUFFIX)
    return stem == tag or stem.endswith(tuple(f"{mark}{tag}" for mark in "-./"))
