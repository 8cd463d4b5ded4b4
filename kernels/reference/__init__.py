"""The oracle of every op: its definition in plain torch, with the name and signature of its kernel.

It says what a kernel must compute, and runs on any machine, but slowly: `cpu` is written for speed
on a CPU.
"""

from gemcut.kernels.reference.attention import attention_decode, attention_prefill
from gemcut.kernels.reference.ops import (
    add_rmsnorm_,
    begin_step,
    embed,
    geglu,
    linear,
    linear_geglu,
    linear_rope_and_store_,
    lm_head,
    lm_head_argmax,
    rmsnorm,
    rope_and_store_,
    rope_tables,
    skinny_linear,
)
from gemcut.kernels.reference.sampling import (
    advance_,
    best_of_ranges,
    filter_logits,
    gumbel_noise,
    penalize,
    sample,
)

__all__ = [
    "add_rmsnorm_",
    "advance_",
    "attention_decode",
    "attention_prefill",
    "begin_step",
    "best_of_ranges",
    "embed",
    "filter_logits",
    "geglu",
    "gumbel_noise",
    "linear",
    "linear_geglu",
    "linear_rope_and_store_",
    "lm_head",
    "lm_head_argmax",
    "penalize",
    "rmsnorm",
    "rope_and_store_",
    "rope_tables",
    "sample",
    "skinny_linear",
]
