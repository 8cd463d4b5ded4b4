"""tools/profile_step.py: kernels and gaps add up to the step, and every op of it is there."""

import json

import pytest
import torch

from gemcut.engine.checkpoints.hub import DEMO
from gemcut.engine.config.model_config import ModelConfig
from gemcut.tools import profile_step
from gemcut.tools.profile_step import Line, Span, break_down


def test_two_steps_are_averaged():
    spans = [
        Span("a", 0, 4),
        Span("b", 5, 7),
        Span("a", 7, 11),
        Span("a", 14, 18),  # the second step
        Span("b", 18, 20),
        Span("a", 21, 27),
    ]
    assert break_down(spans, steps=2) == [
        Line("a", launches=2, us=9, gap_us=2),
        Line("b", launches=1, us=2, gap_us=0.5),
    ]


def test_order_of_events_does_not_matter():
    spans = [Span("a", 0, 1), Span("b", 2, 4), Span("c", 4, 10)]
    assert break_down(reversed(spans), 1) == break_down(spans, 1)


def test_overlapping_spans_share_no_time():
    """A kernel that starts before its predecessor ends, as dependent launches do."""
    spans = [Span("a", 0, 10), Span("b", 6, 13), Span("c", 7, 9), Span("d", 13, 14)]
    lines = {line.kernel: line for line in break_down(spans, 1)}
    assert [lines[name].us for name in "abcd"] == [10, 3, 0, 1]
    assert sum(line.gap_us for line in lines.values()) == 0


def test_lines_add_up_to_the_step():
    generator = torch.Generator().manual_seed(0)
    starts = (100 * torch.rand(50, generator=generator)).tolist()
    spans = [Span(str(i % 7), start, start + 1 + i % 3) for i, start in enumerate(starts)]
    whole = max(span.end_us for span in spans) - min(starts)
    lines = break_down(spans, 5)
    assert sum(line.us + line.gap_us for line in lines) == pytest.approx(whole / 5)
    assert sum(line.launches for line in lines) == pytest.approx(10)


def test_command_finds_every_op_of_a_step(capsys, tmp_path):
    folder = tmp_path / "new" / "profile"
    command = ["--device", "cpu", "--batch", "2", "--context", "20", "--steps", "2"]
    assert profile_step.main([*command, "--out", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "profiled, a step takes" in out
    assert "without the profiler a step takes" in out

    report = json.loads((folder / "breakdown.json").read_text())
    launches = {line["kernel"]: line["launches"] for line in report["lines"]}
    layers = ModelConfig.from_file(DEMO).num_layers
    assert launches["attention_decode"] == launches["linear_geglu"] == layers
    assert launches["linear_rope_and_store_"] == layers
    assert launches["skinny_linear"] == 2 * layers
    assert launches["lm_head_argmax"] == launches["advance_"] == launches["begin_step"] == 1
    assert report["step_us"]["low"] > 0
    assert len(report["step_us"]["all"]) == profile_step.ROUNDS
    events = json.loads((folder / "step.json").read_text())["traceEvents"]
    assert any(event.get("name") == "op lm_head_argmax" for event in events)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "no-such-model"], "'no-such-model'"),
        (["--random", "gemma-4"], "'gemma-4' is unknown"),
        (["--batch", "0"], "batch 0 is outside 1.."),
        (["--context", "1"], "context 1 is outside 2.."),
        (["--steps", "0"], "steps 0 is outside 1.."),
        (["--device", "tpu"], "device 'tpu'"),
    ],
)
def test_bad_input_is_one_line(arguments, message, capsys):
    assert profile_step.main(arguments) == 1
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
