"""A kernel that only reads: its bandwidth is the most that any kernel can reach.

A persistent grid walks over the tensor, each program with a fixed stride, and keeps one running
maximum for each element of its tile; at the end a program stores a single number, so that the
compiler cannot drop the loads.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def read_kernel(
    x_ptr,  # [N] int32
    y_ptr,  # [number of programs] int32
    N,
    NUM_PROGRAMS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    pid = tl.program_id(0)
    offs_n = tl.arange(0, BLOCK_N)
    best = tl.full([BLOCK_N], -(2**31), tl.int32)
    for start in tl.range(pid.to(tl.int64) * BLOCK_N, N, NUM_PROGRAMS * BLOCK_N, num_stages=4):
        best = tl.maximum(best, tl.load(x_ptr + start + offs_n))
    tl.store(y_ptr + pid, tl.max(best, axis=0))


def read(x: Tensor, programs_per_multiprocessor: int, block_n: int) -> Tensor:
    """The maximum of what each program read: x [N] int32, N a multiple of block_n -> [programs]."""
    multiprocessors = torch.cuda.get_device_properties(x.device).multi_processor_count
    programs = programs_per_multiprocessor * multiprocessors
    y = torch.empty(programs, dtype=torch.int32, device=x.device)
    read_kernel[(programs,)](
        x_ptr=x, y_ptr=y, N=x.numel(), NUM_PROGRAMS=programs, BLOCK_N=block_n, num_warps=8
    )
    return y
