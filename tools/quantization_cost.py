"""What quantised weights cost and gain: a text's bits per byte and perplexity, tokens/s.

    python -P -m gemcut.tools.quantization_cost --model demo --text heldout.txt
    python -P -m gemcut.tools.quantization_cost --model FOLDER --speed --threads 2 --peers
    python -P -m gemcut.tools.quantization_cost --model FOLDER --text heldout.txt --gguf FILE

A line for each format.  The text is scored in float32, in windows of so many tokens, by what the
weights stand for; with --gguf also that file, by gemcut and, as it computes, by llama.cpp (package
llama-cpp-python).  Speed is that of one request in bfloat16, by the time between a first token and
the last; engines take turns, transformers with --peers and llama.cpp with --gguf among them, and
the median is reported.
"""

import argparse
import importlib
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from gemcut.engine import Engine, SamplingParams
from gemcut.engine.checkpoints.load import load_config, load_tokenizer
from gemcut.tokenizer import Tokenizer

FORMATS = (None, "int8", "fp8", "int4")
PROMPT = [2, *range(100, 105)]


def cost(model: str, quantization: Any, text: str, window: int) -> tuple[float, float]:
    """Bits per byte, and perplexity of a token."""
    settings = {"dtype": "float32", "max_batch_size": 1, "max_seq_len": window}
    with Engine.from_pretrained(model, quantization=quantization, **settings) as engine:
        assert engine.tokenizer is not None
        windows = windows_of(engine.tokenizer, text, window)
        return _per_byte([scored.total for scored in engine.score(windows)], windows, text)


def windows_of(tokenizer: Tokenizer, text: str, window: int) -> list[list[int]]:
    """The ids of a text in windows of at most so many, each after a BOS."""
    ids, size = tokenizer.encode(text, add_bos=False), window - 1
    return [[tokenizer.bos_id, *ids[i : i + size]] for i in range(0, len(ids), size)]


def _per_byte(totals: list[float], windows: list[list[int]], text: str) -> tuple[float, float]:
    """Bits per byte, and perplexity, of the log-probabilities of windows."""
    total, tokens = sum(totals), sum(len(ids) - 1 for ids in windows)
    return -total / math.log(2) / len(text.encode()), math.exp(-total / tokens)


def cost_in_llama_cpp(file: str, text: str, window: int, threads: int) -> tuple[float, float]:
    """`cost` of a GGUF file by llama.cpp, of the same tokens in the same windows."""
    model = llama_cpp(file, window, threads, logits_all=True)
    windows = windows_of(load_tokenizer(Path(file), load_config(Path(file))), text, window)
    totals = []
    for ids in windows:
        model.reset()
        model.eval(ids)
        logprobs = torch.from_numpy(model.scores[: len(ids) - 1]).log_softmax(-1)
        totals.append(logprobs.gather(1, torch.tensor(ids[1:]).unsqueeze(1)).double().sum().item())
    return _per_byte(totals, windows, text)


def llama_cpp(file: str, length: int, threads: int, **settings: Any) -> Any:
    """A model of llama.cpp's, of slots of so many tokens."""
    sizes = {"n_ctx": length, "n_batch": length, "n_ubatch": length}
    counts = {"n_threads": threads, "n_threads_batch": threads}
    package = importlib.import_module("llama_cpp")
    return package.Llama(file, **sizes, **counts, **settings, verbose=False)


def of_engine(model: str, quantization: Any) -> Callable[[int], object]:
    """A function that generates so many tokens by gemcut."""
    settings = {"dtype": "bfloat16", "max_batch_size": 1, "max_seq_len": 512}
    engine = Engine.from_pretrained(model, quantization=quantization, **settings)
    return lambda count: engine.generate(
        PROMPT, SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True)
    )


def of_transformers(model: str, dtype: torch.dtype) -> Callable[[int], object]:
    """A function that generates so many tokens by transformers."""
    peer: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
    settings = {"do_sample": False, "pad_token_id": 0}
    return lambda count: peer.generate(
        torch.tensor([PROMPT]), max_new_tokens=count, min_new_tokens=count, **settings
    )


def of_llama_cpp(file: str, threads: int) -> Callable[[int], object]:
    """A function that generates so many tokens by llama.cpp."""
    model = llama_cpp(file, 512, threads)

    def run(count: int) -> object:
        model.reset()
        return list(islice(model.generate(PROMPT, temp=0.0), count))

    return run


def rates(runs: dict[str, Callable[[int], object]], tokens: int, rounds: int) -> dict[str, float]:
    """Tokens/s of each, the median of rounds in which all take turns."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for round in range(rounds + 1):
        for name, run in runs.items():
            clock = [time.perf_counter()]
            for count in (1, 1 + tokens):
                run(count)
                clock.append(time.perf_counter())
            if round:  # the first one warms up
                found[name].append(tokens / (clock[2] - 2 * clock[1] + clock[0]))
    return {name: statistics.median(values) for name, values in found.items()}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="What quantised weights cost and gain")
    parser.add_argument("--model", default="demo", help="demo or a folder")
    parser.add_argument("--text", type=Path, help="a file in UTF-8 to score")
    parser.add_argument("--bytes", type=int, help="of the text, from its beginning; all of it")
    parser.add_argument("--window", type=int, default=512, metavar="TOKENS")
    parser.add_argument("--speed", action="store_true", help="measure tokens/s")
    parser.add_argument("--peers", action="store_true", help="transformers too")
    parser.add_argument("--gguf", metavar="FILE", help="for llama.cpp, and gemcut beside it")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="torch's threads")
    args = parser.parse_args(argv)
    if args.gguf is not None and find_spec("llama_cpp") is None:
        parser.error("--gguf compares with llama.cpp, by the package llama-cpp-python")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.text is not None:
        text = args.text.read_bytes()[: args.bytes].decode(errors="ignore")
        base = cost(args.model, None, text, args.window)
        costs: dict[str, Callable[[], tuple[float, float]]] = {
            name or "plain": partial(cost, args.model, name, text, args.window) for name in FORMATS
        }
        costs["plain"] = lambda: base
        if args.gguf is not None:
            costs["GGUF"] = partial(cost, args.gguf, None, text, args.window)
            costs["llama.cpp"] = partial(
                cost_in_llama_cpp, args.gguf, text, args.window, torch.get_num_threads()
            )
        for name, found in costs.items():
            bits, perplexity = found()
            more = f"{bits / base[0] - 1:+.2%}", f"{perplexity / base[1] - 1:+.2%}"
            print(f"{name:9} {bits:.4f} bits/byte {more[0]:>8}  {perplexity:.3f} {more[1]}")
    if args.speed:
        runs = {f"gemcut {n or 'bfloat16'}": of_engine(args.model, n) for n in FORMATS}
        if args.peers:
            for dtype in (torch.float32, torch.bfloat16):
                name = f"transformers {str(dtype).removeprefix('torch.')}"
                runs[name] = of_transformers(args.model, dtype)
        if args.gguf is not None:
            runs["gemcut GGUF"] = of_engine(args.gguf, None)
            runs["llama.cpp"] = of_llama_cpp(args.gguf, torch.get_num_threads())
        for name, rate in rates(runs, args.tokens, args.rounds).items():
            print(f"{name:24} {rate:.1f} tokens/s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
