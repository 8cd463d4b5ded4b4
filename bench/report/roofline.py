"""A roofline: every kernel of a model under what memory and arithmetic allow.

Each mark is a case, at its operations for each byte that it must move.  A kernel has a number at
its largest case; the list beside the plot names it.
"""

from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, StrMethodFormatter
from matplotlib.transforms import Bbox

from gemcut.bench.measure.report_file import Record
from gemcut.bench.report.load import figures, spread_of

PHASES = {"decode": ("#0072B2", "o"), "prefill": ("#D55E00", "s")}  # colour, mark
DISTANCES = (9, 14, 20, 27, 35)  # points, of a number from its mark
ANGLES = np.radians(np.arange(90, 450, 30))
MARK_POINTS = 7  # the side of a mark
RATE = EngFormatter("FLOP/s")
ROOF_POINTS = 200


class Point(NamedTuple):
    """A case in the plot's units."""

    operations_per_byte: float
    operations_per_second: float
    record: Record


def roofline(records: Sequence[Record], ceilings: dict[str, float], title: str) -> Figure:
    """The figure of the records that have operations; at least one must."""
    points = [_point(record) for record in records if record["flops"] > 0]
    figure = Figure(figsize=(10, 6.2), layout="constrained")
    axes, key = figure.subplots(1, 2, width_ratios=[4, 1])
    axes.set(xscale="log", yscale="log", xlabel="operations / byte")
    axes.set_title(title, fontsize=11)
    roof = _draw_roof(axes, points, ceilings)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_major_formatter(RATE)

    numbers = {op: i for i, op in enumerate(sorted({point.record["op"] for point in points}), 1)}
    largest: dict[tuple[str, str], Point] = {}
    for point in points:
        name = point.record["op"], point.record["phase"]
        if name not in largest or point.record["floor_us"] > largest[name].record["floor_us"]:
            largest[name] = point
    for phase, (colour, mark) in PHASES.items():
        own = [point for point in points if point.record["phase"] == phase]
        labelled = [point for (_, of), point in largest.items() if of == phase]
        for some, look in ((own, {"s": 14, "alpha": 0.45}), (labelled, {"s": 46, "zorder": 3})):
            x, y = [p.operations_per_byte for p in some], [p.operations_per_second for p in some]
            axes.scatter(x, y, color=colour, marker=mark, edgecolor="white", linewidth=0.5, **look)
    _draw_key(key, numbers)
    figure.draw_without_rendering()  # lays out: positions in pixels are final from here on
    figure.set_layout_engine("none")
    _number(axes, roof, points, [(numbers[op], point) for (op, _), point in largest.items()])
    return figure


def _point(record: Record) -> Point:
    moved = record["read_bytes"] + record["written_bytes"]
    us = spread_of(record, "cold_us").median
    return Point(record["flops"] / moved, record["flops"] / us * 1e6, record)


def _draw_roof(axes: Axes, points: Sequence[Point], ceilings: dict[str, float]) -> Line2D:
    peak, slope = ceilings["matmul_tflops"] * 1e12, ceilings["read_gbps"] * 1e9
    ridge = peak / slope  # where both limits meet
    left = min(point.operations_per_byte for point in points) / 2
    right = max(2 * max(point.operations_per_byte for point in points), 4 * ridge)
    axes.set_xlim(left, right)
    rates = [point.operations_per_second for point in points]
    axes.set_ylim(min(rates) / 2, 3 * max(peak, *rates))  # a CPU's caches exceed its memory
    x = np.geomspace(left, right, ROOF_POINTS)
    (roof,) = axes.plot(x, np.minimum(peak, x * slope), color="black", linewidth=1.5)
    words = f"products: {RATE(float(f'{peak:.3g}'))}"
    axes.annotate(words, (right, peak), (-4, 6), textcoords="offset points", ha="right")
    words = f"reading: {figures(ceilings['read_gbps'])} GB/s"
    axes.annotate(words, (ridge, peak), (-14, 2), textcoords="offset points", ha="right")
    return roof


def _draw_key(key: Axes, numbers: dict[str, int]) -> None:
    key.axis("off")
    handles = [
        Line2D([], [], color=colour, marker=mark, linestyle="", markersize=MARK_POINTS, label=phase)
        for phase, (colour, mark) in PHASES.items()
    ]
    handles.append(Line2D([], [], color="grey", marker=".", linestyle="", label="smaller shapes"))
    key.legend(handles=handles, loc="upper left", bbox_to_anchor=(0, 1), borderpad=0)
    for column, (x, side) in ((numbers.values(), (0.1, "right")), (numbers, (0.17, "left"))):
        lines = "\n".join(map(str, column))
        key.text(x, 0.83, lines, va="top", ha=side, linespacing=1.6, transform=key.transAxes)


def _number(
    axes: Axes, roof: Line2D, points: Sequence[Point], labels: Sequence[tuple[int, Point]]
) -> None:
    """Write each number where it covers no mark, line or number, as near as it can be."""
    pixels = axes.figure.dpi / 72
    to_pixels = axes.transData.transform
    marks = to_pixels(
        [(point.operations_per_byte, point.operations_per_second) for point in points]
    )
    taken = [_box(x, y, MARK_POINTS * pixels, MARK_POINTS * pixels) for x, y in marks]
    taken += [_box(x, y, 4 * pixels, 4 * pixels) for x, y in to_pixels(roof.get_xydata())]
    taken += [text.get_window_extent() for text in axes.texts]
    inside = axes.get_window_extent()
    for number, point in labels:
        place = point.operations_per_byte, point.operations_per_second
        x, y = to_pixels(place)
        width, height = (6 * len(str(number)) + 2) * pixels, 9 * pixels
        costs = {}
        for distance, angle in product(DISTANCES, ANGLES):
            dx, dy = distance * np.cos(angle), distance * np.sin(angle)
            box = _box(x + dx * pixels, y + dy * pixels, width, height)
            if box.x0 > inside.x0 and box.y0 > inside.y0 and box.x1 < inside.x1:
                costs[dx, dy] = 1000 * box.count_overlaps(taken) + distance, box
        offset, (_, box) = min(costs.items(), key=lambda item: item[1][0])
        taken.append(box)
        axes.annotate(
            str(number),
            place,
            offset,
            textcoords="offset points",
            ha="center",
            va="center_baseline",
            fontsize=8.5,
            fontweight="bold",
            arrowprops={"arrowstyle": "-", "color": "#666666", "linewidth": 0.7, "shrinkA": 0},
        )


def _box(x: float, y: float, width: float, height: float) -> Bbox:
    return Bbox.from_bounds(x - width / 2, y - height / 2, width, height)
