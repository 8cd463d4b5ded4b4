"""Decoding of gemma-2-2b by the whole engine, beside other stacks: gemcut-bench decode, twice.

A run keeps nothing of a case that it has not finished, so the peers that take longest to load and
compile have a run of their own, begun where there is time left.
"""

import signal
import subprocess
import sys

from gemcut.bench.engines.peers import CONTESTANTS
from gemcut.bench.measure.report_file import Record, load_results
from gemcut.bench.measure.timing import clock
from gemcut.tools.visit.block import Visit

RUNS = {"decode-gemma-2-2b": ("transformers",)}
RUNS |= {"decode-gemma-2-2b-compiled": ("transformers-compiled", "gpt-fast")}
MODEL, PROMPT_TOKENS, NEW_TOKENS = "gemma-2-2b", 960, 128
LENGTH = PROMPT_TOKENS + NEW_TOKENS  # of a slot of gemcut's engine
OPTIONS = ("--random", MODEL, "--batch", "1", "--prompt-tokens", str(PROMPT_TOKENS))
OPTIONS += ("--new-tokens", str(NEW_TOKENS), "--repeats", "3")
CPU_OPTIONS = ("--model", "demo", "--batch", "1", "--prompt-tokens", "8", "--new-tokens", "4")
CPU_OPTIONS += ("--repeats", "1")
CPU_RUNS = {"decode-demo": ("transformers",)}
LEAST = 50.0  # seconds; with less left a run is not begun
COMMAND = "import sys; from gemcut.bench.cli import main; sys.exit(main())"


def run(visit: Visit) -> None:
    """Keep a record for each contestant of each run."""
    for name, peers in (RUNS if visit.on_gpu else CPU_RUNS).items():
        if visit.left < LEAST and visit.on_gpu:
            visit.skip(name, "no time was left")
            continue
        with visit.attempt(name):
            compare(visit, name, peers)


def compare(visit: Visit, name: str, peers: tuple[str, ...]) -> None:
    """Make one run, ended by an interrupt where the block's own end is near."""
    there = [peer for peer in peers if not CONTESTANTS[peer].missing]
    for peer in set(peers) - set(there):
        visit.skip(f"{name}/{peer}", f"{', '.join(CONTESTANTS[peer].missing)} is not installed")
    file = visit.out / f"{name}.json"
    command = [sys.executable, "-P", "-c", COMMAND, "decode", "--device", visit.device.type]
    command += [*(OPTIONS if visit.on_gpu else CPU_OPTIONS), "--json", str(file), "--peer", *there]
    began = clock()
    process = subprocess.Popen(command)
    try:
        code = process.wait(max(1.0, visit.left - 5.0))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        try:
            code = process.wait(3.0)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        visit.add(f"{name}", "failed", detail=f"not done after {clock() - began:.0f} s")
    records = load_results(file)["rows"] if file.exists() else []
    if not records and code:
        visit.add(f"{name}", "failed", detail=f"exit code {code}, see logs/peers.log")
    for record in records:
        visit.add(**line_of(name, record))


def line_of(name: str, record: Record) -> Record:
    """What the visit keeps of a contestant's record."""
    case = f"{record['case']}/{record['contestant']}"
    if record["contestant"] == "gemcut":
        case = f"{case} beside {name}"
    found = {"case": case, "status": record["status"], "detail": record["detail"]}
    if "tokens_per_second" in record:
        rate, ratio = record["tokens_per_second"], record.get("ratio")
        beside = f", gemcut x {ratio['median']:.2f}" if ratio else ""
        found["line"] = (
            f"{case}: {rate['median']:.1f} tokens/s ({rate['low']:.1f} - {rate['high']:.1f}), "
            f"{record['read_share']:.3f} of reading{beside}"
        )
    return found
