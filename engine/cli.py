"""The `gemcut` command: its arguments, and the exit codes and messages of its errors.

commands.py holds the commands themselves.
"""

import argparse
import io
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version

from gemcut.engine.checks import read_size

INTERRUPTED = 128 + 2  # a shell's exit codes for a program killed by SIGINT or SIGPIPE
PIPE_CLOSED = 128 + 13
QUANTIZATIONS = ("int8", "int4", "fp8")

EPILOG = """\
exit codes: 0 fine, 1 an error (one line on standard error), 2 wrong usage, 130 after Ctrl-C,
141 where the reader of the output has left
"""
GENERATE = """\
Print the text with which the model goes on from a prompt, as it comes, and a newline.  The prompt
itself is not printed, and nothing else is written to standard output.
"""
CHAT = """\
Talk with the model.  /reset forgets the conversation, /exit or Ctrl-D leaves; Ctrl-C stops an
answer, and leaves at the prompt (exit code 130).  Where standard input or output is no terminal,
each line read is a turn of the user, nothing but the answers is written to standard output, and the
exit code is 1 if a turn was refused.
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
            return _run(_parser().parse_args(argv))
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


def _run(args: argparse.Namespace) -> int:
    # Not at the top: this imports torch, which takes two seconds; --help and a typo must not wait.
    from gemcut.engine import commands

    run = {
        "generate": commands.generate,
        "chat": commands.chat,
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
        return commands.add_parser(
            name, help=summary, description=description, epilog=EPILOG, allow_abbrev=False
        )

    generate = command("generate", "continue a prompt", GENERATE)
    generate.add_argument(
        "prompt",
        nargs="?",
        metavar="PROMPT",
        help="without it, or where it is -, standard input is the prompt, less one newline that "
        "ends it",
    )
    generate.add_argument("--model", default="demo", help=_MODEL)
    generate.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object: text, token_ids, finish_reason, stop_reason, "
        "prompt_token_ids, outputs (all completions), metrics",
    )
    generate.add_argument(
        "--no-stream", action="store_true", help="print the text when it is complete"
    )
    sampling = _add_sampling(generate, max_tokens=256)
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
    _add_engine(generate)

    chat = command("chat", "talk with a model", CHAT)
    _add_model(chat, _MODEL)
    chat.add_argument("--system", metavar="TEXT", help="goes before your first turn")
    _add_sampling(chat, max_tokens=None)
    _add_engine(chat)

    info = command("info", "show a model's shape, its size, and what fits here", INFO)
    _add_model(info, f"{_MODEL}; or a published size, such as gemma-2-9b")
    info.add_argument(
        "--check",
        action="store_true",
        help="read the weights too, and name every NaN or infinity, every tensor that is missing, "
        "unknown or misshapen, in one line each; exit code 1 if there is any",
    )
    info.add_argument("--json", action="store_true", help="print one JSON object")
    group = _add_device(info)
    group.add_argument(
        "--max-batch-size",
        type=_number_or_auto,
        default=8,
        metavar="N",
        help="slots; auto: the most of 16, 8, 4, 2, 1 that memory allows (default: %(default)s)",
    )
    _add_length(group)

    _add_conversion(command("convert", "convert weights from and to other formats", CONVERT))
    return parser


_MODEL = (
    "demo (the default), a folder, a GGUF file, or a Hugging Face id; owner/name:Q4_0 is one of "
    "several GGUF files"
)


def _add_model(parser: argparse.ArgumentParser, text: str) -> None:
    either = parser.add_mutually_exclusive_group()
    # SUPPRESS: a MODEL that is not given must not undo --model
    either.add_argument("model", nargs="?", metavar="MODEL", default=argparse.SUPPRESS, help=text)
    either.add_argument("--model", dest="model", default="demo", help="the same, as an option")


def _add_sampling(
    parser: argparse.ArgumentParser, *, max_tokens: int | None
) -> argparse._ArgumentGroup:
    """The options that become SamplingParams, under its names; only those given are there."""
    group = parser.add_argument_group(
        "sampling", "defaults are those of the model's generation_config.json, else these"
    )
    unpublished = {"temperature": 0.8, "top_p": 0.95, "max_tokens": max_tokens}
    parser.set_defaults(unpublished=unpublished)

    def number(name: str, kind: type, text: str, metavar: str = "X") -> None:
        default = unpublished.get(name.removeprefix("--").replace("-", "_"))
        shown = "" if default is None else f" (default: {default})"
        group.add_argument(
            name, type=kind, default=argparse.SUPPRESS, metavar=metavar, help=text + shown
        )

    def texts(name: str, text: str) -> None:
        group.add_argument(
            name,
            action="append",
            default=argparse.SUPPRESS,
            metavar="TEXT",
            help=f"{text}; may be given several times",
        )

    end = "" if max_tokens else "; by default to the end of the turn"
    at_most = f"tokens to generate at most; the slot's end is a limit too{end}"
    number("--max-tokens", int, at_most, "N")
    number("--min-tokens", int, "tokens before which the text does not end by itself")
    number("--temperature", float, "0 takes the likeliest token")
    number("--top-k", int, "choose among the k likeliest tokens; 0: among all")
    number("--top-p", float, "choose among the fewest tokens with this much probability")
    number("--min-p", float, "leave out tokens below this share of the likeliest")
    number("--seed", int, "the same seed gives the same text; by default it varies")
    number("--repetition-penalty", float, "above 1 discourages tokens of prompt and text")
    number("--presence-penalty", float, "above 0 discourages tokens of the text")
    number("--frequency-penalty", float, "the same, for each time they stand there")
    number("--prompt-lookup-num-tokens", int, "guess up to 7 from the text, verify in one step")
    texts("--stop", "end before this text")
    texts("--bad-words", "never write this word")
    group.add_argument(
        "--ignore-eos",
        action="store_true",
        default=argparse.SUPPRESS,
        help="go on after an end of text",
    )
    return group


def _add_device(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    group = parser.add_argument_group("engine")
    group.add_argument("--device", default="auto", help="cuda, cpu (default: cuda if there is one)")
    group.add_argument(
        "--dtype",
        default="auto",
        help="bfloat16, float32 (default: bfloat16 on cuda, else float32)",
    )
    group.add_argument(
        "--quantization",
        choices=QUANTIZATIONS,
        help="quantise the matrices of a plain checkpoint while they are read (default: as stored)",
    )
    group.add_argument(
        "--kv-cache-dtype",
        choices=("auto", "fp8"),
        default="auto",
        help="of keys and values; fp8 takes half the memory of bfloat16 (default: the model's)",
    )
    return group


def _add_engine(parser: argparse.ArgumentParser) -> None:
    group = _add_device(parser)
    _add_length(group)
    group.add_argument(
        "--generation-config",
        default="auto",
        metavar="FOLDER",
        help="the folder whose generation_config.json has the defaults of sampling; none: no file "
        "(default: the model's)",
    )
    group.add_argument(
        "--revision",
        metavar="NAME",
        help="branch, tag or commit of a model on the Hub, to which the token in HF_TOKEN, or that "
        "of `hf auth login`, gives access",
    )
    group.add_argument("--ops", default="auto", help="triton, reference (default: what runs here)")
    group.add_argument(
        "--no-cuda-graphs",
        dest="cuda_graphs",
        action="store_false",
        help="launch every kernel of a step by itself on a GPU, as compute-sanitizer needs it",
    )
    group.add_argument(
        "--no-dependent-launches",
        dest="dependent_launches",
        action="store_false",
        help="begin each kernel of a step on a GPU only when the one before it has ended",
    )


def _add_length(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--max-seq-len",
        type=_number_or_auto,
        metavar="N",
        help="tokens of prompt and text together; auto, the default: the model's limit, as memory "
        "allows",
    )


def _add_conversion(parser: argparse.ArgumentParser) -> None:
    formats = ("huggingface", "original", "flax")
    parser.add_argument(
        "source", metavar="SOURCE", help="a file or folder, demo, or a Hugging Face id"
    )
    parser.add_argument("target", metavar="TARGET", help="the folder to write")
    parser.add_argument(
        "--to", choices=formats, default=formats[0], help="what to write (default: %(default)s)"
    )
    parser.add_argument(
        "--from",
        dest="source_format",
        choices=(*formats, "gguf"),
        help="what to read (default: seen from the files)",
    )
    parser.add_argument(
        "--config",
        metavar="NAME_OR_FILE",
        help="a published size, such as gemma-2-2b, or a config.json (default: the one beside the "
        "weights, else the published size that the shapes are those of)",
    )
    parser.add_argument(
        "--dtype",
        choices=("keep", "bfloat16", "float32"),
        default="keep",
        help="of the written weights; int8 is kept as bfloat16 (default: %(default)s)",
    )
    parser.add_argument(
        "--quantization",
        choices=QUANTIZATIONS,
        help="write the matrices of layers as compressed-tensors has them, embedding and head "
        "plain, for transformers and vLLM too (default: as they are)",
    )
    parser.add_argument(
        "--tokenizer",
        metavar="FILE",
        help="goes beside the weights as tokenizer.model (default: the source folder's)",
    )
    parser.add_argument(
        "--max-shard-size",
        type=_size,
        default="5GB",
        metavar="SIZE",
        help="of a file, in bytes, KB, MB or GB (default: %(default)s)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the model that is in TARGET"
    )


def _size(text: str) -> int:
    try:
        return read_size("a size", text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _number_or_auto(text: str) -> int | str:
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor 'auto'") from None
