"""What a patched model of transformers leaves to torch on a CPU: few queries, and rotation.

`kernels.cpu` attends row by row, which pays for many queries alone.  Here all rows are one call of
torch's scaled_dot_product_attention, or, with a softcap, which that does not have, two products.
Rotated keys are views that the cache copies once; a store by position, as `rope_and_store_` does
it, takes more time than the rotation.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gemcut.kernels.cpu_rows import rmsnorm, rounded, widened

STARTS, SLOTS, BOUNDS, PADS = range(4)  # rows of a plan (transformers_attention.py)
# Fewer queries of a row than this are left to torch.  On one core of an AMD EPYC 64 took 0.7 to
# 1.1 of what kernels.cpu takes, 256 and 512 took 1.6 to 1.9 (float32, 4 and 8 heads of 256).
FEW_QUERIES = 128
# So few queries of bfloat16 are widened with all keys: torch's attention of one query and 512 keys
# takes 840 us in bfloat16 and 65 in float32.
WIDENED_QUERIES = 8


def masked_attention(
    plan: Tensor,
    q: Tensor,  # [B, HQ, T, K]
    k: Tensor,  # [B, HK, S, K]
    v: Tensor,
    scale: float,
    softcap: float | None,
    sliding_window: int | None,
) -> Tensor:
    """Attention by a plan: [B, T, HQ, K].  What stands before a text sees the first key."""
    seen, visible = _mask(plan, len(q), q.shape[2], sliding_window)
    k, v, dtype = k[:, :, seen], v[:, :, seen], q.dtype
    if q.shape[2] <= WIDENED_QUERIES and dtype == torch.bfloat16:
        q, k, v = q.float(), k.float(), v.float()
    if softcap is None:
        y = F.scaled_dot_product_attention(q, k, v, visible, scale=scale, enable_gqa=True)
        return y.transpose(1, 2).to(dtype)
    (B, HQ, T, K), HK = q.shape, k.shape[1]
    by_head = q.reshape(B, HK, -1, K)  # [B, HK, G T, K]
    scores = torch.matmul(by_head * (scale / softcap), k.mT).float().tanh_().mul_(softcap)
    if visible is not None:
        scores = scores.view(B, HQ, T, -1).masked_fill_(~visible, -torch.inf)
    weights = scores.softmax(-1).to(q.dtype).view(B, HK, -1, k.shape[2])
    return torch.matmul(weights, v).view(B, HQ, T, K).transpose(1, 2).to(dtype)


def rotated(
    qkv: Tensor,  # [B T, (HQ + 2 HK) K]
    B: int,
    HK: int,
    cos: Tensor,  # [B T, 1, K], as rope_tables has them
    sin: Tensor,
    q_norm_weight: Tensor | None,  # [K]
    k_norm_weight: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [B, HQ, T, K], keys and values [B, HK, T, K]: what `rope_and_store_` computes."""
    K = cos.shape[-1]
    heads = qkv.view(len(qkv), -1, K)
    HQ = heads.shape[1] - 2 * HK
    qk, v = heads.split_with_sizes([HQ + HK, HK], dim=1)
    if q_norm_weight is not None and k_norm_weight is not None:
        norms = torch.cat([q_norm_weight.expand(HQ, K), k_norm_weight.expand(HK, K)])
        qk = rmsnorm(qk, norms, eps)
    qk = widened(qk)
    qk = rounded(torch.addcmul(qk * cos, qk.roll(K // 2, -1), sin), qkv.dtype)
    q, k = qk.split_with_sizes([HQ, HK], dim=1)
    q, k, v = (x.unflatten(0, (B, -1)).transpose(1, 2) for x in (q, k, v))
    return q, k, v


def _mask(plan: Any, B: int, T: int, sliding_window: int | None) -> tuple[slice, Tensor | None]:
    """The keys that any query sees, and which of them each one does, [B, 1, T, S]; None for all.

    It is the same in all layers of one kind, and kept with the plan.
    """
    kept = getattr(plan, "mask", None)
    if kept is not None and kept[0] == sliding_window:
        return kept[1]
    rows = plan[:, 0, :, 0].tolist()
    pads = [0] * B
    if len(rows) > PADS and T == 1:
        pads = rows[PADS][:B]
        first = rows[STARTS][0] + pads[0]  # where the first query of every row is among the keys
    elif len(rows) > PADS:
        pads, bounds = rows[PADS][: 2 * B : 2], rows[BOUNDS]
        first = min(
            rows[STARTS][2 * b + 1] - (bounds[2 * b + 1] - bounds[2 * b]) + pads[b]
            for b in range(B)
        )
    else:
        first = rows[STARTS][0]
    begin = min(pads) if sliding_window is None else max(0, first - sliding_window + 1)
    seen, visible = slice(min(begin, first), first + T), None
    if T > 1 or any(pads):
        queries = torch.arange(first, first + T)[:, None]
        keys = torch.arange(seen.start, seen.stop)
        visible = (keys <= queries) & (keys >= torch.tensor(pads)[:, None, None, None])
        if sliding_window is not None:
            visible &= keys > queries - sliding_window
        visible[..., 0] |= ~visible.any(-1)  # torch would yield NaN
    plan.mask = sliding_window, (seen, visible)
    return seen, visible
