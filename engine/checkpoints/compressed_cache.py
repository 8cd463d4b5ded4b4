"""The scales of a KV cache in fp8 that the files of a compressed-tensors checkpoint hold.

    model.layers.N.self_attn.k_scale, v_scale    of all heads [1], or of each [HK, 1, 1]
    model.layers.N.self_attn.k_proj.output_scale, v_proj.output_scale    the same in older files

kv_cache_scheme in quantization_config says which.  Keys (rotated) and values are stored divided by
them; what a scale leaves out of e4m3's range saturates.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from gemcut.engine.checkpoints.compressed_tensors import check_floats
from gemcut.engine.checkpoints.safetensor_headers import TensorHeader
from gemcut.engine.config.model_config import ModelConfig
from gemcut.engine.execution.cache_scales import Scales

_NAMES = ("{0}_scale", "{0}_proj.output_scale")


def stored_scales(
    stored: Mapping[str, TensorHeader], config: ModelConfig, strategy: str
) -> Scales | None:
    """The scales of every layer, [HK] on the CPU; None where there are none at all.

    strategy: tensor or attn_head.  ValueError names one that is missing or no scale.
    """
    layers = range(config.num_layers)
    found = {(layer, kind): _find(stored, layer, kind) for layer in layers for kind in "kv"}
    if not any(found.values()):
        return None
    scales = {}
    for (layer, kind), header in found.items():
        if header is None:
            raise ValueError(f"model.layers.{layer}.self_attn.{kind}_scale is missing")
        scales[layer, kind] = _read(header, config.num_kv_heads, strategy)
    return [(scales[layer, "k"], scales[layer, "v"]) for layer in layers]


def _find(stored: Mapping[str, TensorHeader], layer: int, kind: str) -> TensorHeader | None:
    """The scale of a layer's keys, k, or values, v."""
    names = (f"model.layers.{layer}.self_attn.{name.format(kind)}" for name in _NAMES)
    return next((stored[name] for name in names if name in stored), None)


def _read(header: TensorHeader, heads: int, strategy: str) -> Tensor:
    """A scale a head, [HK]."""
    count = heads if strategy == "attn_head" else 1
    check_floats(header)
    if [size for size in header.shape if size != 1] != [count] * (count > 1):
        raise ValueError(f"{header} is {list(header.shape)}, must be {[count]} ({strategy})")
    scale = header.load().float().flatten()
    if not (scale.isfinite() & (scale >= torch.finfo(torch.float32).tiny)).all():
        raise ValueError(f"{header} is {scale.tolist()}; scales are finite and above 0")
    return scale.expand(heads).contiguous()
