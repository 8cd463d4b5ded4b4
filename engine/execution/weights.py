"""A model's weights as the kernels read them, and the checkpoint tensors that fill them.

Checkpoints hold q, k and v, and gate and up, apart; here each group is one matrix, read by one
product.  `checkpoint_tensors` is the only list of names and shapes: loading, checking and saving
follow it.  A matrix is plain or quantised, each by itself (kernels/quantized_weight.py).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gemcut.engine.config.model_config import ModelConfig
from gemcut.engine.execution.weight_layouts import Layout, Layouts, layout_of
from gemcut.kernels.cpu_products import PackedHead, packed, packed_head
from gemcut.kernels.quantized_weight import FEWEST, QuantizedWeight, Weight

QUANTIZATIONS = ("int8", "int4", "fp8")  # of a plain checkpoint, while it is read
MATRICES = ("qkv", "o", "gate_up", "down")  # of a layer


@dataclass
class LayerWeights:
    """The tensors of one layer; one that the family lacks is None."""

    input_norm: Tensor  # [D]
    qkv: Weight  # [(HQ + 2 HK) * K, D], rows of q, then k, then v
    qkv_bias: Tensor | None  # [(HQ + 2 HK) * K]
    o: Weight  # [D, HQ * K]
    o_bias: Tensor | None  # [D]
    post_attention_norm: Tensor | None  # [D]
    pre_mlp_norm: Tensor  # [D]
    gate_up: Weight  # [2 F, D], rows of gate, then up
    down: Weight  # [D, F]
    post_mlp_norm: Tensor | None  # [D]
    q_norm: Tensor | None  # [K]
    k_norm: Tensor | None  # [K]


@dataclass
class Weights:
    """One model's tensors; `lm_head` is the `embedding` itself if tied, and in a classifier."""

    embedding: Weight  # [V, D]
    layers: list[LayerWeights]
    norm: Tensor  # [D]
    lm_head: Weight | PackedHead  # [V, D]
    score: Tensor | None = None  # [num_labels, D], of a classifier
    score_bias: Tensor | None = None  # [num_labels], where it classifies tokens
    packed_from: Layouts | None = None  # `layouts` before `pack_`

    def to(self, device: torch.device, dtype: torch.dtype) -> "Weights":
        """The same weights on `device` in `dtype`; tied ones stay tied."""

        def moved(x: Any) -> Any:
            is_weight = isinstance(x, Tensor | QuantizedWeight)
            return x.to(device=device, dtype=dtype) if is_weight else x

        fields = {name: moved(x) for name, x in vars(self).items() if name != "lm_head"}
        fields["layers"] = [
            LayerWeights(**{name: moved(x) for name, x in vars(layer).items()})
            for layer in self.layers
        ]
        is_tied = self.lm_head is self.embedding
        return Weights(**fields, lm_head=fields["embedding"] if is_tied else moved(self.lm_head))

    @property
    def head_table(self) -> Weight:
        """The head [V, D] as it was before `pack_`."""
        return self.lm_head.plain if isinstance(self.lm_head, PackedHead) else self.lm_head

    @property
    def layouts(self) -> Layouts:
        """The layouts of the quantised matrices, as they were before `pack_`."""
        if self.packed_from is not None:
            return self.packed_from
        fields = {(None, "embedding"): self.embedding}
        if self.lm_head is not self.embedding:
            fields[None, "lm_head"] = self.head_table
        for i, layer in enumerate(self.layers):
            fields |= {(i, name): getattr(layer, name) for name in MATRICES}
        found = {place: layout_of(weight) for place, weight in fields.items()}
        return {place: layout for place, layout in found.items() if layout is not None}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors; a tied head counts once."""
        fields = [x for layer in self.layers for x in vars(layer).values()]
        fields += [self.embedding, self.norm, self.score, self.score_bias]
        if self.head_table is not self.embedding:
            fields.append(self.head_table)
        return sum(x.nbytes for x in fields if x is not None)

    def packed(self) -> "Weights":
        """The same weights beside what `pack_` makes of them."""
        layers = [replace(layer) for layer in self.layers]
        weights = replace(self, layers=layers)
        weights.pack_()
        return weights

    def pack_(self) -> None:
        """Replace each matrix, one by one, by what a CPU reads fastest in products of few rows.

        Nothing but kernels/cpu.py can read them then.  Of the head there are two.
        """
        self.packed_from = self.layouts
        for layer in self.layers:
            for name in MATRICES:
                setattr(layer, name, packed(getattr(layer, name)))
        self.lm_head = packed_head(self.lm_head)


def plain(weight: Weight) -> Tensor:
    """A weight that is known to be a tensor; ValueError where it is quantised."""
    if not isinstance(weight, Tensor):
        raise ValueError(f"the weight is {weight.format}: only a plain one has elements")
    return weight


@dataclass(frozen=True)
class CheckpointTensor:
    """One tensor of a checkpoint, and the rows that it takes of a tensor in Weights.

    Names and shapes are those of Hugging Face's files.
    """

    name: str
    shape: tuple[int, ...]
    field: str
    layer: int | None = None  # None: a field of Weights itself
    start: int = 0

    def of(self, weights: Weights) -> Weight:
        """The view of `weights` that holds this tensor, of `shape`."""
        owner = weights if self.layer is None else weights.layers[self.layer]
        return getattr(owner, self.field)[self.start : self.start + self.shape[0]]


# Gemma 1's post_attention_layernorm is the norm before the MLP, despite its name.
_NORMS = {
    "gemma": {"input_norm": "input_layernorm", "pre_mlp_norm": "post_attention_layernorm"},
    "vaultgemma": {"input_norm": "input_layernorm", "pre_mlp_norm": "pre_feedforward_layernorm"},
}
_SANDWICH_NORMS = {
    "input_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "pre_mlp_norm": "pre_feedforward_layernorm",
    "post_mlp_norm": "post_feedforward_layernorm",
}


def checkpoint_tensors(config: ModelConfig) -> Iterator[CheckpointTensor]:
    """Every tensor that a checkpoint of this model holds, in the order of the computation."""
    table = (config.vocab_size, config.hidden_size)
    yield CheckpointTensor("model.embed_tokens.weight", table, "embedding")
    for layer in range(config.num_layers):
        yield from _layer_tensors(config, layer)
    yield CheckpointTensor("model.norm.weight", (config.hidden_size,), "norm")
    if config.classifier is not None:
        yield CheckpointTensor("score.weight", (config.num_labels, config.hidden_size), "score")
        if config.classifier == "token":
            yield CheckpointTensor("score.bias", (config.num_labels,), "score_bias")
    elif not config.tie_word_embeddings:
        yield CheckpointTensor("lm_head.weight", table, "lm_head")


def _layer_tensors(config: ModelConfig, layer: int) -> Iterator[CheckpointTensor]:
    D, F, K = config.hidden_size, config.intermediate_size, config.head_dim
    q_size, kv_size = config.num_q_heads * K, config.num_kv_heads * K

    def tensor(name: str, shape: tuple[int, ...], field: str, start: int = 0) -> CheckpointTensor:
        return CheckpointTensor(f"model.layers.{layer}.{name}", shape, field, layer, start)

    for field, name in _NORMS.get(config.model_type, _SANDWICH_NORMS).items():
        yield tensor(f"{name}.weight", (D,), field)
    for name, rows, start in (
        ("q_proj", q_size, 0),
        ("k_proj", kv_size, q_size),
        ("v_proj", kv_size, q_size + kv_size),
    ):
        yield tensor(f"self_attn.{name}.weight", (rows, D), "qkv", start)
        if config.attention_bias:
            yield tensor(f"self_attn.{name}.bias", (rows,), "qkv_bias", start)
    yield tensor("self_attn.o_proj.weight", (D, q_size), "o")
    if config.attention_bias:
        yield tensor("self_attn.o_proj.bias", (D,), "o_bias")
    if config.has_qk_norm:
        yield tensor("self_attn.q_norm.weight", (K,), "q_norm")
        yield tensor("self_attn.k_norm.weight", (K,), "k_norm")
    yield tensor("mlp.gate_proj.weight", (F, D), "gate_up")
    yield tensor("mlp.up_proj.weight", (F, D), "gate_up", F)
    yield tensor("mlp.down_proj.weight", (D, F), "down")


def fused_shapes(config: ModelConfig) -> dict[tuple[int | None, str], tuple[int, ...]]:
    """The shape of each tensor of Weights, by layer (None: a field of Weights) and field."""
    shapes: dict[tuple[int | None, str], tuple[int, ...]] = {}
    for tensor in checkpoint_tensors(config):
        rows = tensor.start + tensor.shape[0]
        shapes[tensor.layer, tensor.field] = (rows, *tensor.shape[1:])
    return shapes


def empty_weights(
    config: ModelConfig,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    layouts: Layouts | None = None,
) -> Weights:
    """Uninitialised fused tensors of the model's shapes; `checkpoint_tensors` covers them all.

    `layouts` has those that are quantised.
    """
    shapes, layouts = fused_shapes(config), layouts or {}

    def allocate(layer: int | None, field: str) -> Any:
        """A weight, or None for a field that the model lacks."""
        if (layer, field) not in shapes:
            return None
        if (layout := layouts.get((layer, field))) is not None:
            return layout.empty(shapes[layer, field], device, dtype)
        return torch.empty(shapes[layer, field], device=device, dtype=dtype)

    def allocate_layer(layer: int) -> LayerWeights:
        fields = LayerWeights.__dataclass_fields__
        return LayerWeights(**{field: allocate(layer, field) for field in fields})

    embedding, lm_head = allocate(None, "embedding"), allocate(None, "lm_head")
    return Weights(
        embedding=embedding,
        layers=[allocate_layer(layer) for layer in range(config.num_layers)],
        norm=allocate(None, "norm"),
        lm_head=embedding if lm_head is None else lm_head,
        score=allocate(None, "score"),
        score_bias=allocate(None, "score_bias"),
    )


def made_layouts(config: ModelConfig, quantization: str) -> Layouts:
    """The layouts that `quantization` gives the matrices of a model; norms and scores stay plain.

    Embedding and head are int8 in every format, with which a small model's quality suffers least:
    fp8 takes the same bytes and costs eight times the squared error (bench/NOTES.md).
    """
    int8 = Layout("int8", 0, torch.float32)
    in_layers = {
        "int8": int8,
        "fp8": Layout("fp8", 0, torch.float32),
        "int4": Layout("int4", FEWEST, torch.bfloat16),
    }[quantization]
    made: Layouts = {
        (tensor.layer, tensor.field): int8 if tensor.layer is None else in_layers
        for tensor in checkpoint_tensors(config)
        if len(tensor.shape) == 2 and tensor.field != "score"
    }
    return made


def fused_layouts(
    config: ModelConfig, layouts: Mapping[str, Layout | None]
) -> tuple[Layouts, list[str]]:
    """The layouts of fused matrices, from those of their parts by name; parts that disagree.

    Where parts have several layouts their matrix is plain.
    """
    parts: dict[tuple[int | None, str], list[str]] = {}
    for tensor in checkpoint_tensors(config):
        if tensor.name in layouts:
            parts.setdefault((tensor.layer, tensor.field), []).append(tensor.name)
    fused, disagreeing = {}, []
    for place, names in parts.items():
        found = {layouts[name] for name in names}
        if len(found) > 1:
            disagreeing += names
        elif (layout := found.pop()) is not None:
            fused[place] = layout
    return fused, disagreeing
