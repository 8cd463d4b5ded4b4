"""gemcut-bench compare finds a planted change under drift and noise, and is quiet on a repeat."""

import itertools
import json
import math

import numpy as np
import pytest
from synthetic_reports import CPU, record, report

from gemcut.bench.report.compare import (
    ALPHA,
    compare_reports,
    interval_rank,
    mann_whitney_counts,
    print_comparison,
    run_compare,
)

PEERS = ("torch", "liger")


def noisy(seed, *, cases=30, rounds=10, gain=1.0, peers=PEERS, case_of_gain="case 3", unit="us"):
    """A report under noise; `gain` is how many times as fast gemcut is in one case."""
    rng = np.random.default_rng(seed)
    file_drift = rng.lognormal(0, 0.20)
    records = []
    for i in range(cases):
        round_drift = rng.lognormal(0, 0.30, rounds)
        for j, contestant in enumerate(("gemcut", *peers)):
            slow = (10 + i) * (1 + j) * file_drift * round_drift * rng.lognormal(0, 0.05, rounds)
            if contestant == "gemcut" and f"case {i}" == case_of_gain:
                slow = slow / gain
            values = slow if unit == "us" else 1e6 / slow
            name = {"us": "cold_us", "rate": "tokens_per_second"}[unit]
            records.append(record(f"case {i}", contestant, **{name: values.tolist()}))
    return report("kernels", records)


def changed(comparison):
    return {(c.case, c.verdict) for c in comparison.own if c.verdict in ("slower", "faster")}


@pytest.mark.parametrize("unit", ["us", "rate"])
@pytest.mark.parametrize(
    ("gain", "verdict"), [(1 / 1.2, "slower"), (1.2, "faster")], ids=["slower", "faster"]
)
def test_a_planted_change_of_20_percent_is_found(gain, verdict, unit):
    found, others, estimates = 0, 0, []
    for seed in range(100):
        b = noisy(1000 + seed, cases=5, gain=gain, unit=unit)
        comparison = compare_reports(noisy(seed, cases=5, unit=unit), b, 0.05)
        found += ("case 3", verdict) in changed(comparison)
        others += len(changed(comparison) - {("case 3", verdict)})
        assert comparison.failed == any(name == "slower" for _, name in changed(comparison))
        estimates += [c.estimate for c in comparison.own if c.case == "case 3"]
    assert found >= 98
    assert others <= 9  # 400 chances of 1 %
    assert np.exp(np.mean(np.log(estimates))) == pytest.approx(gain, rel=0.01)


def test_a_planted_regression_is_found_among_many_rows():
    for seed in range(10):
        comparison = compare_reports(noisy(seed), noisy(1000 + seed, gain=0.8), 0.05)
        assert ("case 3", "slower") in changed(comparison)
        assert comparison.failed


def test_a_repeat_is_quiet():
    """200 repeats of 30 records: a false alarm in no more of them than is claimed."""
    alarms = []
    for seed in range(200):
        comparison = compare_reports(noisy(seed), noisy(1000 + seed), 0.05)
        alarms.append(bool(changed(comparison)))
        assert comparison.false_alarm <= 0.05
    # of 200 chances of 5 % each, more than 17 come in 1 % of seeds
    assert sum(alarms) <= 17


def test_each_interval_holds_the_truth_as_often_as_it_says():
    held = total = 0
    for seed in range(40):
        comparison = compare_reports(noisy(seed, cases=60), noisy(1000 + seed, cases=60), 0.0)
        for change in comparison.own:
            assert change.interval is not None
            low, high = change.interval
            held, total = held + (low <= 1 <= high), total + 1
            assert low <= change.estimate <= high
    assert held / total >= 1 - ALPHA


def test_drift_of_a_file_is_no_change():
    a = noisy(0, cases=5)
    b = report("kernels", [dict(one) for one in a["rows"]])
    for one in b["rows"]:
        one["cold_us"] = {**one["cold_us"], "all": [1.5 * x for x in one["cold_us"]["all"]]}
    comparison = compare_reports(a, b, 0.05)
    assert changed(comparison) == set()
    assert {change.peers for change in comparison.own} == {PEERS}
    assert [c.estimate for c in comparison.own] == pytest.approx([1.0] * 5)


@pytest.mark.parametrize(
    ("drift", "verdict"),
    [(2.5, "slower"), (1 / 2.5, "slower"), (3.5, "machine changed"), (1 / 3.5, "machine changed")],
)
def test_a_machine_that_is_another_gives_no_verdict(drift, verdict):
    def records(factor, own):
        times = {"gemcut": own, "torch": 20.0}
        return [record("x", name, cold_us=[us * factor] * 5) for name, us in times.items()]

    a, b = report("kernels", records(1.0, 10.0)), report("kernels", records(drift, 15.0))
    comparison = compare_reports(a, b, 0.05)
    assert comparison.own[0].estimate == pytest.approx(10 / 15)
    assert comparison.own[0].verdict == verdict
    assert comparison.failed == (verdict == "slower")


def test_without_a_common_peer_raw_times_are_compared(capsys):
    a = report("kernels", [record("x", cold_us=[10.0, 10.1, 10.2, 10.3, 10.4])])
    b = report("kernels", [record("x", cold_us=[20.0, 20.1, 20.2, 20.3, 20.4])])
    comparison = compare_reports(a, b, 0.05)
    (change,) = comparison.changes
    assert change.peers == ()
    assert change.estimate == pytest.approx(10.2 / 20.2, rel=1e-3)
    assert change.interval == (pytest.approx(10.0 / 20.4), pytest.approx(10.4 / 20.0))
    assert change.verdict == "slower"
    print_comparison(comparison, "a", "b")
    assert "1 of them beside nobody" in capsys.readouterr().out


def test_a_row_is_taken_beside_the_geometric_mean_of_its_peers():
    def records(own, torch, liger):
        times = {"gemcut": own, "torch": torch, "liger": liger}
        return [record("x", name, cold_us=[us] * 5) for name, us in times.items()]

    a, b = (
        report("kernels", records(10.0, 20.0, 30.0)),
        report("kernels", records(10.0, 20.0, 120.0)),
    )
    gemcut, torch, liger = compare_reports(a, b, 0.05).changes
    assert gemcut.estimate == pytest.approx(2)  # the peers' mean took twice as long
    # neither is beside gemcut, nor beside itself
    assert (torch.peers, torch.estimate) == (("liger",), pytest.approx(4))
    assert (liger.peers, liger.estimate) == (("torch",), pytest.approx(1 / 4))


@pytest.mark.parametrize("fact", ["version", "settings"])
def test_a_peer_that_is_another_now_is_no_peer(fact):
    a, b = noisy(0, cases=1), noisy(1, cases=1)
    b["rows"][1][fact] = "2"
    (change, *_) = compare_reports(a, b, 0.05).changes
    assert change.peers == ("liger",)


def test_bytes_are_not_taken_beside_peers():
    def records(own):
        return [
            record("x", cache_bytes=[own] * 5, cold_us=[1.0] * 5),
            record("x", "torch", cache_bytes=[3 * own] * 5, cold_us=[2.0] * 5),
        ]

    comparison = compare_reports(
        report("decode", records(100)), report("decode", records(200)), 0.05
    )
    assert [(c.metric, c.verdict) for c in comparison.own] == [
        ("cache_bytes", "slower"),
        ("cold_us", "same"),
    ]


def test_a_change_within_the_threshold_is_none():
    a = report("kernels", [record("x", cold_us=[10.0 + i / 1000 for i in range(9)])])
    b = report("kernels", [record("x", cold_us=[10.4 + i / 1000 for i in range(9)])])
    (change,) = compare_reports(a, b, 0.05).changes
    assert change.interval is not None
    assert change.interval[1] < 1
    assert change.verdict == "same"
    assert compare_reports(a, b, 0.01).changes[0].verdict == "slower"


def test_too_few_rounds_are_told(capsys):
    a = report("kernels", [record("x", cold_us=[10.0, 10.1, 10.2, 10.3])])
    b = report("kernels", [record("x", cold_us=[20.0, 20.1, 20.2, 20.3])])
    comparison = compare_reports(a, b, 0.05)
    assert comparison.changes[0].verdict == "too few rounds"
    assert comparison.changes[0].interval is None
    assert not comparison.failed
    print_comparison(comparison, "a", "b")
    assert "0.504" in capsys.readouterr().out


def test_a_peers_own_change_is_printed_and_fails_nothing(capsys):
    a = report("kernels", [record("x", "torch", cold_us=[10.0 + i / 100 for i in range(5)])])
    b = report("kernels", [record("x", "torch", cold_us=[20.0 + i / 100 for i in range(5)])])
    comparison = compare_reports(a, b, 0.05)
    assert comparison.changes[0].verdict == "slower"
    assert not comparison.failed
    print_comparison(comparison, "a", "b")
    assert "torch" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("contestant", "before", "after", "failed"),
    [
        ("gemcut", "ok", "wrong", True),
        ("gemcut", "ok", "no memory", True),
        ("gemcut", "failed", "ok", False),
        ("gemcut", "failed", "wrong", False),
        ("torch", "ok", "failed", False),
    ],
)
def test_a_change_of_status_is_told(contestant, before, after, failed, capsys):
    a = report("kernels", [record("x", contestant, before, cold_us=[1.0] * 5)])
    b = report("kernels", [record("x", contestant, after, "error 0.5", cold_us=[1.0] * 5)])
    comparison = compare_reports(a, b, 0.05)
    assert comparison.failed == failed
    assert comparison.changes == []
    print_comparison(comparison, "a", "b")
    assert f"{contestant} in x: {before} -> {after} (error 0.5)" in capsys.readouterr().out


def test_rows_of_one_file_are_told(capsys):
    a = report("kernels", [record("x", cold_us=[1.0] * 5), record("y", cold_us=[1.0] * 5)])
    b = report("kernels", [record("x", cold_us=[1.0] * 5), record("x", "torch", cold_us=[1.0] * 5)])
    comparison = compare_reports(a, b, 0.05)
    assert not comparison.failed
    print_comparison(comparison, "a", "b")
    out = capsys.readouterr().out
    assert "gemcut in y: only in A" in out
    assert "torch in x: only in B" in out


def test_what_else_differs_is_noted():
    a = report(
        "kernels", [record("x", cold_us=[1.0] * 5, dtype="float32")], models=["demo"], json="a"
    )
    b = report(
        "kernels",
        [record("x", cold_us=[1.0] * 5, dtype="bfloat16")],
        CPU,
        True,
        models=[],
        json="b",
    )
    b["machine"] = {**CPU, "versions": {"torch": "2.14"}}
    notes = compare_reports(a, b, 0.05).notes
    assert notes[0].startswith("the devices differ")
    for note in (
        "device: NVIDIA Test | cpu",
        "torch: 2.13 | 2.14",
        "python: 3.12 | None",
        "dtype: float32 | bfloat16",
        "argument models: ['demo'] | []",
        "the second run was interrupted",
    ):
        assert note in notes
    assert not any("json" in note for note in notes)
    assert compare_reports(a, a, 0.05).notes == []


@pytest.mark.parametrize(("n", "m"), [(1, 1), (2, 3), (4, 4), (5, 2)])
def test_counts_of_u_are_those_of_all_orders(n, m):
    counts = [0] * (n * m + 1)
    for places in itertools.combinations(range(n + m), n):
        counts[sum(place - i for i, place in enumerate(places))] += 1
    assert mann_whitney_counts(n, m) == counts
    assert sum(counts) == math.comb(n + m, n)


def test_ranks_are_those_of_the_tables():
    # two-sided 1 % critical values of U: 2 for 6 and 6, 4 for 7 and 7, 16 for 10 and 10
    assert [interval_rank(n, n, 0.01)[0] - 1 for n in (6, 7, 10)] == [2, 4, 16]
    assert interval_rank(4, 4, 0.01)[0] == 0
    # 5 rounds reach 1 % and not 0.1 %: the widest interval stands in, with what it reaches
    assert interval_rank(5, 5, 0.001) == (1, pytest.approx(2 / 252))
    exact, _ = interval_rank(50, 50, 0.01)
    normal, _ = interval_rank(51, 50, 0.01)
    assert exact < normal < exact + 30


def test_the_command_fails_on_a_regression(tmp_path, capsys):
    files = []
    for name, gain in (("a", 1.0), ("b", 0.7)):
        files.append(tmp_path / f"{name}.json")
        content = noisy(0 if name == "a" else 1, cases=4, gain=gain)
        files[-1].write_text(json.dumps(content))
    assert run_compare(*files, threshold=0.05) == 1
    out = capsys.readouterr().out
    assert "how many times as fast B is as A" in out
    assert "gemcut: 1 slower, 0 faster, 3 same, 0 too few rounds, 0 machine changed" in out
    assert run_compare(files[0], files[0], threshold=0.05) == 0


def with_records(*records):
    return json.dumps(report("kernels", records))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no report"),
        ("{", "is no JSON"),
        ("[1, 2]", "no report"),
        ('{"schema": 1}', "lacks benchmark"),
        (with_records(5), "row 0 lacks one of case"),
        (with_records({"case": "x"}), "row 0 lacks one of case"),
        (with_records(record("x"), record("x")), "gemcut in x has two rows"),
        (with_records({**record("x"), "cold_us": {"all": []}}), "cold_us of row 0 is no metric"),
        (with_records({**record("x"), "cold_us": {"all": ["1"]}}), "cold_us of row 0 is no metric"),
        (json.dumps({**report("kernels", []), "rows": {}}), "rows is no list"),
        (json.dumps({**report("kernels", []), "machine": {}}), "does not name its device"),
    ],
)
def test_a_file_that_is_no_report_is_refused(text, message, tmp_path):
    bad, good = tmp_path / "bad.json", tmp_path / "good.json"
    bad.write_text(text)
    good.write_text(json.dumps(noisy(0, cases=1)))
    for files in ((bad, good), (good, bad)):
        with pytest.raises(ValueError, match=message) as error:
            run_compare(*files)
        assert "bad.json" in str(error.value)
    with pytest.raises(ValueError, match="No such file"):
        run_compare(good, tmp_path / "absent.json")


def test_reports_of_other_kinds_and_thresholds_out_of_range_are_refused():
    with pytest.raises(ValueError, match="'kernels', the other of 'decode'"):
        compare_reports(report("kernels", []), report("decode", []), 0.05)
    for threshold in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match=r"threshold .* is outside"):
            compare_reports(report("kernels", []), report("kernels", []), threshold)
