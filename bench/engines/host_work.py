"""Host time of a decode step, beside a device that takes no time.

    gemcut-bench host-work
    gemcut-bench host-work --batch 1 16 --new-tokens 1000

The device's part of a step is a stub that yields tokens of a text.  What is left is everything
between two steps: scheduling, starting the step, reading tokens, text, stop conditions, delivery to
the callers, and the callers themselves.  On a GPU it runs beside the step before, so only what
exceeds a step's own time costs anything.
"""

import argparse
import asyncio
import statistics
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor

from gemcut.bench.engines.case_runner import report_settings
from gemcut.bench.engines.peers import GEMCUT
from gemcut.bench.engines.served_steps import time_serve
from gemcut.bench.engines.setup import Setup, add_model_arguments, choose_setup
from gemcut.bench.measure.machine import gemcut_version
from gemcut.bench.measure.report_file import INTERRUPTED, OK, Record, Results, metric, print_table
from gemcut.bench.measure.timing import clock
from gemcut.engine import Engine, SamplingParams
from gemcut.engine.checks import check_int
from gemcut.engine.execution.cache import KVCache
from gemcut.engine.execution.model import Gemma
from gemcut.engine.execution.sampler import Features
from gemcut.engine.execution.slot_state import SlotState
from gemcut.engine.execution.steps import Steps

LIMITS_US = {1: 150.0, 16: 400.0}  # by batch: what the engine promises on two cores
TEXT = "Once upon a time there was an old man, who said: come in, and mind the step! "


class StubSteps(Steps):
    """Steps of a device that needs no time to decode; its prefills are real."""

    def __init__(self, model: Gemma, cache: KVCache, state: SlotState, text: list[int]) -> None:
        super().__init__(model, cache, state)
        self._token_ids = torch.tensor(text, device=model.device)
        self._step = 0

    def decode(self, slots: Tensor, features: Features) -> Tensor:
        """The text's next token for every slot."""
        self._step = (self._step + 1) % len(self._token_ids)
        return self._token_ids[self._step].expand(len(slots))

    def sample(self, logits: Tensor, slots: Tensor, features: Features) -> Tensor:
        """The first token after a prompt."""
        return self.decode(slots, features)


def make_engine(setup: Setup, slots: int) -> Engine:
    """An engine whose decode steps are stubs."""
    stubs = partial(StubSteps, text=setup.tokenizer.encode(TEXT, add_bos=False))
    return Engine(setup.model, setup.tokenizer, max_batch_size=slots, make_steps=stubs)


def time_generate(engine: Engine, batch: int, new_tokens: int) -> float:
    """Microseconds of a step whose callers wait for the end: one thread, a list of prompts."""
    outputs = engine.generate(_prompts(batch), _params(new_tokens), use_tqdm=False)
    return 1e6 * statistics.median(output.metrics.time_between_tokens for output in outputs)


def time_astream(engine: Engine, batch: int, new_tokens: int) -> float:
    """Microseconds of a step whose tokens go to as many asyncio tasks, one by one."""

    async def consume(prompt: list[int]) -> float:
        times = [clock() async for _ in engine.astream(prompt, _params(new_tokens))]
        return (times[-1] - times[0]) / (len(times) - 1)

    async def consume_all() -> list[float]:
        return await asyncio.gather(*map(consume, _prompts(batch)))

    return 1e6 * statistics.median(asyncio.run(consume_all()))


CALLERS: dict[str, Callable[[Engine, int, int], float]] = {
    "generate": time_generate,
    "astream": time_astream,
}
if find_spec("fastapi") is not None:  # the extra `serve`
    CALLERS["serve"] = time_serve


def _prompts(batch: int) -> list[list[int]]:
    return [[2, 5 + i] for i in range(batch)]


def _params(new_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)


# The command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `gemcut-bench host-work`."""
    add_model_arguments(parser)
    for name, default, meaning in (
        ("--new-tokens", 256, "of each row"),
        ("--repeats", 7, "rounds"),
    ):
        parser.add_argument(
            name, type=int, default=default, metavar="N", help=f"{meaning} ({default})"
        )
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16], metavar="N")


def run(arguments: argparse.Namespace) -> int:
    """Measure each batch with each kind of caller, in turns; 1 where a limit is passed."""
    setup = choose_setup(arguments)
    for batch in arguments.batch:
        check_int("batch", batch, 1, 1024)
    check_int("new tokens", arguments.new_tokens, 3, setup.config.context_length - 2)
    check_int("repeats", arguments.repeats, 1, 10**4)
    settings = report_settings(arguments, setup)
    results = Results("host-work", settings, setup.device, arguments.json)
    kinds = [(batch, name) for batch in dict.fromkeys(arguments.batch) for name in CALLERS]
    times: dict[tuple[int, str], list[float]] = {kind: [] for kind in kinds}
    try:
        with make_engine(setup, max(arguments.batch)) as engine:
            for batch, name in kinds:  # the first run of each is not counted
                CALLERS[name](engine, batch, 3)
            for _ in range(arguments.repeats):
                for batch, name in kinds:
                    took = CALLERS[name](engine, batch, arguments.new_tokens)
                    times[batch, name].append(took)
        results.add(*(_record(setup, *kind, times[kind]) for kind in kinds))
        results.finish()
        _print(results.records)
    except KeyboardInterrupt:
        print("interrupted before all was measured")
        return INTERRUPTED
    finally:
        results.print_line()
    return int(
        any(
            record["step_us"]["median"] > record["limit_us"] for record in _limited(results.records)
        )
    )


def _record(setup: Setup, batch: int, caller: str, times: list[float]) -> Record:
    return {
        "case": f"{setup.name}/batch={batch}/{caller}",
        "contestant": GEMCUT,
        "version": gemcut_version(),
        "settings": f"Engine.{caller}, steps that take no time",
        "status": OK,
        "detail": "",
        "model": setup.name,
        "batch": batch,
        "caller": caller,
        "limit_us": LIMITS_US.get(batch),
        "step_us": metric(times),
    }


def _limited(records: list[Record]) -> list[Record]:
    return [
        record
        for record in records
        if record["limit_us"] is not None and record["caller"] == "generate"
    ]


def _print(records: list[Record]) -> None:
    table = [
        [
            record["case"],
            *(f"{record['step_us'][name]:.0f}" for name in ("median", "low", "high")),
            "" if record["limit_us"] is None else f"{record['limit_us']:.0f}",
        ]
        for record in records
    ]
    print_table(["host work of a step, us", "median", "low", "high", "promised"], table)
