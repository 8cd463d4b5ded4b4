"""Every output of the documented models is that of transformers, in float32."""

import pytest
import torch
from documented_twins import BATCH, LENGTH, MASKS, VOCAB, assert_close, random_ids, twins
from random_models import MODEL_TYPES

import gemcut.engine
from gemcut.engine import transformers_api
from gemcut.engine.transformers_api import DynamicCache, StaticCache

by_family = pytest.mark.parametrize("model_type", MODEL_TYPES)
by_mask = pytest.mark.parametrize("mask", MASKS)
CLASSIFIED = ["gemma", "gemma2", "gemma3_text"]


def masked(mask: str) -> dict:
    return {} if MASKS[mask] is None else {"attention_mask": MASKS[mask]}


def check(actual, expected, mask: str, *names: str) -> None:
    """These outputs agree in every column that holds a token."""
    for name in names:
        ours, theirs = actual[name], expected[name]
        if name == "attentions":  # [B, HQ, T, S]: the columns are the third axis
            ours, theirs = [[x.transpose(1, 2) for x in xs] for xs in (ours, theirs)]
        if not isinstance(theirs, tuple | list):
            ours, theirs = [ours], [theirs]
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert_close(one, other, MASKS[mask])


@by_family
@by_mask
@pytest.mark.parametrize("by_weights", [False, True], ids=["kernels", "with-attentions"])
@torch.no_grad()
def test_states_attentions_and_logits(model_type, mask, by_weights):
    theirs, ours = twins("AutoModelForCausalLM", model_type)
    asked = {"output_hidden_states": True, "use_cache": False, **masked(mask)}
    expected = theirs(random_ids(), output_attentions=True, **asked)
    actual = ours(random_ids(), output_attentions=by_weights, **asked)
    names = ["logits", "hidden_states"] + ["attentions"] * by_weights
    check(actual, expected, mask, *names)
    assert actual.logits.shape == (BATCH, LENGTH, VOCAB)
    assert (actual.attentions is not None) == by_weights
    assert actual.past_key_values is None


@by_family
@by_mask
@torch.no_grad()
def test_the_model_without_a_head(model_type, mask):
    theirs, ours = twins("AutoModel", model_type)
    expected, actual = (m(random_ids(), **masked(mask)) for m in (theirs, ours))
    check(actual, expected, mask, "last_hidden_state")


@pytest.mark.parametrize("kind", ["CausalLM", "SequenceClassification", "TokenClassification"])
@torch.no_grad()
def test_the_decoder_of_a_model_with_a_head(kind):
    theirs, ours = twins(f"AutoModelFor{kind}", "gemma2")
    expected = theirs.model(random_ids()).last_hidden_state
    assert type(ours.model).__name__ == type(theirs.model).__name__
    assert_close(ours.model(random_ids()).last_hidden_state, expected)
    assert set(ours.model.state_dict()) == set(theirs.model.state_dict())
    assert ours.model.num_parameters() == theirs.model.num_parameters()


@by_family
@by_mask
@torch.no_grad()
def test_positions_and_embeddings_that_the_caller_chose(model_type, mask):
    theirs, ours = twins("AutoModelForCausalLM", model_type)
    ids = random_ids()
    positions = torch.arange(LENGTH) * torch.tensor([[1], [2], [3]]) + 4
    chosen = {"position_ids": positions, "use_cache": True, **masked(mask)}
    check(ours(ids, **chosen), theirs(ids, **chosen), mask, "logits")
    embeds = theirs.get_input_embeddings()(ids)
    assert_close(ours.get_input_embeddings()(ids), embeds)
    given = {"inputs_embeds": embeds + 0.1, **masked(mask)}
    check(ours(**given), theirs(**given), mask, "logits")
    for_all = torch.arange(3, LENGTH + 3).unsqueeze(0)
    expected = theirs(ids, position_ids=for_all.expand(BATCH, -1), **masked(mask))
    check(ours(ids, position_ids=for_all, **masked(mask)), expected, mask, "logits")


@by_family
@torch.no_grad()
def test_sequences_packed_in_a_row(model_type):
    """Without a mask and a cache, positions that restart begin a new sequence."""
    theirs, ours = twins("AutoModelForCausalLM", model_type)
    positions = torch.stack(
        [torch.cat([torch.arange(n), torch.arange(LENGTH - n)]) for n in (7, 1, LENGTH)]
    )
    given = {"position_ids": positions, "use_cache": False}
    expected, actual = (m(random_ids(), **given) for m in (theirs, ours))
    check(actual, expected, "none", "logits")
    alone = ours(random_ids()[:1, 7:], use_cache=False)
    assert_close(actual.logits[:1, 7:], alone.logits)


@by_family
@by_mask
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda m: m.init_cache(BATCH, LENGTH), id="static"),
        pytest.param(lambda m: DynamicCache(config=m.config), id="growing"),
        pytest.param(lambda m: StaticCache(m.config, max_cache_len=50), id="lazy"),
        pytest.param(lambda m: None, id="from-the-first-call"),
    ],
)
@torch.no_grad()
def test_a_cache_goes_on_with_the_new_ids_alone(model_type, mask, make):
    theirs, ours = twins("AutoModelForCausalLM", model_type)
    ids = random_ids()
    cache, their_cache, begin = make(ours), None, 0
    for end in (9, 10, 11, LENGTH):

        def call(model, past, begin=begin, end=end):
            seen = {} if MASKS[mask] is None else {"attention_mask": MASKS[mask][:, :end]}
            return model(ids[:, begin:end], past_key_values=past, use_cache=True, **seen)

        actual, expected = call(ours, cache), call(theirs, their_cache)
        seen = None if MASKS[mask] is None else MASKS[mask][:, begin:end]
        assert_close(actual.logits, expected.logits, seen)
        cache, their_cache, begin = actual.past_key_values, expected.past_key_values, end
        assert cache.get_seq_length() == end


@by_family
@torch.no_grad()
def test_a_cache_grows_past_its_first_memory_and_rings_turn(model_type):
    theirs, ours = twins("AutoModelForCausalLM", model_type, max_position_embeddings=2048)
    ids = random_ids(2, 700)
    cache = ours(ids[:, :250]).past_key_values
    first = cache.kv.max_seq_len
    ours(ids[:, 250:530], past_key_values=cache)
    actual = ours(ids[:, 530:], past_key_values=cache).logits
    assert cache.kv.max_seq_len > first
    assert_close(actual, theirs(ids).logits[:, 530:])


@torch.no_grad()
def test_a_later_mask_hides_what_is_in_the_cache():
    theirs, ours = twins("AutoModelForCausalLM", "gemma2")
    ids, mask = random_ids(), torch.ones(BATCH, LENGTH, dtype=torch.int64)
    mask[0, 4:7], mask[1, 13] = 0, 0
    results = []
    for model in (theirs, ours):
        past = model(ids[:, :15], use_cache=True).past_key_values
        results.append(model(ids[:, 15:], past_key_values=past, attention_mask=mask).logits)
    assert_close(results[1], results[0])


LOGITS_TO_KEEP = {
    "all": 0,
    "last": 1,
    "last-few": 7,
    "columns": torch.tensor([0, 5, 19, 5]),
    "from-the-end": torch.tensor([-1, -3]),
    "of-each-row": torch.tensor([[1, 2], [19, 0], [7, 7]]),
    "by-bool": random_ids() % 3 == 0,
}


@by_family
@pytest.mark.parametrize("which", LOGITS_TO_KEEP)
@torch.no_grad()
def test_logits_to_keep(model_type, which):
    theirs, ours = twins("AutoModelForCausalLM", model_type)
    kept = LOGITS_TO_KEEP[which]
    expected, actual = (m(random_ids(), logits_to_keep=kept).logits for m in (theirs, ours))
    assert_close(actual, expected)


@by_family
@by_mask
@torch.no_grad()
def test_the_loss_of_the_next_token(model_type, mask):
    theirs, ours = twins("AutoModelForCausalLM", model_type)
    labels = random_ids(seed=1)
    labels[torch.rand(BATCH, LENGTH) < 0.2] = -100
    if MASKS[mask] is not None:  # transformers has a state at padding, gemcut has none
        before = torch.cat([torch.ones(BATCH, 1), MASKS[mask][:, :-1]], dim=1)
        labels[before == 0] = -100
    given = {"labels": labels, **masked(mask)}
    expected, actual = (m(random_ids(), **given) for m in (theirs, ours))
    assert actual.loss.dtype == torch.float32
    assert_close(actual.loss, expected.loss)
    loss, logits = actual[:2]
    assert loss is actual.loss
    assert_close(logits, expected.logits, MASKS[mask])


@torch.no_grad()
def test_labels_of_the_logits_that_are_kept():
    theirs, ours = twins("AutoModelForCausalLM", "gemma2")
    given = {"labels": random_ids(seed=1)[:, -6:], "logits_to_keep": 6}
    assert_close(ours(random_ids(), **given).loss, theirs(random_ids(), **given).loss)


def test_no_label_is_no_number():
    _, ours = twins("AutoModelForCausalLM", "gemma")
    assert ours(random_ids(), labels=torch.full((BATCH, LENGTH), -100)).loss.isnan()


def padded_ids(side: str) -> torch.Tensor:
    ids = random_ids()
    return ids if MASKS[side] is None else ids * MASKS[side]  # pad_token_id is 0


LABELS = {
    "single-label": (4, torch.tensor([3, 0, 2])),
    "multi-label": (4, (random_ids(BATCH, 4) % 2).float()),
    "regression": (1, torch.tensor([0.5, -2.0, 3.0])),
    "regression-of-columns": (1, torch.tensor([[0.5], [-2.0], [3.0]])),
}


@pytest.mark.parametrize("model_type", CLASSIFIED)
@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("problem", LABELS)
@torch.no_grad()
def test_texts_are_classified(model_type, side, problem):
    count, labels = LABELS[problem]
    theirs, ours = twins("AutoModelForSequenceClassification", model_type, num_labels=count)
    theirs.config.problem_type = None  # it keeps what it has guessed
    given = {"labels": labels, **masked(side)}
    expected, actual = (m(padded_ids(side), **given) for m in (theirs, ours))
    assert actual.logits.shape == (BATCH, count)
    assert_close(actual.logits, expected.logits)
    assert_close(actual.loss, expected.loss)


@torch.no_grad()
def test_several_numbers_by_regression():
    theirs, ours = twins(
        "AutoModelForSequenceClassification", "gemma", num_labels=2, problem_type="regression"
    )
    labels = torch.randn(BATCH, 2)
    assert_close(ours(random_ids(), labels=labels).loss, theirs(random_ids(), labels=labels).loss)


@torch.no_grad()
def test_a_text_given_as_embeddings_is_read_at_its_last_token():
    theirs, ours = twins("AutoModelForSequenceClassification", "gemma2", num_labels=4)
    ids = random_ids()
    expected = theirs(ids).logits
    embeds = ours.get_input_embeddings()(ids)
    assert_close(ours(inputs_embeds=embeds).logits, expected)
    # unlike transformers, which reads the last column even where it is padding
    longer = torch.cat([embeds, torch.zeros(BATCH, 3, embeds.shape[2])], dim=1)
    mask = torch.arange(LENGTH + 3).expand(BATCH, -1) < LENGTH
    assert_close(ours(inputs_embeds=longer, attention_mask=mask).logits, expected)


@pytest.mark.parametrize("model_type", ["gemma", "gemma2"])
@by_mask
@torch.no_grad()
def test_tokens_are_classified(model_type, mask):
    theirs, ours = twins("AutoModelForTokenClassification", model_type, num_labels=5)
    labels = random_ids(seed=2) % 5
    labels[0, 7:9] = -100
    if MASKS[mask] is not None:
        labels[MASKS[mask] == 0] = -100
    given = {"labels": labels, **masked(mask)}
    expected, actual = (m(random_ids(), **given) for m in (theirs, ours))
    seen = torch.ones(BATCH, LENGTH) if MASKS[mask] is None else MASKS[mask]
    assert_close(actual.logits[seen.bool()], expected.logits[seen.bool()])
    assert_close(actual.loss, expected.loss)


@pytest.mark.parametrize("rope_type", ["dynamic", "yarn", "longrope", "llama3", "linear"])
@torch.no_grad()
def test_every_kind_of_rotation_in_a_ragged_batch(rope_type):
    """Frequencies that depend on the length see the longest row's, as in transformers."""
    rope = {
        "dynamic": {"factor": 2.0},
        "linear": {"factor": 2.0},
        "yarn": {"factor": 4.0, "original_max_position_embeddings": 8},
        "llama3": {
            "factor": 4.0,
            "original_max_position_embeddings": 8,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        },
        "longrope": {
            "original_max_position_embeddings": 8,
            "short_factor": [1.0 + i / 8 for i in range(8)],
            "long_factor": [2.0 + i for i in range(8)],
        },
    }[rope_type]
    rope |= {"rope_type": rope_type, "rope_theta": 10000.0}
    sizes = {"rope_parameters": rope, "max_position_embeddings": 16}
    theirs, ours = twins("AutoModelForCausalLM", "gemma2", **sizes)
    given = masked("left")
    check(ours(random_ids(), **given), theirs(random_ids(), **given), "left", "logits")


@by_family
@torch.no_grad()
def test_bfloat16_errs_no_more_than_twice_what_transformers_does(model_type, tmp_path):
    theirs, ours = twins("AutoModelForCausalLM", model_type)
    theirs.save_pretrained(tmp_path)
    # not `.bfloat16()`, which rounds the rotation's frequencies
    low = type(theirs).from_pretrained(tmp_path, dtype=torch.bfloat16, attn_implementation="eager")
    exact, theirs = theirs(random_ids()).logits, low(random_ids()).logits.float()
    model = type(ours).from_pretrained(tmp_path, dtype=torch.bfloat16)
    actual = model(random_ids())
    assert actual.logits.dtype == torch.float32
    assert (actual.logits - exact).abs().max() <= 2 * (theirs - exact).abs().max()
    states = model(random_ids(), output_hidden_states=True).hidden_states
    assert all(x.dtype == torch.bfloat16 for x in states)


def test_every_documented_name_is_in_the_engine():
    for name in transformers_api.__all__:
        assert getattr(gemcut.engine, name) is getattr(transformers_api, name)
        assert name in gemcut.engine.__all__
