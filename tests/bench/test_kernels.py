"""gemcut-bench kernels: it checks all, times none that is wrong, and survives failures."""

import argparse
import json
import re
from functools import partial
from pathlib import Path

import pytest
import torch

from gemcut.bench.measure.report_file import load_results
from gemcut.bench.ops import kernels, torch_peers
from gemcut.bench.ops.torch_peers import OpPeer
from gemcut.kernels import reference

CEILINGS = {"read_gbps": 20.0, "copy_gbps": 20.0, "matmul_tflops": 0.1}


@pytest.fixture(autouse=True)
def _known_ceilings(monkeypatch):
    """Measuring them takes a second; test_timing.py does."""
    monkeypatch.setattr(kernels, "measure_ceilings", lambda device, dtype: dict(CEILINGS))


def parse(*options):
    parser = argparse.ArgumentParser()
    kernels.add_arguments(parser)
    for name in ("--device", "--dtype"):
        parser.add_argument(name, default="auto")
    parser.add_argument("--json", type=Path)
    return parser.parse_args([*options, "--rounds", "2"])


def run(*options):
    return kernels.run(parse("--batch", "2", "--context", "70", "--tokens", "40", *options))


def report(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.fixture
def plant(monkeypatch):
    """Add a contestant to every case, built by a function of the op's arguments."""

    def add(build, **settings):
        monkeypatch.setattr(
            kernels,
            "torch_peers",
            lambda case, device: {"planted": OpPeer("torch", "planted", build, **settings)},
        )
        monkeypatch.setitem(kernels.PEERS, "planted", "torch")

    return add


def test_every_op_is_checked_and_timed(capsys, tmp_path):
    file = tmp_path / "kernels.json"
    assert run("--peer", "torch", "blas", "sdpa", "rms_norm", "--json", str(file)) == 0
    printed = report(capsys)
    assert load_results(file) == printed
    assert not printed["interrupted"]
    assert printed["ceilings"] == CEILINGS
    records = printed["rows"]
    assert {record["op"] for record in records} == set(kernels.OPS)
    # parts of the oracle of sample; advance_ moves some bytes a row
    parts = {"best_of_ranges", "filter_logits", "gumbel_noise", "advance_"}
    assert set(kernels.OPS) == set(reference.__all__) - parts
    for record in records:
        assert record["status"] == "ok", record
        assert record["error"] <= record["budget"]
        assert record["version"]
        for metric in ("cold_us", "warm_us"):
            spread = record[metric]
            assert len(spread["all"]) == 2
            assert 0 < spread["low"] <= spread["median"] <= spread["high"]
        us = record["cold_us"]["median"]
        assert record["share"] == pytest.approx(record["floor_us"] / us)
        moved = record["read_bytes"] + record["written_bytes"]
        assert record["gbps"] == pytest.approx(moved / us / 1e3)
        assert record["tflops"] == pytest.approx(record["flops"] / us / 1e6)
    by_case = {}
    for record in records:
        by_case.setdefault(record["case"], []).append(record["contestant"])
    assert all(names[0] == "gemcut" and len(names) > 1 for names in by_case.values())


@pytest.mark.parametrize(("op", "peer"), [("geglu", "torch.compile"), ("attention_decode", "flex")])
def test_a_compiled_peer_computes_the_same(op, peer):
    """One case each: a compiler takes seconds."""
    options = parse("--op", op, "--context", "70", "--tokens", "40", "--peer", peer)
    cpu = torch.device("cpu")
    case = kernels.choose_cases(options, cpu, torch.float32)[0]
    bench = kernels.Bench(cpu, torch.float32, reference, (peer,), 2, CEILINGS)
    records = kernels.measure_case(case, bench, kernels.contestants(case, bench))
    assert [record["contestant"] for record in records] == ["gemcut", peer]
    assert [(record["status"], record["detail"]) for record in records] == [("ok", "")] * 2


def test_a_wrong_peer_is_reported_and_not_timed(capsys, plant):
    """It multiplies by w instead of 1 + w."""
    plant(lambda a: partial(reference.rmsnorm, **{**a, "weight": a["weight"] - 1}))
    assert run("--op", "rmsnorm", "--peer", "planted") == 0
    records = [record for record in report(capsys)["rows"] if record["contestant"] == "planted"]
    assert records
    for record in records:
        assert record["status"] == "wrong"
        assert record["error"] > record["budget"]
        assert "cold_us" not in record


@pytest.mark.parametrize("value", [torch.nan, 0.0], ids=["nan", "zeros"])
def test_unwritten_outputs_are_wrong(capsys, plant, value):
    plant(lambda a: lambda: torch.full_like(a["x"], value))
    run("--op", "rmsnorm", "--peer", "planted")
    assert {r["status"] for r in report(capsys)["rows"] if r["contestant"] == "planted"} == {
        "wrong"
    }


def test_a_cache_that_is_not_written_is_wrong(capsys, plant):
    """The queries are right, but the keys go nowhere."""
    plant(
        lambda a: partial(
            torch_peers.rope_and_store_,
            **{**a, "k_cache": a["k_cache"].clone(), "v_cache": a["v_cache"].clone()},
        )
    )
    run("--op", "rope_and_store_", "--peer", "planted")
    assert report(capsys)["rows"][1]["status"] == "wrong"


def least_likely(a):
    return a["logits"].argmin(-1)


def another_token(a):
    value, index = torch_peers.lm_head_argmax(**a)
    return value, index ^ 1


@pytest.mark.parametrize(
    ("op", "choose"), [("sample", least_likely), ("lm_head_argmax", another_token)]
)
def test_a_wrong_choice_of_token_is_wrong(capsys, plant, op, choose):
    plant(lambda a: partial(choose, a))
    run("--op", op, "--peer", "planted")
    assert {r["status"] for r in report(capsys)["rows"] if r["contestant"] == "planted"} == {
        "wrong"
    }


def test_a_peer_that_cannot_be_imported_is_told(capsys, plant):
    def build(arguments):
        raise ImportError("libcuda.so.1: cannot open shared object file\nsecond line")

    plant(build)
    assert run("--op", "geglu", "--peer", "planted") == 0
    own, planted, *_ = report(capsys)["rows"]
    assert own["status"] == "ok"
    assert planted["status"] == "failed"
    assert planted["detail"] == "ImportError: libcuda.so.1: cannot open shared object file"


def test_gemcut_s_own_error_fails_the_command(capsys, monkeypatch):
    def without_one(x, weight, eps):
        return reference.rmsnorm(x, weight - 1, eps)

    ops = argparse.Namespace(rmsnorm=without_one)
    monkeypatch.setattr(kernels, "choose_ops", lambda name, device: ops)
    assert run("--op", "rmsnorm", "--peer", "torch") == 1
    own, peer, *_ = report(capsys)["rows"]
    assert own["status"] == "wrong"
    assert peer["status"] == "ok"


def test_too_little_memory_says_how_much_is_missing(capsys, monkeypatch):
    sizes = iter([1000])
    monkeypatch.setattr(kernels, "free_bytes", lambda device: next(sizes, 10**12))
    assert run("--op", "rmsnorm", "--peer", "torch") == 0
    first, second, *others = report(capsys)["rows"]
    for record in (first, second):
        assert record["status"] == "no memory"
        assert "GB more than are free" in record["detail"]
        assert "cold_us" not in record
    assert {record["status"] for record in others} == {"ok"}


def test_an_interrupted_run_keeps_its_rows(capsys, monkeypatch, tmp_path):
    file = tmp_path / "kernels.json"
    measure, calls = kernels.measure_case, iter("123")

    def interrupt(*arguments):
        if next(calls) == "3":
            raise KeyboardInterrupt
        return measure(*arguments)

    monkeypatch.setattr(kernels, "measure_case", interrupt)
    assert run("--peer", "torch", "--json", str(file)) == 130
    printed = report(capsys)
    assert printed["interrupted"]
    assert len(printed["rows"]) == 4
    assert load_results(file) == printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--models", "gemma-4"], "gemma-4"),
        (["--op", "softmax"], "op 'softmax' is unknown; there are add_rmsnorm_, att"),
        (["--peer", "cudnn"], "peer 'cudnn' is unknown; there are torch"),
        (["--device", "tpu"], "device 'tpu'"),
        (["--batch", "0"], "batch 0 is outside 1.."),
        (["--op", "attention_decode", "--context", "1000000"], "no case is left"),
        (["--json", "no-such-folder/k.json"], "no such folder"),
    ],
)
def test_bad_input_is_a_clear_error(options, message):
    with pytest.raises(ValueError, match=rf"^[^\n]*{re.escape(message)}[^\n]*$"):
        kernels.run(parse(*options))


def test_a_package_that_is_not_installed_is_no_peer(monkeypatch, capsys):
    monkeypatch.setitem(kernels.PEERS, "liger", "no-such-package")
    assert "liger" not in kernels.choose_peers(None)
    assert "no-such-package" in capsys.readouterr().out
    with pytest.raises(ValueError, match="needs the package no-such-package"):
        kernels.choose_peers(["liger"])
