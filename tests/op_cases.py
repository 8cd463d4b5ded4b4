"""One small call of every op, for tests of what must hold for all of them."""

import inspect
from typing import Any

import torch
from accuracy import DEVICE, quantized, random
from torch import Tensor

from gemcut.kernels import reference
from gemcut.kernels.quantized_weight import QuantizedWeight, Weight
from gemcut.kernels.reference.ops import stored


def index(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=DEVICE)


def small_calls(D: int = 24) -> dict[str, dict[str, Any]]:
    """Arguments by op and by name: 2 tokens, 4 query heads on 2 KV heads, D 24, F 20, V 40."""
    torch.manual_seed(0)
    M, F, V, HQ, HK, K, C = 2, 20, 40, 4, 2, 16, 8
    width = (HQ + 2 * HK) * K
    slots, positions = index(1, 0), index(3, 5)
    inv_freq = 100 ** -torch.arange(0, 1, 2 / K, device=DEVICE)
    cos, sin = reference.rope_tables(positions, inv_freq, 1.0, torch.float32)
    cache = {"k_cache": random(2, HK, C, K), "v_cache": random(2, HK, C, K)}
    store = cache | {"slots": slots, "positions": positions, "cos": cos, "sin": sin}
    attention = {"scale": 0.2, "softcap": 5.0, "sliding_window": 3}
    ragged = {"slots": slots, "starts": index(2, 4), "cu_seqlens": index(0, 2, 3)}
    logits, x = random(M, V), random(M, D)
    counts = torch.zeros(M, V, dtype=torch.int32, device=DEVICE)
    per_row = torch.ones(M, device=DEVICE)
    return {
        "add_rmsnorm_": {
            "residual": random(M, D),
            "x": random(2, M, D),
            "post_weight": random(D),
            "next_weight": random(D),
            "eps": 1e-6,
        },
        "advance_": {
            "chosen": index(3, 5),
            "scores": per_row,
            "slots": slots,
            "tokens": index(7, 8, 9),
            "positions": index(4, 6, -1),
            "limits": index(9, 9, 9),
            "is_end": torch.zeros(3, V, dtype=torch.bool, device=DEVICE),
        },
        "attention_decode": cache
        | attention
        | {"q": random(M, 1, HQ, K), "slots": slots, "positions": positions},
        "attention_prefill": cache | attention | ragged | {"q": random(3, HQ, K)},
        "begin_step": {
            "token_ids": index(3, 39, 7),
            "positions": index(5, 2, 9),
            "rows": index(2, 0),
            "table": random(V, D),
            "scale": 2.0,
            "norm_weight": random(D),
            "eps": 1e-6,
            "inv_freqs": [inv_freq, inv_freq / 3],
            "attention_scalings": [1.0, 1.2],
        },
        "embed": {"token_ids": index(3, 39), "table": random(V, D), "scale": 2.0},
        "geglu": {"gate_up": random(M, 2 * F)},
        "linear": {"x": x, "weight": random(F, D), "bias": random(F)},
        "lm_head": {"x": x, "weight": random(V, D), "softcap": 5.0},
        "lm_head_argmax": {
            "x": x,
            "weight": random(V, D),
            "softcap": None,
            "temperature": 0.5 * per_row,
            "seeds": index(1, 2),
            "positions": positions,
            "rows": index(1, 0),
        },
        "linear_geglu": {"x": x, "gate_up_weight": random(2 * F, D)},
        "linear_rope_and_store_": store | {"x": x, "weight": random(width, D), "bias": None},
        "penalize": {
            "logits": logits,
            "output_counts": counts + 1,
            "in_prompt": counts == 1,
            "repetition": 2 * per_row,
            "presence": per_row,
            "frequency": per_row,
        },
        "rmsnorm": {"x": x, "weight": random(D), "eps": 1e-6},
        "rope_and_store_": store | {"qkv": random(M, width)},
        "rope_tables": {
            "positions": positions,
            "inv_freq": inv_freq,
            "attention_scaling": 1.0,
            "dtype": torch.float32,
        },
        "sample": {
            "logits": logits,
            "temperature": per_row,
            "top_k": index(3, 0),
            "top_p": 0.9 * per_row,
            "min_p": None,
            "seeds": index(1, 2),
            "positions": positions,
        },
        "skinny_linear": {"x": x, "weight": random(F, D), "bias": random(F)},
    }


def in_fp8(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same call of an op with its cache in fp8: of each head k and v at a scale of their own.

    Some of the values that the cache held would be too great for it.
    """
    scales = {}
    for name, factor in (("k", 0.004), ("v", 0.007)):
        cache = arguments[f"{name}_cache"]
        scale = factor * (1 + torch.arange(cache.shape[1], device=DEVICE))
        in_order = stored(cache.transpose(1, 2), torch.float8_e4m3fn, scale)  # [slots, C, HK, K]
        scales[f"{name}_cache"] = in_order.transpose(1, 2).contiguous()
        scales[f"{name}_scale"] = scale
    return arguments | scales


def in_blocks(arguments: dict[str, Any], block_size: int = 3, spare: int = 2) -> dict[str, Any]:
    """The same call of an op with its cache in blocks, in a random order, among `spare` others.

    Blocks lie as vLLM has them: keys beside values, tokens before heads.  Where no slot holds
    anything there is NaN.
    """
    slots, HK, C, K = arguments["k_cache"].shape
    N = -(-C // block_size)
    count = slots * N + spare
    order = torch.randperm(count, device=DEVICE)[: slots * N].view(slots, N)
    dtype = arguments["k_cache"].dtype
    both = torch.full((count, 2, block_size, HK, K), torch.nan, device=DEVICE).to(dtype)
    for which, name in enumerate(("k_cache", "v_cache")):
        padded = torch.full((slots, N * block_size, HK, K), torch.nan, device=DEVICE).to(dtype)
        padded[:, :C] = arguments[name].transpose(1, 2)
        both[order.flatten(), which] = padded.view(slots * N, block_size, HK, K)
    k_cache, v_cache = both.unbind(1)
    tables = order.to(torch.int32)
    return arguments | {"k_cache": k_cache, "v_cache": v_cache, "block_tables": tables}


def quantized_calls(kind: str) -> dict[str, dict[str, Any]]:
    """The same, D 160, of the ops that take a weight: a quantised one, of a kind of accuracy.py."""
    calls = {}
    for name, arguments in small_calls(D=160).items():
        at = weight_of(name)
        if at is not None:
            calls[name] = arguments | {at: quantized(*arguments[at].shape, kind)}
    return calls


def weight_of(name: str) -> str | None:
    """The argument of an op that may be quantised."""
    own = inspect.signature(getattr(reference, name)).parameters.values()
    return next((p.name for p in own if p.annotation == Weight), None)


def positional(name: str, arguments: dict[str, Any]) -> tuple[Any, ...]:
    """The same call without names, as `torch.ops` take it: a quantised weight in its parts."""
    own = inspect.signature(inspect.unwrap(getattr(reference, name))).parameters.values()
    given = [arguments.get(p.name, p.default) for p in own]
    for i, x in enumerate(given):
        if isinstance(x, QuantizedWeight):
            given[i] = x.values
            return (*given, x.scales, x.zero_points, x.columns, x.dtype)
    return tuple(given)
