"""LoRA adapters that peft makes: its adapted models' logits, and its own merge of them."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accuracy import assert_within_budget
from random_models import MODEL_TYPES, random_model
from saved_models import all_weights
from torch import Tensor
from transformers import PreTrainedModel
from twins import new_cache

from gemcut.engine import ModelConfig
from gemcut.engine.checkpoints.load import load_checkpoint
from gemcut.engine.checkpoints.lora import open_adapter
from gemcut.engine.execution.model import Gemma
from gemcut.kernels import reference

peft = pytest.importorskip("peft", exc_type=ImportError)

IDS = [2, 5, 9, 11, 30, 17, 44]
MODELS = r".*layers\.[12]\.(mlp|self_attn)\.(up|gate|o)_proj"
RANKS = {"rank_pattern": {r"layers.1.self_attn.q_proj": 2, "down_proj": 6}}
CASES: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": ["q_proj", "v_proj"], "lora_alpha": 8},
    "all, rslora": {"target_modules": "all-linear", "use_rslora": True, "lora_alpha": 16},
    "a pattern": {"target_modules": MODELS, "lora_alpha": 7},
    "ranks": {"target_modules": ["q_proj", "down_proj"], "alpha_pattern": {"q_proj": 3}} | RANKS,
    "some layers": {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [0, 2]},
    "all but one": {"target_modules": "all-linear", "exclude_modules": ["o_proj"]},
    "dora": {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
    "dora, rslora": {"target_modules": "all-linear", "use_dora": True, "use_rslora": True},
    "fan in": {"target_modules": ["q_proj"], "fan_in_fan_out": True, "lora_dropout": 0.1},
    "gaussian": {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "both": {"target_modules": ["embed_tokens", "lm_head"]},
    "both, tied": {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "norm"]},
    "saved head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "saved, tied": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["embed_tokens"],
        "ensure_weight_tying": True,
    },
}
TIED_BY_CASE = ("both, tied", "saved, tied")  # the adapter leaves one table


def adapted(base: PreTrainedModel, **settings: Any) -> Any:
    """A copy of a model with an adapter that was trained: no part of it is as it began."""
    config = peft.LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4} | settings)
    model, seen = peft.get_peft_model(copy.deepcopy(base), config), set()
    generator = torch.Generator().manual_seed(1)
    for name, x in model.named_parameters():
        if id(x) in seen or not ("lora_" in name or "modules_to_save" in name):
            continue
        seen.add(id(x))
        noise = torch.randn(x.shape, generator=generator)
        # in place: tied parts share their memory
        x.data.copy_(x.data * (1 + 0.1 * noise) if "magnitude" in name else 0.3 * noise)
    return model.eval()


def load_merged(folder: Path, adapter: Path, dtype: torch.dtype) -> Gemma:
    config = ModelConfig.from_file(folder)
    opened = open_adapter(adapter, config)
    weights = load_checkpoint(folder, config, device="cpu", dtype=dtype, adapter=opened)
    return Gemma(opened.config, weights, reference)


@pytest.mark.filterwarnings("ignore")  # peft's advice about tied tables
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_logits_are_those_of_the_adapted_model(model_type, case, tied, tmp_path):
    base = random_model(model_type, tie_word_embeddings=tied)
    base.save_pretrained(tmp_path / "model")
    model = adapted(base, **CASES[case])
    model.save_pretrained(tmp_path / "lora")
    ours = load_merged(tmp_path / "model", tmp_path / "lora", torch.float32)
    touches_tables = case.startswith(("embedding", "head", "both", "saved"))
    assert ours.config.tie_word_embeddings == (
        tied and (not touches_tables or case in TIED_BY_CASE)
    )
    with torch.inference_mode():
        theirs = model(torch.tensor([IDS])).logits[0]
        plain = base(torch.tensor([IDS])).logits[0]
        found = ours.logits(ours.prefill(torch.tensor(IDS), new_cache(ours), 0))
    scale = theirs.abs().max()
    assert (found - theirs).abs().max() < 1e-4 * scale
    assert (plain - theirs).abs().max() > 1e-2 * scale


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_weights_are_those_of_its_merge(case, dtype, tmp_path):
    base = random_model("gemma3_text", tie_word_embeddings=False).to(dtype)
    base.save_pretrained(tmp_path / "model")
    model = adapted(base, **CASES[case])
    model.save_pretrained(tmp_path / "lora")
    wide = copy.deepcopy(model).double()
    eager: dict[str, Tensor] = model.merge_and_unload().state_dict()
    exact: dict[str, Tensor] = wide.merge_and_unload().state_dict()
    ours = load_merged(tmp_path / "model", tmp_path / "lora", dtype)
    found = all_weights(ours.config, ours.weights)
    assert found.keys() == exact.keys()
    for name, x in found.items():
        assert_within_budget(name, x, eager[name].to(dtype), exact[name])
