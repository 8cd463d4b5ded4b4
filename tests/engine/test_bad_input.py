"""Bad input: one clear line, and the engine still serves the next request."""

import _thread
import re

import numpy as np
import pytest
from engines import assert_serves, one_line, run_as_on_a_gpu, save_random_model

from gemcut.engine import Engine, SamplingParams

INF, NAN = float("inf"), float("nan")


@pytest.fixture(scope="module", params=["read-at-once", "read-late"])
def engine(folder, request):
    with Engine.from_pretrained(folder, max_batch_size=2, dtype="float32") as engine:
        if request.param == "read-late":
            run_as_on_a_gpu(engine)
        yield engine


BAD_PROMPTS = {
    "empty text": ("", "the prompt is empty"),
    "no ids": ([], "the prompt is empty"),
    "negative id": ([2, -1], "token id -1 in the prompt is outside 0..519"),
    "id past the vocabulary": ([2, 520], "token id 520 in the prompt is outside 0..519"),
    "id far past int64": ([2, 10**30], "is outside 0..519"),
    "fraction for an id": ([2, 1.5], "token id 1.5"),
    "bool for an id": ([True], "token id True"),
    "lone surrogate": ("a\ud800b", "U+D800"),
    "too long": ([5] * 128, "the prompt has 128 tokens and one to generate, but a slot holds 128"),
    "bytes": (b"abc", "neither a string nor a list"),
    "bytearray": (bytearray(b"abc"), "neither a string nor a list"),
    "none": (None, "neither a string nor a list"),
    "list of lists of lists": ([[[1]]], "not a list of lists"),
    "one bad prompt in a list": (["fine", ""], "the prompt is empty"),
}


@pytest.mark.parametrize("name", BAD_PROMPTS)
def test_bad_prompt(engine, name):
    prompt, message = BAD_PROMPTS[name]
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        engine.generate(prompt)
    one_line(error)
    assert_serves(engine)


@pytest.mark.parametrize("name", ["empty text", "id past the vocabulary", "too long"])
def test_bad_prompt_is_refused_when_a_stream_is_asked_for(engine, name):
    with pytest.raises(ValueError, match=re.escape(BAD_PROMPTS[name][1])):
        engine.stream(BAD_PROMPTS[name][0])
    assert_serves(engine)


def test_a_text_to_score_may_fill_the_slot_and_have_one_token_more(engine):
    assert len(engine.score([5] * 129).logprobs) == 128
    with pytest.raises(ValueError, match="130 tokens, but a slot of 128 scores 129"):
        engine.score([5] * 130)
    assert_serves(engine)


@pytest.mark.parametrize("start", [0, 4, -1, True, 1.5, "1", None, [1, 1]], ids=str)
def test_a_bad_start_of_a_score_is_refused(engine, start):
    with pytest.raises(ValueError, match="start"):
        engine.score([5, 6, 7, 8], start=start)
    with pytest.raises(ValueError, match="2 starts for 1 texts"):
        engine.score([[5, 6, 7]], start=[1, 2])
    assert_serves(engine)


def test_a_single_token_has_no_score_and_no_perplexity(engine):
    with pytest.raises(ValueError, match="at least two tokens"):
        engine.score([5])
    assert_serves(engine)


def test_numbers_of_numpy_are_numbers(engine):
    params = SamplingParams(
        max_tokens=np.int64(3),
        temperature=np.float32(0.5),
        seed=np.int64(-1),
        top_k=np.int32(5),
        stop_token_ids=[np.int64(7)],
        logit_bias={np.int64(9): np.float32(1.0)},
    )
    assert engine.generate(list(np.array([2, 5])), params).token_ids


def test_settings_are_those_of_construction():
    bias, stops = {5: 1.0}, ["a"]
    params = SamplingParams(logit_bias=bias, stop=stops)
    bias[6], stops[0] = "b", ""
    assert params.logit_bias == {5: 1.0}
    assert params.stop == ["a"]


BAD_PARAMS = {
    "n": [0, -1, 1.5, True, "2", 10**9],
    "temperature": [-0.1, INF, NAN, 1e39, 10**31, "hot", None],
    "top_k": [-2, 1.5, "all"],
    "top_p": [0, -0.5, 1.01, NAN],
    "min_p": [-0.1, 1.1, NAN],
    "max_tokens": [0, -5, 2.5, True],
    "min_tokens": [-1, 0.5, 2**63 - 1, 127],
    "stop": ["", ["a", ""], [1], 5, "\ud800"],
    "stop_token_ids": [[-1], [520], [1.0], 7, "12"],
    "seed": [1.5, 2**63, -(2**63) - 1, "x"],
    "logprobs": [-2, 521, 1.5],
    "prompt_logprobs": [-2, 521],
    "repetition_penalty": [0, -1, NAN, INF, 1e39],
    "presence_penalty": [NAN, INF, 1e39],
    "frequency_penalty": [NAN, -INF, -1e39],
    "logit_bias": [
        {-1: 1.0},
        {520: 1.0},
        {5: NAN},
        {5: INF},
        {5: 1e39},
        {"a": 1.0},
        {5: "b"},
        {5: np.ones(2)},
        [5],
    ],
    "ignore_eos": [1, None],
    "skip_special_tokens": ["yes"],
    "logits_processors": [["not callable"], 5],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in BAD_PARAMS.items() for value in values]
)
def test_bad_sampling_params_are_refused_by_name(engine, name, value):
    with pytest.raises(ValueError, match=name) as error:
        engine.generate("x", SamplingParams(**{name: value}))
    one_line(error)
    assert_serves(engine)


def test_min_tokens_over_max_tokens():
    with pytest.raises(ValueError, match="min_tokens 5 is above max_tokens 4"):
        SamplingParams(min_tokens=5, max_tokens=4)


def test_params_of_another_kind_and_of_another_number(engine):
    with pytest.raises(ValueError, match="must be a SamplingParams or a list, got dict"):
        engine.generate("x", {"temperature": 0})
    with pytest.raises(ValueError, match="or a list, got int"):
        engine.generate(["x"], 5)
    with pytest.raises(ValueError, match="1 SamplingParams for 2 prompts"):
        engine.generate(["x", "y"], [SamplingParams()])
    assert_serves(engine)


def test_a_failing_logits_processor_harms_its_own_request_alone(engine):
    def fails(generated, logits):
        if len(generated) == 3:
            raise RuntimeError("processor broke")
        return logits

    harmless = SamplingParams(seed=1, max_tokens=10, ignore_eos=True)
    alone = engine.generate("x", harmless)
    other = engine.stream("x", harmless)
    text = next(other).text
    with pytest.raises(RuntimeError, match="processor broke"):
        engine.generate("x", SamplingParams(ignore_eos=True, logits_processors=[fails]))
    assert text + "".join(d.text for d in other) == alone.text
    with pytest.raises(ValueError, match="must return a tensor of shape"):
        engine.generate("x", SamplingParams(logits_processors=[lambda ids, logits: logits[:5]]))
    assert_serves(engine)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0, logit_bias=dict.fromkeys(range(520), -INF)),
        SamplingParams(top_p=0.9, logit_bias=dict.fromkeys(range(520), -INF)),
        SamplingParams(logits_processors=[lambda generated, logits: logits * NAN]),
        SamplingParams(stop_token_ids=list(range(520)), min_tokens=2),
    ],
    ids=["banned-greedy", "banned-random", "nan", "all-end-too-early"],
)
def test_where_no_token_is_left_none_is_made_up(engine, params):
    other = engine.stream("x", SamplingParams(seed=1, max_tokens=5, ignore_eos=True))
    text = next(other).text
    with pytest.raises(ValueError, match="no token is left"):
        engine.generate("x", params)
    alone = engine.generate("x", SamplingParams(seed=1, max_tokens=5, ignore_eos=True))
    assert text + "".join(delta.text for delta in other) == alone.text
    assert_serves(engine)


def test_a_logits_processor_may_not_call_its_engine(engine):
    def calls(generated, logits):
        engine.score("It was")
        return logits

    other = engine.stream("x", SamplingParams(seed=1, max_tokens=5, ignore_eos=True))
    next(other)
    with pytest.raises(RuntimeError, match="must not call its own engine"):
        engine.generate("x", SamplingParams(logits_processors=[calls]))
    assert len(list(other)) == 4
    assert_serves(engine)


def test_one_failed_prompt_of_a_list_ends_the_list(engine):
    def fails(generated, logits):
        raise RuntimeError("at once")

    params = [SamplingParams(logits_processors=[fails]), SamplingParams(ignore_eos=True)]
    with pytest.raises(RuntimeError, match="at once"):
        engine.generate(["x", "y"], params)
    assert_serves(engine)


def test_ctrl_c_in_one_call_harms_no_other(engine):
    params = SamplingParams(seed=1, max_tokens=8, repetition_penalty=1.5, ignore_eos=True)
    alone = engine.generate("x", params)
    other = engine.stream("x", params)
    text = next(other).text

    def interrupts(generated, logits):  # in the engine's thread: the main one waits
        _thread.interrupt_main()
        return logits

    with pytest.raises(KeyboardInterrupt):
        engine.generate("y", SamplingParams(ignore_eos=True, logits_processors=[interrupts]))
    assert text + "".join(delta.text for delta in other) == alone.text
    assert_serves(engine)


def test_prompt_ids_without_a_piece_take_penalties(tmp_path, tokenizer_file):
    save_random_model(tmp_path, tokenizer_file, vocab_size=600)
    with Engine.from_pretrained(tmp_path, dtype="float32") as engine:
        params = SamplingParams(repetition_penalty=1.1, max_tokens=3)
        assert engine.generate([2, 599], params).token_ids


def test_system_turns_and_wrong_turns(engine):
    system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    with pytest.raises(ValueError, match="system"):
        engine.chat(system)
    assert engine.chat(system, SamplingParams(max_tokens=1), merge_system=True).token_ids
    with pytest.raises(ValueError, match="messages must be a list, got NoneType"):
        engine.chat(None)
    for messages in ([], [{"role": "model", "content": "Hi"}], [{"role": "user"}]):
        with pytest.raises(ValueError, match="message"):
            engine.chat(messages)
    assert_serves(engine)


def test_a_closed_engine_says_so(folder):
    engine = Engine.from_pretrained(folder, dtype="float32")
    stream = engine.stream("x", SamplingParams(ignore_eos=True))
    next(stream)
    engine.close()
    with pytest.raises(RuntimeError, match="closed"):
        list(stream)
    for call in (engine.generate, engine.stream, engine.score):
        with pytest.raises(RuntimeError, match="the engine is closed"):
            call("x")
    engine.close()
