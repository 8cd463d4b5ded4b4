"""Decoding speed in tokens a second, beside other stacks and beside the memory's limit.

    gemcut-bench decode --threads 1
    gemcut-bench decode --random gemma-2-9b --batch 1 16 --context 1024 4096

Each contestant continues the same prompts greedily by the same number of tokens, through its public
API, end to end.  Decoding is every step after the first token, whose time is reported apart.  Every
token is checked before anything is timed: a contestant that computes something else is reported and
not timed.  A share is how much of a step's time moving its bytes (step_bytes.py) at the bandwidth
of reading would take.
"""

import argparse
from dataclasses import asdict
from functools import partial

from gemcut.bench.engines.case_runner import (
    Ceilings,
    Contestant,
    Result,
    add_case_arguments,
    describe,
    print_fastest,
    run_cases,
)
from gemcut.bench.engines.peers import GEMCUT, Generation, Workload
from gemcut.bench.engines.setup import Setup, add_model_arguments, choose_setup
from gemcut.bench.engines.step_bytes import decode_bytes, print_step_bytes
from gemcut.bench.measure.report_file import Record, metric, print_table
from gemcut.engine.checkpoints.stored_weights import check_quantization
from gemcut.engine.checks import check_int
from gemcut.engine.execution.weights import QUANTIZATIONS

PLAIN = "none"  # weights as they are
RATIOS = ("ratio", "first_token_ratio")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `gemcut-bench decode`."""
    add_model_arguments(parser)
    parser.add_argument(
        "--context",
        "--prompt-tokens",
        type=int,
        nargs="+",
        default=[16],
        metavar="N",
        help="tokens of a prompt (16); each with each batch is a case",
    )
    parser.add_argument(
        "--quantization",
        nargs="+",
        default=[PLAIN],
        choices=(PLAIN, *QUANTIZATIONS),
        help="of gemcut's weights, each a case; peers of a quantised one are quantised to the same",
    )
    parser.add_argument(
        "--new-tokens", type=int, default=128, metavar="N", help="of each row (%(default)s)"
    )
    add_case_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Measure every case; 1 where a contestant is wrong, or gemcut or every peer fails."""
    check_int("new tokens", arguments.new_tokens, 2, 2**20)  # the first is not decoding
    setup = choose_setup(arguments)
    quantizations = [None if name == PLAIN else name for name in arguments.quantization]
    for quantization in quantizations:
        check_quantization(quantization, setup.config)
    workloads = [
        Workload(batch, context, arguments.new_tokens, quantization)
        for quantization in quantizations
        for context in arguments.context
        for batch in arguments.batch
    ]
    return run_cases("decode", arguments, setup, workloads, make_records, print_case)


def rate_of(generation: Generation) -> float:
    return generation.tokens_per_second


def first_rate_of(generation: Generation) -> float:
    return 1 / generation.first_token_seconds


def case_name(result: Result) -> str:
    """The name of a case, by what differs within a run."""
    workload = result.workload
    name = f"{result.setup.name}/batch={workload.batch}/context={workload.prompt_tokens}"
    return name if workload.quantization is None else f"{name}/{workload.quantization}"


def make_records(result: Result, ceilings: Ceilings) -> list[Record]:
    """A record for each contestant.

    `ratio` is gemcut's tokens a second over the peer's in the same round, `first_token_ratio` the
    peer's time to the first token over gemcut's; gemcut's own record names the fastest peer.
    """
    records = []
    for one in result.contestants:
        record = result.record(one, case_name(result)) | _facts(result, one)
        if one in result.timed:
            record |= _metrics(result, one.name)
            steps_per_second = record["tokens_per_second"]["median"] / result.workload.batch
            record["read_share"] = (
                record["step_bytes"] * steps_per_second / ceilings["read_gbps"] / 1e9
            )
        if one.name == GEMCUT:
            record["fastest_peer"] = result.fastest_peer(rate_of)
        records.append(record)
    return records


def _facts(result: Result, contestant: Contestant) -> Record:
    workload, setup = result.workload, result.setup
    context = mean_context(workload)
    counted = decode_bytes(
        setup.config,
        batch=workload.batch,
        context=context,
        dtype=setup.dtype,
        weight_bits=contestant.peer.weight_bits,
        quantization=workload.quantization if contestant.name == GEMCUT else None,
    )
    return {
        "context": workload.prompt_tokens,
        "prompt_tokens": workload.prompt_tokens,
        "new_tokens": workload.new_tokens,
        "layers": setup.config.num_layers,
        "memory_bytes": contestant.memory_bytes,
        "step_bytes": counted.total,
        "account": {"context": context, **asdict(counted)},
    }


def mean_context(workload: Workload) -> float:
    """Tokens that the new one sees, itself included, in the mean over all steps."""
    first, last = workload.prompt_tokens + 1, workload.length - 1
    return (first + last) / 2


def _metrics(result: Result, name: str) -> Record:
    rates = result.all(name, rate_of)
    measured = {
        "tokens_per_second": metric(rates),
        "first_token_ms": metric(result.all(name, lambda one: 1e3 * one.first_token_seconds)),
        "between_tokens_ms": metric([1e3 * result.workload.batch / rate for rate in rates]),
    }
    if ratios := result.ratios(name, rate_of):
        measured["ratio"] = metric(ratios)
        measured["first_token_ratio"] = metric(result.ratios(name, first_rate_of))
    return measured


def print_case(result: Result, records: list[Record], ceilings: Ceilings) -> None:
    """Print a case as a table, and the bytes that a step of it must move."""
    table = [
        [
            record["contestant"],
            describe(record["tokens_per_second"]),
            describe(record["first_token_ms"]),
            f"{record['read_share']:.1%}",
            *(describe(record[name]) if name in record else "" for name in RATIOS),
        ]
        for record in records
        if "tokens_per_second" in record
    ]
    if table:
        columns = ["tokens/s", "first token, ms", "of read bandwidth"]
        columns += ["gemcut's ratio", "and of the first token"]
        print_table(["median (range)", *columns], table)
    print_fastest(records, "decodes")
    _print_step_bytes(result.setup, result.workload, ceilings["read_gbps"])


def _print_step_bytes(setup: Setup, workload: Workload, read_gbps: float) -> None:
    """Print the bytes of gemcut's step; of a model that was cut, also those of the whole one."""
    count = partial(
        decode_bytes,
        batch=workload.batch,
        context=mean_context(workload),
        dtype=setup.dtype,
        quantization=workload.quantization,
    )
    config, whole = setup.config, setup.whole_config
    layers = f"all {whole.num_layers} layers"
    print_step_bytes(count(config), read_gbps, None if whole is config else (layers, count(whole)))
    print(
        f"{layers} in bfloat16: {2 * whole.num_parameters() / 1e9:.3g} GB of weights, "
        f"{whole.kv_bytes_per_token() / 1024:g} KiB of keys and values a token"
    )
