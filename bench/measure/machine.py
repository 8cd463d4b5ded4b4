"""The machine that a benchmark ran on: device, clocks, driver, CPU, versions and commit."""

import os
import platform
import re
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

CHECKOUT = Path(__file__).parents[2]
PACKAGES = ("gemcut", "torch", "triton", "transformers", "numpy")
NVIDIA_SMI = {
    "driver": "driver_version",
    "sm_mhz": "clocks.sm",
    "memory_mhz": "clocks.mem",
    "max_sm_mhz": "clocks.max.sm",
    "power_limit_w": "power.limit",
    "temperature_c": "temperature.gpu",
}


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Device, clocks, driver, CPU, threads, versions and commit."""
    machine: dict[str, Any] = {
        "device": device_name(device),
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **installed_versions(PACKAGES)},
        "commit": git_commit(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine |= {
            "capability": f"sm_{properties.major}{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "cuda": torch.version.cuda,
            **_nvidia_smi(device),
        }
    return machine


def device_name(device: torch.device) -> str:
    """The driver's name for a GPU; "cpu" otherwise."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def installed_versions(packages: Sequence[str]) -> dict[str, str]:
    """The version of each package that is installed; gemcut always has one."""
    found = {}
    for package in packages:
        try:
            found[package] = gemcut_version() if package == "gemcut" else version(package)
        except PackageNotFoundError:
            continue
    return found


def gemcut_version() -> str:
    """The version of the installed package, or of a checkout that is not installed."""
    try:
        return version("gemcut")
    except PackageNotFoundError:
        pass
    try:
        project = (CHECKOUT / "pyproject.toml").read_text()
    except OSError:
        return "unknown"
    found = re.search(r'^version = "(.+)"$', project, re.MULTILINE)
    return found[1] if found else "unknown"


def cpu_model() -> str:
    """The model name of the CPU."""
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
    git = ("git", "-C", str(CHECKOUT))
    commit, changes = _output(*git, "rev-parse", "HEAD"), _output(*git, "status", "--porcelain")
    return f"{commit}+changes" if commit and changes else commit


def _nvidia_smi(device: torch.device) -> dict[str, Any]:
    """Driver, clocks, power limit and temperature now; None where nvidia-smi fails."""
    index = torch.cuda.current_device() if device.index is None else device.index
    uuid = getattr(torch.cuda.get_device_properties(index), "uuid", None)
    line = _output(
        "nvidia-smi",
        f"--id={index if uuid is None else f'GPU-{uuid}'}",
        f"--query-gpu={','.join(NVIDIA_SMI.values())}",
        "--format=csv,noheader,nounits",
    )
    if not line:
        return dict.fromkeys(NVIDIA_SMI)
    return dict(zip(NVIDIA_SMI, (value.strip() for value in line.split(",")), strict=True))


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
