"""tools/prediction/bandwidth_model.py: its limits, and that more never takes less."""

from dataclasses import replace
from itertools import pairwise

import pytest

from gemcut.tools.machine import H200
from gemcut.tools.prediction.bandwidth_model import Stream, _shared, bound_by, stream_us

STREAM = Stream(
    programs=264,
    steps=9,
    step_bytes=16384,
    cycles=1000,
    instructions=200,
    num_warps=4,
    stages=3,
    at_once=2,
)
ENDS_US = H200.start_us + H200.fill_us + H200.end_us


@pytest.mark.parametrize(
    ("changes", "bound"),
    [
        ({"programs": 1, "cycles": 9000}, "loop"),
        ({"instructions": 9000}, "issue"),
        ({"step_bytes": 512, "cycles": 1, "instructions": 1, "at_once": 1}, "latency"),
        ({"cycles": 1, "instructions": 1, "at_once": 3, "programs": 9999}, "memory"),
        ({"cycles": 1, "instructions": 1, "l2_bytes": 99999.0}, "L2"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_a_stream_is_bound_by(changes, bound):
    assert bound_by(replace(STREAM, **changes)) == bound


def test_one_program_is_bound_by_its_loop():
    one = replace(STREAM, programs=1)
    assert stream_us(one) == pytest.approx(ENDS_US + H200.us(9 * 1000))


def test_one_program_is_bound_by_what_it_has_in_flight():
    """Two steps on their way cover a latency of memory; four cover it twice as fast."""
    one = replace(STREAM, programs=1, cycles=1, instructions=1, step_bytes=512)
    assert stream_us(one) == pytest.approx(ENDS_US + 9 * H200.memory_us / 2)
    deep = replace(one, stages=5)
    assert stream_us(deep) == pytest.approx(ENDS_US + 9 * H200.memory_us / 4)


def test_many_programs_are_bound_by_the_bandwidth():
    many = replace(STREAM, programs=132 * 200, cycles=100, instructions=10)
    ideal = 1e6 * many.programs * 9 * 16384 / H200.bandwidth
    assert ideal < stream_us(many) < 1.1 * ideal + 100 * (H200.fill_us + H200.end_us)
    alone = stream_us(replace(many, programs=132 * 2, steps=900))  # one wave, without ends
    assert alone == pytest.approx(ENDS_US + ideal, rel=0.03)


def test_programs_that_share_a_processor_share_its_schedulers():
    one_each = replace(STREAM, programs=132, num_warps=8, instructions=600, cycles=600)
    issue = 8 * 600 / 4 / H200.issue
    assert stream_us(one_each) == pytest.approx(ENDS_US + H200.us(9 * issue), rel=1e-3)
    two_each = replace(one_each, programs=264)
    assert stream_us(two_each) == pytest.approx(ENDS_US + H200.us(9 * 2 * issue), rel=1e-3)


def test_activations_pass_l2_as_well():
    fast = replace(STREAM, cycles=1, instructions=1, programs=132 * 50, stages=50)
    assert stream_us(replace(fast, l2_bytes=4 * 16384)) > 2 * stream_us(fast)


def test_a_second_wave_waits_for_the_first():
    first = stream_us(replace(STREAM, programs=264))
    second = stream_us(replace(STREAM, programs=265))
    assert second - first > H200.us(8 * 1000)


def test_processors_do_not_keep_step():
    """Half of them draw more: of many waves one hides the other's ends, one wave ends later."""
    even = replace(H200, unevenness=1e-6)
    many = replace(STREAM, programs=132 * 20, cycles=100, instructions=10)
    assert stream_us(many) < 0.97 * stream_us(many, even)
    one = replace(many, programs=264, stages=4)
    assert stream_us(one, even) <= stream_us(one) < 1.2 * stream_us(one, even)


def test_rates_are_weighted_shares_or_what_is_wanted():
    assert _shared([3.0, 1.0], [1, 1], [1, 1], 5.0) == [3.0, 1.0]
    assert _shared([2.0, 2.0], [1, 1], [1.5, 0.5], 2.0) == [1.5, 0.5]
    assert _shared([2.0, 2.0], [1, 1], [1.5, 0.5], 3.0) == [2.0, 1.0]
    assert _shared([2.0, 2.0, 9.0], [3, 1, 0], [1, 1, 1], 4.0)[:2] == [1.0, 1.0]


@pytest.mark.parametrize("field", ["programs", "steps", "step_bytes", "cycles", "end_us"])
def test_more_never_takes_less(field):
    sizes = [1, 17, 132, 133, 264, 265, 1000, 1001, 20000]
    times = [stream_us(replace(STREAM, **{field: size})) for size in sizes]
    assert all(a <= b + 1e-9 for a, b in pairwise(times))


@pytest.mark.parametrize("name", ["bandwidth", "ghz"])
def test_a_faster_machine_takes_no_longer(name):
    for programs in (1, 264, 5000):
        stream = replace(STREAM, programs=programs)
        faster = replace(H200, **{name: 2 * getattr(H200, name)})
        assert stream_us(stream, faster) <= stream_us(stream)


@pytest.mark.parametrize(
    ("shared", "registers", "warps", "programs"),
    [
        pytest.param(53_248, 142, 4, 3, id="registers"),
        pytest.param(155_648, 143, 8, 1, id="shared memory"),
        pytest.param(0, 16, 4, 16, id="warps"),
        pytest.param(0, 16, 1, 32, id="programs"),
        pytest.param(300_000, 255, 8, 1, id="at least one"),
    ],
)
def test_programs_at_once(shared, registers, warps, programs):
    assert H200.programs_at_once(shared, registers, warps) == programs
