"""Where a dependent launch waits: planted kernels, compiled, and planted machine code."""

import json
import os
import subprocess
import sys
from pathlib import Path

import planted_waits
import pytest

from gemcut.tools.launch_wait import wait_problems
from gemcut.tools.machine_code import Instruction

COMPILING = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
WORDS = {  # what is said of each planted kernel
    "missing": "no waits",
    "after a store": "memory before the wait: @!P0 STG",
    "after a load": "memory before the wait: @!P0 LDG",
    "after a return": "an exit before the wait",
    "in a loop": "8 waits",  # the compiler unrolls it
    "twice": "2 waits",
    "on one path": "a branch past the wait",
    "after an atomic": "memory before the wait: REDG",
    "nothing allowed": "the next kernel is never allowed to begin",
}


@pytest.mark.parametrize("capability", ["90", "100", "120"])
def test_planted_kernels(capability):
    command = [sys.executable, "-P", Path(planted_waits.__file__), capability]
    run = subprocess.run(command, env=COMPILING, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found.pop("right") == found.pop("prefetch") == []
    assert found.keys() == WORDS.keys()
    for form, words in WORDS.items():
        assert found[form][0].startswith(words), form


RIGHT = ("S2R R0, SR_TID.X", "PREEXIT", "ACQBULK", "LDG.E R2, [R4]", "STG.E [R4], R2", "EXIT")


def code(*lines: str) -> list[Instruction]:
    return [Instruction(16 * i, line, 0) for i, line in enumerate(lines)]


def planted(*changes: tuple[int, str]) -> list[str]:
    """What is wrong with RIGHT where these lines are put before those of these numbers."""
    lines = list(RIGHT)
    for at, line in changes:
        lines.insert(at, line)
    return wait_problems(code(*lines))


def test_what_may_stand_before_the_wait():
    assert planted() == []
    for line in (
        "UBLKPF.L2 [UR14], UR12",
        "CCTL.E.PF2 [R10]",
        "LDC R1, c[0x0][0x28]",
        "LDS R1, [R2]",
    ):
        assert planted((2, line)) == []


@pytest.mark.parametrize(
    "line",
    [
        "LD.E R2, [R4]",
        "@P0 LDG.E.128 R2, desc[UR4][R4.64]",
        "LDGSTS.E.BYPASS.128 [R1], desc[UR4][R4.64]",
        "UTMALDG.2D [UR8], [UR4]",
        "UBLKCP [UR4], [UR8], UR6",
        "ST.E [R4], R2",
        "STG.E [R4], R2",
        "ATOM.E.ADD R2, [R4], R3",
        "ATOMG.E.ADD PT, R2, desc[UR4][R4.64], R3",
        "RED.E.ADD [R4], R3",
        "UTMASTG.2D [UR8], [UR4]",
        "CCTL.IVALL",
    ],
)
def test_memory_before_the_wait(line):
    assert planted((2, line)) == [f"memory before the wait: {line}"]
    assert planted((3, line)) == []


@pytest.mark.parametrize("line", ["@P0 EXIT", "EXIT", "RET.REL.NODEC R2", "BRX R2 -0x20"])
def test_exits_before_the_wait(line):
    assert planted((2, line)) == [f"an exit before the wait: {line}"]


def test_branches_are_judged_by_their_targets():
    loop = "@P0 BRA.U.ANY 0x10"  # as for a prefetch of addresses that differ within a warp
    assert planted((2, loop)) == []
    assert planted((2, "@!P0 BRA 0x40")) == ["a branch past the wait: @!P0 BRA 0x40"]
    assert planted((2, "CALL.REL.NOINC 0x50")) == ["a branch past the wait: CALL.REL.NOINC 0x50"]
    assert planted((2, "CALL.REL.NOINC 0x70"), (7, "BPT.TRAP 0x1")) == []
    assert planted((5, "@P0 BRA 0x30")) == []
    for target in ("0x20", "0x0"):  # the wait itself, and what stands before it
        back = f"@P0 BRA P1, {target}"
        assert planted((5, back)) == [f"a wait in a loop: {back}"]


def test_the_wait_itself():
    assert wait_problems(code(*(line for line in RIGHT if line != "ACQBULK"))) == [
        "no waits for the kernel before"
    ]
    assert planted((3, "ACQBULK")) == ["2 waits for the kernel before"]
    given = [line.replace("ACQBULK", "@P0 ACQBULK") for line in RIGHT]
    assert wait_problems(code(*given)) == ["a wait with a condition: @P0 ACQBULK"]
    given = [line for line in RIGHT if line != "PREEXIT"]
    assert wait_problems(code(*given)) == ["the next kernel is never allowed to begin"]


# A real kernel with its wait moved or left out: what the compile report says of it
MUTATED = """
import sys
from importlib import import_module
from pathlib import Path

import torch

from gemcut.kernels import norm
from gemcut.tools.compile_report import compile_launch
from gemcut.tools.launches import recorded

WAIT, LOAD = "    wait_for_predecessor(DEPENDENT)\\n", "    x = tl.load(x_ptr + row"
source = Path(norm.__file__).read_text()
begin = source.index("def rmsnorm_kernel")
before, after = source[:begin], source[begin:]
line = next(line for line in after.splitlines(keepends=True) if line.startswith(LOAD))
forms = {
    "right": after,
    "left out": after.replace(WAIT, "", 1),
    "moved": after.replace(WAIT, "", 1).replace(line, line + WAIT, 1),
}
sys.path.insert(0, sys.argv[1])
for number, (form, changed) in enumerate(forms.items()):
    Path(sys.argv[1], f"mutated_{number}.py").write_text(before + changed)
    module = import_module(f"mutated_{number}")
    with recorded("sm_90") as found:
        x = torch.empty(1, 2304, device="cuda", dtype=torch.bfloat16)
        module.rmsnorm(x, x.select(0, 0), 1e-6)
    problems = compile_launch(*found, []).problems()
    print(form, *(problem.partition(":")[0] for problem in problems), sep=": ")
"""


def test_a_mistake_in_a_kernel_breaks_a_rule_of_the_report(tmp_path):
    command = [sys.executable, "-P", "-c", MUTATED, str(tmp_path)]
    run = subprocess.run(command, env=COMPILING, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    right, left_out, moved = run.stdout.splitlines()
    assert right == "right"
    assert left_out == "left out: no waits for the kernel before"
    assert set(moved.split(": ")[1:]) == {"memory before the wait"}
