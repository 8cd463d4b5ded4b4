"""Loops of a compiled kernel and the cycles of a pass through each, read from its machine code.

Every instruction of sm_90 carries what the compiler decided about its issue: cycles to stall, the
scoreboards that it sets when its result is there, and those that it waits for.  So the time of one
warp alone follows from the code, where each scoreboard is set after a latency of machine.py.

A loop is a branch back; of nested ones the innermost counts.  What a pass does only now and then,
after a branch, is counted apart: attention stores sums at the end of a split, the head compares the
logits of a block.  Control bits (128-bit encoding, from bit 105): 4 of stall, 1 of yield, 3 + 3 of
scoreboards set after a result and after the operands are read (7: none), 6 of those waited for.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gemcut.tools.machine import LATENCIES

LINE = re.compile(r"\s+/\*([0-9a-f]{4,5})\*/\s+(.*?);\s+/\* 0x([0-9a-f]{16}) \*/")
SECOND_HALF = re.compile(r"\s+/\* 0x([0-9a-f]{16}) \*/")
BRANCH = re.compile(r"\bBRA(?:\.\w+)*\s+(?:!?U?P\w+,\s*)?0x([0-9a-f]+)")
PREDICATE = re.compile(r"^@!?U?P\w+\s+")
MULTIPLIES = ("HMMA", "HGMMA")
LAST = ("EXIT", "ATOM", "ATOMG", "RED")  # with which a program ends, or counts itself
COPIES = {"LDGSTS", "UTMALDG", "UBLKCP"}  # by which a pipeline streams
LOADS = {"LDG", *COPIES}
LONG = 100  # instructions after a branch: what takes so many is not done in every pass
SHORTEST = 8  # instructions of a loop: fewer spin on something
READ_CYCLES = 12  # until operands are read, where a scoreboard tells
OTHER_LATENCY = 30  # of an instruction with a scoreboard that machine.py does not name
PASSES = 4  # after which a loop has settled


@dataclass(frozen=True)
class Instruction:
    """One line of machine code."""

    address: int
    text: str
    control: int  # 21 bits

    @property
    def name(self) -> str:
        """The operation without predicate and modifiers: HMMA, LDG."""
        return PREDICATE.sub("", self.text).split()[0].split(".")[0]


@dataclass(frozen=True)
class Loop:
    """An innermost loop: instructions and cycles of one pass of one warp alone."""

    begin: int  # addresses
    end: int
    cycles: int
    instructions: int
    multiplies: bool  # by tensor cores
    loads: bool  # from global memory
    rare_cycles: int = 0  # of what few passes do, after a branch


def parse(sass: str) -> list[Instruction]:
    """The instructions of the first kernel in what `cuobjdump -sass` prints."""
    found: list[Instruction] = []
    pending: tuple[int, str] | None = None
    for line in sass.splitlines():
        if match := LINE.match(line):
            pending = int(match[1], 16), match[2].strip()
            if found and pending[0] == 0:
                break
        elif pending is not None and (match := SECOND_HALF.match(line)):
            found.append(Instruction(*pending, int(match[1], 16) >> 41 & 0x1FFFFF))
            pending = None
    return found


def find_loops(code: Sequence[Instruction], latencies: Mapping[str, int] = LATENCIES) -> list[Loop]:
    """The innermost loops, in the order of the code."""
    spans = []
    for instruction in code:
        if branch_target(instruction) < instruction.address:
            spans.append((branch_target(instruction), instruction.address))
    loops = []
    for begin, end in sorted(spans):
        inner = any((b, e) != (begin, end) and begin <= b and e <= end for b, e in spans)
        body = [i for i in code if begin <= i.address <= end]
        if inner or len(body) < SHORTEST:
            continue
        body, rare = _usual(body)
        names = {i.name for i in body}
        loops.append(
            Loop(
                begin,
                end,
                pass_cycles(body, latencies),
                len(body),
                multiplies=not names.isdisjoint(MULTIPLIES),
                loads=not names.isdisjoint(LOADS),
                rare_cycles=pass_cycles(rare, latencies, passes=1),
            )
        )
    return loops


def _usual(body: Sequence[Instruction]) -> tuple[list[Instruction], list[Instruction]]:
    """What every pass of a loop does, and what a branch skips on most of them.

    That is code without a product that stores, or is long and streams nothing.
    """
    usual, rare, resumes = [], [], 0
    for instruction in body:
        if instruction.address < resumes:
            rare.append(instruction)
            continue
        usual.append(instruction)
        target = branch_target(instruction)
        skipped = [i.name for i in body if instruction.address < i.address < target]
        is_long = len(skipped) >= LONG and COPIES.isdisjoint(skipped)
        if ("STG" in skipped or is_long) and not set(MULTIPLIES) & set(skipped):
            resumes = target
    return usual, rare


def branch_target(instruction: Instruction) -> int:
    """The target of a branch; of another instruction its own address."""
    match = BRANCH.search(instruction.text)
    return int(match[1], 16) if match else instruction.address


def pass_cycles(
    body: Sequence[Instruction], latencies: Mapping[str, int] = LATENCIES, passes: int = PASSES
) -> int:
    """Cycles of one pass through some instructions, the last of several consecutive ones."""
    now, began = 0, 0
    boards = [0] * 6
    for _ in range(passes):
        began = now
        for instruction in body:
            control = instruction.control
            stall, written, read = control & 15, control >> 5 & 7, control >> 8 & 7
            waited = control >> 11 & 63
            now = max([now, *(at for i, at in enumerate(boards) if waited >> i & 1)])
            name = instruction.name
            latency = latencies.get(name, OTHER_LATENCY)
            if written < 6:
                boards[written] = max(boards[written], now + latency)
            if read < 6:
                boards[read] = max(boards[read], now + min(latency, READ_CYCLES))
            now += max(1, stall)
            if name == "BAR":
                now += latency
    return now - began


def tail_cycles(
    code: Sequence[Instruction], begin: int, latencies: Mapping[str, int] = LATENCIES
) -> int:
    """Cycles from an address to the end of a program, or to where it counts itself."""
    tail = []
    for instruction in code:
        if instruction.address > begin:
            tail.append(instruction)
            if instruction.name in LAST or branch_target(instruction) < instruction.address:
                break
    return pass_cycles(tail, latencies, passes=1)
