"""Tuning: which tile wins, what is written, and what is refused."""

import pytest
import torch

from gemcut import kernels
from gemcut.bench.measure.report_file import load_results
from gemcut.bench.measure.timing import Runs
from gemcut.kernels import matmul, tiles
from gemcut.kernels.gpu_arch import SHARED_MEMORY, arch_of
from gemcut.kernels.interpreter import INTERPRETED
from gemcut.kernels.tiles import read_measured
from gemcut.tools import tune
from gemcut.tools.tuning import trials
from gemcut.tools.tuning.search_space import Candidate, find_subjects

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HERE = arch_of(DEVICE)
ELSEWHERE = next(name for name in SHARED_MEMORY if name != HERE)
BF16 = torch.bfloat16
# what a GPU's compiler drops before it is timed is seen to fail here
interpreted = pytest.mark.skipif(not INTERPRETED, reason="planted candidates do not compile")

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
    decode = kernels.attention_decode

    def failing(**arguments):
        if any(tile["BLOCK_N"] == 16 for tile in tiles.TUNED[HERE].values() if tile):
            raise RuntimeError("an illegal tile")
        return decode(**arguments)

    monkeypatch.setattr(kernels, "attention_decode", failing)
    try_tiles("attention_decode", {"SPLIT": 16, "BLOCK_N": 16}, {"SPLIT": 32, "BLOCK_N": 32})
    code, report = run("--kernels", "attention_decode")
    assert code == 0
    assert [row["status"] for row in report["rows"]] == ["ok", "failed", "ok"]
    assert "RuntimeError: an illegal tile" in report["rows"][1]["detail"]


@interpreted
@pytest.mark.parametrize(("seconds", "status"), [(13, "untried"), (15, "ok")])
def test_the_time_is_up(seconds, status, run, try_tiles, known_speed, monkeypatch, tmp_path):
    """In the second shape's trial or its final: what was decided is kept, the rest undecided."""
    prepare, prepared = trials.prepare, []

    def slow(calls, device):
        prepared.append(1)
        return prepare(calls, device)

    monkeypatch.setattr(trials, "prepare", slow)
    for module in (tune, trials):
        monkeypatch.setattr(module, "clock", lambda: float(len(prepared)))  # a second for each
    known_speed[16] = 5.0
    try_tiles("skinny_linear", {"BLOCK_N": 16}, {"BLOCK_N": 32})
    # a trial of 6 and a final of 4 seconds for each of two shapes
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
