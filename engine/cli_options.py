"""The options of the `gemcut` commands, in groups that several commands share."""

import argparse

from gemcut.engine.checks import read_size

QUANTIZATIONS = ("int8", "int4", "fp8")
MODEL = (
    "demo (the default), a folder, a GGUF file, or a Hugging Face id; owner/name:Q4_0 is one of "
    "several GGUF files"
)


# the options of add_sampling, as SamplingParams and requests to a server name them
SAMPLING = (
    "max_tokens",
    "min_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "seed",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "prompt_lookup_num_tokens",
    "stop",
    "bad_words",
    "ignore_eos",
)


def add_model(parser: argparse.ArgumentParser, text: str, default: str | None = "demo") -> None:
    """A model, as an argument or as an option."""
    either = parser.add_mutually_exclusive_group()
    # SUPPRESS: a MODEL that is not given must not undo --model
    either.add_argument("model", nargs="?", metavar="MODEL", default=argparse.SUPPRESS, help=text)
    either.add_argument("--model", dest="model", default=default, help="the same, as an option")


def add_sampling(
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


def add_device(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Where a model runs, and in which numbers; the group."""
    group = parser.add_argument_group("engine")
    group.add_argument("--device", default="auto", help="cuda, cpu (default: cuda if there is one)")
    group.add_argument(
        "--dtype",
        default="auto",
        help="bfloat16, float32 (default: bfloat16 on cuda and of quantised weights, else float32)",
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
    add_lora(group)
    return group


def add_lora(group: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """An adapter of the model."""
    group.add_argument(
        "--lora",
        metavar="FOLDER_OR_ID",
        help="merge a LoRA adapter, which peft has saved as safetensors, into the weights",
    )


def add_engine(parser: argparse.ArgumentParser) -> None:
    """The options of an engine that generates."""
    group = add_device(parser)
    add_length(group)
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


def engine_defaults() -> dict[str, object]:
    """The options of an engine that generates, by name, with what they are where not given."""
    parser = argparse.ArgumentParser(add_help=False)
    add_engine(parser)
    return vars(parser.parse_args([]))


def add_url(parser: argparse.ArgumentParser) -> None:
    """A server that has the model, in place of an engine here."""
    group = parser.add_argument_group(
        "server",
        "the model of any OpenAI-compatible server; MODEL is its name there (default: its only "
        "one), and sampling is as the server has it, except for the options given",
    )
    group.add_argument("--url", metavar="URL", help="such as http://127.0.0.1:8000/v1")
    group.add_argument(
        "--api-key",
        metavar="KEY",
        help="its key; better in GEMCUT_API_KEY or OPENAI_API_KEY, since others can see arguments",
    )


def add_server(parser: argparse.ArgumentParser) -> None:
    """The options of `gemcut serve` beside those of an engine."""
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="address (default: %(default)s)")
    group.add_argument("--port", type=int, default=8000, help="(default: %(default)s)")
    group.add_argument(
        "--api-key",
        action="append",
        metavar="KEY",
        help="ask each request for this key; may be given several times (default: that in "
        "GEMCUT_API_KEY, else none)",
    )
    group.add_argument(
        "--served-model-name",
        action="append",
        metavar="NAME",
        help="what requests call the model; may be given several times (default: MODEL, of a path "
        "its last part)",
    )
    group.add_argument(
        "--allowed-origin",
        action="append",
        metavar="URL",
        help="let pages of this origin ask; *: of any; may be given several times (default: none)",
    )
    group.add_argument(
        "--chat-template", metavar="FILE", help="of chats, in place of the checkpoint's"
    )
    group.add_argument(
        "--merge-system",
        action="store_true",
        help="put a system message that the template refuses before the first of the user",
    )
    group.add_argument(
        "--max-batch-size",
        type=number_or_auto,
        default=8,
        metavar="N",
        help="completions that run at once; auto: the most of 16, 8, 4, 2, 1 that memory allows "
        "(default: %(default)s)",
    )

    def limit(name: str, default: int, what: str) -> None:
        group.add_argument(
            name, type=int, default=default, metavar="N", help=f"{what} (default: %(default)s)"
        )

    limit("--max-waiting", 256, "completions that wait for a slot; more get status 429")
    limit("--max-streams", 256, "requests open at once; more get status 429")
    limit("--max-n", 16, "completions of one prompt")
    group.add_argument(
        "--max-body-size",
        type=_size,
        default="4MiB",
        metavar="SIZE",
        help="of a request, in bytes, KB, MB or MiB (default: %(default)s)",
    )
    group.add_argument(
        "--grace-period",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="that running answers have to end after SIGTERM or Ctrl-C (default: %(default)s)",
    )
    group.add_argument(
        "--no-warmup",
        dest="warmup",
        action="store_false",
        help="take requests at once, and compile and capture while the first are answered",
    )
    parser.set_defaults(unpublished={})


def add_length(group: argparse._ArgumentGroup) -> None:
    """The length of a slot."""
    group.add_argument(
        "--max-seq-len",
        type=number_or_auto,
        metavar="N",
        help="tokens of prompt and text together; auto, the default: the model's limit, as memory "
        "allows",
    )


def add_conversion(parser: argparse.ArgumentParser) -> None:
    """The arguments of `gemcut convert`."""
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
    add_lora(parser)
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


def number_or_auto(text: str) -> int | str:
    """A number, or "auto"."""
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor 'auto'") from None
