"""gemcut's model beside transformers': the same weights, through a checkpoint on disk."""

import tempfile
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gemcut.engine.checkpoints.load import load_checkpoint
from gemcut.engine.config.model_config import ModelConfig
from gemcut.engine.execution.cache import KVCache
from gemcut.engine.execution.cache_scales import scales_of
from gemcut.engine.execution.model import Gemma
from gemcut.kernels import reference


def gemcut_twin(
    model: PreTrainedModel,
    ops: ModuleType | SimpleNamespace = reference,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Gemma:
    """The gemcut model with the weights of a transformers model."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_model(Path(folder), ops, dtype, device)


def load_model(
    folder: Path, ops: ModuleType | SimpleNamespace, dtype: torch.dtype, device: str
) -> Gemma:
    """The model of a checkpoint, on `ops`."""
    config = ModelConfig.from_file(folder)
    return Gemma(config, load_checkpoint(folder, config, device=device, dtype=dtype), ops)


def new_cache(
    model: Gemma,
    num_slots: int = 1,
    max_seq_len: int = 128,
    prefill_chunk: int = 128,
    in_fp8: bool = False,
) -> KVCache:
    cache = KVCache(
        model.config,
        num_slots=num_slots,
        max_seq_len=max_seq_len,
        prefill_chunk=prefill_chunk,
        device=model.device,
        dtype=torch.float8_e4m3fn if in_fp8 else model.dtype,
        scales=scales_of(model) if in_fp8 else None,
    )
    poison(cache)
    return cache


def poison(cache: KVCache) -> None:
    """Fill a fresh cache with NaN, so that a read of what was never written shows."""
    for layer in cache.layers:
        layer.k.fill_(torch.nan)
        layer.v.fill_(torch.nan)


def random_ids(length: int, vocab_size: int, seed: int = 0) -> Tensor:
    """Token ids without the special ones: [length] int64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, vocab_size, (length,), generator=generator)


@torch.inference_mode()
def all_logits(model: Gemma, ids: Tensor, prefill_chunk: int = 128) -> Tensor:
    """Logits of every position of one sequence: ids [T] -> [T, V]."""
    return model.logits(model.prefill(ids, new_cache(model, prefill_chunk=prefill_chunk), slot=0))


@torch.inference_mode()
def decoded_logits(model: Gemma, *arguments: Any) -> Tensor:
    """Logits [B, V] after one decode step: token ids, cache, slots, positions."""
    return model.logits(model.decode(*arguments))


def stepwise_logits(model: Gemma, ids: Tensor, prefilled: int, prefill_chunk: int = 7) -> Tensor:
    """The same, by a prefill of the first tokens and a decode step for each of the others."""
    cache = new_cache(model, prefill_chunk=prefill_chunk)
    slot = torch.tensor([0], device=model.device)
    logits = [model.logits(model.prefill(ids[:prefilled], cache, slot=0))]
    for position in range(prefilled, len(ids)):
        token = ids[position : position + 1]
        logits.append(decoded_logits(model, token, cache, slot, slot + position))
    return torch.cat(logits)


@torch.inference_mode()
def greedy(model: Gemma, prompts: list[Tensor], count: int, prefill_chunk: int = 128) -> Tensor:
    """The `count` likeliest next tokens of each prompt, decoded as one batch: [B, count]."""
    cache = new_cache(model, len(prompts), prefill_chunk=prefill_chunk)
    # slots in another order than rows
    slots = torch.arange(len(prompts), device=model.device).flip(0)
    last = [
        model.logits(model.prefill(ids, cache, slot)[-1:])
        for ids, slot in zip(prompts, slots.tolist(), strict=True)
    ]
    tokens = [torch.cat(last).argmax(-1)]
    positions = torch.tensor([len(ids) for ids in prompts], device=model.device)
    for _ in range(count - 1):
        tokens.append(decoded_logits(model, tokens[-1], cache, slots, positions).argmax(-1))
        positions = positions + 1
    return torch.stack(tokens, dim=1)


def assert_same_logits(actual: Tensor, expected: Tensor) -> None:
    """Two float32 implementations may differ by 1e-4 of the logits' scale."""
    error, scale = (actual - expected).abs().max().item(), expected.abs().max().item()
    assert error <= 1e-4 * scale, f"logits differ by {error:.2e}, on a scale of {scale:.2e}"
