"""tools/vllm_visit.py: ways of vLLM side by side, compared, timed in turns; failures."""

import json
import os
import subprocess

import pytest

pytest.importorskip("tomllib")

from vllm_environment import PATIENCE, PYTHON, environment_of, needs_vllm

from gemcut.tools import vllm_visit

SMALL = ("--layers", "2", "--count", "4", "--rounds", "2", "--batch", "2", "--long-prompt", "20")


def test_ids_count_until_texts_part():
    theirs = [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert vllm_visit.same_ids(theirs, theirs) == 1
    assert vllm_visit.same_ids([[1, 9, 3, 4], [5, 6, 7, 0]], theirs) == 0.5


def test_the_greatest_difference():
    assert vllm_visit.greatest_difference([[-1.0, -2.0], [-3.0]], [[-1.5, -2.0], [-1.0]]) == 2


def test_prompts_are_the_same_each_time():
    prompts = vllm_visit.prompts_of(97, 3, 8)
    assert prompts == vllm_visit.prompts_of(97, 3, 8)
    assert len(prompts) == 3
    assert all(len(prompt) == 8 and min(prompt) >= 4 and max(prompt) < 97 for prompt in prompts)


def test_rounds_are_paired_and_turns_change(monkeypatch):
    """Three rounds of a machine that gets slower, and a way that takes twice as long."""
    asked = []

    class Fake:
        def __init__(self, name, factor):
            self.name, self.factor, self.calls = name, factor, 0

        def ask(self, prompts, count=None):
            if count is None:
                return {"logprobs": [[-1.0 * self.factor] * 19 for _ in prompts]}
            asked.append(self.name)
            self.calls += 1
            return {"seconds": self.factor * self.calls, "ids": [[7] * count for _ in prompts]}

    arguments = vllm_visit.parse(["out", *SMALL, "--rounds", "3"])
    fast, slow = vllm_visit.compare([Fake("fallback", 1), Fake("native", 2)], 97, 2, arguments)
    assert asked[::2] == ["fallback", "native", "native", "fallback"] * 2
    assert slow["decode_over_fallback"] == [0.5, 0.5, 0.5]
    assert fast["decode_tokens_per_s"][0] == 2 * 4 / 5  # the median of calls 3, 5 and 7
    assert fast["prefill_tokens_per_s"][0] == 2 * 20 / 6
    assert slow["same_ids"] == 1
    assert slow["logprob_difference"] == 1
    assert "decode_over_fallback 0.5" in vllm_visit.line_of({"mode": "eager", **slow})


def test_every_way_has_options_of_its_own():
    assert vllm_visit.WAYS["fallback"] == {"model_impl": "transformers"}
    assert vllm_visit.WAYS["native"] == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["."], "File exists"),
        (["new", "--random", "gemma-4-1b"], "--random 'gemma-4-1b' is unknown"),
        (["new", "--model", "nowhere"], "no such file"),
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert vllm_visit.main(arguments) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("vllm_visit: error: ")
    assert message in line


def test_a_way_that_does_not_start_is_one_line(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    ways = ("--ways", "fallback", "native", "--random", "gemma-3-270m", "--layers", "1")
    monkeypatch.setattr(vllm_visit, "RUNNER", "gemcut.tools.no_such_runner")
    assert vllm_visit.main([str(out), *SMALL, *ways]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all("no_such_runner" in line for line in lines)
    report = json.loads((out / "vllm-visit.json").read_text())
    assert report["rows"] == []
    assert len(report["failures"]) == 2


@needs_vllm
def test_every_way_runs_on_a_cpu(tmp_path):
    assert PYTHON is not None
    command = [PYTHON, "-P", "-m", "gemcut.tools.vllm_visit", str(tmp_path / "out"), *SMALL]
    command += ["--modes", "eager", "--dtype", "float32"]
    done = subprocess.run(
        command,
        env=environment_of(tmp_path) | {"VLLM_CPU_KVCACHE_SPACE": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "out" / "vllm-visit.json").read_text())["rows"]
    assert [row["way"] for row in rows] == ["fallback", "native", "providers", "ops"]
    for row in rows:
        assert row["same_ids"] == 1
        assert row["logprob_difference"] < 1e-3
    assert sorted(os.listdir(tmp_path / "out"))[0] == "eager-fallback.log"
