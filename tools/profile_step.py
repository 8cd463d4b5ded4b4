"""Profile of a decode step: its kernels and the gaps between them.

    python -P -m gemcut.tools.profile_step --random gemma-2-2b --context 1024 --out FOLDER
    python -P -m gemcut.tools.profile_step --device cpu

A step is the engine's own: the newest token of each row goes through the model, the greatest logit
is chosen, and the row's state is advanced.  The first one is at the end of `--context` tokens.
On a GPU it is replayed as one CUDA graph, or launched kernel by kernel with `--eager`; on a CPU it
is broken into ops.  A gap is the time in which nothing runs before a kernel begins.  The profiler
slows what it watches: what a step takes is measured without it, by events around replays in a row
(by a clock on a CPU).  FOLDER gets step.json, to be opened in chrome://tracing or
ui.perfetto.dev, and breakdown.json.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import wraps
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from gemcut.bench.engines.setup import Setup, add_model_arguments, choose_setup
from gemcut.bench.engines.step_bytes import decode_bytes
from gemcut.bench.measure.machine import describe_machine
from gemcut.bench.measure.report_file import metric, print_table
from gemcut.bench.measure.timing import Spread, capture, synchronize, time_replays
from gemcut.engine.checks import check_int
from gemcut.engine.execution.cache import PREFILL_CHUNK, KVCache
from gemcut.engine.execution.model import Gemma
from gemcut.engine.execution.sampler import GREEDY
from gemcut.engine.execution.slot_state import SlotState
from gemcut.engine.execution.steps import Steps
from gemcut.engine.placement import choose_cache_dtype
from gemcut.kernels.checks import FP8

WARM_UP = 3  # steps before the profile
ROUNDS = 10  # of timed steps
LONGEST_NAME = 48  # of a kernel, in the table
OP = "op "  # how spans of ops begin


@dataclass(frozen=True)
class Span:
    """A kernel, or on a CPU an op, as it ran once."""

    name: str
    start_us: float
    end_us: float


@dataclass
class Line:
    """All launches of one kernel, averaged over steps."""

    kernel: str
    launches: float = 0.0
    us: float = 0.0
    gap_us: float = 0.0  # before its launches


def break_down(spans: Iterable[Span], steps: int) -> list[Line]:
    """The lines of a step, the longest first; the sums of `us` and `gap_us` are the whole step.

    Spans that overlap share no time: each counts from where the one before it ended.
    """
    lines: dict[str, Line] = {}
    busy_until = None
    for span in sorted(spans, key=lambda span: span.start_us):
        line = lines.setdefault(span.name, Line(span.name))
        begin = span.start_us if busy_until is None else max(span.start_us, busy_until)
        line.launches += 1 / steps
        line.us += max(0.0, span.end_us - begin) / steps
        if busy_until is not None:
            line.gap_us += max(0.0, span.start_us - busy_until) / steps
        busy_until = max(span.end_us, busy_until or span.end_us)
    return sorted(lines.values(), key=lambda line: -line.us)


class DecodeStep:
    """A decode step as the engine makes it: the greedy choice of each row begins the next step."""

    def __init__(
        self, model: Gemma, batch: int, context: int, room: int, kv_cache_dtype: str = "auto"
    ) -> None:
        """Rows at the end of `context` tokens of random keys; `room` steps fit after these."""
        config, device = model.config, model.device
        # capacities that 16 divides get other variants of the kernels than those it does not
        capacity = -(-(context + room) // 16) * 16
        scale = torch.full((config.num_kv_heads,), 2.0**-6, device=device)
        self.cache = KVCache(
            config,
            num_slots=batch,
            max_seq_len=capacity,
            prefill_chunk=PREFILL_CHUNK,
            device=device,
            dtype=choose_cache_dtype(kv_cache_dtype, model.dtype, device),
            scales=[(scale, scale)] * config.num_layers if kv_cache_dtype == "fp8" else None,
        )
        for layer in self.cache.layers:
            for x in (layer.k, layer.v):
                if x.dtype == FP8:
                    x.view(torch.uint8).random_(0, 127)  # any number above 0; 127 is a NaN
                else:
                    x.normal_()
        self.state = SlotState(batch, config.vocab_size, device)
        self.state.limits.fill_(capacity + 1)
        self.steps = Steps(model, self.cache, self.state)
        self.slots = torch.arange(batch, device=device)
        self._begin = torch.full((2, batch), context - 1, device=device)  # tokens, positions
        self._begin.select(0, 0).random_(4, config.vocab_size)
        self.reset()

    def reset(self) -> None:
        """Return to where the first step began; no launch of it is part of a step."""
        self.state.newest.narrow(1, 0, self._begin.shape[1]).copy_(self._begin)

    def run(self) -> Tensor:
        """One step: the ids [batch] that were chosen."""
        return self.steps.decode(self.slots, GREEDY)


def make_step(
    setup: Setup, batch: int, context: int, room: int, kv_cache_dtype: str = "auto"
) -> DecodeStep:
    """A step of the model asked for; on a CPU its ops are seen by the profiler."""
    model = setup.model
    if setup.device.type != "cuda":
        model = Gemma(setup.config, model.weights, _spanned(model.ops))
    return DecodeStep(model, batch, context, room, kv_cache_dtype)


def _spanned(ops: ModuleType) -> Any:
    """The same ops, each of which the profiler sees as one span."""

    def spanned(name: str, op: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(op)
        def call(*args: Any, **kwargs: Any) -> Any:
            with record_function(OP + name):
                return op(*args, **kwargs)

        return call

    return SimpleNamespace(**{name: spanned(name, getattr(ops, name)) for name in ops.__all__})


def profile_steps(
    step: Callable[[], object],
    steps: int,
    device: torch.device,
    trace: Path | None,
    reset: Callable[[], object],
) -> list[Span]:
    """The spans of so many steps, one after the other, from a reset on."""
    reset()
    for _ in range(WARM_UP):
        step()
    reset()
    synchronize(device)
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        for _ in range(steps):
            step()
        synchronize(device)
    if trace is not None:
        profiler.export_chrome_trace(str(trace))
    spans = []
    for event in profiler.events() or ():
        if event.device_type.name == "CUDA" if on_gpu else event.name.startswith(OP):
            start, end = event.time_range.start, event.time_range.end
            spans.append(Span(event.name.removeprefix(OP), start, end))
    return spans


def print_breakdown(lines: Sequence[Line], step_bytes: int) -> None:
    """Print a table of the lines, and their sums."""
    busy, gaps = sum(line.us for line in lines), sum(line.gap_us for line in lines)
    rows = [
        [
            line.kernel[:LONGEST_NAME],
            f"{line.launches:g}",
            f"{line.us / line.launches:.2f}",
            f"{line.us:.1f}",
            f"{line.us / (busy + gaps):.1%}",
            f"{line.gap_us:.1f}",
        ]
        for line in lines
    ]
    print_table(["", "launches", "us each", "us a step", "share", "gaps before"], rows)
    print(
        f"profiled, a step takes {busy + gaps:.1f} us: {busy:.1f} of kernels and {gaps:.1f} of "
        f"gaps ({gaps / (busy + gaps):.1%}); its {step_bytes / 1e6:.1f} MB make "
        f"{step_bytes / (busy + gaps) / 1e3:.0f} GB/s"
    )


@dataclass
class Profile:
    """Microseconds of a step by the clock or by events, round by round, and its lines."""

    step_us: list[float]
    lines: list[Line]
    step_bytes: int


@torch.inference_mode()
def measure(
    setup: Setup,
    batch: int,
    context: int,
    steps: int,
    eager: bool = False,
    trace: Path | None = None,
) -> Profile:
    """Time and profile a step of the model asked for; MemoryError says what is missing."""
    step = make_step(setup, batch, context, room=steps + WARM_UP)
    replay: Callable[[], object] = step.run
    if setup.device.type == "cuda" and not eager:
        replay = capture([step.run]).replay
    step.reset()
    replay()
    step_us = time_replays(replay, steps, ROUNDS, setup.device, step.reset)
    spans = profile_steps(replay, steps, setup.device, trace, step.reset)
    counted = decode_bytes(setup.config, batch=batch, context=context, dtype=setup.dtype)
    return Profile(step_us, break_down(spans, steps), counted.total)


def breakdown(setup: Setup, batch: int, context: int, profile: Profile) -> dict[str, Any]:
    """A profile as breakdown.json holds it."""
    return {
        "machine": describe_machine(setup.device),
        "model": setup.name,
        "batch": batch,
        "context": context,
        "step_bytes": profile.step_bytes,
        "step_us": metric(profile.step_us),
        "lines": [asdict(line) for line in profile.lines],
    }


def run(arguments: argparse.Namespace) -> int:
    """Profile the model asked for; ValueError and MemoryError say what is wrong in one line."""
    setup = choose_setup(arguments)
    batch, context, out = arguments.batch, arguments.context, arguments.out
    check_int("batch", batch, 1, 4096)
    check_int("context", context, 2, setup.config.context_length)
    check_int("steps", arguments.steps, 1, 10**4)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    trace = None if out is None else out / "step.json"
    profile = measure(setup, batch, context, arguments.steps, arguments.eager, trace)
    print(
        f"{setup.name}, {setup.config.num_layers} layers, {setup.dtype_name} on {setup.device}, "
        f"batch {batch}, context {context}, mean of {arguments.steps} steps"
    )
    print_breakdown(profile.lines, profile.step_bytes)
    us = Spread.of(profile.step_us)
    print(f"without the profiler a step takes {us.median:.1f} us ({us.low:.1f} - {us.high:.1f})")
    if out is not None:
        content = json.dumps(breakdown(setup, batch, context, profile), indent=1)
        (out / "breakdown.json").write_text(content + "\n")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code of the command with these arguments."""
    parser = argparse.ArgumentParser(
        prog="python -P -m gemcut.tools.profile_step",
        description="Break a decode step into its kernels and the gaps between them.",
    )
    add_model_arguments(parser)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--dtype", default="auto", help="auto, float32 or bfloat16")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="rows of the step")
    parser.add_argument("--context", type=int, default=256, metavar="N", help="tokens in each row")
    parser.add_argument("--steps", type=int, default=20, metavar="N")
    parser.add_argument("--eager", action="store_true", help="launch kernels one by one on a GPU")
    parser.add_argument("--out", type=Path, metavar="FOLDER")
    try:
        return run(parser.parse_args(argv))
    except (ValueError, NotImplementedError, MemoryError, OSError) as error:
        print(f"profile_step: {next(iter(str(error).splitlines()), '')}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
