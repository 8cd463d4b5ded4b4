"""What reports say of servers: their tables, and plots of their latencies.

    serve-MODEL             how many of the requests took at most so long, by trace and server
    serve-MODEL-by-load     p50 and p99 by requests a second, or by requests under way

Ratios say how many times as fast the first server is, percentile by percentile: median (range) of
the rounds, in each of which both took their turn.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator, PercentFormatter, StrMethodFormatter

from gemcut.bench.engines.served import times_as_good
from gemcut.bench.measure.report_file import Record
from gemcut.bench.report.load import (
    Case,
    Report,
    by_model,
    cases,
    describe,
    figures,
    spread_of,
)
from gemcut.bench.report.tables import markdown

SHOWN = {
    "first_token_ms": "first token, ms",
    "between_tokens_ms": "between tokens, ms",
    "request_ms": "request, ms",
    "request_tokens_per_second": "tokens/s of a request",
}
DRAWN = ("first_token_ms", "between_tokens_ms", "request_ms")
PERCENTILES = ("p50", "p90", "p99")
LOOKS = (  # of servers in their order: colour, mark
    ("#0072B2", "o"),
    ("#D55E00", "s"),
    ("#009E73", "^"),
    ("#CC79A7", "D"),
    ("#E69F00", "v"),
    ("#56B4E9", "P"),
    ("#999999", "X"),
)
WIDTH = 10  # inches
LOADS = {"rate": "requests/s", "concurrency": "requests under way"}
RANKS = np.arange(101)


def server_tables(reports: Sequence[Report]) -> list[str]:
    """For each model a table of servers, and one of how they compare."""
    lines = []
    slashes = [f"{words}: p50 / p90 / p99" for words in SHOWN.values()]
    for model, found in by_model(cases(reports, "serve")).items():
        own, ratios = [], []
        for case in found:
            first, *others = case.timed or [""]
            for name, record in case.timed.items():
                own.append([_load(record), name, *_cells(record)])
            for name in others:
                compared = _ratios(case.timed[first], case.timed[name])
                ratios.append([_load(case.facts), name, first, *compared])
        if own:
            header = ["load", "server", *slashes, "tokens/s", "requests/s"]
            lines += [f"#### {model}", "", *markdown(header, own)]
        if ratios:
            header = ["load", "server", "how many times as fast is", *slashes, "tokens/s"]
            lines += markdown(header, ratios)
    return lines


def _load(record: Record) -> str:
    """The load of a trace, in words."""
    rate, concurrency = record["rate"], record["concurrency"]
    return f"concurrency {concurrency}" if rate is None else f"{rate:g} requests/s"


def _cells(record: Record) -> list[str]:
    latencies = [" / ".join(figures(record[name][p]) for p in PERCENTILES) for name in SHOWN]
    rates = ("tokens_per_second", "requests_per_second")
    return [*latencies, *(describe(spread_of(record, name)) for name in rates)]


def _ratios(first: Record, other: Record) -> list[str]:
    def ratio(name: str, percentile: str | None) -> str:
        return describe(times_as_good(first, other, name, percentile))

    cells = [" / ".join(ratio(name, p) for p in PERCENTILES) for name in SHOWN]
    return [*cells, ratio("tokens_per_second", None)]


def server_figures(found: Sequence[Case], device: str) -> Iterator[tuple[str, Figure]]:
    """The figures of these cases, by name."""
    for model, own in by_model(case for case in found if case.timed).items():
        looks = _looks(own)
        yield f"serve {model}", _distributions(own, looks, f"{model}: latencies\n{device}")
        for kind, words in LOADS.items():
            loaded = [case for case in own if case.facts[kind] is not None]
            if len({case.facts[kind] for case in loaded}) > 1:
                title = f"{model}: latencies by {words}; solid p50, dashed p99\n{device}"
                yield f"serve {model} by {kind}", _by_load(loaded, kind, looks, title)


def _looks(found: Sequence[Case]) -> dict[str, tuple[str, str]]:
    names = dict.fromkeys(name for case in found for name in case.timed)
    return {name: LOOKS[i % len(LOOKS)] for i, name in enumerate(names)}


def _distributions(found: Sequence[Case], looks: dict[str, tuple[str, str]], title: str) -> Figure:
    """A row of panels for each trace: the share of requests that took at most so long."""
    figure = Figure(figsize=(WIDTH, 1.3 + 2.3 * len(found)), layout="constrained")
    grid = figure.subplots(len(found), len(DRAWN), squeeze=False)
    for case, row in zip(found, grid, strict=True):
        for metric, axes in zip(DRAWN, row, strict=True):
            for name, record in case.timed.items():
                colour, mark = looks[name]
                axes.plot(np.percentile(record[metric]["all"], RANKS), RANKS / 100, color=colour)
                marked = [record[metric][p] for p in PERCENTILES]
                axes.plot(marked, [0.5, 0.9, 0.99], mark, color=colour, markersize=5)
            _set_log(axes, "x")
            axes.yaxis.set_major_formatter(PercentFormatter(1))
            axes.set(title=f"{_load(case.facts)}: {SHOWN[metric]}", ylim=(0, 1.03))
    figure.supylabel("requests", fontsize=9)
    return _finish(figure, looks, f"{title}; marks: p50, p90, p99")


def _by_load(
    found: Sequence[Case], kind: str, looks: dict[str, tuple[str, str]], title: str
) -> Figure:
    """A panel for each latency, and one of tokens a second."""
    figure = Figure(figsize=(WIDTH, 3.9), layout="constrained")
    panels = figure.subplots(1, 3)
    drawn = [*DRAWN[:2], "tokens_per_second"]
    for metric, axes in zip(drawn, panels, strict=True):
        for name, (colour, mark) in looks.items():
            records = {c.facts[kind]: c.timed[name] for c in found if name in c.timed}
            loads = sorted(records)
            if metric == "tokens_per_second":
                lines = [([records[load][metric]["median"] for load in loads], "-")]
            else:
                lines = [
                    ([records[load][metric][p] for load in loads], style)
                    for p, style in (("p50", "-"), ("p99", "--"))
                ]
            for values, style in lines:
                axes.plot(loads, values, style, color=colour, marker=mark, markersize=5)
        axes.set(title=SHOWN.get(metric, "tokens/s"), xlabel=LOADS[kind], xscale="log")
        places = sorted({case.facts[kind] for case in found})
        axes.set_xticks(places, [f"{place:g}" for place in places])
        axes.xaxis.set_minor_locator(NullLocator())
        _set_log(axes, "y")
    return _finish(figure, looks, title)


def _set_log(axes: Axes, which: str) -> None:
    """A logarithmic axis whose ticks are plain numbers, however short it is."""
    axes.set(**{f"{which}scale": "log"})
    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high > 4 * low else range(1, 10)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_locator(NullLocator())


def _finish(figure: Figure, looks: dict[str, tuple[str, str]], title: str) -> Figure:
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    entries: dict[str, Artist] = {
        name: Line2D([], [], color=colour, marker=mark) for name, (colour, mark) in looks.items()
    }
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=4)
    return figure
