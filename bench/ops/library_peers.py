"""The peers of each op from other packages: Liger-Kernel, FlashInfer, GemLite, torchao.

A package is imported only by a peer that takes part.
"""

from functools import lru_cache, partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from gemcut.bench.measure.timing import Call
from gemcut.bench.ops.cases import Arguments, Case
from gemcut.bench.ops.torch_peers import OpPeer, compile_, gathered

PAGE = 16  # keys of a page of FlashInfer's cache
WORKSPACE_BYTES = 128 << 20  # what FlashInfer's documents recommend
GROUP = 128  # columns that share an int4 scale


def library_peers(case: Case) -> dict[str, OpPeer]:
    """The peers of a case from other packages by name, installed or not."""
    on_gpu = partial(OpPeer, needs_gpu=True)
    liger, flashinfer = partial(on_gpu, "liger-kernel"), partial(on_gpu, "flashinfer-python")
    peers = {
        "rmsnorm": {
            "liger": liger("LigerRMSNormFunction, gemma", _liger_rmsnorm),
            "flashinfer": flashinfer("gemma_rmsnorm", _flashinfer_rmsnorm),
        },
        "geglu": {
            "liger": liger("LigerGELUMulFunction", _liger_geglu),
            "flashinfer": flashinfer("gelu_tanh_and_mul", _flashinfer_geglu),
        },
        "attention_decode": {
            "flashinfer": flashinfer("BatchDecodeWithPagedKVCacheWrapper", _flashinfer_decode)
        },
        "attention_prefill": {
            "flashinfer": flashinfer("single_prefill_with_kv_cache", _flashinfer_prefill)
        },
        "skinny_linear": {
            "torchao-int8": OpPeer(
                "torchao",
                "Int8WeightOnlyConfig",
                partial(_torchao, name="Int8WeightOnlyConfig"),
                weight_bits=8,
            ),
            "torchao-int4": on_gpu(
                "torchao",
                "Int4WeightOnlyConfig, tile_packed_to_4d",
                partial(
                    _torchao,
                    name="Int4WeightOnlyConfig",
                    group_size=GROUP,
                    int4_packing_format="tile_packed_to_4d",
                ),
                weight_bits=4,
            ),
            "gemlite-int8": on_gpu("gemlite", "A16W8_INT8", _gemlite_int8, weight_bits=8),
            "gemlite-int4": on_gpu("gemlite", "A16W4_HQQ_INT", _gemlite_int4, weight_bits=4),
        },
        "sample": {
            "flashinfer": flashinfer("top_k_top_p_sampling_from_logits", _flashinfer_sample)
        },
    }.get(case.op, {})
    if case.op == "sample" and case.facts["variant"] == "greedy":
        return {}
    if (quantization := case.facts.get("quantization")) is not None:
        return {name: peer for name, peer in peers.items() if name.endswith(f"-{quantization}")}
    return peers


# Liger-Kernel


def _liger_rmsnorm(a: Arguments) -> Call:
    norm: Any = import_module("liger_kernel.ops.rms_norm")
    settings = (a["eps"], 1.0, "gemma", False)  # offset, casting mode, not in place
    return partial(norm.LigerRMSNormFunction.apply, a["x"], a["weight"], *settings)


def _liger_geglu(a: Arguments) -> Call:
    geglu: Any = import_module("liger_kernel.ops.geglu")
    gate, up = (half.contiguous() for half in a["gate_up"].chunk(2, dim=-1))
    return partial(geglu.LigerGELUMulFunction.apply, gate, up)


# FlashInfer


def _flashinfer_rmsnorm(a: Arguments) -> Call:
    flashinfer: Any = import_module("flashinfer")
    return partial(flashinfer.gemma_rmsnorm, a["x"], a["weight"], a["eps"])


def _flashinfer_geglu(a: Arguments) -> Call:
    flashinfer: Any = import_module("flashinfer")
    return partial(flashinfer.gelu_tanh_and_mul, a["gate_up"])


def _flashinfer_prefill(a: Arguments) -> Call:
    flashinfer: Any = import_module("flashinfer")
    one = gathered(a)
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in (one.q, one.k, one.v))
    return partial(
        flashinfer.single_prefill_with_kv_cache,
        q,
        k,
        v,
        causal=True,
        kv_layout="NHD",
        sm_scale=one.scale,
        window_left=-1 if one.sliding_window is None else one.sliding_window - 1,
        logits_soft_cap=one.softcap,
    )


@lru_cache(maxsize=1)
def _workspace(device: torch.device) -> Tensor:
    return torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)


def _flashinfer_decode(a: Arguments) -> Call:
    """Over pages that hold just the visible keys."""
    flashinfer: Any = import_module("flashinfer")
    one = gathered(a)
    B, HQ, _, K = one.q.shape
    HK, S = one.k.shape[1:3]
    pages = -(-S // PAGE)

    def paged(x: Tensor) -> Tensor:  # [B * pages, HK, PAGE, K]
        padded = nn.functional.pad(x, (0, 0, 0, pages * PAGE - S))
        return padded.unflatten(2, (pages, PAGE)).transpose(1, 2).flatten(0, 1).contiguous()

    cache, device = (paged(one.k), paged(one.v)), one.q.device
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        _workspace(device), kv_layout="HND", use_tensor_cores=HQ // HK >= 4
    )
    wrapper.plan(
        torch.arange(0, B * pages + 1, pages, dtype=torch.int32, device=device),
        torch.arange(B * pages, dtype=torch.int32, device=device),
        torch.full((B,), (S - 1) % PAGE + 1, dtype=torch.int32, device=device),
        HQ,
        HK,
        K,
        PAGE,
        logits_soft_cap=one.softcap,
        q_data_type=one.q.dtype,
        kv_data_type=one.k.dtype,
        sm_scale=one.scale,
    )
    q = one.q[:, :, 0].contiguous()
    return lambda: wrapper.run(q, cache).unsqueeze(1)


def _flashinfer_sample(a: Arguments) -> Call:
    """Top-k, then top-p; the call divides by the temperature, as a server must."""
    flashinfer: Any = import_module("flashinfer")
    temperature, top_k = a["temperature"].unsqueeze(-1), a["top_k"].int()
    return lambda: flashinfer.sampling.top_k_top_p_sampling_from_logits(
        a["logits"] / temperature, top_k, a["top_p"], filter_apply_order="top_k_first"
    )


# Quantised products


def _torchao(a: Arguments, name: str, **settings: Any) -> Call:
    torchao: Any = import_module("torchao.quantization")
    N, D = a["weight"].shape
    layer = nn.Linear(D, N, bias=False, device="meta")
    layer.weight = nn.Parameter(a["weight"].clone(), requires_grad=False)
    torchao.quantize_(layer, getattr(torchao, name)(**settings))
    return partial(compile_(layer, a["x"].device), a["x"])


def _gemlite_int8(a: Arguments) -> Call:
    gemlite: Any = import_module("gemlite.helper")
    layer = gemlite.A16W8_INT8(device=a["x"].device, dtype=a["x"].dtype).from_weights(a["weight"])
    return partial(layer, a["x"])


def _gemlite_int4(a: Arguments) -> Call:
    gemlite: Any = import_module("gemlite.helper")
    quantized, scales, zeros = quantize_int4(a["weight"])
    helper = gemlite.A16W4_HQQ_INT(device=a["x"].device, dtype=a["x"].dtype)
    return partial(helper.from_weights(quantized, scales, zeros), a["x"])


def quantize_int4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Levels 0 to 15 by the range of each group: weight [N, D] -> uint8 [N, D], scales, zeros."""
    groups = weight.float().unflatten(1, (-1, GROUP))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scales = ((high - low) / 15).clamp(min=1e-8)
    zeros = -low / scales
    levels = (groups / scales + zeros).round().clamp(0, 15).to(torch.uint8)
    return levels.flatten(1), scales.squeeze(-1), zeros.squeeze(-1)


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Levels -127 to 127 by the greatest of each row: weight [N, D] -> int8 [N, D], scales [N]."""
    scales = (weight.float().abs().amax(1) / 127).clamp(min=1e-8)
    return (weight.float() / scales.unsqueeze(1)).round().to(torch.int8), scales
