"""What a benchmark prints: where it ran, and its last line, one JSON object."""

import json
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch

CHECKOUT = Path(__file__).parents[1]


def describe_machine(device: torch.device) -> dict[str, object]:
    """Device, CPU, threads, versions and commit: what a number means nothing without."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "gemcut": version("gemcut"),
        },
        "commit": git_commit(),
    }


def cpu_model() -> str:
    """The CPU as it calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def git_commit() -> str | None:
    """The checkout's commit, with "+changes" where files differ from it; None for a wheel."""
    if not (CHECKOUT / ".git").exists():
        return None
    commit, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain")
    return f"{commit}+changes" if commit and changes else commit


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(CHECKOUT), *arguments], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def print_table(header: list[str], rows: list[list[str]]) -> None:
    """Columns as wide as they must be: the first to the left, the others to the right."""
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]
    for line in [header, *rows]:
        cells = [line[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        print("  ".join(cells).rstrip())


def print_json(report: dict[str, object], file: Path | None) -> None:
    """The report as the last line, and in `file` where there is one."""
    line = json.dumps(report)
    if file is not None:
        file.write_text(line + "\n")
    print(line, flush=True)
