"""Checks of the numbers in a checkpoint's config.json: one line that names value and limit."""

import math
import sys
from reprlib import repr as shorten  # a hostile value must not flood the message
from typing import Any


def check_int(name: str, value: Any, low: int, high: int) -> None:
    """Nothing, or ValueError where `value` is no integer of low..high (a bool is none)."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name} {shorten(value)} is not an integer")
    if not low <= value <= high:
        raise ValueError(f"{name} {shorten(value)} is outside {low}..{high}")


def check_number(
    name: str,
    value: Any,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float = math.inf,
) -> None:
    """Nothing, or ValueError where `value` is no finite number within the given limits."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError(f"{name} {shorten(value)} is not a number")
    if not abs(value) <= sys.float_info.max:  # JSON's integers pass it; NaN compares false
        raise ValueError(f"{name} {shorten(value)} is not finite")
    if above is not None and value <= above:
        raise ValueError(f"{name} {shorten(value)} must be above {above}")
    if at_least is not None and value < at_least:
        raise ValueError(f"{name} {shorten(value)} must be at least {at_least}")
    if value >= below:
        raise ValueError(f"{name} {shorten(value)} must be below {below}")
