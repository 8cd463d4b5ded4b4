"""The predicted time of one launch, from its grid and sizes and from what the compiler made of it.

    a product     has a matrix w [N, D] and a step of BLOCK_D: its programs share the matrix, and
                  bandwidth_model.py drains it
    attention     has keys and a step of BLOCK_N: its tiles follow one another, at the pace of the
                  loop or of the memory
    others        take a constant, and the time of reading their logits

Which kernel it is plays no part, so a new one is predicted as soon as it is launched.
"""

import math
from collections.abc import Sequence

from gemcut.tools.bandwidth_model import Stream, stream_us
from gemcut.tools.compile_report import Cell
from gemcut.tools.launches import Made
from gemcut.tools.machine import H200, Machine
from gemcut.tools.machine_code import Loop


def launch_us(made: Made, cell: Cell | None, context: int, machine: Machine = H200) -> float:
    """Microseconds from the launch's start to its end, where rows see `context` keys at most."""
    if made.launch is None:
        return machine.torch_us
    facts = facts_of(made)
    main = main_loop(cell)
    if cell is not None and main is not None and {"w_ptr.1", "BLOCK_D"} <= facts.keys():
        return product_us(facts, made.grid, cell, main, machine)
    if cell is not None and main is not None and "BLOCK_N" in facts:
        return attention_us(facts, made.grid, cell, main, context, machine)
    return machine.small_us + 1e6 * memory_bytes(made, context) / machine.bandwidth


def facts_of(made: Made) -> dict[str, int]:
    """Numbers and constants by name, options too, and the sizes of tensors as `name.axis`."""
    facts = dict(made.numbers)
    for name, shape in made.shapes:
        facts |= {f"{name}.{axis}": size for axis, size in enumerate(shape)}
    facts |= {f"{name}.bytes": size for name, size in made.item_bytes}
    return facts


def main_loop(cell: Cell | None) -> Loop | None:
    """The loop that streams: the first that multiplies."""
    loops = [] if cell is None else [loop for loop in cell.loops if loop.multiplies]
    return loops[0] if loops else None


def memory_bytes(made: Made, context: int) -> float:
    """What a launch takes from memory, as far as its time depends on it: weights, keys, logits."""
    facts = facts_of(made)
    for name in ("w_ptr", "logits_ptr"):
        if f"{name}.1" in facts:
            return facts[f"{name}.0"] * facts[f"{name}.1"] * facts[f"{name}.bytes"]
    if "k_ptr.3" in facts and made.grid:
        keys = seen(facts, context)
        rows = facts.get("q_ptr.0", 1)
        return 2 * rows * facts["k_ptr.1"] * keys * facts["k_ptr.3"] * facts["k_ptr.bytes"]
    return 0.0


def occupancy(facts: dict[str, int], cell: Cell, machine: Machine) -> int:
    """How many programs a processor holds."""
    return machine.programs_at_once(cell.shared_bytes, cell.registers, facts.get("num_warps", 4))


def product_us(
    facts: dict[str, int], grid: Sequence[int], cell: Cell, main: Loop, machine: Machine
) -> float:
    """A product with a matrix, which its programs cut into equal shares."""
    N, D, size = facts["w_ptr.0"], facts["w_ptr.1"], facts["w_ptr.bytes"]
    at_once, num_warps = occupancy(facts, cell, machine), facts.get("num_warps", 4)
    rows, block_m = facts.get("M", 1), facts.get("BLOCK_M", 16)
    programs, groups = math.prod(grid), math.ceil(rows / block_m)
    whole = math.ceil(D / facts["BLOCK_D"])
    steps = math.ceil(min(facts.get("split_d", D), D) / facts["BLOCK_D"])
    weight_bytes = N * D * size * groups / programs / steps  # of a step
    shared_rows = min(rows, block_m) * facts["BLOCK_D"] * size

    before = [loop for loop in cell.loops if loop.end < main.begin]
    passes = sum(_paced(loop, at_once * num_warps, machine) for loop in before)
    prologue = machine.us(whole * passes) + machine.prologue_us if before else 0.0
    tiles, block_t = programs / groups, facts.get("BLOCK_T")
    after = [loop for loop in cell.loops if loop.begin > main.end and loop.loads]
    closing = 0.0  # of the last program, which compares what all have kept
    if after and block_t:
        closing = machine.atomic_us + machine.us(math.ceil(tiles / block_t) * after[0].cycles)
    stream = Stream(
        programs=programs,
        steps=steps,
        step_bytes=weight_bytes / groups,  # a further group of rows reads it from L2
        cycles=main.cycles,
        instructions=main.instructions,
        num_warps=num_warps,
        stages=facts.get("num_stages", 2),
        at_once=at_once,
        l2_bytes=weight_bytes * (1 - 1 / groups) + shared_rows,
        before_us=prologue,
        end_us=machine.us(cell.tail_cycles),
    )
    return stream_us(stream, machine) + closing


def _paced(loop: Loop, warps: int, machine: Machine) -> float:
    """Cycles of a pass where so many warps of a processor are in the same loop."""
    return max(loop.cycles, warps * loop.instructions / 4 / machine.issue)


def seen(facts: dict[str, int], context: int) -> int:
    """Keys that a row sees."""
    return min(context, facts["W"]) if facts.get("IS_LOCAL") else context


def attention_us(
    facts: dict[str, int],
    grid: Sequence[int],
    cell: Cell,
    main: Loop,
    context: int,
    machine: Machine,
) -> float:
    """Attention of a few rows: tiles of keys one after the other, then splits added up.

    Of the kernel it knows that a program takes every n-th split of SPLIT keys, n being the first
    axis of the grid, and that one program adds up BLOCK_S splits of BLOCK_R rows at a time.
    """
    keys = seen(facts, context)
    split, block_n = facts.get("SPLIT", keys), facts["BLOCK_N"]
    splits = math.ceil(keys / split)
    heads = math.prod(grid[1:])
    at_once, num_warps = occupancy(facts, cell, machine), facts.get("num_warps", 4)
    in_turn = math.ceil(splits / grid[0])  # of a program
    tiles = in_turn * math.ceil(min(split, keys) / block_n)
    working = min(splits, grid[0]) * heads
    waves = math.ceil(working / (machine.processors * at_once))
    together = min(at_once, math.ceil(working / machine.processors))
    tile_us = machine.us(_paced(main, together * num_warps, machine))
    tile_us = max(tile_us, machine.memory_us / max(1, facts.get("num_stages", 2) - 1))
    tile_bytes = 2 * block_n * facts.get("HEAD_DIM", 256) * facts.get("k_ptr.bytes", 2)
    tile_us = max(tile_us, 1e6 * together * tile_bytes / machine.processor_bandwidth)
    us = machine.start_us + machine.lookup_us + machine.fill_us
    us += max(
        waves * tiles * tile_us, 1e6 * heads * keys / block_n * tile_bytes / machine.bandwidth
    )
    after = [loop for loop in cell.loops if loop.begin > main.end and loop.loads]
    if splits > 1 and after:
        rows = facts.get("Q_LEN", 1) * facts.get("GROUP_SIZE", 1)
        passes = math.ceil(splits / facts.get("BLOCK_S", 1)) * math.ceil(
            rows / facts.get("BLOCK_R", 1)
        )
        us += machine.atomic_us + machine.us(passes * after[0].cycles)
    return us + machine.us(min(cell.tail_cycles, 1000)) + machine.end_us
