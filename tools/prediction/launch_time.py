"""The predicted time of one launch, from its grid and sizes and from what the compiler made of it.

    a product     has a matrix w [N, D], rows of BLOCK_M and a step of BLOCK_D: its programs share
                  the matrix, with the scales of a quantised one, and bandwidth_model.py drains it
    attention     has keys and a step of BLOCK_N: its tiles follow one another, at the pace of the
                  loop or of the memory
    its sum       has splits and a step of BLOCK_S: passes over them, one after the other
    others        take a constant, and the time of reading their logits; partial sums took none that
                  was measured

The name of a product plays no part, so a new one is predicted as soon as it is launched.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

from gemcut.kernels.kv_splits import OCTAVE, UNIFORM_SPLITS, count_splits
from gemcut.tools.compile_report import Cell
from gemcut.tools.launches import Made
from gemcut.tools.machine import H200, Machine
from gemcut.tools.machine_code import Loop
from gemcut.tools.prediction.bandwidth_model import Stream, bound_by, stream_us

WEIGHT = ("w_ptr", "scales_ptr", "zeros_ptr")  # a plain one is the first alone
MOST_CROWDED = 0.83  # places left free, by programs: more were not timed


def launch_us(made: Made, cell: Cell | None, context: int, machine: Machine = H200) -> float:
    """Microseconds from the launch's start to its end, where rows see `context` keys at most."""
    if made.launch is None:
        return machine.torch_us
    facts = facts_of(made)
    main = main_loop(cell)
    if cell is not None and main is not None and is_product(facts):
        us = stream_us(stream_of(facts, made.grid, cell, main, machine), machine)
        return us * (1 + machine.crowding * crowded(made, cell, machine))
    if cell is not None and main is not None and "BLOCK_N" in facts:
        return attention_us(facts, made.grid, cell, main, context, machine)
    if cell is not None and cell.loops and "BLOCK_S" in facts:
        return combine_us(facts, made.grid, cell, context, machine)
    us = machine.small_us.get(made.name, machine.other_us)
    return us + 1e6 * memory_bytes(made, context) / machine.bandwidth


def facts_of(made: Made) -> dict[str, int]:
    """Numbers and constants by name, options too, and the sizes of tensors as `name.axis`."""
    facts = dict(made.numbers)
    for name, shape in made.shapes:
        facts |= {f"{name}.{axis}": size for axis, size in enumerate(shape)}
    facts |= {f"{name}.bytes": size for name, size in made.item_bytes}
    return facts


def is_product(facts: dict[str, int]) -> bool:
    """Whether a launch multiplies by a matrix, of which begin_step_kernel reads rows alone."""
    return {"w_ptr.1", "BLOCK_M", "BLOCK_D"} <= facts.keys()


def bound(made: Made, cell: Cell | None, machine: Machine = H200) -> str | None:
    """What a product's programs wait for while they stream; None of other launches."""
    facts, main = facts_of(made), main_loop(cell)
    if cell is None or main is None or not is_product(facts):
        return None
    return bound_by(stream_of(facts, made.grid, cell, main, machine), machine)


def main_loop(cell: Cell | None) -> Loop | None:
    """The loop that streams: the first that multiplies."""
    loops = [] if cell is None else [loop for loop in cell.loops if loop.multiplies]
    return loops[0] if loops else None


def memory_bytes(made: Made, context: int) -> float:
    """Bytes that a launch reads from memory and that its time depends on: weights, keys, logits."""
    facts = facts_of(made)
    if is_product(facts):
        return sum(_size(facts, name) for name in WEIGHT)
    if "logits_ptr.1" in facts:
        return _size(facts, "logits_ptr")
    if "k_ptr.3" in facts and made.grid:
        keys = seen(facts, context)
        rows = facts.get("q_ptr.0", 1)
        return 2 * rows * facts["k_ptr.1"] * keys * facts["k_ptr.3"] * facts["k_ptr.bytes"]
    return 0.0


def _size(facts: dict[str, int], name: str) -> int:
    """Bytes of a matrix; 0 where there is none of that name."""
    rows, columns = facts.get(f"{name}.0", 0), facts.get(f"{name}.1", 0)
    return rows * columns * facts.get(f"{name}.bytes", 0)


def occupancy(facts: dict[str, int], cell: Cell, machine: Machine) -> int:
    """How many programs a processor holds."""
    return machine.programs_at_once(cell.shared_bytes, cell.registers, facts.get("num_warps", 4))


def crowded(made: Made, cell: Cell, machine: Machine) -> float:
    """Places that a dependent product leaves free, by its programs; 0 where these spread evenly.

    They do where they need every place, and where all find one beside the product before.
    """
    programs = math.prod(made.grid)
    places = machine.processors * occupancy(facts_of(made), cell, machine)
    uneven = made.is_dependent and programs < places < programs + made.before
    return min(places / programs - 1, MOST_CROWDED) if uneven else 0.0


def stream_of(
    facts: dict[str, int], grid: Sequence[int], cell: Cell, main: Loop, machine: Machine
) -> Stream:
    """A product with a matrix, which its programs cut into equal shares.

    A program may walk over several `blocks` of rows in one loop, and end each in a rare pass.
    """
    D = facts.get("D", facts["w_ptr.1"])  # of int4 the matrix holds half as many bytes
    rows, block_m, block_d = facts.get("M", 1), facts["BLOCK_M"], facts["BLOCK_D"]
    programs, groups = math.prod(grid), math.ceil(rows / block_m)
    columns = math.ceil(min(facts.get("split_d", D), D) / block_d)
    steps = columns * facts.get("blocks", 1)
    # of a step
    weight_bytes = sum(_size(facts, name) for name in WEIGHT) * groups / programs / steps
    x_bytes = min(rows, block_m) * block_d * facts.get("x_ptr.bytes", 2)
    return Stream(
        programs=programs,
        steps=steps,
        step_bytes=weight_bytes / groups,  # a further group of rows reads it from L2
        cycles=main.cycles + main.rare_cycles / columns,
        instructions=main.instructions,
        num_warps=facts.get("num_warps", 4),
        stages=facts.get("num_stages", 2),
        at_once=occupancy(facts, cell, machine),
        l2_bytes=weight_bytes * (1 - 1 / groups) + x_bytes,
        end_us=machine.us(cell.tail_cycles),
    )


def seen(facts: dict[str, int], context: int) -> int:
    """Keys that a row sees."""
    return min(context, facts["W"]) if facts.get("IS_LOCAL") else context


def cuts(facts: dict[str, int], context: int) -> list[int]:
    """Where the splits of a row of `context` keys begin, and their end: kernels/kv_splits.py."""
    split, first = facts["SPLIT"], context - seen(facts, context)
    if facts.get("IS_LOCAL"):
        inner = range((first // split + 1) * split, context, split)
        return [first, *inner, context]
    begins = []
    for number in range(count_splits(context, split)):
        octave = max(0, number // OCTAVE - 1)
        unit = number if number < UNIFORM_SPLITS else (OCTAVE + number % OCTAVE) << octave
        begins.append(unit * split)
    return [*begins, context]


def longest_run(bounds: Sequence[int], programs: int) -> int:
    """Keys of the program that has most: a split each, or those that begin in its share of keys."""
    splits = len(bounds) - 1
    if splits <= programs:
        return max(end - begin for begin, end in pairwise(bounds))
    first, end = bounds[0], bounds[-1]
    share = (end - first) // programs + 1
    runs: dict[int, list[int]] = {}
    for begin in bounds[:-1]:
        runs.setdefault((begin - first) // share, []).append(begin)
    starts = [*(run[0] for run in runs.values()), end]
    return max(end - begin for begin, end in pairwise(starts))


def attention_us(
    facts: dict[str, int],
    grid: Sequence[int],
    cell: Cell,
    main: Loop,
    context: int,
    machine: Machine,
) -> float:
    """Attention of a few rows: tiles of keys one after the other.

    What it knows of the kernel: a program takes a run of splits; the first axis of the grid is the
    programs of a tile of queries.
    """
    bounds, block_n = cuts(facts, context), facts["BLOCK_N"]
    splits, keys, heads = len(bounds) - 1, bounds[-1] - bounds[0], math.prod(grid[1:])
    at_once, num_warps = occupancy(facts, cell, machine), facts.get("num_warps", 4)
    tiles = math.ceil(longest_run(bounds, grid[0]) / block_n)
    working = min(splits, grid[0]) * heads
    waves = math.ceil(working / (machine.processors * at_once))
    together = min(at_once, math.ceil(working / machine.processors))
    issue = together * num_warps * main.instructions / 4 / machine.issue
    tile_us = machine.us(max(main.cycles, issue))
    tile_us = max(tile_us, machine.memory_us / max(1, facts.get("num_stages", 2) - 1))
    tile_bytes = 2 * block_n * facts.get("HEAD_DIM", 256) * facts.get("k_ptr.bytes", 2)
    tile_us = max(tile_us, 1e6 * together * tile_bytes / machine.processor_bandwidth)
    us = machine.start_us + machine.lookup_us + machine.fill_us
    us += max(
        waves * tiles * tile_us, 1e6 * heads * keys / block_n * tile_bytes / machine.bandwidth
    )
    return us + machine.us(min(cell.tail_cycles, 1000)) + machine.end_us


def combine_us(
    facts: dict[str, int], grid: Sequence[int], cell: Cell, context: int, machine: Machine
) -> float:
    """The sum of splits: each program reads BLOCK_S of them at a time, a few columns of each."""
    splits = len(cuts(facts, context)) - 1
    loop = next(loop for loop in cell.loops if loop.loads)
    passes = math.ceil(splits / facts["BLOCK_S"])
    at_once = occupancy(facts, cell, machine)
    waves = math.ceil(math.prod(grid) / (machine.processors * at_once))
    own_us = machine.us(passes * loop.cycles + cell.tail_cycles)
    read = 4 * splits * facts["BLOCK_D"] * math.prod(grid)
    us = max(waves * own_us, 1e6 * read / machine.l2_bandwidth)
    return machine.start_us + machine.lookup_us + us + machine.end_us
