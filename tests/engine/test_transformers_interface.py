"""The documented classes apart from their numbers: arrays, outputs, files, places, configs."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from allocations import peak_bytes
from documented_twins import BATCH, LENGTH, MASKS, VOCAB, assert_close, random_ids, twins
from random_models import CONFIG_CLASSES, MODEL_TYPES, random_config

import gemcut.engine
from gemcut.engine import PUBLISHED, Engine, ModelConfig, transformers_api
from gemcut.engine.transformers_api import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2Model,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GemmaModel,
    VaultGemmaConfig,
    pipeline,
)
from gemcut.kernels import cpu

IDS = random_ids()


@pytest.fixture
def model():
    return twins("AutoModelForCausalLM", "gemma2")[1]


@pytest.fixture
def jnp():
    return pytest.importorskip("jax.numpy")


class Foreign:
    """An array that only lends its memory."""

    def __init__(self, tensor):
        self.tensor = tensor

    def __dlpack__(self, **options):
        return self.tensor.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.tensor.__dlpack_device__()


class TestArrays:
    def test_numpy(self, model):
        expected = model(IDS, labels=IDS, output_hidden_states=True)
        ids = IDS.numpy().astype(np.int32)
        mask = np.ones((BATCH, LENGTH), dtype=np.int64)
        actual = model(ids, mask, labels=ids, output_hidden_states=True)
        for name in ("loss", "logits"):
            assert isinstance(actual[name], np.ndarray)
            np.testing.assert_array_equal(actual[name], expected[name])
        for one, other in zip(actual.hidden_states, expected.hidden_states, strict=True):
            np.testing.assert_array_equal(one, other)
        new = model.generate(ids, max_new_tokens=4)
        assert isinstance(new, np.ndarray)
        np.testing.assert_array_equal(new, model.generate(IDS, max_new_tokens=4))

    def test_numpy_has_no_bfloat16(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        low = AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
        states = low(IDS.numpy()).last_hidden_state
        assert states.dtype == np.float32
        np.testing.assert_array_equal(states, low(IDS).last_hidden_state.float())

    def test_jax(self, model, jnp):
        import jax

        expected = model(IDS, attention_mask=MASKS["left"], labels=None)
        ids, mask = jnp.asarray(IDS.numpy()), jnp.asarray(MASKS["left"].numpy())
        actual = model(ids, attention_mask=mask)
        assert isinstance(actual.logits, jax.Array)
        by_bool = model(ids, attention_mask=mask.astype(bool), position_ids=jnp.arange(20)[None])
        np.testing.assert_array_equal(by_bool.logits, actual.logits)
        np.testing.assert_array_equal(actual.logits, expected.logits)
        cache = model.init_cache(BATCH, 40)
        model(ids, past_key_values=cache)
        assert cache.get_seq_length() == LENGTH
        new = model.generate(ids, max_new_tokens=4)
        assert isinstance(new, jax.Array)
        np.testing.assert_array_equal(new, model.generate(IDS, max_new_tokens=4))

    def test_jax_bfloat16(self, model, jnp, tmp_path):
        model.save_pretrained(tmp_path)
        low = AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
        states = low(jnp.asarray(IDS.numpy())).last_hidden_state
        assert states.dtype == jnp.bfloat16
        embeds = jnp.asarray(low.get_input_embeddings()(IDS).float().numpy(), dtype=jnp.bfloat16)
        again = low(inputs_embeds=embeds).last_hidden_state
        np.testing.assert_array_equal(states.astype("float32"), again.astype("float32"))

    def test_anything_with_dlpack(self, model):
        """What cannot take DLPack gets tensors."""
        logits = model(Foreign(IDS)).logits
        assert torch.equal(logits, model(IDS).logits)

    def test_read_only_memory_is_not_written_to(self, model):
        ids = IDS.numpy().copy()
        ids.flags.writeable = False
        np.testing.assert_array_equal(model(ids).logits, model(IDS).logits)

    def test_flax_masks_have_one_entry_for_each_place_of_the_cache(self, model):
        cache = model.init_cache(BATCH, 30)
        mask = torch.ones(BATCH, 30, dtype=torch.int64)
        mask[:, :3] = 0
        actual = model(IDS, attention_mask=mask, past_key_values=cache).logits
        assert torch.equal(actual, model(IDS, attention_mask=mask[:, :LENGTH]).logits)


class TestOutputs:
    def test_mapping_index_and_tuple(self, model):
        output = model(IDS, labels=IDS)
        assert output.keys() == ["loss", "logits", "past_key_values"]
        loss, logits, cache = output
        assert loss is output.loss is output["loss"] is output[0]
        assert logits is output.logits is output[1] is output.get("logits")
        assert cache is output.past_key_values is output.to_tuple()[-1]
        assert output[:2] == (loss, logits)
        assert "hidden_states" not in output
        assert output.hidden_states is None
        assert len(output) == 3
        assert dict(**output)["loss"] is loss
        with pytest.raises(KeyError):
            output["hidden_states"]
        with pytest.raises(AttributeError, match="it has loss, logits, past_key_values"):
            _ = output.logit
        assert "logits=<Tensor [3, 20, 97]>" in repr(output)

    def test_tuples(self, model):
        loss, logits, _ = model(IDS, labels=IDS, return_dict=False)
        assert loss.shape == ()
        assert logits.shape == (BATCH, LENGTH, VOCAB)
        (states,) = AutoModel.from_config(model.config)(IDS, use_cache=False, return_dict=False)
        assert states.shape == (BATCH, LENGTH, model.config.hidden_size)

    def test_a_loss_alone_computes_no_logits_for_the_output(self, model, monkeypatch):
        output = model(IDS, labels=IDS)
        asked = []
        monkeypatch.setattr(model._gemma, "logits", lambda h: asked.append(len(h)) or h)
        assert "on request" in repr(output)
        assert asked == []
        _ = output.logits, output.logits
        assert asked == [BATCH * LENGTH]


def test_a_loss_over_a_large_vocabulary_stays_within_a_gigabyte():
    """All logits of 4096 tokens over 256 000 words would be 4.2 GB."""
    config = GemmaConfig(
        vocab_size=256_000,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    model = GemmaForCausalLM(config)
    ids = torch.randint(0, 256_000, (1, 4096), generator=torch.Generator().manual_seed(0))
    losses = []
    peak = peak_bytes(lambda: losses.append(model(ids, labels=ids).loss))
    assert losses[0].isfinite()
    assert peak < 1e9


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
            expected = engine.generate(
                "It was", gemcut.engine.SamplingParams(temperature=0, max_tokens=20)
            )
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


class TestConfigs:
    @pytest.mark.parametrize("model_type", MODEL_TYPES)
    def test_names_and_defaults_are_transformers(self, model_type):
        theirs = CONFIG_CLASSES[model_type]()
        ours = getattr(transformers_api, type(theirs).__name__)()
        for name in ours.parameters:
            if name != "hidden_activation" or model_type != "gemma":  # older documents have it
                assert getattr(ours, name) == getattr(theirs, name), name
        named = set(theirs.to_dict()) - set(transformers.PreTrainedConfig().to_dict())
        assert named - {"_sliding_window_pattern", "sliding_window_pattern"} <= set(ours.parameters)

    def test_gemma_config_is_the_7b(self):
        assert GemmaConfig().model_config() == PUBLISHED["gemma-7b"]
        assert Gemma2Config().model_config() == PUBLISHED["gemma-2-2b"]

    @pytest.mark.parametrize("model_type", MODEL_TYPES)
    def test_files_in_both_directions(self, model_type, tmp_path):
        theirs = random_config(model_type, num_labels=3)
        theirs.save_pretrained(tmp_path)
        ours = AutoConfig.from_pretrained(tmp_path)
        assert type(ours).__name__ == type(theirs).__name__
        assert ours.num_labels == 3
        ours.save_pretrained(tmp_path / "ours")
        again = transformers.AutoConfig.from_pretrained(tmp_path / "ours")
        for name in ours.parameters:
            if name in ("architectures", "hidden_activation"):
                continue
            assert getattr(again, name) == getattr(theirs, name), name
        assert type(ours).from_pretrained(tmp_path / "ours") == ours
        both = (ModelConfig.from_file(folder) for folder in (tmp_path, tmp_path / "ours"))
        one, other = (replace(config, extra={}) for config in both)
        assert one == other

    def test_what_is_set_is_honoured(self):
        config = VaultGemmaConfig(
            num_hidden_layers=3,
            layer_types=["full_attention", "sliding_attention", "full_attention"],
            query_pre_attn_scalar=144,
            sliding_window=7,
            attn_logit_softcapping=None,
            final_logit_softcapping=12.5,
            rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 5e4},
        ).model_config()
        assert config.layer_types[1] == "sliding_attention"
        assert (config.scale, config.sliding_window) == (1 / 12, 7)
        assert (config.attn_softcap, config.final_softcap) == (None, 12.5)
        assert (config.rope.rope_type, config.rope.factor, config.rope.rope_theta) == (
            "linear",
            2.0,
            5e4,
        )

    def test_the_spelling_of_older_documents(self):
        config = GemmaConfig(rope_theta=5e4, torch_dtype=torch.bfloat16, num_labels=3)
        assert config.rope_parameters == {"rope_type": "default", "rope_theta": 5e4}
        assert config.dtype == config.torch_dtype == "bfloat16"
        assert config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
        assert config.label2id["LABEL_2"] == 2
        config.num_labels = 1
        assert config.id2label == {0: "LABEL_0"}
        assert GemmaConfig(id2label={"0": "no", "1": "yes"}).label2id == {"no": 0, "yes": 1}
        assert GemmaConfig().num_labels == 2
        scaled = Gemma3TextConfig(rope_local_base_freq=2e4, sliding_window_pattern=2)
        assert scaled.rope_parameters["sliding_attention"]["rope_theta"] == 2e4
        assert scaled.layer_types[:2] == ["sliding_attention", "full_attention"]

    def test_other_keys_are_carried(self, tmp_path):
        values = Gemma2Config(num_hidden_layers=2).to_dict() | {"tomorrow": [1]}
        (tmp_path / "config.json").write_text(json.dumps(values))
        config = Gemma2Config.from_pretrained(tmp_path)
        assert config.tomorrow == [1]
        assert config.to_dict() == values
        assert Gemma2Config.from_pretrained(tmp_path, hidden_size=64).hidden_size == 64
        with pytest.raises(AttributeError, match="Gemma2Config has no 'yesterday'"):
            _ = config.yesterday

    def test_a_config_says_what_the_model_does(self):
        small = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 16, "head_dim": 4}
        config = Gemma2Config(num_hidden_layers=2, **small, output_hidden_states=True)
        torch.manual_seed(0)
        output = Gemma2Model(config)(IDS % 50)
        assert len(output.hidden_states) == 3
        config.use_cache, config.return_dict = False, False
        assert len(Gemma2Model(config)(IDS % 50)) == 2


class TestPipeline:
    def test_prompts_and_lists(self, folder):
        pipe = pipeline("text-generation", model=folder)
        settings = {"max_new_tokens": 6, "do_sample": False}
        (one,) = pipe("The children", **settings)
        assert one["generated_text"].startswith("The children")
        several = pipe(["The children", "In 1984 there were"], batch_size=2, **settings)
        assert several[0] == [one]
        assert [len(x) for x in several] == [1, 1]
        (rest,) = pipe("The children", return_full_text=False, **settings)
        assert "The children" + rest["generated_text"] == one["generated_text"]
        (ids,) = pipe("The children", return_tensors=True, **settings)
        assert pipe.tokenizer.decode(ids["generated_token_ids"], True) == one["generated_text"]
        # a row that has ended is filled up beside one that goes on
        prompts = ["The children", "In 1984 there were"]
        settings |= {"return_tensors": True, "eos_token_id": ids["generated_token_ids"][-3]}
        alone = [pipe(prompt, **settings) for prompt in prompts]
        assert pipe(prompts, batch_size=2, **settings) == alone
        lengths = {
            len(pipe(p, return_full_text=False, **settings)[0]["generated_token_ids"])
            for p in prompts
        }
        assert len(lengths) == 2
        drawn = pipe("It", num_return_sequences=3, max_new_tokens=6)
        assert len({x["generated_text"] for x in drawn}) == 3

    def test_it_is_transformers_pipeline(self, folder, tokenizer_file):
        from vocabulary import hugging_face_twin

        twin = hugging_face_twin(tokenizer_file)
        twin.add_bos_token = True
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation="eager", dtype=torch.float32
        )
        theirs = transformers.pipeline("text-generation", model=model, tokenizer=twin)
        ours = pipeline("text-generation", model=folder)
        for prompt in ("The children walked", ["It was", "Москва"]):
            given = {"max_new_tokens": 12, "do_sample": False}
            assert ours(prompt, **given) == theirs(prompt, **given)

    def test_chats(self, folder):
        pipe = pipeline(model=folder)
        chat = [{"role": "user", "content": "Who are you?"}]
        (answer,) = pipe(chat, max_new_tokens=5, do_sample=False)
        *before, said = answer["generated_text"]
        assert before == chat
        assert said["role"] == "assistant"
        (alone,) = pipe(chat, max_new_tokens=5, do_sample=False, return_full_text=False)
        assert alone["generated_text"] == said["content"]

    def test_a_model_that_is_there(self, folder):
        model = AutoModelForCausalLM.from_pretrained(folder)
        tokenizer = transformers_api.AutoTokenizer.from_pretrained(folder)
        pipe = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
        assert pipe.model is model
        assert pipe("It", max_new_tokens=2)[0]["generated_text"].startswith("It")

    @pytest.mark.parametrize(
        ("options", "kind", "message"),
        [
            ({"task": "fill-mask"}, NotImplementedError, "task 'fill-mask' is not there"),
            ({"device": 0, "device_map": "auto"}, ValueError, "give device or device_map"),
            ({"dtyp": "auto"}, TypeError, "takes no 'dtyp'; did you mean 'dtype'"),
        ],
    )
    def test_bad_options(self, folder, options, kind, message):
        with pytest.raises(kind, match=message):
            pipeline(**{"model": folder} | options)

    def test_bad_prompts(self, folder):
        pipe = pipeline(model=folder)
        for prompt in ([], None, 5):
            with pytest.raises(ValueError, match="is neither a text nor a list that holds one"):
                pipe(prompt)
        with pytest.raises(TypeError, match="generate takes no 'max_tokens'"):
            pipe("It", max_tokens=4)


def test_every_documented_name_is_in_the_engine():
    for name in transformers_api.__all__:
        assert getattr(gemcut.engine, name) is getattr(transformers_api, name)
        assert name in gemcut.engine.__all__
