"""Reports of runs that never were, in the form of bench/measure/report_file.py."""

from typing import Any

import numpy as np

from gemcut.bench.measure.report_file import OK, REQUIRED, SCHEMA, metric

GPU = {
    "device": "NVIDIA Test",
    "capability": "sm_90",
    "cpu": "Test CPU",
    "cores": 8,
    "threads": 8,
    "driver": "1.2",
    "versions": {"python": "3.12", "torch": "2.13", "gemcut": "0.1.0"},
    "commit": "0123456789abcdef",
}
CPU = {**GPU, "device": "cpu", "driver": None}
CEILINGS = {"read_gbps": 4000.0, "copy_gbps": 3800.0, "matmul_tflops": 700.0}


def report(benchmark, rows, machine=GPU, interrupted=False, **arguments) -> dict[str, Any]:
    """A report with these rows, of a GPU."""
    values = [SCHEMA, benchmark, arguments, machine, CEILINGS, interrupted, list(rows)]
    return dict(zip(("schema", *REQUIRED), values, strict=True))


def row(case, contestant="gemcut", status=OK, detail="", **values) -> dict[str, Any]:
    """A row; a list among its values is a metric, round by round."""
    rounds = {name: metric(v) if isinstance(v, list) else v for name, v in values.items()}
    named = {"case": case, "contestant": contestant, "version": "1", "settings": "default"}
    return {**named, "status": status, "detail": detail, **rounds}


def decode_row(
    model, contestant="gemcut", *, rate, share=0.5, batch=1, quantization=None, **values
):
    """A row of `decode`; `rate` are tokens a second, round by round."""
    facts = {"dtype": "bfloat16", "context": 512, "prompt_tokens": 384, "new_tokens": 128, **values}
    own = f"/{quantization}" if contestant == "gemcut" and quantization else ""
    case = f"{model}/batch={batch}/context={facts['context']}{own}"
    facts |= {"model": model, "batch": batch, "quantization": quantization, "read_share": share}
    facts |= {"step_bytes": 5_000_000_000, "memory_bytes": 6_000_000_000}
    per_token = [1e3 * batch / value for value in rate]
    first = [4 * value for value in per_token]
    metrics = {"tokens_per_second": rate, "between_tokens_ms": per_token, "first_token_ms": first}
    return row(case, contestant, **facts, **metrics)


def kernel_row(op, contestant="gemcut", *, us, model="gemma-2-9b", phase="decode", **values):
    """A row of `kernels`; `us` are microseconds with cold caches, round by round."""
    facts = {"dtype": "bfloat16", "read_bytes": 8_000_000, "written_bytes": 2_000_000, **values}
    facts = {"op": op, "model": model, "phase": phase, "flops": 10_000_000, **facts}
    named = ("batch", "tokens", "context", "layer", "weight", "variant")
    name = "/".join([op, model, *(f"{k}={facts[k]}" for k in named if facts.get(k))])
    moved = facts["read_bytes"] + facts["written_bytes"]
    memory, compute = moved / CEILINGS["read_gbps"] / 1e3, facts["flops"] / 700e6
    floor, cold = max(memory, compute), float(np.median(us))
    derived = {"floor_us": floor, "bound": "compute" if compute > memory else "memory"}
    derived |= {"gbps": moved / cold / 1e3, "tflops": facts["flops"] / cold / 1e6}
    derived |= {"share": floor / cold, "error": 1e-3, "budget": 2e-3, "method": "graph"}
    return row(name, contestant, **facts, **derived, cold_us=us, warm_us=[0.9 * x for x in us])
