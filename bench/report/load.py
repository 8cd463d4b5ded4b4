"""Reports read from files: records checked, by case, and compared round by round.

measure/report_file.py says what a report is.  The contestants of a case took turns in the same
rounds, so what disturbs the machine cancels in ratios taken round by round, and only there.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemcut.bench.measure.report_file import OK, Record, load_results
from gemcut.bench.measure.timing import Spread
from gemcut.engine.config.model_config import PUBLISHED

Report = dict[str, Any]
GEMCUT = "gemcut"
QUANTIZATIONS = ("int8", "int4", "fp8")
CPU = "cpu"  # the device of a report without a GPU
CEILINGS = ("read_gbps", "copy_gbps", "matmul_tflops")
NAMES = ("case", "contestant", "status")
LESS_IS_BETTER = ("_us", "_ms", "_seconds", "_bytes")
MORE_IS_BETTER = ("_per_second",)


@dataclass(frozen=True)
class Case:
    """The records of one case in one report: its contestants took turns in the same rounds."""

    report: Report
    name: str
    records: dict[str, Record]  # by contestant, whatever their status

    @property
    def timed(self) -> dict[str, Record]:
        """The records that were measured, by contestant."""
        return {name: record for name, record in self.records.items() if record["status"] == OK}

    @property
    def facts(self) -> Record:
        """A record to read the case's own facts from, gemcut's where it takes part."""
        return self.records.get(GEMCUT) or next(iter(self.records.values()))


def read_report(file: Path) -> Report:
    """The report in a file, its records checked; ValueError says what is wrong with them."""
    report = load_results(file)
    for name, kind in (("machine", dict), ("ceilings", dict), ("arguments", dict), ("rows", list)):
        if not isinstance(report[name], kind):
            raise ValueError(f"{file}: {name} is no {kind.__name__}")
    if not isinstance(report["machine"].get("device"), str):
        raise ValueError(f"{file}: machine does not name its device")
    missing = [name for name in CEILINGS if not report["ceilings"].get(name)]
    if missing and report["benchmark"] == "kernels" and report["rows"]:
        raise ValueError(f"{file}: ceilings lack {', '.join(missing)}")
    seen = set()
    for i, record in enumerate(report["rows"]):
        if not isinstance(record, dict) or not all(
            isinstance(record.get(name), str) for name in NAMES
        ):
            raise ValueError(f"{file}: row {i} lacks one of {', '.join(NAMES)}")
        if (record["case"], record["contestant"]) in seen:
            raise ValueError(f"{file}: {record['contestant']} in {record['case']} has two rows")
        seen.add((record["case"], record["contestant"]))
        for name, value in record.items():
            if direction(name) and isinstance(value, dict) and not _is_metric(value):
                raise ValueError(f"{file}: {name} of row {i} is no metric")
    return report


def _is_metric(value: dict[str, Any]) -> bool:
    rounds = value.get("all")
    if not isinstance(rounds, list) or not rounds:
        return False
    numbers = [*rounds, *(value.get(name) for name in ("median", "low", "high"))]
    return all(isinstance(x, int | float) and math.isfinite(x) for x in numbers)


def direction(name: str) -> int:
    """Of a quantity by its name: 1 where more is better, -1 where less is, 0 of anything else."""
    return int(name.endswith(MORE_IS_BETTER)) - int(name.endswith(LESS_IS_BETTER))


def metrics(record: Record) -> list[str]:
    """The names of a record's metrics."""
    return [name for name, value in record.items() if direction(name) and isinstance(value, dict)]


def device_of(report: Report) -> str:
    """What the report was measured on: a GPU, or a CPU by its model."""
    machine = report["machine"]
    return machine["device"] if machine["device"] != CPU else str(machine.get("cpu", CPU))


def on_gpu(report: Report) -> bool:
    return report["machine"]["device"] != CPU


def cases(reports: Sequence[Report], benchmark: str, **facts: Any) -> Iterator[Case]:
    """The cases of one benchmark whose facts are these, in the order of the reports."""
    for report in reports:
        if report["benchmark"] != benchmark:
            continue
        by_name: dict[str, dict[str, Record]] = {}
        for record in report["rows"]:
            by_name.setdefault(record["case"], {})[record["contestant"]] = record
        for name, records in by_name.items():
            case = Case(report, name, records)
            if all(case.facts.get(key) == value for key, value in facts.items()):
                yield case


def by_model(found: Iterable[Case]) -> dict[str, list[Case]]:
    """Cases by model, the small models first."""
    models: dict[str, list[Case]] = {}
    for case in found:
        models.setdefault(case.facts["model"], []).append(case)

    def parameters(model: str) -> int:
        return PUBLISHED[model].num_parameters() if model in PUBLISHED else 0

    return {model: models[model] for model in sorted(models, key=parameters)}


def near_1k(found: Sequence[Case]) -> list[Case]:
    """The cases of one context, as near to 1024 as there is: goals are set there."""
    context = min((case.facts["context"] for case in found), key=lambda n: abs(n - 1024))
    return [case for case in found if case.facts["context"] == context]


def like_gemcut(case: Case) -> dict[str, Record]:
    """The timed records whose weights are of gemcut's kind: others read other numbers of bytes."""
    own = _quantization(case.facts)
    return {name: record for name, record in case.timed.items() if _quantization(record) == own}


def _quantization(record: Record) -> str | None:
    """As the record says, or its contestant's name."""
    named = (kind for kind in QUANTIZATIONS if record["contestant"].endswith(f"-{kind}"))
    return record.get("quantization") or next(named, None)


def times_as_fast(record: Record, other: Record, name: str) -> list[float]:
    """How many times as fast `record` is as `other`, round by round, by one of their metrics."""
    # an interrupted round may leave one of them a value short
    rounds = zip(record[name]["all"], other[name]["all"], strict=False)
    return [(a / b) ** direction(name) for a, b in rounds]


def spread_of(record: Record, name: str) -> Spread:
    """A metric without its rounds."""
    return Spread(record[name]["median"], record[name]["low"], record[name]["high"])


def figures(value: float, digits: int = 3) -> str:
    """A number to so many significant digits, never with an exponent."""
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:.{decimals}f}"


def describe(spread: Spread) -> str:
    """A spread as tables show it: median (range)."""
    return f"{figures(spread.median)} ({figures(spread.low)} - {figures(spread.high)})"
