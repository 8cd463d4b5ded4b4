"""VaultGemma in vLLM, checked and timed: natively over its fallback, and with gemcut's ops.

    python -P -m gemcut.tools.vllm_visit OUT                      random weights of vaultgemma-1b
    python -P -m gemcut.tools.vllm_visit OUT --model FOLDER --modes compiled graphs eager
    python -P -m gemcut.tools.vllm_visit OUT --layers 2 --count 8 --rounds 1    a trial on a CPU

To be run by the Python of an environment that has vLLM and, installed beside it, gemcut.  A way is
one vLLM in a process of its own:

    fallback     vLLM's generic one, on transformers
    native       gemcut's model, on vLLM's own ops
    providers    the same, with gemcut's norms in vLLM's IR
    ops          the same, with gemcut's norms and GeGLU in place of vLLM's custom ops

The ways of a mode are loaded side by side and asked in turns, so that a round compares them under
equal conditions; ratios are paired by round, over `fallback`.  Log-probabilities and greedy tokens
are compared with those of `fallback` too: ids part where two logits nearly tie.  OUT gets
vllm-visit.json, and a log for each way.  Exit code 0; 1 where a way failed or the input is bad.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from gemcut.bench.engines.random_model import published_config, random_weights
from gemcut.engine.adapters.vllm_plugin import CUSTOM_OPS, SETTING
from gemcut.engine.checkpoints.save import save_checkpoint
from gemcut.engine.config.model_config import ModelConfig

RUNNER = "gemcut.tools.vllm_runner"
OURS = "gemcut.engine.adapters.vllm_vaultgemma.VaultGemmaForCausalLM"
PROVIDERS = {"rms_norm": ["gemcut"], "fused_add_rms_norm": ["gemcut"]}
WAYS: dict[str, dict[str, Any]] = {
    "fallback": {"model_impl": "transformers"},
    "native": {},
    "providers": {"kernel_config": {"ir_op_priority": PROVIDERS}},
    "ops": {},
}
MODES: dict[str, dict[str, Any]] = {
    "compiled": {},  # vLLM's default
    "graphs": {"compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}},
    "eager": {"enforce_eager": True},
}


class Way:
    """A vLLM in a process; RuntimeError with the end of its log where it fails."""

    def __init__(self, name: str, llm: dict[str, Any], log: Path) -> None:
        self.name, self.log = name, log
        environment = os.environ | {SETTING: ",".join(CUSTOM_OPS) if name == "ops" else ""}
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", RUNNER, json.dumps(llm)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                env=environment,
            )
        loaded = self._reply()
        self.classes, self.seconds = loaded["classes"], loaded["seconds"]
        if (name == "fallback") == (self.classes[0] == OURS):
            self.close()
            raise RuntimeError(f"{name} runs {self.classes[0]}: is gemcut installed beside vLLM?")

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # the reply says why
        return self._reply()

    def _reply(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        if line := self.process.stdout.readline():
            return json.loads(line)
        self.process.wait()
        lines = self.log.read_text().splitlines()
        errors = [line for line in lines if "Error" in line] or lines or ["nothing was said"]
        raise RuntimeError(f"{self.name}: {errors[-1].strip()} ({self.log})")

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def prompts_of(vocab_size: int, batch: int, length: int) -> list[list[int]]:
    """The same for the same numbers."""
    draw = random.Random(length)
    return [[draw.randrange(4, vocab_size) for _ in range(length)] for _ in range(batch)]


def same_ids(found: list[list[int]], theirs: list[list[int]]) -> float:
    """The share of generated ids before a text first parts from the other."""
    kept = total = 0
    for a, b in zip(found, theirs, strict=True):
        total += len(a)
        kept += next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))
    return kept / total


def greatest_difference(found: list[list[float]], theirs: list[list[float]]) -> float:
    return max(
        abs(x - y) for a, b in zip(found, theirs, strict=True) for x, y in zip(a, b, strict=True)
    )


def median_and_range(values: Sequence[float]) -> list[float]:
    return [statistics.median(values), min(values), max(values)]


def compare(ways: list[Way], vocab_size: int, batch: int, arguments: Any) -> list[dict[str, Any]]:
    """A row for each way at one batch size: decode and prefill, and how near its numbers are."""
    short = prompts_of(vocab_size, batch, arguments.prompt)
    long = prompts_of(vocab_size, batch, arguments.long_prompt)
    times: dict[str, dict[str, list[float]]] = {w.name: {"decode": [], "prefill": []} for w in ways}
    ids: dict[str, list[list[int]]] = {}
    for round_ in range(-1, arguments.rounds):  # the first warms up
        for way in ways if round_ % 2 else reversed(ways):
            decoded = way.ask(prompts=short, count=arguments.count)
            prefilled = way.ask(prompts=long, count=1)
            ids[way.name] = decoded["ids"]
            if round_ >= 0:
                times[way.name]["decode"].append(decoded["seconds"])
                times[way.name]["prefill"].append(prefilled["seconds"])
    logprobs = {way.name: way.ask(prompts=long)["logprobs"] for way in ways}
    tokens = {"decode": batch * arguments.count, "prefill": batch * arguments.long_prompt}
    first, rows = ways[0].name, []
    for name, own in times.items():
        row: dict[str, Any] = {"way": name, "batch": batch}
        for kind, seconds in own.items():
            row[f"{kind}_tokens_per_s"] = median_and_range([tokens[kind] / s for s in seconds])
            pairs = zip(times[first][kind], seconds, strict=True)
            row[f"{kind}_over_{first}"] = median_and_range([a / b for a, b in pairs])
        row["same_ids"] = same_ids(ids[name], ids[first])
        row["logprob_difference"] = greatest_difference(logprobs[name], logprobs[first])
        rows.append(row)
    return rows


def visit(arguments: Any, model: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows, and what failed."""
    rows, failures = [], []
    vocab_size = ModelConfig.from_file(model).vocab_size
    length = max(arguments.prompt + arguments.count, arguments.long_prompt + 1)
    shared = {"model": str(model), "dtype": arguments.dtype, "max_model_len": length}
    if torch.cuda.is_available():
        shared["gpu_memory_utilization"] = 0.9 / len(arguments.ways)
    for mode in arguments.modes:
        ways: list[Way] = []
        for name in arguments.ways:
            try:
                log = arguments.out / f"{mode}-{name}.log"
                ways.append(Way(name, shared | WAYS[name] | MODES[mode], log))
            except RuntimeError as error:
                failures.append(f"{mode}: {error}")
        try:
            for batch in arguments.batch if ways else ():
                for row in compare(ways, vocab_size, batch, arguments):
                    rows.append({"mode": mode, **row})
                    print(line_of(rows[-1]), flush=True)
        except RuntimeError as error:
            failures.append(f"{mode}: {error}")
        finally:
            for way in ways:
                way.close()
    return rows, failures


def line_of(row: dict[str, Any]) -> str:
    """A row for people: mode, way, batch, then what was measured."""
    cells = [f"{row['mode']:8} {row['way']:9} batch {row['batch']:3}"]
    for key, value in row.items():
        if isinstance(value, list):
            median, low, high = value
            cells.append(f"{key} {median:.4g} ({low:.4g} - {high:.4g})")
    cells.append(f"same ids {row['same_ids']:.3f}, logprobs differ {row['logprob_difference']:.2e}")
    return ", ".join(cells)


def parse(argv: Sequence[str] | None) -> Any:
    parser = argparse.ArgumentParser(
        prog="vllm_visit", description="VaultGemma in vLLM: native over fallback, with our ops."
    )
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("--model", type=Path, help="a checkpoint; default: random weights")
    parser.add_argument("--random", default="vaultgemma-1b", metavar="NAME", help="their size")
    parser.add_argument("--layers", type=int, help="the first so many layers of that size")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["compiled"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--prompt", type=int, default=16, help="tokens before those decoded")
    parser.add_argument("--count", type=int, default=128, help="tokens decoded")
    parser.add_argument("--long-prompt", type=int, default=768, help="tokens of a prefill")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code."""
    arguments = parse(argv)
    try:
        arguments.out.mkdir(parents=True)
        with tempfile.TemporaryDirectory() as folder:
            model = arguments.model
            if model is None:
                model = Path(folder)
                config = published_config(arguments.random, arguments.layers)
                dtype, device = getattr(torch, arguments.dtype), torch.device("cpu")
                weights = random_weights(config, device=device, dtype=dtype)
                save_checkpoint(model, config, weights)
            rows, failures = visit(arguments, model)
    except (OSError, ValueError) as error:
        print(f"vllm_visit: error: {error}", file=sys.stderr)
        return 1
    report = {"arguments": {k: str(v) for k, v in vars(arguments).items()}, "rows": rows}
    report["failures"] = failures
    (arguments.out / "vllm-visit.json").write_text(json.dumps(report, indent=1) + "\n")
    for failure in failures:
        print(f"vllm_visit: error: {failure}", file=sys.stderr)
    return 1 if failures or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
