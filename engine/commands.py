"""The `gemcut` commands: each takes its parsed arguments and returns an exit code."""

import argparse
import json
import warnings
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch

from gemcut.engine.checkpoints.convert import convert as convert_checkpoint
from gemcut.engine.checkpoints.load import expected_layouts
from gemcut.engine.checkpoints.lora import open_adapter
from gemcut.engine.engine import Engine
from gemcut.engine.info import describe, find_model, find_problems, lines
from gemcut.engine.placement import choose_device, choose_dtype
from gemcut.engine.requests.sampling_params import SamplingParams
from gemcut.engine.requests.structured_outputs import StructuredOutputsParams
from gemcut.engine.terminal import (
    RESET_HELP,
    Messages,
    note,
    prepare_terminal,
    read_prompt,
    show,
    talk,
    until_ctrl_c,
)
from gemcut.tokenizer import encode_chat

MAX_SLOTS = 8  # more completions than that take turns
SEPARATOR = "\n---\n"


def generate(args: argparse.Namespace) -> int:
    """Print the completions of the prompt; 0."""
    if args.json_schema is not None or args.regex is not None:
        schema = None if args.json_schema is None else _read_schema(args.json_schema)
        args.structured_outputs = StructuredOutputsParams(json=schema, regex=args.regex)
    given = _given(args)
    if given.logprobs is not None and not args.json:
        raise ValueError("--logprobs has no place in plain text; add --json")
    prompt = read_prompt() if args.prompt in (None, "-") else args.prompt
    with _engine(args, max_batch_size=min(given.n, MAX_SLOTS)) as engine:
        params = _sampling_params(args, engine.get_default_sampling_params())
        if params.n == 1 and not (args.json or args.no_stream):
            for delta in engine.stream(prompt, params):
                show(delta.text)
            print()
            return 0
        output = engine.generate(prompt, params)
    if not args.json:
        print(SEPARATOR.join(completion.text for completion in output.outputs))
        return 0
    completions = asdict(output)
    first = completions["outputs"][0]
    names = ("text", "token_ids", "finish_reason", "stop_reason")
    _print_json({"model": args.model, **{name: first[name] for name in names}, **completions})
    return 0


def chat(args: argparse.Namespace) -> int:
    """Talk until the user leaves; 0, or 1 where a turn from a file or pipe was refused."""
    _given(args)
    if args.api_key is not None:
        raise ValueError("--api-key is for a server: give its --url too")
    if args.model is None:
        args.model = "demo"
    prepare_terminal()
    with _engine(args, max_batch_size=1) as engine:
        params = _sampling_params(args, engine.get_default_sampling_params())
        return talk(lambda messages: _answer(engine, messages, params), args.system)


def serve(args: argparse.Namespace) -> int:
    """Serve a model until a signal; 0."""
    try:
        from gemcut.engine.openai_api import serve as server
    except ModuleNotFoundError as error:
        raise ValueError(
            f"gemcut serve needs the package {error.name}: pip install 'gemcut[serve]'"
        ) from None
    settings = server.settings_of(args)
    with server.bind(args.host, args.port) as bound:
        note(f"loading {args.model}")
        engine = _engine(args, max_batch_size=args.max_batch_size, max_waiting=args.max_waiting)
        if args.warmup:
            server.warm_up(engine)
        server.run(engine, settings, bound, args.grace_period)
    return 0


def info(args: argparse.Namespace) -> int:
    """Print the facts of a model; 0, or 1 where --check has found a problem."""
    device = choose_device(args.device)
    config, path = find_model(args.model)
    adapter = None if args.lora is None else open_adapter(args.lora, config)
    own_config, config = config, config if adapter is None else adapter.config
    is_quantized = bool(expected_layouts(config, args.quantization, path))
    dtype = choose_dtype(args.dtype, device, is_quantized)
    facts = describe(
        config,
        device,
        dtype,
        args.max_batch_size,
        args.max_seq_len,
        args.quantization,
        path,
        args.kv_cache_dtype,
        choose_dtype(args.dtype, device, is_quantized=True),
    )
    problems = find_problems(args.model, own_config, adapter) if args.check else None
    if args.json:
        checked = {} if problems is None else {"problems": problems}
        values = {
            "model": args.model,
            "lora": args.lora,
            **asdict(facts),
            "config": config.to_dict(),
            **checked,
        }
        _print_json(values)
        return int(bool(problems))
    name = args.model if args.lora is None else f"{args.model} with {args.lora}"
    for label, value in lines(name, config, facts):
        print(f"{label:<13} {value}")
    if problems is not None:
        for problem in problems or ["names, shapes and values are right"]:
            print(f"{'check':<13} {problem}")
    return int(bool(problems))


def convert(args: argparse.Namespace) -> int:
    """Convert a checkpoint and print what was verified; 0."""
    done = convert_checkpoint(
        args.source,
        args.target,
        to=args.to,
        source_format=args.source_format,
        config=args.config,
        dtype=None if args.dtype == "keep" else getattr(torch, args.dtype),
        quantization=args.quantization,
        lora=args.lora,
        tokenizer=args.tokenizer,
        max_shard_bytes=args.max_shard_size,
        overwrite=args.overwrite,
    )
    if done.inferred is not None:
        note(f"no config: by its shapes, this is {done.inferred}")
    if done.left_aside:
        note(f"{done.left_aside} tensors left aside, which the language model does not need")
    for name in done.nonfinite:
        note(f"{name} holds a NaN or an infinity")
    kind = f"{done.config.dtype}, matrices in {args.quantization}"
    kind = kind if args.quantization is not None else done.config.dtype
    files = f"{len(done.files)} file{'s' if len(done.files) > 1 else ''}"
    print(
        f"{done.target}: {done.source_format} to {done.target_format}, {kind}, "
        f"{files}; verified: {done.tensors} tensors, {done.nbytes} bytes, read back and equal"
    )
    return 0


def _sampling_params(args: argparse.Namespace, defaults: SamplingParams) -> SamplingParams:
    """The settings of the command line, and these defaults for what is not given."""
    names = [field.name for field in fields(SamplingParams) if hasattr(args, field.name)]
    return replace(defaults, **{name: getattr(args, name) for name in names})


def _given(args: argparse.Namespace) -> SamplingParams:
    """The settings of the command line alone, checked before a model is loaded."""
    return _sampling_params(args, SamplingParams())


def _engine(
    args: argparse.Namespace,
    *,
    max_batch_size: int | Literal["auto"],
    max_waiting: int | None = None,
) -> Engine:
    """The engine that the arguments describe; what it warns of is a line on standard error each."""
    with warnings.catch_warnings(record=True) as found:
        engine = Engine.from_pretrained(
            args.model,
            device=args.device,
            dtype=args.dtype,
            kv_cache_dtype=args.kv_cache_dtype,
            max_batch_size=max_batch_size,
            max_waiting=max_waiting,
            max_seq_len=args.max_seq_len,
            ops=args.ops,
            cuda_graphs=args.cuda_graphs,
            dependent_launches=args.dependent_launches,
            generation_config=args.generation_config,
            default_params=SamplingParams(**args.unpublished),
            revision=args.revision,
            quantization=args.quantization,
            lora=args.lora,
        )
    for warning in found:
        note(f"warning: {' '.join(str(warning.message).split())}")
    return engine


def _answer(engine: Engine, messages: Messages, params: SamplingParams) -> Messages:
    """The conversation with the model's answer, which is printed as it is generated.

    ValueError where the conversation does not fit the slot.
    """
    assert engine.tokenizer is not None
    length = len(encode_chat(engine.tokenizer, messages, merge_system=True))
    if length >= engine.max_seq_len:
        raise ValueError(
            f"with this turn the conversation has {length} tokens and one to generate, "
            f"but a slot holds {engine.max_seq_len}; {RESET_HELP}"
        )
    answer, finish_reason = "", None
    with until_ctrl_c():
        for delta in engine.chat(messages, params, stream=True, merge_system=True):
            answer += delta.text  # before it is shown: Ctrl-C may come between
            length += len(delta.token_ids)
            finish_reason = delta.finish_reason
            show(delta.text)
    print(flush=True)
    if length >= engine.max_seq_len:
        note(f"the conversation fills its slot of {length} tokens; {RESET_HELP}")
    elif finish_reason == "length":
        note(f"the answer was cut at --max-tokens {params.max_tokens}")
    return [*messages, {"role": "model", "content": answer}]


def _read_schema(file_or_text: str) -> str:
    """A JSON schema: the text itself where it is an object, else that of the file it names."""
    if file_or_text.lstrip().startswith("{"):
        return file_or_text
    return Path(file_or_text).read_text(encoding="utf-8")


def _print_json(values: dict[str, Any]) -> None:
    print(json.dumps(values, allow_nan=False))
