"""The scales of a cache in fp8: bounds of keys and values that follow from the weights alone.

Of a layer's input, x / rms(x) has a norm of sqrt(D) at most.  So with the rows w of k or v, their
bias b and the norm's weight g, no text makes a number greater than

    |w[i] . h + b[i]|  <=  sqrt(D) * |w[i] * (1 + g)| + |b[i]|

A key is rotated: pair i, i + K/2 stays within the root of both bounds' squares, times the scaling c
of the rotation.  Keys that are normalised, by weights u, are within c * sqrt(K) * max |1 + u|.

A head's scale is the power of two by which the greatest of its bounds fits e4m3: dividing by it and
multiplying with it are exact.  Texts stay far below the bounds (Gemma 3 270M: 4 to 9 times with
keys, 5 to 190 with values), which costs nothing: e4m3 has 4 significant bits in every number down
to 2 ** -14 of its greatest.
"""

import math

import torch
from torch import Tensor

from gemcut.engine.execution.model import Gemma
from gemcut.kernels.cpu_quantized import PackedInt4, dequantized_rows
from gemcut.kernels.quantized_weight import QuantizedWeight, Weight
from gemcut.kernels.reference.ops import GREATEST_FP8

Scales = list[tuple[Tensor, Tensor]]  # of keys and of values, [HK] float32 each, by layer
ROUNDING = 1.02  # of h, and of k and v themselves, in bfloat16


def scales_of(model: Gemma) -> Scales:
    """The scales of every layer of a model; its weights may be quantised, or packed for a CPU."""
    by_layer = (bounds(model, layer) for layer in range(model.config.num_layers))
    return [(_scale(keys), _scale(values)) for keys, values in by_layer]


def chosen_scales(model: Gemma, given: Scales | None, is_fp8: bool) -> Scales | None:
    """The scales of a model's cache: those given, checked, or its own; None where it is not fp8."""
    if given is None:
        return scales_of(model) if is_fp8 else None
    if not is_fp8:
        raise ValueError("kv_scales are for a cache in fp8; give kv_cache_dtype='fp8' too")
    layers, shape = model.config.num_layers, (model.config.num_kv_heads,)
    pairs = isinstance(given, list | tuple) and all(
        isinstance(pair, list | tuple) and len(pair) == 2 for pair in given
    )
    if not pairs or len(given) != layers:
        raise ValueError(f"kv_scales must be a pair of tensors for each of the {layers} layers")
    for layer, pair in enumerate(given):
        for name, scale in zip(("keys", "values"), pair, strict=True):
            what = f"kv_scales of {name} in layer {layer}"
            if not isinstance(scale, Tensor) or scale.dtype != torch.float32:
                raise ValueError(f"{what} must be a tensor in float32")
            if tuple(scale.shape) != shape or not scale.is_contiguous():
                raise ValueError(
                    f"{what} must be contiguous {list(shape)}, not {list(scale.shape)}"
                )
            if scale.device != model.device:
                raise ValueError(f"{what} are on {scale.device}, the model on {model.device}")
            if not (scale.isfinite() & (scale >= torch.finfo(torch.float32).tiny)).all():
                raise ValueError(f"{what} are {scale.tolist()}; scales are finite and above 0")
    return list(given)


def bounds(model: Gemma, layer: int) -> tuple[Tensor, Tensor]:
    """What |k| and |v| of each head cannot exceed: [HK] float32 twice."""
    config, weights = model.config, model.weights.layers[layer]
    HK, K = config.num_kv_heads, config.head_dim
    rows = slice(config.num_q_heads * K, None)
    kv = _plain(weights.qkv, rows)  # [2 HK K, D]
    of_rows = torch.linalg.vector_norm(kv * (1 + weights.input_norm.float()), dim=1)
    of_rows = of_rows * math.sqrt(config.hidden_size)
    if weights.qkv_bias is not None:
        of_rows = of_rows + weights.qkv_bias[rows].float().abs()
    of_keys, of_values = of_rows.view(2, HK, K).unbind()
    if weights.k_norm is not None:
        keys = (1 + weights.k_norm.float()).abs().amax().expand(HK) * math.sqrt(K)
    else:
        keys = torch.linalg.vector_norm(of_keys.view(HK, 2, K // 2), dim=1).amax(1)
    rope = model.rope_local if config.is_local(layer) else model.rope_global
    return keys * abs(rope.attention_scaling), of_values.amax(1)


def _plain(weight: Weight | PackedInt4, rows: slice) -> Tensor:
    """Rows of a weight in float32."""
    if isinstance(weight, QuantizedWeight | PackedInt4):
        return dequantized_rows(weight, 0, weight.shape[0], torch.float32)[rows]
    return (weight.to_dense() if weight.is_mkldnn else weight)[rows].float()


def _scale(bound: Tensor) -> Tensor:
    """The least power of two that bounds [HK] may be divided by; 1 where there is no bound."""
    exponent = (bound * (ROUNDING / GREATEST_FP8)).log2().ceil()
    return torch.where(exponent.isfinite(), exponent.exp2(), 1.0).contiguous()
