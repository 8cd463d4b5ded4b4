"""tools/predict_step.py: the table, the last line of JSON, a fit, and what it refuses."""

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch
from predicted import small_step

from gemcut.bench.engines.step_bytes import decode_bytes
from gemcut.engine.config.model_config import PUBLISHED
from gemcut.kernels.interpreter import INTERPRETED
from gemcut.tools import predict_step
from gemcut.tools.launches import Made
from gemcut.tools.machine import H200
from gemcut.tools.prediction.predicted_step import PredictedStep, in_turn

COMPILING = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
LAUNCHES = """
import json
from gemcut.engine.config.model_config import PUBLISHED
from gemcut.tools.launches import step_launches
made = step_launches(PUBLISHED["gemma-2-2b"], "sm_90", batch=4, context=1024)
print(json.dumps([[one.name, one.grid] for one in made]))
"""


def uninterpreted(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-P", *command], env=COMPILING, capture_output=True, text=True
    )


@pytest.fixture
def step(monkeypatch) -> PredictedStep:
    """What every step is predicted to be; nothing is compiled."""
    step = small_step()
    monkeypatch.setattr(predict_step, "INTERPRETED", False)
    monkeypatch.setattr(predict_step, "predict_steps", lambda wanted, *_: [step] * len(wanted))
    return step


def test_a_step_is_all_that_a_model_launches():
    """Each layer has eight launches, two of them norms; the choice is in the head's."""
    run = uninterpreted("-c", LAUNCHES)
    assert run.returncode == 0, run.stderr
    launches = json.loads(run.stdout)
    names = Counter(name for name, _ in launches)
    layers = PUBLISHED["gemma-2-2b"].num_layers
    assert names["attention_decode_kernel"] == names["linear_rope_and_store_kernel"] == layers
    assert names["attention_combine_kernel"] == layers
    assert names["skinny_linear_kernel"] == names["add_rmsnorm_kernel"] == 2 * layers
    assert names["begin_step_kernel"] == names["lm_head_argmax_kernel"] == 1
    assert names["advance_kernel"] == 1
    assert "empty" not in names
    assert "view" not in names
    grids = [grid for name, grid in launches if name == "attention_decode_kernel"]
    assert all(grid[-1] == 4 for grid in grids)  # rows


def test_the_command_compiles_and_predicts_a_model():
    command = ["-m", "gemcut.tools.predict_step", "--models", "gemma-3-270m", "--jobs", "1"]
    run = uninterpreted(*command, "--batch", "2", "--context", "512", "--json")
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])["gemma-3-270m"]
    assert 100 < found["step_us"] < 3000
    assert 0.05 < found["share"] < 1
    assert "linear_geglu 4096 x 640" in run.stdout
    assert "gaps" in run.stdout


def test_the_last_line_holds_share_and_time(step, capsys):
    assert predict_step.main(["--models", "gemma-2-2b", "--json"]) == 0
    printed = capsys.readouterr().out.splitlines()
    us = step.step_us(H200)
    counted = decode_bytes(PUBLISHED["gemma-2-2b"], batch=1, context=1024, dtype=torch.bfloat16)
    share = counted.total / us / 1e-6 / H200.bandwidth
    found = json.loads(printed[-1])["gemma-2-2b"]
    assert found == {"share": pytest.approx(share, abs=1e-4), "step_us": pytest.approx(us, abs=0.1)}


def test_the_table_adds_up(step, capsys):
    lines = step.lines(H200)
    launches = sum(line.launches for line in lines)
    assert launches == sum(step.counts.values()) == 108
    us = sum(line.launches * line.us for line in lines)
    assert us + launches * H200.launch_gap_us == pytest.approx(step.step_us(H200))
    assert predict_step.main(["--models", "gemma-2-2b"]) == 0
    printed = capsys.readouterr().out
    for line in lines:
        assert line.kernel in printed
        assert line.share is None or 0 < line.share <= 1
    assert f"a step takes {step.step_us(H200):.0f} us" in printed


def test_a_dependent_launch_hides_its_beginning(step):
    """But not one that follows a launch of torch's own."""

    def launched(one: Made, pdl: bool) -> Made:
        assert one.launch is not None
        return replace(one, launch=replace(one.launch, options=(("launch_pdl", pdl),)))

    torchs, qkv, up, keys, *_ = step.counts
    first, second, third, plain, last = in_turn(
        [torchs, launched(qkv, True), launched(keys, True), launched(up, False), torchs]
    )[1:] + in_turn([launched(up, True)])
    assert not first.is_dependent
    assert (second.is_dependent, second.before) == (True, 64)
    assert [one.is_dependent for one in (third, plain, last)] == [False, False, False]
    counts = {replace(one, is_dependent=one is qkv): n for one, n in step.counts.items()}
    hiding = replace(step, counts=counts)
    hidden = step.counts[qkv] * H200.hidden_us
    assert hiding.step_us(H200) == pytest.approx(step.step_us(H200) - hidden)


def test_markdown_leaves_room_for_what_is_measured(step, capsys):
    assert predict_step.main(["--markdown"]) == 0
    header, _, *rows = capsys.readouterr().out.splitlines()
    assert header.endswith("| us measured |")
    us = step.step_us(H200)
    wanted = f"| {us:.0f} | {step.share(H200):.2f} | {step.share(H200) * 4.67 / 4.3:.2f} | |"
    assert rows[0].endswith(wanted)
    assert len(rows) == len(PUBLISHED)
    assert all(row.endswith("| |") for row in rows)


def test_quantised_steps_stand_beside_plain_ones(step, monkeypatch, capsys):
    def predicted(wanted, *_):
        return [replace(step, model=model, quantization=name) for model, _, _, name in wanted]

    monkeypatch.setattr(predict_step, "predict_steps", predicted)
    assert predict_step.main(["--markdown", "--quantization", "int8", "fp8"]) == 0
    header, _, *rows = capsys.readouterr().out.splitlines()
    assert header.startswith("| model | bfloat16: MB | us | share | int8: MB | us | ratio | share ")
    assert len(rows) == len(PUBLISHED)
    assert all(row.count("|") == header.count("|") for row in rows)
    assert "| 1.00 |" in rows[0]  # the same launches, however their bytes are counted
    assert predict_step.main(["--models", "gemma-2-2b", "--quantization", "int8", "--json"]) == 0
    printed = capsys.readouterr().out
    assert "gemma-2-2b int8, batch 1, context 1024, predicted" in printed
    found = json.loads(printed.splitlines()[-1])["gemma-2-2b int8"]
    plain = 1e6 * step.step_bytes / H200.bandwidth / step.step_us(H200)
    assert found["share"] < 0.6 * plain


def test_a_cache_in_fp8_has_half_the_bytes(step, capsys):
    """The name says so, of the bytes those of keys and values are halved, and the rest stays."""
    options = {"batch": 1, "context": 1024, "dtype": torch.bfloat16}
    plain = decode_bytes(PUBLISHED["gemma-2-2b"], **options)
    halved = replace(step, kv_cache_dtype="fp8", quantization="int8")
    assert halved.name == "gemma-2-2b int8 fp8 cache"
    less = step.step_bytes - replace(step, kv_cache_dtype="fp8").step_bytes
    assert less == (plain.kv_read + plain.kv_written) / 2


def test_the_command_predicts_a_cache_in_fp8():
    """Attention reads half the bytes, and converts them."""
    command = ["-m", "gemcut.tools.predict_step", "--models", "gemma-3-270m", "--jobs", "1"]
    run = uninterpreted(*command, "--kv-cache-dtype", "fp8", "--context", "2048", "--json")
    assert run.returncode == 0, run.stderr
    assert list(json.loads(run.stdout.splitlines()[-1])) == ["gemma-3-270m fp8 cache"]
    assert "attention_decode global" in run.stdout


def test_constants_can_be_set(step, capsys):
    for setting in ([], ["--set", "bandwidth=2e12", "launch_gap_us=3"]):
        assert predict_step.main(["--models", "gemma-2-2b", "--json", *setting]) == 0
    first, second = (
        json.loads(line)["gemma-2-2b"]["step_us"]
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("{")
    )
    assert second > 1.5 * first


def test_a_fit_is_printed_and_used(step, capsys, tmp_path):
    lines = [
        {"kernel": made.name, "launches": count, "us": 1.3 * count * step.us(made, H200)}
        for count, made in step.made()
    ]
    report = {"model": "gemma-2-2b", "batch": 1, "context": 1024}
    report["lines"] = [line | {"gap_us": 1.5 * line["launches"]} for line in lines]
    file = tmp_path / "breakdown.json"
    file.write_text(json.dumps(report))
    command = ["--fit", str(file), "--models", "gemma-2-2b", "--json"]
    assert predict_step.main(command) == 0
    printed = capsys.readouterr().out
    assert "launch_gap_us" in printed
    assert "linear_geglu_kernel" in printed
    fitted = json.loads(printed.splitlines()[-1])["gemma-2-2b"]["step_us"]
    launches = sum(step.counts.values())
    measured = 1.3 * (step.step_us(H200) - launches * H200.launch_gap_us) + 1.5 * launches
    assert fitted == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--models", "gemma-4"], "'gemma-4' is not gemma-2b, "),
        (["--arch", "sm_80"], "arch 'sm_80': machine code is read of sm_90 alone"),
        (["--batch", "0"], "batch 0 is outside 1.."),
        (["--context", "1"], "context of gemma-2b 1 is outside 2.."),
        (["--jobs", "0"], "jobs 0 is outside 1.."),
        (["--fit", "nowhere.json"], "nowhere.json: No such file"),
        (["--fit", __file__], "is no breakdown of profile_step: JSONDecodeError"),
        (["--set", "speed=3"], "--set speed=3: 'speed' is not "),
        (["--set", "ghz=fast"], "--set ghz=fast: 'fast' is no number"),
        (["--set", "ghz=0"], "--set ghz=0: must be above 0"),
    ],
)
def test_bad_input_is_one_line(options, message, step, capsys):
    assert predict_step.main(options) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("predict_step: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.skipif(not INTERPRETED, reason="the interpreter is off")
def test_the_interpreter_compiles_nothing(capsys):
    assert predict_step.main([]) == 1
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err
