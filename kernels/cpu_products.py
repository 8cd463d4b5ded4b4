"""Products on a CPU: a model's matrices at the speed of memory, with the same bits on any threads.

torch gives float32 products to MKL, which on a processor that is not Intel's has half of oneDNN's
speed, and computes one row on one thread.  So oneDNN is called here, in both dtypes.  It reads a
plain matrix, or one that was packed for it once, which in bfloat16 makes few rows faster
(bench/NOTES.md has the times).  Quantised weights are multiplied by what cpu_quantized.py has.

Letters in shape comments: M tokens, D columns of a weight, N its rows, V vocabulary.
"""

import math
import time
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gemcut.kernels.cpu_quantized import (
    FEW_QUANTIZED_ROWS,
    PackedInt4,
    blocks_of_rows,
    by_integers,
    dequantized_rows,
    integers_are_exact,
    is_by_row,
    packed_int4,
)
from gemcut.kernels.outputs import takes_out
from gemcut.kernels.quantized_weight import QuantizedWeight, Weight, dequantized
from gemcut.kernels.reference import gumbel_noise

WIDE = (torch.float32, torch.float64)
FEW_ROWS, SMALL, BLOCKS, SHORT = 8, 2**18, 4, 4096  # see linear
HEAD_ROWS = 4096  # of the vocabulary that lm_head widens at once
BLOCK = 64  # rows and columns of a packed weight come in multiples of it
# A logit rounded to bfloat16 errs by 2^-9 of itself, and by less than that of the largest where
# scales of a quantised weight were rounded too.  Where more than MOST_NEAR of them may be the
# greatest, all are computed again.
ROUNDING, MOST_NEAR = 2**-8, 4096
RUN = 512  # columns of logits whose greatest is found before they are compared

PackedWeight = Weight | PackedInt4  # [N, D]; a tensor may be oneDNN's


@takes_out
def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """Project rows: x [M, D], weight [N, D], perhaps packed, bias [N] -> [M, N].

    Few rows in float32 have two ways of their own: one row as a batch of products, where this
    machine does that well, and a small weight from its own side, as oneDNN's beginning, some
    microseconds, would not be repaid.
    """
    if not isinstance(weight, Tensor):
        y = _by_quantized(x, weight)
        return y if bias is None else y.add_(bias)
    if x.dtype not in _by_onednn() or not x.is_cpu:
        return F.linear(x, weight, bias)
    M, (N, D) = x.shape[0], weight.shape
    few = M <= FEW_ROWS and x.dtype == torch.float32
    if few and M == 1 and N % BLOCKS == 0 and D <= SHORT and blocks_are_fast():
        y = torch.bmm(weight.view(BLOCKS, -1, D), x.mT.expand(BLOCKS, D, 1)).view(1, N)
    elif few and N * D <= SMALL:
        y = torch.mm(weight, x.mT).mT.contiguous()
    else:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y if bias is None else y.add_(bias)


def _by_quantized(x: Tensor, weight: QuantizedWeight | PackedInt4) -> Tensor:
    """The same with a quantised weight, by integer kernels where there is one for it."""
    if 0 < len(x) <= FEW_QUANTIZED_ROWS and x.is_cpu:
        if isinstance(weight, PackedInt4):
            y = weight.product(x)
            # of a sum of halves infinities may make NaN; the sum of x is one call of torch, or two
            if weight.has_halves and not math.isfinite(x.sum().item()):
                _mend(y, x, weight)
            return y
        if is_by_row(weight) and x.dtype == torch.bfloat16:
            scales = weight.scales.view(-1).to(x.dtype)
            return torch.ops.aten._weight_int8pack_mm(x.contiguous(), weight.values, scales)
        if is_by_row(weight) and x.dtype == torch.float32 and integers_are_exact():
            y = by_integers(x, weight)
            if not x.isfinite().all():  # digits have no infinity
                _mend(y, x, weight)
            return y
    return _in_blocks(x, weight)


def _mend(y: Tensor, x: Tensor, weight: QuantizedWeight | PackedInt4) -> None:
    """Products [M, N] of the rows [M, D] that are not finite, by what the weight stands for."""
    rows = ~x.isfinite().all(1)
    y[rows] = _in_blocks(x[rows], weight)


def _in_blocks(x: Tensor, weight: QuantizedWeight | PackedInt4) -> Tensor:
    """The same with some rows of the weight at a time, dequantised to x's dtype."""
    y = x.new_empty(x.shape[0], weight.shape[0])
    for start, end in blocks_of_rows(*weight.shape):
        y[:, start:end] = linear(x, dequantized_rows(weight, start, end, x.dtype))
    return y


@lru_cache
def blocks_are_fast() -> bool:
    """Whether one row takes less time in blocks than by F.linear, measured once in a process.

    On an AMD EPYC it takes half; a machine on which it took more was reported.  On one thread, so
    that others who use the cores change nothing.
    """
    # beyond the second-level cache, as a model's are
    weights = torch.zeros(8, 3072, 256, dtype=torch.float32, device="cpu")
    x = weights[0, :1]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rounds = [
            [_seconds(in_blocks, x, weights) for in_blocks in (True, False)] for _ in range(5)
        ]
    finally:
        torch.set_num_threads(threads)
    # of each product the least: then it was not interrupted
    blocks, whole = (np.min(seconds, axis=0).sum() for seconds in zip(*rounds, strict=True))
    return bool(blocks < whole)


def _seconds(in_blocks: bool, x: Tensor, weights: Tensor) -> list[float]:
    """How long a product takes with each of the weights, one after the other."""
    clock, column = [time.perf_counter()], x.mT.expand(BLOCKS, x.shape[1], 1)
    for weight in weights:
        if in_blocks:
            torch.bmm(weight.view(BLOCKS, -1, weight.shape[1]), column)
        else:
            F.linear(x, weight)
        clock.append(time.perf_counter())
    return np.diff(clock).tolist()


def packed(weight: PackedWeight) -> PackedWeight:
    """The same weight [N, D] as `linear` reads it fastest; nothing else can read it.

    In bfloat16 a plain one is reordered into oneDNN's blocks; the results are the same, bit for
    bit.  A quantised one is made what an integer kernel reads, its scales rounded to bfloat16, or
    bfloat16 itself where there is none: of fp8 then two bytes a number.  In other dtypes it is the
    weight itself.
    """
    if isinstance(weight, PackedInt4):
        return weight
    if isinstance(weight, QuantizedWeight):
        if weight.dtype != torch.bfloat16 or weight.device.type != "cpu" or not has_bfloat16():
            return weight
        if is_by_row(weight):
            return replace(weight, scales=weight.scales.to(weight.dtype))
        return packed_int4(weight) or packed(_in_bfloat16(weight))
    if not (packs(weight.shape, weight.dtype) and weight.is_cpu):
        return weight
    return torch.ops.mkldnn._reorder_linear_weight(weight)


def _in_bfloat16(weight: QuantizedWeight) -> Tensor:
    """What a weight stands for [N, D], made some rows at a time."""
    plain = torch.empty(weight.shape, dtype=torch.bfloat16, device="cpu")
    for start, end in blocks_of_rows(*weight.shape):
        plain[start:end] = dequantized(weight[start:end])
    return plain


def packs(shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Whether `packed` changes a plain weight, on this machine: not one that needs padding."""
    is_bf16 = dtype == torch.bfloat16 and dtype in _by_onednn()
    return is_bf16 and all(size % BLOCK == 0 for size in shape)


@dataclass(frozen=True)
class PackedHead:
    """A head [V, D], and a second one in blocks: of a tied head, single rows are read too."""

    plain: Weight
    blocks: PackedWeight


def packed_head(weight: Weight | PackedHead) -> Weight | PackedHead:
    """A head [V, D] as `lm_head` and `lm_head_argmax` read it fastest; see `packed`."""
    if isinstance(weight, PackedHead) or is_by_row(weight):
        return weight  # of the latter, exact logits take the exact scales
    blocks = packed(weight)
    return weight if blocks is weight else PackedHead(weight, blocks)


@lru_cache
def _by_onednn() -> frozenset[torch.dtype]:
    """The dtypes of products that oneDNN computes on this machine."""
    if not torch.backends.mkldnn.is_available():
        return frozenset()
    has_bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return frozenset({torch.float32, torch.bfloat16} if has_bf16 else {torch.float32})


def has_bfloat16() -> bool:
    """Whether oneDNN multiplies bfloat16 on this machine."""
    return torch.bfloat16 in _by_onednn()


@takes_out
def lm_head(x: Tensor, weight: Weight | PackedHead, softcap: float | None) -> Tensor:
    """Logits in float32 whatever x's dtype: x [M, D], weight [V, D] -> [M, V].

    bfloat16 is widened a block at a time, in one buffer that stays in the processor's cache.
    """
    plain = weight.plain if isinstance(weight, PackedHead) else weight
    if isinstance(plain, QuantizedWeight):
        return _capped(_by_quantized(x if x.dtype in WIDE else x.float(), plain), softcap)
    if plain.dtype in WIDE:
        return _capped(linear(x, plain), softcap)
    x, (V, D) = x.float(), plain.shape
    logits = x.new_empty(x.shape[0], V)
    buffer = x.new_empty(min(HEAD_ROWS, V), D)
    for columns, rows in zip(logits.split(HEAD_ROWS, -1), plain.split(HEAD_ROWS), strict=True):
        columns.copy_(linear(x, buffer[: len(rows)].copy_(rows)))
    return _capped(logits, softcap)


@takes_out
def lm_head_argmax(
    x: Tensor,
    weight: Weight | PackedHead,
    softcap: float | None,
    temperature: Tensor | None = None,
    seeds: Tensor | None = None,
    positions: Tensor | None = None,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The greatest logit, or logit with noise, and its token id: x [M, D] -> [1, M] x 2.

    In bfloat16 without noise only rows whose rounded logit may be the greatest are computed in
    float32.
    """
    if temperature is None and x.dtype == torch.bfloat16 and has_bfloat16() and x.is_cpu:
        head = weight if isinstance(weight, PackedHead) else PackedHead(weight, weight)
        near, ids = _near_the_greatest(linear(x, head.blocks))
        if 0 < len(ids) <= MOST_NEAR:  # none where a row holds a NaN or an infinity
            some = head.plain[ids]
            exact = some.float() if isinstance(some, Tensor) else dequantized(some, torch.float32)
            logits = exact.new_full((len(x), len(ids)), -torch.inf)
            logits[near, torch.arange(len(ids), device=x.device)] = torch.linalg.vecdot(
                x[near].float(), exact
            )
            best = logits.max(-1)
            return _capped(best.values, softcap).unsqueeze(0), ids[best.indices].unsqueeze(0)
    logits = lm_head(x, weight, softcap)
    if temperature is not None:
        assert seeds is not None
        assert positions is not None
        if rows is not None:
            temperature, seeds, positions = (x[rows] for x in (temperature, seeds, positions))
        noise = gumbel_noise(seeds, positions, logits.shape[-1])
        logits = logits + temperature.unsqueeze(-1) * noise  # rounded as in `sample`
    best = logits.max(-1)
    return best.values.unsqueeze(0), best.indices.unsqueeze(0)


def _near_the_greatest(rounded: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of logits [M, V] that may be the greatest of their row, in order: [n] x 2.

    None at all where a row holds a NaN or an infinity.  Only runs of columns whose own greatest is
    near are compared: in bfloat16 that takes four times as long as a maximum.
    """
    V = rounded.shape[1]
    runs = rounded.unflatten(1, (-1, math.gcd(V, RUN)))  # [M, R, columns of a run]
    of_runs = runs.amax(-1)
    greatest, least = of_runs.amax(-1, keepdim=True), rounded.amin(-1, keepdim=True)
    bound = greatest - 2 * ROUNDING * torch.maximum(greatest, -least)
    if not bound.isfinite().all():
        none = torch.empty(0, dtype=torch.int64, device=rounded.device)
        return none, none
    near, run = (of_runs >= bound).nonzero().unbind(-1)
    some, column = (runs[near, run] >= bound[near]).nonzero().unbind(-1)
    return near[some], run[some] * runs.shape[-1] + column


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)
