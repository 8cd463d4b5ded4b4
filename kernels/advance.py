"""The end of a decode step: each row's choice is written to its slot, for the next step.

    chosen    = that of the greatest score, where there are several: the best of S ranges (head.py)
    id        = chosen, or -1 where the row was inactive or had nothing to choose (score not finite)
    position  = position + 1, or -1 (inactive from now on) after such a row, an end, or the limit

chosen, scores [B] or [S, B], slots [B]; tokens, positions, limits [num_slots]; is_end
[num_slots, V].  So a step that is started before the host has read the last one's tokens already
knows which rows have ended.

Cost: one program a row, 12 S + 49 bytes; bound by the latency of two dependent loads.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gemcut.kernels.checks import check_index, check_rows, check_shape, check_tensors, require
from gemcut.kernels.dependent_launch import dependent_launch, wait_for_predecessor
from gemcut.kernels.gumbel import packed, packed_id, packed_value
from gemcut.kernels.outputs import result

MAX_RANGES = 4096  # they are in registers


@triton.jit(do_not_specialize=["B"])
def advance_kernel(
    chosen_ptr, scores_ptr, slots_ptr, ids_ptr,  # [S, B] x 2, [B] x 2
    tokens_ptr, positions_ptr, limits_ptr, is_end_ptr,  # [num_slots] x 3, [num_slots, V]
    stride_is_end_s,
    S, B, num_slots, V,
    DEPENDENT: tl.constexpr,
    BLOCK_S: tl.constexpr,  # S or more
):  # fmt: skip
    wait_for_predecessor(DEPENDENT)
    row, offs_s = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_S)
    offs = offs_s.to(tl.int64) * B + row
    chosen = tl.load(chosen_ptr + offs, mask=offs_s < S, other=0).to(tl.int64)
    score = tl.load(scores_ptr + offs, mask=offs_s < S, other=0.0)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    # ranges are in the order of their ids: of equal ones the first has the lowest
    best = tl.max(tl.where(offs_s < S, packed(score, offs_s), 0), axis=0)
    score = packed_value(best)
    chosen = tl.sum(tl.where(offs_s == packed_id(best), chosen, 0), axis=0)
    known = (slot >= 0) & (slot < num_slots)
    position = tl.load(positions_ptr + slot, mask=known, other=-1)
    limit = tl.load(limits_ptr + slot, mask=known, other=0)

    finite = tl.abs(score) < float("inf")  # NaN is not
    valid = known & (position >= 0) & finite & (chosen >= 0) & (chosen < V)
    is_end = tl.load(is_end_ptr + slot * stride_is_end_s + chosen, mask=valid, other=1) != 0
    over = (valid == 0) | is_end | (position + 1 >= limit)
    tl.store(ids_ptr + row, tl.where(valid, chosen, -1))
    tl.store(tokens_ptr + slot, chosen, mask=known)
    tl.store(positions_ptr + slot, tl.where(over, -1, position + 1), mask=known)


def advance_(
    chosen: Tensor,
    scores: Tensor,
    slots: Tensor,
    tokens: Tensor,
    positions: Tensor,
    limits: Tensor,
    is_end: Tensor,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Write each row's choice to its slot: the ids [B] int64, -1 where there is none.

    chosen [B] int and scores [B] float32, or [S, B] each, of which the greatest score counts, the
    first of equal ones; slots [B] int; tokens, positions, limits [num_slots] int64, is_end
    [num_slots, V] bool.  A slot may be that of several rows only where it is inactive.
    """
    require(chosen.dim() in (1, 2), f"chosen is {list(chosen.shape)}, must be [B] or [S, B]")
    S, B = (1, *chosen.shape)[-2:]
    require(0 < S <= MAX_RANGES, f"chosen has {S} ranges, must be in 1 to {MAX_RANGES}")
    check_tensors(
        scores, chosen=chosen, slots=slots, tokens=tokens, positions=positions, limits=limits,
        is_end=is_end,
    )  # fmt: skip
    require(scores.dtype == torch.float32, f"scores are {scores.dtype}, must be torch.float32")
    check_shape("scores", scores, *chosen.shape)
    check_index("chosen", chosen, *chosen.shape)
    check_index("slots", slots, B)
    for name, x in (("tokens", tokens), ("positions", positions), ("limits", limits)):
        check_shape(name, x, is_end.shape[0])
        require(x.dtype == torch.int64, f"{name} is {x.dtype}, must be torch.int64")
    require(is_end.dtype == torch.bool, f"is_end is {is_end.dtype}, must be torch.bool")
    check_rows("is_end", is_end, is_end.shape[-1])

    state = (tokens, positions, limits, is_end)
    ids = result(out, (B,), chosen, torch.int64, chosen, scores, slots, *state)
    if B:
        block_s = triton.next_power_of_2(S)
        advance_kernel[(B,)](
            chosen_ptr=chosen, scores_ptr=scores, slots_ptr=slots, ids_ptr=ids,
            tokens_ptr=tokens, positions_ptr=positions, limits_ptr=limits, is_end_ptr=is_end,
            stride_is_end_s=is_end.stride(0),
            S=S, B=B, num_slots=is_end.shape[0], V=is_end.shape[1],
            BLOCK_S=block_s, num_warps=max(1, min(8, block_s // 64)),
            **dependent_launch(chosen.device),
        )  # fmt: skip
    return ids
