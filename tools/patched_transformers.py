"""What `patch_transformers` gains and costs: logits and times, patched beside plain.

    python -P -m gemcut.tools.patched_transformers --model FOLDER --dtype bfloat16
    python -P -m gemcut.tools.patched_transformers --random gemma-2-2b --layers 4

A line for a prefill and a line for decode steps of each case: milliseconds plain and patched, and
how often the patched model does in a second what the plain one does once, the median and the range
of the rounds.  In a round both do the same, in an order that changes; in decode each has a cache of
its own, and a round is one step.  Plain is transformers with the attention that it chooses itself.
On a CPU one thread is used, and its own seconds are counted, so that other programs change little.
The logits' error is the greatest, over the greatest logit, of the patched model and of the plain
one, against the plain one in float64.
"""

import argparse
import copy
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from gemcut.bench.engines.peers import Stage, Workload
from gemcut.bench.engines.setup import add_model_arguments, choose_setup
from gemcut.bench.measure.timing import Spread, synchronize, take_turns
from gemcut.engine.adapters.transformers_patch import patch_transformers

CASES = ((1, 16), (1, 512), (4, 64))  # batch, tokens of a prompt; rows of a batch are padded
ROUNDS, STEPS = 5, 24


@dataclass(frozen=True)
class Speed:
    """Seconds of one phase of a case, round by round."""

    name: str
    plain: list[float]
    patched: list[float]

    @property
    def line(self) -> str:
        ratio = Spread.of([a / b for a, b in zip(self.plain, self.patched, strict=True)])
        plain, patched = (1e3 * Spread.of(x).median for x in (self.plain, self.patched))
        return (
            f"{self.name}: {plain:.1f} ms plain, {patched:.1f} patched, "
            f"{ratio.median:.2f} ({ratio.low:.2f} - {ratio.high:.2f})"
        )


def inputs_of(model: Any, batch: int, length: int) -> tuple[Tensor, Tensor]:
    """Random ids and a mask, in which every second row begins with padding."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, model.config.vocab_size, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1::2, : length // 3] = 0
    return ids.to(model.device), mask.to(model.device)


def errors(model: Any, batch: int, length: int) -> tuple[float, float]:
    """The greatest error of the patched logits and of the plain ones, over the greatest logit."""
    ids, mask = inputs_of(model, batch, length)
    real = mask.bool()
    wide = copy.deepcopy(model).double()
    rows = zip(ids, real, strict=True)
    exact = torch.cat([wide(row[seen].unsqueeze(0)).logits[0] for row, seen in rows])
    del wide
    plain = model(ids, attention_mask=mask).logits[real]
    with patch_transformers(model):
        patched = model(ids, attention_mask=mask).logits[real]
    scale = exact.abs().max()
    return tuple(((x.double() - exact).abs().max() / scale).item() for x in (patched, plain))  # pyright: ignore[reportReturnType]


def speeds(model: Any, batch: int, length: int, rounds: int, steps: int) -> Iterator[Speed]:
    """Prefill and decode of a case, plain and patched in turns."""
    ids, mask = inputs_of(model, batch, length)
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    name = "cache" if hasattr(model(ids[:, :1]), "cache") else "past_key_values"  # since 5.24

    def prefill(of: int) -> float:
        run = lambda: model(ids, attention_mask=mask, logits_to_keep=1)  # noqa: E731
        return _seconds(model, run, is_patched=of == 1)

    def step(of: int) -> float:
        seen = caches[of].get_seq_length() + 1
        longer = torch.nn.functional.pad(mask, (0, seen - length), value=1)
        inputs = {"attention_mask": longer, "use_cache": True, name: caches[of]}
        return _seconds(model, lambda: model(ids[:, -1:], **inputs), is_patched=of == 1)

    case = f"batch {batch} x {length}"
    yield Speed(f"prefill, {case}", *_in_turns(prefill, rounds))
    for of, cache in enumerate(caches):
        with patch_transformers(model) if of else nullcontext():
            model(ids, attention_mask=mask, use_cache=True, logits_to_keep=1, **{name: cache})
    yield Speed(f"decode step, {case}", *_in_turns(step, steps))


def _in_turns(run: Callable[[int], float], rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of both in each round, after one that does not count."""
    found = []
    for turn in range(rounds + 1):
        order = (0, 1) if turn % 2 else (1, 0)
        calls = {str(of): lambda of=of: run(of) for of in order}
        found += list(take_turns(calls, 1))
    return tuple([round_[str(of)] for round_ in found[1:]] for of in range(2))  # pyright: ignore[reportReturnType]


def _seconds(model: Any, run: Callable[[], object], is_patched: bool) -> float:
    """Of one call; patching and its undoing do not count."""
    clock = time.process_time if model.device.type == "cpu" else time.perf_counter
    with patch_transformers(model) if is_patched else nullcontext():
        synchronize(model.device)
        begin = clock()
        run()
        synchronize(model.device)
        return clock() - begin


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0; 1 for bad input."""
    parser = argparse.ArgumentParser(
        prog="python -P -m gemcut.tools.patched_transformers",
        description="Logits and times of a patched model of transformers beside the plain one.",
    )
    add_model_arguments(parser)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto", help="auto, float32 or bfloat16")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of a prefill (%(default)s)")
    parser.add_argument("--steps", type=int, default=STEPS, help="of decoding (%(default)s)")
    parser.add_argument("--no-errors", action="store_true", help="logits are not compared")
    arguments = parser.parse_args(argv)
    try:
        setup = choose_setup(arguments)
        if setup.device.type == "cpu":
            torch.set_num_threads(1)
        model = Stage(setup, Workload(1, 16, 2)).transformers_model
        print(f"{setup.name}, {setup.dtype_name}, {model.config._attn_implementation} attention")
        with torch.inference_mode():
            if not arguments.no_errors:
                patched, plain = errors(model, 2, 48)
                print(f"error of the logits: {patched:.1e} patched, {plain:.1e} plain")
            for batch, length in CASES:
                for speed in speeds(model, batch, length, arguments.rounds, arguments.steps):
                    print(speed.line, flush=True)
    except (ValueError, OSError, MemoryError) as error:
        print(f"patched_transformers: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
