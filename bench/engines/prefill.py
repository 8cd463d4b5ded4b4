"""Time to the first token by the length of the prompt, beside other stacks.

    gemcut-bench prefill --tokens 64 256 --threads 1
    gemcut-bench prefill --random gemma-2-9b --tokens 512 4096 8192

Each contestant is given the same prompts and asked for one token of each, through its public API,
from the call to its return.  The token is checked before anything is timed.  A share is how much of
a prefill's time its operations (step_bytes.py) would take at the measured rate of large products.
"""

import argparse

from gemcut.bench.engines.case_runner import (
    Ceilings,
    Result,
    add_case_arguments,
    describe,
    print_fastest,
    run_cases,
)
from gemcut.bench.engines.peers import GEMCUT, Generation, Workload
from gemcut.bench.engines.setup import add_model_arguments, choose_setup
from gemcut.bench.engines.step_bytes import prefill_flops
from gemcut.bench.measure.report_file import Record, metric, print_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `gemcut-bench prefill`."""
    add_model_arguments(parser)
    parser.add_argument(
        "--tokens",
        type=int,
        nargs="+",
        default=[64, 256],
        metavar="N",
        help="of a prompt (64 256); each with each batch is a case",
    )
    add_case_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Measure every case; 1 where a contestant is wrong, or gemcut or every peer fails."""
    setup = choose_setup(arguments)
    workloads = [
        Workload(batch, tokens, new_tokens=1)
        for tokens in arguments.tokens
        for batch in arguments.batch
    ]
    return run_cases("prefill", arguments, setup, workloads, make_records, print_case)


def rate_of(generation: Generation) -> float:
    """Runs a second; nothing but the first token is asked for."""
    return 1 / generation.seconds


def make_records(result: Result, ceilings: Ceilings) -> list[Record]:
    """A record for each contestant; `tokens_per_second` are tokens of the prompts.

    `ratio` is the peer's time over gemcut's in the same round; gemcut's own record names the
    fastest peer.
    """
    batch, tokens = result.workload.batch, result.workload.prompt_tokens
    flops = prefill_flops(result.setup.config, batch=batch, tokens=tokens)
    records = []
    for one in result.contestants:
        record = result.record(one, f"{result.setup.name}/batch={batch}/tokens={tokens}")
        record |= {"tokens": tokens, "memory_bytes": one.memory_bytes, "flops": flops}
        if one in result.timed:
            rates = result.all(one.name, rate_of)
            record["first_token_ms"] = metric([1e3 / rate for rate in rates])
            record["tokens_per_second"] = metric([batch * tokens * rate for rate in rates])
            record["tflops"] = flops / record["first_token_ms"]["median"] / 1e9
            record["share"] = record["tflops"] / ceilings["matmul_tflops"]
            if ratios := result.ratios(one.name, rate_of):
                record["ratio"] = metric(ratios)
        if one.name == GEMCUT:
            record["fastest_peer"] = result.fastest_peer(rate_of)
        records.append(record)
    return records


def print_case(result: Result, records: list[Record], ceilings: Ceilings) -> None:
    """Print a case as a table."""
    table = [
        [
            record["contestant"],
            describe(record["first_token_ms"]),
            describe(record["tokens_per_second"]),
            f"{record['tflops']:.3g}",
            f"{record['share']:.1%}",
            describe(record["ratio"]) if "ratio" in record else "",
        ]
        for record in records
        if "first_token_ms" in record
    ]
    if table:
        columns = ["first token, ms", "tokens/s", "TFLOP/s", "of matmul peak", "gemcut's ratio"]
        print_table(["median (range)", *columns], table)
    print_fastest(records, "prefills")
