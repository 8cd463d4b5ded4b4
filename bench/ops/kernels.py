"""Times of each op beside its peers, and their shares of what the hardware allows.

    gemcut-bench kernels --models gemma-2-2b gemma-2-9b --json kernels.json
    gemcut-bench kernels --op rmsnorm geglu --peer liger torch.compile

Every op is called at the shapes that the models launch it with, on random inputs.  All contestants
of a case get the same inputs; each is first held to the oracle, and one that computes something
else is reported and not timed.  A share is the least time by the measured ceilings over its time.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from gemcut.bench.measure.ceilings import Cost, floor_us, measure_ceilings
from gemcut.bench.measure.machine import installed_versions
from gemcut.bench.measure.report_file import (
    FAILED,
    INTERRUPTED,
    NO_MEMORY,
    OK,
    WRONG,
    Record,
    Results,
    metric,
)
from gemcut.bench.measure.timing import Runs, Spread, Timing, input_sets, prepare_runs, time_runs
from gemcut.bench.ops.cases import CPU_GRID, GPU_GRID, Arguments, Case, Grid, Shapes
from gemcut.bench.ops.decode_cases import decode_cases, quantized_cases
from gemcut.bench.ops.library_peers import library_peers
from gemcut.bench.ops.op_check import Check
from gemcut.bench.ops.prefill_cases import prefill_cases
from gemcut.bench.ops.torch_peers import OpPeer, torch_peers
from gemcut.engine.checkpoints.stored_weights import check_quantization
from gemcut.engine.checks import check_int
from gemcut.engine.config.model_config import PUBLISHED
from gemcut.engine.execution.weights import QUANTIZATIONS
from gemcut.engine.info import find_config
from gemcut.engine.memory import free_bytes
from gemcut.engine.placement import choose_device, choose_dtype, choose_ops
from gemcut.kernels import cpu, reference
from gemcut.kernels.quantized_weight import QuantizedWeight

GEMCUT = "gemcut"
# the package that each peer comes from
PEERS: dict[str, str] = dict.fromkeys(
    ("torch", "torch.compile", "blas", "rms_norm", "sdpa", "flex"), "torch"
)
PEERS |= {"liger": "liger-kernel", "flashinfer": "flashinfer-python"}
PEERS |= dict.fromkeys(("torchao-int8", "torchao-int4"), "torchao")
PEERS |= dict.fromkeys(("gemlite-int8", "gemlite-int4"), "gemlite")
# not the parts of oracles, nor advance_, which moves some bytes a row
NOT_TIMED = ("advance_", "best_of_ranges", "filter_logits", "gumbel_noise")
OPS = [op for op in reference.__all__ if op not in NOT_TIMED]
GPU_MODELS, CPU_MODELS = ("gemma-2-2b", "gemma-2-9b"), ("demo",)
PLAIN = "none"  # weights as they are
ROUNDS = 10
Timer = Callable[[Mapping[str, Runs], int], dict[str, Timing]]
MEMORY_ERRORS = (MemoryError, torch.OutOfMemoryError)
# beside the inputs: the check's float64 copies, and what peers make of their inputs
COPIES_OF_A_CHECK, COPIES_OF_A_SET = 8, 3


@dataclass(frozen=True)
class Bench:
    """The settings that all cases of a run share."""

    device: torch.device
    dtype: torch.dtype
    ops: ModuleType
    peers: tuple[str, ...]
    rounds: int
    ceilings: Mapping[str, float]


def model_cases(shapes: Shapes, grid: Grid) -> list[Case]:
    """All cases of one model; lengths that it cannot hold are left out.

    Of quantised weights those are left that take them in decode.
    """
    if shapes.quantization is not None:
        return [*quantized_cases(shapes, grid)]
    return [*decode_cases(shapes, grid), *prefill_cases(shapes, grid)]


def contestants(case: Case, bench: Bench) -> dict[str, OpPeer]:
    """The contestants of a case by name: gemcut first, then the peers asked for."""
    ops = bench.ops
    settings = "reference ops" if ops is reference else "cpu ops" if ops is cpu else "kernels"
    own = OpPeer("gemcut", settings, lambda a: partial(getattr(ops, case.op), **case.own(a)))
    peers = library_peers(case)
    if "quantization" not in case.facts:
        peers |= torch_peers(case, bench.device)
    on_gpu = bench.device.type == "cuda"
    return {GEMCUT: own} | {
        name: peer
        for name, peer in peers.items()
        if name in bench.peers and (on_gpu or not peer.needs_gpu)
    }


def measure_case(
    case: Case, bench: Bench, by_name: Mapping[str, OpPeer], time: Timer = time_runs
) -> list[Record]:
    """One record for each contestant of a case, timed where it computes the op right."""
    records = {name: _describe(case, name, peer, bench) for name, peer in by_name.items()}
    try:
        sets = choose_input_sets(case, bench.device)
        torch.compiler.reset()  # compiled for other shapes, functions count against a limit
        inputs = [case.make() for _ in range(sets)]
    except MEMORY_ERRORS as error:
        for record in records.values():
            record.update(_failure(error))
        return list(records.values())

    check, runs = Check(case, inputs[0]), {}
    for name, peer in by_name.items():
        with _failures_in(records[name]):
            records[name] |= _checked(check, name, peer)
    for name, peer in by_name.items():  # only now: runs write into their inputs
        if records[name]["status"] == OK:
            with _failures_in(records[name]):
                runs[name] = prepare_runs([peer.build(a) for a in inputs], bench.device)
    for name, timing in time(runs, bench.rounds).items():
        records[name] |= _timed(_cost(case, by_name[name], inputs[0]), timing, sets, bench)
    return list(records.values())


def choose_input_sets(case: Case, device: torch.device) -> int:
    """How many input sets to rotate over; MemoryError says what is missing for them."""
    with FakeTensorMode():  # sizes without memory
        arguments = case.make()
        nbytes, own = _nbytes(arguments), _nbytes(case.own(arguments))
    sets = input_sets(own, device)
    needed = nbytes * (sets * COPIES_OF_A_SET + COPIES_OF_A_CHECK)
    missing = needed - free_bytes(device)
    if missing > 0:
        raise MemoryError(
            f"needs {needed / 1e9:.2f} GB on {device}, {missing / 1e9:.2f} GB more than are free"
        )
    return sets


def _nbytes(arguments: Arguments) -> int:
    values = arguments.values()
    return sum(value.nbytes for value in values if isinstance(value, Tensor | QuantizedWeight))


def _describe(case: Case, name: str, peer: OpPeer, bench: Bench) -> Record:
    return {
        "case": case.name,
        "contestant": name,
        "version": installed_versions([peer.package])[peer.package],
        "settings": peer.settings,
        "status": OK,
        "detail": "",
        "op": case.op,
        "model": case.model,
        "phase": case.phase,
        "dtype": str(bench.dtype).removeprefix("torch."),
        **case.facts,
    }


def _checked(check: Check, name: str, peer: OpPeer) -> Record:
    """Error and budget of a contestant, and whether it passes."""
    accuracy = check.gemcut(peer.build) if name == GEMCUT else check.peer(peer)
    found = {"error": accuracy.error, "budget": accuracy.budget}
    if accuracy.passed:
        return found
    detail = f"error {accuracy.error:.2e}, where {accuracy.budget:.2e} is allowed"
    return {"status": WRONG, "detail": detail, **found}


@contextmanager
def _failures_in(record: Record) -> Iterator[None]:
    """Note what a contestant raises as its own failure; the run goes on."""
    try:
        yield
    except Exception as error:
        record.update(_failure(error))


def _failure(error: Exception) -> Record:
    reason = next(iter(str(error).splitlines()), "")
    if isinstance(error, MEMORY_ERRORS):
        return {"status": NO_MEMORY, "detail": reason}
    return {"status": FAILED, "detail": f"{type(error).__name__}: {reason}"}


def _cost(case: Case, peer: OpPeer, arguments: Arguments) -> Cost:
    """The case's cost for this contestant: weights that it alone quantises have fewer bytes."""
    if peer.weight_bits is None or "quantization" in case.facts:
        return case.cost
    weight = arguments["weight"]
    saved = weight.nbytes - weight.numel() * peer.weight_bits // 8
    return replace(case.cost, read_bytes=case.cost.read_bytes - saved)


def _timed(cost: Cost, timing: Timing, sets: int, bench: Bench) -> Record:
    floor, bound = floor_us(cost, bench.ceilings)
    us = Spread.of(timing.cold_us).median
    return {
        "read_bytes": cost.read_bytes,
        "written_bytes": cost.written_bytes,
        "flops": cost.flops,
        "floor_us": floor,
        "bound": bound,
        "cold_us": metric(timing.cold_us),
        "warm_us": metric(timing.warm_us),
        "gbps": cost.nbytes / us / 1e3,
        "tflops": cost.flops / us / 1e6,
        "share": floor / us,
        "method": timing.method,
        "calls": timing.calls,
        "input_sets": sets,
    }


# The command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `gemcut-bench kernels`."""
    parser.add_argument(
        "--models", nargs="+", metavar="MODEL", help=f"of demo, {', '.join(PUBLISHED)}"
    )
    parser.add_argument("--op", nargs="+", metavar="OP", help="only these ops")
    parser.add_argument("--phase", choices=("decode", "prefill"), help="only this phase")
    parser.add_argument("--batch", nargs="+", type=int, metavar="N", help="rows of a decode step")
    parser.add_argument("--context", nargs="+", type=int, metavar="N", help="tokens in the cache")
    parser.add_argument("--tokens", nargs="+", type=int, metavar="N", help="tokens of a prompt")
    parser.add_argument(
        "--quantization",
        nargs="+",
        default=[PLAIN],
        choices=(PLAIN, *QUANTIZATIONS),
        help="of the weights of decode's products",
    )
    parser.add_argument("--peer", nargs="*", metavar="PEER", help=f"of {', '.join(PEERS)}")
    parser.add_argument("--rounds", type=int, default=ROUNDS, metavar="N")
    parser.add_argument("--ops", default="auto", help="auto, triton or reference: gemcut's own ops")


def run(arguments: argparse.Namespace) -> int:
    """Measure the cases asked for; the exit code, 1 where gemcut's own op is wrong or fails."""
    device = choose_device(arguments.device)
    dtype = choose_dtype(arguments.dtype, device)
    ops = choose_ops(arguments.ops, device)
    check_int("rounds", arguments.rounds, 1, 10**6)
    peers = choose_peers(arguments.peer)
    cases = choose_cases(arguments, device, dtype)

    settings = {key: value for key, value in vars(arguments).items() if _is_plain(value)}
    results = Results("kernels", settings, device, arguments.json)
    results.set_ceilings(measure_ceilings(device, dtype))
    print_ceilings(results.report["ceilings"], dtype)
    bench = Bench(device, dtype, ops, peers, arguments.rounds, results.report["ceilings"])
    try:
        for case in cases:
            records = measure_case(case, bench, contestants(case, bench))
            results.add(*records)
            print_records(records)
        results.finish()
    except KeyboardInterrupt:
        print(f"interrupted: {len(results.records)} rows are kept")
        return INTERRUPTED
    finally:
        results.print_line()
    own = [record for record in results.records if record["contestant"] == GEMCUT]
    return 1 if any(record["status"] in (WRONG, FAILED) for record in own) else 0


def choose_peers(names: Sequence[str] | None) -> tuple[str, ...]:
    """The peers asked for, or all that are installed; ValueError names another."""
    if names is None:
        missing = [package for package in PEERS.values() if not installed_versions([package])]
        if missing:
            print(f"not installed: {', '.join(dict.fromkeys(missing))}")
        return tuple(name for name, package in PEERS.items() if package not in missing)
    for name in names:
        if name not in PEERS:
            raise ValueError(f"peer {name!r} is unknown; there are {', '.join(PEERS)}")
        if not installed_versions([PEERS[name]]):
            raise ValueError(f"peer {name!r} needs the package {PEERS[name]}: pip install it")
    return tuple(names)


def choose_cases(
    arguments: argparse.Namespace, device: torch.device, dtype: torch.dtype
) -> list[Case]:
    """The cases asked for; ValueError where a name is unknown or none is left."""
    on_gpu = device.type == "cuda"
    grid = GPU_GRID if on_gpu else CPU_GRID
    for option, field in (("batch", "batches"), ("context", "contexts"), ("tokens", "tokens")):
        if (values := getattr(arguments, option)) is not None:
            for value in values:
                check_int(option, value, 1, 2**20)
            grid = replace(grid, **{field: tuple(values)})
    cases = []
    for model in arguments.models or (GPU_MODELS if on_gpu else CPU_MODELS):
        config = find_config(model)
        for name in arguments.quantization:
            quantization = None if name == PLAIN else name
            check_quantization(quantization, config)
            cases += model_cases(Shapes(model, config, device, dtype, quantization), grid)
    for op in arguments.op or ():
        if op not in OPS:
            raise ValueError(f"op {op!r} is unknown; there are {', '.join(OPS)}")
    wanted = [
        case
        for case in cases
        if case.op in (arguments.op or OPS) and arguments.phase in (None, case.phase)
    ]
    if not wanted:
        raise ValueError("no case is left: these models hold none of these lengths")
    return wanted


def _is_plain(value: object) -> bool:
    return isinstance(value, str | int | float | list | tuple | None)


def print_ceilings(ceilings: Mapping[str, float], dtype: torch.dtype) -> None:
    """The ceilings in one line."""
    print(
        f"read {ceilings['read_gbps']:.0f} GB/s, copy {ceilings['copy_gbps']:.0f} GB/s, "
        f"product {ceilings['matmul_tflops']:.3g} TFLOP/s in {str(dtype).removeprefix('torch.')}"
    )


def print_records(records: Sequence[Record]) -> None:
    """Print one case, a line for each contestant."""
    print(records[0]["case"])
    for line in _lines(records):
        print(f"    {line}", flush=True)


def _lines(records: Sequence[Record]) -> Iterator[str]:
    own = records[0].get("cold_us")
    for record in records:
        name = f"{record['contestant']:<14}"
        if record["status"] != OK:
            yield f"{name}{record['status']}: {record['detail']}"
            continue
        cold = record["cold_us"]
        compute = record["bound"] == "compute"
        rate = f"{record['tflops']:.3g} TFLOP/s" if compute else f"{record['gbps']:.0f} GB/s"
        line = (
            f"{name}{cold['median']:>10.1f} us ({cold['low']:.1f} - {cold['high']:.1f})"
            f"{record['warm_us']['median']:>10.1f} warm  {rate:>14}"
            f"{record['share']:>7.0%} of {record['bound']}"
        )
        if own is not None and record is not records[0]:
            ratios = [a / b for a, b in zip(cold["all"], own["all"], strict=True)]
            line += f"  gemcut x {Spread.of(ratios).median:.2f}"
        yield line
