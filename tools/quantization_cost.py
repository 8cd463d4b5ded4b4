"""What quantised weights cost and gain: a text's bits per byte and perplexity, tokens/s.

    python -P -m gemcut.tools.quantization_cost --model demo --text heldout.txt
    python -P -m gemcut.tools.quantization_cost --model FOLDER --speed --threads 2 --peers

A line for each format.  The text is scored in float32, in windows of so many tokens, by what the
weights stand for.  Speed is that of one request in bfloat16, by the time between a first token and
the last; engines, and transformers with --peers, take turns, and the median is reported.
"""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from gemcut.engine import Engine, SamplingParams

FORMATS = (None, "int8", "fp8", "int4")
PROMPT = [2, *range(100, 105)]


def cost(model: str, quantization: Any, text: str, window: int) -> tuple[float, float]:
    """Bits per byte, and perplexity of a token."""
    settings = {"dtype": "float32", "max_batch_size": 1, "max_seq_len": window}
    with Engine.from_pretrained(model, quantization=quantization, **settings) as engine:
        assert engine.tokenizer is not None
        ids = engine.tokenizer.encode(text, add_bos=False)
        size, first = window - 1, engine.tokenizer.bos_id
        parts = [[first, *ids[start : start + size]] for start in range(0, len(ids), size)]
        total = sum(scored.total for scored in engine.score(parts))
    return -total / math.log(2) / len(text.encode()), math.exp(-total / len(ids))


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
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="torch's threads")
    args = parser.parse_args(argv)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.text is not None:
        text = args.text.read_bytes()[: args.bytes].decode(errors="ignore")
        base = cost(args.model, None, text, args.window)
        for name in FORMATS:
            bits, perplexity = base if name is None else cost(args.model, name, text, args.window)
            more = f"{bits / base[0] - 1:+.2%}", f"{perplexity / base[1] - 1:+.2%}"
            print(
                f"{name or 'plain':6} {bits:.4f} bits/byte {more[0]:>8}  {perplexity:.3f} {more[1]}"
            )
    if args.speed:
        runs = {f"gemcut {n or 'bfloat16'}": of_engine(args.model, n) for n in FORMATS}
        if args.peers:
            for dtype in (torch.float32, torch.bfloat16):
                name = f"transformers {str(dtype).removeprefix('torch.')}"
                runs[name] = of_transformers(args.model, dtype)
        for name, rate in rates(runs, args.tokens, args.rounds).items():
            print(f"{name:24} {rate:.1f} tokens/s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
