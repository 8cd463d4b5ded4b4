"""Rows of a batch: texts cut to a length, joined with special tokens, and padded."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

NO_MAXIMUM = int(1e30)  # transformers' value for a tokenizer without a maximum
LARGEST_MAXIMUM = int(1e20)  # transformers treats a larger model_max_length as none
PADDINGS = ("longest", "max_length", "do_not_pad")
TRUNCATIONS = ("longest_first", "only_first", "only_second", "do_not_truncate")
SIDES = ("left", "right")


@dataclass(frozen=True)
class PaddingRule:
    """How rows are padded and cut; `max_length` is None where no number is needed."""

    padding: str
    truncation: str
    max_length: int | None


def padding_rule(
    padding: Any,
    truncation: Any,
    max_length: int | None,
    *,
    pad_to_multiple_of: int | None,
    model_max_length: int,
) -> PaddingRule:
    """The rule that transformers' arguments ask for.

    `max_length` alone truncates.  "max_length" and truncation without a `max_length` use
    `model_max_length`, and do nothing where the tokenizer has none, as transformers documents.
    """
    _check_count("max_length", max_length)
    _check_count("pad_to_multiple_of", pad_to_multiple_of)
    if max_length is not None and padding is False and truncation is None:
        truncation = "longest_first"
    pad: Any = {True: "longest", False: "do_not_pad"}.get(padding, padding)
    uncut = (None, False)
    cut: Any = "do_not_truncate" if truncation in uncut else truncation
    cut = "longest_first" if truncation is True else cut
    for name, value, known in (("padding", pad, PADDINGS), ("truncation", cut, TRUNCATIONS)):
        if value not in known:
            raise ValueError(f"{name} {value!r} is unknown; known are True, False, {_list(known)}")
    if max_length is not None and pad == "longest" and cut == "do_not_truncate":
        warnings.warn(
            f"max_length={max_length} does nothing with padding to the longest row and no "
            'truncation; padding="max_length" pads to it',
            stacklevel=5,
        )
    if max_length is None and (pad == "max_length" or cut != "do_not_truncate"):
        if model_max_length <= LARGEST_MAXIMUM:
            max_length = model_max_length
        else:
            pad = "do_not_pad" if pad == "max_length" else pad
            cut = "do_not_truncate"
    multiple = pad_to_multiple_of or 1
    if pad != "do_not_pad" and cut != "do_not_truncate" and (max_length or 0) % multiple:
        raise ValueError(
            f"max_length {max_length} is no multiple of pad_to_multiple_of {multiple}, "
            "so rows cannot be cut to one and padded to the other"
        )
    return PaddingRule(pad, cut, max_length)


def of_targets(rule: PaddingRule, max_target_length: int) -> PaddingRule:
    """The rule of a text's targets: that of the text, with a number of their own."""
    _check_count("max_target_length", max_target_length)
    if rule.padding != "max_length" and rule.truncation == "do_not_truncate":
        warnings.warn(
            f"max_target_length={max_target_length} does nothing without a max_length, which "
            "says that texts are cut",
            stacklevel=5,
        )
    return replace(rule, max_length=max_target_length)


def kept_lengths(lengths: list[int], room: int, strategy: str) -> list[int]:
    """How many tokens of each text stay, `room` in all; ValueError where the strategy cannot."""
    excess = sum(lengths) - room
    if excess <= 0:
        return lengths
    if room < 0:
        raise ValueError(f"max_length leaves no room: the special tokens alone pass it by {-room}")
    if room == 0:
        return [0] * len(lengths)
    if strategy == "longest_first":
        return _longest_first(lengths, room)
    index = int(strategy == "only_second")
    if index >= len(lengths):
        raise ValueError("truncation 'only_second' needs a text_pair")
    if lengths[index] <= excess:
        raise ValueError(
            f"truncation {strategy!r} must remove {excess} tokens of a text of {lengths[index]}"
        )
    return [n - excess if i == index else n for i, n in enumerate(lengths)]


def _longest_first(lengths: list[int], room: int) -> list[int]:
    """The length of each text after tokens are removed one by one from the longer one."""
    if len(lengths) == 1:
        return [room]
    short, long = sorted(lengths)
    long = max(short, room - short) if short <= room else short
    if short + long > room:
        short, long = room // 2, room - room // 2
    return [short, long] if lengths[0] <= lengths[1] else [long, short]


def windows(length: int, kept: int, stride: int, side: str) -> list[tuple[int, int]]:
    """The ranges of a text of `length` tokens: that which stays, then those cut off at `side`.

    Each has `kept` tokens and shares `stride` with the one before; the last may be shorter.
    """
    if kept >= length:
        return [(0, length)]
    if kept == 0:
        return [(0, 0), (0, length)]
    if stride >= kept:
        raise ValueError(f"stride {stride} repeats all {kept} tokens that a row has of this text")
    starts = range(0, length - stride, kept - stride)
    ranges = [(start, min(start + kept, length)) for start in starts]
    if side == "left":
        return [(length - end, length - start) for start, end in ranges]
    return ranges


def padded_width(longest: int, rule: PaddingRule, pad_to_multiple_of: int | None) -> int:
    """The width that rows are padded to; a longer row stays as it is."""
    if rule.padding == "do_not_pad":
        return 0
    width = longest if rule.padding == "longest" else rule.max_length or 0
    multiple = pad_to_multiple_of or 1
    return -(-width // multiple) * multiple


def padded(values: Sequence[Any], width: int, side: str, filler: Any) -> list[Any]:
    """The values with fillers before or after them, `width` in all; a longer row stays."""
    check_side("padding_side", side)
    fillers = [filler] * (width - len(values))
    return [*fillers, *values] if side == "left" else [*values, *fillers]


def check_side(name: str, side: Any) -> None:
    """Nothing, or ValueError where `side` is neither left nor right."""
    if side not in SIDES:
        raise ValueError(f"{name} is {side!r}; 'left' and 'right' are supported")


def _check_count(name: str, value: Any) -> None:
    is_count = isinstance(value, int) and not isinstance(value, bool) and value > 0
    if value is not None and not is_count:
        raise ValueError(f"{name} {value!r} is no positive integer")


def _list(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names))
