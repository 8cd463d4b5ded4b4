"""Compilation of all that a visit launches into Triton's cache, before it is needed.

Launches are recorded on fake tensors (launches.py), of the models and of the cases
of the next blocks, and compiled in as many processes as there are cores.  Then a few steps run on
the GPU in this process, which has compiled nothing: a kernel that it must still compile was not
where Triton's launcher looked for it.
"""

import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from typing import Any

import torch
from triton import knobs
from triton.runtime import driver

from gemcut import kernels
from gemcut.bench.engines.random_model import published_config, random_weights
from gemcut.engine.config.model_config import PUBLISHED, ModelConfig
from gemcut.engine.execution.model import Gemma
from gemcut.engine.execution.sampler import GREEDY
from gemcut.kernels.gpu_arch import arch_of
from gemcut.tools.compile_report import Cell, compile_launch, compiled_kernel
from gemcut.tools.launches import BATCHES, MAX_SEQ_LEN, Launch, launches
from gemcut.tools.profile_step import DecodeStep
from gemcut.tools.visit import (
    attention,
    bits,
    capture,
    memcheck,
    ops,
    pdl,
    peers,
    quantized,
    steps,
    waits,
)
from gemcut.tools.visit.block import Visit
from gemcut.tools.visit.ops import MODELS

LAYERS = 2  # of the models whose steps are run: one of each kind
FEW = 2  # variants that are compiled on a CPU, to try this block itself


def run(visit: Visit) -> None:
    """Keep records of what failed to compile, the time of all, and what was not found again."""
    name = arch_of(visit.device) if visit.on_gpu else "sm_90"
    started = time.monotonic()
    wanted: dict[Launch, None] = {}
    for what, record in recorders(visit, name).items():
        with visit.attempt(f"launches of {what}"):
            wanted |= dict.fromkeys(record())
    chosen = list(wanted) if visit.on_gpu else list(wanted)[:FEW]
    print(f"{len(chosen)} variants, noted in {time.monotonic() - started:.1f} s", flush=True)
    compile_all(visit, chosen)
    if not visit.on_gpu:
        visit.skip("found by the launcher", "a CPU launches nothing")
        return
    for model in MODELS:
        with visit.attempt(f"found by the launcher: {model}"):
            find_again(visit, model)


def recorders(visit: Visit, name: str) -> dict[str, Callable[[], set[Launch]]]:
    """What records the launches of each block; on a CPU only those of its own sizes."""
    found: dict[str, Callable[[], set[Launch]]] = {
        "the checks": partial(ops.record_cases, visit, name),
        "the texts": partial(bits.record_text, name),
    }
    if visit.on_gpu:
        found |= {model: partial(launches, PUBLISHED[model], name) for model in MODELS}
        found["a graph of one's own"] = partial(capture.record, name)
        found["the waits"] = partial(waits.record, name)
        found["the steps"] = partial(steps.record, name)
        found["dependent launches"] = partial(pdl.record, visit, name)
        found["attention"] = partial(attention.record, visit, name)
        found["quantised weights"] = partial(quantized.record, visit, name)
        found["memcheck"] = partial(memcheck.record, name)
        beside = PUBLISHED[peers.MODEL]
        found["the peers"] = partial(launches, beside, name, (1,), peers.LENGTH)
    return found


def compile_all(visit: Visit, wanted: Sequence[Launch]) -> None:
    """Keep a record for each launch that does not compile, and one for all of them."""
    started, seconds, compiled = time.monotonic(), 0.0, 0
    # spawned: a fork would inherit torch's threads
    with ProcessPoolExecutor(_cores(), mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(prepare, each, visit.on_gpu): each for each in wanted}
        for future in as_completed(futures):
            cell = _cell(visit, futures[future], future)
            if cell is not None:
                seconds, compiled = seconds + cell.seconds, compiled + 1
    wall = time.monotonic() - started
    visit.add(
        "compiled",
        seconds=wall,
        line=f"{compiled} of {len(wanted)} variants compiled in {wall:.0f} s, "
        f"{seconds:.0f} s of {_cores()} processes",
    )


def prepare(launch: Launch, with_launcher: bool) -> Cell:
    """Compile one launch, and the C stub by which Triton launches it, a second of gcc each."""
    cell = compile_launch(launch, [], fresh=False)
    if with_launcher and cell.error is None:
        kernel = compiled_kernel(launch)
        active: Any = driver.active
        active.launcher_cls(kernel.src, kernel.metadata)
    return cell


def _cell(visit: Visit, launch: Launch, future: Future[Cell]) -> Cell | None:
    case = f"{launch.kernel} {dict(launch.options)} {hash(launch) & 0xFFFF:04x}"
    with visit.attempt(case):
        cell = future.result()
        if cell.error is None:
            return cell
        visit.add(case, "failed", detail=cell.error)
    return None


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


@torch.inference_mode()
def find_again(visit: Visit, model: str) -> None:
    """Keep a record of the kernels that steps of a model, cut to a few layers, still compile."""
    missed: list[str] = []

    def listen(*, src: Any, cache_hit: bool, **_: Any) -> None:
        if not cache_hit:
            missed.append(src.name)

    config = published_config(model, LAYERS)
    weights = random_weights(config, device=visit.device, dtype=torch.bfloat16)
    knobs.compilation.listener = listen
    try:
        launched = launch_steps(config, Gemma(config, weights, kernels))
    finally:
        knobs.compilation.listener = None
    case = f"found by the launcher: {model}"
    told = f"compiled again: {', '.join(_counted(missed))}"
    line = f"{case}: steps of {launched} rows compiled nothing"
    visit.check(case, not missed, told, line=line)


def launch_steps(config: ModelConfig, model: Gemma) -> str:
    """Decode eagerly at the sizes that `launches` notes; the numbers of rows."""
    length = min(MAX_SEQ_LEN, config.context_length)
    step = DecodeStep(model, max(BATCHES), length - 1, room=1)
    for batch in BATCHES:
        step.reset()
        step.steps.decode(torch.arange(batch, device=model.device), GREEDY)
    torch.cuda.synchronize()
    return ", ".join(map(str, BATCHES))


def _counted(names: Iterable[str]) -> list[str]:
    names = list(names)
    return [f"{name} x {names.count(name)}" for name in dict.fromkeys(names)]
