"""Faults of a step: the requests concerned get one clear error, and the others go on."""

import asyncio
from dataclasses import replace

import pytest
import torch
from engines import assert_serves, run_as_on_a_gpu

from gemcut.engine import Engine, EngineFault, SamplingParams

PARAMS = SamplingParams(seed=1, max_tokens=12, ignore_eos=True)


@pytest.fixture(params=["read-at-once", "read-late"])
def engine(folder, request):
    with Engine.from_pretrained(
        folder, max_batch_size=2, prefill_chunk=8, dtype="float32"
    ) as engine:
        if request.param == "read-late":
            run_as_on_a_gpu(engine)
        yield engine


def failing(function, error: Exception, *, when):
    """The same function, which raises `error` at calls for which `when()` is true."""

    def call(*args, **kwargs):
        if when():
            raise error
        return function(*args, **kwargs)

    return call


def test_a_fault_in_a_prefill_ends_its_own_request(engine, monkeypatch):
    alone = engine.generate("x", PARAMS)
    other = engine.stream("x", PARAMS)
    text = next(other).text
    runner = engine._loop.runner
    with monkeypatch.context() as patch:
        error = torch.OutOfMemoryError("CUDA out of memory")
        fails = failing(runner.start_prefill, error, when=lambda: True)
        patch.setattr(runner, "start_prefill", fails)
        with pytest.raises(torch.OutOfMemoryError):
            engine.generate("Once upon a time there was a fox")
    assert text + "".join(delta.text for delta in other) == alone.text
    assert_serves(engine)


def test_a_fault_in_a_step_ends_those_that_took_part(engine, monkeypatch):
    """And not the one that waited for a slot."""
    runner = engine._loop.runner
    alone = engine.generate("z", PARAMS)
    streams = [engine.stream(prompt, SamplingParams(ignore_eos=True)) for prompt in "xy"]
    for stream in streams:
        next(stream)
    broken = iter([True])
    error = RuntimeError("a step broke")
    waits = engine.add("z", PARAMS)
    with monkeypatch.context() as patch:
        fails = failing(runner.start_decode, error, when=lambda: next(broken, False))
        patch.setattr(runner, "start_decode", fails)
        for stream in streams:
            with pytest.raises(RuntimeError, match="a step broke"):
                list(stream)
    deltas = []
    while engine.has_work:
        deltas += engine.step()
    assert {delta.request_id for delta in deltas} == {waits}
    assert [id_ for delta in deltas for id_ in delta.token_ids] == alone.token_ids
    assert_serves(engine)


def test_after_a_fault_of_the_device_everyone_learns_that_the_engine_is_dead(engine, monkeypatch):
    streams = [engine.stream(prompt, SamplingParams(ignore_eos=True)) for prompt in "xy"]
    for stream in streams:
        next(stream)
    waits = engine.add("z")
    error = torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nmore")
    runner = engine._loop.runner
    fails = failing(runner.start_decode, error, when=lambda: True)
    monkeypatch.setattr(runner, "start_decode", fails)
    message = "the engine is dead: CUDA error: an illegal memory access was encountered$"
    for stream in streams:
        with pytest.raises(EngineFault, match=message):
            list(stream)
    (delta,) = engine.step()
    assert (delta.request_id, delta.finish_reason) == (waits, "error")
    assert isinstance(delta.error, EngineFault)
    monkeypatch.undo()
    for call in (engine.generate, engine.score, lambda prompt: list(engine.stream(prompt))):
        with pytest.raises(EngineFault, match=message):
            call("Once")
    with pytest.raises(EngineFault, match=message):
        asyncio.run(engine.agenerate("Once"))
    engine.add("z")
    assert isinstance(engine.step()[0].error, EngineFault)
    assert engine._scheduler.free_slots == 2
    engine.close()
    with pytest.raises(RuntimeError, match="the engine is closed"):
        engine.generate("x")


def test_a_mistake_in_the_engine_leaves_nobody_waiting(engine, monkeypatch):
    def broken():
        raise AssertionError("a mistake")

    monkeypatch.setattr(engine._scheduler, "admit", broken)
    with pytest.raises(EngineFault, match="the engine is dead: a mistake"):
        engine.generate("x")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_real_fault_of_the_device(folder):
    """In a process of its own: the context does not survive it."""
    import subprocess
    import sys

    code = (
        "import sys, torch\n"
        "from gemcut.engine import Engine, EngineFault\n"
        "engine = Engine.from_pretrained(sys.argv[1], device='cuda')\n"
        "engine.generate('x')\n"
        "def breaks(*args): torch.cuda._sleep(1); torch.empty(1, device='cuda')[torch.tensor([10**9], device='cuda')]; torch.cuda.synchronize()\n"  # noqa: E501
        "engine._loop.runner.start_decode = breaks\n"
        "for _ in range(2):\n"
        "    try: engine.generate('x')\n"
        "    except EngineFault as error: print(error)\n"
    )
    run = subprocess.run(
        [sys.executable, "-P", "-c", code, str(folder)], capture_output=True, text=True
    )
    assert run.stdout.count("the engine is dead: CUDA error") == 2, run.stderr


BAD = 100  # a token that no prompt below has


def fails(engine, ids):
    with pytest.raises(ValueError, match="logits are NaN"):
        engine.generate(ids, PARAMS)


def is_scored(engine, ids):
    engine.score(ids)


def hides_it(engine, ids):
    hides = SamplingParams(max_tokens=3, logits_processors=[lambda ids, x: torch.nan_to_num(x)])
    engine.generate(ids, hides)


def is_cancelled(engine, ids):
    request = engine.add([*ids, *ids], SamplingParams())
    engine.step()
    engine.cancel(request)
    engine.step()


@pytest.mark.parametrize("ends", [fails, is_scored, hides_it, is_cancelled])
def test_nan_that_a_request_left_does_not_reach_the_next(engine, ends):
    """A step that pads one row's draft beside another's looks at what was there before."""
    guessing = SamplingParams(temperature=0, max_tokens=12, prompt_lookup_num_tokens=6)
    prompts = ["It was it was it was it", "Once upon a time there was a fox"]
    alone = [engine.generate(prompt, guessing).token_ids for prompt in prompts]
    embedding = engine.model.weights.embedding
    row = embedding[BAD].clone()
    embedding[BAD] = torch.nan
    for length in (15, 13):  # in one slot, and in the other
        ends(engine, [2, *[BAD] * length])
    embedding[BAD] = row
    assert not any(layer.v.isnan().any() for layer in engine._loop.runner.cache.layers)
    assert [output.token_ids for output in engine.generate(prompts, guessing)] == alone


def test_drafts_end_before_the_slot_does(folder):
    """A graph pads every draft to the longest: with no room for that, a step has none."""
    prompt, length = [2, *[7, 8, 9, 10] * 3], 24
    lookup = SamplingParams(temperature=0, ignore_eos=True, prompt_lookup_num_tokens=7)
    with Engine.from_pretrained(
        folder, max_batch_size=2, max_seq_len=length, ops="triton", dtype="float32"
    ) as engine:
        plain = engine.generate(prompt, replace(lookup, prompt_lookup_num_tokens=0))
        run_as_on_a_gpu(engine)
        drafted = engine.generate(prompt, lookup)
    assert len(plain.token_ids) == length - len(prompt)
    assert drafted.token_ids == plain.token_ids
