"""Two models of the same sizes, engines of their tensors, and every bit of what those hold."""

from typing import Any

import torch
from allocations import tensors
from random_models import random_model

from gemcut.engine import Engine

PROMPT = [2, 5, 9, 11, 30]


def make(model: Any, **options: Any) -> Engine:
    options = {"device": "cpu", "dtype": "float32", "max_batch_size": 2} | options
    return Engine.from_state_dict(model.config, model.state_dict(), **options)


def pair_of(model_type: str = "gemma2", **overrides: Any) -> tuple[Any, Any]:
    """Two models of the same sizes."""
    first, second = (random_model(model_type, seed=seed, **overrides) for seed in (0, 1))
    return first, second


def bits(engine: Engine) -> list[bytes]:
    """Every bit of the weights and the scales of the cache."""
    found = list(tensors(engine.model.weights))
    found += [
        x for layer in engine.cache.layers for x in (layer.k_scale, layer.v_scale) if x is not None
    ]
    plain = (x.to_dense() if x.is_mkldnn else x for x in found)
    return [x.contiguous().flatten().view(torch.uint8).numpy().tobytes() for x in plain]
