"""Engine metrics: what they count, and their text, read by Prometheus' own parser."""

import pytest
from engines import replay, run_as_on_a_gpu
from prometheus_client.parser import text_string_to_metric_families

from gemcut.engine import Engine, SamplingParams
from gemcut.engine.serving.metrics import DESCRIPTIONS


@pytest.fixture
def engine(folder):
    with Engine.from_pretrained(
        folder, max_batch_size=4, prefill_chunk=8, dtype="float32"
    ) as engine:
        yield engine


@pytest.mark.parametrize("late", [False, True], ids=["read-at-once", "read-late"])
def test_counts_are_what_was_done(engine, late):
    """When tokens are read late too, no step is made for a token that no request wants."""
    if late:
        run_as_on_a_gpu(engine)
    prompt = [2, *range(30, 50)]
    engine.generate(prompt, SamplingParams(max_tokens=9, ignore_eos=True))
    metrics = engine.metrics()
    assert (metrics["prefill_tokens"], metrics["prefill_chunks"]) == (21, 3)
    assert metrics["generated_tokens"] == 9
    assert (metrics["decode_steps"], metrics["decoded_rows"]) == (8, 8)
    assert metrics["batch_fill"] == 1 / 4
    assert (metrics["running"], metrics["waiting"], metrics["slots"]) == (0, 0, 4)
    assert metrics["cache_use"] == (21 + 8) / (4 * 128)
    assert metrics["ended"] == {"length": 1}
    assert metrics["tokens_per_second"] == pytest.approx(9 / metrics["busy_seconds"])

    engine.generate([prompt] * 4, SamplingParams(max_tokens=9, ignore_eos=True))
    metrics = engine.metrics()
    assert metrics["reused_tokens"] == 4 * 20
    assert metrics["prefill_tokens"] == 21 + 4
    assert metrics["decoded_rows"] == 8 + 4 * 8
    with pytest.raises(ValueError, match="no token is left"):
        engine.generate(prompt, SamplingParams(logits_processors=[lambda ids, x: x * float("nan")]))
    stream = engine.stream(prompt, SamplingParams(ignore_eos=True))
    next(stream)
    assert engine.metrics()["running"] == 1
    stream.close()
    engine.generate(prompt, SamplingParams(max_tokens=1, ignore_eos=True))
    assert engine.metrics()["ended"] == {"length": 6, "error": 1, "abort": 1}


def test_prometheus_reads_every_value(engine):
    engine.generate("Once", SamplingParams(max_tokens=3, ignore_eos=True))
    metrics = engine.metrics()
    families = {f.name: f for f in text_string_to_metric_families(engine.prometheus())}
    for name, (kind, _) in DESCRIPTIONS.items():
        family = families.pop(f"gemcut_{name}")
        assert family.type == kind
        assert family.documentation
        (sample,) = family.samples
        if name != "busy_seconds":
            assert sample.value == metrics[name], name
    completions = families.pop("gemcut_completions")
    assert {s.labels["reason"]: s.value for s in completions.samples} == {
        "length": 1, "stop": 0, "abort": 0, "error": 0,
    }  # fmt: skip
    assert families == {}


def test_captures_after_a_warm_up_are_told(engine):
    graphs = replay(engine)._graphs
    assert engine.metrics()["captures_after_warmup"] == 0  # there was no warm-up yet
    engine.warmup()
    captured = engine.metrics()["graph_captures"]
    graphs._captured.popitem()
    engine.warmup()
    graphs._captured["another"] = None
    metrics = engine.metrics()
    assert (metrics["graph_captures"], metrics["captures_after_warmup"]) == (captured + 1, 1)


def test_a_warm_up_shows_its_progress_where_asked(engine, capsys):
    engine.warmup(use_tqdm=True)
    assert "100%" in capsys.readouterr().err
    engine.warmup()
    assert capsys.readouterr().err == ""
