"""The machine of a visit: its versions and ceilings, and what a launch and a load cost.

The gap is what a node of a CUDA graph costs the device, beside the work in it: the time of a graph
of empty kernels over their number, launched plainly and by programmatic dependent launch.
"""

import time
from collections.abc import Callable
from functools import partial

import torch

from gemcut.bench.measure.ceilings import measure_ceilings
from gemcut.bench.measure.machine import describe_machine
from gemcut.bench.measure.timing import Spread, capture, synchronize, time_replays
from gemcut.tools.visit.block import Visit
from gemcut.tools.visit.dependent_launch import chase, empty
from gemcut.tools.visit.report import OK

CLOCKS = ("driver", "sm_mhz", "max_sm_mhz")
NODES = 1000  # of the graph of empty kernels
ROUNDS = 10
LINKS = 1000  # loads of the chain
CHAINS = {"L2": 16 << 20, "memory": 1 << 30}  # bytes of the tensor that a chain leads through
FLUSHED = 256 << 20  # bytes that are written between two chains, several times L2
STRIDE = 1_000_003  # elements between two links: another page nearly every time


def run(visit: Visit) -> None:
    """Keep records of the machine, its ceilings, and on a GPU of what launches and loads take."""
    machine = describe_machine(visit.device)
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    clocks = [f"{name} {machine[name]}" for name in CLOCKS if name in machine]
    visit.add("machine", machine=machine, line=", ".join([*clocks, versions]))
    with visit.attempt("ceilings"):
        dtype = torch.bfloat16 if visit.on_gpu else torch.float32
        found = measure_ceilings(visit.device, dtype)
        told = "read {read_gbps:.0f} GB/s, copy {copy_gbps:.0f} GB/s, product {matmul_tflops:.3g}"
        line = f"{told.format(**found)} TFLOP/s"
        visit.add("ceilings", OK, line=line, **found)
    if not visit.on_gpu:
        visit.skip("launches", "a CPU launches nothing")
        return
    for name, dependent in (("gap", False), ("gap of dependent launches", True)):
        with visit.attempt(name):
            measure_gap(visit, name, partial(empty, dependent))
    for name, nbytes in CHAINS.items():
        with visit.attempt(f"a load from {name}"):
            measure_load(visit, name, nbytes)


def measure_gap(visit: Visit, name: str, launch: Callable[[], object]) -> None:
    """Keep a record of what a node of a graph takes on the device, and a replay on the host."""
    replay = capture([launch] * NODES).replay
    us = [each / NODES for each in time_replays(replay, 3, ROUNDS, visit.device)]
    host = []
    for _ in range(ROUNDS):
        synchronize(visit.device)
        started = time.perf_counter()
        replay()
        host.append(1e6 * (time.perf_counter() - started))
    synchronize(visit.device)
    gap, replayed = Spread.of(us), Spread.of(host)
    visit.add(
        name,
        gap_us=gap.median,
        host_us=replayed.median,
        line=f"{name}: {gap.median:.3f} us a node ({gap.low:.3f} - {gap.high:.3f}); "
        f"the host takes {replayed.median:.0f} us to replay {NODES}",
    )


def measure_load(visit: Visit, name: str, nbytes: int) -> None:
    """Keep a record of what a load takes whose address is the result of the one before."""
    count = nbytes // 4
    following = torch.arange(STRIDE, count + STRIDE, device=visit.device).remainder_(count).int()
    y = torch.empty(1, device=visit.device, dtype=torch.int32)
    other = torch.empty(FLUSHED, device=visit.device, dtype=torch.int8)
    # what was just read is in L2; for memory, other bytes were written in between
    reset = following.max if name == "L2" else other.zero_
    replay = capture([partial(chase, following, LINKS, y)]).replay
    times = time_replays(replay, 1, ROUNDS, visit.device, reset)
    ns = Spread.of([1e3 * each / LINKS for each in times])
    case = f"a load from {name}"
    visit.add(
        case, ns=ns.low, line=f"{case}: {ns.low:.0f} ns at least, {ns.median:.0f} in the median"
    )
