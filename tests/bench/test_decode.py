"""gemcut-bench decode: what it prints and keeps; it times no contestant that is wrong."""

import json
import statistics
from dataclasses import replace

import pytest
import torch
from engines import replay
from planted_engines import CEILINGS, SIZES, TINY, demo_setup, one_token_off, plant, skip_ceilings

from gemcut.bench import cli
from gemcut.bench.engines.case_runner import Contestant, like, make_prompts, run_case
from gemcut.bench.engines.decode import make_records, mean_context
from gemcut.bench.engines.peers import (
    CONTESTANTS,
    EnginePeer,
    Gemcut,
    Stage,
    Transformers,
    Workload,
)
from gemcut.bench.engines.setup import Setup
from gemcut.bench.engines.token_check import TokenCheck
from gemcut.engine import Engine
from gemcut.engine.config.model_config import PUBLISHED
from gemcut.engine.execution.cache import PREFILL_CHUNK, slot_bytes
from gemcut.engine.execution.model import Gemma
from gemcut.kernels import reference

METRICS = ("tokens_per_second", "first_token_ms", "between_tokens_ms")


@pytest.fixture(autouse=True)
def ceilings(monkeypatch):
    skip_ceilings(monkeypatch)


@pytest.fixture(scope="module")
def setup():
    return demo_setup()


def decode(*arguments, capsys):
    """Exit code, the printed lines but the last, and the report in it."""
    code = cli.main(["decode", *arguments])
    lines = capsys.readouterr().out.splitlines()
    return code, "\n".join(lines[:-1]), json.loads(lines[-1])


def test_command_prints_a_table_and_one_json_object(capsys, tmp_path):
    file = tmp_path / "decode.json"
    code, text, report = decode(*SIZES, "--repeats", "3", "--json", str(file), capsys=capsys)
    assert code == 0
    assert json.loads(file.read_text()) == report
    assert (report["benchmark"], report["interrupted"]) == ("decode", False)
    assert report["ceilings"] == CEILINGS
    assert {"device", "cpu", "threads", "versions", "commit"} <= report["machine"].keys()
    assert report["arguments"]["model"] == "demo"
    assert report["arguments"]["layers"] is None
    assert report["after_warmup"] == {"compilations": 0, "captures": 0}

    names = ["gemcut", "transformers", "transformers-static"]
    assert [record["contestant"] for record in report["rows"]] == names
    own, *others = report["rows"]
    for record in report["rows"]:
        assert record["status"] == "ok"
        assert f"{record['contestant']} {record['version']}: {record['settings']}" in text
        assert record["case"] == "demo/batch=2/context=5"
        facts = ("model", "dtype", "batch", "context", "prompt_tokens", "new_tokens")
        assert [record[fact] for fact in facts] == ["demo", "float32", 2, 5, 5, 4]
        assert record["quantization"] is record["memory_bytes"] is None
        for name in METRICS:
            assert len(record[name]["all"]) == 3
            assert 0 < record[name]["low"] <= record[name]["median"] <= record[name]["high"]
        pairs = zip(
            record["tokens_per_second"]["all"], record["between_tokens_ms"]["all"], strict=True
        )
        assert all(rate * ms == pytest.approx(2 * 1e3) for rate, ms in pairs)
        bytes_per_second = record["step_bytes"] * record["tokens_per_second"]["median"] / 2
        assert record["read_share"] == pytest.approx(bytes_per_second / 1e10)
        kinds = dict(record["account"])
        assert kinds.pop("context") == 7.0
        assert sum(kinds.values()) == record["step_bytes"]
    for record in others:
        rates = zip(
            own["tokens_per_second"]["all"], record["tokens_per_second"]["all"], strict=True
        )
        ratios = [a / b for a, b in rates]
        assert record["ratio"]["all"] == pytest.approx(ratios)
        assert record["ratio"]["median"] == pytest.approx(statistics.median(ratios))
        assert record["detail"].endswith("all same as gemcut")
    assert "ratio" not in own
    fastest = max(others, key=lambda record: record["tokens_per_second"]["median"])
    assert own["fastest_peer"] == fastest["contestant"]
    assert f"times as fast as the fastest peer, {fastest['contestant']}" in text


def test_each_batch_with_each_context_is_a_case(capsys):
    sizes = ["--context", "3", "5", "3", "--batch", "1", "2", "--new-tokens", "3"]
    sizes += ["--repeats", "1"]
    code, _, report = decode(*sizes, "--peer", "transformers", capsys=capsys)
    assert code == 0
    cases = [record["case"] for record in report["rows"] if record["contestant"] == "gemcut"]
    assert cases == [f"demo/batch={b}/context={c}" for c in (3, 5) for b in (1, 2)]


def test_a_cut_model_is_shown_beside_the_whole_one(capsys):
    sizes = ["--random", "gemma-3-270m", "--layers", "1", "--new-tokens", "2", "--repeats", "1"]
    code, text, report = decode(*sizes, "--peer", "transformers", capsys=capsys)
    assert code == 0
    assert [record["layers"] for record in report["rows"]] == [1, 1]
    assert report["arguments"]["layers"] == 1
    assert "all 18 layers: MB" in text
    whole = PUBLISHED["gemma-3-270m"].num_parameters() * 4 / 1e6
    total = next(line for line in text.splitlines() if line.startswith("total"))
    assert float(total.split()[4]) == pytest.approx(whole, rel=0.01)
    assert "18 layers in bfloat16: 0.536 GB of weights, 18 KiB of keys" in text


def test_report_names_no_folder(tmp_path, capsys, setup):
    folder = tmp_path / "somewhere" / "mine"
    folder.parent.mkdir()
    folder.symlink_to(setup.folder)
    arguments = ["--model", str(folder), "--json", str(tmp_path / "a.json"), "--repeats", "1"]
    _, text, report = decode(*SIZES, *arguments, "--peer", "transformers", capsys=capsys)
    assert report["rows"][0]["model"] == report["arguments"]["model"] == "mine"
    assert str(tmp_path) not in json.dumps(report) + text


@pytest.mark.parametrize(
    ("change", "detail"),
    [
        pytest.param(one_token_off, "row 1, token 2", id="one-token-off"),
        pytest.param(lambda rows: [row[:-1] for row in rows], "2 rows of [3]", id="too-few"),
        pytest.param(lambda rows: rows[:1], "1 rows", id="a-row-missing"),
    ],
)
def test_a_peer_with_other_tokens_is_reported_and_not_timed(monkeypatch, capsys, change, detail):
    plant(monkeypatch, transformers=change, gpt_fast=lambda rows: rows)
    options = ["--repeats", "2", "--peer", "transformers", "gpt-fast"]
    code, text, report = decode(*SIZES, *options, capsys=capsys)
    assert code == 1
    _, wrong, right = report["rows"]
    assert (wrong["status"], right["status"]) == ("wrong", "ok")
    assert detail in wrong["detail"]
    assert f"wrong: {wrong['detail']}" in text
    assert not wrong.keys() & {*METRICS, "read_share", "ratio"}
    assert len(right["ratio"]["all"]) == 2


def test_gemcut_is_checked_too(monkeypatch, capsys):
    plant(monkeypatch, gemcut=one_token_off)
    options = ["--repeats", "1", "--peer", "transformers"]
    code, text, report = decode(*SIZES, *options, capsys=capsys)
    assert code == 1
    own, peer = report["rows"]
    assert (own["status"], peer["status"]) == ("wrong", "ok")
    assert "tokens_per_second" in peer
    assert "ratio" not in peer
    assert "fastest peer" not in text


def test_tokens_that_change_while_they_are_timed_are_checked(monkeypatch, setup):
    calls = []

    def now_and_then(rows):
        calls.append(rows)
        return one_token_off(rows) if len(calls) == 3 else rows

    plant(monkeypatch, transformers=now_and_then)
    result = run_case(setup, TINY, ["transformers"], 3)
    assert len(calls) == 4  # a warm-up and three rounds
    assert [one.finding.status for one in result.contestants] == ["ok", "wrong"]
    assert "row 1, token 2" in result.contestants[1].finding.detail
    assert [one.name for one in result.timed] == ["gemcut"]


@pytest.mark.parametrize("call", [1, 3], ids=["in-its-warm-up", "in-a-round"])
@pytest.mark.parametrize(
    ("error", "status", "detail"),
    [
        (NotImplementedError("no such cache\nsecond line"), "failed", "NotImplementedError: no s"),
        (torch.OutOfMemoryError("CUDA out of memory"), "no memory", "CUDA out of memory"),
    ],
)
def test_a_peer_that_does_not_run_is_told_and_the_others_go_on(
    monkeypatch, setup, call, error, status, detail
):
    calls = []

    def refuse(rows):
        calls.append(rows)
        if len(calls) == call:
            raise error
        return rows

    plant(monkeypatch, transformers=refuse, gpt_fast=lambda rows: rows)
    result = run_case(setup, TINY, ["transformers", "gpt-fast"], 4)
    finding = result.contestants[1].finding
    assert finding.status == status
    assert finding.detail.startswith(detail)
    assert "\n" not in finding.detail
    assert [one.name for one in result.timed] == ["gemcut", "gpt-fast"]
    assert len(result.rounds) == 4
    assert len(make_records(result, CEILINGS)) == 3
    assert len(calls) == call


def test_a_peer_that_cannot_be_imported_is_told(monkeypatch, capsys):
    def load(stage):
        raise ImportError("libnothing.so: cannot open shared object file")

    monkeypatch.setitem(CONTESTANTS, "transformers", EnginePeer(load))
    plant(monkeypatch, gpt_fast=lambda rows: rows)
    options = ["--repeats", "1", "--peer", "transformers", "gpt-fast"]
    code, text, report = decode(*SIZES, *options, capsys=capsys)
    assert code == 0
    assert report["rows"][1]["status"] == "failed"
    assert "failed: ImportError: libnothing.so" in text
    assert "tokens_per_second" in report["rows"][2]


def test_every_peer_failing_fails_the_command(monkeypatch, capsys):
    def load(stage):
        raise ImportError("nothing")

    monkeypatch.setitem(CONTESTANTS, "transformers", EnginePeer(load))
    options = ["--repeats", "1", "--peer", "transformers"]
    code, _, report = decode(*SIZES, *options, capsys=capsys)
    assert code == 1
    assert report["rows"][0]["status"] == "ok"


def test_too_little_memory_says_how_much_and_goes_on(monkeypatch, capsys, setup):
    needed = slot_bytes(setup.config, 500, PREFILL_CHUNK, torch.float32)
    room = needed - 1_000_000
    monkeypatch.setattr("gemcut.bench.engines.setup.free_bytes", lambda device: room)
    monkeypatch.setattr(Setup, "weight_bytes", 0)
    plant(monkeypatch, transformers=lambda rows: rows)
    sizes = ["--context", "496", "5", "--new-tokens", "4", "--repeats", "1", "--device", "cpu"]
    code, text, report = decode(*sizes, "--peer", "transformers", capsys=capsys)
    assert code == 0
    assert [record["status"] for record in report["rows"]] == 2 * ["no memory"] + 2 * ["ok"]
    detail = report["rows"][0]["detail"]
    assert detail == f"0.001 GB are missing on cpu for {needed / 1e9:.3g} GB of cache"
    assert f"no memory: {detail}" in text


def test_a_model_that_does_not_fit_is_told_in_every_case(monkeypatch, capsys):
    monkeypatch.setattr("gemcut.bench.engines.setup.free_bytes", lambda device: 40 * 10**9)
    sizes = ["--random", "gemma-2-27b", "--dtype", "bfloat16", "--batch", "1", "2"]
    code, _, report = decode(*sizes, "--peer", "transformers", "--device", "cpu", capsys=capsys)
    assert code == 1
    assert [record["status"] for record in report["rows"]] == 4 * ["no memory"]
    detail = "14.5 GB are missing on cpu for 54.5 GB of weights"
    assert {record["detail"] for record in report["rows"]} == {detail}


def test_a_check_that_does_not_fit_is_told(monkeypatch, setup):
    def findings(self, answers, own):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(TokenCheck, "findings", findings)
    result = run_case(setup, TINY, [], 2)
    assert result.rounds == []
    assert result.contestants[0].finding.status == "no memory"
    assert "judging" in result.contestants[0].finding.detail


def interrupt_at(call):
    calls = []

    def change(rows):
        calls.append(rows)
        if len(calls) == call:
            raise KeyboardInterrupt
        return rows

    return change


def test_an_interrupted_run_keeps_whole_rounds(monkeypatch, capsys, tmp_path):
    plant(monkeypatch, transformers=interrupt_at(4))  # the warm-up, two rounds, then Ctrl-C
    file = tmp_path / "decode.json"
    options = ["--repeats", "5", "--peer", "transformers", "--json", str(file)]
    code, text, report = decode(*SIZES, *options, "--context", "5", "6", capsys=capsys)
    assert code == 130
    assert "interrupted: 2 whole rounds of this case are kept" in text
    assert report["interrupted"]
    assert [len(record["tokens_per_second"]["all"]) for record in report["rows"]] == [2, 2]
    assert json.loads(file.read_text()) == report


def test_a_run_interrupted_in_its_second_case_keeps_the_first(monkeypatch, capsys):
    plant(monkeypatch, transformers=interrupt_at(4))
    options = ["--repeats", "2", "--peer", "transformers", "--context", "5", "6"]
    code, _, report = decode(*SIZES, *options, capsys=capsys)
    assert code == 130
    assert {record["case"] for record in report["rows"]} == {"demo/batch=2/context=5"}
    assert report["interrupted"]


def test_a_quantised_peer_is_no_fastest_peer(monkeypatch, setup):
    plant(monkeypatch, transformers=lambda rows: rows)
    eight_bit = EnginePeer(Gemcut, quantization="int8")
    monkeypatch.setitem(CONTESTANTS, "gpt-fast-int8", eight_bit)
    result = run_case(setup, TINY, ["gpt-fast-int8", "transformers"], 1)
    own, quantised, _ = make_records(result, CEILINGS)
    assert own["fastest_peer"] == "transformers"
    assert quantised["quantization"] == "int8"
    assert quantised["step_bytes"] < own["step_bytes"] / 3
    assert "allowed for 8-bit weights" in quantised["detail"]


@pytest.mark.parametrize("quantization", ["int8", "int4", "fp8"])
def test_own_quantised_weights_are_a_case_of_their_own(quantization, monkeypatch):
    """Its tokens are held to the exact logits, within what the oracles on its weights err."""
    setup = demo_setup()
    monkeypatch.setattr(setup, "_ops", reference)
    quantised = replace(TINY, quantization=quantization)
    peers = [f"gpt-fast-{quantization}"] if quantization != "fp8" else []
    assert like(quantised, ["transformers", *peers]) == peers
    result = run_case(setup, quantised, [], 1)
    (own,) = make_records(result, CEILINGS)
    assert own["status"] == "ok", own["detail"]
    assert "allowed for its weights" in own["detail"]
    assert own["quantization"] == quantization
    assert own["case"].endswith(f"/{quantization}")
    plain = make_records(run_case(setup, TINY, [], 1), CEILINGS)[0]
    assert plain["quantization"] is None
    assert own["step_bytes"] < plain["step_bytes"] / 3
    weights = setup.quantized_model(quantization).weights
    assert weights.layers[0].down.format == quantization

    # tokens of a model whose weights are broken are seen
    for layer in weights.layers:
        values = layer.qkv.values.view(torch.uint8)
        values.copy_(values.flip(0))
    broken = Gemma(setup.config, weights, reference)
    monkeypatch.setattr(setup, "packed_model", lambda _: broken)
    good = Setup.quantized_model(demo_setup(), quantization)
    monkeypatch.setattr(setup, "quantized_model", lambda _: good)
    assert run_case(setup, quantised, [], 1).contestants[0].finding.status == "wrong"


def test_contestants_are_let_go_after_a_case(setup):
    result = run_case(setup, TINY, [], 1)
    assert all(one.engine is None for one in result.contestants)


def test_captures_after_the_warm_up_are_counted(setup, monkeypatch):
    """Of an engine that captures, but never warmed up."""
    monkeypatch.setattr(Engine, "warmup", capture_one)
    assert run_case(setup, TINY, [], 1).after_warmup["captures"] > 0


def capture_one(engine: Engine, **options) -> None:
    replay(engine)
    engine._loop.metrics.at_warmup = engine._costs()


def test_a_failure_lets_go_of_the_contestant():
    contestant = Contestant("transformers", engine=object())
    contestant.fail(MemoryError("1.00 GB are missing"))
    assert contestant.engine is None
    assert not contestant.runs


def test_prompts_are_distinct_rows_of_the_asked_length(setup):
    for length in (1, 5, 400):  # 400: longer than the passage
        rows = make_prompts(setup.tokenizer, replace(TINY, prompt_tokens=length))
        assert [len(row) for row in rows] == [length, length]
        assert all(row[0] == setup.tokenizer.bos_id for row in rows)
        assert (rows[0] != rows[1]) == (length > 1)


@pytest.mark.parametrize("load", [Gemcut, lambda stage: Transformers(stage, cache="dynamic")])
def test_first_token_comes_before_the_rest(setup, load):
    stage = Stage(setup, TINY)
    generation = load(stage).generate(make_prompts(setup.tokenizer, TINY), 4)
    assert 0 < generation.first_token_seconds < generation.seconds
    spent = generation.seconds - generation.first_token_seconds
    assert generation.tokens_per_second == pytest.approx(2 * 3 / spent)


@pytest.mark.parametrize("load", [Gemcut, lambda stage: Transformers(stage, cache="dynamic")])
def test_the_first_token_comes_after_the_prompt(setup, load):
    workload = Workload(batch=1, prompt_tokens=400, new_tokens=2)
    contestant, prompts = load(Stage(setup, workload)), make_prompts(setup.tokenizer, workload)
    contestant.generate(prompts, 2)
    generation = contestant.generate(prompts, 2)
    assert generation.first_token_seconds > 0.5 * generation.seconds


def test_the_mean_context_is_that_of_the_steps():
    # a prompt of 5 and 4 new tokens: three steps, whose new token sees 6, 7 and 8
    assert mean_context(Workload(1, 5, 4)) == 7
    assert mean_context(Workload(1, 5, 2)) == 6
