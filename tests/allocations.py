"""Measured allocations: bytes of the tensors that an object reaches, and the peak of a run."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from gemcut.engine import Engine, SamplingParams
from gemcut.engine.memory import Build, Estimate
from gemcut.kernels.cpu_products import blocks_are_fast

# every setting in use: the most that a choice of tokens takes
ALL_SETTINGS = SamplingParams(
    temperature=0.7,
    top_k=50,
    top_p=0.9,
    min_p=0.01,
    repetition_penalty=1.1,
    presence_penalty=0.1,
    frequency_penalty=0.1,
    logit_bias={5: 1.0},
    allowed_token_ids=list(range(90)),
    max_tokens=1,
    min_tokens=1,
    ignore_eos=True,
    seed=0,
)

# slots, tokens of each, tokens of a chunk
SIZES = {
    "one chunk": (8, 128, 128),
    "four chunks": (2, 128, 32),
    "chunks shorter than drafts": (1, 128, 4),
    "more slots than a chunk has tokens": (18, 32, 16),
}


def make_engine(
    folder: Path, sizes: tuple[Any, Any, int], dtype: str = "float32", **arguments: Any
) -> Engine:
    """An engine of these sizes on the CPU."""
    slots, length, chunk = sizes
    arguments |= {"max_batch_size": slots, "max_seq_len": length, "prefill_chunk": chunk}
    return Engine.from_pretrained(folder, device="cpu", dtype=dtype, **arguments)


def tensors(root: Any) -> Iterator[Tensor]:
    """Every tensor within reach of `root`, through attributes and containers."""
    seen, waiting = set(), [root]
    while waiting:
        value = waiting.pop()
        if id(value) in seen or isinstance(value, type | ModuleType | FunctionType):
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict):
            waiting += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple | set | frozenset):
            waiting += value
        else:
            waiting += vars(value).values() if hasattr(value, "__dict__") else ()


def tensor_bytes(root: Any) -> int:
    """Bytes of the storages of all tensors within reach; a shared storage counts once."""
    found = list(tensors(root))
    storages = [x.untyped_storage() for x in found if not x.is_mkldnn]
    packed = {id(x): x.numel() * x.element_size() for x in found if x.is_mkldnn}
    return sum({x._cdata: x.nbytes() for x in storages}.values()) + sum(packed.values())


def estimate_of(engine: Engine) -> Estimate:
    """The estimate of an engine's memory, from the arguments that it was made with."""
    model, cache = engine.model, engine.cache
    is_fp8 = cache.layers[0].k.dtype == torch.float8_e4m3fn
    build = Build(
        engine.config, model.device, model.dtype, model.ops, cache.prefill_chunk,
        kv_cache_dtype="fp8" if is_fp8 else "auto",
    )  # fmt: skip
    return build.estimate(cache.num_slots, engine.max_seq_len)


def work_hard(engine: Engine) -> None:
    """The longest prefill, then steps of all slots, with every setting in use."""
    slots = engine.cache.num_slots
    _run(engine, [[2] + [7] * (engine.max_seq_len - 2)], ALL_SETTINGS)
    # one sequence a step is prefilled: with so many tokens all run together at last
    count = slots + 3
    _run(engine, [[2]] * slots, replace(ALL_SETTINGS, max_tokens=count, min_tokens=count))


@torch.inference_mode()
def _run(engine: Engine, prompts: list[list[int]], params: SamplingParams) -> None:
    """Make the steps in this thread: a profiler sees no other."""
    loop = engine._loop
    for request in engine._builder.batch(prompts, params)[0]:
        loop.add(request)
    while loop.is_busy:
        loop.step()


def peak_on_cpu(work: Callable[[], Any], mapped: Path) -> int:
    """The most bytes that torch held at a time during `work`, which loads an engine.

    The checkpoint's file does not count: the profiler counts it when it is mapped, but those are
    pages that the page cache gives back.  Nor do the 25 MB of what is measured once in a process.
    """
    blocks_are_fast()
    with mock.patch("gemcut.engine.loading.in_temporary_thread", lambda load: load()):
        return peak_bytes(work, aside=mapped.stat().st_size)


def peak_bytes(work: Callable[[], Any], aside: int | None = None) -> int:
    """The most bytes that torch held at a time during `work`, except tensors of `aside` bytes."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    assert profiled.profiler is not None
    assert profiled.profiler.kineto_results is not None
    held = peak = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]" and abs(event.nbytes()) != aside:
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def resident() -> dict[str, int]:
    """Bytes of this process in physical memory: the peak so far, private ones, and of files."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    names = ("VmHWM", "RssAnon", "RssFile")
    return {name: int(lines[name].split()[0]) * 1024 for name in names}


def main(folder: str, slots: str, length: str) -> None:
    """Print how much a process grows while it serves a checkpoint, and its estimate."""
    with Engine.from_pretrained("demo", device="cpu", max_batch_size=2) as engine:
        work_hard(engine)  # so that torch's own memory is there before
    del engine
    before = resident()
    with Engine.from_pretrained(
        folder, device="cpu", max_batch_size=int(slots), max_seq_len=int(length)
    ) as engine:
        loaded = resident()
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
        work_hard(engine)
        peak = resident()["VmHWM"] - before["RssAnon"] - before["RssFile"]
        print(peak, loaded["VmHWM"] - before["RssAnon"] - before["RssFile"], end=" ")
        print(estimate_of(engine).total)


if __name__ == "__main__":
    main(*sys.argv[1:])
