"""The time of a decode step, by events around replays of one graph, and its longest kernels.

The step is the engine's own, with its choice of a token (profile_step.py), over random weights.  It
is timed by plain launches too, and of one model at a longer context with a cache in fp8.
A share is how much of its time moving its bytes would take at the bandwidth of reading that the
visit measured.
"""

import gc
import json
from itertools import product

import torch

from gemcut import kernels
from gemcut.bench.engines.random_model import published_config
from gemcut.bench.engines.setup import Setup
from gemcut.bench.measure.timing import Spread, capture, time_replays
from gemcut.engine.checkpoints.hub import DEMO
from gemcut.engine.config.model_config import ModelConfig
from gemcut.engine.execution.model import Gemma
from gemcut.engine.execution.weights import empty_weights
from gemcut.kernels.gpu_arch import converts_fp8
from gemcut.kernels.launch_switch import dependent_launches
from gemcut.tools.launches import Launch, recorded
from gemcut.tools.profile_step import (
    ROUNDS,
    WARM_UP,
    DecodeStep,
    Profile,
    breakdown,
    make_step,
    measure,
)
from gemcut.tools.visit import bits
from gemcut.tools.visit.block import Visit

CONTEXT, STEPS = 1000, 20  # vaultgemma-1b holds 1024 tokens
CASES = (("vaultgemma-1b", (1,)), ("gemma-2-2b", (1,)), ("gemma-2-9b", (1, 16)))
CASES += (("gemma-3-1b", (1,)),)
CPU_CASES = (("demo", (1, 2)),)
CPU_CONTEXT, CPU_STEPS = 24, 2
FP8_MODEL, FP8_CONTEXT = "gemma-2-9b", 8000  # a tenth of its bytes are keys and values
RECORDED_LAYERS = 6  # Gemma 3 has a global one in six
DESCRIBED = 3  # kernels that the table names
ROOM = 10.0  # seconds that a model takes at most; with less left it is not begun


def run(visit: Visit) -> None:
    """Keep a record for each model and batch, and write breakdown-MODEL-bB.json."""
    for model, batches in CASES if visit.on_gpu else CPU_CASES:
        if visit.left < ROOM:
            visit.skip(model, "no time was left")
            continue
        with visit.attempt(model):
            measure_model(visit, model, batches)
        gc.collect()
        if visit.on_gpu:
            torch.cuda.empty_cache()


def record(arch: str) -> set[Launch]:
    """What these steps launch, and the steps that the bits block replays: recorded, not made."""
    found: set[Launch] = set()
    cases = [(model, batch, CONTEXT, STEPS + WARM_UP) for model, each in CASES for batch in each]
    cases.append((bits.MODEL, bits.BATCH, bits.CONTEXT - 1, 1))
    cases = [(*case, "auto") for case in cases]
    for cache in ("auto", "fp8")[: 1 if arch == "sm_80" else 2]:
        cases.append((FP8_MODEL, 1, FP8_CONTEXT, STEPS + WARM_UP, cache))
    for (model, batch, context, room, cache), dependent in product(cases, (True, False)):
        config = published_config(model, RECORDED_LAYERS)
        with recorded(arch) as launches, dependent_launches(dependent):
            device = torch.device("cuda", 0)
            weights = empty_weights(config, device=device, dtype=torch.bfloat16)
            step = DecodeStep(Gemma(config, weights, kernels), batch, context, room, cache)
            step.run()
            step.steps.logits(step.slots)
            found |= launches
    return found


def measure_model(visit: Visit, model: str, batches: tuple[int, ...]) -> None:
    """Measure steps of one model, whose weights are drawn once."""
    if visit.on_gpu:
        setup = Setup(model, published_config(model), visit.device, torch.bfloat16)
        context, steps = CONTEXT, STEPS
    else:
        config = ModelConfig.from_file(DEMO)
        setup = Setup(model, config, visit.device, torch.float32, DEMO)
        context, steps = CPU_CONTEXT, CPU_STEPS
    for batch in batches:
        case = f"{model}/batch={batch}/context={context}"
        with visit.attempt(case):
            profile = measure(setup, batch, context, steps)
            content = breakdown(setup, batch, context, profile)
            file = visit.out / f"breakdown-{model}-b{batch}.json"
            file.write_text(json.dumps(content, indent=1) + "\n")
            facts = {"model": model, "batch": batch, "context": context}
            facts |= {"step_us": content["step_us"], "step_bytes": profile.step_bytes}
            visit.add(case, **facts, line=f"{case}: {describe(profile, visit.read_gbps)}")
            visit.add(f"{case}, its kernels", line=f"    {longest(profile)}")
            if visit.on_gpu:
                with dependent_launches(False):
                    plain = step_us(setup, batch, context, steps).median
                own = Spread.of(profile.step_us).median
                line = f"    {plain:.0f} us by plain launches ({own / plain:.3f})"
                visit.add(f"{case}, plain launches", step_us=plain, line=line)
    if model in (FP8_MODEL, "demo") and converts_fp8(visit.device):
        compare_caches(visit, setup, FP8_CONTEXT if visit.on_gpu else CPU_CONTEXT, steps)


def compare_caches(visit: Visit, setup: Setup, context: int, steps: int) -> None:
    """Keep a record: a step of one row with a cache of floats and with one in fp8."""
    case = f"{setup.name}/context={context}, cache in fp8"
    with visit.attempt(case):
        plain, fp8 = (
            step_us(setup, 1, context, steps, kv_cache_dtype).median
            for kv_cache_dtype in ("auto", "fp8")
        )
        line = f"{case}: {fp8:.0f} us, of floats {plain:.0f} us ({fp8 / plain:.3f})"
        visit.add(case, step_us=fp8, plain_us=plain, line=line)


@torch.inference_mode()
def step_us(
    setup: Setup, batch: int, context: int, steps: int, kv_cache_dtype: str = "auto"
) -> Spread:
    """Microseconds of a step, on a GPU one of a graph's replays; nothing is profiled."""
    step = make_step(setup, batch, context, steps + WARM_UP, kv_cache_dtype)
    replay = capture([step.run]).replay if setup.device.type == "cuda" else step.run
    step.reset()
    replay()
    return Spread.of(time_replays(replay, steps, ROUNDS, setup.device, step.reset))


def describe(profile: Profile, read_gbps: float | None) -> str:
    """A step in one line: its time, and its share of the bandwidth."""
    us = Spread.of(profile.step_us)
    gbps = profile.step_bytes / us.median / 1e3
    share = "" if read_gbps is None else f" ({gbps / read_gbps:.3f} of reading)"
    return f"{us.median:.0f} us ({us.low:.0f} - {us.high:.0f}), {gbps:.0f} GB/s{share}"


def longest(profile: Profile) -> str:
    """A step's profile in one line: launches, gaps, and the longest kernels."""
    launches = sum(line.launches for line in profile.lines)
    gaps = sum(line.gap_us for line in profile.lines)
    kernels = ", ".join(
        f"{line.kernel.removesuffix('_kernel')[:20]} {line.us:.0f}"
        for line in profile.lines[:DESCRIBED]
    )
    return f"{launches:.0f} launches, gaps {gaps:.0f} us; {kernels}"
