"""The `gemcut-bench` command.

    gemcut-bench decode --model demo --threads 1

Exit code 0; 1 for bad input, or where a contestant computes something else; 2 for wrong usage; 130
for an interrupted run, which prints what it has measured.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from gemcut.bench.decode import (
    Workload,
    print_decode,
    report_decode,
    run_decode,
    setup_decode,
)
from gemcut.bench.peers import PEERS, choose_peers
from gemcut.bench.report import print_json
from gemcut.engine.checks import check_int

INTERRUPTED = 130  # 128 + SIGINT, as a shell has it


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code of the command with these arguments."""
    arguments = _parser().parse_args(argv)
    try:
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
    decode = commands.add_parser(
        "decode",
        help="tokens a second, beside other stacks",
        description="Tokens a second of greedy decoding, beside other stacks in turn.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    decode.add_argument("--model", default="demo", help="demo, a folder or a Hugging Face id")
    decode.add_argument("--prompt-tokens", type=int, default=16, metavar="N")
    decode.add_argument("--new-tokens", type=int, default=128, metavar="N")
    decode.add_argument("--batch", type=int, default=1, metavar="N", help="prompts at a time")
    decode.add_argument("--repeats", type=int, default=7, metavar="N", help="rounds")
    decode.add_argument("--threads", type=int, metavar="N", help="of torch; default: its own")
    decode.add_argument("--dtype", default="float32", help="auto, float32 or bfloat16")
    decode.add_argument("--device", default="auto", help="auto, cpu or cuda")
    decode.add_argument(
        "--peer",
        nargs="+",
        action="extend",
        metavar="PEER",
        help=f"of {', '.join(PEERS)}; default: all that are installed",
    )
    decode.add_argument("--json", type=Path, metavar="FILE", help="write the JSON there too")
    decode.set_defaults(run=_decode)
    return parser


def _decode(arguments: argparse.Namespace) -> int:
    workload = Workload(
        arguments.prompt_tokens, arguments.new_tokens, arguments.batch, arguments.repeats
    )
    peers = choose_peers(arguments.peer)
    if arguments.threads is not None:
        check_int("threads", arguments.threads, 1, 1024)
        torch.set_num_threads(arguments.threads)
    if arguments.json is not None and not arguments.json.parent.is_dir():
        raise ValueError(f"--json {str(arguments.json)!r}: there is no such folder")
    setup = setup_decode(arguments.model, arguments.device, arguments.dtype, workload)

    result = run_decode(setup, workload, peers)
    print_decode(setup, workload, result)
    print_json(report_decode(setup, workload, result), arguments.json)
    if result.interrupted:
        return INTERRUPTED
    wrong = any(verdict.status == "wrong" for verdict in result.verdicts.values())
    nobody = bool(peers) and len(result.timed) == 1  # every peer failed
    return 1 if wrong or nobody else 0
