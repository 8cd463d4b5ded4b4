"""tools/weight_stream.py: what a product's loop must do, seen in compiled and in written code."""

import json
import math
import os
import subprocess
import sys

import pytest

from gemcut.tools.compile_report import CHAIN
from gemcut.tools.machine_code import Instruction
from gemcut.tools.weight_stream import (
    LEAST_IN_FLIGHT,
    multiplying_loop,
    program_bytes,
    stream_problems,
)

COMPILING = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
TILE = {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_D": 128, "num_warps": 4, "num_stages": 3}
COPY = "LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64]"
LOOP = (COPY, COPY, "HGMMA.64x16x16.F32.BF16 R8, R8", "@P0 BRA 0x10")


def code(*texts: str) -> list[Instruction]:
    """A load before a loop, the loop from address 0x10, a load after it."""
    around = ("LDG.E R1, [R2.64]", *texts, "LDG.E.128 R1, [R2.64]")
    return [Instruction(0x10 * i, text, 0) for i, text in enumerate(around)]


def problems(*texts: str, **changed: int) -> list[str]:
    return stream_problems(TILE | changed, 61_440, 56, code(*texts))


def test_a_good_stream():
    assert problems(*LOOP) == []
    assert [i.text for i in multiplying_loop(code(*LOOP))] == list(LOOP)
    # what is no product has no weight
    assert stream_problems({"BLOCK_M": 16, "BLOCK_N": 32}, 0, 56, []) == []


@pytest.mark.parametrize(
    ("loop", "changed", "problem"),
    [
        pytest.param(
            ("LDG.E.128 R1, [R2.64]", *LOOP),
            {},
            "the loop that multiplies loads into registers",
            id="a load into registers",
        ),
        pytest.param(
            LOOP[2:], {}, "no asynchronous copy in the loop that multiplies", id="no copy"
        ),
        pytest.param(
            ("LDGSTS.E.64 [R1], desc[UR4][R2.64]", *LOOP),
            {},
            "copies of less than 16 bytes",
            id="a narrow copy",
        ),
        pytest.param(
            LOOP,
            {"num_stages": 2, "BLOCK_D": 32},
            "3 x 4096 bytes of weight in flight < 25600",
            id="little in flight",
        ),
    ],
)
def test_each_rule(loop, changed, problem):
    assert problems(*loop, **changed) == [problem]


@pytest.mark.parametrize(
    ("tile", "nbytes"),
    [
        pytest.param(TILE, 2 * 64 * 128 * 2, id="one row a constant"),
        pytest.param(
            {"BLOCK_M": 16, "BLOCK_F": 32, "BLOCK_D": 64, "num_stages": 4},
            3 * 64 * 64 * 2,
            id="rows of gate and of up",
        ),
        pytest.param({"BLOCK_S": 16, "BLOCK_D": 64}, None, id="no weight"),
    ],
)
def test_bytes_on_their_way(tile, nbytes):
    assert program_bytes(tile) == nbytes


# What the report says of tiles of a product [2304, D], as the compiler makes them
TILES = """
import json, sys
from gemcut.tools.compile_report import compile_launch
from gemcut.tools.prediction.product_times import TimedProduct

found = []
for D, tile in json.loads(sys.argv[1]):
    launch = TimedProduct("skinny_linear", 2304, D, tile, 1.0).made("sm_90").launch
    found.append(list(compile_launch(launch, [], fresh=False).problems()))
print(json.dumps(found))
"""


def test_compiled_breaks_are_seen():
    """A loop without a pipeline, rows that 16 bytes do not divide, more than 75 KB."""
    cases = [(9216, {}), (9216, {"num_stages": 1}), (9215, {}), (9216, {"num_stages": 6})]
    command = [sys.executable, "-P", "-c", TILES, json.dumps(cases)]
    run = subprocess.run(command, env=COMPILING, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    rule, unpiped, ragged, large = json.loads(run.stdout.splitlines()[-1])
    assert rule == []
    assert "the loop that multiplies loads into registers" in unpiped
    assert "the loop that multiplies loads into registers" in ragged
    shared = f"bytes of shared memory in a decode step > {CHAIN}"
    assert len(large) == 1
    assert large[0].endswith(shared)


# Products of a decode step: model, kernel, programs, tile
PRODUCTS = """
import json
from gemcut.engine.config.model_config import PUBLISHED
from gemcut.tools.launches import step_launches
from gemcut.tools.prediction.launch_time import facts_of

found = []
for model, config in PUBLISHED.items():
    made = step_launches(config, "sm_90", batch=1, context=1024)
    for one in dict.fromkeys(one for one in made if one.launch is not None):
        facts = facts_of(one)
        if "w_ptr.1" in facts and "BLOCK_D" in facts and "BLOCK_M" in facts:
            found.append([f"{model} {one.name} {facts['w_ptr.0']}", one.grid, facts])
print(json.dumps(found))
"""


def test_every_processor_has_enough_on_its_way():
    """By the grids of each model: as many programs as the processor with the fewest has."""
    run = subprocess.run(
        [sys.executable, "-P", "-c", PRODUCTS], env=COMPILING, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    products = json.loads(run.stdout.splitlines()[-1])
    assert len(products) >= 8 * 5
    for name, grid, facts in products:
        programs = max(1, math.prod(grid) // 132)
        each = program_bytes(facts)
        assert each is not None, name
        assert programs * each >= LEAST_IN_FLIGHT, (name, grid)
