"""Small random transformers models of every family, with which gemcut's are compared."""

from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    VaultGemmaConfig,
)

CONFIG_CLASSES: dict[str, type[PreTrainedConfig]] = {
    "gemma": GemmaConfig,
    "gemma2": Gemma2Config,
    "vaultgemma": VaultGemmaConfig,
    "gemma3_text": Gemma3TextConfig,
}
MODEL_TYPES = list(CONFIG_CLASSES)

# head_dim is not hidden_size / heads, the score's scale is not head_dim's, and the window is
# shorter than the prompts in use: code that confuses two of them gets other numbers.
SMALL = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
}
WINDOWED = {"query_pre_attn_scalar": 24, "sliding_window": 5}
SOFTCAPPED = {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 6.0}
BY_FAMILY: dict[str, dict[str, Any]] = {
    "gemma": {},
    "gemma2": WINDOWED | SOFTCAPPED,
    "vaultgemma": WINDOWED | SOFTCAPPED,
    # two local layers to one global, and an attention softcap that must not be applied
    "gemma3_text": WINDOWED
    | SOFTCAPPED
    | {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2}
    | {"num_hidden_layers": 6},
}


def random_config(model_type: str, **overrides: Any) -> PreTrainedConfig:
    """The transformers config of a small model; `overrides` are keys of config.json."""
    values = SMALL | BY_FAMILY[model_type] | overrides
    if "num_hidden_layers" in overrides and "layer_types" not in overrides:
        values.pop("layer_types", None)
    return CONFIG_CLASSES[model_type](**values)


def random_model(
    model_type: str, *, seed: int = 0, auto_class: Any = AutoModelForCausalLM, **overrides: Any
) -> PreTrainedModel:
    """A small transformers model in float32 and eval mode, with eager attention.

    Weights are large enough that scores reach the softcap and no head attends evenly.  Norm weights
    and biases are random: transformers starts them at zero, where w and 1 + w rank alike and a
    missing bias shows nowhere.
    """
    config = random_config(model_type, **overrides)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = auto_class.from_config(config, attn_implementation="eager", dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("norm.weight"):
                    parameter.normal_(0.0, 0.3)
                elif name.endswith(".bias"):
                    parameter.normal_(0.0, 0.5)
                elif "embed_tokens" in name or "lm_head" in name:
                    parameter.normal_(0.0, 0.3)
                elif "q_proj" in name or "k_proj" in name:
                    parameter.normal_(0.0, 2.0 * parameter.shape[1] ** -0.5)
                else:
                    parameter.normal_(0.0, parameter.shape[1] ** -0.5)
    return model.eval()
