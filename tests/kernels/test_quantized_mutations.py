"""Mistakes that are easy to make with quantised weights and caches: each must be seen."""

import pytest
from accuracy import assert_accurate
from op_cases import in_fp8, quantized_calls, small_calls

from gemcut import kernels

pytestmark = pytest.mark.usefixtures("poisoned")
ARGMAX = ("head", "lm_head_argmax")
PREFILL = ("prefill_attention", "attention_prefill")
DECODE = ("decode_attention", "attention_decode")
SKINNY, GEGLU = ("matmul", "skinny_linear"), ("mlp", "linear_geglu")
PRODUCT, TILES = "skinny_product", "quantized_tiles"
# which reads TILES for all of them
THROUGH = (PRODUCT, "A weight times a decode step", "A weight times a decode step")
INT4, ROWS = "int4 in 32s with zero points", "int8 by row"
# mistake: (the op's module, the op), the kind of weight, then what is changed
QUANTIZED_MISTAKES = {
    "halves of a byte swapped": (
        SKINNY, INT4, (TILES, "return low.to(DTYPE), high.to(DTYPE)",
                       "return high.to(DTYPE), low.to(DTYPE)"), THROUGH,
    ),
    "no offset of int4": (
        SKINNY, INT4, (TILES, "(w & 15).to(tl.int32) - 8", "(w & 15).to(tl.int32)"), THROUGH,
    ),
    "columns in the order of memory": (
        SKINNY, ROWS, (TILES, "c // 16 * 16 + c % 8 // 2 * 4 + c % 16 // 8 * 2 + c % 2", "c"),
        THROUGH,
    ),
    "high halves by the columns of the low ones": (
        SKINNY, INT4, (PRODUCT, "x = x_tile(tokens, offs_d + 32, D, HAS_TAIL)",
                       "x = x_tile(tokens, offs_d, D, HAS_TAIL)"),
    ),
    "the scale of the group before": (
        GEGLU, INT4, (PRODUCT, "start_d, FIRST + 32, HAS_TAIL", "start_d, FIRST, HAS_TAIL"),
    ),
    "scales of a step's first half": (
        SKINNY, "int8 in 32s",
        (PRODUCT, 'NEXT: tl.constexpr = FIRST + (BYTES if FORMAT == "int4" else HALF)',
         "NEXT: tl.constexpr = FIRST"),
    ),
    "zero points dropped": (SKINNY, INT4, (PRODUCT, "unit -= group[1]", "unit -= 0 * group[1]")),
    "zero points not scaled": (
        SKINNY, INT4, (PRODUCT, "acc += unit * group[0][:, None]",
                       "acc += unit * group[0][:, None] + 0.01 * group[1][:, None]"),
    ),
    "sums by row not scaled": (
        GEGLU, ROWS, (PRODUCT, "if FORMAT is not None and GROUP == 0:", "if FORMAT == 0:"),
    ),
    "logits not scaled before they are compared": (
        ARGMAX, ROWS, ("head", "acc = scaled_by_row(acc, weight", "scaled_by_row(acc, weight"),
    ),
    "fp8 without its sign": (
        SKINNY, "fp8 by row", (TILES, "(bits & 0x80) << 24 | ", ""), THROUGH,
    ),
    "an embedding by the scale of its first group": (
        ("head", "embed"), INT4, (TILES, "D // GROUP, offs_d // GROUP", "D // GROUP, 0 * offs_d"),
    ),
    "an embedding without zero points": (
        ("begin", "begin_step"), INT4, (TILES, "if zeros_ptr is not None:", "if False:"),
        ("head", "MAX_BLOCK_D = 4096", "MAX_BLOCK_D = 2048"),  # which reads the other module
    ),
    "prefill by other rows of the weight": (
        ("matmul", "linear"), INT4, ("matmul", "first=first, D=D", "first=first + 1, D=D"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", [INT4, ROWS, "fp8 by row"])
@pytest.mark.parametrize("name", quantized_calls(ROWS))
def test_no_mistake_with_a_quantised_weight_is_no_difference(name, kind):
    assert_accurate(getattr(kernels, name), **quantized_calls(kind)[name])


@pytest.mark.parametrize("mistake", QUANTIZED_MISTAKES)
def test_a_mistake_with_a_quantised_weight_breaks_the_rule(mistake, mutated):
    (module, op), kind, *changes = QUANTIZED_MISTAKES[mistake]
    wrong = getattr(mutated(module, changes), op)
    with pytest.raises(AssertionError, match=r"exceeds the budget|NaN at"):
        assert_accurate(wrong, **quantized_calls(kind)[op])


# the same of a cache in fp8, whose heads have scales of their own
STORE, STORE_QKV = ("rotary", "rope_and_store_"), ("qkv", "linear_rope_and_store_")
FP8_MISTAKES = {
    "keys of another head's scale": (
        PREFILL,
        ("prefill_attention", "k_scale_ptr + head // GROUP_SIZE", "k_scale_ptr + head % 2"),
    ),
    "values' scale forgotten": (
        PREFILL, ("prefill_attention", "y *= tl.load(v_scale_ptr + head // GROUP_SIZE)", "y *= 1"),
    ),
    "keys of another head's scale in decode": (
        DECODE, ("decode_attention", "k_scale_ptr + kv_head", "k_scale_ptr + 1 - kv_head"),
    ),
    "values' scale forgotten in decode": (
        DECODE, ("kv_combine", "acc *= tl.load(v_scale_ptr + head // GROUP_SIZE)", "acc *= 1"),
    ),
    "even and odd values exchanged": (
        DECODE, ("attention_tiles", "return even, odd", "return odd, even"),
    ),
    "odd values stored as even ones": (
        DECODE, ("kv_combine", "_store_in_place(acc_ptr + 1, offs, odd_acc",
                 "_store_in_place(acc_ptr, offs, odd_acc"),
    ),
    "multiplied by the scale where it divides": (
        STORE, ("rotary", "x *= 1.0 / scale", "x *= scale"),
    ),
    "all keys stored by the first head's scale": (
        STORE, ("rotary", "k_scale_ptr + heads - NUM_Q_HEADS", "k_scale_ptr + 0 * heads"),
    ),
    "values stored by the keys' scale": (
        STORE_QKV, ("qkv", "tl.where(is_key, k_scale_ptr, v_scale_ptr)", "k_scale_ptr"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", FP8_MISTAKES)
def test_a_mistake_in_fp8_breaks_the_rule(mistake, mutated):
    (module, op), *changes = FP8_MISTAKES[mistake]
    wrong = getattr(mutated(module, changes), op)
    with pytest.raises(AssertionError, match=r"exceeds the budget|NaN at"):
        assert_accurate(wrong, **in_fp8(small_calls()[op]))
