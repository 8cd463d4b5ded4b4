"""Mistakes that an implementation of Gemma makes easily: each must show in the logits.

A mistake is made in a copy of the oracles' source, or in the config; the model then differs from
transformers'.  What test_model.py asserts fails for each mistake.
"""

import inspect
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from random_models import random_model
from twins import all_logits, assert_same_logits, gemcut_twin, random_ids, stepwise_logits

from gemcut.engine.execution.model import Gemma
from gemcut.kernels import reference
from gemcut.kernels.reference import attention, cache, ops

LENGTH = 40  # eight windows

DECODED = "y[b] = _attended(q[b], *kv, start, scale, softcap, sliding_window"
IN_THE_OPS = {
    "norm by w instead of 1 + w": ("(1 + widened(weight))", "widened(weight)"),
    "window one too long": ("> q_positions - sliding_window", ">= q_positions - sliding_window"),
    "window one too short": (
        "> q_positions - sliding_window",
        "> q_positions - sliding_window + 1",
    ),
    "window one too long in decode": (DECODED, f"{DECODED} and sliding_window + 1"),
    "window one too short in decode": (DECODED, f"{DECODED} and sliding_window - 1"),
    "ring off by one": (
        "positions = torch.arange(first, end, device=cache.device)",
        "positions = torch.arange(first + 1, end + 1, device=cache.device)",
    ),
    "cap after the mask": (
        "masked_fill(~visible, -torch.inf)",
        "masked_fill(~visible, -softcap if softcap else -torch.inf)",
    ),
    "exact GELU": ('approximate="tanh"', 'approximate="none"'),
    "bf16 angles": (
        "positions.view(-1, 1, 1) * inv_freq",
        "(positions.view(-1, 1, 1).bfloat16() * inv_freq.bfloat16()).float()",
    ),
    "interleaved rotation": (
        "wide.roll(x.shape[-1] // 2, -1)",
        "wide.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)",
    ),
    "post-norm after the add": (
        "x = rmsnorm(x, post_weight, eps)\n",
        "x = rmsnorm(residual + x, post_weight, eps) - residual\n",
    ),
}

IN_THE_CONFIG = {
    "wrong parity of local layers": lambda c: replace(c, layer_types=c.layer_types[::-1]),
    "scale from head_dim": lambda c: replace(c, query_pre_attn_scalar=c.head_dim),
    "no attention softcap": lambda c: replace(c, attn_softcap=None),
    "no final softcap": lambda c: replace(c, final_softcap=None),
}


@pytest.fixture(scope="module")
def theirs():
    # scores that reach past the softcap only sometimes: a cap at the wrong place then shows
    return random_model("gemma2", max_position_embeddings=128)


@pytest.fixture(scope="module")
def expected(theirs):
    with torch.inference_mode():
        return theirs(input_ids=random_ids(LENGTH, 97)[None]).logits[0]


def mutated_ops(old: str, new: str) -> ModuleType:
    sources = [inspect.getsource(one) for one in (ops, attention, cache)]
    found = sum(source.count(old) for source in sources)
    assert found == 1, f"the oracles hold {old!r} {found} times"
    module = ModuleType("mutated")
    for source in sources:
        exec(compile(source.replace(old, new), "mutated", "exec"), module.__dict__)
    return module


def assert_seen(model: Gemma, expected: torch.Tensor) -> None:
    ids = random_ids(LENGTH, 97)
    with pytest.raises(AssertionError, match="logits differ by"):
        assert_same_logits(stepwise_logits(model, ids, LENGTH // 2), expected)


def test_no_mutation_is_no_difference(theirs, expected):
    ops = mutated_ops("x.sum(0)", "torch.sum(x, 0)")
    ours, ids = gemcut_twin(theirs, ops), random_ids(LENGTH, 97)
    assert_same_logits(stepwise_logits(ours, ids, LENGTH // 2), expected)


@pytest.mark.parametrize("mistake", IN_THE_OPS)
def test_mistake_in_an_op_is_seen(mistake, theirs, expected):
    assert_seen(gemcut_twin(theirs, mutated_ops(*IN_THE_OPS[mistake])), expected)


@pytest.mark.parametrize("mistake", IN_THE_CONFIG)
def test_mistake_in_the_config_is_seen(mistake, theirs, expected):
    ours = gemcut_twin(theirs)
    assert_seen(Gemma(IN_THE_CONFIG[mistake](ours.config), ours.weights, reference), expected)


def test_local_rotation_on_global_layers_is_seen():
    theirs = random_model("gemma3_text", max_position_embeddings=128)
    ids = random_ids(LENGTH, 97)
    with torch.inference_mode():
        expected = theirs(input_ids=ids[None]).logits[0]
    ours = gemcut_twin(theirs)
    assert_same_logits(all_logits(ours, ids), expected)
    ours.rope_global = ours.rope_local
    assert_seen(ours, expected)
