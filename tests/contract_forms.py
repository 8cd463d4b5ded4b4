"""The forms and formulas of kernels/contracts.py, read: sizes of tensors by letter, and values."""

import re
from typing import Any

import torch
from torch import Tensor

from gemcut.kernels.quantized_weight import QuantizedWeight

Letters = dict[str, int]


def value(formula: str, letters: Letters) -> int:
    """What "2 (M + 1) K/2" is; KeyError for a letter that is not known."""
    words = re.findall(r"[A-Za-z_]+|\d+|[()+/]", formula)
    assert "".join(words) == formula.replace(" ", ""), formula
    text, before = "", "("
    for word in words:
        if before not in ("(", "+", "/", "//") and word not in (")", "+", "/"):
            text += "*"  # a product is written without a sign
        text += "//" if word == "/" else str(letters[word]) if word[0].isalpha() else word
        before = word
    return eval(text)


def split(form: str) -> tuple[list[str], str, str]:
    """The axes, the dtype and the strides of a form; results have no strides."""
    axes, rest = re.fullmatch(r"\[(.*)\] (.*)", form).groups()
    is_strides = rest.endswith((" dense", " strided"))
    dtype, strides = rest.rsplit(" ", 1) if is_strides else (rest, "dense")
    return axes.split(", "), dtype, strides


def shape_of(form: str, letters: Letters) -> tuple[int, ...]:
    """The shape that a form has with these letters."""
    return tuple(2 if axis == "..." else value(axis, letters) for axis in split(form)[0])


def fits(form: str, shape: tuple[int, ...], letters: Letters) -> bool:
    """Whether a shape has this form; adds the letters that are new."""
    axes = split(form)[0]
    if axes[0] == "...":
        letters.setdefault("M", int(torch.Size(shape[:-1]).numel()))
        return fits(f"[{axes[1]}] x dense", shape[-1:], letters)
    if len(axes) != len(shape):
        return False
    return all(_is(axis, size, letters) for axis, size in zip(axes, shape, strict=True))


def _is(axis: str, size: int, letters: Letters) -> bool:
    unknown = set(re.findall("[A-Za-z_]+", axis)) - letters.keys()
    if not unknown:
        return value(axis, letters) == size
    (letter,) = unknown
    found = [n for n in range(4 * size + 1) if value(axis, letters | {letter: n}) == size]
    if not found:
        return False
    letters[letter] = found[0]
    return True


def letters_of(forms: dict[str, list[str]], arguments: dict[str, Any]) -> Letters:
    """The sizes of a call by letter; AssertionError where a tensor has none of its forms."""
    letters: Letters = {}
    if "block_tables" in forms:  # of which two forms have as many axes
        is_paged = arguments.get("block_tables") is not None
        forms = forms | {name: [forms[name][is_paged]] for name in ("k_cache", "v_cache")}
    # a letter alone says what it is, and then what it is in a sum or product is found
    by_size = sorted(forms, key=lambda name: any(" " in x for x in split(forms[name][0])[0]))
    for name in by_size:
        every = arguments.get(name)
        for x in every if isinstance(every, (list, tuple)) else [every]:
            if isinstance(x, (Tensor, QuantizedWeight)):
                shape = tuple(x.shape)
                assert any(fits(form, shape, letters) for form in forms[name]), (name, shape)
    return letters
