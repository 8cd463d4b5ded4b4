# pyright: reportMissingImports=false
"""VaultGemma as a native model of vLLM, in place of its generic fallback on transformers.

VaultGemma is Gemma 2 without the norms after attention and MLP.  So attention (softcap, window by
layer, packed qkv), MLP (packed gate and up), loading, the packed names of LoRA, quantisation,
tensor and pipeline parallelism are those of vLLM's own Gemma 2, whatever its version does there.
"""

from typing import Any

import torch
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import CacheConfig, VllmConfig
from vllm.model_executor.layers.layernorm import GemmaRMSNorm
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.models.gemma2 import (
    Gemma2Attention,
    Gemma2ForCausalLM,
    Gemma2MLP,
    Gemma2Model,
)
from vllm.model_executor.models.utils import (
    make_empty_intermediate_tensors_factory,
    make_layers,
    maybe_prefix,
)

from gemcut.engine.config.model_config import ModelConfig

MODEL_TYPE = "vaultgemma"


class VaultGemmaForCausalLM(Gemma2ForCausalLM):
    """What the architecture of that name is in vLLM once the plugin is loaded."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        nn.Module.__init__(self)  # Gemma 2's would build Gemma 2
        self.config = config = vllm_config.model_config.hf_config
        check_config(config)
        if vllm_config.model_config.dtype == torch.float16:
            raise ValueError("VaultGemma's activations overflow float16; use --dtype bfloat16")
        self.quant_config = vllm_config.quant_config
        self.model = VaultGemmaModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        if not config.tie_word_embeddings:
            self.lm_head = ParallelLMHead(
                config.vocab_size,
                config.hidden_size,
                quant_config=self.quant_config,
                prefix=maybe_prefix(prefix, "lm_head"),
            )
        self.logits_processor = LogitsProcessor(
            config.vocab_size, soft_cap=config.final_logit_softcapping
        )
        self.make_empty_intermediate_tensors = self.model.make_empty_intermediate_tensors

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """hidden_states [T, D] -> softcapped logits [T, V], on the ranks that have them."""
        head = self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        return self.logits_processor(head, hidden_states)


@support_torch_compile
class VaultGemmaModel(Gemma2Model):
    """Embedding, layers and last norm; `forward` is that of Gemma 2."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        nn.Module.__init__(self)
        self.config = config = vllm_config.model_config.hf_config
        cache_config, quant_config = vllm_config.cache_config, vllm_config.quant_config
        self.quant_config = quant_config
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size)
        self.start_layer, self.end_layer, self.layers = make_layers(
            config.num_hidden_layers,
            lambda prefix: VaultGemmaDecoderLayer(config, cache_config, quant_config, prefix),
            prefix=f"{prefix}.layers",
        )
        self.norm = GemmaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        # in the dtype of the model, as vLLM's default dtype is that here: 48 of 2304 in bfloat16
        self.register_buffer("normalizer", torch.tensor(config.hidden_size**0.5), persistent=False)
        self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(
            ["hidden_states", "residual"], config.hidden_size
        )


class VaultGemmaDecoderLayer(nn.Module):
    """residual += attention(norm(residual)); residual += mlp(norm(residual)), the last add late."""

    def __init__(
        self,
        config: Any,
        cache_config: CacheConfig | None,
        quant_config: QuantizationConfig | None,
        prefix: str,
    ) -> None:
        super().__init__()
        self.self_attn = Gemma2Attention(
            config=config,
            hidden_size=config.hidden_size,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.max_position_embeddings,
            cache_config=cache_config,
            quant_config=quant_config,
            attn_logits_soft_cap=config.attn_logit_softcapping,
            prefix=f"{prefix}.self_attn",
        )
        self.mlp = Gemma2MLP(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            hidden_activation=config.hidden_activation,
            quant_config=quant_config,
            prefix=f"{prefix}.mlp",
        )
        self.input_layernorm = GemmaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.pre_feedforward_layernorm = GemmaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self, positions: Tensor, hidden_states: Tensor, residual: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The MLP's output [T, D], and the residual [T, D] to which the next norm adds it."""
        if residual is None:
            residual = hidden_states
            hidden_states = self.input_layernorm(hidden_states)
        else:
            hidden_states, residual = self.input_layernorm(hidden_states, residual)
        hidden_states = self.self_attn(positions=positions, hidden_states=hidden_states)
        hidden_states, attended = self.pre_feedforward_layernorm(hidden_states, residual)
        return self.mlp(hidden_states), attended


def check_config(config: Any) -> None:
    """ValueError unless transformers' config is one that a VaultGemma can have."""
    values = config.to_dict()
    if values.get("model_type") != MODEL_TYPE:
        raise ValueError(
            f"VaultGemmaForCausalLM is a model of type {MODEL_TYPE}, "
            f"not of {values.get('model_type')!r}"
        )
    values.pop("quantization_config", None)  # vLLM reads more formats than gemcut
    ModelConfig.from_dict(values)
