"""Streams: paused, abandoned and unread ones hold nothing up."""

import threading

from engines import assert_serves

from gemcut.engine import SamplingParams

PROMPTS = ["Once upon a time", "It was", "The quick brown fox jumps over the lazy dog. " * 2]
GREEDY = SamplingParams(temperature=0, max_tokens=20)


def test_streams_take_turns_and_a_paused_one_delays_nobody(engine):
    paused = engine.stream(PROMPTS[0], SamplingParams(seed=1, max_tokens=30, ignore_eos=True))
    first = next(paused)
    assert len(engine.generate(PROMPTS[1], GREEDY).token_ids) > 0
    rest = [first, *paused]
    alone = engine.generate(PROMPTS[0], SamplingParams(seed=1, max_tokens=30, ignore_eos=True))
    assert "".join(delta.text for delta in rest) == alone.text


def test_an_abandoned_stream_frees_its_slot(engine):
    for _ in range(10):  # three slots
        stream = engine.stream("x", SamplingParams(ignore_eos=True))
        next(stream)
        del stream
    assert_serves(engine)
    closed = engine.stream("x", SamplingParams(ignore_eos=True))
    next(closed)
    closed.close()
    assert_serves(engine)


def test_a_stream_that_nobody_reads_takes_no_slot(engine):
    unread = [engine.stream("x", SamplingParams(ignore_eos=True)) for _ in range(5)]
    assert_serves(engine)
    del unread


def test_a_stream_may_be_abandoned_in_the_midst_of_a_step(engine):
    """As the garbage collector may do it: the step holds the lock that the cancellation needs."""
    abandoned = [engine.stream("x", SamplingParams(ignore_eos=True))]
    next(abandoned[0])

    def forget(generated, logits):
        abandoned.clear()
        return logits

    params = SamplingParams(max_tokens=3, ignore_eos=True, logits_processors=[forget])
    caller = threading.Thread(target=engine.generate, args=("x", params), daemon=True)
    caller.start()
    caller.join(timeout=30)
    assert not caller.is_alive()
    assert abandoned == []
    assert_serves(engine)
