"""Checkpoints that the package compressed-tensors makes, of small random models."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from random_models import random_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, PreTrainedModel

# what `config_groups` has, by the names of the tests
SCHEMES: dict[str, tuple[str, dict[str, Any]]] = {
    "int4-groups-of-32": ("pack-quantized", {"num_bits": 4, "group_size": 32}),
    "int4-groups-of-128": ("pack-quantized", {"num_bits": 4, "group_size": 128}),
    "int4-zero-points": (
        "pack-quantized",
        {"num_bits": 4, "group_size": 32, "symmetric": False},
    ),
    "int4-by-row": ("pack-quantized", {"num_bits": 4, "strategy": "channel"}),
    "int8-packed": ("pack-quantized", {"num_bits": 8, "strategy": "channel"}),
    "int8-packed-groups": ("pack-quantized", {"num_bits": 8, "group_size": 32}),
    "int8-packed-zero-points": (
        "pack-quantized",
        {"num_bits": 8, "strategy": "channel", "symmetric": False},
    ),
    "int8": ("int-quantized", {"num_bits": 8, "strategy": "channel"}),
    "int8-zero-points": (
        "int-quantized",
        {"num_bits": 8, "strategy": "channel", "symmetric": False},
    ),
    "int8-one-scale": ("naive-quantized", {"num_bits": 8, "strategy": "tensor"}),
    "int4-unpacked": ("naive-quantized", {"num_bits": 4, "group_size": 32}),
    "fp8-by-row": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
    "fp8-one-scale": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
    "fp8-blocks": (
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]},
    ),
    "fp8-uneven-blocks": (
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [48, 64]},
    ),
}


SIZES = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}  # that groups of 128 divide


def compressed_model(
    folder: Path,
    schemes: dict[str, tuple[str, ...]],
    model_type: str = "gemma3_text",
    ignore: tuple[str, ...] = ("lm_head",),
    dtype: torch.dtype = torch.float32,
    **overrides: Any,
) -> None:
    """Save a random model in this way."""
    model = random_model(model_type, **SIZES | overrides)
    save_compressed(folder, model, schemes, ignore, dtype)


def their_logits(folder: Path, ids: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Transformers' logits of a checkpoint, which it dequantises: ids [T] -> [T, V]."""
    as_floats = CompressedTensorsConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=as_floats, attn_implementation="eager", dtype=dtype
    )
    with torch.inference_mode():
        return model.eval()(input_ids=ids[None]).logits[0].float()


def rewrite_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Apply `change` to the quantization_config of a checkpoint."""
    file = folder / "config.json"
    values = json.loads(file.read_text())
    change(values["quantization_config"])
    file.write_text(json.dumps(values))


def save_compressed(
    folder: Path,
    model: PreTrainedModel,
    schemes: dict[str, tuple[str, ...]],
    ignore: tuple[str, ...] = ("lm_head",),
    dtype: torch.dtype = torch.float32,
    cache_scheme: dict[str, Any] | None = None,
) -> None:
    """Save a model with what `schemes` names of SCHEMES for its targets, scales by min and max.

    cache_scheme: that of `calibrate_cache_`.
    """
    from compressed_tensors.quantization import QuantizationConfig

    model.to(dtype).save_pretrained(folder)
    formats = {SCHEMES[name][0] for name in schemes}
    values = {
        "config_groups": {
            f"group_{i}": {
                "targets": list(targets),
                "weights": SCHEMES[name][1],
                "format": SCHEMES[name][0],
            }
            for i, (name, targets) in enumerate(schemes.items())
        },
        "ignore": list(ignore),
        "format": formats.pop() if len(formats) == 1 else "mixed-precision" if formats else "dense",
        "quantization_status": "compressed",
        "kv_cache_scheme": cache_scheme,
    }
    config = QuantizationConfig.model_validate(values)
    plain = load_file(folder / "model.safetensors")
    tensors = dict(plain)
    for name, module in _targeted(model, config):
        scheme = _scheme_of(name, module, config)
        weight = tensors.pop(f"{name}.weight")
        for part, tensor in compressed(weight, scheme).items():
            tensors[f"{name}.{part}"] = tensor.contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    file = folder / "config.json"
    dumped = json.loads(config.model_dump_json())
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": dumped}))


def calibrate_cache_(model: PreTrainedModel, strategy: str, ids: Tensor) -> dict[str, Any]:
    """Give a model the package's cache in fp8, with scales that a text just fits: its scheme.

    strategy: tensor or attn_head.  From then on the model's keys and values are rounded so.
    """
    from compressed_tensors.modeling.kvcache import QuantizedKVCache
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationScheme,
        QuantizationStatus,
    )
    from compressed_tensors.quantization.lifecycle.initialize import initialize_attn_qparams
    from compressed_tensors.quantization.utils import calculate_qparams

    values = {"num_bits": 8, "type": "float", "strategy": strategy}
    args = QuantizationArgs.model_validate(values)
    scheme = QuantizationScheme(targets=["LlamaAttention"], input_activations=args)
    axes = (0, 2, 3) if strategy == "attn_head" else (0, 1, 2, 3)

    def quantised(module: Any, positional: Any, named: dict[str, Any]) -> Any:
        module.kv_cache.add_past_key_values(named["cache"])  # as the package does it
        return positional, named | {"cache": module.kv_cache}

    def scale_of(states: Tensor) -> Tensor:
        return calculate_qparams(states.amin(axes), states.amax(axes), args)[0]

    def calibrate(cache: Any, positional: tuple[Tensor, Tensor, Any]) -> None:
        module, (keys, values) = cache.attn_module(), positional[:2]
        module.k_scale.data = scale_of(keys).view_as(module.k_scale)
        module.v_scale.data = scale_of(values).view_as(module.v_scale)

    hooks = []
    for layer in model.base_model.layers:
        attention = layer.self_attn
        attention.quantization_scheme = scheme
        attention.quantization_status = QuantizationStatus.FROZEN
        attention.kv_cache = QuantizedKVCache(model.config, attention)
        initialize_attn_qparams(attention, scheme, force_zero_point=False)
        attention.register_forward_pre_hook(quantised, with_kwargs=True)
        hooks.append(attention.kv_cache.register_forward_pre_hook(calibrate))
    with torch.inference_mode():
        model(input_ids=ids[None], use_cache=True)
    for hook in hooks:
        hook.remove()
    return values


def _targeted(model: PreTrainedModel, config: Any) -> list[tuple[str, torch.nn.Module]]:
    from compressed_tensors.utils import match_named_modules

    targets = [target for group in config.config_groups.values() for target in group.targets]
    return list(match_named_modules(model, targets, config.ignore))


def _scheme_of(name: str, module: torch.nn.Module, config: Any) -> Any:
    from compressed_tensors.utils.match import match_targets

    groups = config.config_groups.values()
    targets = match_targets(name, module, [t for group in groups for t in group.targets])
    return next(group for group in groups if targets[0] in group.targets)


def compressed(weight: Tensor, scheme: Any) -> dict[str, Tensor]:
    """The tensors of a matrix in a checkpoint, by the package."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization.utils import calculate_qparams

    args = scheme.weights
    low, high = _extremes(weight, args)
    scale, zero_point = calculate_qparams(low, high, args)
    state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero_point}
    return BaseCompressor.get_value_from_registry(scheme.format).compress(state, scheme)


def _extremes(weight: Tensor, args: Any) -> tuple[Tensor, Tensor]:
    """The least and the greatest number of what shares a scale."""
    N, D = weight.shape
    rows, columns = {
        "tensor": (N, D),
        "channel": (1, D),
        "group": (1, args.group_size),
        "block": args.block_structure,
    }[args.strategy]
    padded = torch.nn.functional.pad(weight, (0, -D % columns, 0, -N % rows))
    blocks = padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
    extremes = blocks.amin((1, 3)), blocks.amax((1, 3))
    if args.strategy == "tensor":
        return extremes[0].flatten(), extremes[1].flatten()
    return extremes
