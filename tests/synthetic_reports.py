"""Made-up reports in the form of bench/measure/report_file.py."""

import json
from functools import partial
from typing import Any

import numpy as np

from gemcut.bench.engines.served import BY_REQUEST, BY_ROUND, by_percentile
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


def report(benchmark, records, machine=GPU, interrupted=False, **arguments) -> dict[str, Any]:
    """A report with these records, of a GPU."""
    values = [SCHEMA, benchmark, arguments, machine, CEILINGS, interrupted, list(records)]
    return dict(zip(("schema", *REQUIRED), values, strict=True))


def record(case, contestant="gemcut", status=OK, detail="", **values) -> dict[str, Any]:
    """A record; a list among its values is a metric, round by round."""
    rounds = {name: metric(v) if isinstance(v, list) else v for name, v in values.items()}
    named = {"case": case, "contestant": contestant, "version": "1", "settings": "default"}
    return {**named, "status": status, "detail": detail, **rounds}


def decode_record(
    model, contestant="gemcut", *, rate, share=0.5, batch=1, quantization=None, **values
):
    """A record of `decode`; `rate` are tokens a second, round by round."""
    facts = {"dtype": "bfloat16", "context": 512, "prompt_tokens": 384, "new_tokens": 128, **values}
    own = f"/{quantization}" if contestant == "gemcut" and quantization else ""
    case = f"{model}/batch={batch}/context={facts['context']}{own}"
    facts |= {"model": model, "batch": batch, "quantization": quantization, "read_share": share}
    facts |= {"step_bytes": 5_000_000_000, "memory_bytes": 6_000_000_000}
    per_token = [1e3 * batch / value for value in rate]
    first = [4 * value for value in per_token]
    metrics = {"tokens_per_second": rate, "between_tokens_ms": per_token, "first_token_ms": first}
    return record(case, contestant, **facts, **metrics)


def kernel_record(op, contestant="gemcut", *, us, model="gemma-2-9b", phase="decode", **values):
    """A record of `kernels`; `us` are microseconds with cold caches, round by round."""
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
    return record(name, contestant, **facts, **derived, cold_us=us, warm_us=[0.9 * x for x in us])


# Whole reports, of a GPU and of a CPU

MODELS = {"gemma-3-1b": 5.0, "gemma-2-9b": 20.0}  # microseconds of a kernel
OPS = {  # phase, operations, peers
    "rmsnorm": ("prefill", 10_000_000, ("torch", "liger")),
    "skinny_linear": ("decode", 11_000_000, ("blas", "gemlite-int8")),
    "lm_head_argmax": ("decode", 12_000_000, ("blas",)),
    "linear": ("prefill", 9_000_000_000, ("blas",)),
    "embed": ("decode", 0, ()),
}
ROUNDS = (1.0, 0.9, 1.2)

attention_record = partial(kernel_record, "attention_prefill")


def kernels_report():
    """Kernels of two models beside their peers, one of which failed."""
    records = []
    facts: dict[str, Any]
    for model, us in MODELS.items():
        for op, (phase, flops, peers) in OPS.items():
            facts = {"model": model, "phase": phase, "flops": flops, "batch": 1, "variant": ""}
            for i, contestant in enumerate(("gemcut", *peers), 1):
                slower = 0.5 if contestant == "gemlite-int8" else i
                times = [slower * us * factor for factor in ROUNDS]
                records.append(kernel_record(op, contestant, us=times, **facts))
        for tokens in (512, 4096):
            facts = {"model": model, "phase": "prefill", "layer": "global", "variant": ""}
            facts |= {"tokens": tokens, "softcap": 50.0, "flops": tokens * 10**7}
            for contestant in ("gemcut", "flex"):
                records.append(attention_record(contestant, us=[90, 100], **facts))
            facts |= {"softcap": None, "variant": "no softcap"}
            for contestant in ("gemcut", "flex", "sdpa"):
                records.append(attention_record(contestant, us=[80, 90], **facts))
    facts = {"op": "geglu", "model": "demo", "phase": "prefill"}
    records.append(record("x", "liger", "failed", "no module | named\nliger", **facts))
    return report("kernels", records, models=list(MODELS), json=None)


def decode_report(machine=None, **values):
    """Decoding of two models at two batches, and a quantised peer."""
    records = [
        decode_record(model, contestant, rate=rates, batch=batch, share=share, **values)
        for model in MODELS
        for batch in (1, 16)
        for contestant, share, rates in (
            ("gemcut", 0.7, [100 * batch, 110 * batch, 90 * batch]),
            ("transformers", 0.2, [20 * batch, 20 * batch, 30 * batch]),
        )
    ]
    fast = {"quantization": "int8", "share": 1.9, **values}
    records += [
        decode_record(name, "gpt-fast-int8", rate=[300, 300, 300], **fast) for name in MODELS
    ]
    return report("decode", records, *([] if machine is None else [machine]))


def prefill_report():
    """One prefill of 4096 tokens."""
    values: dict[str, Any] = {"model": "gemma-2-9b", "tokens": 4096, "batch": 1}
    values |= {"tflops": 420.5, "share": 0.6}
    values |= {"first_token_ms": [170.0, 180.0], "tokens_per_second": [24000.0, 23000.0]}
    return report("prefill", [record("gemma-2-9b/4096", **values)])


def serving_report():
    """One trace; the run was interrupted."""
    one = record("x", model="gemma-2-2b", rate=8.0, requests=200, tokens_per_second=[961.0])
    percentiles = {"median": 1, "low": 1, "high": 1, "all": [1], "p50": 41.0, "p90": 52, "p99": 63}
    one |= dict.fromkeys(("first_token_ms", "between_tokens_ms"), percentiles)
    return report("serve-sim", [one], interrupted=True)


def cpu_report():
    """Decoding of the demo model on a CPU."""
    records = [
        decode_record("demo", name, rate=rates, dtype="float32")
        for name, rates in (("gemcut", [500.0, 520.0]), ("transformers", [250.0, 200.0]))
    ]
    return report("decode", records, {**CPU, "cpu": "Test EPYC", "threads": 2})


def save(folder, **reports):
    """Write each report to NAME.json in `folder`; the folder."""
    for name, content in reports.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def server_record(name, *, rounds, rate=4.0, concurrency=None, **values):
    """A record of `serve`; `rounds` are milliseconds to the first token, by round and request."""
    load = f"rate={rate:g}" if rate else f"concurrency={concurrency}"
    facts = {"model": "demo", "rate": rate, "concurrency": concurrency, "requests": len(rounds[0])}
    one = record(f"demo/{load}", name, **facts, client_cpu_share=0.1, **values)
    for metric_name in BY_REQUEST:
        slow_is_low = metric_name.endswith("_per_second")
        one[metric_name] = by_percentile(rounds, slow_is_low=slow_is_low)
    rates = [1000 / np.mean(times) for times in rounds]
    return one | {name: metric(rates) for name in BY_ROUND}


def servers_report(loads=(2.0, 8.0)):
    """Two servers under several rates, the second half as fast, and one that lost a stream."""
    rounds = [[10.0, 20.0, 30.0], [20.0, 30.0, 40.0]]
    slow = [[2 * value for value in one] for one in rounds]
    records = [
        server_record(name, rounds=values, rate=rate)
        for rate in loads
        for name, values in (("fast", rounds), ("slow", slow))
    ]
    lost = {"status": "failed", "detail": "of 6 requests 1 lost; the first: cut"}
    records.append(server_record("lossy", rounds=rounds, rate=loads[0], **lost))
    return report("serve", records)
