"""A weight times a decode step's few rows: the device code and the tile rule of four kernels.

matmul.py, qkv.py, mlp.py and head.py each do something else with the sums.

The weight is the wide operand: a program owns some rows of it, 64 as a warpgroup of Hopper's tensor
cores takes them, and multiplies them with 16 rows of x.  It streams them once, 16 bytes a load,
through a pipeline of asynchronous copies.  Sums are float32.

Batch invariance: the tile depends on the weight's shape and the arch, never on M, for which Triton
must not specialise; missing rows are masked, further rows are further programs.  So all batch sizes
run the same code, and a row's bits do not depend on its company.

Cost: N D weights read once for 16 rows, M D elements of x for each block of rows, from L2; 2 M N D
operations.  At 16 rows that is 16 operations a byte in bf16, where an H200 could do about 200:
bound by memory bandwidth.
"""

from functools import lru_cache

import triton
import triton.language as tl
from torch import Tensor

from gemcut.kernels.checks import check_rows, check_shape, check_tensors, require
from gemcut.kernels.gpu_arch import PROCESSORS, SHARED_MEMORY, arch_of

BLOCK_M = 16  # rows of x in a program: the least that tensor cores take
BLOCK_N = 64  # rows of the weight in a program
# Columns of a step, of 16 bits, and steps in shared memory, by the programs of a processor that it
# is for.  60, 50 and 70 KB a program: at most 75, beside which the next kernel's find room, and at
# least 25 of weight on their way to a processor.  The first was timed on an H200, the others with
# one step less; bench/NOTES.md has what larger ones gain.
PIPELINES = {3: (128, 3), 4: (64, 5), 1: (64, 7)}
# half as much shared memory, or less: 30, 40 and 60 KB
SMALL_PIPELINES = {3: (64, 3), 2: (64, 4), 1: (64, 6)}
SMALL_ARCHS = ("sm_80", "sm_89", "sm_120")
RESERVED = 1024  # bytes of shared memory that each program takes beside its own


@triton.jit
def weight_tile(w_ptr, rows, mask_rows, offs_d, D, IS_EVEN: tl.constexpr):
    """Some rows of a matrix [N, D], columns offs_d -> [BLOCK_ROWS, BLOCK_D]."""
    w_ptrs = w_ptr + rows[:, None] * D + offs_d[None, :]
    if IS_EVEN:
        return tl.load(w_ptrs)
    return tl.load(w_ptrs, mask=mask_rows[:, None] & (offs_d < D)[None, :], other=0.0)


@triton.jit
def product(
    x_ptr, w_ptr, stride_x_m,  # [M, D], [N, D]
    offs_m, mask_m, rows, mask_rows,  # [BLOCK_M] x 2, [BLOCK_ROWS] x 2: tokens, rows of the weight
    D, begin, end,  # columns begin to end - 1; begin is a multiple of BLOCK_D
    IS_EVEN: tl.constexpr,  # D is a multiple of BLOCK_D, and every row exists
    IN_STEPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Some rows of a weight times tokens: [BLOCK_ROWS, BLOCK_M] float32.

    IN_STEPS adds each step's sum to the others' as a whole, rounded to nearest: one long chain of
    sums would err twice as much in float32, and tensor cores cut off what they add up (on an H200
    such chains erred up to 2.2 times what their tests allow).
    """
    acc = tl.zeros([BLOCK_ROWS, BLOCK_M], dtype=tl.float32)
    for start_d in range(begin, end, BLOCK_D):
        acc = add_step(
            acc, x_ptr, w_ptr, stride_x_m, offs_m, mask_m, rows, mask_rows,
            D, start_d, IS_EVEN, IN_STEPS, BLOCK_D,
        )  # fmt: skip
    return acc


@triton.jit
def add_step(
    acc, x_ptr, w_ptr, stride_x_m,  # [BLOCK_ROWS, BLOCK_M], [M, D], [N, D]
    offs_m, mask_m, rows, mask_rows,  # as in product
    D, start_d,
    IS_EVEN: tl.constexpr, IN_STEPS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One step of a product: acc and the sum over columns start_d to start_d + BLOCK_D - 1."""
    offs_d = start_d + tl.arange(0, BLOCK_D)
    mask_x = mask_m[:, None]
    if not IS_EVEN:
        mask_x = mask_x & (offs_d < D)[None, :]
    x_ptrs = x_ptr + offs_m[:, None] * stride_x_m + offs_d[None, :]
    x = tl.load(x_ptrs, mask=mask_x, other=0.0)
    w = weight_tile(w_ptr, rows, mask_rows, offs_d, D, IS_EVEN)
    if IN_STEPS:
        # with 0 for max_num_imprecise_acc the compiler makes one chain of it again
        acc += tl.dot(w, x.T, input_precision="ieee", max_num_imprecise_acc=1)
    else:
        acc = tl.dot(w, x.T, acc, input_precision="ieee")
    return acc


@triton.jit
def halves(acc, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    """Rows 0 to BLOCK_N - 1 and the rest: [2 BLOCK_N, BLOCK_M] -> 2 x [BLOCK_N, BLOCK_M].

    A program that combines two rows of a weight takes both in one product, and splits them here.
    """
    return tl.split(acc.reshape(2, BLOCK_N, BLOCK_M).permute(1, 2, 0))


def pipeline(x: Tensor, blocks: int) -> dict[str, int]:
    """How `blocks` programs stream a weight: columns of a step, steps on their way, warps.

    As many programs share a processor as leave the fewest of them idle while the last ones run, but
    of many waves the last one counts for little.  A program alone on its processor has more steps.
    """
    # a size may be a SymInt under torch.compile, which no cache can hold
    blocks, name = int(blocks), arch_of(x.device)
    return dict(pipelines(x)[_together(name, blocks)])


def pipelines(x: Tensor) -> dict[int, dict[str, int]]:
    """The tiles to choose from, by the programs of a processor that they are for."""
    name = arch_of(x.device)
    if name == "interpreter":
        return {1: {"BLOCK_D": 256, "num_warps": 4, "num_stages": 1}}
    found = SMALL_PIPELINES if name in SMALL_ARCHS else PIPELINES
    return {
        together: {"BLOCK_D": columns * 2 // x.itemsize, "num_warps": 4, "num_stages": stages}
        for together, (columns, stages) in found.items()
    }


@lru_cache
def _together(name: str, blocks: int) -> int:
    if name == "interpreter" or blocks <= PROCESSORS[name]:
        return 1

    def idle(programs: int) -> float:
        slots = programs * PROCESSORS[name]
        waves = -(-blocks // slots)
        return 0.0 if waves > 4 else round(1 - blocks / (waves * slots), 3)

    found = SMALL_PIPELINES if name in SMALL_ARCHS else PIPELINES
    return min((n for n in found if n > 1), key=idle)


def places(x: Tensor, rows: int, tile: dict[str, int]) -> int:
    """Programs of `rows` rows that fit the GPU, by shared memory, the scarcest; 0: no GPU."""
    name = arch_of(x.device)
    if name not in SHARED_MEMORY:
        return 0
    each = (rows + BLOCK_M) * tile["BLOCK_D"] * x.itemsize * tile["num_stages"] + RESERVED
    return (SHARED_MEMORY[name] + RESERVED) // each * PROCESSORS[name]


def leaves_places(x: Tensor, programs: int, rows: int, tile: dict[str, int]) -> bool:
    """Whether more than a twentieth of the places is free: see dependent_launch.py."""
    return 20 * int(programs) < 19 * places(x, rows, tile)


def rows_of_weight(x: Tensor, rows: int = BLOCK_N) -> int:
    """How many rows of a weight a program streams: `rows` on a GPU."""
    return 512 if arch_of(x.device) == "interpreter" else rows


def check_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """ValueError unless x [M, D], weight [N, D] and bias [N] make a product."""
    require(weight.dim() == 2, f"weight is {list(weight.shape)}, must be [N, D]")
    N, D = weight.shape
    require(N > 0 and D > 0, f"weight is {list(weight.shape)}: an empty product")
    check_tensors(x, weight=weight, bias=bias)
    check_shape("weight", weight, N, D)
    check_rows("x", x, D)
    if bias is not None:
        check_shape("bias", bias, N)
