"""Programmatic dependent launch: a kernel begins while the one before it still runs.

On GPUs that have it, kernels of a decode step are launched so (launch_pdl=True), and begin by

    prefetch                 L2 is asked for the first bytes of the program's own rows of a weight
    gdc_wait                 it waits until the kernel before has ended, with all its writes

and only then loads, stores or returns.  So a kernel has ended only when the one before it had, and
the one before that: completion is transitive, each kernel finds the memory that a plain launch
would find, and results are the same bits.  Weights alone may be asked for earlier: no kernel of a
chain writes them.  Without the wait on any path, one program that returned early would let the
kernel after next overtake the one before.

    gdc_launch_dependents    the next kernel may begin as soon as all programs have said this: its
                             programs take the places that this one leaves free

Short kernels say it first of all, products after their loop.

Torch's own launches among them are plain.  A plain kernel begins when everything before it in the
stream has ended, and never says gdc_launch_dependents: what follows it waits for its end.  A
product that leaves places free is launched plainly too, with the same code: it lets the next begin.

It saves gaps between launches, and costs the even spread of programs over processors: those of the
next kernel take what places there are.  Prototypes of norm, geglu and down in a chain, on an H200
(bench/results/nvidia-h200/visit-prototypes.json): the time by dependent launches to that by plain
ones at equal tile, the next kernel let begin at once or after the loop; and the time with 256 bytes
of each row prefetched to that with none:

    64 rows x           128 columns, 4 stages    128, 3        64, 4         128, 4 and 3
                        at once, after it                                    prefetched
    vaultgemma-1b        .98   1.00               .94   .93    1.08   .93    1.01   .97
    gemma-2-2b           .96    .98              1.08  1.09    1.05  1.00    1.03  1.01
    gemma-2-9b           .97    .98               .98   .97    1.20  1.19    1.01  1.01

So rows are prefetched where a weight is no larger than the largest that gained, 32 MB.  That holds
for some weights of larger models too, which no chain had: qkv and o, beside an attention that
leaves memory idle.

tools/compile_report.py finds the wait in the compiled code of every such kernel.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gemcut.kernels.gpu_arch import arch_of
from gemcut.kernels.interpreter import INTERPRETED
from gemcut.kernels.launch_switch import is_on
from gemcut.kernels.quantized_weight import Weight

ARCHS = ("sm_90", "sm_100", "sm_120")
PREFETCHED_BYTES = 256  # of a row
MOST_PREFETCHED = 32_000_000  # bytes of a weight whose rows are prefetched, see above


def dependent_launch(device: torch.device, leaves_places: bool = False) -> dict[str, bool]:
    """The two keywords of a launch whose kernel begins by a wait: DEPENDENT and launch_pdl.

    One that leaves places free is launched plainly: it begins on processors that are all empty, so
    that its programs spread evenly.  It lets the next kernel begin; its own wait is over at once.
    """
    dependent = is_on() and has_dependent_launches(device)
    return {"DEPENDENT": dependent, "launch_pdl": dependent and not leaves_places}


def has_dependent_launches(device: torch.device) -> bool:
    """Whether kernels on a device can be launched so: sm_90 and later, never interpreted ones."""
    return device.type == "cuda" and not INTERPRETED and arch_of(device) in ARCHS


def prefetched_bytes(weight: Weight, is_even: bool) -> int:
    """How much of each row of a weight [N, D] a program asks for before it waits; 0 for none.

    is_even: every step of the weight is whole, so that none reaches beyond it.
    """
    weight = weight if isinstance(weight, Tensor) else weight.values
    fits = weight.numel() * weight.itemsize <= MOST_PREFETCHED
    is_wide = weight.shape[1] * weight.itemsize >= PREFETCHED_BYTES
    return PREFETCHED_BYTES if is_even and fits and is_wide else 0


@triton.jit
def wait_for_predecessor(DEPENDENT: tl.constexpr):
    """Let the next kernel begin, and wait for the one before: the first statement of a kernel."""
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def let_next_begin(DEPENDENT: tl.constexpr):
    """Let the next kernel begin: a product's last rows are still to be stored."""
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def prefetched_addresses(w_ptr, rows, column, D, PREFETCH: tl.constexpr):
    """Where PREFETCH bytes of some rows of a weight [N, D] begin, all of them within a row.

    The instruction takes multiples of 16; a weight may begin elsewhere.
    """
    last = D - PREFETCH * 8 // w_ptr.dtype.element_ty.primitive_bitwidth
    return (w_ptr + rows * D + tl.minimum(column, last)).to(tl.int64) & -16


@triton.jit
def prefetch_and_wait(
    w_ptr, rows, column, D,  # [N, D], [BLOCK_ROWS]: rows that exist, the first column wanted
    DEPENDENT: tl.constexpr,
    PREFETCH: tl.constexpr,
    FORMAT: tl.constexpr = None,  # of a quantised weight
):  # fmt: skip
    """Ask L2 for PREFETCH bytes of some rows of a weight, and wait for the kernel before."""
    if DEPENDENT:
        if PREFETCH > 0:
            if FORMAT == "int4":  # two columns a byte
                column, D = column // 2, tl.cdiv(D, 64) * 32
            address = prefetched_addresses(w_ptr, rows, column, D, PREFETCH)
            tl.inline_asm_elementwise(
                "cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0;", "=r,l,r",
                [address, tl.zeros_like(rows).to(tl.int32) + PREFETCH],
                dtype=tl.int32, is_pure=False, pack=1,
            )  # fmt: skip
        tl.extra.cuda.gdc_wait()
