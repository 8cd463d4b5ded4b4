"""The engine: `Engine` takes prompts and yields text; beside it, the classes of transformers."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gemcut.engine.config.model_config import PUBLISHED, ModelConfig
    from gemcut.engine.engine import Engine
    from gemcut.engine.requests.outputs import (
        CompletionOutput,
        Delta,
        Logprob,
        RequestMetrics,
        RequestOutput,
        ScoreOutput,
    )
    from gemcut.engine.requests.sampling_params import SamplingParams
    from gemcut.engine.serving.step_loop import EngineFault
    from gemcut.engine.serving.worker import QueueFullError
    from gemcut.engine.transformers_api import (
        AutoConfig,
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
        AutoTokenizer,
        BatchEncoding,
        DynamicCache,
        FlaxGemmaForCausalLM,
        FlaxGemmaModel,
        Gemma2Config,
        Gemma2ForCausalLM,
        Gemma2ForSequenceClassification,
        Gemma2ForTokenClassification,
        Gemma2Model,
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        Gemma3TextForSequenceClassification,
        Gemma3TextModel,
        GemmaConfig,
        GemmaForCausalLM,
        GemmaForSequenceClassification,
        GemmaForTokenClassification,
        GemmaModel,
        GemmaTokenizer,
        GemmaTokenizerFast,
        GenerationConfig,
        StaticCache,
        TextGenerationPipeline,
        VaultGemmaConfig,
        VaultGemmaForCausalLM,
        VaultGemmaModel,
        pipeline,
    )

__all__ = [
    "PUBLISHED",
    "AutoConfig",
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoTokenizer",
    "BatchEncoding",
    "CompletionOutput",
    "Delta",
    "DynamicCache",
    "Engine",
    "EngineFault",
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
    "Logprob",
    "ModelConfig",
    "QueueFullError",
    "RequestMetrics",
    "RequestOutput",
    "SamplingParams",
    "ScoreOutput",
    "StaticCache",
    "TextGenerationPipeline",
    "VaultGemmaConfig",
    "VaultGemmaForCausalLM",
    "VaultGemmaModel",
    "pipeline",
]
MODULES = (
    "config.model_config",
    "requests.outputs",
    "requests.sampling_params",
    "serving.step_loop",
    "serving.worker",
    "engine",
    "transformers_api",
)


def __getattr__(name: str) -> Any:
    # On first use: the command line is in this package too, and `gemcut --help` should not wait two
    # seconds for torch.
    if name in __all__:
        for module in MODULES:
            names = vars(import_module(f"gemcut.engine.{module}"))
            if name in names:
                return names[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
