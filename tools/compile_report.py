"""Ahead-of-time compilation of every kernel for five GPU generations, held to the house's rules.

    python -P -m gemcut.tools.compile_report            gemma-2-2b on sm_90: what CI runs
    python -P -m gemcut.tools.compile_report --all --json FILE      every model, format and arch
    python -P -m gemcut.tools.compile_report --quantization int8 int4 fp8       quantised weights
    python -P -m gemcut.tools.compile_report --models gemma-3-1b --archs sm_80 sm_120
    python -P -m gemcut.tools.compile_report --kv-cache-dtype fp8   what launches otherwise with it
    python -P -m gemcut.tools.compile_report --block-size 16        and with a paged cache

No GPU is needed.  The real model runs, on fake tensors, and each launch is recorded instead of
made (launches.py); so what is compiled is what the engine launches, tile and argument for argument.
Exits with 1 where a rule is broken:

    no spills           no local memory: registers suffice
    shared memory       within what one block may have on that arch
    tensor cores        in whatever multiplies matrices; HGMMA in prefill attention on sm_90
    wide loads          16 bytes at a time in whatever memory bounds
    no byte loads       from shared memory in attention, whose cache may be in fp8
    chain on sm_90      at most 75 KB of shared memory in whatever a decode step launches
    weights             enough of them in flight, asynchronous and 16 bytes wide (weight_stream.py)
    64-bit addresses    no 32-bit product of two values that are not known at compile time
    dependent launch    a decode step's kernels wait, where the arch can (launch_wait.py), and are
                        launched so, except products that leave places free
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib import import_module
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from gemcut.engine.config.model_config import PUBLISHED
from gemcut.kernels.dependent_launch import ARCHS
from gemcut.kernels.gpu_arch import SHARED_MEMORY
from gemcut.kernels.interpreter import INTERPRETED
from gemcut.kernels.quantized_weight import FORMATS
from gemcut.tools.launch_wait import wait_problems
from gemcut.tools.launches import CAPABILITY, Launch, launches
from gemcut.tools.machine_code import Loop, find_loops, parse, tail_cycles
from gemcut.tools.weight_stream import ARCHS as STREAMING
from gemcut.tools.weight_stream import stream_problems

MODELS: tuple[str, ...] = ("gemma-2b", "gemma-7b", "gemma-2-2b", "gemma-2-9b", "gemma-2-27b")
MODELS += ("vaultgemma-1b", "gemma-3-1b")
QUICK = {"models": ["gemma-2-2b"], "archs": ["sm_90"]}
# kernels that move too little for the width of a load to matter
SMALL = {"rope_tables_kernel", "advance_kernel"}
# launched in no decode step
PREFILL = {"attention_prefill_kernel", "geglu_kernel", "dequantize_kernel"}
CHAIN = 75 * 1024  # bytes of shared memory in a decode step on sm_90: three programs fit
SPREAD = {"linear_geglu_kernel", "linear_rope_and_store_kernel"}  # begin on empty processors
PLAIN = "a plain launch, where the arch has dependent ones"
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
WORDS_CONSTANTS = not triton.__version__.startswith("3.6.")  # in the key of a cached result
COUNTED = {
    "tensor_core": r"\bHMMA|HGMMA|UTC\w*MMA",
    "hgmma": r"HGMMA",
    "byte_loads": r"\bLDS\.[US]8",
    "wide_loads": r"\bLDG\.E[\w.]*\.128|LDGSTS[\w.]*\.128|UTMALDG|UBLKCP",
}


@dataclass
class Cell:
    """What the compiler made of one launch; `models` are those that make it."""

    kernel: str
    arch: str
    tile: dict[str, int]
    models: list[str]
    format: str | None = None  # of a product's quantised weight
    registers: int = 0
    spill_bytes: int = 0
    shared_bytes: int = 0
    instructions: dict[str, int] = field(default_factory=dict)
    multiplies: bool = False
    narrow_products: list[str] = field(default_factory=list)
    loops: list[Loop] = field(default_factory=list)
    stream: list[str] = field(default_factory=list)  # what is wrong with a product's stream
    waits: list[str] = field(default_factory=list)  # what is wrong with its wait
    tail_cycles: int = 0  # to the end from the loop that multiplies, or else loads
    seconds: float = 0.0
    error: str | None = None

    def problems(self) -> Iterator[str]:
        """The rules that this cell breaks."""
        if self.error is not None:
            yield self.error
            return
        if self.spill_bytes:
            yield f"spills {self.spill_bytes} bytes of registers"
        if self.shared_bytes > SHARED_MEMORY[self.arch]:
            yield f"{self.shared_bytes} bytes of shared memory > {SHARED_MEMORY[self.arch]}"
        elif self.arch == "sm_90" and self.kernel not in PREFILL and self.shared_bytes > CHAIN:
            yield f"{self.shared_bytes} bytes of shared memory in a decode step > {CHAIN}"
        yield from self.stream
        if self.multiplies and not self.instructions["tensor_core"]:
            yield "no tensor cores"
        warpgroup = self.kernel == "attention_prefill_kernel" and self.arch == "sm_90"
        if warpgroup and not self.instructions["hgmma"]:
            yield "no HGMMA"
        if self.kernel not in SMALL and not self.instructions["wide_loads"]:
            yield "no 16-byte loads"
        by_bytes = self.instructions.get("byte_loads", 0)
        if self.kernel.startswith("attention") and by_bytes:
            yield f"{by_bytes} loads of a byte from shared memory"
        for line in self.narrow_products:
            yield f"a 32-bit product: {line}"
        yield from self.waits


def compile_launch(launch: Launch, models: list[str], fresh: bool = True) -> Cell:
    """Compile one launch and read what the compiler made of it.

    What is not `fresh` may come from Triton's cache, which a launch on a GPU looks into as well.
    """
    names = [name for name, _ in launch.signature]
    constants = {names[i]: value for i, value in launch.constants}
    tile = {name: value for name, value in constants.items() if name.startswith("BLOCK")}
    format = constants.get("FORMAT")
    cell = Cell(launch.kernel, launch.arch, tile | dict(launch.options), models, format)
    knobs.compilation.always_compile = fresh  # a cached result would take no seconds
    started = time.perf_counter()
    try:
        compiled = compiled_kernel(launch)
    except Exception as error:  # the compiler may raise anything: it is reported
        cell.error = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        return cell
    cell.seconds = round(time.perf_counter() - started, 2)
    usage, code = _disassembled(compiled.asm["cubin"])
    found = _given(re.search(r"REG:(\d+) STACK:(\d+)", usage))
    cell.registers, stack = int(found[1]), int(found[2])
    cell.spill_bytes = spilled(stack, compiled.asm["ptx"])
    cell.shared_bytes = compiled.metadata.shared
    cell.instructions = {name: len(re.findall(regex, code)) for name, regex in COUNTED.items()}
    instructions = parse(code)
    if launch.arch in STREAMING and launch.kernel not in PREFILL:
        used = cell.shared_bytes, cell.registers
        cell.stream = stream_problems(cell.tile, *used, instructions, cell.format)
    if launch.arch in ARCHS and launch.kernel not in PREFILL:
        is_dependent = dict(launch.options).get("launch_pdl", False)
        cell.waits = wait_problems(instructions)
        if not is_dependent and launch.kernel not in SPREAD:
            cell.waits.append(PLAIN)
    if launch.arch == "sm_90":  # whose control bits machine_code.py reads
        cell.loops = find_loops(instructions)
        main = [loop.end for loop in cell.loops if loop.multiplies]
        main = main or [loop.end for loop in cell.loops if loop.loads]
        cell.tail_cycles = tail_cycles(instructions, main[0]) if main else 0
    cell.multiplies = "tt.dot" in compiled.asm["ttir"]
    cell.narrow_products = narrow_products(compiled.asm["ttir"])
    return cell


def compiled_kernel(launch: Launch) -> Any:
    """Triton's compiled kernel, as its launcher would make it; from its cache where it is there."""
    kernel = getattr(import_module(launch.module), launch.kernel)
    major, minor = CAPABILITY[launch.arch]
    return triton.compile(
        ASTSource(
            fn=kernel,
            signature=dict(launch.signature),
            constexprs={(index,): value for index, value in launch.constants},
            attrs=_attributes(launch, kernel),
        ),
        target=GPUTarget("cuda", 10 * major + minor, 32),
        options={**dict(launch.options), "enable_fp_fusion": True},
    )


def _attributes(launch: Launch, kernel: JITFunction) -> dict[tuple[int], list]:
    """What is known of each argument, in the form that keys the cache of Triton's launcher."""
    attributes: dict[tuple[int], list] = {}
    for index, (_, kind) in enumerate(launch.signature):
        plain = kernel.params[index].do_not_specialize
        if index in launch.divisible:
            attributes[index,] = [["tt.divisibility", 16]]
        elif WORDS_CONSTANTS if kind == "constexpr" else not plain:
            attributes[index,] = []
    return attributes


def spilled(stack_bytes: int, ptx: str) -> int:
    """Bytes of the stack that ptxas took for registers: the rest is arrays that the PTX declares.

    Triton 3.6 keeps one for the range reduction of sines.
    """
    arrays = re.findall(r"\.local \.align \d+ \.b8\s+\S+\[(\d+)\]", ptx)
    return max(0, stack_bytes - sum(-(-int(size) // 16) * 16 for size in arrays))


def narrow_products(ttir: str) -> list[str]:
    """Lines of Triton's IR that multiply two 32-bit integers neither of which is a constant."""
    constants = set(re.findall(r"(%\w+) = arith\.constant", ttir))
    products = re.findall(r"arith\.muli (%\w+), (%\w+) : (?:tensor<[\dx]+xi32>|i32\b)", ttir)
    return [f"{a} * {b}" for a, b in products if not constants & {a, b}]


def _disassembled(cubin: bytes) -> tuple[str, str]:
    """Resource usage and machine code of a compiled kernel, as cuobjdump prints them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def dump(option: str) -> str:
            command = [CUOBJDUMP, option, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        return dump("-res-usage"), dump("-sass")


def _given(match: re.Match | None) -> re.Match:
    if match is None:
        raise RuntimeError("cuobjdump -res-usage printed neither registers nor stack")
    return match


def report(
    models: list[str],
    archs: list[str],
    jobs: int,
    formats: Sequence[str | None] = (None,),
    kv_cache_dtype: str = "auto",
    block_size: int | None = None,
) -> list[Cell]:
    """Compile what these models launch on these archs, each distinct kernel once.

    formats: of their weights, plain or quantised.  With a cache in fp8 or in blocks: only what it
    launches otherwise.
    """
    wanted: dict[Launch, list[str]] = {}
    for model in models:
        for name, quantization in product(archs, formats):
            of_model = partial(launches, PUBLISHED[model], name, quantization=quantization)
            recorded = of_model(kv_cache_dtype=kv_cache_dtype, block_size=block_size)
            if kv_cache_dtype != "auto" or block_size is not None:
                recorded -= of_model()
            for launch in recorded:
                found = wanted.setdefault(launch, [])
                found += [model] if model not in found else []
    order = sorted(wanted, key=lambda launch: (launch.kernel, launch.arch, str(launch)))
    # spawned: a fork would inherit torch's threads
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        cells = []
        for cell in pool.map(compile_launch, order, [wanted[launch] for launch in order]):
            cells.append(cell)
            print(_row(cell), flush=True)
    return cells


HEADER = "kernel                          arch     regs spill  shared  mma  16B     s  models"


def _row(cell: Cell) -> str:
    counts = cell.instructions or {"tensor_core": 0, "wide_loads": 0}
    name = cell.kernel.removesuffix("_kernel") + (f" {cell.format}" if cell.format else "")
    line = (
        f"{name:<32}{cell.arch:<8}{cell.registers:>5}"
        f"{cell.spill_bytes:>6}{cell.shared_bytes:>8}{counts['tensor_core']:>5}"
        f"{counts['wide_loads']:>5}{cell.seconds:>6.1f}  {', '.join(cell.models)}"
    )
    return "\n".join([line, *(f"    BROKEN: {problem}" for problem in cell.problems())])


def _as_json(cell: Cell) -> dict[str, Any]:
    found = asdict(cell) | {"problems": list(cell.problems())}
    return {"part" if name == "arch" else name: value for name, value in found.items()}


def summary(cells: list[Cell]) -> str:
    """Markdown: the most registers and KB of shared memory that each kernel takes on each arch."""
    names = [name for name in CAPABILITY if any(cell.arch == name for cell in cells)]
    lines = [f"| kernel | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for kernel, format in sorted({(cell.kernel, cell.format or "") for cell in cells}):
        row = [f"{kernel.removesuffix('_kernel')} {format}".strip()]
        for name in names:
            key = kernel, name, format
            same = [c for c in cells if (c.kernel, c.arch, c.format or "") == key]
            registers = max((cell.registers for cell in same), default=0)
            shared = max((cell.shared_bytes for cell in same), default=0)
            row.append(f"{registers} / {shared / 1024:.0f}")
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Print the table, write JSON where asked to; 1 where a rule is broken."""
    parser = argparse.ArgumentParser(
        prog="python -P -m gemcut.tools.compile_report",
        description="Compile every kernel for GPUs that are not here, and check what comes of it.",
    )
    parser.add_argument("--all", action="store_true", help="every model, arch and format")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=QUICK["models"])
    parser.add_argument(
        "--archs", "--parts", nargs="+", choices=list(CAPABILITY), default=QUICK["archs"]
    )
    parser.add_argument(
        "--quantization", nargs="+", choices=list(FORMATS), help="instead of plain weights"
    )
    parser.add_argument(
        "--kv-cache-dtype", choices=["auto", "fp8"], default="auto", help="of keys and values"
    )
    parser.add_argument(
        "--block-size", type=int, metavar="TOKENS", help="of a paged cache, in place of slots"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilers at a time")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every cell here")
    arguments = parser.parse_args(argv)
    if INTERPRETED:
        parser.error("TRITON_INTERPRET is set: kernels are interpreted, not compiled; unset it")
    models: list[str] = list(MODELS) if arguments.all else arguments.models
    names: list[str] = list(CAPABILITY) if arguments.all else arguments.archs
    if arguments.kv_cache_dtype == "fp8":
        names = [name for name in names if CAPABILITY[name] >= (8, 9)]  # sm_80 cannot convert

    formats = arguments.quantization or ([None, *FORMATS] if arguments.all else [None])

    weights = ", ".join(format or "bf16" for format in formats)
    print(f"triton {triton.__version__}, {weights}, {', '.join(models)}\n{HEADER}")
    of_cache = arguments.kv_cache_dtype, arguments.block_size
    cells = report(models, names, arguments.jobs, formats, *of_cache)
    broken = sum(any(cell.problems()) for cell in cells)
    seconds = sum(cell.seconds for cell in cells)
    print(f"\nregisters / KB of shared memory, the most of each kernel\n\n{summary(cells)}\n")
    print(f"{len(cells)} compilations, {broken} break a rule; {seconds:.0f} s of compiling")
    if arguments.json is not None:
        rows = [_as_json(cell) for cell in cells]
        content = {"triton": triton.__version__, "dtype": "bfloat16", "cells": rows}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
