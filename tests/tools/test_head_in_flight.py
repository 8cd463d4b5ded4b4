"""The head's loop over blocks keeps its loads in flight, as the compiled code shows.

A block's logits are compared under a branch.  What a load depends on must not be decided there, or
the compiler loads nothing ahead: the next block's weights would wait for the last one's logits.
"""

import inspect
import os
import subprocess
import sys

from gemcut.kernels import head

# The copies on their way after each wait of the loop, of the greatest logit and of a draw
WAITS = """
import re
import sys
from importlib import import_module

import torch
from gemcut.tools.compile_report import compiled_kernel
from gemcut.tools.launches import recorded

for draws in (False, True):
    with recorded("sm_90") as found:
        x = torch.empty(1, 2304, device="cuda", dtype=torch.bfloat16)
        weight = x.new_empty(256_000, 2304)
        index = torch.empty(1, device="cuda", dtype=torch.int64)
        draw = (index.float(), index, index) if draws else ()
        import_module(sys.argv[1]).lm_head_argmax(x, weight, 30.0, *draw)
    (launch,) = found
    code = compiled_kernel(launch).asm["ttgir"]
    loop = code[code.index("scf.for"):]
    loop = loop[: loop.index("scf.yield")]
    print(*re.findall(r"async_wait .*num = (\\d+)", loop))
"""
IN_THE_BRANCH = (
    (
        "            acc = tl.zeros_like(acc)\n",
        "            acc = tl.zeros_like(acc)\n"
        "            block += 1\n"
        "            start_d = -BLOCK_D\n",
    ),
    ("        block = tl.where(is_last, block + 1, block)\n", ""),
    ("start_d = tl.where(is_last, 0, start_d + BLOCK_D)", "start_d += BLOCK_D"),
)


def waits(module: str, *folders: str) -> list[list[int]]:
    compiling = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    compiling["PYTHONPATH"] = os.pathsep.join([*folders, os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, "-P", "-c", WAITS, module], env=compiling, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return [[int(number) for number in line.split()] for line in run.stdout.splitlines()]


def test_a_step_of_weight_is_on_its_way_while_another_is_multiplied():
    """Its copies of x and of the weight, in the first wait and in all."""
    assert waits("gemcut.kernels.head") == [[2], [2]]


def test_a_block_that_ends_in_the_branch_is_seen(tmp_path):
    source = inspect.getsource(head)
    for right, wrong in IN_THE_BRANCH:
        assert source.count(right) == 1, right
        source = source.replace(right, wrong)
    (tmp_path / "late_head.py").write_text(source)
    for of_loop in waits("late_head", str(tmp_path)):
        assert 0 in of_loop
