"""Tiles that are measured: what is tried, who wins, what is written, and that kernels take it."""

import os
import re
import subprocess
import sys
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import chain
from pathlib import Path

import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from gemcut import kernels
from gemcut.bench.measure.report_file import load_results
from gemcut.bench.measure.timing import Runs
from gemcut.bench.ops.cases import Grid, Shapes
from gemcut.bench.ops.decode_cases import decode_cases
from gemcut.engine.config.model_config import PUBLISHED
from gemcut.kernels import matmul, tiles
from gemcut.kernels.gpu_arch import SHARED_MEMORY, arch_of
from gemcut.kernels.interpreter import INTERPRETED
from gemcut.kernels.tiles import read_measured
from gemcut.tools import tune
from gemcut.tools.compile_report import Cell
from gemcut.tools.tuning import ranking, search_space, trials
from gemcut.tools.tuning.search_space import Candidate, Subject, find_subjects, looked_up

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HERE = arch_of(DEVICE)
ELSEWHERE = next(name for name in SHARED_MEMORY if name != HERE)
BF16 = torch.bfloat16
LAUNCHED = InterpretedFunction if INTERPRETED else JITFunction
CHECKOUT = Path(__file__).parents[2]
COMPILING = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
# what a GPU's compiler drops before it is timed is seen to fail here
interpreted = pytest.mark.skipif(not INTERPRETED, reason="planted candidates do not compile")

CONSTANTS = {
    "linear_geglu": {"BLOCK_F": 16},
    "skinny_linear": {"BLOCK_N": 32},
    "lm_head": {"BLOCK_V": 32},
    "linear_rope_and_store": {"BLOCK_I": 16},
    "attention_decode": {"SPLIT": 16, "BLOCK_N": 16},
    "attention_prefill": {"BLOCK_M": 16, "BLOCK_N": 16},
}


@pytest.fixture
def small_grid(monkeypatch):
    """Sizes that a small model holds."""
    monkeypatch.setattr(search_space, "DECODE", Grid((1, 3), (40,), (), 1, 8))
    monkeypatch.setattr(search_space, "PREFILL", Grid((), (40,), (20,), 1, 8))


@pytest.fixture
def try_tiles(monkeypatch):
    """Makes these the only candidates of a kernel."""
    monkeypatch.setattr(tiles, "TUNED", {})

    def replace(kernel, *tiles):
        monkeypatch.setitem(search_space.CANDIDATES, kernel, lambda shape: iter(tiles))

    return replace


@pytest.fixture
def launches(monkeypatch):
    """The arguments of every launch, which is made all the same."""
    made = []
    run = LAUNCHED.run

    def noted(self, *args, **kwargs):
        made.append((self.fn.__name__, kwargs))
        return run(self, *args, **kwargs)

    monkeypatch.setattr(LAUNCHED, "run", noted)
    return made


# What kernels take


@pytest.mark.parametrize("kernel", CONSTANTS)
def test_a_kernel_takes_what_was_measured(kernel, folder, launches, small_grid, monkeypatch):
    """And computes the same op with it."""
    subject, *_ = find_subjects([str(folder)], [kernel], HERE, DEVICE, BF16)
    for constants in ({}, CONSTANTS[kernel]):
        monkeypatch.setattr(tiles, "TUNED", {HERE: {subject.key: constants}})
        for case in subject.cases:
            check = trials.Check(case, case.make())
            launches.clear()
            verdict = check.gemcut(trials.builder(subject, case, Candidate(constants), DEVICE))
            assert verdict.passed, (case.name, verdict)
            name, launched = launches[0]
            assert name.startswith(kernel)
            taken = {key: launched[key] for key in CONSTANTS[kernel]}
            assert (taken == CONSTANTS[kernel]) == bool(constants)


def test_a_measured_tile_is_for_its_part_shape_and_dtype(monkeypatch):
    x = torch.zeros(2, 48, dtype=BF16, device=DEVICE)
    weight, other = torch.zeros(32, 48, device=DEVICE), torch.zeros(64, 48, device=DEVICE)
    key = ("skinny_linear", (32, 48))
    rule = matmul._tile(weight, x)
    monkeypatch.setattr(tiles, "TUNED", {HERE: {key: {"BLOCK_N": 8, "SPLITS": 3}}})
    assert matmul._tile(weight, x) == rule | {"BLOCK_N": 8, "SPLITS": 3}
    assert matmul._tile(weight, x.half()) == rule | {"BLOCK_N": 8, "SPLITS": 3}
    assert matmul.count_parts(weight, x) == 3
    assert matmul._tile(other, x)["BLOCK_N"] != 8
    assert matmul._tile(weight, x.float())["BLOCK_N"] != 8
    monkeypatch.setattr(tiles, "TUNED", {ELSEWHERE: {key: {"BLOCK_N": 8}}})
    assert matmul._tile(weight, x) == rule


@pytest.mark.parametrize("model", ["gemma-2b", "gemma-2-9b", "gemma-3-1b"])
def test_no_key_depends_on_rows(model):
    """Nor on the length of a context: keys for 1 row are those for 2, 16, 17 and 100."""
    device, name = (DEVICE, HERE) if INTERPRETED else (torch.device("cuda", 0), "sm_90")

    def asked(batches, contexts):
        shapes = Shapes(model, PUBLISHED[model], device, BF16)
        cases = decode_cases(shapes, Grid(batches, contexts, (), 1, 512))
        return {key for case in cases for key in looked_up(case, name)}

    alone = asked((1,), (1024,))
    assert asked((1, 2, 16, 17, 100), (300, 1024, 8192)) == alone
    assert {kernel for kernel, _ in alone} >= {"skinny_linear", "lm_head", "attention_decode"}


# What is tried


@pytest.mark.parametrize("name", ["gemma-2-2b", "gemma-2-27b", "gemma-3-1b", "gemma-3-270m"])
def test_candidates_are_tiles(name):
    """Powers of two, each once; a split of keys holds whole tiles, or keys would count twice."""
    config = PUBLISHED[name]
    heads = (config.num_q_heads, config.num_kv_heads, config.head_dim)
    shapes = {"attention_decode": heads, "attention_prefill": heads}
    for kernel, candidates in search_space.CANDIDATES.items():
        found = list(candidates(shapes.get(kernel, (1024, 1152))))
        assert 20 < len(found) < 100, (kernel, len(found))
        assert len({Candidate(tile).name for tile in found}) == len(found)
        for tile in found:
            powers = {key: n for key, n in tile.items() if key not in ("num_stages", "maxnreg")}
            assert all(n & (n - 1) == 0 for n in powers.values()), tile
            assert tile.get("SPLIT", 0) % tile.get("BLOCK_N", 1) == 0, tile
            # launchers and kernels that share it take it as a constant
            assert "BLOCK_M" not in tile or kernel == "attention_prefill"


def test_the_tile_in_use_is_tried_first(monkeypatch):
    key = ("skinny_linear", (2304, 9216))
    before = search_space.candidate_tiles(key, "sm_90")
    for in_use in (before[-1], {"BLOCK_N": 64, "num_warps": 1}):
        monkeypatch.setattr(tiles, "TUNED", {"sm_90": {key: in_use}})
        first, *others = search_space.candidate_tiles(key, "sm_90")
        assert first == in_use
        assert others == [tile for tile in before if tile != in_use]


def test_a_subject_has_the_cases_of_every_batch(folder, small_grid):
    subjects = find_subjects([str(folder)] * 2, list(search_space.CANDIDATES), HERE, DEVICE, BF16)
    by_kernel = {}
    for subject in subjects:
        by_kernel.setdefault(subject.key[0], []).append(subject)
    assert list(by_kernel) == list(search_space.CANDIDATES)
    assert len(by_kernel["skinny_linear"]) == 2  # behind attention, and behind the MLP
    (head,) = by_kernel["lm_head"]
    assert {case.op for case in head.cases} == {"lm_head", "lm_head_argmax"}
    for subject in chain.from_iterable(by_kernel.values()):
        batches = {case.facts.get("batch") for case in subject.cases}
        assert batches == ({None} if subject.key[0] == "attention_prefill" else {1, 3})
        assert "no softcap" not in {case.facts.get("variant") for case in subject.cases}


# Who wins


def timed(*ratios):
    return Candidate({"BLOCK_N": 8}, status="ok", ratios=list(ratios))


@pytest.mark.parametrize(
    ("ratios", "wins"),
    [
        pytest.param([0.9] * 12, True, id="faster"),
        pytest.param([0.5] * 11 + [1.01], False, id="slower in one round"),
        pytest.param([0.995] * 12, False, id="by less than a hundredth"),
        pytest.param([1.1] * 12, False, id="slower"),
    ],
)
def test_a_winner_beats_the_rule_beyond_noise(ratios, wins):
    rule, candidate = Candidate({}), timed(*ratios)
    assert trials.choose_winner(rule, [candidate]) is (candidate if wins else rule)


def test_the_fastest_of_those_that_pass_wins():
    rule, fast, faster = Candidate({}), timed(0.9, 0.9, 0.9), timed(0.8, 0.8, 0.9)
    failed, noisy = timed(0.1, 0.1, 0.1), timed(0.1, 0.1, 1.1)
    failed.status = "failed"
    assert trials.choose_winner(rule, [fast, failed, faster, noisy]) is faster
    assert trials.choose_winner(rule, []) is rule


def test_a_ratio_is_the_geometric_mean_over_cases_of_one_round():
    rule = {"batch 1": [10.0, 20.0], "batch 16": [100.0, 100.0]}
    candidate = {"batch 1": [5.0, 20.0], "batch 16": [200.0, 25.0]}
    assert trials.ratios(candidate, rule) == pytest.approx([1.0, 0.5])


@pytest.fixture
def known_speed(monkeypatch, launches):
    """Times by tile instead of measured ones: `speeds[BLOCK_N]` us a call, 10 for others."""
    speeds = {}

    def prepare(calls, device):
        launches.clear()
        calls[0]()
        tile = launches[0][1]
        seconds = 1e-6 * speeds.get(tile.get("BLOCK_N", tile.get("BLOCK_F")), 10.0)
        return Runs(lambda: seconds, lambda: seconds, "loop", 1)

    monkeypatch.setattr(trials, "prepare", prepare)
    monkeypatch.setattr(trials, "choose_input_sets", lambda case, device: 1)
    return speeds


@pytest.fixture
def run(folder, small_grid, tmp_path):
    """Tune the small model into tmp_path; the exit code and the report."""

    def run(*options):
        code = tune.main(["--models", str(folder), "--out", str(tmp_path), *options])
        file = tmp_path / f"tune-{HERE}.json"
        return code, load_results(file) if file.exists() else None

    return run


@interpreted
def test_tuning(run, try_tiles, known_speed, capsys, tmp_path):
    """Of a fast, a slow, a wrong and a failing candidate, the fast one is written.

    The wrong one cuts splits of 16 keys into tiles of 32, so that keys count twice; 24 is no power
    of two.
    """
    known_speed |= {16: 7.0, 64: 8.0}
    fast, slow, wrong, failing = (
        {"SPLIT": 32, "BLOCK_N": 16},
        {"SPLIT": 64, "BLOCK_N": 64},
        {"SPLIT": 16, "BLOCK_N": 32},
        {"SPLIT": 32, "BLOCK_N": 24},
    )
    try_tiles("attention_decode", wrong, fast, failing, slow)
    code, report = run("--kernels", "attention_decode")
    assert code == 0
    assert (report["benchmark"], report["interrupted"]) == ("tune", False)
    assert report["machine"]["versions"]["triton"]
    rule, *rows = report["rows"]
    assert (rule["contestant"], rule["status"], rule["won"]) == ("the rule", "ok", False)
    assert rule["ratio"]["median"] == 1
    by_tile = {tuple(row["tile"].values()): row for row in rows}
    assert {tile: row["status"] for tile, row in by_tile.items()} == {
        (32, 16): "ok",
        (64, 64): "ok",
        (16, 32): "wrong",
        (32, 24): "failed",
    }
    best = by_tile[32, 16]
    assert best["won"]
    assert best["ratio"]["all"] == pytest.approx([0.7] * trials.FINAL_ROUNDS)
    assert len(best["us"]) == 4  # a local and a global layer at two batches
    assert [us["median"] for us in best["us"].values()] == pytest.approx([7.0] * 4)
    assert "is allowed" in by_tile[16, 32]["detail"]
    assert "power of 2" in by_tile[32, 24]["detail"]
    printed = capsys.readouterr().out
    assert "SPLIT=32 BLOCK_N=16 takes 0.700" in printed
    assert "SPLIT=16 BLOCK_N=32 wrong: " in printed
    (written,) = read_measured(tmp_path / f"tiles-{HERE}.json")
    shape = tuple(best["shape"])
    assert written.tiles == {"attention_decode": {shape: fast}}
    assert written.triton == report["machine"]["versions"]["triton"]
    assert "ratio" not in by_tile[16, 32]


@interpreted
def test_the_rule_stays_where_nothing_is_faster(run, try_tiles, known_speed, tmp_path):
    known_speed |= {16: 11.0, 32: 9.95}
    try_tiles("skinny_linear", {"BLOCK_N": 16}, {"BLOCK_N": 32})
    code, report = run("--kernels", "skinny_linear")
    assert code == 0
    assert {row["contestant"] for row in report["rows"] if row["won"]} == {"the rule"}
    (written,) = read_measured(tmp_path / f"tiles-{HERE}.json")
    assert list(written.tiles["skinny_linear"].values()) == [{}, {}]


@interpreted
def test_nothing_is_decided_where_nothing_is_timed(run, try_tiles, known_speed, capsys, tmp_path):
    try_tiles("linear_geglu", {"BLOCK_F": 24})
    code, report = run("--kernels", "linear_geglu")
    assert code == 0
    assert [row["status"] for row in report["rows"]] == ["ok", "failed"]
    assert not any(row["won"] for row in report["rows"])
    assert "linear_geglu 80 x 48: 0 timed; undecided" in capsys.readouterr().out
    assert not (tmp_path / f"tiles-{HERE}.json").exists()


@interpreted
def test_real_times(run, try_tiles, monkeypatch):
    """The timer itself, where a call of many programs takes longer than one of a single program."""
    monkeypatch.setattr(trials, "choose_input_sets", lambda case, device: 2)
    monkeypatch.setattr(trials, "TRIAL_ROUNDS", 2)
    monkeypatch.setattr(trials, "FINAL_ROUNDS", 2)
    try_tiles("linear_geglu", {"BLOCK_F": 8}, {"num_stages": 1})
    code, report = run("--kernels", "linear_geglu")
    assert code == 0
    rule, fine, same = report["rows"]
    assert fine["ratio"]["low"] > 1
    assert not fine["won"]
    assert same["status"] == rule["status"] == "ok"


@interpreted
def test_a_wrong_rule_ends_the_run(run, try_tiles, known_speed, monkeypatch, capsys, tmp_path):
    """Nothing that was timed beside it counts."""

    def doubled(x, weight, bias=None):
        return 2 * matmul.skinny_linear(x, weight, bias)

    try_tiles("skinny_linear", {"BLOCK_N": 16})
    monkeypatch.setattr(kernels, "skinny_linear", doubled)
    code, _ = run("--kernels", "skinny_linear")
    assert code == 1
    assert "tune: the rule is wrong: skinny_linear" in capsys.readouterr().err
    assert not (tmp_path / f"tiles-{HERE}.json").exists()


@interpreted
def test_what_fails_harms_nobody_after_it(run, try_tiles, known_speed, monkeypatch):
    """It counts itself, as kernels that split do, and leaves its count behind."""
    decode = kernels.attention_decode

    def leaving(counters, **arguments):
        if any(tile["BLOCK_N"] == 16 for tile in tiles.TUNED[HERE].values() if tile):
            counters += 1
            raise RuntimeError("an illegal tile")
        return decode(counters=counters, **arguments)

    monkeypatch.setattr(kernels, "attention_decode", leaving)
    try_tiles("attention_decode", {"SPLIT": 16, "BLOCK_N": 16}, {"SPLIT": 32, "BLOCK_N": 32})
    code, report = run("--kernels", "attention_decode")
    assert code == 0
    assert [row["status"] for row in report["rows"]] == ["ok", "failed", "ok"]
    assert "RuntimeError: an illegal tile" in report["rows"][1]["detail"]


@interpreted
@pytest.mark.parametrize(("seconds", "status"), [(13, "untried"), (15, "ok")])
def test_the_time_is_up(seconds, status, run, try_tiles, known_speed, monkeypatch, tmp_path):
    """In the second shape's heat or its final: what was decided is kept, the rest undecided."""
    prepare, prepared = trials.prepare, []

    def slow(calls, device):
        prepared.append(1)
        return prepare(calls, device)

    monkeypatch.setattr(trials, "prepare", slow)
    for module in (tune, trials):
        monkeypatch.setattr(module, "clock", lambda: float(len(prepared)))  # a second for each
    known_speed[16] = 5.0
    try_tiles("skinny_linear", {"BLOCK_N": 16}, {"BLOCK_N": 32})
    # a heat of 6 and a final of 4 seconds for each of two shapes
    code, report = run("--kernels", "skinny_linear", "--minutes", str(seconds / 60))
    assert code == 0
    first, second = (
        [row for row in report["rows"] if row["case"] == case]
        for case in dict.fromkeys(row["case"] for row in report["rows"])
    )
    assert [row["won"] for row in first] == [False, True, False]
    assert not any(row["won"] for row in second)
    assert [row["status"] for row in second] == [status] * 3
    assert [row["detail"] for row in second[1:]] == [trials.NO_TIME * (status != "ok")] * 2
    (written,) = read_measured(tmp_path / f"tiles-{HERE}.json")
    assert written.tiles == {"skinny_linear": {tuple(first[0]["shape"]): {"BLOCK_N": 16}}}
    assert len(prepared) <= seconds + 1


@interpreted
def test_a_share_of_the_time_ends_with_fewer_heats(folder, small_grid, known_speed, monkeypatch):
    """Later shapes have theirs: a search that would take longer is cut, and decided as it is."""
    ticks = iter(range(10**6))
    monkeypatch.setattr(trials, "clock", lambda: next(ticks))
    subject, _ = find_subjects([str(folder)], ["skinny_linear"], HERE, DEVICE, BF16)
    subject.candidates = [Candidate({"BLOCK_N": 32, "num_stages": n}) for n in range(1, 40)]
    trials.tune(subject, DEVICE, share_ends=50, ends=10**6)
    assert [c.status for c in subject.candidates[:6]] == ["ok"] * 6
    assert subject.candidates[-1].detail == trials.NO_TIME
    assert subject.winner is subject.rule


@interpreted
def test_an_interrupted_run_keeps_what_it_decided(
    run, try_tiles, known_speed, monkeypatch, tmp_path
):
    known_speed[16] = 5.0
    try_tiles("skinny_linear", {"BLOCK_N": 16})
    find, calls = trials.tune, iter("12")

    def interrupt(*arguments):
        if next(calls) == "2":
            raise KeyboardInterrupt
        return find(*arguments)

    monkeypatch.setattr(tune, "tune", interrupt)
    code, report = run("--kernels", "skinny_linear")
    assert code == 130
    assert report["interrupted"]
    assert [row["won"] for row in report["rows"]] == [False, True, False, False]
    (written,) = read_measured(tmp_path / f"tiles-{HERE}.json")
    assert len(written.tiles["skinny_linear"]) == 1


@interpreted
def test_too_little_memory_is_told(run, try_tiles, monkeypatch):
    def choose_input_sets(case, device):
        raise MemoryError("needs 8.00 GB on cpu, 7.00 GB more than are free")

    monkeypatch.setattr(trials, "choose_input_sets", choose_input_sets)
    try_tiles("lm_head", {"BLOCK_V": 16})
    code, report = run("--kernels", "lm_head")
    assert code == 0
    assert report["rows"][1]["status"] == "no memory"
    assert "7.00 GB more" in report["rows"][1]["detail"]
    assert not any(row["won"] for row in report["rows"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(try_tiles, tmp_path):
    """Candidates compiled in other processes, captured and timed; one of them exceeds the arch."""
    tile = {"BLOCK_N": 16, "BLOCK_D": 128, "num_warps": 4, "num_stages": 4}
    try_tiles("skinny_linear", tile, tile | {"BLOCK_D": 512, "num_stages": 16})
    options = ["--models", "gemma-3-1b", "--kernels", "skinny_linear", "--out", str(tmp_path)]
    assert tune.main(options) == 0
    rows = load_results(tmp_path / f"tune-{HERE}.json")["rows"]
    assert [row["status"] for row in rows] == ["ok", "ok", "dropped"] * 2
    assert all(us["median"] < 1000 for row in rows[:2] for us in row["us"].values())
    (written,) = read_measured(tmp_path / f"tiles-{HERE}.json")
    assert len(written.tiles["skinny_linear"]) == 2


# Compiling, where there is no GPU


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
    """The tile in use before all others; what is gone, behind."""
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
FINE = {"BLOCK_F": 32, "BLOCK_D": 256, "num_warps": 4, "num_stages": 4}
CANDIDATES = [
    FINE,
    {"BLOCK_F": 32, "BLOCK_D": 128, "num_warps": 4, "num_stages": 4},
    {**FINE, "num_stages": 24},
    {**FINE, "maxnreg": 64},
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
    assert rows[32, 256, 4, 4] == ("compiled", "")
    assert rows[32, 128, 4, 4] == ("same as the rule", "")
    assert re.fullmatch(r"\d{6} bytes of shared memory > 232448", rows[32, 256, 4, 24][1])
    assert re.fullmatch(r"spills \d+ bytes of registers", rows[32, 256, 4, 4, 64][1])
    assert "linear_geglu 6912 x 1152: 1 of 4 candidates are left" in run.stdout
    predicted = re.findall(r"([\d.]+) us predicted, ([\d.]+) of the rule's", run.stdout)
    assert [ratio == "1.00" for _, ratio in predicted] == [True, False]
    assert all(1 < float(us) < 50 for us, _ in predicted)
    assert re.search(r"BLOCK_F=32 BLOCK_D=256 num_warps=4 num_stages=4 +\d+ registers", run.stdout)
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
    (found,) = launches
    assert compile_launch(found, [], fresh=False).error is None
    hits = []
    knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
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
    assert run.stdout.splitlines() == ["linear_geglu [True]", "attention_decode [True]"], run


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--kernels", "softmax", "--out", "."], "invalid choice: 'softmax'"),
        (["--arch", "sm_70", "--out", "."], "invalid choice: 'sm_70'"),
        (["--minutes", "soon", "--out", "."], "invalid float value: 'soon'"),
        ([], "--out FOLDER is needed"),
    ],
)
def test_wrong_usage(options, message, capsys):
    with pytest.raises(SystemExit) as exit:
        tune.main(options)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--models", "gemma-4"], "gemma-4"),
        (["--models", "gemma-3-1b", "--kernels", "linear_rope_and_store"], "launch none of linear"),
        (["--minutes", "0"], "--minutes 0.0 --jobs"),
        (["--minutes", "nan"], "--minutes nan --jobs"),
        (["--jobs", "0"], "--jobs 0: must be above 0"),
        (["--arch", ELSEWHERE], f"--arch {ELSEWHERE}: the GPU here is"),
        (["--part", ELSEWHERE], f"--arch {ELSEWHERE}: the GPU here is"),  # its older name
        (["--merge", "no-such-file"], "no-such-file holds no list of measured tiles: No such file"),
        (["--merge", __file__], "holds no list of measured tiles: Extra data"),
    ],
)
def test_bad_input(options, message, capsys, tmp_path):
    assert tune.main(["--out", str(tmp_path), *options]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("tune: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1


@interpreted
def test_an_interpreter_measures_nothing_for_a_gpu(capsys, tmp_path, monkeypatch):
    assert tune.main(["--out", str(tmp_path), "--write"]) == 1
    assert "--write: the interpreter's times say nothing" in capsys.readouterr().err
    with pytest.raises(SystemExit) as exit:
        tune.main(["--compile-only", "--arch", "sm_90"])
    assert exit.value.code == 2
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "no GPU is here to time on; --compile-only --arch sm_90 compiles"),
        (["--compile-only"], "no GPU is here: --compile-only needs an --arch to compile for"),
    ],
)
def test_without_a_gpu_nothing_is_timed(options, message, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(tune, "INTERPRETED", False)
    assert tune.main(["--out", str(tmp_path), *options]) == 1
    assert capsys.readouterr().err == f"tune: {message}\n"
