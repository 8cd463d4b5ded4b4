"""The peers of each op from torch: eager, compiled, and torch's own kernel for the op.

A peer gets the op's arguments and may first bring them into the form that suits it best: keys in
one piece, a mask, quantised weights.  That is not timed.  What its call returns is held to the
oracle, like the kernel's own results.  library_peers.py has the peers from other packages.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from gemcut.bench.measure.timing import Call
from gemcut.bench.ops import torch_ops
from gemcut.bench.ops.cases import Arguments, Case

Compute = Callable[..., Any]


@dataclass(frozen=True)
class OpPeer:
    """One way to compute an op, a peer's or gemcut's own, and its description in reports."""

    package: str
    settings: str
    build: Callable[[Arguments], Call]  # what the call returns is what the op returns
    computes: Arguments | None = None  # arguments that it replaces by these
    weight_bits: int | None = None  # of a quantised weight
    needs_gpu: bool = False


def torch_peers(case: Case, device: torch.device) -> dict[str, OpPeer]:
    """Torch's peers of a case by name: eager, compiled, and its kernel for just this op."""
    op = getattr(torch_ops, case.op)
    compiled = partial(compile_, op, device)
    peers = {
        "torch": OpPeer("torch", "eager", lambda a: partial(op, **a)),
        "torch.compile": OpPeer(
            "torch", _compile_settings(device), lambda a: partial(compiled(), **a)
        ),
    }
    if case.op in ("linear", "skinny_linear"):
        peers["blas"] = OpPeer("torch", f"{_blas(device)}, F.linear", _blas_linear)
        del peers["torch"]
    if case.op == "linear":  # gemcut's own product is the library's
        del peers["torch.compile"]
    if case.op == "lm_head":
        peers["blas"] = OpPeer(
            "torch", f"{_blas(device)}, the bare product", _bare_head, {"softcap": None}
        )
    if case.op == "rmsnorm":
        peers["rms_norm"] = OpPeer("torch", "F.rms_norm by 1 + w", _rms_norm)
    if case.op.startswith("attention"):
        if case.facts["softcap"] is None:
            peers["sdpa"] = OpPeer("torch", "scaled_dot_product_attention", _sdpa)
        peers["flex"] = OpPeer(
            "torch", "flex_attention, compiled, block mask", partial(_flex, device=device)
        )
    return peers


def compile_(function: Compute, device: torch.device) -> Compute:
    """A function compiled for the shapes that it is called with, as fast as the compiler can."""
    mode = "max-autotune-no-cudagraphs" if device.type == "cuda" else None
    return torch.compile(function, fullgraph=True, dynamic=False, mode=mode)


def _compile_settings(device: torch.device) -> str:
    return "max-autotune-no-cudagraphs" if device.type == "cuda" else "default mode"


def _blas(device: torch.device) -> str:
    return "cuBLAS" if device.type == "cuda" else "the CPU's BLAS"


# Products and norms


def _blas_linear(a: Arguments) -> Call:
    return partial(F.linear, a["x"], a["weight"])


def _bare_head(a: Arguments) -> Call:
    return partial(F.linear, a["x"], a["weight"])


def _rms_norm(a: Arguments) -> Call:
    x, weight = a["x"], (1 + a["weight"].float()).to(a["x"].dtype)
    return partial(F.rms_norm, x, (x.shape[-1],), weight, a["eps"])


# Attention


@dataclass(frozen=True)
class Attention:
    """An attention op's arguments as libraries take them: one batch axis, keys in order.

    Only keys that some query sees are there; query t is at place `offset` + t among them.
    """

    q: Tensor  # [B, HQ, T, K]
    k: Tensor  # [B, HK, S, K]
    v: Tensor
    scale: float
    softcap: float | None
    sliding_window: int | None

    @property
    def offset(self) -> int:
        return self.k.shape[2] - self.q.shape[2]

    def as_given(self, out: Tensor) -> Tensor:
        """An output [B, HQ, T, K] in the shape that the op yields it in."""
        out = out.transpose(1, 2)
        return out if self.q.shape[2] == 1 else out[0]


def gathered(a: Arguments) -> Attention:
    """The arguments of attention_decode or attention_prefill, one sequence in each row of q."""
    is_decode = "positions" in a
    q = a["q"] if is_decode else a["q"].unsqueeze(0)  # [B, T, HQ, K]
    starts = a["positions" if is_decode else "starts"].tolist()
    window = a["sliding_window"]
    keys: dict[str, list[Tensor]] = {"k_cache": [], "v_cache": []}
    for slot, start in zip(a["slots"].tolist(), starts, strict=True):
        first = 0 if window is None else max(0, start - window + 1)
        for name, found in keys.items():
            positions = torch.arange(first, start + q.shape[1], device=q.device)
            found.append(a[name][slot][:, positions % a[name].shape[2]])
    k, v = (torch.stack(found) for found in keys.values())
    q = q.transpose(1, 2).contiguous()
    return Attention(q, k, v, a["scale"], a["softcap"], window)


def _sdpa(a: Arguments) -> Call:
    one = gathered(a)
    T, S = one.q.shape[2], one.k.shape[2]
    mask, is_causal = None, T == S
    if T > 1 and (not is_causal or one.sliding_window is not None):
        queries = one.offset + torch.arange(T, device=one.q.device).unsqueeze(-1)
        keys = torch.arange(S, device=one.q.device)
        mask = (keys <= queries) & (keys > queries - (one.sliding_window or S))
    settings = {"scale": one.scale, "enable_gqa": True}
    settings |= {"attn_mask": mask, "is_causal": is_causal and mask is None and T > 1}
    return lambda: one.as_given(F.scaled_dot_product_attention(one.q, one.k, one.v, **settings))


def _flex(a: Arguments, device: torch.device) -> Call:
    one = gathered(a)
    T, S = one.q.shape[2], one.k.shape[2]
    offset, window, softcap = one.offset, one.sliding_window or S, one.softcap or 1.0

    def visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        query = query + offset
        return (key <= query) & (key > query - window)

    def capped(score: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    settings = {
        "score_mod": None if one.softcap is None else capped,
        "block_mask": create_block_mask(visible, None, None, T, S, device=str(device)),
        "scale": one.scale,
        "enable_gqa": one.q.shape[1] != one.k.shape[1],
    }
    attend = torch.compile(flex_attention, dynamic=False)
    return lambda: one.as_given(attend(one.q, one.k, one.v, **settings))
