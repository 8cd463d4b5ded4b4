"""gemcut-bench prefill: the time to one token, and the operations that it takes."""

import json

import pytest
from planted_engines import CEILINGS, demo_setup, plant, skip_ceilings

from gemcut.bench import cli
from gemcut.bench.engines.case_runner import Contestant, Result
from gemcut.bench.engines.peers import Generation, Workload
from gemcut.bench.engines.prefill import make_records
from gemcut.bench.engines.step_bytes import prefill_flops
from gemcut.engine.checkpoints.hub import DEMO
from gemcut.engine.config.model_config import ModelConfig

CPU = ["--repeats", "2", "--device", "cpu"]


@pytest.fixture(autouse=True)
def ceilings(monkeypatch):
    skip_ceilings(monkeypatch)


def prefill(*arguments, capsys):
    code = cli.main(["prefill", *CPU, *arguments])
    lines = capsys.readouterr().out.splitlines()
    return code, "\n".join(lines[:-1]), json.loads(lines[-1])


def test_command_prints_a_table_and_one_json_object(capsys):
    code, text, report = prefill("--tokens", "20", "7", "--batch", "1", "2", capsys=capsys)
    assert code == 0
    assert (report["benchmark"], report["interrupted"]) == ("prefill", False)
    names = ["gemcut", "transformers", "transformers-static"]
    assert [record["contestant"] for record in report["rows"]] == 4 * names
    cases = [f"demo/batch={batch}/tokens={tokens}" for tokens in (20, 7) for batch in (1, 2)]
    assert [record["case"] for record in report["rows"][::3]] == cases
    config = ModelConfig.from_file(DEMO)
    for record in report["rows"]:
        assert record["status"] == "ok"
        assert (record["model"], record["dtype"]) == ("demo", "float32")
        flops = prefill_flops(config, batch=record["batch"], tokens=record["tokens"])
        assert record["flops"] == flops
        first, rate = record["first_token_ms"], record["tokens_per_second"]
        assert len(first["all"]) == 2
        tokens = record["batch"] * record["tokens"]
        assert rate["all"] == pytest.approx([1e3 * tokens / ms for ms in first["all"]])
        assert record["tflops"] == pytest.approx(flops / first["median"] / 1e9)
        assert record["share"] == pytest.approx(record["tflops"] / CEILINGS["matmul_tflops"])
        assert record["memory_bytes"] is None
        assert record["case"] in text
    own, peer = report["rows"][:2]
    times = zip(peer["first_token_ms"]["all"], own["first_token_ms"]["all"], strict=True)
    assert peer["ratio"]["all"] == pytest.approx([a / b for a, b in times])
    assert own["fastest_peer"] in names[1:]


def test_the_time_is_that_of_the_whole_call():
    setup, workload = demo_setup(), Workload(batch=2, prompt_tokens=10, new_tokens=1)
    contestants = [Contestant("gemcut"), Contestant("transformers")]
    times = {"gemcut": 0.2, "transformers": 0.5}
    round_ = {name: Generation([[5], [6]], 0.1, seconds) for name, seconds in times.items()}
    own, peer = make_records(Result(setup, workload, contestants, [round_]), CEILINGS)
    assert own["first_token_ms"]["median"] == 200
    assert own["tokens_per_second"]["median"] == 100
    assert peer["ratio"]["median"] == pytest.approx(2.5)


def test_a_wrong_first_token_is_reported_and_not_timed(monkeypatch, capsys):
    plant(monkeypatch, transformers=lambda records: [[records[0][0] ^ 1]])
    code, _, report = prefill("--tokens", "20", "--peer", "transformers", capsys=capsys)
    assert code == 1
    record = report["rows"][1]
    assert record["status"] == "wrong"
    assert "row 0, token 0" in record["detail"]
    assert "first_token_ms" not in record


def test_an_interrupted_run_says_so(monkeypatch, capsys):
    def interrupt(records):
        raise KeyboardInterrupt

    plant(monkeypatch, transformers=interrupt)
    code, _, report = prefill("--tokens", "20", "--peer", "transformers", capsys=capsys)
    assert code == 130
    assert report["rows"] == []
    assert report["interrupted"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "0"], "prompt tokens 0 is outside 1.."),
        (["--tokens", "512"], "512 prompt tokens and 1 new ones are 513, but a slot"),
        (["--batch", "0"], "batch 0 is outside 1.."),
        (["--random", "gemma-2-2b", "--tokens", "8192"], "a slot of this model holds at most 8192"),
    ],
)
def test_bad_input_is_one_line(arguments, message, capsys):
    assert cli.main(["prefill", *CPU, *arguments]) == 1
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""
