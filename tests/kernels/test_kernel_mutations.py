"""Mistakes that are easy to make, made in the kernels: each must break the rule of accuracy.

A kernel's source is changed and imported from a file of its own; its op, called as op_cases.py
does, is then no longer what the oracle says.
"""

import importlib
import inspect
import sys
from types import ModuleType

import pytest
from accuracy import assert_accurate, assert_row_invariant, random
from op_cases import small_calls

from gemcut import kernels
from gemcut.kernels import matmul

pytestmark = pytest.mark.usefixtures("poisoned")
NORM, HEAD = ("norm", "rmsnorm"), ("head", "lm_head")
PREFILL = ("prefill_attention", "attention_prefill")
ARGMAX = ("head", "lm_head_argmax")
# one program walks over three blocks, each in two steps
IN_BLOCKS = (
    ("head", "return PROGRAMS_OF_A_PROCESSOR * PROCESSORS[name]", "return 1"),
    (
        "head",
        'rule = {"BLOCK_V": block_v, **pipeline(x, triton.cdiv(V, block_v))}',
        'rule = {"BLOCK_V": 16, "BLOCK_D": 16, "num_warps": 4}',
    ),
)
DECODE = ("decode_attention", "attention_decode")
WINDOW = ("attention_tiles", "offs_n[None, :] < W")
# mistake: (the op's module, the op), then (module, right, wrong) of what is changed
MISTAKES = {
    "norm by w": (NORM, ("norm", "rstd * (1.0 + w)", "rstd * w")),
    "branch added before its norm": (
        ("norm", "add_rmsnorm_"), ("norm", "x = normalised(x, post_w, D, EPS)", "x = x"),
    ),
    "bias left out": (
        ("matmul", "skinny_linear"), ("matmul", "HAS_BIAS=bias is not None", "HAS_BIAS=False"),
    ),
    "mean of squares without eps": (NORM, ("norm", "/ D + EPS)", "/ D + 1000 * EPS)")),
    "exact GELU": (
        ("mlp", "geglu"),
        ("gelu", "return x / (1.0 + tl.exp2(-2.885390081777927 * u))",
         "return 0.5 * x * (1.0 + tl.erf(0.7071067811865476 * x))"),
    ),
    "GELU of up": (
        ("mlp", "geglu"), ("mlp", "gelu(gate) * up\n    tl", "gate * gelu(up)\n    tl"),
    ),
    "gate and up exchanged": (
        ("mlp", "linear_geglu"), ("mlp", "gate, up = halves", "up, gate = halves"),
    ),
    "bf16 angles": (
        ("rotary", "rope_tables"),
        ("rotary", "angles = position * inv_freq",
         "angles = position.to(tl.bfloat16).to(tl.float32) * inv_freq.to(tl.bfloat16)"),
    ),
    "rotated the other way": (
        ("rotary", "rope_and_store_"), ("rotary", "x_1 * cos_1 + x_2", "x_1 * cos_1 - x_2"),
    ),
    "rotated the other way in decode": (
        ("qkv", "linear_rope_and_store_"), ("qkv", "low * cos - high", "low * cos + high"),
    ),
    "stored at the position": (
        ("qkv", "linear_rope_and_store_"), ("qkv", "+ position % C", "+ (position + 1) % C"),
    ),
    "window one too long": (PREFILL, (*WINDOW, "offs_n[None, :] <= W")),
    "window one too short": (PREFILL, (*WINDOW, "offs_n[None, :] < W - 1")),
    "window one too long in decode": (
        DECODE,
        (*WINDOW, "offs_n[None, :] <= W"),
        ("decode_attention", "position - W + 1", "position - W"),
    ),
    "window one too short in decode": (
        DECODE, ("decode_attention", "position - W + 1", "position - W + 2"),
    ),
    "cap after the mask": (
        PREFILL, ("attention_tiles", 'tl.where(visible, s, -float("inf"))',
                  "tl.where(visible, s, -1.0)"),
    ),
    "no causal mask": (
        PREFILL, ("attention_tiles", "offs_q[:, None] >= offs_n", "offs_q[:, None] + 9 >= offs_n"),
    ),
    "attention softcap left out": (
        DECODE, ("attention_tiles", "s = tanh(s * (SCALE / SOFTCAP), FAST_TANH)",
                 "s = s * (SCALE / SOFTCAP)"),
    ),
    "scale from head_dim": (
        DECODE, ("decode_attention", "SCALE=scale", "SCALE=K**-0.5"),
    ),
    "final softcap left out": (
        HEAD, ("head", "SOFTCAP * tanh(logits / SOFTCAP, APPROXIMATE=False)", "logits"),
    ),
    "embedding not scaled": (
        ("head", "embed"), ("head", "(x.to(tl.float32) * SCALE).to", "x.to"),
    ),
    "logits of a range's first block alone": (
        ARGMAX,
        ("head", "best = tl.maximum(best, ", "best = tl.where(block > 0, best, "),
        *IN_BLOCKS,
    ),
    "the last block alone": (
        ARGMAX, ("head", "best = tl.maximum(best, ", "best = (" ), *IN_BLOCKS,
    ),
    "a sum that goes on in the next block": (
        ARGMAX, ("head", "acc = tl.zeros_like(acc)", "acc = acc"), *IN_BLOCKS,
    ),
    "logits of a block's first columns": (
        ARGMAX, ("head", "is_last = start_d + BLOCK_D >= D", "is_last = start_d + D >= D"),
        *IN_BLOCKS,
    ),
    "noise by the position of another row": (
        ARGMAX, ("head", "tl.load(positions_ptr + offs_m", "tl.load(positions_ptr + 0 * offs_m"),
    ),
    "noise by the place in a block": (
        ARGMAX,
        ("head", "seed, position, offs_v[:, None])", "seed, position, offs_v[:, None] % 16)"),
        *IN_BLOCKS,
    ),
    "a step that begins with the norm of another token": (
        ("begin", "begin_step"), ("begin", "token_ids_ptr + row,", "token_ids_ptr + m,"),
    ),
    "local layers rotated as global ones": (
        ("begin", "begin_step"),
        ("begin", "local_inv_freq_ptr=inv_freqs[1] if", "local_inv_freq_ptr=inv_freqs[0] if"),
    ),
}  # fmt: skip


@pytest.fixture
def mutated(tmp_path):
    """Imports the modules of an op with some of their source changed."""

    def make(module: str, changes: list[tuple[str, str, str]]) -> ModuleType:
        sources = {}
        for name in {module, *(change[0] for change in changes)}:
            sources[name] = inspect.getsource(importlib.import_module(f"gemcut.kernels.{name}"))
        for name, right, wrong in changes:
            assert sources[name].count(right) == 1, f"{name} holds {right!r} not once"
            sources[name] = sources[name].replace(right, wrong)
        for name in sources:  # the changed modules take each other's place
            for other in sources:
                sources[name] = sources[name].replace(
                    f"from gemcut.kernels.{other} import", f"from mutated_{other} import"
                )
            (tmp_path / f"mutated_{name}.py").write_text(sources[name])
        return importlib.import_module(f"mutated_{module}")

    sys.path.insert(0, str(tmp_path))
    importlib.invalidate_caches()
    yield make
    sys.path.remove(str(tmp_path))
    for name in [name for name in sys.modules if name.startswith("mutated_")]:
        del sys.modules[name]


@pytest.mark.parametrize("name", sorted(set(kernels.__all__) - {"sample"}))
def test_no_mistake_is_no_difference(name):
    assert_accurate(getattr(kernels, name), **small_calls()[name])


def test_no_mistake_in_blocks_is_no_difference(mutated):
    op = mutated("head", list(IN_BLOCKS)).lm_head_argmax
    assert_accurate(op, **small_calls()["lm_head_argmax"])


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_breaks_the_rule(mistake, mutated):
    (module, op), *changes = MISTAKES[mistake]
    wrong = getattr(mutated(module, changes), op)
    with pytest.raises(AssertionError, match=r"exceeds the budget|NaN at"):
        assert_accurate(wrong, **small_calls()[op])


def test_a_tile_that_follows_the_batch_is_seen(monkeypatch):
    """What test_matmul.py asserts fails where the sum is cut by the number of rows."""
    x, weight = random(17, 300), random(48, 300)
    rule = matmul._tile(weight, x)

    def projected(rows):
        by_batch = {"SPLITS": 1 if rows.stop - rows.start < 4 else 2, "BLOCK_D": 64}
        monkeypatch.setattr(matmul, "_tile", lambda *_: rule | by_batch)
        return matmul.skinny_linear(x[rows], weight).sum(0)

    with pytest.raises(AssertionError, match="rows 0 to 0 differ"):
        assert_row_invariant(projected, 17)
