"""Predicted time of a decode step, kernel by kernel, without a GPU; constants fitted to profiles.

    python -P -m gemcut.tools.predict_step --models gemma-2-2b --batch 1 --context 1024
    python -P -m gemcut.tools.predict_step --markdown               every published model
    python -P -m gemcut.tools.predict_step --quantization int8 int4 fp8 --markdown      beside bf16
    python -P -m gemcut.tools.predict_step --kv-cache-dtype fp8      half the bytes of k and v
    python -P -m gemcut.tools.predict_step --json                   its last line: share and step_us
    python -P -m gemcut.tools.predict_step --fit FOLDER/breakdown.json
    python -P -m gemcut.tools.predict_step --set bandwidth=4.1e12 ghz=1.7

The step runs on fake tensors (launches.py) and each distinct launch is compiled for the arch; the
machine code of its loops (machine_code.py) and a fluid model of the memory (bandwidth_model.py)
give its time (launch_time.py), with the constants of machine.py.  Estimates: within 10 to 15 %
until they are fitted to a profile, see bench/NOTES.md.

`--fit` takes what tools/profile_step.py leaves, finds the constants that fit it best
(fit_machine.py) and predicts with these whatever `--models` asks for.
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path

from gemcut.bench.measure.report_file import print_table
from gemcut.engine.checks import check_int
from gemcut.engine.config.model_config import PUBLISHED
from gemcut.engine.execution.weights import QUANTIZATIONS
from gemcut.kernels.interpreter import INTERPRETED
from gemcut.tools.machine import H200, Machine
from gemcut.tools.prediction.fit_machine import Residual, fit, read_profile
from gemcut.tools.prediction.predicted_step import PredictedStep, predict_steps
from gemcut.tools.prediction.product_times import is_list, pair, read_products

GOAL = 4.3e12  # bytes a second, of which a step is to reach a share
ARCH = "sm_90"  # whose machine code can be read


def print_step(step: PredictedStep, machine: Machine) -> None:
    """Print a table of the step's kernels, and their sum."""
    lines, step_us = step.lines(machine), step.step_us(machine)
    rows = [
        [
            line.kernel,
            str(line.launches),
            f"{line.us:.2f}",
            f"{line.launches * line.us:.1f}",
            f"{line.launches * line.us / step_us:.1%}",
            "" if line.share is None else f"{line.share:.2f}",
            line.bound or "",
        ]
        for line in lines
    ]
    launches = sum(line.launches for line in lines)
    gaps = step.gaps_us(machine)
    rows.append(["gaps", str(launches), f"{gaps / launches:.2f}", f"{gaps:.1f}"])
    rows[-1] += [f"{gaps / step_us:.1%}", "", ""]
    print(f"\n{step.name}, batch {step.batch}, context {step.context}, predicted")
    header = ["", "launches", "us each", "us a step", "of the step", "of bandwidth", "bound by"]
    print_table(header, rows)
    print(
        f"a step takes {step_us:.0f} us; its {step.step_bytes / 1e6:.0f} MB are "
        f"{step.share(machine):.2f} of {machine.bandwidth / 1e12:.2f} TB/s"
    )


def markdown(steps: Sequence[PredictedStep], machine: Machine) -> str:
    """The summary of bench/NOTES.md, whose last column is for a measurement."""
    best, goal = machine.bandwidth / 1e12, GOAL / 1e12
    lines = ["| model | batch | context | MB a step | launches | us predicted "]
    lines[0] += f"| share of {best:.2f} TB/s | of {goal:.1f} | us measured |"
    lines.append("|---" * 9 + "|")
    for step in steps:
        launches, us = sum(step.counts.values()), step.step_us(machine)
        lines.append(
            f"| {step.name} | {step.batch} | {step.context} | {step.step_bytes / 1e6:.0f} "
            f"| {launches} | {us:.0f} | {step.share(machine):.2f} "
            f"| {1e6 * step.step_bytes / GOAL / us:.2f} | |"
        )
    return "\n".join(lines)


def quantized_markdown(steps: Sequence[PredictedStep], machine: Machine) -> str:
    """Steps of bfloat16 beside quantised ones, a model a line, for bench/NOTES.md."""
    found = {(step.model, step.quantization): step for step in steps}
    formats = [name for name in dict.fromkeys(step.quantization for step in steps) if name]
    titles = [f"| {name}: MB | us | ratio | share " for name in formats]
    lines = [f"| model | bfloat16: MB | us | share {''.join(titles)}|"]
    lines.append("|---" * (4 + 4 * len(formats)) + "|")
    for model in dict.fromkeys(step.model for step in steps):
        plain = found[model, None]
        cells = [model, f"{plain.step_bytes / 1e6:.0f}", f"{plain.step_us(machine):.0f}"]
        cells.append(f"{plain.share(machine):.2f}")
        for name in formats:
            step = found[model, name]
            us = step.step_us(machine)
            cells += [f"{step.step_bytes / 1e6:.0f}", f"{us:.0f}"]
            cells += [f"{plain.step_us(machine) / us:.2f}", f"{step.share(machine):.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def print_fit(machine: Machine, residuals: Sequence[Residual]) -> None:
    """Print the constants that a fit changed, and each kernel's residual."""
    changed = []
    for field in fields(machine):
        old, new = getattr(H200, field.name), getattr(machine, field.name)
        if isinstance(new, Mapping):
            changed += [
                [name, f"{old[name]:.4g}", f"{us:.4g}", f"{us / old[name]:.2f}"]
                for name, us in new.items()
                if name in old and us != old[name]
            ]
        elif old != new:
            changed.append([field.name, f"{old:.4g}", f"{new:.4g}", f"{new / old:.2f}"])
    print_table(["constant", "estimate", "fitted", "ratio"], changed)
    rows = [
        [
            r.model,
            r.kernel,
            f"{r.launches:g}",
            f"{r.measured_us:.2f}",
            f"{r.before_us:.2f}",
            f"{r.after_us:.2f}",
            f"{r.after_us / r.measured_us - 1:+.0%}",
        ]
        for r in residuals
    ]
    header = ["", "kernel", "launches", "measured us", "estimate", "fitted", "residual"]
    print()
    print_table(header, rows)


def constants(settings: Sequence[str]) -> Machine:
    """The machine with `name=value` in place of its estimates; ValueError for another name."""
    machine, names = H200, {f.name for f in fields(H200)} - {"latencies", "small_us"}
    for setting in settings:
        name, _, value = setting.partition("=")
        if name not in names:
            raise ValueError(f"--set {setting}: {name!r} is not {', '.join(sorted(names))}")
        kind = type(getattr(H200, name))
        try:
            number = kind(float(value))
        except (ValueError, OverflowError):
            raise ValueError(f"--set {setting}: {value!r} is no number") from None
        if not 0 < number < float("inf"):
            raise ValueError(f"--set {setting}: must be above 0")
        machine = replace(machine, **{name: number})
    return machine


def run(arguments: argparse.Namespace) -> int:
    """Predict what was asked for; ValueError and RuntimeError say what is wrong in one line."""
    if INTERPRETED:
        raise ValueError("TRITON_INTERPRET is set: kernels are interpreted, not compiled; unset it")
    if arguments.arch != ARCH:
        raise ValueError(f"arch {arguments.arch!r}: machine code is read of {ARCH} alone")
    machine = constants(arguments.set)
    lists = [read_products(file) for file in arguments.fit if is_list(file)]
    profiles = [read_profile(file) for file in arguments.fit if not is_list(file)]
    models = arguments.models or ([] if arguments.fit else list(PUBLISHED))
    for model in [*models, *(profile.model for profile in profiles)]:
        if model not in PUBLISHED:
            raise ValueError(f"{model!r} is not {', '.join(PUBLISHED)}")
    check_int("jobs", arguments.jobs, 1, 1024)
    check_int("batch", arguments.batch, 1, 4096)
    for model in models:
        longest = PUBLISHED[model].context_length
        check_int(f"context of {model}", arguments.context, 2, longest)

    quantizations = arguments.quantization or [None]
    if arguments.markdown and arguments.quantization:
        quantizations = [None, *quantizations]
    wanted = [
        (model, arguments.batch, arguments.context, quantization)
        for model in models
        for quantization in quantizations
    ]
    measured = [(p.model, p.batch, p.context, None) for p in profiles]
    fitting = predict_steps(measured, ARCH, arguments.jobs)
    steps = predict_steps(wanted, ARCH, arguments.jobs, arguments.kv_cache_dtype)
    pairs = list(zip(profiles, fitting, strict=True))
    pairs += [pair(products, ARCH, arguments.jobs, machine) for products in lists]
    if pairs:
        machine, residuals = fit(pairs, machine)
        print_fit(machine, residuals)
    if arguments.markdown:
        table = quantized_markdown if arguments.quantization else markdown
        print(table(steps, machine))
    else:
        for step in steps:
            print_step(step, machine)
    if arguments.json:
        found = {
            step.name: {
                "share": round(step.share(machine), 4),
                "step_us": round(step.step_us(machine), 1),
            }
            for step in steps
        }
        print(json.dumps(found))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0; 1 for bad input; 2 for wrong usage."""
    parser = argparse.ArgumentParser(
        prog="python -P -m gemcut.tools.predict_step",
        description="Predict the time of a decode step kernel by kernel, without a GPU.",
    )
    parser.add_argument("--models", nargs="+", metavar="MODEL", help="default: all published")
    parser.add_argument("--arch", "--part", default=ARCH, help=f"only {ARCH} can be predicted")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="rows of the step")
    parser.add_argument("--context", type=int, default=1024, metavar="N", help="tokens of a row")
    parser.add_argument(
        "--quantization", nargs="+", choices=QUANTIZATIONS, help="of the weights; default: none"
    )
    parser.add_argument(
        "--kv-cache-dtype", choices=("auto", "fp8"), default="auto", help="of keys and values"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compilers at a time")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="of machine.py")
    parser.add_argument(
        "--fit", nargs="+", type=Path, default=[], metavar="FILE", help="a breakdown.json"
    )
    parser.add_argument("--markdown", action="store_true", help="one table, for bench/NOTES.md")
    parser.add_argument("--json", action="store_true", help="the last line: share and step_us")
    try:
        return run(parser.parse_args(argv))
    except (ValueError, RuntimeError, OSError) as error:
        print(f"predict_step: {next(iter(str(error).splitlines()), '')}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
