"""Products of a decode step by quantised weights: checked, and timed beside their bytes.

For each format the products of gemma-2-9b: each is held to its oracle on the same weights in
float64 (bench/ops/op_check.py), its rows to the bits that they have alone, and is timed as
gemcut-bench kernels times it.  fp8 and int4 have the head in int8.
"""

from collections.abc import Iterator
from functools import partial

import torch

from gemcut import kernels
from gemcut.bench.measure.ceilings import measure_ceilings
from gemcut.bench.ops.cases import Case, Grid, Shapes
from gemcut.bench.ops.decode_cases import quantized_cases
from gemcut.bench.ops.kernels import GEMCUT, Bench, measure_case
from gemcut.bench.ops.torch_peers import OpPeer
from gemcut.engine.execution.cache import PREFILL_CHUNK
from gemcut.engine.execution.weights import QUANTIZATIONS
from gemcut.engine.info import find_config
from gemcut.tools.launches import Launch, recorded
from gemcut.tools.visit.block import Visit
from gemcut.tools.visit.ops import Worst, check, same_bits

MODEL, CPU_MODEL = "gemma-2-9b", "demo"
ROUNDS = 5
ROWS = 3  # among which the first must have the bits that it has alone


def run(visit: Visit) -> None:
    """Keep a record for each product and format, and on a GPU its time and a line a format."""
    device, worst = visit.device, Worst()
    bench = None
    if visit.on_gpu:
        ceilings = measure_ceilings(device, torch.bfloat16)
        bench = Bench(device, torch.bfloat16, kernels, (), ROUNDS, ceilings)
    for quantization in QUANTIZATIONS:
        told = []
        for case, company in zip(
            find_cases(visit, device, quantization, 1),
            find_cases(visit, device, quantization, ROWS),
            strict=True,
        ):
            with visit.attempt(case.name):
                check(visit, case, worst)
                visit.check(f"rows of {company.name}", same_bits(company, 0, 1), "row 0 differs")
                told += [] if bench is None else [measure(visit, case, bench)]
        if told:
            visit.add(quantization, line=f"{MODEL} {quantization}, us (share): {', '.join(told)}")
    visit.add("worst", line=f"the worst of {worst.checked} took {worst.share:.0%} of its budget")


def find_cases(visit: Visit, device: torch.device, quantization: str, batch: int) -> Iterator[Case]:
    """The products of a model in one format."""
    model = MODEL if visit.on_gpu else CPU_MODEL
    shapes = Shapes(model, find_config(model), device, torch.bfloat16, quantization)
    return quantized_cases(shapes, Grid((batch,), (), (), 1, PREFILL_CHUNK))


def measure(visit: Visit, case: Case, bench: Bench) -> str:
    """Keep a record of the time of one product: its op, microseconds, the share of its bytes."""
    own = OpPeer("gemcut", "kernels", lambda a: partial(getattr(kernels, case.op), **case.own(a)))
    (found,) = measure_case(case, bench, {GEMCUT: own})
    name = str(case.facts.get("weight", case.op))
    if "cold_us" not in found:
        visit.add(f"time of {case.name}", found["status"], detail=found["detail"])
        return f"{name} {found['status']}"
    us, share = found["cold_us"]["median"], found["share"]
    visit.add(f"time of {case.name}", us=us, floor_us=found["floor_us"], share=share)
    return f"{name} {us:.1f} ({share:.2f})"


def record(visit: Visit, arch: str) -> set[Launch]:
    """What this block launches: recorded, not made."""
    with recorded(arch) as found:
        for quantization in QUANTIZATIONS:
            for batch in (1, ROWS):
                for case in find_cases(visit, torch.device("cuda", 0), quantization, batch):
                    getattr(kernels, case.op)(**case.own(case.make()))
    return found
