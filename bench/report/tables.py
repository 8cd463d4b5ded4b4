"""Markdown tables of what reports measured: goals, kernels, decoding, prefill, serving, failures.

A number has its range over the rounds beside it.  "over torch" is how many times as fast gemcut is
as torch, round by round.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

from gemcut.bench.measure.report_file import OK, Record
from gemcut.bench.measure.timing import Spread
from gemcut.bench.report.goals import NO_SOFTCAP, outcomes
from gemcut.bench.report.load import (
    GEMCUT,
    Case,
    Report,
    by_model,
    cases,
    describe,
    figures,
    like_gemcut,
    near_1k,
    on_gpu,
    spread_of,
    times_as_fast,
)

Cells = Sequence[str]
# of the README: what a decode step and a prefill spend their time in, and the row kernels
FEW_KERNELS = (
    "linear_rope_and_store_",
    "attention_decode",
    "linear_geglu",
    "skinny_linear",
    "lm_head_argmax",
    "attention_prefill",
    "rmsnorm",
    "geglu",
)


def markdown(header: Cells, rows: Iterable[Cells]) -> list[str]:
    """The lines of a table, and an empty one after it."""

    def line(cells: Cells) -> str:
        inert = (" ".join(cell.split()).replace("|", "\\|") for cell in cells)
        return f"| {' | '.join(inert)} |"

    return [line(header), f"|{'---|' * len(header)}", *map(line, rows), ""]


def goals_table(reports: Sequence[Report]) -> list[str]:
    """Every goal: must, stretch, what was measured, and where it was worst."""
    rows = []
    for outcome in outcomes(reports):
        goal, measured = outcome.goal, outcome.measured
        cells = [str(goal.number), goal.text, f"{goal.must:g}", f"{goal.stretch:g}"]
        if measured is None:
            rows.append([*cells, "", "", outcome.met])
            continue
        where = f"{measured.where} (the worst of {outcome.cases})"
        where = measured.where if outcome.cases == 1 else where
        rows.append([*cells, describe(measured.spread), where, outcome.met])
    return markdown(("#", "goal", "must", "stretch", "measured", "where", "met"), rows)


def kernel_tables(reports: Sequence[Report]) -> list[str]:
    """A table for each model and op, with a column for each peer."""
    lines = []
    for model, found in by_model(cases(reports, "kernels")).items():
        for op in sorted({case.facts["op"] for case in found}):
            own = [case for case in found if case.facts["op"] == op]
            peers = _peers(own)
            header = ["case", "cold, us", "warm, us", "rate", "share of the limit"]
            rows = [
                [case.name.removeprefix(f"{op}/{model}/"), *_kernel_cells(case, peers)]
                for case in own
            ]
            lines += [f"#### {model}: {op}", ""]
            lines += markdown([*header, *(f"over {peer}" for peer in peers)], rows)
    return lines


def _kernel_cells(case: Case, peers: Cells) -> list[str]:
    record = case.records.get(GEMCUT)
    if record is None or record["status"] != OK:
        return ["" if record is None else record["status"], "", "", "", *("" for _ in peers)]
    times = [describe(spread_of(record, name)) for name in ("cold_us", "warm_us")]
    return [
        *times,
        _rate(record),
        figures(record["share"], 2),
        *(_over(case, p, "cold_us") for p in peers),
    ]


def _rate(record: Record) -> str:
    """The rate of what binds a kernel."""
    if record["bound"] == "compute":
        tflops = record["tflops"]
        return f"{figures(tflops)} TFLOP/s" if tflops >= 1 else f"{figures(1e3 * tflops)} GFLOP/s"
    return f"{figures(record['gbps'])} GB/s"


def decode_tables(reports: Sequence[Report]) -> list[str]:
    """A table for each model, a row for each contestant of a case."""
    header = ["case", "contestant", "tokens/s", "first token, ms", "between tokens, ms"]
    header += ["share of read bandwidth", "MB a step", "memory, MB", "gemcut over it"]

    def cells(record: Record) -> list[str]:
        names = ("tokens_per_second", "first_token_ms", "between_tokens_ms")
        share = record.get("read_share")
        nbytes = [record.get(name) for name in ("step_bytes", "memory_bytes")]
        return [
            *(describe(spread_of(record, name)) for name in names),
            "" if share is None else figures(share, 2),
            *("" if count is None else figures(count / 1e6) for count in nbytes),
        ]

    return _contestants(reports, "decode", header, cells)


def prefill_tables(reports: Sequence[Report]) -> list[str]:
    """A table for each model, a row for each contestant of a case."""
    header = ["case", "contestant", "tokens/s", "first token, ms", "TFLOP/s"]
    header += ["share of products' limit", "gemcut over it"]

    def cells(record: Record) -> list[str]:
        names = ("tokens_per_second", "first_token_ms")
        times = [describe(spread_of(record, name)) for name in names]
        derived = [record.get(name) for name in ("tflops", "share")]
        return [*times, *("" if value is None else figures(value) for value in derived)]

    return _contestants(reports, "prefill", header, cells)


def _contestants(
    reports: Sequence[Report], benchmark: str, header: Cells, cells: Callable[[Record], list[str]]
) -> list[str]:
    lines = []
    for model, found in by_model(cases(reports, benchmark)).items():
        rows = []
        for case in found:
            for name, record in case.timed.items():
                own = name == GEMCUT or GEMCUT not in case.timed
                ratio = "" if own else _over(case, name, "tokens_per_second")
                rows.append([_case_words(case), name, *cells(record), ratio])
        if rows:
            lines += [f"#### {model}", "", *markdown(header, rows)]
    return lines


def _case_words(case: Case) -> str:
    model, facts = case.facts["model"], case.facts
    words = [f"{name} {facts[name]}" for name in ("batch", "context", "tokens") if name in facts]
    words += [str(facts[name]) for name in ("dtype", "quantization") if facts.get(name)]
    if not on_gpu(case.report):
        words.append(f"threads {case.report['machine'].get('threads')}")
    return ", ".join(words) or case.name.removeprefix(f"{model}/")


def serving_table(reports: Sequence[Report]) -> list[str]:
    """A row for each contestant of a trace: percentiles of both latencies."""
    header = ["model", "requests/s", "requests", "contestant"]
    header += [
        "first token, ms: p50 / p90 / p99",
        "between tokens, ms: p50 / p90 / p99",
        "tokens/s",
    ]
    rows = []
    for case in cases(reports, "serve-sim"):
        for name, record in case.timed.items():
            latencies = [
                " / ".join(figures(record[metric][p]) for p in ("p50", "p90", "p99"))
                for metric in ("first_token_ms", "between_tokens_ms")
            ]
            rate = describe(spread_of(record, "tokens_per_second"))
            trace = [record["model"], figures(record["rate"]), str(record["requests"])]
            rows.append([*trace, name, *latencies, rate])
    return markdown(header, rows) if rows else []


def host_work_table(reports: Sequence[Report]) -> list[str]:
    """A row for each batch and kind of caller: microseconds beside what the engine promises."""
    rows = [
        [
            record["model"],
            str(record["batch"]),
            record["caller"],
            describe(spread_of(record, "step_us")),
            limit,
        ]
        for case in cases(reports, "host-work")
        for record in case.timed.values()
        for limit in ["" if record["limit_us"] is None else figures(record["limit_us"])]
    ]
    header = ("model", "batch", "callers", "host work of a step, us", "promised")
    return markdown(header, rows) if rows else []


def failures_table(reports: Sequence[Report]) -> list[str]:
    """What was not measured, and why."""
    rows = [
        [
            report["benchmark"],
            record["case"],
            record["contestant"],
            record["status"],
            record.get("detail", ""),
        ]
        for report in reports
        for record in report["rows"]
        if record["status"] != OK
    ]
    header = ("benchmark", "case", "contestant", "status", "reason")
    return markdown(header, rows) if rows else []


def decode_summary(reports: Sequence[Report]) -> list[str]:
    """For a README: gemcut's decoding at batch 1 near 1k tokens, beside every peer."""
    found = [
        case
        for by_size in by_model(_measured(reports, "decode", batch=1)).values()
        for case in near_1k(by_size)
    ]
    return _decode_lines(found, ())


def cpu_decode_summary(reports: Sequence[Report]) -> list[str]:
    """For a README: all of gemcut's decoding on CPUs, beside every peer."""
    return _decode_lines(list(_measured(reports, "decode")), ("batch", "threads"))


def _decode_lines(found: Sequence[Case], also: Cells) -> list[str]:
    if not found:
        return []
    peers = [name for name in _peers(found) if any(name in like_gemcut(case) for case in found)]
    header = ["model", "weights", "context", *also, "tokens/s", "share of read bandwidth"]
    rows = []
    for case in found:
        facts = {**case.facts, "threads": case.report["machine"].get("threads")}
        weights = facts.get("quantization") or facts["dtype"]
        cells = [facts["model"], weights, *(str(facts[name]) for name in ("context", *also))]
        share = facts.get("read_share")
        cells += [describe(spread_of(case.timed[GEMCUT], "tokens_per_second"))]
        cells += ["" if share is None else figures(share, 2)]
        other = case.timed.keys() - like_gemcut(case).keys()
        rates = ["" if peer in other else _over(case, peer, "tokens_per_second") for peer in peers]
        rows.append([*cells, *rates])
    return markdown([*header, *(f"over {peer}" for peer in peers)], rows)


def kernels_summary(reports: Sequence[Report]) -> list[str]:
    """For a README: a few kernels of the largest model, each at its largest case at batch 1."""
    models = by_model(_measured(reports, "kernels"))
    if not models:
        return []
    model, found = list(models.items())[-1]
    single = [case for case in found if case.facts.get("batch", 1) == 1]
    as_is = [case for case in single if case.facts.get("variant") != NO_SOFTCAP]
    rows = []
    for op in FEW_KERNELS:
        own = [case for case in as_is if case.facts["op"] == op]
        if not own:
            continue
        # of equal cases, the one that more peers took part in
        case = max(own, key=lambda case: (case.facts["floor_us"], len(case.timed)))
        record = case.timed[GEMCUT]
        cells = [
            op,
            case.name.removeprefix(f"{op}/{model}/"),
            describe(spread_of(record, "cold_us")),
        ]
        rows.append([*cells, _rate(record), figures(record["share"], 2), _over_fastest(case)])
    header = [f"kernel of {model}", "case", "us, cold", "rate", "share of the limit"]
    return markdown([*header, "over the fastest peer"], rows) if rows else []


def _over_fastest(case: Case) -> str:
    peers = {
        name: spread_of(record, "cold_us").median
        for name, record in like_gemcut(case).items()
        if name != GEMCUT
    }
    if not peers:
        return ""
    fastest = min(peers, key=lambda name: peers[name])
    return f"{_over(case, fastest, 'cold_us')}, {fastest}"


def _measured(reports: Sequence[Report], benchmark: str, **facts: object) -> Iterator[Case]:
    return (case for case in cases(reports, benchmark, **facts) if GEMCUT in case.timed)


def _peers(found: Sequence[Case]) -> list[str]:
    names = dict.fromkeys(name for case in found for name in case.records)
    return [name for name in names if name != GEMCUT]


def _over(case: Case, peer: str, metric: str) -> str:
    """How many times as fast gemcut is, or the status of a peer that was not timed."""
    if peer not in case.timed:
        return case.records[peer]["status"] if peer in case.records else ""
    return describe(Spread.of(times_as_fast(case.timed[GEMCUT], case.timed[peer], metric)))
