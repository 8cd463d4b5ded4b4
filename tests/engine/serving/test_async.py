"""The async calls of the engine, which must not block the event loop."""

import asyncio
import time

import pytest
from engines import assert_serves, dictate, run_as_on_a_gpu

from gemcut.engine import Engine, SamplingParams

PROMPTS = ["Once upon a time", "It was", "The quick brown fox jumps"]
GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
ENDLESS = SamplingParams(ignore_eos=True)


@pytest.fixture(scope="module", params=["read-at-once", "read-late"])
def engine(folder, request):
    with Engine.from_pretrained(folder, max_batch_size=3, dtype="float32") as engine:
        if request.param == "read-late":
            run_as_on_a_gpu(engine)
        yield engine


async def text_of(stream) -> str:
    return "".join([delta.text async for delta in stream])


def test_async_calls_give_what_the_others_give(engine):
    messages = [{"role": "user", "content": "Hi"}]

    async def all_calls():
        return await asyncio.gather(
            engine.agenerate(PROMPTS[0], GREEDY),
            engine.agenerate(PROMPTS, GREEDY),
            engine.achat(messages, GREEDY),
            engine.ascore(PROMPTS),
            text_of(engine.astream(PROMPTS[1], GREEDY)),
            text_of(engine.achat_stream(messages, GREEDY)),
        )

    one, many, chat, scores, text, chat_text = asyncio.run(all_calls())
    expected = engine.generate(PROMPTS, GREEDY)
    assert one.token_ids == expected[0].token_ids
    assert [output.token_ids for output in many] == [output.token_ids for output in expected]
    assert chat.text == chat_text == engine.chat(messages, GREEDY).text
    assert scores[2].logprobs == pytest.approx(engine.score(PROMPTS[2]).logprobs, abs=1e-4)
    assert text == expected[1].text
    assert_serves(engine)


def test_completions_that_end_in_one_step_end_their_request_once(engine):
    """Or the end of the first request would be taken for that of the second."""
    short = SamplingParams(n=2, seed=1, max_tokens=3, ignore_eos=True)
    long = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    outputs = asyncio.run(engine.agenerate(PROMPTS[:2], [short, long]))
    lengths = [[len(one.token_ids) for one in output.outputs] for output in outputs]
    assert lengths == [[3, 3], [30]]
    assert [o.finish_reason for output in outputs for o in output.outputs] == ["length"] * 3


def test_a_thousand_tasks_share_the_slots(engine):
    async def all_tasks():
        params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
        return await asyncio.gather(
            *(engine.agenerate([2, 5 + i % 7], params) for i in range(1000))
        )

    outputs = asyncio.run(all_tasks())
    assert len({output.request_id for output in outputs}) == 1000
    for i, output in enumerate(outputs):
        assert output.token_ids == outputs[i % 7].token_ids
    assert_serves(engine)


def test_the_loop_goes_on_while_the_engine_works(engine):
    async def beat():
        longest, last = 0.0, time.perf_counter()
        task = asyncio.ensure_future(engine.agenerate([PROMPTS[2]] * 6, ENDLESS))
        while not task.done():
            await asyncio.sleep(0)
            now = time.perf_counter()
            longest, last = max(longest, now - last), now
        return longest, (await task)[0].metrics

    longest, metrics = asyncio.run(beat())
    whole = metrics.generated_tokens / metrics.tokens_per_second
    assert longest < whole / 4


def test_a_cancelled_task_and_a_closed_stream_free_their_slots(engine):
    async def leave():
        task = asyncio.ensure_future(engine.agenerate(["x"] * 3, ENDLESS))
        stream = engine.astream("x", ENDLESS)
        await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        async for _ in stream:
            break
        await stream.aclose()
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(engine.agenerate("x", ENDLESS), timeout=0.01)

    asyncio.run(leave())
    assert_serves(engine)


def test_a_loop_that_ends_frees_the_slots_of_its_streams(engine):
    async def begin():
        streams = [engine.astream("x", ENDLESS) for _ in range(5)]
        for stream in streams[:3]:
            await anext(stream)

    asyncio.run(begin())
    assert_serves(engine)


def test_a_paused_stream_delays_nobody(engine):
    async def pause():
        stream = engine.astream(PROMPTS[0], GREEDY)
        text = (await anext(stream)).text
        await engine.agenerate(PROMPTS[1], GREEDY)
        await asyncio.sleep(0.05)
        return text + await text_of(stream)

    assert asyncio.run(pause()) == engine.generate(PROMPTS[0], GREEDY).text


def test_bad_input_is_refused_at_the_call(engine):
    with pytest.raises(ValueError, match="the prompt is empty"):
        engine.astream("")
    with pytest.raises(ValueError, match="the prompt is empty"):
        asyncio.run(engine.agenerate(["x", ""]))
    assert_serves(engine)


def test_an_error_reaches_its_own_task_alone(engine, tokenizer):
    def fails(generated, logits):
        if len(generated) == 2:
            raise RuntimeError("processor broke")
        return dictate([5, 6, 7])[0](generated, logits)

    async def both():
        failing = SamplingParams(logits_processors=[fails])
        seen = []

        async def consume():
            async for delta in engine.astream("x", failing):
                seen.extend(delta.token_ids)

        return seen, await asyncio.gather(
            consume(), engine.agenerate("x", GREEDY), return_exceptions=True
        )

    seen, (error, output) = asyncio.run(both())
    assert seen == [5, 6]
    assert isinstance(error, RuntimeError)
    assert str(error) == "processor broke"
    assert output.token_ids == engine.generate("x", GREEDY).token_ids
    assert_serves(engine)


def test_closing_ends_every_task(folder):
    async def close_all():
        engine = Engine.from_pretrained(folder, max_batch_size=2, dtype="float32")
        tasks = [asyncio.ensure_future(engine.agenerate("x", ENDLESS)) for _ in range(4)]
        await asyncio.sleep(0.02)
        engine.close()
        with pytest.raises(RuntimeError, match="the engine is closed"):
            engine.astream("x")
        return await asyncio.gather(*tasks, return_exceptions=True)

    for error in asyncio.run(close_all()):
        assert isinstance(error, RuntimeError)
        assert "closed" in str(error)
