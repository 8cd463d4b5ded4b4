"""What `generate` chooses and returns, beside transformers', for settings of all kinds."""

import random
import threading

import pytest
import torch
import transformers
from documented_twins import VOCAB, assert_close, random_ids, twins
from random_models import MODEL_TYPES
from transformers import (
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TopKLogitsWarper,
)

LENGTH = 10
GREEDY = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
WHOLE = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
STATES = {"return_dict_in_generate": True, "output_attentions": True, "output_hidden_states": True}


def pair_of(model_type: str = "gemma3_text"):
    return twins("AutoModelForCausalLM", model_type, tie_word_embeddings=False, eos_token_id=None)


@pytest.fixture
def pair():
    return pair_of()


def both(pair, ids, **settings):
    return [model.generate(ids, **settings) for model in pair]


def assert_same_scores(actual, expected) -> None:
    """Within 1e-4 of the scale where they are finite; infinite at the same places."""
    assert len(actual) == len(expected)
    for ours, theirs in zip(actual, expected, strict=True):
        finite = theirs.isfinite() & (theirs.abs() < 1e30)
        assert torch.equal(ours.isfinite() & (ours.abs() < 1e30), finite)
        if finite.any():
            assert_close(ours[finite], theirs[finite])


class TestSettings:
    @pytest.mark.parametrize(
        "settings",
        [
            {"bad_words_ids": [[t] for t in range(4, 50)] + [[60, 61]]},
            {"suppress_tokens": list(range(4, 60))},
            {"begin_suppress_tokens": list(range(4, 90))},
            {"no_repeat_ngram_size": 1},
            {"sequence_bias": [[[t], 9.0] for t in range(20)]},
            {"sequence_bias": {(t,): 9.0 for t in range(20)}},
            {"forced_eos_token_id": 7},
            {"renormalize_logits": True},
            {"exponential_decay_length_penalty": (2, 1.5), "eos_token_id": [7, 8]},
            {"remove_invalid_values": True, "bad_words_ids": [[t] for t in range(VOCAB)]},
            {"prefix_allowed_tokens_fn": lambda b, ids: [5 + b, 9 + len(ids), 60]},
            {"use_cache": False},
            {"logits_to_keep": 1},
            {"position_ids": torch.arange(3, 3 + LENGTH).expand(2, -1)},
            {"max_time": 1e9},
        ],
        ids=lambda settings: next(iter(settings)),
    )
    def test_each_acts_as_there(self, pair, settings):
        ids = random_ids(2, LENGTH)
        expected, actual = both(pair, ids, **GREEDY | WHOLE | settings)
        assert torch.equal(actual.sequences, expected.sequences)
        if "eos_token_id" not in settings:
            assert_same_scores(actual.scores, expected.scores)
            assert_same_scores(actual.logits, expected.logits)

    def test_from_the_bos_alone(self, pair):
        expected, actual = both(pair, None, bos_token_id=2, forced_bos_token_id=7, **GREEDY)
        assert torch.equal(actual, expected)
        assert actual[0, :2].tolist() == [2, 7]

    def test_embeddings_beside_ids(self, pair):
        ids = random_ids(2, LENGTH)
        embeds = pair[0].get_input_embeddings()(random_ids(2, LENGTH, seed=5))
        given = {"inputs_embeds": embeds, "repetition_penalty": 1.5, "no_repeat_ngram_size": 1}
        expected, actual = both(pair, ids, **given, **GREEDY)
        assert torch.equal(actual, expected)
        expected, actual = both(pair, None, **given, **GREEDY)
        assert torch.equal(actual, expected)

    def test_time_is_up(self, pair):
        assert pair[1].generate(random_ids(1, LENGTH), max_time=1e-9).shape[1] == LENGTH + 1

    @pytest.mark.parametrize("settings", [{}, {"do_sample": True, "temperature": 2.0}])
    def test_drafts_change_no_token(self, pair, settings):
        ids = random_ids(1, 4).repeat(1, 5)
        chosen = []
        for more in ({}, {"prompt_lookup_num_tokens": 10}):
            torch.manual_seed(0)
            streamed = []
            asked = {**GREEDY, "max_new_tokens": 40, **settings, **more}
            shown = {"streamer": Recorder(streamed), "stopping_criteria": [over(50)]}
            chosen.append(pair[1].generate(ids, **asked, **shown))
            assert torch.cat(streamed).tolist() == chosen[-1][0].tolist()
        assert torch.equal(*chosen)
        assert chosen[0].shape[1] == 50


@pytest.mark.parametrize(
    "settings",
    [
        {"prefix_allowed_tokens_fn": lambda b, ids: [4, 5, 6]},
        {"stopping_criteria": [lambda ids, scores: ids[:, -1] % 3 == 0]},
        {"stopping_criteria": [lambda ids, scores: False], "suppress_tokens": [4, 5]},
        {"do_sample": True, "typical_p": 0.5, "eta_cutoff": 0.1, "top_h": 0.5},
    ],
)
def test_torchs_default_device_changes_nothing(pair, settings):
    chosen = []
    for place in ("cpu", "meta"):
        torch.manual_seed(0)
        ids = random_ids(2, LENGTH)
        torch.set_default_device(place)
        try:
            chosen.append(pair[1].generate(ids, **GREEDY | settings))
        finally:
            torch.set_default_device(None)
    assert torch.equal(*chosen)


class Recorder:
    def __init__(self, seen: list):
        self.seen = seen

    def put(self, ids):
        self.seen.append(ids.flatten())

    def end(self):
        pass


def over(length: int):
    return lambda ids, scores: torch.full((len(ids),), ids.shape[1] >= length)


class TestOutputs:
    @pytest.mark.parametrize("model_type", MODEL_TYPES)
    @pytest.mark.parametrize("use_cache", [True, False])
    def test_states_of_every_step(self, model_type, use_cache):
        settings = GREEDY | STATES | {"use_cache": use_cache, "max_new_tokens": 4}
        expected, actual = both(pair_of(model_type), random_ids(2, LENGTH), **settings)
        assert torch.equal(actual.sequences, expected.sequences)
        for name in ("attentions", "hidden_states"):
            for ours, theirs in zip(actual[name], expected[name], strict=True):
                for x, y in zip(ours, theirs, strict=True):
                    assert_close(x, y)
        assert ("past_key_values" in actual) == use_cache

    def test_the_returned_cache_goes_on(self, pair):
        ids = random_ids(2, LENGTH)
        first = pair[1].generate(ids, return_dict_in_generate=True, **GREEDY)
        again = torch.cat([first.sequences, random_ids(2, 3, seed=7)], dim=1)
        assert first.past_key_values.get_seq_length() == first.sequences.shape[1] - 1
        asked = {**GREEDY, "attention_mask": torch.ones_like(again)}
        longer = pair[1].generate(again, past_key_values=first.past_key_values, **asked)
        assert torch.equal(longer, pair[0].generate(again, **asked))
        other = pair[1].generate(ids, return_dict_in_generate=True, **GREEDY)
        assert other.past_key_values is not first.past_key_values

    def test_the_cache_by_its_newer_name(self, pair):
        ids, cache = random_ids(1, LENGTH), pair[1].init_cache(1, 40)
        pair[1].generate(ids, cache=cache, **GREEDY)
        assert cache.get_seq_length() == LENGTH + 11
        with pytest.raises(ValueError, match="past_key_values and cache are two names"):
            pair[1].generate(ids, cache=cache, past_key_values=pair[1].init_cache(1, 40))

    def test_transition_scores(self, pair):
        ids = random_ids(2, LENGTH)
        for normalize in (False, True):
            theirs, ours = (
                model.compute_transition_scores(
                    (out := model.generate(ids, **GREEDY | WHOLE)).sequences,
                    out.scores,
                    normalize_logits=normalize,
                )
                for model in pair
            )
            assert_close(ours, theirs)


class TestProcessorsAndCriteria:
    def test_they_see_the_whole_batch_and_its_padding(self, pair):
        ids, mask = random_ids(2, LENGTH), torch.ones(2, LENGTH, dtype=torch.int64)
        mask[0, :4] = 0
        seen = []

        def note(ids, scores):
            seen.append((ids.tolist(), tuple(scores.shape)))
            return scores

        def criterion(ids, scores):
            seen.append((ids.tolist(), len(scores)))
            return False

        given = {"attention_mask": mask, "logits_processor": [note], **GREEDY, **WHOLE}
        records = []
        for model in pair:
            seen.clear()
            model.generate(ids, stopping_criteria=[criterion], **given)
            records.append(list(seen))
        assert records[0] == records[1]

    def test_they_run_between_rules_and_filters_as_there(self, pair):
        """A custom one sees what the rules have left, and what sampling cuts comes after it."""
        ids, records = random_ids(2, LENGTH), []
        for model in pair:
            seen = []

            def note(ids, scores, seen=seen):
                seen.append(scores.isneginf().sum(1).tolist())
                return scores

            model.generate(
                ids,
                logits_processor=LogitsProcessorList([note]),
                do_sample=True,
                top_k=1,
                suppress_tokens=[5, 6, 7],
                max_new_tokens=3,
            )
            records.append(seen)
        assert records[0] == records[1] == [[3, 3]] * 3

    def test_one_of_a_rules_class_takes_its_place(self, pair):
        custom = {"logits_processor": LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.1)])}
        expected, actual = both(
            pair, random_ids(2, LENGTH), repetition_penalty=3.0, **custom, **GREEDY
        )
        assert torch.equal(actual, expected)

    def test_without_any_end_rows_go_on_until_all_are_ended(self, pair):
        stop = {"stopping_criteria": [lambda ids, scores: ids[:, -1] % 3 == 0]}
        expected, actual = both(pair, random_ids(3, LENGTH), **stop, **GREEDY)
        assert torch.equal(actual, expected)

    def test_an_infinite_score_forces_a_token(self, pair):
        def force(ids, scores):
            scores[:, ids.shape[1]] = torch.inf
            return scores

        expected, actual = both(pair, random_ids(1, LENGTH), logits_processor=[force], **GREEDY)
        assert torch.equal(actual, expected)

    def test_a_criterion_may_generate_itself(self, pair):
        ids = random_ids(1, LENGTH)
        inner = []

        def criterion(ids, scores):
            inner.append(pair[1].generate(ids, max_new_tokens=1))
            return False

        settings = {**GREEDY, "max_new_tokens": 5}
        outer = pair[1].generate(ids, stopping_criteria=[criterion], **settings)
        assert torch.equal(outer, pair[0].generate(ids, **settings))
        for count, one in enumerate(inner[:-1], start=1):
            assert torch.equal(one, outer[:, : LENGTH + count + 1])

    def test_beside_a_streamers_thread(self, pair, twin):
        streamer = transformers.TextIteratorStreamer(twin)
        ids = random_ids(1, LENGTH)
        given = {"streamer": streamer, **GREEDY}
        thread = threading.Thread(target=pair[1].generate, args=(ids,), kwargs=given)
        thread.start()
        others = [pair[1].generate(ids, **GREEDY) for _ in range(3)]
        text = "".join(streamer)
        thread.join()
        assert text == twin.decode(others[0][0])


def random_settings(chance: random.Random, rows: int) -> dict:
    """Settings of all kinds, each with some probability."""

    def some(p: float = 0.2) -> bool:
        return chance.random() < p

    def ids(count: int) -> list[int]:
        return chance.sample(range(VOCAB), count)

    new = chance.randint(1, 12)
    settings: dict = {"pad_token_id": chance.choice([0, 3]), "max_new_tokens": new}
    settings["eos_token_id"] = chance.choice([None, 1, ids(1)[0], ids(12), ids(30)])
    choices = {
        "repetition_penalty": [1.3, 0.8],
        "no_repeat_ngram_size": [1, 2],
        "bad_words_ids": [[[t] for t in ids(20)] + [ids(2)]],
        "sequence_bias": [[[ids(chance.choice([1, 2])), chance.uniform(-8, 8)] for _ in range(9)]],
        "suppress_tokens": [ids(30)],
        "begin_suppress_tokens": [ids(60)],
        "renormalize_logits": [True],
        "min_new_tokens": [chance.randint(0, new)],
        "min_length": [chance.randint(0, 20)],
        "use_cache": [False],
        "prefix_allowed_tokens_fn": [lambda b, i: range((b + len(i)) % 2, VOCAB, 2)],
        "stopping_criteria": [[lambda i, scores: i[:, -1] % 5 == 0]],
        "logits_processor": [
            LogitsProcessorList([processor])
            for processor in (
                TopKLogitsWarper(3),
                NoRepeatNGramLogitsProcessor(2),
                SuppressTokensLogitsProcessor([5, 6, 7]),
                RepetitionPenaltyLogitsProcessor(1.4),
                MinLengthLogitsProcessor(LENGTH, [8, 9]),
            )
        ],
    }
    settings |= {name: chance.choice(values) for name, values in choices.items() if some()}
    if some(0.3):
        filters = {"top_k": [0, 3], "top_p": [0.5, 0.9], "min_p": [0.1], "typical_p": [0.5]}
        filters |= {"epsilon_cutoff": [0.05], "eta_cutoff": [0.1], "top_h": [0.5]}
        filters |= {"temperature": [0.7, 1.5], "num_return_sequences": [2]}
        settings |= {name: chance.choice(x) for name, x in filters.items() if some(0.3)}
        settings["do_sample"] = True
    elif rows == 1 and settings.get("use_cache") is not False and some(0.3):
        settings["prompt_lookup_num_tokens"] = chance.choice([2, 10])
    return settings


@pytest.mark.parametrize("seed", range(60))
def test_random_calls(seed, monkeypatch):
    """Transformers draws what gemcut drew: what is compared are scores, and how a text goes on."""
    chance = random.Random(seed)
    theirs, ours = pair_of(MODEL_TYPES[seed % len(MODEL_TYPES)])
    rows, columns = chance.randint(1, 3), chance.randint(2, LENGTH)
    ids, mask = random_ids(rows, columns, seed), torch.ones(rows, columns, dtype=torch.int64)
    for row in range(1, rows):
        mask[row, : chance.randint(0, columns - 1)] = 0
    settings = random_settings(chance, rows) | WHOLE | {"attention_mask": mask}
    actual = ours.generate(ids, **settings)
    drawn = iter(actual.sequences[:, columns:].unsqueeze(-1).unbind(1))
    monkeypatch.setattr(torch, "multinomial", lambda probabilities, num_samples: next(drawn))
    expected = theirs.generate(ids, **settings)
    assert torch.equal(actual.sequences, expected.sequences)
    ends = torch.tensor(settings["eos_token_id"] or [], dtype=torch.int64)
    new = actual.sequences[:, columns:]
    over = torch.isin(new, ends)
    if len(ends.flatten()):
        for criterion in settings.get("stopping_criteria", []):
            over |= criterion(new.reshape(-1, 1), None).view(new.shape)
    goes_on = over.cumsum(1) - over.long() == 0  # rows that have ended are not computed
    for name in ("scores", "logits"):
        shown = zip(actual[name], expected[name], goes_on.unbind(1), strict=True)
        for x, y, live in shown:
            assert_same_scores([x[live]], [y[live]])
