"""The 15 goals for gemcut's speed, and what reports measured of each.

A goal covers a set of cases, and its worst case counts.  Ratios within a case are taken round by
round; those between two cases divide medians, and their range is as wide as both allow.  A goal of
which nothing was measured is "not measured": no other number replaces it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product

from gemcut.bench.measure.report_file import Record
from gemcut.bench.measure.timing import Spread
from gemcut.bench.report.load import GEMCUT, Case, Report, cases, on_gpu, spread_of, times_as_fast

BF16 = "bfloat16"
NO_SOFTCAP = "no softcap"  # the variant of a case that leaves the model's softcap out
LABELS = ("batch", "tokens", "context", "layer", "weight", "quantization", "variant")
UP_TO_3B = ("gemma-3-270m", "vaultgemma-1b", "gemma-3-1b", "gemma-2b", "gemma-2-2b")
UP_TO_9B = ("gemma-7b", "gemma-2-9b")
STRETCH, MUST, NO, NOT_MEASURED = "stretch", "must", "no", "not measured"


@dataclass(frozen=True)
class Measured:
    """A goal's quantity in one case."""

    spread: Spread
    where: str


@dataclass(frozen=True)
class Goal:
    """One line of a goal: what to reach, and how to find it in reports."""

    number: int
    text: str
    must: float
    stretch: float
    measure: Callable[[Sequence[Report]], Iterator[Measured]]
    less_is_better: bool = False
    on_cpu: bool = False


@dataclass(frozen=True)
class Outcome:
    """The outcome of a goal; `measured` is its worst case, of `cases`."""

    goal: Goal
    measured: Measured | None
    cases: int

    @property
    def met(self) -> str:
        if self.measured is None:
            return NOT_MEASURED
        sign = -1 if self.goal.less_is_better else 1
        value = sign * self.measured.spread.median
        if value >= sign * self.goal.stretch:
            return STRETCH
        return MUST if value >= sign * self.goal.must else NO


def outcomes(reports: Sequence[Report]) -> list[Outcome]:
    """The outcome of every goal in these reports, which should be of one GPU, or of CPUs."""
    # a model cut to a few layers is not the model that a goal names
    whole = [report for report in reports if report["arguments"].get("layers") is None]
    found = []
    for goal in GOALS:
        measured = list(goal.measure([r for r in whole if on_gpu(r) != goal.on_cpu]))
        worst = max if goal.less_is_better else min
        value = worst(measured, key=lambda one: one.spread.median, default=None)
        found.append(Outcome(goal, value, len(measured)))
    return found


def label(record: Record) -> str:
    """A case in words, by its facts: gemma-2-9b, batch 1, context 1024, local."""
    words = [str(record.get("model", ""))]
    for name in LABELS:
        if (value := record.get(name)) not in (None, ""):
            words.append(f"{name} {value}" if isinstance(value, int) else str(value))
    return ", ".join(words)


def _decode_share(reports: Sequence[Report], models: Sequence[str]) -> Iterator[Measured]:
    for record in _own(reports, "decode", batch=1, quantization=None, dtype=BF16):
        if record["model"] in models and record["context"] <= 1024 and "read_share" in record:
            yield Measured(_share(record, "read_share"), label(record))


def _decode_against(
    reports: Sequence[Report], peer: str, models: Sequence[str] = (), **facts: object
) -> Iterator[Measured]:
    for case in cases(reports, "decode", batch=1, quantization=None, **facts):
        if not models or case.facts["model"] in models:
            yield from _against(case, peer, "tokens_per_second")


def _first_token_against(reports: Sequence[Report], peer: str, model: str) -> Iterator[Measured]:
    for case in cases(reports, "decode", batch=1, quantization=None, model=model):
        if case.facts["context"] >= 300:
            yield from _against(case, peer, "first_token_ms")


def _batched_share(reports: Sequence[Report]) -> Iterator[Measured]:
    records = _own(reports, "decode", quantization=None, dtype=BF16)
    records = [record for record in records if "read_share" in record]
    for record, single in _pairs(records, records, "model", "context"):
        if (record["batch"], single["batch"]) == (16, 1):
            spreads = _share(record, "read_share"), _share(single, "read_share")
            yield Measured(_over(*spreads), label(record))


def _quantised(reports: Sequence[Report], quantization: str) -> Iterator[Measured]:
    facts = {"model": "gemma-2-9b", "batch": 1}
    records = _own(reports, "decode", quantization=quantization, **facts)
    plain = _own(reports, "decode", quantization=None, dtype=BF16, **facts)
    name = "tokens_per_second"
    for record, other in _pairs(records, plain, "context"):
        yield Measured(_over(spread_of(record, name), spread_of(other, name)), label(record))


PREFILL_4K = {"op": "attention_prefill", "model": "gemma-2-9b", "tokens": 4096, "layer": "global"}


def _prefill_attention(reports: Sequence[Report], variant: str, peer: str) -> Iterator[Measured]:
    for case in cases(reports, "kernels", dtype=BF16, variant=variant, **PREFILL_4K):
        yield from _against(case, peer, "cold_us")


def _softcap_cost(reports: Sequence[Report]) -> Iterator[Measured]:
    capped = _kernels(reports, variant="", **PREFILL_4K)
    plain = _kernels(reports, variant=NO_SOFTCAP, **PREFILL_4K)
    for record, other in _pairs(capped, plain, "batch"):
        ratio = _over(spread_of(record, "cold_us"), spread_of(other, "cold_us"))
        cost = Spread(ratio.median - 1, ratio.low - 1, ratio.high - 1)
        yield Measured(cost, label(record))


def _window(reports: Sequence[Report], op: str, variant: str) -> Iterator[Measured]:
    records = _kernels(reports, op=op, layer="local", variant=variant)
    for record, shorter in _pairs(records, records, "model", "batch"):
        if (record["context"], shorter["context"]) == (8192, 4096):
            ratio = _over(spread_of(record, "cold_us"), spread_of(shorter, "cold_us"))
            # a window of 4096 is not full yet, in a chunk at 4k
            less = shorter["flops"] / record["flops"]
            scaled = Spread(ratio.median * less, ratio.low * less, ratio.high * less)
            yield Measured(scaled, label(record))


def _decode_attention(reports: Sequence[Report]) -> Iterator[Measured]:
    for case in cases(reports, "kernels", op="attention_decode", dtype=BF16):
        if 1024 <= case.facts["context"] <= 8192:
            yield from _against(case, "flashinfer", "cold_us")


def _copy_share(reports: Sequence[Report], op: str) -> Iterator[Measured]:
    for case in cases(reports, "kernels", op=op, variant="large", dtype=BF16):
        copy_gbps = case.report["ceilings"].get("copy_gbps")
        if (record := case.timed.get(GEMCUT)) is not None and copy_gbps:
            least_us = (record["read_bytes"] + record["written_bytes"]) / copy_gbps / 1e3
            us = spread_of(record, "cold_us")
            spread = Spread(least_us / us.median, least_us / us.high, least_us / us.low)
            yield Measured(spread, label(record))


def _against_liger(reports: Sequence[Report], op: str) -> Iterator[Measured]:
    for case in cases(reports, "kernels", op=op, variant="large", dtype=BF16):
        yield from _against(case, "liger", "cold_us")


def _head_products(reports: Sequence[Report]) -> list[Record]:
    found = cases(reports, "kernels", op="lm_head", dtype=BF16)
    return [case.timed["blas"] for case in found if "blas" in case.timed]


def _greedy(reports: Sequence[Report]) -> Iterator[Measured]:
    fused = _kernels(reports, op="lm_head_argmax")
    for record, bare in _pairs(fused, _head_products(reports), "model", "batch"):
        yield Measured(
            _over(spread_of(record, "cold_us"), spread_of(bare, "cold_us")), label(record)
        )


def _sampled(reports: Sequence[Report]) -> Iterator[Measured]:
    heads = _kernels(reports, op="lm_head")
    draws = _kernels(reports, op="sample", variant="top-k top-p")
    for head, bare in _pairs(heads, _head_products(reports), "model", "batch"):
        for record, _ in _pairs(draws, [bare], "model", "batch"):
            a, b = spread_of(head, "cold_us"), spread_of(record, "cold_us")
            both = Spread(a.median + b.median, a.low + b.low, a.high + b.high)
            yield Measured(_over(both, spread_of(bare, "cold_us")), label(record))


def _prefill_share(reports: Sequence[Report]) -> Iterator[Measured]:
    for record in _own(reports, "prefill", model="gemma-2-9b", tokens=4096):
        if "share" in record:
            yield Measured(_share(record, "share"), label(record))


def _after_warmup(reports: Sequence[Report]) -> Iterator[Measured]:
    for report in reports:
        if report["benchmark"] == "decode" and (counts := report.get("after_warmup")) is not None:
            count = float(counts["compilations"] + counts["captures"])
            yield Measured(Spread(count, count, count), "decode")


def _own(reports: Sequence[Report], benchmark: str, **facts: object) -> list[Record]:
    """Gemcut's measured records with these facts."""
    found = cases(reports, benchmark, **facts)
    return [case.timed[GEMCUT] for case in found if GEMCUT in case.timed]


def _kernels(reports: Sequence[Report], **facts: object) -> list[Record]:
    return _own(reports, "kernels", dtype=BF16, **facts)


def _pairs(
    records: Sequence[Record], others: Sequence[Record], *same: str
) -> Iterator[tuple[Record, Record]]:
    for record, other in product(records, others):
        if all(record.get(name) == other.get(name) for name in same):
            yield record, other


def _against(case: Case, peer: str, name: str) -> Iterator[Measured]:
    if GEMCUT in case.timed and peer in case.timed:
        ratios = times_as_fast(case.timed[GEMCUT], case.timed[peer], name)
        yield Measured(Spread.of(ratios), label(case.facts))


def _share(record: Record, name: str) -> Spread:
    """A share with the range of the tokens a second that it is in proportion to."""
    share, rate = record[name], spread_of(record, "tokens_per_second")
    return Spread(share, share * rate.low / rate.median, share * rate.high / rate.median)


def _over(a: Spread, b: Spread) -> Spread:
    return Spread(a.median / b.median, a.low / b.high, a.high / b.low)


def _share_goal(models: Sequence[str], text: str, must: float, stretch: float) -> Goal:
    text = f"batch-1 bf16 decode up to 1k, share of read bandwidth: {text}"
    return Goal(1, text, must, stretch, partial(_decode_share, models=models))


def _compiled_goal(models: Sequence[str], text: str, must: float, stretch: float) -> Goal:
    measure = partial(_decode_against, peer="transformers-compiled", models=models, dtype=BF16)
    text = f"batch-1 decode over transformers with static cache and torch.compile: {text}"
    return Goal(2, text, must, stretch, measure)


GOALS = (
    _share_goal(("vaultgemma-1b", "gemma-3-1b"), "1B", 0.70, 0.82),
    _share_goal(("gemma-2b", "gemma-2-2b"), "2B", 0.80, 0.89),
    _share_goal(UP_TO_9B, "7B and 9B", 0.87, 0.91),
    _share_goal(("gemma-2-27b",), "27B", 0.90, 0.92),
    _compiled_goal(UP_TO_3B, "up to 3B", 1.3, 1.6),
    _compiled_goal(UP_TO_9B, "7B and 9B", 1.1, 1.25),
    _compiled_goal(("gemma-2-27b",), "27B", 1.03, 1.08),
    Goal(
        3,
        "batch-1 decode over plain transformers `generate`",
        4,
        6,
        partial(_decode_against, peer="transformers", dtype=BF16),
    ),
    Goal(4, "batch-16 share over batch-1 share, KV bytes counted", 0.90, 0.95, _batched_share),
    Goal(5, "int8 over own bf16, 9B", 1.7, 1.85, partial(_quantised, quantization="int8")),
    Goal(5, "int4 over own bf16, 9B", 2.5, 3.0, partial(_quantised, quantization="int4")),
    Goal(
        6,
        "attention prefill, head_dim 256, 4k, over torch SDPA",
        1.3,
        1.8,
        partial(_prefill_attention, variant=NO_SOFTCAP, peer="sdpa"),
    ),
    Goal(
        6,
        "attention prefill, head_dim 256, 4k, over FlexAttention with softcap",
        1.3,
        1.6,
        partial(_prefill_attention, variant="", peer="flex"),
    ),
    Goal(7, "cost of softcap in it, as a share", 0.10, 0.05, _softcap_cost, less_is_better=True),
    Goal(
        8,
        "window layer at 8k over at 4k, for each operation: a chunk of prefill",
        1.05,
        1.0,
        partial(_window, op="attention_prefill", variant="chunk"),
        less_is_better=True,
    ),
    Goal(
        8,
        "window layer at 8k over at 4k, for each operation: decode",
        1.05,
        1.0,
        partial(_window, op="attention_decode", variant=""),
        less_is_better=True,
    ),
    Goal(9, "decode attention over FlashInfer, 1k to 8k", 1.0, 1.3, _decode_attention),
    *(
        goal
        for op in ("rmsnorm", "geglu")
        for goal in (
            Goal(
                10,
                f"{op} at 64 MB and more, share of copy bandwidth",
                0.92,
                0.95,
                partial(_copy_share, op=op),
            ),
            Goal(
                10,
                f"{op} at 64 MB and more, over Liger",
                1.0,
                1.1,
                partial(_against_liger, op=op),
            ),
        )
    ),
    Goal(11, "head and greedy choice over the bare product", 1.03, 1.0, _greedy, True),
    Goal(11, "head, top-k and top-p over the bare product", 1.10, 1.05, _sampled, True),
    Goal(12, "9B prefill at 4k, share of cuBLAS peak", 0.55, 0.62, _prefill_share),
    Goal(13, "compilations and captures after warm-up", 0, 0, _after_warmup, True),
    Goal(
        14,
        "on a CPU, demo model, batch 1, over transformers `generate`",
        2.5,
        4,
        partial(_decode_against, peer="transformers", models=("demo",)),
        on_cpu=True,
    ),
    Goal(
        15,
        "on a CPU, Gemma 3 270M, batch 1, over transformers `generate`",
        1.3,
        1.6,
        partial(_decode_against, peer="transformers", models=("gemma-3-270m",)),
        on_cpu=True,
    ),
    Goal(
        15,
        "on a CPU, Gemma 3 270M, first token of 300 and more, over transformers `generate`",
        1.1,
        1.3,
        partial(_first_token_against, peer="transformers", model="gemma-3-270m"),
        on_cpu=True,
    ),
)
