"""Products on a CPU: a model's matrices at the speed of memory, with the same bits on any threads.

torch gives float32 products to MKL, which on a processor that is not Intel's has half of oneDNN's
speed, and computes one row on one thread.  So oneDNN is called here, in both dtypes.  It reads a
plain matrix, or one that was packed for it once: in bfloat16 few rows then take half the time.

Letters in shape comments: M tokens, D columns of a weight, N its rows, V vocabulary.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

WIDE = (torch.float32, torch.float64)
FEW_ROWS, SMALL = 2, 2**18  # rows, and elements of a weight: see linear
HEAD_ROWS = 4096  # of the vocabulary that lm_head widens at once
BLOCK = 64  # rows and columns of a packed weight come in multiples of it
# A logit rounded to bfloat16 errs by 2^-9 of itself: the greatest of all is among those so near to
# the greatest rounded one.  Where more are than MOST_NEAR, all are computed again.
NEAR, MOST_NEAR = 2**-7, 4096


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Project rows: x [M, D], weight [N, D], perhaps packed, bias [N] -> [M, N].

    oneDNN computes it, at 1.5 to 2.5 times the speed of torch's own choice in float32, MKL, on a
    processor that is not Intel's, and with the same bits on any number of threads.  It takes some
    microseconds to begin, which a small matrix does not repay.
    """
    if x.dtype not in _by_onednn() or not x.is_cpu:
        return F.linear(x, weight, bias)
    if x.shape[0] <= FEW_ROWS and weight.numel() <= SMALL and not weight.is_mkldnn:
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def packed(weight: Tensor) -> Tensor:
    """The same weight [N, D] as `linear` reads it fastest; nothing else can read it.

    In bfloat16 it is reordered into oneDNN's blocks, from which few rows take half the time; the
    results are the same, bit for bit.  Otherwise it is the weight itself.
    """
    if not (packs(weight.shape, weight.dtype) and weight.is_cpu):
        return weight
    return torch.ops.mkldnn._reorder_linear_weight(weight)


def packs(shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Whether `packed` changes a weight, on this machine: not one that blocks would have to pad."""
    is_bf16 = dtype == torch.bfloat16 and dtype in _by_onednn()
    return is_bf16 and all(size % BLOCK == 0 for size in shape)


@dataclass(frozen=True)
class PackedHead:
    """A head [V, D], and a second one in blocks: of a tied head, single rows are read too."""

    plain: Tensor
    blocks: Tensor


def packed_head(weight: Tensor | PackedHead) -> Tensor | PackedHead:
    """A head [V, D] as `lm_head` and `lm_head_argmax` read it fastest; see `packed`."""
    if isinstance(weight, PackedHead):
        return weight
    blocks = packed(weight)
    return weight if blocks is weight else PackedHead(weight, blocks)


@lru_cache
def _by_onednn() -> frozenset[torch.dtype]:
    """The dtypes of products that oneDNN computes on this machine."""
    if not torch.backends.mkldnn.is_available():
        return frozenset()
    has_bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return frozenset({torch.float32, torch.bfloat16} if has_bf16 else {torch.float32})


def lm_head(x: Tensor, weight: Tensor | PackedHead, softcap: float | None) -> Tensor:
    """Logits in float32 whatever x's dtype: x [M, D], weight [V, D] -> [M, V].

    bfloat16 is widened a block at a time, in one buffer that stays in the processor's cache.
    """
    plain = weight.plain if isinstance(weight, PackedHead) else weight
    if plain.dtype in WIDE:
        return _capped(linear(x, plain), softcap)
    x, (V, D) = x.float(), plain.shape
    logits = x.new_empty(x.shape[0], V)
    buffer = x.new_empty(min(HEAD_ROWS, V), D)
    for columns, rows in zip(logits.split(HEAD_ROWS, -1), plain.split(HEAD_ROWS), strict=True):
        columns.copy_(linear(x, buffer[: len(rows)].copy_(rows)))
    return _capped(logits, softcap)


def lm_head_argmax(
    x: Tensor, weight: Tensor | PackedHead, softcap: float | None, counters: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The greatest logit and its token id: x [M, D] -> [M] float32, [M].

    Of a packed head only the rows whose rounded logit is near the greatest are computed again.
    """
    if isinstance(weight, PackedHead):
        rounded_logits = linear(x, weight.blocks)
        greatest = rounded_logits.max(-1, keepdim=True).values
        near = rounded_logits >= greatest - greatest.abs() * NEAR
        rows, ids = near.nonzero().unbind(-1)
        if 0 < len(ids) <= MOST_NEAR and not greatest.isnan().any():
            logits = torch.linalg.vecdot(x[rows].float(), weight.plain[ids].float())
            found = torch.full_like(rounded_logits, -torch.inf, dtype=torch.float32)
            best = found.index_put_((rows, ids), logits).max(-1)
            return _capped(best.values, softcap), best.indices
    best = lm_head(x, weight, softcap).max(-1)
    return best.values, best.indices


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)
