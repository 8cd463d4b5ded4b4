"""The documented classes of gemcut beside those of transformers, with the same weights."""

import tempfile
from typing import Any

import torch
import transformers
from random_models import random_model
from torch import Tensor
from transformers import PreTrainedModel

from gemcut.engine import transformers_api

BATCH, LENGTH, VOCAB = 3, 20, 97  # longer than the window of 5; VOCAB is random_models'

# which columns of a batch hold tokens; each row another number of them
MASKS: dict[str, Tensor | None] = {"none": None}
for name in ("left", "right", "holes"):
    MASKS[name] = torch.ones(BATCH, LENGTH, dtype=torch.int64)
MASKS["left"][0, :5], MASKS["left"][1, :11] = 0, 0
MASKS["right"][0, -5:], MASKS["right"][1, -11:] = 0, 0
MASKS["holes"][0, 3:5], MASKS["holes"][1, 8], MASKS["holes"][1, :2] = 0, 0, 0
MASKS["holes"][2, 1], MASKS["holes"][2, 12:15] = 0, 0


_MADE: dict[str, tuple[PreTrainedModel, Any]] = {}


def twins(auto_class: str, model_type: str, **overrides: Any) -> tuple[PreTrainedModel, Any]:
    """Transformers' model and gemcut's, made once; `auto_class` is "AutoModel" and the like."""
    key = repr((auto_class, model_type, overrides))
    if key not in _MADE:
        theirs = random_model(model_type, auto_class=getattr(transformers, auto_class), **overrides)
        with tempfile.TemporaryDirectory() as folder:
            theirs.save_pretrained(folder)
            ours = getattr(transformers_api, auto_class).from_pretrained(folder)
        assert type(ours).__name__ == type(theirs).__name__
        _MADE[key] = theirs, ours
    return _MADE[key]


def random_ids(rows: int = BATCH, length: int = LENGTH, seed: int = 0) -> Tensor:
    """Token ids without the special ones: [rows, length]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, VOCAB, (rows, length), generator=generator)


def assert_close(actual: Tensor, expected: Tensor, seen: Tensor | None = None) -> None:
    """Within 1e-4 of the scale, wherever `seen` [rows, columns] is true; padding is zero."""
    assert actual.shape == expected.shape
    if seen is not None:
        seen = seen.bool()
        assert (actual[~seen] == 0).all()
        actual, expected = actual[seen], expected[seen]
    error, scale = (actual - expected).abs().max().item(), expected.abs().max().item()
    assert error <= 1e-4 * scale, f"{error:.2e} on a scale of {scale:.2e}"
