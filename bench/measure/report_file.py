"""The report of a benchmark run: one JSON object, printed as the last line and kept in a file.

    benchmark       "kernels" | "decode" | "prefill" | "serve-sim" | "serve" | "host-work"
    arguments       what was asked for
    machine         where it ran (machine.py)
    ceilings        read_gbps, copy_gbps, matmul_tflops, measured in the same run (ceilings.py)
    interrupted     true until the run is complete
    rows            the records: one for each case and contestant

A record has `case` and `contestant`, which name it; `version` and `settings` of the contestant;
`status` ("ok", "wrong", "failed" or "no memory") with a `detail`; facts of the case; and metrics.
A metric is {"median", "low", "high", "all"}, `all` round by round, in which every contestant of a
case took its turn; its name ends in its unit: cold_us, first_token_ms, tokens_per_second, ...

The file is rewritten after each record, so an interrupted run keeps what it has measured.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from gemcut.bench.measure.machine import describe_machine
from gemcut.bench.measure.timing import Spread

SCHEMA = 1
OK, WRONG, FAILED, NO_MEMORY = "ok", "wrong", "failed", "no memory"
INTERRUPTED = 130  # exit code: 128 + SIGINT, as a shell has it
REQUIRED = ("benchmark", "arguments", "machine", "ceilings", "interrupted", "rows")
Record = dict[str, Any]


def metric(values: Sequence[float]) -> dict[str, Any]:
    """A measured quantity, one value for each round, as a record holds it."""
    return {**asdict(Spread.of(values)), "all": list(values)}


class Results:
    """The report of one run, in memory and in `file` where there is one."""

    def __init__(
        self,
        benchmark: str,
        arguments: dict[str, Any],
        device: torch.device,
        file: Path | None = None,
    ) -> None:
        """ValueError where the file's folder does not exist."""
        if file is not None and not file.parent.is_dir():
            raise ValueError(f"--json {str(file)!r}: there is no such folder")
        self.file = file
        self.report: dict[str, Any] = {
            "schema": SCHEMA,
            "benchmark": benchmark,
            "arguments": arguments,
            "machine": describe_machine(device),
            "ceilings": {},
            "interrupted": True,
            "rows": [],
        }

    @property
    def records(self) -> list[Record]:
        return self.report["rows"]

    def add(self, *records: Record) -> None:
        """Keep records, in the file too."""
        self.records.extend(records)
        self._write()

    def set_ceilings(self, ceilings: dict[str, float]) -> None:
        self.report["ceilings"] = ceilings
        self._write()

    def finish(self) -> None:
        """Mark the run complete."""
        self.report["interrupted"] = False
        self._write()

    def print_line(self) -> None:
        """The report as one line."""
        print(json.dumps(self.report), flush=True)

    def _write(self) -> None:
        if self.file is None:
            return
        # replaced as a whole: a kill during the write leaves the records before it
        new = self.file.with_name(f"{self.file.name}.part")
        new.write_text(json.dumps(self.report) + "\n")
        new.replace(self.file)


def load_results(file: Path) -> dict[str, Any]:
    """A report from a file, or the last line of a log; ValueError says what it lacks."""
    try:
        lines = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: {getattr(error, 'strerror', None) or 'is no text'}") from None
    lines = [line for line in lines if line.strip()]
    try:
        report = json.loads(lines[-1]) if lines else None
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: its last line is no JSON ({error})") from None
    if not isinstance(report, dict) or report.get("schema") != SCHEMA:
        raise ValueError(f"{file} is no report of gemcut-bench (schema {SCHEMA})")
    if missing := [name for name in REQUIRED if name not in report]:
        raise ValueError(f"{file} lacks {', '.join(missing)}")
    return report


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print columns as wide as their cells, the first aligned left and the others right."""
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]
    for line in [header, *rows]:
        cells = [line[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        print("  ".join(cells).rstrip())
