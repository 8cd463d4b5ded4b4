"""The best predicted tiles of the large products, checked and timed by tools/tune.py.

tune.py keeps tune-ARCH.json and tiles-ARCH.json in the folder of the visit after each shape, so
that what it has decided outlives it; here its records become lines of the table.
"""

import json
import signal
import subprocess
import sys
from collections import defaultdict

from gemcut.bench.measure.report_file import OK, Record
from gemcut.tools.visit.block import Visit

KERNELS = ("linear_geglu", "skinny_linear", "linear_rope_and_store", "lm_head")
OPTIONS = ("--models", "gemma-2-2b", "gemma-2-9b", "--kernels", *KERNELS, "--minutes", "0.85")
CPU_OPTIONS = ("--models", "gemma-3-270m", "--kernels", "linear_geglu", "--minutes", "0.25")
CPU_OPTIONS += ("--compile-only", "--arch", "sm_90", "--jobs", "2")


def run(visit: Visit) -> None:
    """Keep a record for each kernel and shape tuned, and one for the command where it failed."""
    command = [sys.executable, "-P", "-m", "gemcut.tools.tune", "--out", str(visit.out)]
    try:
        done = subprocess.run([*command, *(OPTIONS if visit.on_gpu else CPU_OPTIONS)])
        if done.returncode:
            told = f"exit code {done.returncode}, see logs/tiles.log"
            if done.returncode < 0:
                told = f"killed by {signal.Signals(-done.returncode).name}"
            visit.add("tune", "failed", detail=told)
    finally:  # an interrupt ends both, and what was decided is kept
        for file in visit.out.glob("tune-*.json"):
            add_records(visit, json.loads(file.read_text())["rows"])


def add_records(visit: Visit, records: list[Record]) -> None:
    """Keep a record for each subject: the winner, and the fastest of those that were timed."""
    subjects: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        subjects[record["case"]].append(record)
    for case, candidates in subjects.items():
        timed = [record for record in candidates if record["status"] == OK and record["tile"]]
        told = f"none of {len(candidates) - 1} candidates was timed"
        if timed:
            best = min(timed, key=lambda record: record["ratio"]["median"])
            won = next(
                (record["contestant"] for record in candidates if record["won"]), "undecided"
            )
            outcome = "it wins" if best["won"] else f"{won} stays"
            told = (
                f"best of {len(timed)} {best['contestant']} x {best['ratio']['median']:.3f} "
                f"({best['ratio']['low']:.3f} - {best['ratio']['high']:.3f}); {outcome}"
            )
        visit.add(case, line=f"{case}: {told}")
        for record in candidates:
            if record["status"] in ("wrong", "failed"):
                visit.add(
                    f"{case} {record['contestant']}", record["status"], detail=record["detail"]
                )
