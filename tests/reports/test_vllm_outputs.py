"""Outputs and settings as programs written for vLLM read and make them."""

import copy
import math
import pickle
from dataclasses import replace

import pytest
from engines import assert_serves, dictate, one_line

from gemcut.engine import Engine, SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=6)


@pytest.fixture(scope="module")
def engine(folder):
    with Engine.from_pretrained(folder, max_batch_size=3, dtype="float32") as engine:
        yield engine


def test_an_output_says_that_it_has_finished_and_what_was_cached(engine):
    long = "The children walked to the river and sang of the summer."
    first, second = engine.generate(long, GREEDY), engine.generate(long, GREEDY)
    assert first.finished
    assert all(completion.finished() for completion in first.outputs)
    assert second.num_cached_tokens == len(second.prompt_token_ids) - 1
    first.outputs[0].finish_reason = None
    assert not first.finished


def test_all_log_probabilities_have_their_place_and_text(engine):
    params = SamplingParams(temperature=0, logprobs=-1, max_tokens=2)
    size = engine.config.vocab_size
    for entry in engine.generate("It was", params).outputs[0].logprobs:
        assert sorted(entry) == list(range(size))
        assert [one.rank for one in entry.values()] == list(range(1, size + 1))
        values = [one.logprob for one in entry.values()]
        assert values == sorted(values, reverse=True)
        for token_id, one in entry.items():
            text = engine.tokenizer.decode([token_id], skip_special_tokens=False)
            assert one.decoded_token == text
            assert pickle.loads(pickle.dumps(one)) == one


@pytest.mark.parametrize("count", [0, 3, -1])
def test_the_sampled_token_is_first_then_the_likeliest_by_rank(engine, count):
    last = engine.config.vocab_size - 1
    forced = [300, 5, last]
    params = SamplingParams(logprobs=count, max_tokens=3, logits_processors=dictate(forced))
    entries = engine.generate("It was", params).outputs[0].logprobs
    for token_id, entry in zip(forced, entries, strict=True):
        assert next(iter(entry)) == token_id
        ranks = [logprob.rank for id_, logprob in entry.items() if id_ != token_id]
        size = engine.config.vocab_size if count == -1 else count
        expected = list(range(1, size + 1))
        if entry[token_id].rank <= size:
            expected.remove(entry[token_id].rank)
        assert ranks == expected
    if count == -1:
        total = math.fsum(math.exp(logprob.logprob) for logprob in entries[0].values())
        assert len(entries[0]) == engine.config.vocab_size
        assert total == pytest.approx(1, abs=1e-5)


def test_prompt_logprobs_of_the_whole_vocabulary(engine):
    entries = engine.generate("It was", replace(GREEDY, prompt_logprobs=-1)).prompt_logprobs
    output = engine.generate("It was", replace(GREEDY, prompt_logprobs=0))
    assert entries[0] is output.prompt_logprobs[0] is None
    for token_id, all_of_them, alone in zip(
        output.prompt_token_ids[1:], entries[1:], output.prompt_logprobs[1:], strict=True
    ):
        assert list(alone) == [token_id] == list(all_of_them)[:1]
        assert len(all_of_them) == engine.config.vocab_size
        assert alone[token_id] == all_of_them[token_id]


def test_without_detokenize_there_are_ids_and_no_text(engine):
    params = replace(GREEDY, logprobs=1, prompt_logprobs=1)
    shown, plain = (
        engine.generate("a", params),
        engine.generate("a", replace(params, detokenize=False)),
    )
    assert plain.token_ids == shown.token_ids
    assert (plain.text, shown.text != "") == ("", True)
    texts = [
        logprob.decoded_token for entry in plain.outputs[0].logprobs for logprob in entry.values()
    ]
    texts += [logprob.decoded_token for logprob in plain.prompt_logprobs[1].values()]
    assert set(texts) == {None}
    with pytest.raises(ValueError, match="needs detokenize=True"):
        SamplingParams(stop="a", detokenize=False)


def test_allowed_token_ids_are_the_only_ones(engine):
    allowed = [40, 7, 300]
    greedy = engine.generate("It was", replace(GREEDY, allowed_token_ids=allowed))
    drawn = engine.generate(
        "a", SamplingParams(allowed_token_ids=allowed, max_tokens=60, temperature=9.0, seed=1)
    )
    assert set(greedy.token_ids) <= set(allowed) == set(drawn.token_ids)
    # a bias is added among them, and lets no other in
    biased = replace(GREEDY, allowed_token_ids=allowed, logit_bias={7: 90.0, 8: 95.0})
    assert set(engine.generate("a", biased).token_ids) == {7}


def test_the_next_request_of_a_slot_has_all_tokens_again(engine):
    other = SamplingParams(seed=1, max_tokens=9, logit_bias={5: -1.0})
    before = [output.token_ids for output in engine.generate(["a"] * 3, other)]
    engine.generate(["a"] * 3, replace(GREEDY, allowed_token_ids=[40, 7, 300]))
    assert [output.token_ids for output in engine.generate(["a"] * 3, other)] == before


@pytest.mark.parametrize("value", [[], [-1], [520], [1.5], 7, "12"], ids=str)
def test_bad_allowed_token_ids(engine, value):
    with pytest.raises(ValueError, match="allowed_token_ids") as error:
        engine.generate("a", SamplingParams(allowed_token_ids=value))
    one_line(error)
    assert_serves(engine)


def forced(tokens, **settings):
    """Settings that prefer these tokens one after another, and take another where one is banned."""

    def prefer(generated, logits):
        logits[tokens[len(generated)]] = 1000.0
        return logits

    return SamplingParams(
        temperature=0, max_tokens=len(tokens), logits_processors=[prefer], **settings
    )


@pytest.mark.parametrize(("word", "banned"), [("a", ["a", " a"]), ("user", [" user"])])
def test_a_word_of_one_token_is_never_chosen(engine, tokenizer, word, banned):
    for text in banned:
        (token_id,) = tokenizer.encode(text, add_bos=False)
        preferred = [token_id] * 3
        assert engine.generate("x", forced(preferred)).token_ids == preferred
        others = engine.generate("x", forced(preferred, bad_words=[word])).token_ids
        assert (len(others), token_id in others) == (3, False)


def test_a_longer_word_bans_its_last_token_after_the_others(engine, tokenizer):
    word = tokenizer.encode("bright cold morning", add_bos=False)
    assert len(word) > 2
    output = engine.generate("a", forced(word, bad_words=["bright cold morning"]))
    assert output.token_ids[:-1] == word[:-1]
    assert output.token_ids[-1] != word[-1]
    # its last token alone is free, and so is the word where its beginning stands in the prompt
    free = [word[-1], *word[:-1]]
    assert engine.generate("a", forced(free, bad_words=["bright cold morning"])).token_ids == free
    prompt = tokenizer.encode("a") + word[:-1]
    rest = engine.generate(prompt, forced(word[-1:], bad_words=["bright cold morning"]))
    assert rest.token_ids == word[-1:]


@pytest.mark.parametrize("value", ["xy", [""], [5], [" "], 7, ["\ud800"]], ids=ascii)
def test_bad_bad_words(engine, value):
    with pytest.raises(ValueError, match="bad_words") as error:
        engine.generate("a", SamplingParams(bad_words=value))
    one_line(error)
    assert_serves(engine)


def test_keys_of_a_bias_may_be_strings_as_in_json(engine):
    params = SamplingParams(temperature=0, max_tokens=3, logit_bias={"7": 100.0})
    assert params.logit_bias == {7: 100.0}
    assert engine.generate("a", params).token_ids == [7, 7, 7]
    with pytest.raises(ValueError, match="holds a token id twice"):
        SamplingParams(logit_bias={"7": 1.0, 7: 2.0})
    with pytest.raises(ValueError, match="logit_bias: id 'x'"):
        engine.generate("a", SamplingParams(logit_bias={"x": 1.0}))


def test_settings_can_be_assigned_and_are_checked_when_they_are_used(engine):
    params = engine.get_default_sampling_params()
    params.temperature, params.max_tokens = 0.0, 3
    assert engine.generate("a", params).token_ids == engine.generate("a", GREEDY).token_ids[:3]
    assert engine.get_default_sampling_params() == SamplingParams()  # a copy was changed
    with pytest.raises(AttributeError):
        params.max_token = 5
    params.top_p = 2.0
    with pytest.raises(ValueError, match=r"top_p 2\.0 must be at most 1"):
        engine.generate("a", params)


def test_a_request_keeps_the_settings_that_it_was_given(engine):
    params = replace(GREEDY, stop_token_ids=[])
    deltas = engine.stream("a", params)
    params.max_tokens = 1
    params.stop_token_ids += range(520)
    assert len(list(deltas)) == GREEDY.max_tokens


def test_settings_can_be_copied(engine):
    params = SamplingParams(seed=1, stop=["a"], logit_bias={5: 1.0}, bad_words=["b"])
    for copied in (
        params.clone(),
        replace(params),
        copy.deepcopy(params),
        pickle.loads(pickle.dumps(params)),
    ):
        assert copied == params
        copied.stop.append("b")
        copied.logit_bias[6] = 1.0
        assert copied != params
    assert SamplingParams.from_optional(temperature=None, n=2, stop=None) == SamplingParams(n=2)
    assert SamplingParams(seed=-1).seed is None


@pytest.mark.parametrize("name", ["best_of", "use_beam_search", "guided_decoding", "output_kind"])
def test_settings_that_are_not_here_are_refused_by_name(name):
    with pytest.raises(TypeError, match=name):
        SamplingParams(**{name: 1})
