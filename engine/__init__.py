"""The engine: `Engine` takes prompts and yields text."""

from gemcut.engine.config import PUBLISHED, GemmaConfig
from gemcut.engine.engine import Engine
from gemcut.engine.outputs import (
    CompletionOutput,
    Delta,
    Logprob,
    RequestMetrics,
    RequestOutput,
    ScoreOutput,
)
from gemcut.engine.sampling_params import SamplingParams

__all__ = [
    "PUBLISHED",
    "CompletionOutput",
    "Delta",
    "Engine",
    "GemmaConfig",
    "Logprob",
    "RequestMetrics",
    "RequestOutput",
    "SamplingParams",
    "ScoreOutput",
]
