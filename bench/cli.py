"""The `gemcut-bench` command.

    gemcut-bench kernels --op rmsnorm geglu
    gemcut-bench decode --model demo --threads 1
    gemcut-bench prefill --random gemma-2-2b --tokens 512 4096
    gemcut-bench serve-sim --rate 4 --requests 64
    gemcut-bench serve --url http://127.0.0.1:8000/v1
    gemcut-bench host-work --batch 1 16
    gemcut-bench compare A.json B.json
    gemcut-bench report *.json --out page

Exit code 0; 1 for bad input, where a contestant computes something else, where B is slower than A,
or where the host works longer than promised; 2 for wrong usage; 130 for an interrupted run, which
prints what it has measured.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from gemcut.bench.engines import decode, host_work, prefill, serve, serve_sim
from gemcut.bench.measure.report_file import INTERRUPTED
from gemcut.bench.ops import kernels
from gemcut.bench.report.compare import THRESHOLD, run_compare
from gemcut.engine.checks import check_int

BENCHMARKS = {
    "kernels": (kernels, "each op beside its peers"),
    "decode": (decode, "tokens a second, beside other stacks"),
    "prefill": (prefill, "time to the first token by prompt length"),
    "serve-sim": (serve_sim, "latencies of one engine under a trace of arrivals"),
    "serve": (serve, "latencies of OpenAI-compatible servers, side by side"),
    "host-work": (host_work, "what the host does in a step whose device takes no time"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code of the command with these arguments."""
    arguments = _parser().parse_args(argv)
    try:
        if (threads := getattr(arguments, "threads", None)) is not None:
            check_int("threads", threads, 1, 1024)
            torch.set_num_threads(threads)
        return arguments.run(arguments)
    except (ValueError, NotImplementedError, MemoryError, OSError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        print(f"gemcut-bench: {reason}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("gemcut-bench: interrupted before anything was measured", file=sys.stderr)
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gemcut-bench", description="Measure gemcut.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (module, summary) in BENCHMARKS.items():
        benchmark = commands.add_parser(
            name,
            help=summary,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(benchmark)
        if module is not serve:  # it has no engine
            _add_shared_arguments(benchmark)
        benchmark.set_defaults(run=module.run)

    compare = commands.add_parser("compare", help="two reports of the same cases")
    compare.add_argument("a", type=Path, metavar="A.json", help="before")
    compare.add_argument("b", type=Path, metavar="B.json", help="after")
    compare.add_argument("--threshold", type=float, default=THRESHOLD, metavar="SHARE")
    compare.set_defaults(run=_compare)

    report = commands.add_parser("report", help="a page with plots, and the README's table")
    report.add_argument("files", type=Path, nargs="+", metavar="FILE")
    report.add_argument("--out", type=Path, metavar="FOLDER", help="write the page there")
    report.add_argument("--readme", type=Path, metavar="FILE", help="write the table into it")
    report.add_argument("--check", action="store_true", help="only say whether it would change")
    report.set_defaults(run=_report)
    return parser


def _add_shared_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=int, metavar="N", help="of torch; default: its own")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--dtype", default="auto", help="auto, float32 or bfloat16")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the rows there too")


def _compare(arguments: argparse.Namespace) -> int:
    return run_compare(arguments.a, arguments.b, arguments.threshold)


def _report(arguments: argparse.Namespace) -> int:
    from gemcut.bench.report.markdown_page import (
        run_report,  # matplotlib, which no measurement needs
    )

    return run_report(arguments.files, arguments.out, arguments.readme, arguments.check)
