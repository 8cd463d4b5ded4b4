"""The tile rule of products by a weight, and a kernel's arguments for its weight.

Tiles depend on the weight's shape and format and on the arch, never on the rows of x: see
skinny_product.py.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from gemcut.kernels.checks import check_rows, check_shape, check_tensors, check_weight, require
from gemcut.kernels.gpu_arch import PROCESSORS, SHARED_MEMORY, arch_of
from gemcut.kernels.quantized_weight import BITS, Weight
from gemcut.kernels.tiles import tuned

BLOCK_M = 16  # rows of x in a program: the least that tensor cores take
BLOCK_N = 64  # rows of the weight in a program
# Columns of a step, of 16 bits, and steps in shared memory, by the programs of a processor that it
# is for.  60, 50 and 70 KB a program: at most 75, beside which the next kernel's find room, and at
# least 25 of weight on their way to a processor.  The first was timed on an H200, the others with
# one step less; bench/NOTES.md has what larger ones gain.
PIPELINES = {3: (128, 3), 4: (64, 5), 1: (64, 7)}
# half as much shared memory, or less: 30, 40 and 60 KB
SMALL_PIPELINES = {3: (64, 3), 2: (64, 4), 1: (64, 6)}
# The same of a byte a number, and of half a byte, with 64 rows and with 128: 40 to 69 KB, of which
# x takes a third to a half; then 24 to 64.
BYTE_PIPELINES = {5: (128, 4), 4: (128, 5), 3: (128, 6), 1: (256, 3)}
SM_100_BYTE_PIPELINES = BYTE_PIPELINES | {1: (128, 6)}  # of 256 its loop would load into registers
INT4_PIPELINES = {4: (128, 7), 3: (128, 9), 1: (128, 9)}
WIDE_INT4_PIPELINES = {3: (128, 5), 2: (128, 6), 1: (128, 6)}
SMALL_BYTE_PIPELINES = {3: (64, 5), 2: (128, 4), 1: (128, 6)}
SMALL_INT4_PIPELINES = {2: (128, 4), 1: (128, 6)}
SMALL_ARCHS = ("sm_80", "sm_89", "sm_120")
WIDE = 1 << 24  # numbers of an int4 weight from which programs take 128 rows
RESERVED = 1024  # bytes of shared memory that each program takes beside its own


def operands(weight: Weight) -> dict[str, Any]:
    """A kernel's arguments for its weight.

    FORMAT is None for a plain one; GROUP is 0 where a row's sum is scaled at its end.
    """
    if isinstance(weight, Tensor):
        return {
            "w_ptr": weight, "scales_ptr": None, "zeros_ptr": None, "FORMAT": None, "GROUP": 0,
        }  # fmt: skip
    values, size = weight.values, weight.group_size
    by_row = size == weight.columns and weight.zero_points is None
    return {
        "w_ptr": values.view(torch.uint8) if weight.format == "fp8" else values,
        "scales_ptr": weight.scales,
        "zeros_ptr": weight.zero_points,
        "FORMAT": weight.format,
        "GROUP": 0 if by_row else size,
    }


def tuned_tile(kernel: str, x: Tensor, weight: Weight, *shape: int) -> dict[str, int]:
    """`tuned`, of plain weights: nobody has timed others."""
    return tuned(kernel, x, *shape) if isinstance(weight, Tensor) else {}


def is_int4(weight: Weight) -> bool:
    """Whether a weight holds two numbers a byte."""
    return not isinstance(weight, Tensor) and weight.format == "int4"


def item_bits(x: Tensor, weight: Weight) -> int:
    """Bits of a weight's number, beside those of x where it is plain."""
    return 8 * x.itemsize if isinstance(weight, Tensor) else BITS[weight.format]


def pipeline(x: Tensor, weight: Weight, blocks: int, is_wide: bool = False) -> dict[str, int]:
    """How `blocks` programs stream a weight: columns of a step, steps on their way, warps.

    As many programs share a processor as leave the fewest of them idle while the last ones run, but
    of many waves the last one counts for little.  A program alone on its processor has more steps.
    """
    # a size may be a SymInt under torch.compile, which no cache can hold
    found = pipelines(x, weight, is_wide)
    return dict(found[_together(arch_of(x.device), tuple(found), int(blocks))])


def pipelines(x: Tensor, weight: Weight, is_wide: bool = False) -> dict[int, dict[str, int]]:
    """The tiles to choose from, by the programs of a processor that they are for."""
    name = arch_of(x.device)
    if name == "interpreter":
        return {1: {"BLOCK_D": 256, "num_warps": 4, "num_stages": 1}}
    is_small = name in SMALL_ARCHS
    if isinstance(weight, Tensor):
        found = SMALL_PIPELINES if is_small else PIPELINES
    elif is_int4(weight):
        large = WIDE_INT4_PIPELINES if is_wide else INT4_PIPELINES
        found = SMALL_INT4_PIPELINES if is_small else large
    else:
        large = SM_100_BYTE_PIPELINES if name == "sm_100" else BYTE_PIPELINES
        found = SMALL_BYTE_PIPELINES if is_small else large
    return {
        together: {"BLOCK_D": columns * 2 // x.itemsize, "num_warps": 4, "num_stages": stages}
        for together, (columns, stages) in found.items()
    }


@lru_cache
def _together(name: str, choices: tuple[int, ...], blocks: int) -> int:
    if name == "interpreter" or blocks <= PROCESSORS[name]:
        return 1

    def idle(programs: int) -> float:
        slots = programs * PROCESSORS[name]
        waves = -(-blocks // slots)
        return 0.0 if waves > 4 else round(1 - blocks / (waves * slots), 3)

    return min((n for n in choices if n > 1), key=idle)


def places(x: Tensor, weight: Weight, rows: int, tile: dict[str, int]) -> int:
    """Programs of `rows` rows that fit the GPU, by shared memory, the scarcest; 0: no GPU."""
    name = arch_of(x.device)
    if name not in SHARED_MEMORY:
        return 0
    stages, columns = tile["num_stages"], tile["BLOCK_D"]
    # numbers of a quantised weight are turned into x's dtype beside the product before it
    kept = stages if isinstance(weight, Tensor) else stages - 1
    each = rows * columns * item_bits(x, weight) // 8 * kept
    each += BLOCK_M * columns * x.itemsize * stages + RESERVED
    return (SHARED_MEMORY[name] + RESERVED) // each * PROCESSORS[name]


def leaves_places(
    x: Tensor, weight: Weight, programs: int, rows: int, tile: dict[str, int]
) -> bool:
    """Whether more than a twentieth of the places is free: see dependent_launch.py."""
    return 20 * int(programs) < 19 * places(x, weight, rows, tile)


def is_wide(weight: Weight) -> bool:
    """Whether a program takes twice as many rows: of int4, but where that leaves few steps.

    Its programs are bound by instructions, of which a third is spent on a step whatever its rows.
    """
    return is_int4(weight) and weight.shape[0] * weight.shape[1] >= WIDE


def rows_of_weight(x: Tensor, rows: int = BLOCK_N) -> int:
    """How many rows of a weight a program streams: `rows` on a GPU."""
    return 512 if arch_of(x.device) == "interpreter" else rows


def check_linear(x: Tensor, weight: Weight, bias: Tensor | None) -> None:
    """ValueError unless x [M, D], weight [N, D] and bias [N] make a product."""
    check_weight("weight", weight)
    N, D = weight.shape
    require(N > 0 and D > 0, f"weight is {list(weight.shape)}: an empty product")
    check_tensors(x, weight=weight, bias=bias)
    check_rows("x", x, D)
    if bias is not None:
        check_shape("bias", bias, N)
