"""Bytes of a decode step and operations of a prefill, counted from the config alone.

A decode step reads every weight once, whatever the batch: of the embedding only a row for each
sequence, but a tied table whole, as the head.  It reads the keys and values that each layer sees,
writes the new ones, and hands float32 logits from the head to the choice of a token.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from gemcut.bench.measure.report_file import print_table
from gemcut.bench.ops.prefill_cases import visible_pairs
from gemcut.engine.config.model_config import ModelConfig
from gemcut.engine.execution.weights import CheckpointTensor, checkpoint_tensors, made_layouts

# biases go with their products; of the embedding see above
KINDS = {
    "qkv": "qkv",
    "qkv_bias": "qkv",
    "o": "o",
    "o_bias": "o",
    "gate_up": "gate_up",
    "down": "down",
    "lm_head": "head",
}
LOGIT_BYTES = 4


@dataclass(frozen=True)
class StepBytes:
    """Bytes of one decode step by kind."""

    embedding: int  # rows
    norms: int
    qkv: int
    o: int
    gate_up: int
    down: int
    head: int
    kv_read: int  # the new token's own included
    kv_written: int
    logits: int  # written, and read again

    @property
    def weights(self) -> int:
        """Bytes of weights, without rows of the embedding."""
        return self.norms + self.qkv + self.o + self.gate_up + self.down + self.head

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


def decode_bytes(
    config: ModelConfig,
    *,
    batch: int,
    context: float,
    dtype: torch.dtype,
    weight_bits: int | None = None,
    quantization: str | None = None,
    cache_dtype: torch.dtype | None = None,
) -> StepBytes:
    """The bytes of a step of `batch` sequences whose new token sees `context`, itself included.

    `context` may be a fraction, as a mean over steps is.  `quantization` is the engine's, with its
    scales; `weight_bits` the size of a weight that another quantises, without them.  `cache_dtype`
    is that of keys and values, by default the others'.
    """
    sizes = dict.fromkeys(StepBytes.__dataclass_fields__, 0)
    layouts = {} if quantization is None else made_layouts(config, quantization)
    for tensor in checkpoint_tensors(config):
        if (kind := _kind(tensor, config)) is None:
            continue
        if (layout := layouts.get((tensor.layer, tensor.field))) is not None:
            sizes[kind] += layout.nbytes(tensor.shape)
        else:
            bits = weight_bits if weight_bits and len(tensor.shape) == 2 else 8 * dtype.itemsize
            sizes[kind] += math.prod(tensor.shape) * bits // 8
    # rows of a quantised embedding count as floats: they are nothing beside the rest
    item_bytes = (cache_dtype or dtype).itemsize
    a_token = 2 * config.num_kv_heads * config.head_dim * item_bytes  # of one layer
    seen = sum(min(context, window_of(config, layer)) for layer in range(config.num_layers))
    sizes |= {
        "embedding": batch * config.hidden_size * dtype.itemsize,
        "kv_read": round(batch * seen * a_token),
        "kv_written": batch * config.num_layers * a_token,
        "logits": 2 * batch * config.vocab_size * LOGIT_BYTES,
    }
    return StepBytes(**sizes)


def _kind(tensor: CheckpointTensor, config: ModelConfig) -> str | None:
    if tensor.field == "embedding":
        return "head" if config.tie_word_embeddings else None
    return KINDS.get(tensor.field, "norms")


def window_of(config: ModelConfig, layer: int) -> float:
    """How many tokens a query of `layer` sees at most."""
    if config.sliding_window is None or not config.is_local(layer):
        return math.inf
    return config.sliding_window


def prefill_flops(config: ModelConfig, *, batch: int, tokens: int) -> int:
    """Operations of a prefill of `batch` prompts: products, two for each multiply-and-add.

    Attention counts pairs of a query and a key that it sees, twice: for the score and for the
    value.  The head is asked for the last token alone.
    """
    matrices = sum(
        math.prod(tensor.shape)
        for tensor in checkpoint_tensors(config)
        if tensor.layer is not None and len(tensor.shape) == 2
    )
    pairs = sum(
        visible_pairs(0, tokens, int(min(tokens, window_of(config, layer))))
        for layer in range(config.num_layers)
    )
    a_pair = 2 * 2 * config.num_q_heads * config.head_dim
    head = 2 * config.vocab_size * config.hidden_size
    return batch * (2 * matrices * tokens + a_pair * pairs + head)


def print_step_bytes(
    step_bytes: StepBytes, read_gbps: float, whole: tuple[str, StepBytes] | None = None
) -> None:
    """Print the bytes with each kind's share, and its time at the bandwidth of reading.

    `whole` is the name and the bytes of the model that this one was cut from.
    """
    counted = [step_bytes] if whole is None else [step_bytes, whole[1]]
    header = ["bytes of a decode step"]
    for name in ["", *([] if whole is None else [f"{whole[0]}: "])]:
        header += [f"{name}MB", "share", f"us at {read_gbps:.1f} GB/s"]
    columns = [{**asdict(one), "total": one.total} for one in counted]
    rows = [[kind, *_cells(columns, kind, read_gbps)] for kind in columns[0]]
    print_table(header, rows)


def _cells(columns: Sequence[dict[str, int]], kind: str, read_gbps: float) -> list[str]:
    cells = []
    for sizes in columns:
        nbytes = sizes[kind]
        share = nbytes / sizes["total"]
        cells += [f"{nbytes / 1e6:.3f}", f"{share:.1%}", f"{nbytes / read_gbps / 1e3:.1f}"]
    return cells
