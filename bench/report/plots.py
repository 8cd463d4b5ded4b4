"""Plots of reports, a set for each device and dtype: PNG files that can be read in grey, too.

    roofline-MODEL      every kernel of a model under what memory and arithmetic allow (roofline.py)
    kernels             the share of that limit which each kernel reaches
    attention           TFLOP/s of prefill attention by length
    decode              the share of read bandwidth that decoding reaches, by model
    latency             milliseconds from token to token by batch
    serve-MODEL         latencies of servers, one figure by trace and one by load (serving.py)

Gemcut is blue everywhere, and each peer has one colour, one mark and one hatch throughout.  A plot
of which nothing was measured is not made.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib as mpl
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from gemcut.bench.measure.report_file import Record
from gemcut.bench.measure.timing import Spread
from gemcut.bench.report.load import (
    GEMCUT,
    Case,
    Report,
    by_model,
    cases,
    device_of,
    figures,
    like_gemcut,
    near_1k,
    spread_of,
)
from gemcut.bench.report.roofline import roofline
from gemcut.bench.report.serving import server_figures

# Okabe and Ito's palette: told apart by the colour-blind
BLUE, ORANGE, GREEN, SKY = "#0072B2", "#E69F00", "#009E73", "#56B4E9"
VERMILLION, PURPLE, YELLOW, GREY, BLACK = "#D55E00", "#CC79A7", "#F0E442", "#999999", "#000000"
STYLES = {  # colour, mark, hatch; in the order of legends
    GEMCUT: (BLUE, "o", ""),
    "torch": (GREY, "s", ".."),
    "torch.compile": (ORANGE, "^", "//"),
    "sdpa": (VERMILLION, "v", "xx"),
    "flex": (GREEN, "D", "\\\\"),
    "flashinfer": (PURPLE, "P", "++"),
    "blas": (SKY, "v", "--"),
    "rms_norm": (BLACK, "P", ""),
    "liger": (YELLOW, "X", "oo"),
    "transformers": (GREY, "s", ".."),
    "transformers-static": (SKY, "v", "--"),
    "transformers-compiled": (ORANGE, "^", "//"),
    "gpt-fast": (GREEN, "D", "\\\\"),
}
OTHER = (PURPLE, "X", "++")
SETTINGS: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#666666",
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "font.size": 9,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "hatch.linewidth": 0.7,
    "legend.frameon": False,
    "savefig.dpi": 150,
}
HALO = [withStroke(linewidth=3, foreground="white")]  # around a line that crosses a bar
WIDTH = 10  # inches
COLUMNS = 3  # of panels


@dataclass(frozen=True)
class View:
    """The cases of one device in one dtype."""

    device: str
    dtype: str
    kernels: list[Case]
    decode: list[Case]

    def title(self, text: str) -> str:
        return f"{text}\n{self.device}, {self.dtype}"


def make_plots(reports: Sequence[Report], folder: Path) -> list[Path]:
    """Write the plots that there are data for; their files."""
    files = []
    with mpl.rc_context(SETTINGS):
        for view in _views(reports):
            for name, figure in _figures(view):
                files.append(folder / f"{_slug(f'{view.device} {view.dtype} {name}')}.png")
                figure.savefig(files[-1])
        for device in dict.fromkeys(map(device_of, reports)):
            own = [report for report in reports if device_of(report) == device]
            for name, figure in server_figures(list(cases(own, "serve")), device):
                files.append(folder / f"{_slug(f'{device} {name}')}.png")
                figure.savefig(files[-1])
    return files


def _views(reports: Sequence[Report]) -> Iterator[View]:
    """The cases that gemcut was measured in, by device and dtype."""
    for device in dict.fromkeys(map(device_of, reports)):
        own = [report for report in reports if device_of(report) == device]
        kernels, decode = (
            [case for case in cases(own, name) if GEMCUT in case.timed]
            for name in ("kernels", "decode")
        )
        for dtype in dict.fromkeys(case.facts["dtype"] for case in kernels + decode):
            yield View(
                device,
                dtype,
                [case for case in kernels if case.facts["dtype"] == dtype],
                [case for case in decode if case.facts["dtype"] == dtype],
            )


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


def _figures(view: View) -> Iterator[tuple[str, Figure]]:
    """The figures that there are data for, by name."""
    for model, found in by_model(view.kernels).items():
        records = [case.timed[GEMCUT] for case in found]
        title = view.title(f"{model}: every kernel under the measured limits, caches cold")
        if any(record["flops"] > 0 for record in records):
            yield f"roofline {model}", roofline(records, found[0].report["ceilings"], title)
    if view.kernels:
        yield "kernels", _share_of_limit(view)
    attention = [case for case in view.kernels if case.facts["op"] == "attention_prefill"]
    # left out: the last chunk of a prompt; a window without softcap, which no model has
    whole = [
        case
        for case in attention
        if case.facts["variant"] != "chunk"
        and (case.facts["layer"], case.facts["variant"]) != ("local", "no softcap")
    ]
    if whole:
        yield "attention", _attention(view, whole)
    plain = [case for case in view.decode if case.facts.get("quantization") is None]
    single = [case for case in plain if case.facts["batch"] == 1]
    shared = [case for case in single if case.facts.get("read_share") is not None]
    if shared:
        yield "decode", _decode_share(view, shared)
    batched = {
        model: found
        for model, found in by_model(plain).items()
        if len({case.facts["batch"] for case in found}) > 1
    }
    if batched:
        yield "latency", _latency(view, batched)


def _share_of_limit(view: View) -> Figure:
    """Bars by kernel, a panel for each model."""
    models = by_model(view.kernels)
    names = sorted({_kernel(case) for case in view.kernels}, reverse=True)
    figure = Figure(figsize=(WIDTH, 1.5 + 0.25 * len(names)), layout="constrained")
    panels = figure.subplots(1, len(models), sharey=True, squeeze=False)[0]
    for (model, found), axes in zip(models.items(), panels, strict=True):
        for y, name in enumerate(names):
            _draw_share(axes, y, [case for case in found if _kernel(case) == name])
        axes.axvline(1, color=BLACK, linewidth=1)
        axes.set(title=model, ylim=(-0.7, len(names) - 0.3))
        axes.set_xlim(0, max(1.1, axes.get_xlim()[1]))  # a CPU's caches exceed its memory
        axes.set_xlabel("share of the limit")
        axes.grid(axis="y", visible=False)
    labels = [op if op.endswith(phase) else f"{op}, {phase}" for phase, op in names]
    panels[0].set_yticks(range(len(names)), labels)
    _set_title(figure, view.title("How near each kernel comes to the limit that binds it"))
    entries = {
        "gemcut, median of all shapes": Patch(facecolor=BLUE),
        "its range": Line2D([], [], color=BLACK, linewidth=1),
        "fastest peer, median": Line2D([], [], color=ORANGE, marker="D", linestyle="", mec=BLACK),
    }
    _set_legend(figure, entries)
    return figure


def _kernel(case: Case) -> tuple[str, str]:
    return case.facts["phase"], case.facts["op"]


def _draw_share(axes: Axes, y: int, found: Sequence[Case]) -> None:
    if not found:
        return
    own = [case.timed[GEMCUT]["share"] for case in found]
    axes.barh(y, median(own), height=0.72, color=BLUE)
    axes.plot([min(own), max(own)], [y, y], color=BLACK, linewidth=1, path_effects=HALO)
    peers = [_fastest_peer_share(case) for case in found]
    if best := [share for share in peers if share is not None]:
        axes.plot(median(best), y, "D", color=ORANGE, markersize=5, markeredgecolor=BLACK)


def _fastest_peer_share(case: Case) -> float | None:
    records = like_gemcut(case)
    return max(
        (record["share"] for name, record in records.items() if name != GEMCUT), default=None
    )


def _attention(view: View, found: Sequence[Case]) -> Figure:
    """Lines by length, a row of panels for each model, a panel for each kind of layer."""
    models: dict[str, dict[str, list[Case]]] = {}
    for model, own in by_model(found).items():
        for case in sorted(own, key=lambda case: (case.facts["layer"], case.facts["variant"])):
            softcap = "softcap" if case.facts["softcap"] else ""
            words = model, case.facts["layer"], case.facts["variant"] or softcap
            title = ", ".join(word for word in words if word)
            models.setdefault(model, {}).setdefault(title, []).append(case)
    figure, panels = _panels([len(kinds) for kinds in models.values()], "TFLOP/s")
    series = [item for kinds in models.values() for item in kinds.items()]
    for axes, (title, own) in zip(panels, series, strict=True):
        _draw_lines(axes, own, "tokens", _tflops)
        limit = own[0].report["ceilings"]["matmul_tflops"]
        axes.axhline(limit, color=BLACK, linewidth=1, linestyle="--")
        axes.set(title=title, ylim=(0, None))
    _set_title(figure, view.title("Prefill attention by length; dashed: the limit of products"))
    _set_legend(figure, _line_entries(found))
    return figure


def _tflops(record: Record) -> Spread:
    us = spread_of(record, "cold_us")
    return Spread(*(record["flops"] / x / 1e6 for x in (us.median, us.high, us.low)))


def _decode_share(view: View, found: Sequence[Case]) -> Figure:
    """Bars by model, one for each contestant, at batch 1."""
    chosen = {model: near_1k(own) for model, own in by_model(found).items()}
    bars = {
        (model, name): record
        for model, (case, *_) in chosen.items()
        for name, record in like_gemcut(case).items()
        if record.get("read_share") is not None
    }
    names = _in_order(name for _, name in bars)
    width = 0.86 / len(names)
    figure = Figure(figsize=(WIDTH, 4.6), layout="constrained")
    axes = figure.subplots()
    for i, name in enumerate(names):
        colour, _, hatch = STYLES.get(name, OTHER)
        places = [x for x, model in enumerate(chosen) if (model, name) in bars]
        records = [bars[model, name] for model in chosen if (model, name) in bars]
        drawn = axes.bar(
            [x + (i - (len(names) - 1) / 2) * width for x in places],
            [record["read_share"] for record in records],
            width=0.92 * width,
            color=colour,
            hatch=hatch,
            edgecolor="white",
            linewidth=0,
            label=name,
        )
        rates = [figures(spread_of(record, "tokens_per_second").median) for record in records]
        narrow = len(names) * len(chosen) > 24
        axes.bar_label(drawn, rates, padding=2, fontsize=7, rotation=90 if narrow else 0)
    axes.axhline(1, color=BLACK, linewidth=1)
    axes.set_ylabel("share of measured read bandwidth")
    axes.set_ylim(0, max(1.1, 1.1 * max(record["read_share"] for record in bars.values())))
    labels = [f"{model}\ncontext {case.facts['context']}" for model, (case, *_) in chosen.items()]
    axes.set_xticks(range(len(chosen)), labels)
    axes.grid(axis="x", visible=False)
    title = "Decoding at batch 1: share of read bandwidth; above the bars, tokens/s"
    _set_title(figure, view.title(title))
    figure.legend(loc="outside lower center", ncols=len(names))
    return figure


def _latency(view: View, models: dict[str, list[Case]]) -> Figure:
    """Lines by batch, a panel for each model."""
    rows = -(-len(models) // COLUMNS)
    counts = [len(list(models)[i::rows]) for i in range(rows)]
    figure, panels = _panels(counts, "milliseconds")
    drawn = []
    for axes, (model, found) in zip(panels, models.items(), strict=True):
        own = near_1k(found)
        drawn += own
        _draw_lines(axes, own, "batch", lambda record: spread_of(record, "between_tokens_ms"))
        records = [record for case in own for record in like_gemcut(case).values()]
        medians = [record["between_tokens_ms"]["median"] for record in records]
        axes.set(title=f"{model}, context {own[0].facts['context']}", yscale="log")
        axes.set_ylim(min(medians) / 2, 2 * max(medians))  # a tick or two, however flat the lines
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
    _set_title(figure, view.title("Time between two tokens of a row, by batch"))
    _set_legend(figure, _line_entries(drawn))
    return figure


def _draw_lines(
    axes: Axes, found: Sequence[Case], fact: str, measure: Callable[[Record], Spread]
) -> None:
    """One line with ranges for each contestant, over a fact of the cases."""
    for name, (colour, mark, _) in reversed(_looks(found).items()):
        # a case of two reports is one point
        points = {c.facts[fact]: measure(c.timed[name]) for c in found if name in c.timed}
        x = sorted(points)
        y = [points[at].median for at in x]
        low = [points[at].median - points[at].low for at in x]
        high = [points[at].high - points[at].median for at in x]
        width = 2.4 if name == GEMCUT else 1.2
        axes.errorbar(x, y, (low, high), color=colour, marker=mark, linewidth=width, capsize=2)
    places = sorted({case.facts[fact] for case in found})
    axes.set_xscale("log", base=2)
    axes.set_xticks(places, [str(x) for x in places])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(fact)


def _in_order(names: Iterable[str]) -> list[str]:
    """Contestants, each once, as STYLES has them, then the others."""
    known = list(STYLES)
    return sorted(set(names), key=lambda x: (known.index(x) if x in known else len(known), x))


def _looks(found: Sequence[Case]) -> dict[str, tuple[str, str, str]]:
    """Colour, mark and hatch of each contestant in these cases."""
    names = _in_order(name for case in found for name in like_gemcut(case))
    return {name: STYLES.get(name, OTHER) for name in names}


def _line_entries(found: Sequence[Case]) -> dict[str, Artist]:
    looks = _looks(found)
    return {name: Line2D([], [], color=c, marker=mark) for name, (c, mark, _) in looks.items()}


def _panels(counts: Sequence[int], y: str) -> tuple[Figure, list[Axes]]:
    """A figure with so many panels in each row, and a word for what they show."""
    figure = Figure(figsize=(WIDTH, 1.3 + 2.6 * len(counts)), layout="constrained")
    grid = figure.subplots(len(counts), max(counts), squeeze=False)
    for count, row in zip(counts, grid, strict=True):
        for unused in row[count:]:
            unused.remove()
    figure.supylabel(y, fontsize=9)
    return figure, [axes for count, row in zip(counts, grid, strict=True) for axes in row[:count]]


def _set_title(figure: Figure, title: str) -> None:
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)


def _set_legend(figure: Figure, entries: dict[str, Artist]) -> None:
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=len(entries))
