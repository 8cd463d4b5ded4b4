"""All checks and measurements on a GPU in one command, and a table of what they found.

    python -P -m gemcut.tools.gpu_visit OUT                         all blocks, in order
    python -P -m gemcut.tools.gpu_visit OUT --only ops steps        these blocks
    python -P -m gemcut.tools.gpu_visit OUT --resume                the blocks that did not finish
    python -P -m gemcut.tools.gpu_visit OUT --device cpu            the same at small sizes
    python -P -m gemcut.tools.gpu_visit --keep OUT                  its reports, to bench/results/

A block is a process with a time limit of its own.  It writes a record as soon as it has one: where
it fails, hangs or is killed, its records are kept, and the next block runs.  OUT is a new folder:

    rows/BLOCK.jsonl    one JSON object a line: case, status, and what was measured
    logs/BLOCK.log      what the block printed
    visit.jsonl         how each block ended
    visit-BLOCK.json, tune-*.json, decode-*.json    reports, as gemcut-bench report reads them
    breakdown-*.json    a decode step, kernel by kernel
    table.txt           at most 100 lines, the most important first; also printed
    all.tgz             all of these, written anew after each block; --archive puts it elsewhere

Nothing is installed.  torch, triton and the Python packages of pyproject.toml must be there, and
transformers for the peers.  Only the checkout must be carried: where gemcut is not
installed, a link named gemcut that leads to the checkout takes its place,

    mkdir -p /tmp/site && ln -sfn "$PWD" /tmp/site/gemcut && export PYTHONPATH=/tmp/site

and the version is read from pyproject.toml.  Kernels are compiled into Triton's cache, in as many
processes as there are cores.  Exit code 0; 1 where a block or a record failed or the input is bad;
2 for wrong usage.  The comment at BLOCKS says how the seconds of each block were estimated.
"""

import argparse
import ctypes
import importlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

from gemcut.tools.visit import report
from gemcut.tools.visit.block import Impossible, Visit

PACKAGE = "gemcut.tools.visit"
LIMIT = 570.0  # seconds of a whole visit
RESERVE = 5.0  # of them for the table and the archive
LEAST = 3.0  # seconds; with less left a block is not begun
GRACE = 3.0  # seconds between asking a block to stop and killing it
IMPOSSIBLE = 3  # exit code of a block: what was asked for cannot run here at all
DIES_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)
FINISHED, FAILED, TIMED_OUT, NO_TIME = "finished", "failed", "timed out", "no time was left"


@dataclass(frozen=True)
class Block:
    """A part of a visit; `lines` is how many lines of the table it may fill."""

    name: str
    module: str  # its run(visit) does the work
    seconds: float  # limit
    expected: float  # seconds on an H200
    lines: int
    interpreted: bool = True  # on a CPU: kernels run in Triton's interpreter
    by_name: bool = False  # runs where --only names it, as a whole visit has no time for it


# Where the expected seconds come from; the start of the machine is not in them, and four of each
# block are its imports; 565 in all, without those that run by name alone.
#   machine    eight small kernels compiled, 2 s each; five rounds of 2 GB and of 1.4 ms
#   compile    237 variants of 1 to 6 s (155 took 288 s on two busy cores), 16 at a time,
#              and as many stubs of gcc; then five steps of two layers a model, kernel by kernel
#   ops        230 cases and 42 ops in four companies, 0.1 s each: float64 at 4 TB/s
#   bits       2000 replays of 0.1 ms three times, of 4 ms twice; 300 eager steps of 3 ms of text
#   capture    a capture of 1 s, 20 rounds of a replay and nine eager launches
#   waits      two models of six layers; nine captures each of 1 s, 200 replays of at most 4 ms
#   steps      weights drawn in 2 s, two captures of 2 s, twice 200 replays of 1.5 to 6 ms, a
#              profile 4 s
#   tiles      its own --minutes 0.85
#   quantized  15 products and 8 ops on a cache in fp8 in two forms, 1 s each for inputs, float64,
#              a capture and rounds
#   pdl        20 forms: a capture of 26 launches, 130 replays of 0.2 ms each
#   attention  10 cases of 2 to 6 tiles, 1 s each for inputs, float64, capture and rounds
#   patched    transformers' import 10 s, four layers of two models, 20 variants of 1 s compiled
#   memcheck   imports and three small calls, five times as slow as without it
#   peers      two runs: weights and token check 10 s, transformers' import 10 s, two compilations
#              of 30 s
BLOCKS = (
    Block("machine", f"{PACKAGE}.machine", seconds=60, expected=25, lines=9, interpreted=False),
    Block("compile", f"{PACKAGE}.compile", seconds=100, expected=50, lines=4, interpreted=False),
    Block("ops", f"{PACKAGE}.ops", seconds=90, expected=45, lines=4),
    Block("bits", f"{PACKAGE}.bits", seconds=75, expected=40, lines=10),
    Block("capture", f"{PACKAGE}.capture", seconds=40, expected=8, lines=3),
    Block("waits", f"{PACKAGE}.waits", seconds=60, expected=30, lines=12),
    Block("steps", f"{PACKAGE}.steps", seconds=120, expected=81, lines=16),
    Block("tiles", f"{PACKAGE}.tiles", seconds=71, expected=61, lines=12, interpreted=False),
    Block("quantized", f"{PACKAGE}.quantized", seconds=60, expected=33, lines=5),
    Block("pdl", f"{PACKAGE}.pdl", seconds=45, expected=20, lines=10),
    Block("attention", f"{PACKAGE}.attention", seconds=60, expected=36, lines=14),
    Block("patched", f"{PACKAGE}.patched", seconds=60, expected=30, lines=8, by_name=True),
    Block("memcheck", f"{PACKAGE}.memcheck", seconds=60, expected=30, lines=3),
    Block("peers", f"{PACKAGE}.peers", seconds=170, expected=105, lines=5),
)


def run_block(block: Block, arguments: argparse.Namespace, seconds: float) -> dict:
    """How a block ended, in its own process and at most so many seconds."""
    command = [sys.executable, "-P", "-m", "gemcut.tools.gpu_visit", str(arguments.out)]
    command += ["--block", block.name, "--device", arguments.device, "--limit", f"{seconds:.1f}"]
    command += ["--blocks", arguments.blocks] if arguments.blocks else []
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    if arguments.device == "cpu" and block.interpreted:
        environment["TRITON_INTERPRET"] = "1"
    started = time.monotonic()
    with (arguments.out / "logs" / f"{block.name}.log").open("ab") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env=environment, preexec_fn=_own_group
        )
        try:
            code = process.wait(seconds)
            status = FINISHED if code == 0 else FAILED
        except subprocess.TimeoutExpired:
            code, status = _stop(process), TIMED_OUT
        except BaseException:
            _stop(process)
            raise
    ended = {"block": block.name, "status": status, "code": code}
    ended["seconds"] = round(time.monotonic() - started, 1)
    if status == TIMED_OUT:
        ended["detail"] = f"not done after {seconds:.0f} s"
    elif status == FAILED:
        ended["detail"] = _last_line(arguments.out, block) or "it said nothing"
        if code < 0:
            ended["detail"] = f"killed by {signal.Signals(-code).name}"
    return ended


def _own_group() -> None:
    """In the child: a group to be ended with all that it starts, and its end with the visit's."""
    os.setpgrp()
    ctypes.CDLL(None).prctl(DIES_WITH_PARENT, signal.SIGKILL)


def _stop(process: subprocess.Popen) -> int:
    """End a block and all that it started: benchmarks keep what they have at an interrupt."""
    for name, patience in ((signal.SIGINT, GRACE), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, name)
        except ProcessLookupError:
            break
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue
    return process.wait()


def _last_line(out: Path, block: Block) -> str:
    lines = (out / "logs" / f"{block.name}.log").read_text(errors="replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def visit(arguments: argparse.Namespace, blocks: Sequence[Block]) -> int:
    """Run the blocks that are asked for, and write the table; 1 where anything failed."""
    out: Path = arguments.out
    ends = time.monotonic() + arguments.limit - RESERVE
    done = {end["block"] for end in report.ends(out) if end["status"] == FINISHED}
    chosen = [
        block
        for block in blocks
        if block.name in (arguments.only or [b.name for b in blocks if not b.by_name])
    ]
    impossible = None
    try:
        for block in chosen:
            if arguments.resume and block.name in done:
                continue
            left = ends - time.monotonic()
            if left < LEAST:
                end = {"block": block.name, "status": NO_TIME, "seconds": 0.0}
            else:
                print(f"== {block.name}", flush=True)
                end = run_block(block, arguments, min(block.seconds, left))
                detail = f": {end['detail']}" if "detail" in end else ""
                print(f"== {block.name} {end['status']}, {end['seconds']} s{detail}", flush=True)
            report.append(out / "visit.jsonl", end)
            report.write_report(out, block.name)
            write_archive(arguments, blocks)
            if end.get("code") == IMPOSSIBLE:
                impossible = end["detail"]
                break
    except KeyboardInterrupt:
        print("interrupted: what was measured is kept", flush=True)
        impossible = "interrupted"
    lines = write_archive(arguments, blocks)
    print("\n".join(lines), flush=True)
    if impossible is not None:
        print(f"gpu_visit: {impossible}", file=sys.stderr)
    return int(impossible is not None or report.has_failed(out, [b.name for b in chosen]))


def write_archive(arguments: argparse.Namespace, blocks: Sequence[Block]) -> list[str]:
    """Write the table and the archive as they are now; the table's lines."""
    lines = report.table(arguments.out, {block.name: block.lines for block in blocks})
    (arguments.out / report.TABLE).write_text("\n".join(lines) + "\n")
    report.pack(arguments.out, arguments.archive)
    return lines


def find_blocks(name: str | None) -> Sequence[Block]:
    """The blocks of a visit; a test names another module, which has its own."""
    return BLOCKS if name is None else importlib.import_module(name).BLOCKS


def run_inside(arguments: argparse.Namespace, block: Block) -> int:
    """A block's own process: its exit code."""
    given = Visit(arguments.out, block.name, arguments.device, arguments.limit)
    try:
        given.check_device()
    except Impossible as error:
        print(error, file=sys.stderr)
        return IMPOSSIBLE
    importlib.import_module(block.module).run(given)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0; 1 where anything failed or the input is bad; 2 for wrong usage."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        if arguments.keep is not None:
            return keep(arguments.keep, arguments.results)
        if arguments.out is None:
            parser.error("OUT is needed: a folder for what is found")
        blocks = find_blocks(arguments.blocks)
        by_name = {block.name: block for block in blocks}
        for name in [*(arguments.only or ()), *filter(None, [arguments.block])]:
            if name not in by_name:
                raise ValueError(f"there is no block {name!r}; there are {', '.join(by_name)}")
        if not arguments.limit > 0:
            raise ValueError(f"--limit {arguments.limit} is not above 0")
        if arguments.block is not None:
            return run_inside(arguments, by_name[arguments.block])
        prepare(arguments)
        signal.signal(signal.SIGTERM, _interrupt)
        return visit(arguments, blocks)
    except (ValueError, OSError) as error:
        print(f"gpu_visit: {next(iter(str(error).splitlines()), '')}", file=sys.stderr)
        return 1


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def prepare(arguments: argparse.Namespace) -> None:
    """Make the folders of a visit; ValueError where OUT exists, or holds no visit to resume."""
    arguments.out = arguments.out.resolve()
    if arguments.archive is None:
        arguments.archive = arguments.out / report.ARCHIVE
    if arguments.resume and not (arguments.out / "rows").is_dir():
        raise ValueError(f"{arguments.out} holds no visit to resume")
    if not arguments.resume and arguments.out.exists():
        raise ValueError(f"{arguments.out} exists: name a new folder, or --resume the visit in it")
    for name in ("rows", "logs"):
        (arguments.out / name).mkdir(parents=True, exist_ok=True)


def keep(found: Path, results: Path) -> int:
    """Copy the reports of a visit, a folder or an archive of one, to the folder of its device."""
    if not found.is_dir():
        with tempfile.TemporaryDirectory() as folder:
            report.unpack(found, Path(folder))
            return keep(Path(folder), results)
    for file in report.keep(found, results):
        print(f"written: {file}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -P -m gemcut.tools.gpu_visit",
        description="Check and measure everything on a GPU, in one command of limited time.",
    )
    parser.add_argument("out", type=Path, nargs="?", metavar="OUT", help="a new folder")
    names = ", ".join(block.name for block in BLOCKS)
    parser.add_argument("--only", nargs="+", metavar="BLOCK", help=f"of {names}")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: cuda")
    parser.add_argument("--resume", action="store_true", help="run what has not finished in OUT")
    parser.add_argument(
        "--limit", type=float, default=LIMIT, metavar="SECONDS", help="of all; default: %(default)g"
    )
    parser.add_argument("--archive", type=Path, metavar="FILE", help="default: OUT/all.tgz")
    parser.add_argument("--keep", type=Path, metavar="OUT", help="copy reports; or an all.tgz")
    parser.add_argument(
        "--results", type=Path, metavar="FOLDER", default=report.RESULTS, help="of --keep"
    )
    parser.add_argument("--block", help=argparse.SUPPRESS)  # this process is that block's
    parser.add_argument("--blocks", help=argparse.SUPPRESS)  # a module with other blocks
    return parser


if __name__ == "__main__":
    sys.exit(main())
