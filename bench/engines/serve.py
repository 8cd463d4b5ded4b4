"""Latencies of OpenAI-compatible servers under a trace of arrivals, several side by side.

    gemcut-bench serve --url http://127.0.0.1:8000/v1 --rate 2 8
    gemcut-bench serve --url gemcut=http://a:8000/v1 --url other=http://b:8000/v1 --concurrency 1 16

The trace is the one of serve-sim: Poisson arrivals, log-normal lengths, all from a seed.  With
--concurrency so many requests are always under way instead.  Servers take turns, round by round, in
an order that rotates, with prompts of the same words; only the first words differ by server, so
that two names of one server find nothing that it has computed for the other.  How many tokens a
word is, a server's usage tells.  This process has no engine: run it beside the servers, or on
another machine.

A reply counts where its stream is whole: a finish_reason, [DONE], and the tokens that were asked
for, counted alike by usage and by the stream.  The others are told by kind: refused (a status other
than 200), lost (cut, or silent for --patience), error (an error event, garbage), wrong.

served.py says what the metrics are.  Latencies count from the arrival in the trace: a client that
is late counts too, and client_late_ms and client_cpu_share tell whether it was.
"""

import argparse
import asyncio
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from gemcut.bench.engines.case_runner import PASSAGE
from gemcut.bench.engines.serve_sim import PERCENTILES, Arrival, draw_trace
from gemcut.bench.engines.served import (
    BY_REQUEST,
    BY_ROUND,
    Reply,
    measured,
    times_as_good,
)
from gemcut.bench.measure.report_file import INTERRUPTED, OK, Record, Results, print_table
from gemcut.bench.measure.timing import clock
from gemcut.engine.checks import check_int, check_number
from gemcut.engine.openai_wire import read_url

if TYPE_CHECKING:
    from gemcut.bench.engines.openai_load import Client, Server

WORDS = sorted({word.strip(".,").lower() for word in PASSAGE.split()})
OWN_WORDS = 4  # at the beginning of a prompt, of one server and one round
WARM_UP = 8  # requests at once, of every server
BUSY = 0.5  # share of its time from which a client disturbs what it measures
NO_LIMIT = 1 << 20  # tokens of prompt and answer
NEEDS_AIOHTTP = "gemcut-bench serve needs aiohttp: pip install 'gemcut[bench]'"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `gemcut-bench serve`."""
    parser.add_argument(
        "--url",
        action="append",
        required=True,
        metavar="[NAME=]URL",
        help="of a server, such as http://127.0.0.1:8000/v1; may be given several times",
    )
    parser.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="NAME",
        help="for each --url, or one for all (default: the server's only one)",
    )
    parser.add_argument(
        "--api-key",
        metavar="KEY",
        help="better in GEMCUT_API_KEY or OPENAI_API_KEY, since others can see arguments",
    )
    parser.add_argument(
        "--rate", type=float, nargs="+", metavar="R", help="requests a second, a trace for each (4)"
    )
    parser.add_argument(
        "--concurrency", type=int, nargs="+", metavar="N", help="requests under way, instead"
    )
    for name, default, meaning in (
        ("--requests", 32, "of a trace"),
        ("--rounds", 3, "of each trace, with other prompts"),
        ("--prompt-tokens", 64, "in the mean"),
        ("--new-tokens", 32, "in the mean"),
        ("--seed", 0, "of the trace and its prompts"),
    ):
        parser.add_argument(
            name, type=int, default=default, metavar="N", help=f"{meaning} ({default})"
        )
    parser.add_argument(
        "--max-seq-len",
        type=int,
        metavar="N",
        help="tokens of prompt and answer at most (default: what the servers say of max_model_len)",
    )
    parser.add_argument(
        "--chat", action="store_true", help="ask /chat/completions (default: /completions)"
    )
    parser.add_argument(
        "--no-ignore-eos",
        dest="ignore_eos",
        action="store_false",
        help="let answers end by themselves, for servers that know no ignore_eos",
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="X", help="of every request (0)"
    )
    parser.add_argument(
        "--patience", type=float, default=600.0, metavar="S", help="seconds of silence (600)"
    )
    parser.add_argument(
        "--device",
        metavar="NAME",
        help="what the servers run on, as the report shall call it (default: this CPU)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the rows there too")


def run(arguments: argparse.Namespace) -> int:
    """Replay the traces; 1 where a request fails."""
    named = name_urls(arguments.url)
    _check(arguments)
    left_out = ("run", "json", "api_key")
    settings = {key: value for key, value in vars(arguments).items() if key not in left_out}
    results = Results("serve", settings, torch.device("cpu"), arguments.json)
    if arguments.device is not None:
        results.report["machine"]["device"] = arguments.device
    try:
        asyncio.run(_run_cases(results, arguments, named))
        results.finish()
    except KeyboardInterrupt:
        if not results.records:
            raise
        print("interrupted: whole rounds are kept")
        results.print_line()
        return INTERRUPTED
    results.print_line()
    return int(any(record["status"] != OK for record in results.records))


def name_urls(given: Sequence[str]) -> dict[str, str]:
    """URLs by name: the one before "=", else host and port, with a number where it is taken."""
    named: dict[str, str] = {}
    for text in given:
        name, equals, url = text.partition("=")
        if not equals or "/" in name:
            name, url = "", text
        url = read_url(url)
        wanted = name or url.split("/")[2]
        if name in named:
            raise ValueError(f"two servers are named {name!r}")
        copies = (wanted if i == 1 else f"{wanted} ({i})" for i in range(1, len(given) + 1))
        named[next(copy for copy in copies if copy not in named)] = url
    return named


def _check(arguments: argparse.Namespace) -> None:
    if arguments.rate and arguments.concurrency:
        raise ValueError("--rate and --concurrency exclude each other: give one")
    for rate in arguments.rate or ():
        check_number("rate", rate, above=0, below=1e6)
    for concurrency in arguments.concurrency or ():
        check_int("concurrency", concurrency, 1, 65536)
    if len(arguments.model) not in (0, 1, len(arguments.url)):
        raise ValueError(
            f"there are {len(arguments.url)} --url, but {len(arguments.model)} --model"
        )
    limit = arguments.max_seq_len or NO_LIMIT
    check_int("max-seq-len", limit, 8, NO_LIMIT)
    check_int("requests", arguments.requests, 1, 1 << 20)
    check_int("rounds", arguments.rounds, 1, 1000)
    check_int("new tokens", arguments.new_tokens, 2, limit - 1)
    check_int("prompt tokens", arguments.prompt_tokens, 1, limit - arguments.new_tokens)
    check_int("seed", arguments.seed, 0, 2**63 - 1)
    check_number("temperature", arguments.temperature, at_least=0)
    check_number("patience", arguments.patience, above=0)


async def _run_cases(
    results: Results, arguments: argparse.Namespace, named: dict[str, str]
) -> None:
    try:
        from gemcut.bench.engines.openai_load import Client, Load  # the one user of aiohttp
    except ModuleNotFoundError as error:
        if error.name != "aiohttp":
            raise
        raise ValueError(NEEDS_AIOHTTP) from None
    settings = {"temperature": arguments.temperature}
    how = Load(arguments.chat, arguments.ignore_eos, settings, arguments.patience)
    models = arguments.model or [None]
    models = models * len(named) if len(models) == 1 else models
    async with Client(how, arguments.api_key) as client:
        found = [
            await client.find_server(name, url, model)
            for (name, url), model in zip(named.items(), models, strict=True)
        ]
        servers = [await client.measure_words(server, WORDS) for server in found]
        for server in servers:
            if not server.counts_tokens:
                print(f"{server.name} counts no tokens: a word is taken for one, a piece too")
        said = [server.max_tokens for server in servers if server.max_tokens is not None]
        limit = arguments.max_seq_len or min(said, default=NO_LIMIT)
        limit -= math.ceil(max(server.overhead for server in servers))
        await _warm_up(client, servers)
        for rate in dict.fromkeys(arguments.rate or ([] if arguments.concurrency else [4.0])):
            await _run_case(results, arguments, client, servers, limit, rate=rate)
        for concurrency in dict.fromkeys(arguments.concurrency or ()):
            await _run_case(results, arguments, client, servers, limit, concurrency=concurrency)


async def _warm_up(client: "Client", servers: "Sequence[Server]") -> None:
    """Some requests at once, so that nothing is compiled while the clock runs."""
    trace = [Arrival(0.0, len(WORDS), 8)] * WARM_UP
    for server in servers:
        await client.replay(server, trace, [" ".join(WORDS)] * WARM_UP, WARM_UP)


async def _run_case(
    results: Results,
    arguments: argparse.Namespace,
    client: "Client",
    servers: "Sequence[Server]",
    limit: int,
    rate: float | None = None,
    concurrency: int | None = None,
) -> None:
    """Replay one trace in rounds; whole rounds are kept even where one is interrupted."""
    trace = draw_trace(
        rate=rate or 1.0,
        requests=arguments.requests,
        prompt_tokens=arguments.prompt_tokens,
        new_tokens=arguments.new_tokens,
        limit=max(4, limit * 7 // 8),  # the tokens of a prompt's words are not known exactly
        seed=arguments.seed,
    )
    rounds: list[dict[str, tuple[list[Reply], float]]] = []
    try:
        for i in range(arguments.rounds):
            turn = i % len(servers)
            one = {}
            for server in (*servers[turn:], *servers[:turn]):
                seeds = (arguments.seed, i, servers.index(server))
                prompts = make_prompts(trace, servers[0], *seeds)
                cpu, wall = time.process_time(), clock()
                replies = await client.replay(server, trace, prompts, concurrency)
                one[server.name] = (replies, (time.process_time() - cpu) / (clock() - wall))
            rounds.append(one)
    finally:
        if rounds:
            records = list(_records(arguments, servers, rounds, rate, concurrency))
            results.add(*records)
            print_records(records, len(rounds))


def make_prompts(
    trace: Sequence[Arrival], server: "Server", seed: int, round_: int, own: int
) -> list[str]:
    """A prompt for each arrival: words at random, as many as this server takes its tokens for.

    Other words in each round.  Of a round, all servers get the same words after the first few,
    which are those of server number `own`.
    """
    prompts = []
    for i, arrival in enumerate(trace):
        wanted = (arrival.prompt_tokens - server.overhead) / server.tokens_per_word
        count = max(1, round(wanted))
        words = np.random.default_rng((seed, round_, i)).choice(WORDS, count)
        first = np.random.default_rng((seed, round_, i, own + 1)).choice(WORDS, OWN_WORDS)
        prompts.append(" ".join([*first[:count], *words[OWN_WORDS:]]))
    return prompts


def _records(
    arguments: argparse.Namespace,
    servers: "Sequence[Server]",
    rounds: Sequence[dict[str, tuple[list[Reply], float]]],
    rate: float | None,
    concurrency: int | None,
) -> Iterator[Record]:
    load = f"concurrency={concurrency}" if rate is None else f"rate={rate:g}"
    facts = ("requests", "prompt_tokens", "new_tokens", "seed", "temperature")
    for server in servers:
        yield {
            "case": f"{servers[0].model}/{load}",
            "contestant": server.name,
            "version": server.software or "unknown",
            "settings": f"{server.model} at {server.url}",
            "status": OK,
            "detail": "",
            "model": servers[0].model,
            "rate": rate,
            "concurrency": concurrency,
            "endpoint": "chat/completions" if arguments.chat else "completions",
            **{name: getattr(arguments, name) for name in facts},
            "client_cpu_share": max(one[server.name][1] for one in rounds),
            **measured([one[server.name][0] for one in rounds]),
        }


def print_records(records: Sequence[Record], rounds: int) -> None:
    """Print the servers of a case, and how many times as fast the first is as each other."""
    first, *others = records
    print(
        f"{first['case']}: {first['requests']} requests a round, rounds {rounds}, in the mean "
        f"{first['prompt_tokens']} prompt tokens and {first['new_tokens']} new"
    )
    columns = [f"p{p}" for p in PERCENTILES]
    table = []
    for record in records:
        name = record["contestant"]
        print(f"{name} ({record['version']}): {record['settings']}; {record['served']} whole")
        if record["status"] != OK:
            print(f"    {record['status']}: {record['detail']}")
        if "first_token_ms" not in record:
            continue
        if record["client_cpu_share"] > BUSY:
            print(f"    this client took {record['client_cpu_share']:.0%} of a core: it is slow")
        for metric in BY_REQUEST:
            table.append([f"{name}  {metric}", *(f"{record[metric][p]:.2f}" for p in columns)])
        for metric in BY_ROUND:
            table.append([f"{name}  {metric}", f"{record[metric]['median']:.2f}", "", ""])
    if table:
        print_table(["", *columns], table)
    for other in others:
        if first["status"] == other["status"] == OK:
            print(f"{first['contestant']} over {other['contestant']}: median (range) of the rounds")
            print_table(["times as fast", *columns], list(_ratio_rows(first, other, columns)))


def _ratio_rows(first: Record, other: Record, columns: Sequence[str]) -> Iterator[list[str]]:
    def ratio(metric: str, percentile: str | None) -> str:
        found = times_as_good(first, other, metric, percentile)
        return f"{found.median:.2f} ({found.low:.2f} - {found.high:.2f})"

    for metric in BY_REQUEST:
        yield [metric, *(ratio(metric, p) for p in columns)]
    for metric in BY_ROUND:
        yield [metric, ratio(metric, None), "", ""]
