"""Ceilings of a machine: read and copy bandwidth, and the rate of large products.

They are measured in the same run as the contestants that are held to them.

    read_gbps       of a kernel that only reads, the best of a few
    copy_gbps       of the device's own copy; bytes read and written both count
    matmul_tflops   of a large product in the device's library (cuBLAS), in the run's dtype

`floor_us` is the shortest time that they allow for a given cost.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch

from gemcut.bench.measure.timing import Call, Spread, cache_bytes, prepare_runs, time_runs

if sys.platform == "linux":  # Triton is built for Linux
    from gemcut.bench.measure.read_kernel import read

ROUNDS = 5
GPU_BYTES, GPU_WIDTH = 2 << 30, 8192
CPU_BYTES, CPU_WIDTH = 256 << 20, 1024
READERS = ((2, 8192), (4, 8192), (4, 4096), (8, 4096))  # programs a multiprocessor, elements a tile


@dataclass(frozen=True)
class Cost:
    """The least that an op must read, write and compute."""

    read_bytes: int
    written_bytes: int
    flops: int
    multiplies: bool = False  # matrices: the rate of tensor cores may bind; else memory alone does

    @property
    def nbytes(self) -> int:
        return self.read_bytes + self.written_bytes


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """The ceilings of a device by name; matmul_tflops is that of `dtype`."""
    on_gpu = device.type == "cuda"
    nbytes = GPU_BYTES if on_gpu else max(CPU_BYTES, 4 * cache_bytes(device))
    width = GPU_WIDTH if on_gpu else CPU_WIDTH

    source = torch.randint(2**31 - 1, (nbytes // 4,), dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(width, width, device=device, dtype=dtype) for _ in range(2))
    calls: dict[str, list[Call]] = {
        "copy": [partial(target.copy_, source)],
        "matmul": [partial(torch.mm, a, b)],
        "read by torch": [partial(torch.amax, source, 0)],
    }
    if on_gpu:
        for programs, block_n in READERS:
            calls[f"read {programs} x {block_n}"] = [partial(read, source, programs, block_n)]
    runs = {name: prepare_runs(each, device) for name, each in calls.items()}
    timings = time_runs(runs, ROUNDS)
    us = {name: Spread.of(timing.cold_us).median for name, timing in timings.items()}
    fastest_read = min(us[name] for name in us if name.startswith("read"))
    return {
        "read_gbps": nbytes / fastest_read / 1e3,
        "copy_gbps": 2 * nbytes / us["copy"] / 1e3,
        "matmul_tflops": 2 * width**3 / us["matmul"] / 1e6,
    }


def floor_us(cost: Cost, ceilings: Mapping[str, float]) -> tuple[float, str]:
    """The least microseconds that a cost can take, and what binds it: "memory" or "compute".

    A byte written costs what a copy takes beyond its reading, so that an op that only reads is held
    to the read bandwidth and one that writes as much as it reads to the copy's.
    """
    a_read = 1 / ceilings["read_gbps"]
    a_write = max(0.0, 2 / ceilings["copy_gbps"] - a_read)
    memory = (cost.read_bytes * a_read + cost.written_bytes * a_write) / 1e3
    compute = cost.flops / ceilings["matmul_tflops"] / 1e6 if cost.multiplies else 0.0
    return (compute, "compute") if compute > memory else (memory, "memory")
