"""The time of a product's launch, from its grid and the machine code of its loop.

A launch is a fluid: each program waits (start, first load), then drains its bytes at the
rate of its slowest limit, then ends.  A program's step takes the longest of

    the cycles of one pass through its main loop            machine_code.py
    the issue of all programs on its processor              four schedulers of ISSUE each
    a memory latency over the steps that are in flight      stages - 1

and all programs together get no more than the bandwidth of memory and of L2, of which half of the
processors draw a little more than the others: so programs do not keep step for long.  Programs
beyond what fits start as others end.  Nothing else is modelled: no cache but L2, no clock that
moves.

The constants are in machine.py.
"""

from dataclasses import dataclass

from gemcut.tools.machine import H200, Machine


@dataclass(frozen=True)
class Stream:
    """A launch whose programs stream a matrix; all of one size."""

    programs: int
    steps: float  # of a program
    step_bytes: float  # of memory
    cycles: float  # of a step of one program alone
    instructions: float  # of one warp in a step
    num_warps: int
    stages: int
    at_once: int  # programs on a processor
    l2_bytes: float = 0.0  # of a step, beside step_bytes
    end_us: float = 0.0  # of a program, after its last step


def bound_by(stream: Stream, machine: Machine = H200) -> str:
    """What the programs wait for while all processors stream: the slowest of the limits above.

    loop: a warp's own instructions and their latencies; issue: those of all warps; latency: of
    memory, with what is on its way; processor, L2, memory: bytes.
    """
    together = min(stream.at_once, -(-stream.programs // machine.processors))
    through_l2 = 1 + stream.l2_bytes / stream.step_bytes
    own_us = {  # of a processor, for a step of each of its programs
        "loop": machine.us(stream.cycles),
        "issue": machine.us(_issue_cycles(stream, together, machine)),
        "latency": machine.memory_us / max(1, stream.stages - 1),
    }
    rates = {
        "processor": machine.processor_bandwidth / through_l2,
        "L2": machine.l2_bandwidth / through_l2 / machine.processors,
        "memory": machine.bandwidth / machine.processors,
    }
    nbytes = together * stream.step_bytes
    times = own_us | {name: 1e6 * nbytes / rate for name, rate in rates.items()}
    return max(times, key=lambda name: times[name])


@dataclass
class _Group:
    """Processors in the same state, each with some programs: [number, us to wait, bytes left]."""

    processors: int
    weight: float  # of its share of the memory, where that is short
    programs: list[list[float]]


def stream_us(stream: Stream, machine: Machine = H200) -> float:
    """Microseconds from the start of a launch to the end of its last program."""
    total = stream.steps * stream.step_bytes
    wait = machine.start_us + machine.fill_us
    groups = _place(stream, machine, wait, total)
    queue = stream.programs - sum(
        group.processors * int(sum(number for number, _, _ in group.programs)) for group in groups
    )
    now = 0.0
    while groups:
        rates = _rates(groups, stream, machine)
        pace = min(
            left / rate if wait <= 0 and left > 0 else abs(wait)
            for group, rate in zip(groups, rates, strict=True)
            for _, wait, left in group.programs
        )
        now += pace
        for group, rate in zip(groups, rates, strict=True):
            for program in group.programs:
                _advance(program, pace, rate, stream.end_us + machine.end_us)
        groups, queue = _refill(groups, queue, stream, machine, total)
    return now


def _place(stream: Stream, machine: Machine, wait: float, total: float) -> list[_Group]:
    """The first programs, one on each processor before any has two."""
    each, more = divmod(stream.programs, machine.processors)
    if each >= stream.at_once:
        each, more = stream.at_once, 0
    groups = []
    for number, size in ((machine.processors - more, each), (more, each + 1)):
        near = number // 2
        for processors, sign in ((near, 1), (number - near, -1)):
            if processors and size:
                weight = 1 + sign * machine.unevenness
                groups.append(_Group(processors, weight, [[size, wait, total]]))
    return groups


def _rates(groups: list[_Group], stream: Stream, machine: Machine) -> list[float]:
    """Bytes a microsecond of one streaming program, by group."""
    own = machine.processor_bandwidth / 1e6
    through_l2 = 1 + stream.l2_bytes / stream.step_bytes
    most = min(machine.bandwidth, machine.l2_bandwidth / through_l2) / 1e6
    wanted, streams = [], []
    for group in groups:
        streaming = sum(n for n, wait, left in group.programs if wait <= 0 and left > 0)
        step_us = machine.us(max(stream.cycles, _issue_cycles(stream, streaming, machine)))
        step_us = max(step_us, machine.memory_us / max(1, stream.stages - 1))
        rate = stream.step_bytes / step_us
        if streaming:
            rate = min(rate, own / through_l2 / streaming)
        wanted.append(rate)
        streams.append(group.processors * streaming)
    return _shared(wanted, streams, [group.weight for group in groups], most)


def _issue_cycles(stream: Stream, programs: float, machine: Machine) -> float:
    """Cycles in which a processor issues a step of each of so many programs."""
    return programs * stream.num_warps * stream.instructions / 4 / machine.issue


def _shared(
    wanted: list[float], streams: list[float], weights: list[float], most: float
) -> list[float]:
    """Rates that are at most `most` together: each a weighted share, or what is wanted if less."""
    found, total = list(wanted), sum(w * n for w, n in zip(wanted, streams, strict=True))
    if total <= most:
        return found
    left, short = most, [i for i, n in enumerate(streams) if n]
    while short:
        level = left / sum(weights[i] * wanted[i] * streams[i] for i in short)
        full = [i for i in short if weights[i] * level >= 1]
        for i in full:
            left -= wanted[i] * streams[i]
        if not full:
            for i in short:
                found[i] = level * weights[i] * wanted[i]
            break
        short = [i for i in short if i not in full]
    return found


def _advance(program: list[float], us: float, rate: float, end_us: float) -> None:
    """Let time pass: first `wait` runs down to 0, then the bytes, then a negative `wait` to 0."""
    _, wait, left = program
    if wait > 0:
        program[1] = _settled(wait - us)
    elif left > 0:
        program[2] = left - rate * us
        if program[2] < 1:  # bytes
            program[1:] = [-max(end_us, 1e-6), 0.0]
    else:
        program[1] = min(0.0, -_settled(-wait - us))


def _settled(us: float) -> float:
    return us if us > 1e-9 else 0.0


def _refill(
    groups: list[_Group], queue: int, stream: Stream, machine: Machine, total: float
) -> tuple[list[_Group], int]:
    """Put waiting programs in place of those that ended; processors without any are dropped."""
    found = []
    for group in groups:
        kept = [p for p in group.programs if p[2] > 0 or p[1] < 0]
        free = stream.at_once - int(sum(number for number, _, _ in kept))
        # a successor on a processor is started at once; only a launch has a start of its own
        wait = machine.fill_us
        if len(kept) < len(group.programs) and queue and free:
            full = min(group.processors, queue // free)
            queue -= full * free
            sizes = [(full, free)]
            if full < group.processors:
                sizes += [(1, queue)] if queue else []
                queue = 0
            for processors, size in sizes:
                if processors:
                    copies = [list(program) for program in kept]
                    programs = [*copies, [size, wait, total]]
                    found.append(_Group(processors, group.weight, programs))
            group.processors -= sum(processors for processors, _ in sizes)
        if kept and group.processors:
            found.append(_Group(group.processors, group.weight, kept))
    return found, queue
