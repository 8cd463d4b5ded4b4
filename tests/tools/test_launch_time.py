"""tools/prediction/launch_time.py: which facts of a launch make its time."""

from dataclasses import replace
from itertools import pairwise

import pytest
from predicted import attention, cell, combined, loop, made, product

from gemcut.kernels.kv_splits import count_splits
from gemcut.tools.launches import Made
from gemcut.tools.machine import H200
from gemcut.tools.prediction.launch_time import (
    MOST_CROWDED,
    bound,
    cuts,
    launch_us,
    longest_run,
    memory_bytes,
    seen,
)

MAIN = loop(2000, 1000, multiplies=True)


def us(one: Made, *loops, context: int = 1024, machine=H200) -> float:
    return launch_us(one, cell(one, *loops), context, machine)


def test_launches_without_a_product_take_constants():
    assert launch_us(Made("index_select"), None, 1) == H200.torch_us
    assert us(made("advance_kernel", (1,), {})) == H200.small_us["advance_kernel"]
    penalize = made("penalize_kernel", (1, 99), {"logits_ptr": (16, 256_000)})
    assert us(penalize) == pytest.approx(H200.other_us + 16 * 256_000 * 2 / H200.bandwidth * 1e6)


def test_partial_sums_take_no_time_of_their_own():
    """A chain's norm of 8 took no longer than a step's of one."""
    for parts in (1, 8):
        norm = made("add_rmsnorm_kernel", (1,), {"x_ptr": (parts, 1, 2304)}, SPLITS=parts)
        assert us(norm) == H200.small_us["add_rmsnorm_kernel"]


def test_a_dependent_product_crowds_where_places_are_free():
    """Four of its programs fit a processor: 528 places."""
    plain = product("linear_geglu_kernel", 400 * 64, 2304)
    dependent = replace(plain, is_dependent=True, before=288)
    crowded = 1 + H200.crowding * (528 / 400 - 1)
    assert us(dependent, MAIN) == pytest.approx(us(plain, MAIN) * crowded)
    # all find a place beside what runs; all places are needed
    assert us(replace(dependent, before=100), MAIN) == us(plain, MAIN)
    full = product("linear_geglu_kernel", 528 * 64, 2304)
    assert us(replace(full, is_dependent=True, before=396), MAIN) == us(full, MAIN)
    few = replace(product("linear_geglu_kernel", 64, 2304), is_dependent=True, before=528)
    assert us(few, MAIN) == us(replace(few, is_dependent=False), MAIN) * (
        1 + H200.crowding * MOST_CROWDED
    )


def test_a_program_walks_over_blocks_of_rows():
    """As many bytes in one run; what is rare is done once a block."""
    head = product("lm_head_argmax_kernel", 264 * 16 * 64, 2304)
    walking = product("lm_head_argmax_kernel", 264 * 16 * 64, 2304, blocks=16)
    walking = replace(walking, grid=(1, 264))
    ideal = 1e6 * memory_bytes(head, 1) / H200.bandwidth
    assert ideal < us(walking, loop(0, 300, multiplies=True)) < 1.1 * ideal
    slow = loop(0, 5000, multiplies=True)
    comparing = replace(slow, rare_cycles=4000)
    ends = H200.start_us + H200.fill_us + H200.end_us + H200.us(500)
    cycles = 16 * (18 * 5000 + 4000)
    assert us(walking, comparing) == pytest.approx(ends + H200.us(cycles), rel=1e-3)


def test_a_large_product_takes_its_bytes_over_the_bandwidth():
    head = product("lm_head_kernel", 256_000, 2304, block_n=128)
    ideal = 1e6 * memory_bytes(head, 1) / H200.bandwidth
    assert memory_bytes(head, 1) == 256_000 * 2304 * 2
    assert ideal < us(head, loop(0, 300, multiplies=True)) < 1.15 * ideal


def test_a_quantised_weight_is_its_values_and_scales():
    """int4: half as many bytes as columns in a row, and as many steps as its columns take."""
    plain = product("linear_geglu_kernel", 28672, 3584)
    shapes = {"w_ptr": (28672, 1792), "scales_ptr": (28672, 112)}
    sizes = (("w_ptr", 1), ("scales_ptr", 2))
    numbers = (*plain.numbers, ("D", 3584))
    int4 = replace(plain, numbers=numbers, shapes=tuple(shapes.items()), item_bytes=sizes)
    assert memory_bytes(int4, 1) == 28672 * (1792 + 2 * 112)
    fast, slow = loop(0, 100, 50, multiplies=True), loop(0, 2000, 1500, multiplies=True)
    assert us(int4, fast) < us(plain, fast) / 2.8
    assert us(int4, slow) == pytest.approx(us(plain, slow), rel=0.1)  # by its instructions
    assert bound(int4, cell(int4, slow)) == "issue"
    assert bound(plain, cell(plain, fast)) == "memory"


def test_a_table_whose_rows_are_read_is_no_product():
    begin = made("begin_step_kernel", (1,), {"w_ptr": (256_000, 2304)}, BLOCK_D=4096)
    assert us(begin) == H200.small_us["begin_step_kernel"]
    assert bound(begin, cell(begin)) is None


def test_sixteen_rows_read_the_weight_once_and_more_again_from_l2():
    def of_rows(rows: int) -> float:
        down = product("skinny_linear_kernel", 4608, 36864, splits=4, M=rows)
        groups = -(-rows // 16)
        return us(replace(down, grid=(groups, 72, 4)), MAIN)

    assert of_rows(16) == pytest.approx(of_rows(1), rel=0.3)
    assert of_rows(1) <= of_rows(16) <= of_rows(32) < 3 * of_rows(16)


def test_a_cut_along_the_columns_has_shorter_programs():
    whole = product("skinny_linear_kernel", 1152, 6912)
    cut = product("skinny_linear_kernel", 1152, 6912, splits=3)
    assert us(cut, MAIN) < us(whole, MAIN) - H200.us(30 * 1000)


def test_attention_takes_its_tiles_one_after_the_other():
    """At 1024 keys, 16 splits in as many programs: 2 tiles of 32 in each."""
    ends = H200.start_us + H200.lookup_us + H200.fill_us + H200.us(500) + H200.end_us
    tile_us = H200.us(1900)
    main = loop(2000, 1900, multiplies=True)
    assert us(attention(), main) == pytest.approx(ends + 2 * tile_us)
    # of 8 programs some take three splits, as each takes those that begin in 129 keys
    assert us(attention(grid=(8, 4, 1)), main) == pytest.approx(ends + 6 * tile_us)
    assert us(attention(), main, context=33) == pytest.approx(ends + 2 * tile_us)
    assert us(attention(), main, context=32) == pytest.approx(ends + tile_us)


def test_splits_are_added_up_in_passes():
    """64 at a time: one pass up to 64 splits of 64 keys, then two."""
    ends = H200.start_us + H200.lookup_us + H200.us(500) + H200.end_us
    load = loop(0, 570)
    for context, passes in ((1, 1), (1024, 1), (4096, 1), (4097, 2), (16_384, 4), (32_768, 6)):
        assert us(combined(), load, context=context) == pytest.approx(ends + H200.us(570 * passes))
    # a processor holds four programs of 50 kB: 640 are two waves
    waves = us(combined(grid=(16, 8, 5)), load)
    assert waves == pytest.approx(ends + 2 * H200.us(570) + H200.us(500))
    local = combined(IS_LOCAL=1, W=4096)
    assert us(local, load, context=32_768) == us(combined(), load, context=4096)


def test_many_splits_are_bound_by_l2():
    many = combined(grid=(16, 8, 64))
    ideal = 1e6 * 4 * 384 * 16 * 16 * 8 * 64 / H200.l2_bandwidth
    assert ideal < us(many, loop(0, 1), context=32_768) < ideal + 3


@pytest.mark.parametrize("context", [1, 63, 64, 65, 8192, 8193, 20_000, 100_000])
def test_splits_are_those_of_the_kernel(context):
    facts = {"SPLIT": 64, "IS_LOCAL": 0}
    bounds = cuts(facts, context)
    assert len(bounds) - 1 == count_splits(context, 64)
    assert bounds == sorted(set(bounds))
    assert (bounds[0], bounds[-1]) == (0, context)
    assert longest_run(bounds, 1) == context
    assert longest_run(bounds, 1000) == max(b - a for a, b in pairwise(bounds))
    assert context / 7 <= longest_run(bounds, 7) <= context / 7 + 2 * longest_run(bounds, 1000)


def test_splits_of_a_window_begin_at_absolute_places():
    facts = {"SPLIT": 64, "IS_LOCAL": 1, "W": 100}
    assert cuts(facts, 250) == [150, 192, 250]
    assert cuts(facts, 50) == [0, 50]


def test_a_window_bounds_what_attention_reads():
    local = attention(IS_LOCAL=1, W=512)
    assert memory_bytes(local, 8192) == memory_bytes(attention(), 512) == 2 * 4 * 512 * 256 * 2
    assert us(local, MAIN, context=8192) == us(attention(), MAIN, context=512)
    assert seen({"IS_LOCAL": 1, "W": 512}, 100) == 100


def test_long_contexts_are_bound_by_the_memory():
    many = attention(grid=(12, 16, 16))
    ideal = 1e6 * memory_bytes(many, 8192) / H200.bandwidth
    assert ideal < us(many, loop(0, 100, multiplies=True), context=8192) < 1.3 * ideal + 10
