"""The `gemcut` command: its arguments, and the exit codes and messages of its errors.

cli_options.py holds the options, commands.py the commands themselves.
"""

import argparse
import io
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version

from gemcut.engine.cli_options import (
    MODEL,
    add_conversion,
    add_device,
    add_engine,
    add_length,
    add_model,
    add_sampling,
    add_server,
    add_url,
    number_or_auto,
)

INTERRUPTED = 128 + 2  # a shell's exit codes for a program killed by SIGINT or SIGPIPE
PIPE_CLOSED = 128 + 13
OTHER_NAMES = {  # in other servers' commands
    "--max-model-len": "--max-seq-len",
    "--ctx-size": "--max-seq-len",
    "--max-num-seqs": "--max-batch-size",
    "--parallel": "--max-batch-size",
}

EPILOG = """\
exit codes: 0 fine, 1 an error (one line on standard error), 2 wrong usage, 130 after Ctrl-C,
141 where the reader of the output has left
"""
GENERATE = """\
Print the text with which the model goes on from a prompt, as it comes, and a newline.  The prompt
itself is not printed, and nothing else is written to standard output.
"""
CHAT = """\
Talk with the model, or with that of a server at --url.  /reset forgets the conversation, /exit or
Ctrl-D leaves; Ctrl-C stops an answer, and leaves at the prompt (exit code 130).  Where standard
input or output is no terminal, each line read is a turn of the user, nothing but the answers is
written to standard output, and the exit code is 1 if a turn was refused.
"""
SERVE = """\
Serve a model to OpenAI's clients: /v1/completions, /v1/chat/completions, /v1/responses, /v1/models,
/tokenize, /detokenize, /health, /metrics, and a page to chat on at /.  SIGTERM and Ctrl-C let
running answers end; a second one ends them.  Needs pip install 'gemcut[serve]'.
"""
INFO = """\
Print a model's shape, its size in memory, what fits on this machine now, and what an engine of the
given sizes would take.  The config is enough: no weights are read or fetched, except of a GGUF file
on the Hub, which is fetched whole.
"""

CONVERT = """\
Convert a model's weights between Hugging Face safetensors, the original checkpoints of
google/gemma_pytorch (.ckpt pickles, whole or sharded, bfloat16, float32 or int8 with scalers) and
Flax msgpack; and from GGUF, dequantised, with its config and tokenizer.  What was written is read
back and compared with the source, bit for bit, before it takes its place.  A pickle's code is never
run.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code of `gemcut` with these arguments, by default the command line's."""
    _prepare_streams()
    try:
        try:
            return _run(_parse(argv))
        finally:
            sys.stdout.flush()  # here, not at the interpreter's exit, so that a failure is seen
    except KeyboardInterrupt:
        # The cursor is after "^C" or half an answer.
        print(file=sys.stdout if sys.stdout.isatty() else sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        _drop_output()
        return PIPE_CLOSED
    except (ValueError, NotImplementedError, MemoryError, OSError, ImportError) as error:
        reason = " ".join(str(error).splitlines()) or type(error).__name__
        print(f"gemcut: error: {reason}", file=sys.stderr)
        _drop_output()
        return 1


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; unknown ones end the process with the usage of their own command."""
    args, unknown = _parser().parse_known_args(argv)
    if unknown:
        name = unknown[0].partition("=")[0]
        hint = f"; it is {OTHER_NAMES[name]} here" if name in OTHER_NAMES else ""
        args.refuse(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    return args


def _run(args: argparse.Namespace) -> int:
    if args.command == "chat" and args.url is not None:
        # not `from gemcut.engine import`: that asks the package for its names, and so for torch
        from gemcut.engine.remote_chat import chat

        return chat(args)
    # Not at the top: this imports torch, which takes two seconds; --help and a typo must not wait.
    from gemcut.engine import commands

    run = {
        "generate": commands.generate,
        "chat": commands.chat,
        "serve": commands.serve,
        "info": commands.info,
        "convert": commands.convert,
    }
    return run[args.command](args)


def _prepare_streams() -> None:
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # the caller had closed it
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  # open to the end
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal that cannot show a character shows its number, as on standard error.
        sys.stdout.reconfigure(errors="backslashreplace")


def _drop_output() -> None:
    """Flush standard output; where that fails, discard what it holds.

    The interpreter flushes once more at its exit, and would complain.
    """
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gemcut",
        description="Run Gemma models.",
        epilog=EPILOG,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"gemcut {version('gemcut')}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, summary: str, description: str) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name, help=summary, description=description, epilog=EPILOG, allow_abbrev=False
        )
        added.set_defaults(refuse=added.error)
        return added

    generate = command("generate", "continue a prompt", GENERATE)
    generate.add_argument(
        "prompt",
        nargs="?",
        metavar="PROMPT",
        help="without it, or where it is -, standard input is the prompt, less one newline that "
        "ends it",
    )
    generate.add_argument("--model", default="demo", help=MODEL)
    generate.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object: text, token_ids, finish_reason, stop_reason, "
        "prompt_token_ids, outputs (all completions), metrics",
    )
    generate.add_argument(
        "--no-stream", action="store_true", help="print the text when it is complete"
    )
    sampling = add_sampling(generate, max_tokens=256)
    sampling.add_argument(
        "--n",
        type=int,
        default=argparse.SUPPRESS,
        help="completions; several are printed when all are complete, a line --- between them "
        "(default: 1)",
    )
    sampling.add_argument(
        "--logprobs",
        type=int,
        default=argparse.SUPPRESS,
        metavar="K",
        help="with --json, the log-probabilities of each token and of the K likeliest in its place",
    )
    sampling.add_argument(
        "--json-schema",
        metavar="FILE_OR_TEXT",
        help="write a JSON document of this schema; needs pip install llguidance",
    )
    sampling.add_argument(
        "--regex", help="write a text that this regular expression matches as a whole; the same"
    )
    add_engine(generate)

    chat = command("chat", "talk with a model", CHAT)
    add_model(chat, MODEL, default=None)
    chat.add_argument("--system", metavar="TEXT", help="goes before your first turn")
    add_url(chat)
    add_sampling(chat, max_tokens=None)
    add_engine(chat)

    serve = command("serve", "serve a model to OpenAI's clients", SERVE)
    add_model(serve, MODEL)
    add_server(serve)
    add_engine(serve)

    info = command("info", "show a model's shape, its size, and what fits here", INFO)
    add_model(info, f"{MODEL}; or a published size, such as gemma-2-9b")
    info.add_argument(
        "--check",
        action="store_true",
        help="read the weights too, and name every NaN or infinity, every tensor that is missing, "
        "unknown or misshapen, in one line each; exit code 1 if there is any",
    )
    info.add_argument("--json", action="store_true", help="print one JSON object")
    group = add_device(info)
    group.add_argument(
        "--max-batch-size",
        type=number_or_auto,
        default=8,
        metavar="N",
        help="slots; auto: the most of 16, 8, 4, 2, 1 that memory allows (default: %(default)s)",
    )
    add_length(group)

    add_conversion(command("convert", "convert weights from and to other formats", CONVERT))
    return parser
