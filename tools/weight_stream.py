"""How a compiled product streams its weight: rules of compile_report.py for sm_90 and sm_100.

    in flight       at least 25 KB of weight on their way to a processor that is full of programs
    asynchronous    the loop that multiplies loads by copies to shared memory, never into registers
    16 bytes        and each of them is as wide as a thread can ask for

Beside a quantised weight, scales come into registers, 4 bytes at most, and x in pairs of columns;
its own bytes are held to the rules.

25 KB on each of 132 processors are 4.67 TB/s at a latency of .72 microseconds; at the 1.04 of
machine.py, a fitted one, it takes 37.  A program's are its steps of shared memory less the one
being multiplied; a processor is full when shared memory or registers are.
"""

import re
from collections.abc import Mapping, Sequence

from gemcut.kernels.quantized_weight import BITS
from gemcut.tools.machine import H200
from gemcut.tools.machine_code import Instruction, branch_target

ARCHS = ("sm_90", "sm_100")
LEAST_IN_FLIGHT = 25 * 1024  # bytes
ROWS = {"BLOCK_N": 1, "BLOCK_V": 1, "BLOCK_F": 2, "BLOCK_I": 2}  # of a weight, by a tile's constant
MULTIPLIES = ("HMMA", "HGMMA", "UTCHMMA")
WIDE = re.compile(r"\bLDG\S*\.(64|128)\b")
COPIES = ("LDGSTS", "UTMALDG", "UBLKCP")


def program_bytes(tile: Mapping[str, int], bits: int = 16) -> int | None:
    """Bytes of weight on their way to one program; None for a tile that streams no weight."""
    each = step_bytes(tile, bits)
    return None if each is None else (tile.get("num_stages", 1) - 1) * each


def step_bytes(tile: Mapping[str, int], bits: int = 16) -> int | None:
    """Bytes of weight of a step, whose numbers have so many bits; None for no step of a weight."""
    rows = [tile.get("share", tile[name]) * each for name, each in ROWS.items() if name in tile]
    if not rows or not {"BLOCK_M", "BLOCK_D"} <= tile.keys():
        return None
    return rows[0] * tile["BLOCK_D"] * bits // 8


def stream_problems(
    tile: Mapping[str, int],
    shared_bytes: int,
    registers: int,
    code: Sequence[Instruction],
    format: str | None = None,
) -> list[str]:
    """What is wrong with a product's stream; nothing of a kernel that is no product.

    format: of a quantised weight.
    """
    bits = 16 if format is None else BITS[format]
    each, of_step = program_bytes(tile, bits), step_bytes(tile, bits)
    if each is None or of_step is None:
        return []
    problems = []
    programs = H200.programs_at_once(shared_bytes, registers, tile.get("num_warps", 4))
    if programs * each < LEAST_IN_FLIGHT:
        problems.append(f"{programs} x {each} bytes of weight in flight < {LEAST_IN_FLIGHT}")
    loop = multiplying_loop(code)
    copies = [i for i in loop if i.name in COPIES]
    if any(i.name == "LDG" and (format is None or WIDE.search(i.text)) for i in loop):
        problems.append("the loop that multiplies loads into registers")
    if not copies:
        problems.append("no asynchronous copy in the loop that multiplies")
    wide = sum(i.name == "LDGSTS" and ".128" in i.text for i in copies)
    needed = -(-of_step // (16 * 32 * tile.get("num_warps", 4)))
    narrow = any(i.name == "LDGSTS" and ".128" not in i.text for i in copies)
    if narrow and (format is None or wide < needed):
        problems.append("copies of less than 16 bytes")
    return problems


def multiplying_loop(code: Sequence[Instruction]) -> list[Instruction]:
    """The shortest loop with tensor core instructions; empty where there is none."""
    bodies = []
    for instruction in code:
        target = branch_target(instruction)
        if target < instruction.address:
            body = [i for i in code if target <= i.address <= instruction.address]
            if any(i.name in MULTIPLIES for i in body):
                bodies.append(body)
    return min(bodies, key=len, default=[])
