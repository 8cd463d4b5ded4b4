"""The documented configs: names, defaults, files and older spellings."""

import json
from dataclasses import replace

import pytest
import torch
import transformers
from documented_twins import random_ids
from random_models import CONFIG_CLASSES, MODEL_TYPES, random_config

from gemcut.engine import PUBLISHED, ModelConfig, transformers_api
from gemcut.engine.transformers_api import (
    AutoConfig,
    Gemma2Config,
    Gemma2Model,
    Gemma3TextConfig,
    GemmaConfig,
    VaultGemmaConfig,
)

IDS = random_ids()


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
        assert config.dtype == config.torch_dtype == torch.bfloat16
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
