"""What the tool reports of the demo model."""

import re

import pytest
from held_out import HELD_OUT, bits_per_byte
from real_models import real_file

from gemcut.engine import Engine
from gemcut.tools import quantization_cost


def test_a_text_is_scored_by_every_format(tmp_path, capsys):
    file = tmp_path / "text.txt"
    file.write_text(HELD_OUT, encoding="utf-8")
    assert quantization_cost.main(["--text", str(file), "--window", "512"]) == 0
    lines = dict(re.findall(r"^(\w+) +([\d.]+) bits/byte", capsys.readouterr().out, re.MULTILINE))
    assert list(lines) == ["plain", "int8", "fp8", "int4"]
    assert len(set(lines.values())) == 4
    with Engine.from_pretrained("demo", dtype="float32") as engine:
        assert float(lines["plain"]) == pytest.approx(bits_per_byte(engine), abs=1e-4)


def test_rates_are_medians_of_rounds_without_the_first(monkeypatch):
    clock = 0.0
    monkeypatch.setattr(quantization_cost.time, "perf_counter", lambda: clock)
    seconds = iter([9.0, 1.0, 4.0, 2.0])  # of a token, in each round

    def run(count: int) -> None:
        nonlocal clock, a_token
        a_token = next(seconds) if count == 1 else a_token
        clock += 5 + count * a_token

    a_token = 0.0
    assert quantization_cost.rates({"one": run}, 10, 3) == {"one": 0.5}


def test_speed_of_every_format(capsys):
    arguments = ["--speed", "--tokens", "2", "--rounds", "1"]
    assert quantization_cost.main(arguments) == 0
    names = re.findall(r"^gemcut (\w+) +[-\d.]+ tokens/s$", capsys.readouterr().out, re.MULTILINE)
    assert names == ["bfloat16", "int8", "fp8", "int4"]


def test_llama_cpp_scores_the_same_tokens(tmp_path):
    """It rounds activations to 8 bits; windows without a BOS would differ by far more."""
    pytest.importorskip("llama_cpp")
    file = str(real_file("gemma-3-270m-q4_k_m.gguf"))
    text = HELD_OUT[:600]
    own, _ = quantization_cost.cost(file, None, text, 64)
    found, _ = quantization_cost.cost_in_llama_cpp(file, text, 64, 1)
    assert found == pytest.approx(own, rel=0.01)
    run = quantization_cost.of_llama_cpp(file, 1)
    assert [len(run(count)) for count in (1, 5)] == [1, 5]


def test_without_llama_cpp_a_file_for_it_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(quantization_cost, "find_spec", lambda _: None)
    with pytest.raises(SystemExit):
        quantization_cost.main(["--gguf", "a.gguf"])
    assert "--gguf compares with llama.cpp, by the package llama-cpp" in capsys.readouterr().err
