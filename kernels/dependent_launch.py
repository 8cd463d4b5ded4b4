"""Programmatic dependent launch: a kernel begins while the one before it still runs.

On GPUs that have it, kernels of a decode step are launched so (launch_pdl=True), and begin by

    gdc_launch_dependents    the next kernel may begin as soon as all programs have said this: its
                             programs take the places that this one leaves free
    prefetch                 L2 is asked for the first bytes of the program's own rows of a weight
    gdc_wait                 until the kernel before has ended and all that it wrote can be read

and only then loads, stores or returns.  So a kernel has ended only when the one before it had, and
the one before that: completion is transitive, each kernel finds the memory that a plain launch
would find, and results are the same bits.  Weights alone may be asked for earlier: no kernel of a
chain writes them.  Without the wait on any path, one program that returned early would let the
kernel after next overtake the one before.

Torch's own launches among them are plain.  A plain kernel begins when everything before it in the
stream has ended, and never says gdc_launch_dependents: what follows it waits for its end.  A
product that leaves places free is launched plainly too, with the same code: it lets the next begin.

It saves the gap between launches, and costs the even spread of programs over processors: those of
the next kernel take what places there are.  On an H200 a chain of norm, geglu and down took, at
equal tile, .98 and .94 of the time of plain launches (vaultgemma-1b), .97 and .98 (gemma-2-9b), .96
and 1.08 (gemma-2-2b, 4 and 3 stages).  256 prefetched bytes of a row gained 3 % at the best tile of
vaultgemma-1b, whose weights of a layer fit L2, and cost 1 to 2 % in the larger ones.
bench/results/nvidia-h200/visit-prototypes.json holds all of these; there the products were
prototypes.

tools/compile_report.py finds the wait in the compiled code of every such kernel.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gemcut.kernels.gpu_arch import arch_of
from gemcut.kernels.interpreter import INTERPRETED
from gemcut.kernels.launch_switch import is_on

ARCHS = ("sm_90", "sm_100", "sm_120")
PREFETCHED_BYTES = 256  # of a row
MOST_PREFETCHED = 32 * 2**20  # bytes of a weight whose rows are prefetched, see above


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


def prefetched_bytes(weight: Tensor, is_even: bool) -> int:
    """How much of each row of a weight [N, D] a program asks for before it waits; 0 for none.

    is_even: every step of the weight is whole, so that none reaches beyond it.
    """
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
def prefetch_and_wait(
    w_ptr, rows, column, D,  # [N, D], [BLOCK_ROWS]: rows that exist, the first column wanted
    DEPENDENT: tl.constexpr,
    PREFETCH: tl.constexpr,
):  # fmt: skip
    """The same, and ask L2 for PREFETCH bytes of some rows of a weight between the two."""
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
        if PREFETCH > 0:
            last = D - PREFETCH * 8 // w_ptr.dtype.element_ty.primitive_bitwidth
            # the instruction takes multiples of 16 bytes; a weight may begin elsewhere
            address = (w_ptr + rows * D + tl.minimum(column, last)).to(tl.int64) & -16
            tl.inline_asm_elementwise(
                "cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0;", "=r,l,r",
                [address, tl.zeros_like(rows).to(tl.int32) + PREFETCH],
                dtype=tl.int32, is_pure=False, pack=1,
            )  # fmt: skip
        tl.extra.cuda.gdc_wait()
