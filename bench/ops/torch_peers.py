"""The peers from torch that a kernel is compared with, op by op: eager, compiled, its own kernels.

A peer gets the op's arguments and may first bring them into the form that suits it: keys in one
piece, a mask, quantised weights.  That is not timed.  What its call returns is held to the oracle,
like the kernel's own results.  library_peers.py has the peers of other packages.

"torch" and "torch.compile" run each op as a model in plain torch writes it.  Where such a model
widens to float32 and rounds once, as transformers' Gemma does in its norm, that is the oracle
itself.  The others, at the end, compute in the model's dtype and round after each operation, or ask
the device for nothing, so that the compiler takes them whole.  Their errors are allowed to a peer.
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
from gemcut.bench.ops.cases import Arguments, Case
from gemcut.kernels import reference

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
    op = as_in_a_model(case.op)
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


def as_in_a_model(op: str) -> Compute:
    """An op as a model in plain torch computes it, with the oracle's name and signature."""
    return IN_THE_MODELS_DTYPE.get(op) or getattr(reference, op)


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


# Ops as a model in plain torch writes them


def rope_and_store_(
    qkv: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_norm_weight: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    _, HK, C, K = k_cache.shape
    heads = qkv.view(qkv.shape[0], -1, K)
    q, k, v = heads.split([heads.shape[1] - 2 * HK, HK, HK], dim=1)
    if q_norm_weight is not None and k_norm_weight is not None:
        q, k = reference.rmsnorm(q, q_norm_weight, eps), reference.rmsnorm(k, k_norm_weight, eps)
    q, k = (x * cos + x.roll(K // 2, -1) * sin for x in (q, k))
    k_cache[slots, :, positions % C] = k
    v_cache[slots, :, positions % C] = v
    return q


def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    positions: Tensor,
    scale: float,
    softcap: float | None,
    sliding_window: int | None,
) -> Tensor:
    """Over the whole slot with a mask, as models with a static cache do."""
    B, T, HQ, K = q.shape
    HK, C = k_cache.shape[1:3]
    k, v = k_cache[slots], v_cache[slots]  # [B, HK, C, K]
    visible = _visible(positions, T, C, sliding_window)  # [B, T, C]
    grouped = q.view(B, T, HK, HQ // HK, K).permute(0, 2, 3, 1, 4)  # [B, HK, G, T, K]
    out = _attend(grouped, k.unsqueeze(2), v.unsqueeze(2), visible[:, None, None], scale, softcap)
    return out.permute(0, 3, 1, 2, 4).reshape(B, T, HQ, K)


def attention_prefill(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    starts: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    softcap: float | None,
    sliding_window: int | None,
) -> Tensor:
    """Of chunks that are equally long."""
    chunks = q.unflatten(0, (slots.shape[0], -1))
    settings = (scale, softcap, sliding_window)
    return attention_decode(chunks, k_cache, v_cache, slots, starts, *settings).flatten(0, 1)


def _visible(starts: Tensor, T: int, C: int, sliding_window: int | None) -> Tensor:
    """Which places of a ring of C the queries from starts [B] on see: [B, T, C]."""
    queries = starts.view(-1, 1, 1) + torch.arange(T, device=starts.device).view(T, 1)
    newest = starts.view(-1, 1, 1) + T - 1
    keys = newest - (newest - torch.arange(C, device=starts.device)) % C  # position at each place
    visible = (keys >= 0) & (keys <= queries)
    return visible if sliding_window is None else visible & (keys > queries - sliding_window)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float, softcap: float | None
) -> Tensor:
    scores = q @ k.mT * scale
    if softcap is not None:
        scores = (scores / softcap).tanh() * softcap
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1, dtype=torch.float32)
    return weights.to(q.dtype) @ v


def skinny_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, weight, bias).unsqueeze(0)  # one partial sum


def geglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * up


def lm_head(x: Tensor, weight: Tensor, softcap: float | None) -> Tensor:
    logits = F.linear(x, weight).float()
    return logits if softcap is None else (logits / softcap).tanh() * softcap


def lm_head_argmax(x: Tensor, weight: Tensor, softcap: float | None) -> tuple[Tensor, Tensor]:
    best = lm_head(x, weight, softcap).max(-1)
    return best.values.unsqueeze(0), best.indices.unsqueeze(0)  # one part


def linear_geglu(x: Tensor, gate_up_weight: Tensor) -> Tensor:
    return geglu(F.linear(x, gate_up_weight))


def linear_rope_and_store_(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_norm_weight: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    qkv = F.linear(x, weight, bias)
    store = (k_cache, v_cache, slots, positions, cos, sin, q_norm_weight, k_norm_weight, eps)
    return rope_and_store_(qkv, *store)


def sample(
    logits: Tensor,
    temperature: Tensor | None = None,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
    seeds: Tensor | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """With torch's own random numbers; draws by an exponential race, which needs no sync."""
    if temperature is None:
        return logits.argmax(-1)
    ordered, ids = (logits / temperature.unsqueeze(-1)).sort(-1, descending=True)
    if top_k is not None:
        ranks = torch.arange(logits.shape[-1], device=logits.device)
        ordered = ordered.masked_fill(ranks >= top_k.unsqueeze(-1), -torch.inf)
    probabilities = ordered.softmax(-1)
    if top_p is not None:
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= top_p.unsqueeze(-1), 0.0)
    race = probabilities / torch.empty_like(probabilities).exponential_()
    return ids.gather(-1, race.argmax(-1, keepdim=True)).squeeze(-1)


IN_THE_MODELS_DTYPE: dict[str, Compute] = {
    op.__name__: op
    for op in (
        attention_decode,
        attention_prefill,
        geglu,
        linear_geglu,
        linear_rope_and_store_,
        lm_head,
        lm_head_argmax,
        rope_and_store_,
        sample,
        skinny_linear,
    )
}
