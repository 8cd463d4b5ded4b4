"""Where a kernel launched dependently waits for the one before it, read from its machine code.

The rules of kernels/dependent_launch.py, as instructions of sm_90 and later:

    ACQBULK     the wait: there is one, without a condition, and all code passes it
    before it   no access to global memory but prefetches to L2 (UBLKPF, CCTL.PF2), no exit, no
                branch that leads beyond it
    after it    no branch that leads back to it: it stands in no loop
    PREEXIT     allows the next kernel to begin; without it the launch gains nothing

A branch is judged by its target, so loops before the wait are seen to stay there; a call of what
traps (Triton 3.6 guards tensor memory so, on sm_100) leads nowhere.  Compilers move code: a load
that stood after the wait may stand before it in what they made.
"""

import re
from collections.abc import Iterator, Sequence

from gemcut.tools.machine_code import PREDICATE, Instruction

WAIT, ALLOWS, TRAP = "ACQBULK", "PREEXIT", "BPT"
ACCESS = re.compile(r"(LD|ST|LDG\w*|STG|ATOM|ATOMG|RED|REDG|UTMA\w+|UBLKCP|UBLKRED|CCTL|SU\w+)$")
PREFETCH = re.compile(r"CCTL(\.\w+)*\.PF2\b")
LEAVES = ("EXIT", "RET", "BRX", "BRXU", "JMX", "JMXU", "KILL")  # or leads nobody knows where
TARGET = re.compile(r"(?:BRA|BSSY|CALL|JMP)\b[^&]*?\b0x([0-9a-f]+)")


def wait_problems(code: Sequence[Instruction]) -> list[str]:
    """What a kernel's code breaks of these rules."""
    return list(dict.fromkeys(_problems(code)))


def _problems(code: Sequence[Instruction]) -> Iterator[str]:
    waits = [instruction for instruction in code if instruction.name == WAIT]
    if len(waits) != 1:
        yield f"{len(waits) or 'no'} waits for the kernel before"
        return
    (wait,) = waits
    if PREDICATE.match(wait.text):
        yield f"a wait with a condition: {wait.text}"
    if all(instruction.name != ALLOWS for instruction in code):
        yield "the next kernel is never allowed to begin"
    traps = {instruction.address for instruction in code if instruction.name == TRAP}
    for instruction in code:
        is_before = instruction.address < wait.address
        target = _target(instruction)
        if is_before:
            if instruction.name in LEAVES:
                yield f"an exit before the wait: {instruction.text}"
            elif ACCESS.match(instruction.name) and not PREFETCH.search(instruction.text):
                yield f"memory before the wait: {instruction.text}"
            elif target is not None and target > wait.address and target not in traps:
                yield f"a branch past the wait: {instruction.text}"
        elif target is not None and target <= wait.address:
            yield f"a wait in a loop: {instruction.text}"


def _target(instruction: Instruction) -> int | None:
    match = TARGET.match(PREDICATE.sub("", instruction.text))
    return int(match[1], 16) if match else None
