"""The documented models: their files, weights, dtypes and devices."""

import pytest
import torch
import transformers
from documented_twins import BATCH, LENGTH, MASKS, assert_close, random_ids, twins
from random_models import MODEL_TYPES, random_config

from gemcut.engine import Engine, SamplingParams, transformers_api
from gemcut.engine.transformers_api import AutoConfig, AutoModelForCausalLM, GemmaModel
from gemcut.kernels import cpu

IDS = random_ids()


@pytest.fixture
def model():
    return twins("AutoModelForCausalLM", "gemma2")[1]


class TestFiles:
    @pytest.mark.parametrize("model_type", MODEL_TYPES)
    @pytest.mark.parametrize("kind", ["AutoModel", "AutoModelForCausalLM"])
    def test_transformers_reads_what_is_saved(self, model_type, kind, tmp_path):
        theirs, ours = twins(kind, model_type)
        ours.save_pretrained(tmp_path)
        again = getattr(transformers, kind).from_pretrained(
            tmp_path, attn_implementation="eager", dtype=torch.float32
        )
        assert type(again) is type(theirs)
        for name, weight in theirs.state_dict().items():
            assert torch.equal(again.state_dict()[name], weight), name
        reread = getattr(transformers_api, kind).from_pretrained(tmp_path)
        assert torch.equal(reread(IDS)[0], ours(IDS)[0])

    @pytest.mark.parametrize("kind", ["Sequence", "Token"])
    def test_classifiers_too(self, kind, tmp_path):
        auto_class = f"AutoModelFor{kind}Classification"
        settings = {"num_labels": 3, "problem_type": "multi_label_classification"}
        theirs, ours = twins(auto_class, "gemma2", **settings)
        ours.save_pretrained(tmp_path)
        assert AutoConfig.from_pretrained(tmp_path, num_labels=7).num_labels == 7
        with pytest.raises(ValueError, match=r"score.* is \[3.*the config says \[7"):
            type(ours).from_pretrained(tmp_path, num_labels=7)
        again = getattr(transformers, auto_class).from_pretrained(
            tmp_path, attn_implementation="eager"
        )
        assert again.config.problem_type == theirs.config.problem_type
        assert again.config.id2label == ours.config.id2label
        assert_close(ours(IDS).logits, again(IDS).logits)

    def test_the_model_without_a_head_reads_any_checkpoint(self, tmp_path):
        for kind, more in (
            ("AutoModelForCausalLM", {"tie_word_embeddings": False}),
            ("AutoModelForTokenClassification", {"num_labels": 3}),
            ("AutoModel", {}),
        ):
            theirs, _ = twins(kind, "gemma", **more)
            theirs.save_pretrained(tmp_path)
            states = GemmaModel.from_pretrained(tmp_path)(IDS).last_hidden_state
            base = getattr(theirs, "model", theirs)
            assert_close(states, base(IDS).last_hidden_state.detach())

    def test_a_checkpoint_gets_another_head(self, tmp_path):
        _, ours = twins("AutoModelForCausalLM", "gemma")
        ours.save_pretrained(tmp_path)
        load = transformers_api.GemmaForTokenClassification.from_pretrained
        with pytest.warns(UserWarning, match=r"has no score.weight and no score.bias: made at ran"):
            model = load(tmp_path, num_labels=7)
        assert model(IDS).logits.shape == (BATCH, LENGTH, 7)
        assert model.state_dict()["score.bias"].count_nonzero() == 0
        assert model.state_dict()["score.weight"].std() > 0

    def test_the_bundled_model(self):
        model = AutoModelForCausalLM.from_pretrained("demo")
        assert model.num_parameters() == 3_740_928
        with Engine.from_pretrained("demo") as engine:
            expected = engine.generate("It was", SamplingParams(temperature=0, max_tokens=20))
        prompt = torch.tensor([expected.prompt_token_ids])
        new = model.generate(prompt, max_new_tokens=20)[0, prompt.shape[1] :]
        assert new.tolist() == expected.token_ids

    def test_weights_by_name(self, model, tmp_path):
        theirs, ours = twins("AutoModelForCausalLM", "gemma2")
        names = set(ours.state_dict())
        assert names == set(theirs.state_dict()) - {"lm_head.weight"}  # which is tied
        fresh = type(ours)(ours.config)
        assert not torch.equal(fresh(IDS).logits, ours(IDS).logits)
        fresh.load_state_dict(ours.state_dict())
        assert torch.equal(fresh(IDS).logits, ours(IDS).logits)
        fresh = type(ours)(ours.config)
        fresh.load_state_dict(theirs.state_dict())
        assert torch.equal(fresh(IDS).logits, ours(IDS).logits)
        other = theirs.state_dict() | {
            "lm_head.weight": 1 + ours.state_dict()["model.embed_tokens.weight"]
        }
        with pytest.raises(ValueError, match=r"lm_head.weight differs from model.embed_tokens"):
            fresh.load_state_dict(other)
        assert sum(x.numel() for x in ours.parameters()) == ours.num_parameters()
        _, bare = twins("AutoModel", "gemma2")
        assert "embed_tokens.weight" in bare.state_dict()

    @pytest.mark.parametrize("model_type", MODEL_TYPES)
    def test_random_weights_are_spread_as_transformers_spreads_them(self, model_type):
        config = random_config(model_type, attention_bias=True, hidden_size=256, vocab_size=1000)
        theirs = transformers.AutoModelForCausalLM.from_config(config).state_dict()
        ours = AutoModelForCausalLM.from_config(
            getattr(transformers_api, type(config).__name__).from_dict(config.to_dict())
        ).state_dict()
        for name, weight in ours.items():
            expected = theirs[name]
            assert (weight.count_nonzero() == 0) == (expected.count_nonzero() == 0), name
            # of two samples of n: five standard deviations of their ratio, which has 1 / sqrt(n)
            bound = 5 * weight.numel() ** -0.5
            torch.testing.assert_close(weight.std(), expected.std(), rtol=bound, atol=0)
        table = "model.embed_tokens.weight"
        assert ours[table][0].count_nonzero() == theirs[table][0].count_nonzero() == 0


class TestPlaces:
    def test_dtype(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        load = type(model).from_pretrained
        assert load(tmp_path).dtype == torch.float32  # the stored one
        low = load(tmp_path, dtype="bfloat16")
        assert low.dtype == torch.bfloat16
        low.save_pretrained(tmp_path / "low")
        assert load(tmp_path / "low").dtype == torch.bfloat16
        assert load(tmp_path / "low", torch_dtype=torch.float32).dtype == torch.float32
        assert load(tmp_path / "low").float().dtype == torch.float32
        again = load(tmp_path).to("cpu", torch.bfloat16)
        assert torch.equal(again(IDS).logits, low(IDS).logits)
        tied = again._gemma.weights
        assert tied.lm_head is tied.embedding

    def test_moving_forgets_what_was_captured(self, tmp_path, model):
        model.save_pretrained(tmp_path)
        mine = type(model).from_pretrained(tmp_path)
        before = mine.generate(IDS, max_new_tokens=5)
        mine.to(torch.bfloat16).generate(IDS, max_new_tokens=5)
        assert torch.equal(
            mine.float().eval().generate(IDS, max_new_tokens=5)[:, :20], before[:, :20]
        )

    def test_device_map(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        for place in (None, "cpu", "auto", {"": "cpu"}, torch.device("cpu")):
            if place == "auto" and torch.cuda.is_available():
                continue
            mine = type(model).from_pretrained(tmp_path, device_map=place)
            assert mine.device == torch.device("cpu")
            assert mine._gemma.ops is cpu

    @pytest.mark.parametrize(
        ("model_type", "mask"),
        [*((model_type, "left") for model_type in MODEL_TYPES), ("gemma2", "holes")],
    )
    def test_on_the_kernels(self, model_type, mask, tmp_path):
        """Ragged rows, a cache that goes on, and tokens, by the kernels themselves."""
        kinds = {"layer_types": ["sliding_attention", "full_attention"]}
        sizes = {"num_hidden_layers": 2, **({} if model_type == "gemma" else kinds)}
        theirs, ours = twins("AutoModelForCausalLM", model_type, **sizes)
        ours.save_pretrained(tmp_path)
        place = {"device_map": "auto"} if torch.cuda.is_available() else {}
        mine = type(ours).from_pretrained(tmp_path, ops="triton", **place)
        assert mine._gemma.ops is not cpu
        ids, seen = IDS.to(mine.device), MASKS[mask].to(mine.device)
        past = mine(ids[:, :14], attention_mask=seen[:, :14]).past_key_values
        actual = mine(ids[:, 14:], attention_mask=seen, past_key_values=past).logits
        expected = theirs(IDS, attention_mask=MASKS[mask]).logits[:, 14:].detach()
        assert_close(actual.cpu(), expected, MASKS[mask][:, 14:])
        new = mine.generate(ids, attention_mask=seen, max_new_tokens=4)
        expected = theirs.generate(IDS, attention_mask=MASKS[mask], max_new_tokens=4)
        assert torch.equal(new.cpu(), expected)
