"""Checks of a caller's numbers and keywords: one line that names the value and the limit."""

import math
import re
import sys
import warnings
from collections.abc import Iterable
from difflib import get_close_matches
from numbers import Integral, Real
from reprlib import repr as shorten  # a hostile value must not fill the message
from typing import Any


def printable(name: str) -> str:
    """A name from a file for a message: as it is, or shortened where it would fill or break it."""
    return name if name.isprintable() and len(name) <= 200 else shorten(name)


def check_int(name: str, value: Any, low: int, high: int) -> None:
    """Nothing, or ValueError where `value` is no integer in low..high (a bool is none)."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise ValueError(f"{name} {shorten(value)} is not an integer")
    if not low <= int(value) <= high:
        raise ValueError(f"{name} {shorten(value)} is outside {low}..{high}")


def check_bool(name: str, value: Any) -> None:
    """Nothing, or ValueError where `value` is neither True nor False (1 and "false" are not)."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} {shorten(value)} is neither True nor False")


def check_text(name: str, text: Any) -> None:
    """Nothing, or ValueError where `text` is no string that a text may hold."""
    if not isinstance(text, str) or not text:
        raise ValueError(f"{name} {shorten(text)} is not a string of at least one character")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"{name} {shorten(text)} holds half a surrogate pair: no text does")


def check_number(
    name: str,
    value: Any,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float = math.inf,
) -> None:
    """Nothing, or ValueError where `value` is no finite number within the given limits."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise ValueError(f"{name} {shorten(value)} is not a number")
    try:
        number = float(value)
    except OverflowError:  # JSON's integers have no limit
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name} {shorten(value)} is not finite")
    if above is not None and number <= above:
        raise ValueError(f"{name} {shorten(value)} must be above {above}")
    if at_least is not None and number < at_least:
        raise ValueError(f"{name} {shorten(value)} must be at least {at_least}")
    if number >= below:
        raise ValueError(f"{name} {shorten(value)} must be below {below}")


def read_size(name: str, value: Any) -> int:
    """The bytes that 300, "300", "500MB" or "5GiB" means; ValueError where it is no such size."""
    text = str(value).strip().upper()
    found = re.fullmatch(r"(\d{1,18}(?:\.\d{1,9})?) ?([KMGT]?)(I?)B?", text, re.ASCII)
    size = 0
    if found is not None:
        unit = (1024 if found[3] else 1000) ** " KMGT".index(found[2] or " ")
        size = int(float(found[1]) * unit)
    if size < 1:
        raise ValueError(f"{name} {shorten(value)} is no size such as 500MB or 5GB")
    return size


def refuse_unknown(taker: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Nothing, or TypeError that names the first of `given` that is not known to `taker`."""
    known = sorted(known)
    for name in given:
        if name not in known:
            close = get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"it takes {', '.join(known)}"
            raise TypeError(f"{taker} takes no {name!r}; {hint}")


def warn_caller(message: str) -> None:
    """Warn of a caller's line: the nearest one outside this package."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("gemcut."):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
