"""What CI compiles, and that a broken rule is reported."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from gemcut.kernels.gpu_arch import SHARED_MEMORY
from gemcut.tools.compile_report import Cell, narrow_products, spilled

KERNELS = Path(__file__).parents[2] / "kernels"
COMPILING = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
RUN = "import sys; from gemcut.tools.compile_report import main; sys.exit(main(sys.argv[1:]))"
GOOD = Cell(
    "attention_prefill_kernel",
    "sm_90",
    tile={"BLOCK_M": 128},
    models=["gemma-2-2b"],
    registers=200,
    shared_bytes=100_000,
    instructions={"tensor_core": 8, "hgmma": 8, "wide_loads": 8},
    multiplies=True,
)


def report(*arguments: str, before: str = "") -> subprocess.CompletedProcess:
    command = [sys.executable, "-P", "-c", before + RUN, *arguments]
    return subprocess.run(command, env=COMPILING, capture_output=True, text=True)


def test_the_kernels_of_a_model_keep_the_rules(tmp_path):
    """gemma-2-2b on sm_90; `--all` compiles the rest."""
    file = tmp_path / "report.json"
    run = report("--json", str(file))
    assert run.returncode == 0, run.stdout + run.stderr
    cells = json.loads(file.read_text())["cells"]
    sources = [path.read_text() for path in KERNELS.glob("*.py")]
    written = {name for source in sources for name in re.findall(r"def (\w+_kernel)\(", source)}
    assert {cell["kernel"] for cell in cells} == written - {"dequantize_kernel"}  # of others
    assert {cell["spill_bytes"] for cell in cells} == {0}
    prefill = [cell for cell in cells if cell["kernel"] == "attention_prefill_kernel"]
    assert all(cell["instructions"]["hgmma"] for cell in prefill)


def test_the_kernels_of_quantised_weights_keep_them_too(tmp_path):
    file = tmp_path / "report.json"
    run = report("--quantization", "int4", "fp8", "--json", str(file))
    assert run.returncode == 0, run.stdout + run.stderr
    cells = json.loads(file.read_text())["cells"]
    assert "dequantize_kernel" in {cell["kernel"] for cell in cells}
    assert {cell["spill_bytes"] for cell in cells} == {0}


PREFILL_ALONE = (
    "import gemcut.tools.compile_report as c\n"
    "launches = c.launches\n"
    "c.launches = lambda *a, **k: {l for l in launches(*a, **k) if 'prefill' in l.kernel}\n"
)


def test_a_cache_in_fp8_is_not_read_byte_by_byte():
    """Of sm_89, whose tensor cores take registers; without pairs of values it is a broken rule."""
    arguments = ("--archs", "sm_89", "--kv-cache-dtype", "fp8")
    run = report(*arguments, before=PREFILL_ALONE)
    assert run.returncode == 0, run.stdout + run.stderr
    singly = "from gemcut.kernels import prefill_attention as p; p.IN_PAIRS = ()\n"
    run = report(*arguments, before=PREFILL_ALONE + singly)
    assert run.returncode == 1, run.stderr
    assert "loads of a byte from shared memory" in run.stdout


def test_a_tile_that_spills_is_reported():
    """Prefill attention with a quarter of its warps: 128 x 256 sums do not fit their registers."""
    before = PREFILL_ALONE + (
        "from gemcut.kernels import prefill_attention as p, tiles\n"
        "tiles.TUNED.clear()\n"  # what was measured would be laid over it
        "p._tile = lambda *_: dict(BLOCK_M=128, BLOCK_N=64, num_warps=2, num_stages=2)\n"
    )
    run = report(before=before)
    assert run.returncode == 1, run.stderr
    assert "BROKEN: spills" in run.stdout


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"spill_bytes": 8}, "spills 8 bytes of registers"),
        ({"shared_bytes": 232_449}, "232449 bytes of shared memory > 232448"),
        ({"arch": "sm_89", "shared_bytes": 101_377}, "101377 bytes of shared memory > 101376"),
        ({"instructions": {"tensor_core": 8, "hgmma": 0, "wide_loads": 8}}, "no HGMMA"),
        ({"instructions": {"tensor_core": 8, "hgmma": 8, "wide_loads": 0}}, "no 16-byte loads"),
        (
            {"instructions": GOOD.instructions | {"byte_loads": 32}},
            "32 loads of a byte from shared memory",
        ),
        ({"narrow_products": ["%a * %b"]}, "a 32-bit product: %a * %b"),
        ({"waits": ["2 waits for the kernel before"]}, "2 waits for the kernel before"),
        (
            {"kernel": "attention_decode_kernel", "shared_bytes": 76_801},
            "76801 bytes of shared memory in a decode step > 76800",
        ),
        ({"stream": ["copies of less than 16 bytes"]}, "copies of less than 16 bytes"),
        ({"error": "CompilationError: no"}, "CompilationError: no"),
        (
            {
                "kernel": "lm_head_kernel",
                "shared_bytes": 76_800,
                "instructions": {"tensor_core": 0, "hgmma": 0, "wide_loads": 8},
            },
            "no tensor cores",
        ),
    ],
)
def test_each_rule(change, problem):
    assert list(GOOD.problems()) == []
    assert list(replace(GOOD, **change).problems()) == [problem]


def test_every_arch_has_a_limit():
    assert set(SHARED_MEMORY) == {"sm_80", "sm_89", "sm_90", "sm_100", "sm_120"}


def test_narrow_products_are_found():
    ttir = """
      %block = arith.constant 64 : i32
      %0 = arith.muli %pid, %block : i32
      %1 = arith.muli %row, %stride : i32
      %2 = arith.muli %row_64, %stride_64 : i64
      %3 = arith.muli %offs, %strides : tensor<64x1xi32>
    """
    assert narrow_products(ttir) == ["%row * %stride", "%offs * %strides"]


def test_arrays_of_the_program_are_no_spill():
    """Triton 3.6 declares one for the range reduction of sines."""
    ptx = "\t.local .align 4 .b8 \t__local_depot0[28];\n"
    assert (spilled(32, ptx), spilled(40, ptx), spilled(8, "")) == (0, 8, 8)


def test_bad_input():
    assert "invalid choice: 'sm_70'" in report("--archs", "sm_70").stderr
    command = [sys.executable, "-P", "-c", RUN]
    interpreted = {**COMPILING, "TRITON_INTERPRET": "1"}
    run = subprocess.run(command, env=interpreted, capture_output=True, text=True)
    assert run.returncode == 2
    assert "TRITON_INTERPRET is set" in run.stderr


# The launcher's own words for what is launched, beside those of the report; prints what differs.
LAUNCHERS_KEYS = """
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from gemcut.engine.config.model_config import PUBLISHED
from gemcut.tools import compile_report, launches

made, record = [], launches._launch
launches._launch = lambda kernel, *rest: made.append((kernel, rest)) or record(kernel, *rest)
launches.launches(PUBLISHED["gemma-3-1b"], "sm_90")
backend = make_backend(GPUTarget("cuda", 90, 32))

def real(value):
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty(64, dtype=value.dtype)[value.storage_offset() % 16 :]

for kernel, rest in made:
    launch = record(kernel, *rest)
    ours = dict(launch.signature), {(i,): v for i, v in launch.constants}
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = binder(**{k: real(v) for k, v in rest[-1].items()})
    _, *theirs = kernel._pack_args(backend, options, bound, specialization, options)
    if tuple(theirs) != (*ours, compile_report._attributes(launch, kernel)):
        print(kernel.fn.__name__, theirs, ours)
print(len(made))
"""


def test_the_report_compiles_what_the_launcher_looks_for():
    """Else what was compiled ahead is compiled once more where it is launched."""
    command = [sys.executable, "-P", "-c", LAUNCHERS_KEYS]
    run = subprocess.run(command, env=COMPILING, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) > 1000


# Kernels of a decode step's layers, by rows and tokens of a row, that are not those of one row
OTHERS_BY_COMPANY = """
from gemcut.tools.launches import kernels_of_company
from gemcut.engine.config.model_config import PUBLISHED

for model in ("gemma-2-2b", "gemma-3-1b", "gemma-2b"):
    alone, *others = kernels_of_company(PUBLISHED[model], "sm_90").values()
    for other in others:
        for launch in other ^ alone:
            print(model, launch.kernel)
"""


def test_one_compiled_kernel_serves_any_company():
    """Other constants for other numbers of rows, or of drafts, would add up in another order.

    The interpreter gives equal bits where a GPU would not: this is read from what is compiled.
    """
    command = [sys.executable, "-P", "-c", OTHERS_BY_COMPANY]
    run = subprocess.run(command, env=COMPILING, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, ""), run.stderr


# Quotients of decode attention and its sum in float32, as the compiled code has them
QUOTIENTS = """
import torch
from gemcut import kernels
from gemcut.tools.compile_report import compiled_kernel
from gemcut.tools.launches import recorded

with recorded("sm_90") as found:
    cache = torch.empty(2, 4, 1024, 64, device="cuda")
    index = torch.empty(2, device="cuda", dtype=torch.int64)
    q = torch.empty(2, 1, 8, 64, device="cuda")
    kernels.attention_decode(q, cache, cache, index, index, 0.1, 50.0, None)
ptx = "".join(compiled_kernel(launch).asm["ptx"] for launch in found)
print(ptx.count("div.full"), ptx.count("div.rn") > 0, ptx.count("tanh.approx"))
"""


# Prefill attention at head_dim 256 with and without softcap: waits for copies, those that stand
# after the loop's first exp2, and the instructions of a pass
PREFILL = """
import re
import torch
from gemcut import kernels
from gemcut.tools.compile_report import compile_launch, compiled_kernel
from gemcut.tools.launches import recorded

for softcap in (50.0, None):
    with recorded("sm_90") as found:
        cache = torch.empty(2, 4, 8192, 256, device="cuda", dtype=torch.bfloat16)
        index, ends = (torch.empty(n, device="cuda", dtype=torch.int64) for n in (2, 3))
        q = torch.empty(512, 8, 256, device="cuda", dtype=torch.bfloat16)
        kernels.attention_prefill(q, cache, cache, index, index, ends, 0.1, softcap, None)
    (launch,) = found
    ptx = compiled_kernel(launch).asm["ptx"]
    waits = re.findall(r"cp.async.wait_group\\s+(\\d+)", ptx)
    late = re.findall(r"cp.async.wait_group\\s+(\\d+)", ptx[ptx.index("ex2.approx") :])
    cell = compile_launch(launch, [])
    (loop,) = [loop for loop in cell.loops if loop.multiplies]
    print(",".join(waits), ",".join(late), cell.spill_bytes, loop.instructions)
"""


def test_copies_of_prefill_attention_are_under_way_in_its_loop():
    """Two of a tile to come are pending while the loop waits, and it waits after the softmax.

    The softcap of a score takes two instructions, of which a thread has 128 * 32 / 256 = 16.
    """
    command = [sys.executable, "-P", "-c", PREFILL]
    run = subprocess.run(command, env=COMPILING, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    capped, plain = (line.split() for line in run.stdout.splitlines())
    assert capped[:3] == plain[:3] == ["2,0", "2,0", "0"]
    assert 0 < int(capped[3]) - int(plain[3]) <= 2 * 16


def test_float32_attention_divides_exactly():
    """The plain quotient errs by two units, tanh.approx by 2**-11: a test's budget is less."""
    command = [sys.executable, "-P", "-c", QUOTIENTS]
    run = subprocess.run(command, env=COMPILING, capture_output=True, text=True)
    assert (run.returncode, run.stdout.split()) == (0, ["0", "True", "0"]), run.stderr
