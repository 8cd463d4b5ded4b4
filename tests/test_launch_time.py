"""tools/launch_time.py: which facts of a launch make its time."""

from dataclasses import replace

import pytest
from predicted import attention, cell, loop, made, product

from gemcut.tools.launch_time import launch_us, memory_bytes, seen
from gemcut.tools.launches import Made
from gemcut.tools.machine import H200

MAIN = loop(2000, 1000, multiplies=True)
BEFORE = loop(0, 200, 50)
AFTER = loop(20_000, 2000)


def us(one: Made, *loops, context: int = 1024, machine=H200) -> float:
    return launch_us(one, cell(one, *loops), context, machine)


def test_launches_without_a_product_take_constants():
    assert launch_us(Made("index_select"), None, 1) == H200.torch_us
    assert us(made("advance_kernel", (1,), {})) == H200.small_us
    penalize = made("penalize_kernel", (1, 99), {"logits_ptr": (16, 256_000)})
    assert us(penalize) == pytest.approx(H200.small_us + 16 * 256_000 * 2 / H200.bandwidth * 1e6)


def test_a_large_product_takes_its_bytes_over_the_bandwidth():
    head = product("lm_head_kernel", 256_000, 2304, block_n=128)
    ideal = 1e6 * memory_bytes(head, 1) / H200.bandwidth
    assert memory_bytes(head, 1) == 256_000 * 2304 * 2
    assert ideal < us(head, loop(0, 300, multiplies=True)) < 1.15 * ideal


def test_a_norm_before_the_product_costs_a_walk_along_it():
    up = product("norm_linear_geglu_kernel", 18432, 2304, block_n=512)
    walk = H200.prologue_us + H200.us(9 * 3 * 200)  # 9 steps, within a wave of one program each
    assert us(up, BEFORE, MAIN) <= us(up, MAIN) + walk
    assert us(up, BEFORE, MAIN) >= us(up, MAIN) + H200.prologue_us + H200.us(9 * 200)


def test_sixteen_rows_read_the_weight_once_and_more_again_from_l2():
    def of_rows(rows: int) -> float:
        down = product("skinny_linear_kernel", 4608, 36864, block_n=16, M=rows)
        groups = -(-rows // 16)
        return us(replace(down, grid=(groups, 288)), MAIN)

    assert of_rows(16) == pytest.approx(of_rows(1), rel=0.3)
    assert of_rows(1) <= of_rows(16) <= of_rows(32) < 3 * of_rows(16)


def test_the_last_program_compares_what_all_kept():
    head = product("lm_head_argmax_kernel", 256_000, 1152, block_n=128, BLOCK_T=256)
    alone = us(head, MAIN)
    assert us(head, MAIN, AFTER) == pytest.approx(alone + H200.atomic_us + H200.us(8 * 2000))


def test_a_cut_along_the_columns_has_shorter_programs():
    whole = product("skinny_linear_kernel", 1152, 6912, block_n=16)
    cut = product("skinny_linear_kernel", 1152, 6912, block_n=16, SPLITS_D=3)
    assert us(replace(cut, grid=(1, 72, 3)), MAIN) < us(whole, MAIN) - H200.us(10 * 1000)


def test_attention_takes_its_tiles_one_after_the_other():
    """At 1024 keys, 8 splits in as many programs: 4 tiles of 32 in each, then one pass over all."""
    ends = H200.start_us + H200.lookup_us + H200.fill_us + H200.us(500) + H200.end_us
    combined = H200.atomic_us + H200.us(2000)
    assert us(attention(), MAIN, AFTER) == pytest.approx(ends + H200.us(4 * 1000) + combined)
    alone = us(attention(), MAIN, AFTER, context=128)  # one split: nothing to add up
    assert alone == pytest.approx(ends + H200.us(4 * 1000))


def test_a_window_bounds_what_attention_reads():
    local = attention(IS_LOCAL=1, W=512)
    assert memory_bytes(local, 8192) == memory_bytes(attention(), 512) == 2 * 4 * 512 * 256 * 2
    assert us(local, MAIN, AFTER, context=8192) == us(attention(), MAIN, AFTER, context=512)
    assert seen({"IS_LOCAL": 1, "W": 512}, 100) == 100


def test_long_contexts_are_bound_by_the_memory():
    many = attention(grid=(50, 16, 16))
    ideal = 1e6 * memory_bytes(many, 8192) / H200.bandwidth
    assert ideal < us(many, loop(0, 100, multiplies=True), context=8192) < 1.3 * ideal + 10
