"""Arguments of a model's call and of its helpers as programs give them, beside transformers'."""

import copy

import pytest
import torch
import transformers
from documented_twins import BATCH, LENGTH, MASKS, VOCAB, assert_close, random_ids, twins
from random_models import MODEL_TYPES

from gemcut.engine import transformers_api
from gemcut.engine.transformers_api import AutoModelForCausalLM, Gemma2Config

IDS = random_ids()
by_family = pytest.mark.parametrize("model_type", MODEL_TYPES)


@by_family
def test_labels_that_hide_padding_on_the_left(model_type):
    """Nothing is before a row's first token: transformers predicts it from a pad, which depends on
    its attention ("eager" or "sdpa"); here it does not count.
    """
    theirs, ours = twins("AutoModelForCausalLM", model_type)
    mask = MASKS["left"]
    labels = IDS.masked_fill(mask == 0, -100)
    counted = labels.clone()
    for row in range(BATCH):
        if (first := int(mask[row].argmax())) > 0:
            counted[row, first] = -100
    expected = theirs(IDS, attention_mask=mask, labels=counted).loss.detach()
    for given in (labels, counted):
        assert_close(ours(IDS, attention_mask=mask, labels=given).loss, expected)
    last = {"labels": labels[:, -12:], "logits_to_keep": 12, "attention_mask": mask}
    assert ours(IDS, **last).loss.isfinite()
    right = MASKS["right"]
    labels = IDS.masked_fill(right == 0, -100)
    given = {"attention_mask": right, "labels": labels}
    assert_close(ours(IDS, **given).loss, theirs(IDS, **given).loss.detach())


MASKS_OF_SIGHT = {  # whose hidden columns are after a token, and near one where there is a window
    "hole": torch.ones(BATCH, LENGTH, dtype=torch.int64).index_fill(1, torch.tensor([7, 8]), 0),
    "end": torch.ones(BATCH, LENGTH, dtype=torch.int64).index_fill(1, torch.tensor([18, 19]), 0),
}


@by_family
@pytest.mark.parametrize("kind", ["CausalLM", "SequenceClassification", "TokenClassification"])
@pytest.mark.parametrize("mask", MASKS_OF_SIGHT.values(), ids=MASKS_OF_SIGHT)
def test_labels_and_answers_at_hidden_columns(model_type, kind, mask):
    """A label there counts as in transformers; what sees no token at all is still an error."""
    auto_class = f"AutoModelFor{kind}"
    if model_type not in getattr(transformers_api, auto_class).classes:
        return
    theirs, ours = twins(
        auto_class, model_type, **({} if kind == "CausalLM" else {"num_labels": 3})
    )
    labels = {
        "CausalLM": IDS,
        "SequenceClassification": torch.tensor([0, 2, 1]),
        "TokenClassification": IDS % 3,
    }[kind]
    given = {"attention_mask": mask, "labels": labels}
    actual, expected = ours(IDS, **given), theirs(IDS, **given)
    assert_close(actual.loss, expected.loss.detach())
    last = -1 if kind == "CausalLM" else None  # whose state no label asks for
    assert_close(actual.logits[:, :last], expected.logits[:, :last].detach())
    if kind != "SequenceClassification":
        with pytest.raises(ValueError, match="column 0 of row 0, which attention_mask hides with"):
            ours(IDS, attention_mask=MASKS["left"], labels=labels)


@pytest.mark.parametrize("count", [7, torch.tensor(7.0), torch.tensor(7)])
def test_num_items_in_batch(count):
    theirs, ours = twins("AutoModelForCausalLM", "gemma2")
    given = {"labels": IDS, "num_items_in_batch": count}
    assert_close(ours(IDS, **given).loss, theirs(IDS, **given).loss.detach())


@by_family
@pytest.mark.parametrize("keep", [0, 1, 5, torch.tensor([3, 4, 19]), torch.tensor([-1])])
def test_logits_to_keep(model_type, keep):
    theirs, ours = twins("AutoModelForCausalLM", model_type)
    actual, expected = (m(IDS, logits_to_keep=keep).logits for m in (ours, theirs))
    assert_close(actual, expected.detach())


@by_family
def test_given_positions(model_type):
    theirs, ours = twins("AutoModelForCausalLM", model_type)
    positions = (MASKS["left"].cumsum(-1) - 1).clamp(min=0)
    given = {"attention_mask": MASKS["left"], "position_ids": positions}
    actual, expected = (m(IDS, **given).logits for m in (ours, theirs))
    seen = MASKS["left"].bool()
    assert_close(actual[seen], expected[seen].detach())
    shared = torch.arange(3, 3 + LENGTH).unsqueeze(0)
    actual, expected = (m(IDS, position_ids=shared).logits for m in (ours, theirs))
    assert_close(actual, expected.detach())


def test_what_comes_back():
    theirs, ours = twins("AutoModelForCausalLM", "gemma2")
    assert "past_key_values" in ours(IDS)
    assert "past_key_values" not in ours(IDS, use_cache=False)
    plain = ours(IDS, return_dict=False)
    assert isinstance(plain, tuple)
    assert len(plain) == len(theirs(IDS, return_dict=False))
    shown = ours(IDS, output_attentions=True, output_hidden_states=True, use_cache=False)
    expected = theirs(IDS, output_attentions=True, output_hidden_states=True, use_cache=False)
    assert list(shown.keys()) == list(expected.keys())
    with pytest.raises(TypeError, match="takes no 'use_cahce'; did you mean 'use_cache'"):
        ours(IDS, use_cahce=False)


def test_values_of_the_config_that_a_call_reads(tmp_path):
    twins("AutoModelForCausalLM", "gemma2")[1].save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    config = model.config
    config.output_hidden_states, config.output_attentions, config.use_cache = True, True, False
    out = model(IDS)
    assert list(out.keys()) == ["logits", "hidden_states", "attentions"]
    config.output_hidden_states = config.output_attentions = config.return_dict = False
    assert len(model(IDS)) == 1
    config.return_dict, config.pad_token_id, config.problem_type = True, 5, "regression"
    assert model(IDS).logits.shape == (BATCH, LENGTH, VOCAB)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sliding_window", 3),
        ("rms_norm_eps", 1e-3),
        ("final_logit_softcapping", None),
        ("num_hidden_layers", 2),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 5.0}),
        ("vocab_size", 98),
    ],
)
def test_values_of_the_config_that_are_fixed(name, value, tmp_path):
    twins("AutoModelForCausalLM", "gemma2")[1].save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    before = getattr(model.config, name)
    setattr(model.config, name, value)
    message = rf"^config\.{name} is .*, but the model was made with .* load the model again"
    for call in (
        lambda: model(IDS),
        lambda: model.generate(IDS, max_new_tokens=1),
        lambda: model.to(torch.bfloat16),
    ):
        with pytest.raises(ValueError, match=message) as error:
            call()
        assert "\n" not in str(error.value)
    setattr(model.config, name, before)
    assert model(IDS).logits.isfinite().all()


def test_a_changed_rotation_within_its_object_is_seen(tmp_path):
    twins("AutoModelForCausalLM", "gemma2")[1].save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    model.config.rope_parameters["rope_theta"] = 5.0
    with pytest.raises(ValueError, match=r"config\.rope_parameters is"):
        model(IDS)


def test_labels_of_a_classifier_are_fixed_in_number():
    _, ours = twins("AutoModelForSequenceClassification", "gemma2", num_labels=3)
    config = ours.config
    config.id2label = {0: "a", 1: "b", 2: "c"}
    assert ours(IDS[:1]).logits.shape == (1, 3)
    config.num_labels = 4
    with pytest.raises(ValueError, match=r"config\.num_labels is 4, but the model was made with 3"):
        ours(IDS[:1])
    config.num_labels = 3


# Helpers


@by_family
def test_a_config_made_of_the_entries_of_another(model_type):
    theirs, ours = twins("AutoModelForCausalLM", model_type)
    config_class = type(ours.config)
    assert config_class(**ours.config.to_dict()) == ours.config
    assert config_class(**theirs.config.to_dict()) == config_class.from_dict(
        theirs.config.to_dict()
    )
    assert config_class(**ours.config.to_diff_dict()) == ours.config
    with pytest.raises(ValueError, match=r"model_type 'llama' is not supported"):
        config_class(model_type="llama")


def test_what_programs_read_of_a_config():
    theirs, ours = twins("AutoModelForCausalLM", "gemma2")
    assert Gemma2Config().name_or_path == transformers.Gemma2Config().name_or_path == ""
    for name in ("is_encoder_decoder", "use_return_dict"):
        assert getattr(ours.config, name) == getattr(theirs.config, name), name
    for dtype in ("bfloat16", torch.bfloat16):
        both = Gemma2Config(dtype=dtype), transformers.Gemma2Config(dtype=dtype)
        assert both[0].dtype == both[1].dtype == torch.bfloat16
        assert both[0].to_dict()["dtype"] == both[1].to_dict()["dtype"] == "bfloat16"
    names = {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}
    assert Gemma2Config(**names).label2id == transformers.Gemma2Config(**names).label2id
    with pytest.raises(ValueError, match=r"label2id .* contradicts id2label"):
        Gemma2Config(**{**names, "label2id": {"no": 1}})
    assert Gemma2Config(name_or_path="x").name_or_path == "x"
    assert Gemma2Config(name_or_path="x") == Gemma2Config()
    assert "x" not in Gemma2Config(name_or_path="x").to_dict().values()


def test_helpers_of_a_config(tmp_path):
    _, ours = twins("AutoModelForCausalLM", "gemma2")
    config = copy.deepcopy(ours.config)
    config.to_json_file(tmp_path / "x.json")
    assert Gemma2Config.from_json_file(tmp_path / "x.json") == config
    config.update({"pad_token_id": 3, "num_labels": 4})
    assert (config.pad_token_id, config.num_labels) == (3, 4)
    with pytest.raises(TypeError, match="update takes no 'pad_token'; did you mean 'pad_token_id'"):
        config.update({"pad_token": 3})
    config.torch_dtype = torch.bfloat16
    assert config.dtype == config.torch_dtype == torch.bfloat16
    assert config.get_text_config(decoder=True) is config
    for name in ("rope_theta", "rope_scaling"):
        with pytest.raises(ValueError, match=f"config.{name} is what older files call a part of"):
            setattr(config, name, 5.0)


def test_weights_that_are_not_all_there():
    _, ours = twins("AutoModelForCausalLM", "gemma2")
    model, weights = copy.deepcopy(ours), ours.state_dict()
    assert model.load_state_dict(weights, strict=True) == ([], [])
    assert model.load_state_dict(weights, assign=True) == ([], [])
    with pytest.raises(ValueError, match=r"bfloat16, and the model torch.float32: convert"):
        model.load_state_dict({k: x.bfloat16() for k, x in weights.items()}, assign=True)
    norm = weights.pop("model.norm.weight")
    keys = model.load_state_dict(weights | {"x": norm}, strict=False)
    assert keys.missing_keys == ["model.norm.weight"]
    assert keys.unexpected_keys == ["x"]
    with pytest.raises(ValueError, match=r"norm.weight is missing"):
        model.load_state_dict(weights)


def test_helpers_of_a_model():
    theirs, ours = twins("AutoModelForCausalLM", "gemma2")
    for name in ("main_input_name", "base_model_prefix", "training"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert (ours.framework, ours.can_generate()) == ("pt", theirs.can_generate())
    assert type(ours).can_generate()  # asked of the class too
    assert not type(ours.model).can_generate()
    assert ours.vocab_size == theirs.vocab_size == ours.model.vocab_size
    assert ours.num_parameters() == theirs.num_parameters()
    without = ours.num_parameters(exclude_embeddings=True)
    assert without == theirs.num_parameters(exclude_embeddings=True)
    assert ours.num_parameters(only_trainable=True) == 0
    weights = sum(x.nbytes for x in theirs.parameters())
    assert ours.get_memory_footprint() == weights
    assert ours.config.get_text_config() is ours.config
    assert ours.tie_weights() is None
    assert list(ours.named_buffers()) == []
    assert type(ours.base_model).__name__ == type(theirs.base_model).__name__
    bare = ours.model
    assert bare.base_model is bare
    assert type(ours.get_decoder()) is type(bare)
    assert torch.equal(bare.embed_tokens.weight, theirs.model.embed_tokens.weight)
    assert not bare.can_generate()
    assert bare.get_output_embeddings() is None
    states = ours.model(IDS).last_hidden_state
    for head in (ours.get_output_embeddings(), ours.lm_head):
        assert torch.equal(head.weight, theirs.lm_head.weight)
        assert head.bias is theirs.lm_head.bias is None
        assert_close(head(states), theirs.lm_head(states).detach())


@pytest.mark.parametrize("tied", [True, False])
def test_an_embedding_of_another_size(tied, tmp_path):
    theirs, ours = twins("AutoModelForCausalLM", "gemma2", tie_word_embeddings=tied)
    ours.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    before = model(IDS).logits
    assert model.resize_token_embeddings(100).weight.shape == (100, 48)
    assert model.config.vocab_size == 100
    after = model(IDS).logits
    assert after.shape == (BATCH, LENGTH, 100)
    assert torch.equal(after[..., :VOCAB], before)
    table = theirs.get_input_embeddings().weight
    new = model.get_input_embeddings().weight[VOCAB:]
    assert_close(new, table.mean(0).expand(3, -1).detach())
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    assert model.generate(torch.full((1, 3), 99), max_new_tokens=2).shape == (1, 5)
    model.save_pretrained(tmp_path / "larger")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "larger")
    assert torch.equal(again(IDS).logits, after)
    assert model.resize_token_embeddings(90, pad_to_multiple_of=8).weight.shape[0] == 96
    assert model.resize_token_embeddings().weight.shape[0] == 96
    with pytest.raises(ValueError, match="new_num_tokens 0 is outside"):
        model.resize_token_embeddings(0)
