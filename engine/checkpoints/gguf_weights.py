"""The tensors of a GGUF file as checkpoint tensors: by name, dtype and layout.

    Q4_0    blocks of 32 columns: a float16 scale, and 16 bytes of which byte j holds column j in
            its low half and column j + 16 in its high half, each plus 8
    Q8_0    blocks of 32 columns: a float16 scale, and 32 int8

These two go into the kernels' layout with every bit.  Floats are read as they are; all others are
dequantised by the gguf package, in float32, and rounded once to the engine's dtype.

llama.cpp stores the weight of a norm as 1 + w.  The rows of q and k are as in Hugging Face's
files: it permutes those of Llama, whose heads rotate neighbours, and none of Gemma's.
"""

from functools import partial

import numpy as np
import torch
from torch import Tensor

from gemcut.engine.checkpoints.gguf_config import EMBEDDING, HEAD
from gemcut.engine.checkpoints.gguf_header import GgufHeader, GgufTensor, gguf_package
from gemcut.engine.checkpoints.stored_tensors import first_of, row_ranges
from gemcut.engine.checkpoints.stored_weights import StoredWeight
from gemcut.engine.config.model_config import ModelConfig
from gemcut.engine.execution.weight_layouts import Layout
from gemcut.engine.execution.weights import checkpoint_tensors
from gemcut.kernels.quantized_weight import QuantizedWeight, packed_width

BLOCK = 32
LAYOUTS = {
    name: Layout(kind, BLOCK, torch.float16) for name, kind in (("Q4_0", "int4"), ("Q8_0", "int8"))
}
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
PIECE = 2**22  # elements dequantised at a time

# The last names of a layer's tensors there and in Hugging Face's files.
_PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_WHOLE = {
    "model.embed_tokens.weight": EMBEDDING,
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": HEAD,
}
_OF_IMAGES = ("v.", "mm.")  # in files that hold both parts of a model


def stored_weights(
    header: GgufHeader, config: ModelConfig, dtype: torch.dtype
) -> dict[str, StoredWeight]:
    """The tensors of a model by their names in Hugging Face's files: exactly those, or ValueError.

    Those that are neither floats nor Q4_0 or Q8_0 become `dtype`.
    """
    names = {tensor.name: gguf_name(tensor.name, config) for tensor in checkpoint_tensors(config)}
    if missing := [name for name in names.values() if name not in header.tensors]:
        raise ValueError(f"{header.path}: {first_of(missing)} missing")
    others = header.tensors.keys() - names.values()
    if extra := sorted(name for name in others if not name.startswith(_OF_IMAGES)):
        raise ValueError(f"{header.path}: {first_of(extra)} not part of the model")
    stored = {}
    for tensor in checkpoint_tensors(config):
        found = header.tensors[names[tensor.name]]
        if found.shape != tensor.shape:
            raise ValueError(
                f"{header.path}: {found.name} is {list(found.shape)}, "
                f"the metadata say {list(tensor.shape)}"
            )
        stored[tensor.name] = _stored(header, found, dtype)
    return stored


def _stored(header: GgufHeader, tensor: GgufTensor, dtype: torch.dtype) -> StoredWeight:
    kind, layout = tensor.type.name, None
    if len(tensor.shape) == 1:
        if kind not in FLOATS:
            raise ValueError(f"{header.path}: {tensor.name} is {kind}, but norms are floats")
        load = partial(_load_norm, header, tensor)
    elif kind in FLOATS:
        load = partial(_load_floats, header, tensor)
    elif kind in LAYOUTS:
        layout = LAYOUTS[kind]
        load = partial(_load_quantized, header, tensor, dtype)
    else:
        _check_type(header, tensor)
        load = partial(_load_others, header, tensor, dtype)
    return StoredWeight(f"{header.path.name}: {tensor.name}", tensor.shape, layout, load)


def dequantized_types(header: GgufHeader) -> list[str]:
    """The types of the tensors that have no layout here, and become floats."""
    kinds = {tensor.type.name for tensor in header.tensors.values()}
    return sorted(kinds - LAYOUTS.keys() - FLOATS.keys())


def gguf_name(name: str, config: ModelConfig) -> str:
    """llama.cpp's name of a tensor in Hugging Face's files."""
    if name in _WHOLE:
        return _WHOLE[name]
    _, _, layer, part = name.removesuffix(".weight").split(".", 3)
    # Gemma 1's post_attention_layernorm is the norm before the MLP
    before_mlp = not config.has_post_norms and part == "post_attention_layernorm"
    return f"blk.{layer}.{'ffn_norm' if before_mlp else _PARTS[part]}.weight"


def _check_type(header: GgufHeader, tensor: GgufTensor) -> None:
    """Nothing, or ValueError where the gguf package cannot dequantise a tensor."""
    package = gguf_package()
    _, block_bytes = package.GGML_QUANT_SIZES[tensor.type]
    try:
        package.dequantize(np.zeros((1, block_bytes), np.uint8), tensor.type)
    except NotImplementedError:
        raise ValueError(
            f"{header.path}: {tensor.name} is {tensor.type.name}, which the gguf package does not "
            f"dequantise"
        ) from None


def _load_floats(header: GgufHeader, tensor: GgufTensor) -> Tensor:
    """A tensor of floats, memory-mapped."""
    raw = torch.from_numpy(header.bytes_of(tensor))
    return raw.view(FLOATS[tensor.type.name]).view(tensor.shape)


def _load_norm(header: GgufHeader, tensor: GgufTensor) -> Tensor:
    """The weight w of a norm, of which the file holds 1 + w."""
    return _load_floats(header, tensor).float() - 1


def _load_quantized(header: GgufHeader, tensor: GgufTensor, dtype: torch.dtype) -> QuantizedWeight:
    """A matrix in the kernels' layout, that stands for rows of `dtype`."""
    rows, columns = tensor.shape
    blocks = torch.from_numpy(header.bytes_of(tensor)).view(rows, columns // BLOCK, -1)
    scales = blocks[..., :2].contiguous().view(torch.float16).squeeze(-1)  # [N, G]
    codes = blocks[..., 2:]  # [N, G, bytes]
    if tensor.type.name == "Q8_0":
        values = codes.contiguous().view(torch.int8).flatten(1)
    else:
        values = torch.empty(rows, packed_width(columns), dtype=torch.uint8, device="cpu")
        for part in row_ranges(tensor.shape, PIECE):
            values[part] = _in_pairs(codes[part])
    return QuantizedWeight(values, scales, None, columns, dtype)


def _in_pairs(codes: Tensor) -> Tensor:
    """Q4_0's halves of bytes where int4 has them: [N, G, 16] -> [N, ceil(G / 2) * 32]."""
    if codes.shape[1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 0, 0, 1), value=0x88)  # columns of zeros
    one, other = codes[:, 0::2], codes[:, 1::2]  # the columns 0 to 31 and 32 to 63 of a pair
    both = torch.stack([one & 15 | other << 4, one >> 4 | other & 0xF0], dim=2)
    return both.flatten(1)


def _load_others(header: GgufHeader, tensor: GgufTensor, dtype: torch.dtype) -> Tensor:
    """A matrix that the gguf package dequantises."""
    package, raw = gguf_package(), header.bytes_of(tensor)
    target = torch.empty(tensor.shape, dtype=dtype, device="cpu")
    for part in row_ranges(tensor.shape, PIECE):
        target[part] = torch.from_numpy(package.dequantize(raw[part], tensor.type))
    return target
