"""What users import from `gemcut.engine`."""

from gemcut.engine import transformers_api
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
from gemcut.engine.requests.prompts import TextPrompt, TokensPrompt
from gemcut.engine.requests.sampling_params import SamplingParams
from gemcut.engine.requests.structured_outputs import StructuredOutputsParams
from gemcut.engine.serving.step_loop import EngineFault
from gemcut.engine.serving.worker import QueueFullError
from gemcut.engine.transformers_api import *

__all__ = [
    "PUBLISHED",
    "CompletionOutput",
    "Delta",
    "Engine",
    "EngineFault",
    "Logprob",
    "ModelConfig",
    "QueueFullError",
    "RequestMetrics",
    "RequestOutput",
    "SamplingParams",
    "ScoreOutput",
    "StructuredOutputsParams",
    "TextPrompt",
    "TokensPrompt",
]
__all__ += transformers_api.__all__
