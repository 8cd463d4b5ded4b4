"""What `gemcut convert --quantization` writes: matrices as the package compressed-tensors has them.

The matrices of layers are quantised, each with its scales in the dtype of the other tensors.
Embedding and head stay plain: transformers and vLLM quantise neither.  compressed_tensors.py reads
the same back.
"""

from typing import Any

import torch
from torch import Tensor

from gemcut.engine.checkpoints.stored_weights import Layout
from gemcut.engine.config.quantization_config import METHOD
from gemcut.engine.execution.weights import CheckpointTensor
from gemcut.kernels.quantized_weight import FEWEST, PAIR, QuantizedWeight

ROWS = 2**12  # repacked at a time


def layout_to_write(
    quantization: str, tensor: CheckpointTensor, dtype: torch.dtype
) -> Layout | None:
    """The layout of a checkpoint tensor in the files; None where it stays plain."""
    if tensor.layer is None or len(tensor.shape) != 2:
        return None
    return Layout(quantization, FEWEST if quantization == "int4" else 0, dtype)


def config_to_write(quantization: str) -> dict[str, Any]:
    """quantization_config of such files."""
    is_float, by_group = quantization == "fp8", quantization == "int4"
    weights = {
        "num_bits": 4 if by_group else 8,
        "type": "float" if is_float else "int",
        "symmetric": True,
        "strategy": "group" if by_group else "channel",
        "group_size": FEWEST if by_group else None,
        "dynamic": False,
    }
    activations = {"input_activations": None, "output_activations": None}
    return {
        "quant_method": METHOD,
        "quantization_status": "compressed",
        "format": "float-quantized" if is_float else "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, **activations}},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }


def part_sizes(name: str, shape: tuple[int, ...], layout: Layout) -> dict[str, int]:
    """The tensors in the files that hold a matrix, and the bytes of each."""
    rows, columns = shape
    scale = rows * layout.groups(columns) * layout.scales_dtype.itemsize
    if layout.format == "fp8":
        return {name: rows * columns, f"{name}_scale": scale}
    words = -(-columns // (8 if layout.format == "int4" else 4))
    return {f"{name}_packed": rows * words * 4, f"{name}_scale": scale, f"{name}_shape": 16}


def parts_of(name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
    """The tensors themselves.  Where a scale is 0, so are the values: 1 serves as well."""
    scales = torch.where(weight.scales == 0, torch.ones_like(weight.scales), weight.scales)
    if weight.format == "fp8":
        return {name: weight.values, f"{name}_scale": scales}
    pack = _words_of_int4 if weight.format == "int4" else _words_of_int8
    packed = torch.cat([pack(rows, weight.columns) for rows in weight.values.split(ROWS)])
    shape = torch.tensor(weight.shape, dtype=torch.int64, device="cpu")
    return {f"{name}_packed": packed, f"{name}_scale": scales, f"{name}_shape": shape}


def _words_of_int8(values: Tensor, columns: int) -> Tensor:
    """int8 [N, D] -> int32 [N, ceil(D / 4)], the first lowest, each + 128."""
    padded = torch.nn.functional.pad(values.view(torch.uint8) ^ 128, (0, -columns % 4))
    return padded.contiguous().view(torch.int32)


def _words_of_int4(packed: Tensor, columns: int) -> Tensor:
    """uint8 of `pack_int4` -> int32 [N, D / 8], the first lowest, each + 8; D in groups of 32."""
    even, odd = packed.unflatten(1, (-1, PAIR // 4, 2)).unbind(-1)
    first, second = even & 15 | odd << 4, even >> 4 | odd & 240  # columns 0 to 31, and 32 to 63
    halves = torch.stack([first, second], 2).flatten(1)
    return halves[:, : columns // 2].contiguous().view(torch.int32)
