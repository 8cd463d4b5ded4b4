"""The classes that the Hugging Face documents of Gemma describe, on gemcut's kernels and cache."""

from gemcut.engine.transformers_api.auto import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    FlaxGemmaForCausalLM,
    FlaxGemmaModel,
)
from gemcut.engine.transformers_api.models.caches import DynamicCache, StaticCache
from gemcut.engine.transformers_api.models.configs import (
    AutoConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    VaultGemmaConfig,
)
from gemcut.engine.transformers_api.models.generation_config import GenerationConfig
from gemcut.engine.transformers_api.models.models import (
    Gemma2ForCausalLM,
    Gemma2ForSequenceClassification,
    Gemma2ForTokenClassification,
    Gemma2Model,
    Gemma3ForCausalLM,
    Gemma3TextForSequenceClassification,
    Gemma3TextModel,
    GemmaForCausalLM,
    GemmaForSequenceClassification,
    GemmaForTokenClassification,
    GemmaModel,
    VaultGemmaForCausalLM,
    VaultGemmaModel,
)
from gemcut.engine.transformers_api.pipelines import TextGenerationPipeline, pipeline
from gemcut.engine.transformers_api.tokenizers.batch_encoding import BatchEncoding
from gemcut.engine.transformers_api.tokenizers.tokenizer import GemmaTokenizer, GemmaTokenizerFast

__all__ = [
    "AutoConfig",
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoTokenizer",
    "BatchEncoding",
    "DynamicCache",
    "FlaxGemmaForCausalLM",
    "FlaxGemmaModel",
    "Gemma2Config",
    "Gemma2ForCausalLM",
    "Gemma2ForSequenceClassification",
    "Gemma2ForTokenClassification",
    "Gemma2Model",
    "Gemma3ForCausalLM",
    "Gemma3TextConfig",
    "Gemma3TextForSequenceClassification",
    "Gemma3TextModel",
    "GemmaConfig",
    "GemmaForCausalLM",
    "GemmaForSequenceClassification",
    "GemmaForTokenClassification",
    "GemmaModel",
    "GemmaTokenizer",
    "GemmaTokenizerFast",
    "GenerationConfig",
    "StaticCache",
    "TextGenerationPipeline",
    "VaultGemmaConfig",
    "VaultGemmaForCausalLM",
    "VaultGemmaModel",
    "pipeline",
]
