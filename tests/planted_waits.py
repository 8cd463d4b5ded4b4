"""Kernels that begin as a dependent launch must, and in each way that breaks a rule.

Run as a program, it compiles them and prints what launch_wait.py finds in each, as JSON.
"""

import json
import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gemcut.kernels.dependent_launch import (
    let_next_begin,
    prefetch_and_wait,
    wait_for_predecessor,
)
from gemcut.tools.compile_report import _disassembled
from gemcut.tools.launch_wait import wait_problems
from gemcut.tools.machine_code import parse

BLOCK = 1024
FORMS = ("right", "prefetch", "missing", "after a store", "after a load", "after a return")
FORMS += ("in a loop", "twice", "on one path", "after an atomic", "nothing allowed")


@triton.jit
def planted_kernel(
    x_ptr, w_ptr, y_ptr,  # [N], [64, D], [N]
    N, D,
    FORM: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < N
    extra = tl.zeros([BLOCK], tl.float32)
    if FORM == "right":
        wait_for_predecessor(True)
    elif FORM == "prefetch":
        prefetch_and_wait(w_ptr, tl.arange(0, 64), 0, D, True, 256)
        let_next_begin(True)
    elif FORM == "missing":
        tl.extra.cuda.gdc_launch_dependents()
    elif FORM == "after a store":
        tl.store(y_ptr + offs, extra, mask=mask)
        wait_for_predecessor(True)
    elif FORM == "after a load":
        extra = tl.load(w_ptr + offs, mask=mask, other=0.0)
        wait_for_predecessor(True)
    elif FORM == "after a return":
        if tl.program_id(0) >= D:
            return
        wait_for_predecessor(True)
    elif FORM == "in a loop":
        for i in range(D):
            wait_for_predecessor(True)
            extra += tl.load(w_ptr + i * N + offs, mask=mask, other=0.0)
    elif FORM == "twice":
        wait_for_predecessor(True)
        tl.extra.cuda.gdc_wait()
    elif FORM == "on one path":
        if D > 7:
            wait_for_predecessor(True)
    elif FORM == "after an atomic":
        tl.atomic_add(y_ptr, 1.0, sem="relaxed")
        wait_for_predecessor(True)
    elif FORM == "nothing allowed":
        tl.extra.cuda.gdc_wait()
    x = tl.load(x_ptr + offs, mask=mask, other=0.0)
    tl.store(y_ptr + offs, x + extra, mask=mask)


def found(form: str, capability: int) -> list[str]:
    """What the compiled code of a form breaks."""
    kinds = {"x_ptr": "*fp32", "w_ptr": "*fp32", "y_ptr": "*fp32", "N": "i32", "D": "i32"}
    compiled = triton.compile(
        ASTSource(
            fn=planted_kernel,
            signature={**kinds, "FORM": "constexpr", "BLOCK": "constexpr"},
            constexprs={(5,): form, (6,): BLOCK},
            attrs={(i,): [["tt.divisibility", 16]] for i in range(5)},
        ),
        target=GPUTarget("cuda", capability, 32),
        options={"launch_pdl": True},
    )
    return wait_problems(parse(_disassembled(compiled.asm["cubin"])[1]))


if __name__ == "__main__":
    print(json.dumps({form: found(form, int(sys.argv[1])) for form in FORMS}))
