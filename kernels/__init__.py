"""Fused Triton kernels for Gemma: each op has the name and the signature of its oracle.

`reference` holds the oracles in plain torch, `cpu` the same written for speed on a CPU.  Docstrings
of the modules tell what each op computes, where it rounds, what it costs and what bounds it.

`torch.ops.gemcut` holds the same for torch.compile: see registration.py.
"""

import sys

if sys.platform == "linux":  # Triton is built for Linux; elsewhere there are only the ops in torch
    from gemcut.kernels.advance import advance_
    from gemcut.kernels.begin import begin_step
    from gemcut.kernels.decode_attention import attention_decode
    from gemcut.kernels.head import embed, lm_head, lm_head_argmax
    from gemcut.kernels.matmul import linear, skinny_linear
    from gemcut.kernels.mlp import geglu, linear_geglu
    from gemcut.kernels.norm import add_rmsnorm_, rmsnorm
    from gemcut.kernels.prefill_attention import attention_prefill
    from gemcut.kernels.qkv import linear_rope_and_store_
    from gemcut.kernels.registration import register
    from gemcut.kernels.rotary import rope_and_store_, rope_tables
    from gemcut.kernels.sampling import penalize, sample

__all__ = [
    "add_rmsnorm_",
    "advance_",
    "attention_decode",
    "attention_prefill",
    "begin_step",
    "embed",
    "geglu",
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

if sys.platform == "linux":
    register({name: globals()[name] for name in __all__})
