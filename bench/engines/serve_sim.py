"""Latencies of one engine whose requests arrive at random.

    gemcut-bench serve-sim --rate 4 --requests 64 --batch 8
    gemcut-bench serve-sim --random gemma-2-2b --rate 20 --prompt-tokens 512 --new-tokens 128

A trace is drawn from a seed: Poisson arrivals, log-normal lengths of prompts and answers.  Each
request is a thread that wakes when its request arrives, and consumes `engine.stream`.  Latencies
count from the arrival in the trace: a late thread counts too, and so does the wait for a slot.

    first_token_ms      from a request's arrival to its first token
    between_tokens_ms   between two tokens of a request, in the mean
    longest_gap_ms      between two tokens of a request, at most
    queue_ms            from a request's arrival until one of the engine's slots is free for it
    tokens_per_second   of the whole trace, from its first arrival to its last token

`all` holds one value for each request, in the order of arrival; p50, p90 and p99 are beside it.
"""

import argparse
import math
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gemcut.bench.engines.case_runner import make_prompt, report_settings
from gemcut.bench.engines.peers import GEMCUT
from gemcut.bench.engines.setup import Setup, add_model_arguments, choose_setup, require_memory
from gemcut.bench.measure.ceilings import measure_ceilings
from gemcut.bench.measure.machine import gemcut_version
from gemcut.bench.measure.report_file import (
    FAILED,
    INTERRUPTED,
    NO_MEMORY,
    OK,
    Record,
    Results,
    metric,
    print_table,
)
from gemcut.bench.measure.timing import clock
from gemcut.engine import Engine, SamplingParams
from gemcut.engine.checks import check_int, check_number
from gemcut.engine.execution.cache import PREFILL_CHUNK, slot_bytes
from gemcut.engine.placement import in_temporary_thread

SIGMA = 0.6  # of a length's logarithm: one in twenty is 2.7 times the median
PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Arrival:
    """A request of a trace; `at` is in seconds after the first."""

    at: float
    prompt_tokens: int
    new_tokens: int


@dataclass
class Served:
    """What became of a request; times are in seconds after the first arrival."""

    arrival: Arrival
    token_times: list[float] = field(default_factory=list)
    ended_at: float | None = None  # None: interrupted
    error: str | None = None

    @property
    def gaps(self) -> list[float]:
        return [b - a for a, b in zip(self.token_times, self.token_times[1:], strict=False)]


def draw_trace(
    *, rate: float, requests: int, prompt_tokens: int, new_tokens: int, limit: int, seed: int
) -> list[Arrival]:
    """The trace of a seed: lengths have these means before they are cut to fit `limit` tokens."""
    random = np.random.default_rng(seed)
    waits = random.exponential(1 / rate, requests)
    times = np.cumsum(waits) - waits[0]

    def lengths(mean: float) -> np.ndarray:
        return random.lognormal(math.log(mean) - SIGMA**2 / 2, SIGMA, requests).round()

    prompts, answers = lengths(prompt_tokens), lengths(new_tokens)
    answers = answers.clip(2, limit - 1)  # between two tokens there is a time
    prompts = prompts.clip(1, limit - answers)
    return [
        Arrival(float(at), int(prompt), int(answer))
        for at, prompt, answer in zip(times, prompts, answers, strict=True)
    ]


def replay(engine: Engine, trace: Sequence[Arrival], served: list[Served]) -> None:
    """Let the requests of a trace arrive; `served` gets an entry for each, even if interrupted."""
    served += [Served(arrival) for arrival in trace]
    prompts = [
        make_prompt(engine.tokenizer, arrival.prompt_tokens, start=i)
        for i, arrival in enumerate(trace)
    ]
    # no request should wait for a compiler
    params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
    in_temporary_thread(lambda: engine.generate(prompts, params, use_tqdm=False))
    stopped = threading.Event()
    with ThreadPoolExecutor(len(trace)) as threads:
        started = clock()
        futures = [
            threads.submit(_serve, engine, prompt, one, started, stopped)
            for prompt, one in zip(prompts, served, strict=True)
        ]
        try:
            wait(futures)
        except KeyboardInterrupt:
            stopped.set()
            engine.close()
            raise


def _serve(
    engine: Engine, prompt: list[int], served: Served, started: float, stopped: threading.Event
) -> None:
    """Make one request, from its arrival to its end."""
    wanted = served.arrival.new_tokens
    if stopped.wait(max(0.0, started + served.arrival.at - clock())):
        return
    params = SamplingParams(temperature=0, max_tokens=wanted, ignore_eos=True)
    try:
        for delta in engine.stream(prompt, params):
            served.token_times += [clock() - started] * len(delta.token_ids)
        if len(served.token_times) != wanted:
            served.error = f"{len(served.token_times)} tokens, where {wanted} were asked for"
    except Exception as error:  # it is this request's own failure
        if stopped.is_set():
            return
        served.error = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    served.ended_at = clock() - started


def queue_seconds(served: Sequence[Served], slots: int) -> list[float]:
    """How long each request waited for a slot: slots are given in the order of first tokens."""
    ends: list[float] = []
    waits = {}
    for one in sorted(served, key=lambda one: one.token_times[0]):
        free_at = sorted(ends)[-slots] if len(ends) >= slots else 0.0
        # a thread may note its last token later than another, in the freed slot, notes its first
        waits[id(one)] = max(0.0, min(free_at, one.token_times[0]) - one.arrival.at)
        ends.append(one.token_times[-1])
    return [waits[id(one)] for one in served]


# The command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `gemcut-bench serve-sim`."""
    add_model_arguments(parser)
    parser.add_argument(
        "--rate", type=float, nargs="+", default=[4.0], metavar="R", help="requests a second (4)"
    )
    for name, default, meaning in (
        ("--requests", 32, "of a trace"),
        ("--batch", 8, "slots of the engine"),
        ("--prompt-tokens", 64, "in the mean"),
        ("--new-tokens", 32, "in the mean"),
        ("--seed", 0, "of the trace"),
    ):
        parser.add_argument(
            name, type=int, default=default, metavar="N", help=f"{meaning} ({default})"
        )


def run(arguments: argparse.Namespace) -> int:
    """Replay the trace at every rate; 1 where a request fails."""
    for rate in arguments.rate:
        check_number("rate", rate, above=0, below=1e6)
    setup = choose_setup(arguments)
    limit = setup.config.context_length
    check_int("requests", arguments.requests, 1, 4096)  # threads
    check_int("batch", arguments.batch, 1, 4096)
    check_int("new tokens", arguments.new_tokens, 2, limit - 1)
    check_int("prompt tokens", arguments.prompt_tokens, 1, limit - arguments.new_tokens)
    check_int("seed", arguments.seed, 0, 2**63 - 1)
    settings = report_settings(arguments, setup)
    results = Results("serve-sim", settings, setup.device, arguments.json)
    results.set_ceilings(in_temporary_thread(lambda: measure_ceilings(setup.device, setup.dtype)))
    try:
        for rate in dict.fromkeys(arguments.rate):
            _run_rate(results, setup, arguments, rate)
        results.finish()
    except KeyboardInterrupt:
        print("interrupted: what was served is kept")
        return INTERRUPTED
    finally:
        results.print_line()
    return int(any(record["status"] != OK for record in results.records))


def _run_rate(results: Results, setup: Setup, arguments: argparse.Namespace, rate: float) -> None:
    """Make one replay; its record is kept even where the replay is interrupted."""
    trace = draw_trace(
        rate=rate,
        requests=arguments.requests,
        prompt_tokens=arguments.prompt_tokens,
        new_tokens=arguments.new_tokens,
        limit=setup.config.context_length,
        seed=arguments.seed,
    )
    record = {
        "case": f"{setup.name}/rate={rate:g}",
        "contestant": GEMCUT,
        "version": gemcut_version(),
        "settings": "Engine.stream, a thread for each request",
        "status": OK,
        "detail": "",
        "model": setup.name,
        "dtype": setup.dtype_name,
        "rate": rate,
        "requests": arguments.requests,
        "batch": arguments.batch,
        "prompt_tokens": arguments.prompt_tokens,
        "new_tokens": arguments.new_tokens,
        "seed": arguments.seed,
    }
    served: list[Served] = []
    try:
        with in_temporary_thread(lambda: make_engine(setup, trace, arguments.batch)) as engine:
            replay(engine, trace, served)
    except MemoryError as error:
        record |= {"status": NO_MEMORY, "detail": str(error)}
    finally:
        record |= measured(served, arguments.batch)
        if "first_token_ms" in record or record["status"] != OK:
            results.add(record)
            print_record(record)


def make_engine(setup: Setup, trace: Sequence[Arrival], slots: int) -> Engine:
    """An engine whose slots hold the longest request; MemoryError says what is missing."""
    longest = max(arrival.prompt_tokens + arrival.new_tokens for arrival in trace)
    model = setup.model
    cache = slots * slot_bytes(setup.config, longest, PREFILL_CHUNK, setup.dtype)
    require_memory(setup.device, {"cache": cache})
    return Engine(
        model,
        setup.tokenizer,
        max_batch_size=slots,
        max_seq_len=longest,
        reuse_prefixes=False,  # what runs before the clock must not be there when it counts
    )


def measured(served: Sequence[Served], slots: int) -> Record:
    """The metrics of the requests that ended well, and the errors of the others."""
    ended = [one for one in served if one.ended_at is not None]
    failed = [one for one in ended if one.error is not None]
    well = [one for one in ended if one.error is None]
    record: Record = {"served": len(well), "failed": len(failed)}
    if failed:
        record["status"] = FAILED
        record["detail"] = f"{len(failed)} of {len(ended)} requests: {failed[0].error}"
    if not well:
        return record
    tokens = sum(len(one.token_times) for one in well)
    return record | {
        "generated_tokens": tokens,
        "first_token_ms": percentiles([one.token_times[0] - one.arrival.at for one in well]),
        "between_tokens_ms": percentiles([sum(one.gaps) / len(one.gaps) for one in well]),
        "longest_gap_ms": percentiles([max(one.gaps) for one in well]),
        "queue_ms": percentiles(queue_seconds(well, slots)),
        "tokens_per_second": metric([tokens / max(one.token_times[-1] for one in well)]),
    }


def percentiles(seconds: Sequence[float]) -> dict[str, Any]:
    """A metric in milliseconds, with its percentiles."""
    values = [1e3 * value for value in seconds]
    found = np.percentile(values, PERCENTILES)
    return metric(values) | {f"p{p}": float(x) for p, x in zip(PERCENTILES, found, strict=True)}


def print_record(record: Record) -> None:
    """Print a replay as a table."""
    print(
        f"{record['case']}: {record['requests']} requests, {record['batch']} slots, in the mean "
        f"{record['prompt_tokens']} prompt tokens and {record['new_tokens']} new, {record['dtype']}"
    )
    if record["status"] != OK:
        print(f"{record['status']}: {record['detail']}")
    if "first_token_ms" not in record:
        return
    names = ("first_token_ms", "between_tokens_ms", "longest_gap_ms", "queue_ms")
    columns = ["median", "p90", "p99", "high"]
    table = [[name, *(f"{record[name][column]:.2f}" for column in columns)] for name in names]
    print_table(["ms", *columns], table)
    rate = record["tokens_per_second"]["median"]
    print(f"{record['served']} requests, {record['generated_tokens']} tokens, {rate:.1f} tokens/s")
