"""What tools/tune.py makes of candidates before any is timed: compiled, dropped, put in order."""

import os
import re
import subprocess
import sys
from concurrent.futures import Future, ProcessPoolExecutor

import pytest

from gemcut.bench.measure.report_file import load_results
from gemcut.kernels import tiles
from gemcut.tools import tune
from gemcut.tools.compile_report import Cell
from gemcut.tools.tuning import ranking, trials
from gemcut.tools.tuning.search_space import Candidate, Subject

COMPILING = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def cell(spill_bytes=0, **settings):
    taken = {"registers": 100, "shared_bytes": 4096, "spill_bytes": spill_bytes, **settings}
    return Cell("k_kernel", "sm_90", {}, [], instructions=INSTRUCTIONS, **taken)


INSTRUCTIONS = {"tensor_core": 1, "hgmma": 1, "wide_loads": 1}


class Pool(ProcessPoolExecutor):
    """Compiles nothing: `cells` are what a compiler would find, by the tile's name."""

    def __init__(self, cells, jobs=1, mp_context=None):
        self.cells, self.asked = cells, []

    def submit(self, function, launch, *args, **kwargs):
        self.asked.append(launch)
        future = Future()
        if launch in self.cells:
            future.set_result(self.cells[launch])
        return future

    def shutdown(self, *args, **kwargs):
        pass


@pytest.fixture
def compile_fakes(monkeypatch):
    """Compiles candidates of two subjects as if each launched one kernel, named like the tile."""

    def compile_fakes(cells, *tiles):
        subjects = [Subject(("k", (n,)), [], [Candidate(dict(t)) for t in tiles]) for n in (1, 2)]
        pool = Pool(cells)
        monkeypatch.setattr(tune, "ProcessPoolExecutor", lambda *_, **__: pool)
        monkeypatch.setattr(
            tune, "find_launches", lambda _, tiles, name: [{Candidate(t).name} for t in tiles]
        )
        tune.compile_candidates(subjects, "sm_90", 1, ends=0.0)
        return subjects, pool

    return compile_fakes


def test_what_breaks_a_rule_is_dropped(compile_fakes):
    """Each distinct launch is compiled once, and what never came in time is not timed."""
    cells = {
        "a=1": cell(),
        "a=2": cell(shared_bytes=300_000),
        "a=3": cell(error="CompilationError: at 3:4"),
        "a=4 maxnreg=64": cell(spill_bytes=8),
    }
    tiles = ({"a": 1}, {"a": 2}, {"a": 3}, {"a": 4, "maxnreg": 64}, {"a": 5}, {})
    subjects, pool = compile_fakes(cells, *tiles)
    assert sorted(pool.asked) == [*cells, "a=5"]
    for subject in subjects:
        assert [(c.status, c.detail) for c in subject.candidates] == [
            ("compiled", ""),
            ("dropped", "300000 bytes of shared memory > 232448"),
            ("dropped", "CompilationError: at 3:4"),
            ("dropped", "spills 8 bytes of registers"),
            ("dropped", trials.NO_TIME),
            ("same as the rule", ""),
        ]
        assert [c.name for c in subject.left()] == ["a=1"]
        assert (subject.candidates[0].registers, subject.candidates[0].shared_bytes) == (100, 4096)


def test_candidates_are_timed_in_the_order_of_their_predictions(monkeypatch):
    """The tile in use before all others; what is gone, last."""
    predicted = {"a=1": 30.0, "a=2": 10.0, "a=3": 20.0, "a=4": 5.0, "the rule": 20.0}
    subject = Subject(("k", (1,)), [], [Candidate({"a": n}, "compiled") for n in (1, 2, 3, 4)])
    subject.candidates[3].status = "dropped"
    monkeypatch.setattr(tiles, "TUNED", {"sm_90": {("k", (1,)): {"a": 1}}})
    monkeypatch.setattr(
        ranking, "find_made", lambda _, tried, arch: [[Candidate(t).name] for t in tried]
    )
    monkeypatch.setattr(ranking, "launches_of", lambda made: set())
    monkeypatch.setattr(ranking, "predicted_us", lambda cases, *_: [predicted[cases[0]]])
    ranking.rank(subject, "sm_90", {}, Pool({}))
    assert [c.name for c in subject.candidates] == ["a=1", "a=2", "a=3", "a=4"]
    assert [c.predicted_ratio for c in subject.candidates[:3]] == pytest.approx([1.5, 0.5, 1.0])
    assert subject.rule.predicted_us == [20.0]


def test_what_spills_is_tried_with_more_registers(compile_fakes):
    """Ptxas spills a few bytes where it could have taken more registers."""
    cells = {
        "a=1": cell(spill_bytes=8),
        "a=1 maxnreg=255": cell(),
        "a=2": cell(spill_bytes=400),
        "a=2 maxnreg=255": cell(spill_bytes=200),
    }
    subjects, _ = compile_fakes(cells, {"a": 1}, {"a": 2})
    for subject in subjects:
        mended, hopeless = subject.candidates
        assert (mended.tile, mended.status) == ({"a": 1, "maxnreg": 255}, "compiled")
        assert (hopeless.status, hopeless.detail) == ("dropped", "spills 200 bytes of registers")


COMPILE = """
import sys
from gemcut.kernels import tiles
from gemcut.tools import tune
from gemcut.tools.tuning import search_space

tiles.TUNED.clear()
FINE = {"BLOCK_F": 32, "BLOCK_D": 64, "num_warps": 4, "num_stages": 3}
CANDIDATES = [
    FINE,
    {"BLOCK_F": 32, "BLOCK_D": 128, "num_warps": 4, "num_stages": 3},
    {**FINE, "num_stages": 24},
    {**FINE, "num_stages": 12},
    {**FINE, "BLOCK_D": 256, "maxnreg": 64},
]
search_space.CANDIDATES["linear_geglu"] = lambda shape: iter(CANDIDATES)
if __name__ == "__main__":
    sys.exit(tune.main(sys.argv[1:]))
"""
GEMMA_3 = ["--models", "gemma-3-1b", "--kernels", "linear_geglu"]


def uninterpreted(script, *options, **environment):
    command = [sys.executable, "-P", "-c", script, *options]
    return subprocess.run(command, env=COMPILING | environment, capture_output=True, text=True)


def test_candidates_are_compiled_without_a_gpu(tmp_path):
    options = [*GEMMA_3, "--compile-only", "--arch", "sm_90", "--jobs", "1", "--out", str(tmp_path)]
    run = uninterpreted(COMPILE, *options)
    assert run.returncode == 0, run.stderr
    rows = {
        tuple(row["tile"].values()): (row["status"], row["detail"])
        for row in load_results(tmp_path / "tune-sm_90.json")["rows"]
    }
    assert rows[32, 64, 4, 3] == ("compiled", "")
    assert rows[32, 128, 4, 3] == ("same as the rule", "")
    assert re.fullmatch(r"\d{6} bytes of shared memory > 232448", rows[32, 64, 4, 24][1])
    assert rows[32, 64, 4, 12][1].endswith(" of shared memory in a decode step > 76800")
    assert re.search(r"spills \d+ bytes of registers", rows[32, 256, 4, 3, 64][1])
    assert "linear_geglu 6912 x 1152: 1 of 5 candidates are left" in run.stdout
    predicted = re.findall(r"([\d.]+) us predicted, ([\d.]+) of the rule's", run.stdout)
    assert [ratio == "1.00" for _, ratio in predicted] == [True, False]
    assert all(1 < float(us) < 50 for us, _ in predicted)
    assert re.search(r"BLOCK_F=32 BLOCK_D=64 num_warps=4 num_stages=3 +\d+ registers", run.stdout)
    assert not (tmp_path / "tiles-sm_90.json").exists()


# A launch on a GPU without the GPU: the launcher's own code up to the compiled kernel
CACHE = """
from unittest import mock
import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from gemcut import kernels
from gemcut.kernels import tiles
from gemcut.tools.tuning import search_space
from gemcut.tools.compile_report import compile_launch
from gemcut.tools.launches import recorded

TILES = {"linear_geglu": {"BLOCK_D": 256}, "attention_decode": {"SPLIT": 64, "maxnreg": 255}}
launch, arguments = JITFunction.run, []


class Pointer:
    def __init__(self, tensor):
        self.dtype = tensor.dtype

    def data_ptr(self):
        return 512


def noted(self, **given):
    arguments.append((self, given))
    return note(self, **given)


device = mock.Mock()
device.get_current_target.return_value = GPUTarget("cuda", 90, 32)
device.get_current_device.return_value = 0
driver.set_active(device)
for name, tile in TILES.items():
    (subject,) = search_space.find_subjects(
        ["gemma-3-1b"], [name], "sm_90", torch.device("cuda", 0), torch.bfloat16
    )
    case = subject.cases[0]
    with recorded("sm_90") as launches, search_space.applied("sm_90", subject.key, tile):
        note = JITFunction.run
        with mock.patch.object(JITFunction, "run", noted):
            getattr(kernels, case.op)(**case.make())
    for found in launches:
        assert compile_launch(found, [], fresh=False).error is None
    hits = []
    knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
    while arguments:
        kernel, given = arguments.pop()
        given |= {k: Pointer(v) for k, v in given.items() if isinstance(v, torch.Tensor)}
        with mock.patch.object(CompiledKernel, "_init_handles"):
            launch(kernel, **given | {"warmup": True})
    knobs.compilation.listener = None
    print(name, hits)
"""


def test_a_launch_finds_what_was_compiled(tmp_path):
    """Or each candidate would be compiled a second time, by the one process that times."""
    run = uninterpreted(CACHE, TRITON_CACHE_DIR=str(tmp_path))
    assert run.stdout.splitlines() == [
        "linear_geglu [True]",
        "attention_decode [True, True]",
    ], run
