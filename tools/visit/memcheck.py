"""compute-sanitizer's memcheck over one attention, argmax and sample call, launched eagerly.

torch's own pool would hide reads beyond a tensor, so it is switched off; nothing is captured, since
a capture needs the pool.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from gemcut import kernels
from gemcut.bench.ops.cases import Case, Grid
from gemcut.bench.ops.decode_cases import decode_cases
from gemcut.engine.execution.cache import PREFILL_CHUNK
from gemcut.tools.launches import Launch, recorded
from gemcut.tools.visit.block import Visit
from gemcut.tools.visit.ops import shapes_of

TOOL = "compute-sanitizer"
BESIDE_NVCC = Path("/usr/local/cuda/bin") / TOOL
OPS = ("attention_decode", "lm_head_argmax", "sample")
MODEL, ROWS, CONTEXT = "demo", 3, 300
ERRORS = 7  # its exit code where it found any


def run(visit: Visit) -> None:
    """Keep a record: no error, or the first that was found."""
    tool = shutil.which(TOOL) or (str(BESIDE_NVCC) if BESIDE_NVCC.exists() else None)
    if not visit.on_gpu or tool is None:
        visit.skip("memcheck", f"{TOOL} is not installed" if visit.on_gpu else "a CPU has none")
        return
    command = [tool, "--tool", "memcheck", "--error-exitcode", str(ERRORS)]
    command += [sys.executable, "-P", "-m", "gemcut.tools.visit.memcheck"]
    done = subprocess.run(
        command,
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    print(done.stdout, flush=True)
    told = next((x for x in done.stdout.splitlines() if "Invalid" in x or "Error" in x), "")
    told = told or f"exit code {done.returncode}, see logs/memcheck.log"
    line = f"memcheck finds no error in {', '.join(OPS)}"
    visit.check("memcheck", done.returncode == 0, told, line=line)


def find_cases(device: torch.device) -> list[Case]:
    """The calls that are watched."""
    grid = Grid((ROWS,), (CONTEXT,), (), 1, PREFILL_CHUNK)
    return [case for case in decode_cases(shapes_of(MODEL, device), grid) if case.op in OPS]


def record(arch: str) -> set[Launch]:
    """What they launch: recorded, not made."""
    with recorded(arch) as found:
        for case in find_cases(torch.device("cuda", 0)):
            getattr(kernels, case.op)(**case.make())
    return found


def main() -> None:
    """Make the calls."""
    for case in find_cases(torch.device("cuda", torch.cuda.current_device())):
        getattr(kernels, case.op)(**case.make())
        torch.cuda.synchronize()
        print(f"{case.name} ran", flush=True)


if __name__ == "__main__":
    main()
