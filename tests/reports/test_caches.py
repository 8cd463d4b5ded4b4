"""Caches and what holds them: cut, copied, pickled, saved, shared, and gone on with."""

import copy
import io
import pickle
import threading

import pytest
import torch
import transformers
from documented_twins import BATCH, MASKS, assert_close, random_ids, twins
from random_models import MODEL_TYPES

from gemcut.engine import transformers_api
from gemcut.engine.transformers_api import (
    AutoConfig,
    AutoTokenizer,
    DynamicCache,
    Gemma3TextConfig,
    StaticCache,
)

IDS = random_ids(length=12)
MASK = MASKS["left"][:, -12:]
NEW = random_ids(length=3, seed=5)
ONES = torch.ones_like(NEW)
by_family = pytest.mark.parametrize("model_type", MODEL_TYPES)


@pytest.fixture
def model():
    return twins("AutoModelForCausalLM", "gemma", tie_word_embeddings=False)[1]


def filled(model, mask=MASK, ids=IDS) -> DynamicCache:
    cache = DynamicCache()
    model(ids, attention_mask=mask, past_key_values=cache)
    return cache


def next_logits(model, cache, mask=MASK):
    whole = torch.cat([mask, torch.ones_like(mask[:, :3])], 1)
    return model(NEW[: len(mask)], attention_mask=whole, past_key_values=cache).logits


# Rows that ended at different steps


def real(new: torch.Tensor, eos: int) -> torch.Tensor:
    """1 up to a row's EOS, 0 for the padding behind it."""
    is_end = (new == eos).long()
    return (is_end.cumsum(1) - is_end == 0).long()


@by_family
@pytest.mark.parametrize("seed", range(4))
def test_a_second_turn_goes_on_where_rows_ended_at_different_steps(model_type, seed):
    sizes = {"eos_token_id": None, "max_position_embeddings": 128}
    theirs, ours = twins("AutoModelForCausalLM", model_type, tie_word_embeddings=False, **sizes)
    ids, mask = random_ids(length=12, seed=seed), MASK if seed % 2 else torch.ones_like(MASK)
    free = ours.generate(ids, attention_mask=mask, max_new_tokens=8)
    eos = int(free[seed % BATCH, 12 + seed % 3])
    settings = {"eos_token_id": eos, "pad_token_id": 0, "max_new_tokens": 8, "do_sample": False}
    cache, their_cache = DynamicCache(), transformers.DynamicCache(config=theirs.config)
    for turn in range(3):
        given = {"attention_mask": mask, **settings}
        actual = ours.generate(ids, past_key_values=cache, **given)
        assert torch.equal(actual, theirs.generate(ids, cache=their_cache, **given))
        assert torch.equal(actual, ours.generate(ids, **given))
        new = actual[:, ids.shape[1] :]
        more = random_ids(length=3, seed=turn)
        ids = torch.cat([actual, more], 1)
        mask = torch.cat([mask, real(new, eos), torch.ones_like(more)], 1)


def test_a_call_goes_on_too_with_the_ends_that_its_mask_shows():
    theirs, ours = twins("AutoModelForCausalLM", "gemma2", tie_word_embeddings=False)
    eos = int(ours.generate(IDS, max_new_tokens=6)[0, 13])
    settings = {"eos_token_id": eos, "pad_token_id": 0, "max_new_tokens": 6}
    for shows_padding in (False, True):
        cache, their_cache = DynamicCache(), transformers.DynamicCache(config=theirs.config)
        ids = ours.generate(IDS, past_key_values=cache, **settings)
        theirs.generate(IDS, cache=their_cache, **settings)
        seen = (
            torch.ones_like(ids)
            if shows_padding
            else torch.cat([torch.ones_like(IDS), real(ids[:, 12:], eos)], 1)
        )
        assert shows_padding == bool(seen.all())
        new = torch.cat([ids[:, -1:], NEW], 1)
        whole = torch.cat([seen, ONES], 1)
        actual = ours(new, attention_mask=whole, cache=cache, output_hidden_states=True)
        expected = theirs(new, attention_mask=whole, cache=their_cache, output_hidden_states=True)
        shown = whole[:, -4:]
        assert_close(actual.logits[shown.bool()], expected.logits[shown.bool()].detach())
        assert len(actual.hidden_states) == len(expected.hidden_states)
        assert actual.hidden_states[1].shape == expected.hidden_states[1].shape


# Methods of transformers


@by_family
@pytest.mark.parametrize("drop", [1, 4])
def test_crop(model_type, drop):
    _, ours = twins("AutoModelForCausalLM", model_type)
    for cut in (-drop, 12 - drop):
        cache = filled(ours)
        cache.crop(cut)
        assert cache.get_seq_length() == 12 - drop
        actual = next_logits(ours, cache, MASK[:, :-drop])
        expected = next_logits(ours, filled(ours, MASK[:, :-drop], IDS[:, :-drop]), MASK[:, :-drop])
        assert_close(actual, expected)
    cache.crop(99)
    assert cache.get_seq_length() == 15 - drop
    cache.crop(-99)
    assert (cache.get_seq_length(), cache.lengths) == (0, [0] * BATCH)


def test_crop_after_generate_keeps_no_late_token():
    _, ours = twins("AutoModelForCausalLM", "gemma2", tie_word_embeddings=False)
    eos = int(ours.generate(IDS, max_new_tokens=6)[0, 13])
    cache = DynamicCache()
    ours.generate(IDS, past_key_values=cache, eos_token_id=eos, pad_token_id=0, max_new_tokens=6)
    cache.crop(12)
    assert torch.equal(
        next_logits(ours, cache, torch.ones_like(IDS)),
        next_logits(ours, filled(ours, None), torch.ones_like(IDS)),
    )


def test_a_crop_that_needs_overwritten_tokens_is_refused():
    _, ours = twins("AutoModelForCausalLM", "gemma2", max_position_embeddings=2048)
    ids = random_ids(1, 600)
    cache = filled(ours, None, ids)
    cache.crop(590)  # the ring has room for a chunk beside its window
    assert_close(ours(ids[:, 590:], cache=cache).logits[:, -1], ours(ids).logits[:, -1])
    with pytest.raises(ValueError, match=r"cropped to 10 tokens: with sliding_window 5, \d+ older"):
        cache.crop(10)
    assert cache.get_seq_length() == 600


def test_rows_are_chosen_repeated_and_reordered(model):
    order = torch.tensor([2, 0, 2])
    cache = filled(model)
    cache.reorder_cache(order)
    expected = next_logits(model, filled(model, MASK[order], IDS[order]), MASK[order])
    assert torch.equal(next_logits(model, cache, MASK[order]), expected)
    for keep in (torch.tensor([2, 0]), torch.tensor([True, False, True])):
        cache = filled(model)
        cache.batch_select_indices(keep)
        rows = keep if keep.dtype != torch.bool else keep.nonzero().flatten()
        actual = next_logits(model, cache, MASK[rows])
        assert torch.equal(
            actual, next_logits(model, filled(model, MASK[rows], IDS[rows]), MASK[rows])
        )
    cache = filled(model)
    cache.batch_repeat_interleave(2)
    twice = torch.tensor([0, 0, 1])
    cache.batch_select_indices(torch.tensor([0, 1, 2]))
    assert torch.equal(
        next_logits(model, cache, MASK[twice]),
        next_logits(model, filled(model, MASK[twice], IDS[twice]), MASK[twice]),
    )
    with pytest.raises(ValueError, match="a row of the cache 7 is outside"):
        cache.reorder_cache(torch.tensor([7]))
    with pytest.raises(ValueError, match="no row of the cache is left"):
        cache.batch_select_indices(torch.tensor([False, False, False]))


def test_what_a_cache_tells_of_itself(model):
    cache = DynamicCache()
    assert (len(cache), cache.is_initialized, cache.batch_size) == (0, False, -1)
    cache.batch_repeat_interleave(2)  # of nothing
    model(IDS, cache=cache)
    assert (len(cache), cache.is_initialized, cache.batch_size) == (4, True, BATCH)
    assert not cache.is_compileable
    assert (cache.get_seq_length(), cache.get_max_length()) == (12, -1)
    assert StaticCache(model.config, 40).get_max_length() == 40
    cache.reset()
    assert cache.get_seq_length() == 0


def test_a_cache_made_with_a_place(model):
    given = {"max_batch_size": BATCH, "max_cache_len": 20, "device": "cpu"}
    cache = StaticCache(config=model.config, dtype=torch.float32, **given)
    assert torch.equal(model(IDS, cache=cache).logits, model(IDS).logits)
    with pytest.raises(ValueError, match=r"made for cpu and torch.bfloat16, but the model is"):
        model(IDS, cache=StaticCache(config=model.config, dtype=torch.bfloat16, **given))
    with pytest.raises(NotImplementedError, match="offloading=True is not supported"):
        DynamicCache(offloading=True)


def test_the_newer_name_of_past_key_values(model):
    cache = DynamicCache()
    out = model(IDS, cache=cache)
    assert out.cache is out.past_key_values is out["cache"] is cache
    assert "cache" in out
    assert torch.equal(
        model(NEW, cache=out.cache).logits, model(NEW, past_key_values=filled(model, None)).logits
    )
    out.cache = None
    assert out.past_key_values is None
    assert "past_key_values" not in out
    with pytest.raises(ValueError, match="two names of one argument"):
        model(NEW, cache=cache, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="cache is a tuple; give what an earlier call returned"):
        model(NEW, cache=())


# Copies


def copies(x) -> list:
    stored = io.BytesIO()
    torch.save(x, stored)
    stored.seek(0)
    loaded = torch.load(stored, weights_only=False)
    return [copy.copy(x), copy.deepcopy(x), pickle.loads(pickle.dumps(x)), loaded]


@pytest.mark.parametrize("kind", ["call", "generate"])
def test_a_copied_cache_is_another_one(model, kind):
    cache, mask = DynamicCache(), torch.ones_like(IDS)
    if kind == "generate":
        model.generate(IDS[:, :8], cache=cache, max_new_tokens=5)
        cache.crop(8)
    model(IDS[:, cache.get_seq_length() :], cache=cache)
    expected = next_logits(model, filled(model, mask), mask)
    for other in copies(cache):
        assert type(other) is DynamicCache
        assert other.runner is None
        assert_close(next_logits(model, other, mask), expected)
        assert cache.get_seq_length() == 12
    assert_close(next_logits(model, cache, mask), expected)


def test_outputs_with_a_loss(model):
    out = model(IDS, labels=IDS, output_hidden_states=True)
    logits = model(IDS).logits
    for other in copies(out):
        assert type(other) is type(out)
        assert torch.equal(other.logits, logits)
        assert torch.equal(other.loss, out.loss)
        assert list(other.keys()) == list(out.keys())


@by_family
@pytest.mark.parametrize("kind", ["AutoModelForCausalLM", "AutoModel"])
def test_models(model_type, kind):
    _, ours = twins(kind, model_type)
    if kind == "AutoModelForCausalLM":
        ours.generate(IDS, max_new_tokens=3)
    for other in copies(ours):
        assert torch.equal(other(IDS)[0], ours(IDS)[0])
        assert other.config == ours.config
        assert other._gemma.weights.lm_head is other._gemma.weights.embedding
    other = copy.deepcopy(ours)
    next(other.parameters()).zero_()
    assert next(ours.parameters()).count_nonzero() > 0


def test_configs_and_tokenizers():
    config = AutoConfig.from_pretrained("demo")
    tokenizer = AutoTokenizer.from_pretrained("demo")
    for other in copies(config):
        assert other == config
    for other in copies(Gemma3TextConfig()):
        assert other == Gemma3TextConfig()
    for other in copies(tokenizer):
        assert other("It was")["input_ids"] == tokenizer("It was")["input_ids"]
    ours = transformers_api.AutoModelForCausalLM.from_pretrained("demo")
    assert copy.deepcopy(ours).generation_config.to_dict() == ours.generation_config.to_dict()


# One cache, one call


def test_a_cache_in_use_is_refused(model):
    cache, refusals = DynamicCache(), []

    def again(ids, _):
        for call in (
            lambda: model(NEW, past_key_values=cache),
            lambda: model.generate(IDS, past_key_values=cache, max_new_tokens=1),
            lambda: cache.crop(1),
            cache.reset,
        ):
            with pytest.raises(ValueError, match="the cache is in use by another call") as refused:
                call()
            refusals.append(refused)
        return False

    expected = model.generate(IDS, max_new_tokens=3)
    given = {"past_key_values": cache, "max_new_tokens": 3}
    assert torch.equal(model.generate(IDS, stopping_criteria=[again], **given), expected)
    assert len(refusals) == 4 * 3
    cache.reset()
    thread = threading.Thread(target=lambda: model(IDS, past_key_values=cache))
    thread.start()
    thread.join()
    assert cache.get_seq_length() == 12


def test_a_cache_goes_from_one_model_to_another(model):
    """The steps of generate are those of the model that is called, not of the one before."""
    other = copy.deepcopy(model)
    for weight in other.parameters():
        weight.mul_(0.9)
    cache = DynamicCache()
    model.generate(IDS, past_key_values=cache, max_new_tokens=8)
    cache.reset()
    actual = other.generate(IDS, past_key_values=cache, max_new_tokens=8)
    assert torch.equal(actual, other.generate(IDS, max_new_tokens=8))
    assert not torch.equal(actual, model.generate(IDS, max_new_tokens=8))
