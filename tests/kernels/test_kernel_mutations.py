"""Mistakes that are easy to make, made in the kernels: each must break the rule of accuracy.

A kernel's source is changed and imported from a file of its own; its op, called as op_cases.py
does, is then no longer what the oracle says.
"""

import numpy as np
import pytest
import torch
from accuracy import assert_accurate, assert_row_invariant, random
from op_cases import in_blocks, index, small_calls
from sampling_cases import (
    assert_draws_are_exact,
    assert_top_k_is_exact,
    assert_top_p_is_exact,
    edges,
)

from gemcut import kernels
from gemcut.kernels import matmul, sampling

pytestmark = pytest.mark.usefixtures("poisoned")
NORM, HEAD = ("norm", "rmsnorm"), ("head", "lm_head")
PREFILL = ("prefill_attention", "attention_prefill")
ARGMAX = ("head", "lm_head_argmax")
# one program walks over three blocks, each in two steps
IN_BLOCKS = (
    ("head", "BLOCKS_OF_A_PROGRAM = 2", "BLOCKS_OF_A_PROGRAM = 3"),
    (
        "head",
        'rule = {"BLOCK_V": block_v, **pipeline(x, weight, triton.cdiv(V, block_v))}',
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
        ("qkv", "linear_rope_and_store_"), ("rotary", "+ position % C", "+ (position + 1) % C"),
    ),
    "window one too long": (PREFILL, (*WINDOW, "offs_n[None, :] <= W")),
    "window one too short": (PREFILL, (*WINDOW, "offs_n[None, :] < W - 1")),
    "window one too long in decode": (
        DECODE,
        (*WINDOW, "offs_n[None, :] <= W"),
        ("kv_combine", "position - W + 1", "position - W"),
    ),
    "window one too short in decode": (
        DECODE, ("kv_combine", "position - W + 1", "position - W + 2"),
    ),
    "cap after the mask": (
        PREFILL, ("attention_tiles", 'tl.where(visible, s, -float("inf"))',
                  "tl.where(visible, s, -1.0)"),
    ),
    "scores of the same tile again": (
        PREFILL, ("prefill_attention", "are_keys(begin + BLOCK_N,", "are_keys(begin,"),
    ),
    "no causal mask": (
        PREFILL, ("attention_tiles", "offs_q[:, None] >= offs_n", "offs_q[:, None] + 9 >= offs_n"),
    ),
    "attention softcap left out": (
        DECODE, ("attention_tiles", "s = tanh(s * (scale / SOFTCAP), FAST_TANH)",
                 "s = s * (scale / SOFTCAP)"),
    ),
    "scale from head_dim": (
        DECODE, ("decode_attention", "SCALE=scale", "SCALE=K**-0.5"),
    ),
    "final softcap left out": (
        HEAD, ("head", "SOFTCAP * tanh(logits / SOFTCAP, APPROXIMATE=False)", "logits"),
    ),
    "embedding not scaled": (
        ("head", "embed"), ("head", "return x * SCALE", "return x"),
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
        ARGMAX, ("head", "tl.load(positions_ptr + rows", "tl.load(positions_ptr + 0 * offs_m"),
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

K, P, DRAW = assert_top_k_is_exact, assert_top_p_is_exact, assert_draws_are_exact
TOP = "top_k_top_p"
# mistake: what sees it, then (module, right, wrong) of what is changed
SAMPLING_MISTAKES = {
    "a bucket too early": (K, (TOP, "so_far < target", "so_far < target - 1")),
    "one token too few": (K, (TOP, "amount >= target, at, high", "amount > target, at, high"),
                          (TOP, "amount >= target, low, after", "amount > target, low, after")),
    "one token too many left": (K, (TOP, "(k - before)", "(k - before - 1)")),
    "a first threshold of too few chunks": (
        K, (TOP, "(key <= middle).to(tl.int32), axis=0) >= k",
            "(key <= middle).to(tl.int32), axis=0) >= k - 1"),
    ),
    "the bucket of the end not listed": (K, (TOP, "_first_key(k_bucket + 1)", "k_first")),
    "a list of one tile alone": (K, (TOP, "tl.range(TILE, row[2], TILE", "tl.range(TILE, 0, TILE")),
    "the rest of the list never drawn": (
        DRAW, (TOP, "tl.range(TILE, count, TILE", "tl.range(TILE, 0, TILE"),
    ),
    "top-p of all tokens, not of those of top-k": (P, (TOP, "mass += more", "mass += 0")),
    "top-p in the least bucket alone": (
        P, (TOP, "_first_key(last_bucket + 1)", "_first_key(p_bucket + 1)"),
    ),
    "the tail left out of the total": (
        P, (TOP, "k_mass = tl.where(uses_k, k_mass, total)", "k_mass = tl.max(so_far, axis=0)"),
    ),
    "ties with the last kept token dropped": (
        DRAW, (TOP, "tl.where(key <= threshold, packed", "tl.where(key < threshold, packed"),
    ),
    "what is decided never drawn": (DRAW, ("sampling", "key < decided)", "key < 0)")),
    "noise without temperature": (
        DRAW, ("gumbel", "tl.zeros_like(logits) + temperature", "tl.zeros_like(logits) + 1.0"),
    ),
    "the highest id wins a tie": (
        DRAW, ("gumbel", "(0x7FFFFFFF - token_ids)", "token_ids"),
        ("gumbel", "return 0x7FFFFFFF - (number & 0x7FFFFFFF)", "return number & 0x7FFFFFFF"),
    ),
}  # fmt: skip


def small_rows(sampling, monkeypatch):
    """Rows in which mistakes show, in chunks and tiles of which a row takes several."""
    monkeypatch.setattr(sampling, "CHUNK", 64)
    monkeypatch.setattr(sampling, "TILE", 16)
    return edges()


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


SHORT_SPLITS = (
    ("kv_splits", "return 32 if num_kv_heads <= 4 else 64", "return 16"),
    ("decode_attention", '"BLOCK_S": 64', '"BLOCK_S": 4'),
    ("decode_attention", "max(16, min(32,", "max(16, min(16,"),
)
IN_SUMS = {
    "the last split left out": ("offs_s < count", "offs_s < count - 1"),
    "the first split left out": ("tl.range(0, count, BLOCK_S)", "tl.range(1, count, BLOCK_S)"),
    "later splits left out": ("tl.range(0, count, BLOCK_S)", "tl.range(0, 4, BLOCK_S)"),
    "places that do not share a maximum": ("m_i - tl.max(m_i, axis=0)", "m_i - m_i"),
    "sums that keep their old maximum": ("tl.exp2(m_i - m_new),", "tl.exp2(m_i - m_i),"),
}


def draft(T: int) -> dict:
    """Tokens whose windows begin in two splits of 16 keys: 8 splits, or 9."""
    torch.manual_seed(0)
    cache = {name: random(1, 1, 144, 16) for name in ("k_cache", "v_cache")}
    first = {"slots": index(0), "positions": index(252 - T + 1)}
    q = random(1, 8, 2, 16)[:, 8 - T :]
    return cache | first | {"q": q, "scale": 1.0, "softcap": None, "sliding_window": 120}


@pytest.mark.parametrize("mistake", [None, *IN_SUMS])
def test_a_mistake_in_the_sum_of_splits_is_seen(mistake, mutated):
    changes = list(SHORT_SPLITS)
    if mistake is not None:
        changes.append(("kv_combine", *IN_SUMS[mistake]))
    op = mutated("decode_attention", changes).attention_decode
    if mistake is None:
        assert_accurate(op, **draft(8))
        return
    with pytest.raises(AssertionError, match=r"exceeds the budget|NaN at"):
        assert_accurate(op, **draft(8))


@pytest.mark.parametrize("is_mistaken", [False, True], ids=["right", "wrong"])
def test_splits_added_up_in_the_order_of_the_tile_are_seen(is_mistaken, mutated, monkeypatch):
    """A token's sum begins at its own first split, not at that of the tokens beside it."""
    monkeypatch.setattr(np, "matmul", lambda a, b, dtype: (a[:, :, None] * b).sum(1, dtype=dtype))
    right = "split = split_of(first_key(last_key, W, IS_LOCAL), SPLIT, IS_LOCAL)"
    wrong = right.replace("last_key", "last_key - token_of_tile")
    changes = [*SHORT_SPLITS, *([("kv_combine", right, wrong)] if is_mistaken else [])]
    op = mutated("decode_attention", changes).attention_decode
    assert_accurate(op, **draft(8))
    last = op(**draft(8))[:, 7:]
    assert torch.equal(last, op(**draft(1))) != is_mistaken


# over a paged cache
PAGED_MISTAKES = {
    "no index in a block": (
        DECODE, ("attention_tiles", "position % KV_BLOCK * KV_STRIDE", "position % 1 * KV_STRIDE"),
    ),
    "the table of another slot": (
        DECODE, ("decode_attention", "slot.to(tl.int64) * stride_table", "0 * stride_table"),
    ),
    "the table of another slot in prefill": (
        PREFILL, ("prefill_attention", "block_table_ptr += slot * stride_table",
                  "block_table_ptr += 0 * stride_table"),
    ),
    "entries of the same tile again": (
        DECODE, ("decode_attention", "first, begin + BLOCK_N - first,", "first, begin - first,"),
        ("kv_splits", "return 32 if num_kv_heads <= 4 else 64", "return 64"),  # of two tiles
    ),
    "entries of the same tile again in prefill": (
        PREFILL, ("prefill_attention", "begin + 2 * BLOCK_N", "begin + BLOCK_N"),
    ),
    "values of the next tile": (
        PREFILL, ("prefill_attention", "            at_next = at_k\n", "            at_v = at_k\n"),
    ),
    "entries counted from the window's first key": (
        DECODE, ("attention_tiles", "position = (first + number).to(tl.uint32, bitcast=True)  #",
                 "position = number.to(tl.uint32, bitcast=True)  #"),
    ),
    "tokens as far apart as head_dim": (
        DECODE, ("checks", '"KV_STRIDE": token, "KV_BLOCK": k_cache.shape[1]',
                 '"KV_STRIDE": k_cache.shape[3], "KV_BLOCK": k_cache.shape[1]'),
    ),
    "stored in the next block": (
        ("rotary", "rope_and_store_"), ("rotary", "+ position // KV_BLOCK",
                                        "+ (position + 1) // KV_BLOCK"),
    ),
    "stored in another slot's block": (
        ("qkv", "linear_rope_and_store_"), ("rotary", "block_table_ptr + slot * stride_table",
                                            "block_table_ptr + (1 - slot) * stride_table"),
    ),
}  # fmt: skip


def paged_call(op: str) -> dict:
    """An op over blocks of 5 tokens; keys of attention are three tiles, in the second slot."""
    if op.endswith("store_"):
        return in_blocks(small_calls()[op], 3)
    torch.manual_seed(0)
    arguments = {name: random(2, 2, 96, 16) for name in ("k_cache", "v_cache")}
    arguments |= {"slots": index(1), "scale": 1.0, "softcap": None, "sliding_window": 75}
    if op == "attention_decode":
        arguments |= {"q": random(1, 4, 2, 16), "positions": index(91)}
    else:
        arguments |= {"q": random(7, 2, 16), "starts": index(88), "cu_seqlens": index(0, 7)}
    return in_blocks(arguments, 5)


@pytest.mark.parametrize("op", sorted({op for (_, op), *_ in PAGED_MISTAKES.values()}))
def test_no_mistake_in_blocks_of_tokens_is_no_difference(op):
    assert_accurate(getattr(kernels, op), **paged_call(op))


@pytest.mark.parametrize("mistake", PAGED_MISTAKES)
def test_a_mistake_in_a_paged_cache_is_seen(mistake, mutated):
    (module, op), *changes = PAGED_MISTAKES[mistake]
    wrong = getattr(mutated(module, changes), op)
    with pytest.raises(AssertionError, match=r"exceeds the budget|NaN at"):
        assert_accurate(wrong, **paged_call(op))


@pytest.mark.parametrize("check", [K, P, DRAW])
def test_no_mistake_in_sampling_is_no_difference(check, monkeypatch):
    check(sampling, small_rows(sampling, monkeypatch))


@pytest.mark.parametrize("mistake", SAMPLING_MISTAKES)
def test_a_mistake_in_sampling_is_seen(mistake, mutated, monkeypatch):
    check, *changes = SAMPLING_MISTAKES[mistake]
    wrong = mutated("sampling", changes)
    arguments = small_rows(wrong, monkeypatch)
    with pytest.raises(AssertionError):
        check(wrong, arguments)


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
