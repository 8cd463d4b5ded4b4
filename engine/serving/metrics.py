"""Engine metrics: counters and gauges, in a dict and in Prometheus' text format."""

import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch

from gemcut.engine.requests.sequence import TokenSequence

# name: (kind, help); a counter only grows, a gauge holds the present value
DESCRIPTIONS = {
    "steps": ("counter", "Steps made"),
    "decode_steps": ("counter", "Steps that decoded"),
    "decoded_rows": ("counter", "Rows of all decode steps"),
    "prefill_chunks": ("counter", "Chunks of prompts computed"),
    "prefill_tokens": ("counter", "Tokens of prompts computed"),
    "reused_tokens": ("counter", "Tokens of prompts that a slot held already"),
    "generated_tokens": ("counter", "Tokens generated"),
    "drafted_tokens": ("counter", "Tokens guessed by prompt lookup"),
    "accepted_tokens": ("counter", "Guessed tokens that were right"),
    "busy_seconds": ("counter", "Time spent in steps"),
    "tokens_per_second": ("gauge", "Tokens generated per second spent in steps"),
    "batch_fill": ("gauge", "Mean share of slots in a decode step"),
    "running": ("gauge", "Completions that have a slot"),
    "waiting": ("gauge", "Completions that wait for a slot"),
    "slots": ("gauge", "Slots of the cache"),
    "cache_use": ("gauge", "Share of the cache's tokens that hold something"),
    "graph_captures": ("counter", "CUDA graphs captured"),
    "compilations": ("counter", "Variants of kernels compiled or loaded"),
    "device_allocations": ("counter", "Blocks of memory that torch has taken from the device"),
    "captures_after_warmup": ("counter", "CUDA graphs captured since the last warm-up"),
    "compilations_after_warmup": ("counter", "Variants compiled since the last warm-up"),
    "allocations_after_warmup": ("counter", "Blocks of memory taken since the last warm-up"),
}


@dataclass
class EngineMetrics:
    """Counts since the engine was made; only the step loop writes them."""

    steps: int = 0
    decode_steps: int = 0
    decoded_rows: int = 0
    prefill_chunks: int = 0
    prefill_tokens: int = 0
    reused_tokens: int = 0
    generated_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    busy_seconds: float = 0.0
    ended: Counter[str] = field(default_factory=Counter)  # completions by finish_reason, or "error"
    at_warmup: dict[str, int] = field(default_factory=dict)  # costs() as the warm-up ended

    def count_end(self, sequence: TokenSequence) -> None:
        """Count a completion by how it ended."""
        self.ended["error" if sequence.error is not None else str(sequence.finish_reason)] += 1


def costs(device: torch.device, captures: int) -> dict[str, int]:
    """Counts that should not grow after a warm-up: graphs, kernel variants, blocks of memory."""
    on_gpu = device.type == "cuda"
    return {
        "graph_captures": captures,
        "compilations": count_compilations(),
        "device_allocations": (
            torch.cuda.memory_stats(device)["segment.all.allocated"] if on_gpu else 0
        ),
    }


def count_compilations() -> int:
    """Variants of kernels that this process has compiled, or loaded from Triton's cache."""
    kernels = {
        value
        for name, module in list(sys.modules.items())
        if name.startswith("gemcut.kernels.") and module is not None
        for value in vars(module).values()
        if hasattr(value, "device_caches")
    }
    return sum(len(caches[0]) for kernel in kernels for caches in kernel.device_caches.values())


def snapshot(
    metrics: EngineMetrics,
    spent: dict[str, int],
    *,
    slots: int,
    running: int,
    waiting: int,
    cache_use: float,
) -> dict[str, Any]:
    """All metrics in one dict: the names of DESCRIPTIONS, `ended` by reason, and the time."""
    rows = metrics.decode_steps * slots
    counted = {name: getattr(metrics, name) for name in DESCRIPTIONS if hasattr(metrics, name)}
    since = {name: spent[name] - metrics.at_warmup.get(name, spent[name]) for name in spent}
    return counted | {
        "tokens_per_second": metrics.generated_tokens / max(metrics.busy_seconds, 1e-9),
        "batch_fill": metrics.decoded_rows / rows if rows else 0.0,
        "running": running,
        "waiting": waiting,
        "slots": slots,
        "cache_use": cache_use,
        **spent,
        "captures_after_warmup": since["graph_captures"],
        "compilations_after_warmup": since["compilations"],
        "allocations_after_warmup": since["device_allocations"],
        "ended": dict(metrics.ended),
        "time": time.time(),
    }


def prometheus_text(values: dict[str, Any]) -> str:
    """A snapshot in the text format that Prometheus scrapes (version 0.0.4)."""
    lines = []
    for name, (kind, description) in DESCRIPTIONS.items():
        full = f"gemcut_{name}_total" if kind == "counter" else f"gemcut_{name}"
        lines += [f"# HELP {full} {description}.", f"# TYPE {full} {kind}"]
        lines.append(f"{full} {values[name]}")
    full = "gemcut_completions_total"
    lines += [f"# HELP {full} Completions that have ended, by reason.", f"# TYPE {full} counter"]
    for reason in ("stop", "length", "abort", "error"):
        lines.append(f'{full}{{reason="{reason}"}} {values["ended"].get(reason, 0)}')
    return "\n".join(lines) + "\n"
