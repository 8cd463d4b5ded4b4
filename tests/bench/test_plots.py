"""Plots and the roofline: which are made, and that what they show can be told apart."""

from itertools import combinations

import numpy as np
import pytest
from matplotlib.text import Text
from synthetic_reports import (
    CEILINGS,
    decode_record,
    kernel_record,
    prefill_report,
    report,
    servers_report,
    serving_report,
)

from gemcut.bench.report.load import cases
from gemcut.bench.report.plots import OTHER, STYLES, make_plots
from gemcut.bench.report.roofline import roofline
from gemcut.bench.report.serving import server_figures


@pytest.mark.parametrize(
    ("reports", "names"),
    [
        pytest.param([], [], id="nothing"),
        pytest.param([prefill_report(), serving_report()], [], id="no-plot-of-these"),
        pytest.param(
            [report("kernels", [kernel_record("embed", us=[1.0], flops=0)])],
            ["kernels"],
            id="no-operations",
        ),
        pytest.param(
            [report("serve", servers_report()["rows"][-1:])], [], id="no-server-served-all"
        ),
        pytest.param(
            [report("decode", [decode_record("gemma-2-2b", rate=[1.0], batch=16)])],
            [],
            id="one-batch-and-not-1",
        ),
        pytest.param(
            [report("decode", [decode_record("gemma-2-2b", rate=[1.0], status="wrong")])],
            [],
            id="wrong",
        ),
    ],
)
def test_no_plot_without_data(reports, names, tmp_path):
    files = [file.name for file in make_plots(reports, tmp_path)]
    assert files == [f"nvidia-test-bfloat16-{name}.png" for name in names]


def test_servers_have_a_plot_by_trace_and_one_by_load(tmp_path):
    files = [file.name for file in make_plots([servers_report()], tmp_path)]
    assert files == ["nvidia-test-serve-demo.png", "nvidia-test-serve-demo-by-rate.png"]
    alone = [file.name for file in make_plots([servers_report(loads=(2.0,))], tmp_path)]
    assert alone == ["nvidia-test-serve-demo.png"]


def test_a_curve_of_latencies_goes_through_its_percentiles():
    found = list(cases([servers_report(loads=(2.0,))], "serve"))
    ((_, figure),) = server_figures(found, "device")
    axes = figure.axes[0]
    curves, marks = axes.lines[::2], axes.lines[1::2]
    assert len(curves) == len(marks) == 2
    assert curves[0].get_color() != curves[1].get_color()
    for curve, mark, factor in zip(curves, marks, (1, 2), strict=True):
        x, y = np.asarray(curve.get_data())
        assert (x[0], x[-1], y[0], y[-1]) == (10 * factor, 40 * factor, 0, 1)
        marked = np.asarray(mark.get_data())
        assert marked[0][0] == 25 * factor  # the median of 10 20 20 30 30 40
        assert np.interp(marked[1], y, x) == pytest.approx(marked[0])


def test_contestants_of_one_plot_look_different():
    ops = ["gemcut", "torch", "torch.compile", "rms_norm", "liger", "blas"]
    attention = ["gemcut", "torch", "torch.compile", "sdpa", "flex", "flashinfer"]
    engines = ["gemcut", "transformers", "transformers-static", "transformers-compiled"]
    for names in (ops, attention, [*engines, "gpt-fast"]):
        for i in range(3):  # colour, mark, hatch
            looks = [STYLES[name][i] for name in names]
            assert i == 2 or len(set(looks)) == len(names), names
        assert len({(STYLES[name][0], STYLES[name][2]) for name in names}) == len(names)
    assert OTHER[0] != STYLES["gemcut"][0]


def test_a_roofline_puts_kernels_at_their_intensity_and_numbers_apart():
    records = [
        # ten kernels at nearly one place
        kernel_record(f"op {i}", us=[4.0 + i / 50], flops=100_000_000 + i, variant="")
        for i in range(9)
    ]
    records.append(kernel_record("op 9", us=[100.0], flops=60_000_000_000, phase="prefill"))
    records.append(
        kernel_record("op 8", us=[100.0], flops=1_000_000, read_bytes=10)
    )  # a smaller case
    figure = roofline(records, CEILINGS, "title")
    figure.draw_without_rendering()
    axes = figure.axes[0]
    points = [tuple(xy) for group in axes.collections for xy in np.asarray(group.get_offsets())]
    for one in records:
        moved, us = one["read_bytes"] + one["written_bytes"], one["cold_us"]["median"]
        assert (one["flops"] / moved, pytest.approx(one["flops"] / us * 1e6)) in points
    # the roof: 4000 GB/s up to 700 TFLOP/s
    (roof,) = axes.lines
    x, y = np.asarray(roof.get_data())
    assert y == pytest.approx(np.minimum(700e12, 4e12 * x))
    numbers = [text for text in axes.texts if text.get_text().isdigit()]
    assert sorted(int(text.get_text()) for text in numbers) == list(range(1, 11))
    boxes = [Text.get_window_extent(text) for text in numbers]  # without the line to the mark
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
    marks = axes.transData.transform(points)
    assert not any(box.contains(*mark) for box in boxes for mark in marks)
