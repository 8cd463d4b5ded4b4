"""GemmaConfig, Gemma2Config...: each family's parameters by their documented names and defaults."""

from pathlib import Path
from typing import Any

from gemcut.engine.checkpoints.hub import take_hub_options
from gemcut.engine.config.config_file import read_json_object
from gemcut.engine.transformers_api.models.base_config import (
    PreTrainedConfig,
    config_file_of,
    model_type_of,
)


class GemmaConfig(PreTrainedConfig):
    """Gemma 1; the defaults are gemma-7b's."""

    model_type = "gemma"

    vocab_size: int = 256000
    hidden_size: int = 3072
    intermediate_size: int = 24576
    num_hidden_layers: int = 28
    num_attention_heads: int = 16
    num_key_value_heads: int = 16
    head_dim: int = 256
    hidden_act: str = "gelu_pytorch_tanh"
    hidden_activation: str | None = None  # decides where it is set
    max_position_embeddings: int = 8192
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 1
    bos_token_id: int | None = 2
    tie_word_embeddings: bool = True
    rope_parameters: dict[str, Any] | None = None
    attention_bias: bool = False
    attention_dropout: float = 0.0
    use_bidirectional_attention: bool | None = None


class Gemma2Config(PreTrainedConfig):
    """Gemma 2; the defaults are gemma-2-2b's."""

    model_type = "gemma2"

    vocab_size: int = 256000
    hidden_size: int = 2304
    intermediate_size: int = 9216
    num_hidden_layers: int = 26
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 256
    hidden_activation: str = "gelu_pytorch_tanh"
    max_position_embeddings: int = 8192
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 1
    bos_token_id: int | None = 2
    tie_word_embeddings: bool = True
    rope_parameters: dict[str, Any] | None = None
    attention_bias: bool = False
    attention_dropout: float = 0.0
    query_pre_attn_scalar: float = 256
    sliding_window: int | None = 4096
    layer_types: list[str] | None = None  # None: every second layer is global
    final_logit_softcapping: float | None = 30.0
    attn_logit_softcapping: float | None = 50.0
    use_bidirectional_attention: bool | None = None


class VaultGemmaConfig(PreTrainedConfig):
    """VaultGemma; the defaults are the documented ones, not those of the published 1B model."""

    model_type = "vaultgemma"

    vocab_size: int = 256000
    hidden_size: int = 2304
    intermediate_size: int = 9216
    num_hidden_layers: int = 26
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 256
    hidden_activation: str = "gelu_pytorch_tanh"
    max_position_embeddings: int = 8192
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 1
    bos_token_id: int | None = 2
    tie_word_embeddings: bool = True
    rope_parameters: dict[str, Any] | None = None
    attention_bias: bool = False
    attention_dropout: float = 0.0
    query_pre_attn_scalar: float = 256
    sliding_window: int | None = 4096
    layer_types: list[str] | None = None  # None: every second layer is global
    final_logit_softcapping: float | None = 30.0
    attn_logit_softcapping: float | None = 50.0


class Gemma3TextConfig(PreTrainedConfig):
    """The text part of Gemma 3; rope_parameters holds one object for each kind of layer."""

    model_type = "gemma3_text"

    vocab_size: int = 262208
    hidden_size: int = 2304
    intermediate_size: int = 9216
    num_hidden_layers: int = 26
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 256
    hidden_activation: str = "gelu_pytorch_tanh"
    max_position_embeddings: int = 131072
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 1
    bos_token_id: int | None = 2
    tie_word_embeddings: bool = True
    rope_parameters: dict[str, Any] | None = None
    attention_bias: bool = False
    attention_dropout: float = 0.0
    query_pre_attn_scalar: float = 256
    sliding_window: int | None = 4096
    layer_types: list[str] | None = None  # None: every sixth layer is global
    final_logit_softcapping: float | None = None
    attn_logit_softcapping: float | None = None  # never applied, as in transformers
    use_bidirectional_attention: bool | None = False


_CLASSES = (GemmaConfig, Gemma2Config, VaultGemmaConfig, Gemma3TextConfig)
CONFIGS: dict[str, type[PreTrainedConfig]] = {cls.model_type: cls for cls in _CLASSES}


class AutoConfig:
    """The config class that a file's model_type names."""

    @staticmethod
    def from_pretrained(
        pretrained_model_name_or_path: str | Path, **overrides: Any
    ) -> PreTrainedConfig:
        """The config of "demo", of a folder or its config.json, or of a Hugging Face id."""
        path = config_file_of(pretrained_model_name_or_path, take_hub_options(overrides))
        try:
            model_type = model_type_of(read_json_object(path))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        config = CONFIGS[model_type].from_pretrained(path, **overrides)
        config.name_or_path = pretrained_model_name_or_path
        return config
