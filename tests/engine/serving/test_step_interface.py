"""The step interface (add, step, cancel), for a caller that makes the steps itself."""

import time

import pytest
from engines import assert_serves, dictate, run_as_on_a_gpu

from gemcut.engine import Engine, SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)


@pytest.fixture(scope="module", params=["read-at-once", "read-late"])
def engine(folder, request):
    with Engine.from_pretrained(folder, max_batch_size=2, dtype="float32") as engine:
        if request.param == "read-late":
            run_as_on_a_gpu(engine)
        yield engine


def drain(engine: Engine) -> dict[str, list]:
    """All deltas by request, one step after the other."""
    deltas: dict[str, list] = {}
    while engine.has_work:
        for delta in engine.step():
            deltas.setdefault(delta.request_id, []).append(delta)
    return deltas


def test_steps_give_what_generate_gives(engine):
    expected = {
        "mine": engine.generate("Once upon", GREEDY),
        "yours": engine.generate("It was", SamplingParams(seed=2, n=2, max_tokens=7)),
    }
    assert engine.add("Once upon", GREEDY, request_id="mine") == "mine"
    engine.add("It was", SamplingParams(seed=2, n=2, max_tokens=7), request_id="yours")
    deltas = drain(engine)
    assert deltas.keys() == expected.keys()
    for name, output in expected.items():
        for completion in output.outputs:
            mine = [d for d in deltas[name] if d.index == completion.index]
            assert "".join(d.text for d in mine) == completion.text
            assert [id_ for d in mine for id_ in d.token_ids] == completion.token_ids
            assert [d.finish_reason for d in mine[:-1]] == [None] * (len(mine) - 1)
            assert mine[-1].finish_reason == completion.finish_reason
    assert_serves(engine)


def test_completions_that_end_in_one_step_end_their_request_once(engine):
    """A second end would kill the engine: the first has taken the request's id away."""
    params = SamplingParams(n=2, seed=1, max_tokens=3, ignore_eos=True)
    engine.add("It was", params, request_id="two")
    ends = [d.index for d in drain(engine)["two"] if d.finish_reason == "length"]
    assert sorted(ends) == [0, 1]
    assert_serves(engine)


def test_nothing_moves_between_steps(engine):
    engine.add("x", GREEDY)
    before = engine.metrics()["steps"]
    time.sleep(0.1)
    assert engine.metrics()["steps"] == before
    engine.generate("y", SamplingParams(max_tokens=1))  # its steps serve all
    during = engine.metrics()["steps"]
    assert during > before
    time.sleep(0.1)
    assert engine.metrics()["steps"] == during
    deltas = drain(engine)
    assert sum(len(d.token_ids) for (mine,) in [deltas.values()] for d in mine) == 10
    assert engine.step() == []


def test_a_cancelled_request_says_so_once_and_frees_its_slot(engine):
    endless = SamplingParams(ignore_eos=True)
    runs, also, waits = (engine.add("x", endless) for _ in range(3))
    engine.step()
    engine.cancel(waits)
    engine.cancel(runs)
    for ended in (runs, waits, "never", None, 5):
        engine.cancel(ended)  # a caller that reads a step's deltas one by one may be late
    ends = {d.request_id: d.finish_reason for d in engine.step() if d.finish_reason}
    assert ends == {runs: "abort", waits: "abort"}
    engine.cancel(also)
    assert engine.has_work  # the next step has yet to return its last delta
    assert [d.finish_reason for d in engine.step()][-1] == "abort"
    assert not engine.has_work
    assert_serves(engine)


def test_an_id_is_in_use_until_its_request_has_ended(engine):
    engine.add("x", GREEDY, request_id="a")
    with pytest.raises(ValueError, match="request id 'a' is in use"):
        engine.add("y", GREEDY, request_id="a")
    drain(engine)
    engine.add("y", GREEDY, request_id="a")
    drain(engine)
    with pytest.raises(ValueError, match="request_id 5 is not a string"):
        engine.add("x", request_id=5)
    with pytest.raises(ValueError, match="the prompt is empty"):
        engine.add("", request_id="b")
    assert not engine.has_work


def test_an_error_is_a_delta(engine):
    def fails(generated, logits):
        raise ArithmeticError("broke")

    bad = engine.add("x", SamplingParams(logits_processors=[fails]))
    good = engine.add("x", GREEDY)
    deltas = drain(engine)
    (delta,) = deltas[bad]
    assert (delta.finish_reason, str(delta.error), delta.token_ids) == ("error", "broke", [])
    assert sum(len(d.token_ids) for d in deltas[good]) == 10


def test_a_processor_may_not_step_its_own_engine(engine):
    def steps(generated, logits):
        engine.step()
        return logits

    engine.add("x", SamplingParams(logits_processors=[steps]))
    ((delta,),) = drain(engine).values()
    assert "must not call its own engine" in str(delta.error)


def test_a_closed_engine_steps_no_more(folder):
    engine = Engine.from_pretrained(folder, dtype="float32")
    engine.add("x")
    engine.close()
    for call in (engine.step, lambda: engine.add("x"), engine.warmup):
        with pytest.raises(RuntimeError, match="the engine is closed"):
            call()


def test_stop_strings_reach_the_last_delta(engine, tokenizer):
    ids = tokenizer.encode("one two STOP three", add_bos=False)
    engine.add("x", SamplingParams(stop="STOP", logits_processors=dictate(ids)), request_id="s")
    deltas = drain(engine)["s"]
    assert "".join(d.text for d in deltas) == "one two "
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("stop", "STOP")
