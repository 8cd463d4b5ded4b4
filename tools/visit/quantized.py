"""Products by quantised weights and a cache in fp8: checked, and timed beside their bytes.

For each format the products of gemma-2-9b: each is held to its oracle on the same weights in
float64 (bench/ops/op_check.py), its rows to the bits that they have alone, and is timed as
gemcut-bench kernels times it.  fp8 and int4 have the head in int8.  The ops that write and read a
cache in fp8 are checked too, and decode attention is timed on one.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch

from gemcut import kernels
from gemcut.bench.measure.ceilings import measure_ceilings
from gemcut.bench.ops.cases import Arguments, Case, Grid, Shapes
from gemcut.bench.ops.decode_cases import decode_cases, quantized_cases
from gemcut.bench.ops.kernels import GEMCUT, Bench, measure_case
from gemcut.bench.ops.prefill_cases import prefill_cases
from gemcut.bench.ops.torch_peers import OpPeer
from gemcut.engine.execution.cache import PREFILL_CHUNK
from gemcut.engine.execution.weights import QUANTIZATIONS
from gemcut.engine.info import find_config
from gemcut.kernels.checks import FP8
from gemcut.kernels.gpu_arch import converts_fp8
from gemcut.kernels.reference.ops import GREATEST_FP8
from gemcut.tools.launches import Launch, recorded
from gemcut.tools.visit.block import Visit
from gemcut.tools.visit.ops import Worst, check, same_bits

MODEL, CPU_MODEL = "gemma-2-9b", "demo"
ROUNDS = 5
ROWS = 3  # among which the first must have the bits that it has alone
CONTEXTS, CPU_CONTEXTS = (1024, 8192), (24,)  # of a cache in fp8
TOKENS, CPU_TOKENS = 512, 16
SCALE = 2.0**-6  # of the first head: 7 is the greatest number that it holds


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
    if converts_fp8(device):
        check_cache(visit, device, bench, worst)
    visit.add("worst", line=f"the worst of {worst.checked} took {worst.share:.0%} of its budget")


def find_cases(visit: Visit, device: torch.device, quantization: str, batch: int) -> Iterator[Case]:
    """The products of a model in one format."""
    model = MODEL if visit.on_gpu else CPU_MODEL
    shapes = Shapes(model, find_config(model), device, torch.bfloat16, quantization)
    return quantized_cases(shapes, Grid((batch,), (), (), 1, PREFILL_CHUNK))


def check_cache(visit: Visit, device: torch.device, bench: Bench | None, worst: Worst) -> None:
    """Keep a record for each op on a cache in fp8, and on a GPU the times of decode attention."""
    told = []
    for case, company in zip(
        cache_cases(visit, device, 1), cache_cases(visit, device, ROWS), strict=True
    ):
        with visit.attempt(case.name):
            check(visit, case, worst)
            if case.phase == "decode":
                visit.check(f"rows of {company.name}", same_bits(company, 0, 1), "row 0 differs")
            if case.op == "attention_decode" and bench is not None:
                label = f"{case.facts['layer']} {case.facts['context']}"
                told.append(f"{label} {measure(visit, case, bench).removeprefix(f'{case.op} ')}")
    if told:
        line = f"{MODEL} attention on fp8, us (share): {', '.join(told)}"
        visit.add("attention on fp8", line=line)


def cache_cases(visit: Visit, device: torch.device, batch: int) -> Iterator[Case]:
    """The ops of a model that write or read its cache, which is in fp8."""
    model = MODEL if visit.on_gpu else CPU_MODEL
    contexts, tokens = (CONTEXTS, TOKENS) if visit.on_gpu else (CPU_CONTEXTS, CPU_TOKENS)
    shapes = Shapes(model, find_config(model), device, torch.bfloat16)
    grid = Grid((batch,), contexts, (tokens,), 1, PREFILL_CHUNK)
    for case in (*decode_cases(shapes, grid), *prefill_cases(shapes, grid)):
        is_read = case.op in ("attention_decode", "attention_prefill")
        if case.facts.get("variant") == "no softcap":  # which the model does not launch
            continue
        if is_read or case.op in ("linear_rope_and_store_", "rope_and_store_"):
            cost = case.cost
            if is_read:  # beside the rows of q, as many as are written, it is keys and values
                keys = cost.read_bytes - cost.written_bytes
                cost = replace(cost, read_bytes=cost.written_bytes + keys // 2)
            facts = case.facts | {"cache": "fp8"}
            yield replace(case, facts=facts, cost=cost, own=in_fp8)


def in_fp8(arguments: Arguments) -> Arguments:
    """The same arguments with a cache in fp8, each head at a scale of its own."""
    own = dict(arguments)
    for name in ("k", "v"):
        cache = arguments[f"{name}_cache"]  # [slots, HK, C, K]
        scale = SCALE * torch.arange(1, cache.shape[1] + 1, device=cache.device)
        values = cache.float() / scale.view(-1, 1, 1)
        own[f"{name}_cache"] = values.clamp(-GREATEST_FP8, GREATEST_FP8).to(FP8)
        own[f"{name}_scale"] = scale
    return own


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
        if converts_fp8(torch.device("cuda", 0)):
            for batch in (1, ROWS):
                for case in cache_cases(visit, torch.device("cuda", 0), batch):
                    getattr(kernels, case.op)(**case.own(case.make()))
    return found
