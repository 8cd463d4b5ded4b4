"""Token choice: penalties, then temperature, top-k, top-p, min-p and the draw, one id for a row.

    penalize    y = x / r where x > 0, else x * r      for tokens generated or in the prompt
                y - frequency * count - presence * (count > 0)
    sample      id = argmax over the kept v of  logits[v] + temperature * noise[v]      (gumbel.py)

logits [B, V] float32, every setting [B].  What is kept depends on scaled = (logits - max logits) /
temperature.  min_p keeps scaled >= log(min_p), a share of the greatest probability; top-k and top-p
are thresholds too (top_k_top_p.py), so nothing is sorted.  A row of temperature 0, or one where
nothing can be drawn (NaN), takes the maximum; NaN counts as the greatest, as in torch.

A program takes a chunk of a row's vocabulary, whatever B is: a row's id never depends on the batch.
Chunks meet in an atomic maximum of (value, lowest id) packed into 63 bits, exact in any order.

Cost: penalize moves 13 bytes for each logit (int32 counts), bound by memory bandwidth.  sample
reads 4 B V bytes in each launch, from L2: about 10 operations for a logit to find the maximum, 30
to narrow, 20 in the draw and 60 more where a token may be drawn by its own program.  Bound by
latency up to some 4 rows, then by the integer and logarithm units.  Launches:

    no top-k, top-p, min-p      draw, after a fill of the state with zeros
    min-p alone                 maxima, draw
    top-k or top-p or both      maxima, narrow, draw

Scratch: with top-k or top-p 4 B V bytes for lists, and 16 KiB a row for each of the two.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gemcut.kernels.checks import check_index, check_rows, check_shape, check_tensors, require
from gemcut.kernels.dependent_launch import dependent_launch, wait_for_predecessor
from gemcut.kernels.gumbel import noisy_logits, packed, packed_id, packed_value
from gemcut.kernels.outputs import result
from gemcut.kernels.top_k_top_p import (
    BUCKETS,
    DECIDED,
    DRAWN,
    FIELDS,
    K_END,
    K_FIRST,
    LAST_KEY,
    LIST_END,
    MAX_VOCAB_SIZE,
    TILE,
    chunk_maxima,
    descending_keys,
    greatest_listed,
    is_last_program,
    list_tokens,
    narrow_kernel,
    scaled_logits,
)

CHUNK = 2048  # logits of a program: 8 KiB, and 125 programs for a row of 256 000
DRAW_REGISTERS = 64  # of a thread: ptxas spills to keep to 40 where top-p is used alone


@triton.jit(do_not_specialize_on_alignment=["repetition_ptr", "presence_ptr", "frequency_ptr"])
def penalize_kernel(
    logits_ptr, counts_ptr, in_prompt_ptr, y_ptr,  # [B, V] each
    repetition_ptr, presence_ptr, frequency_ptr,  # [B] each
    stride_logits_b, stride_counts_b, stride_in_prompt_b, stride_y_b,
    V,
    DEPENDENT: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    wait_for_predecessor(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    offs_v = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    mask = offs_v < V
    x = tl.load(logits_ptr + row * stride_logits_b + offs_v, mask=mask, other=0.0)
    count = tl.load(counts_ptr + row * stride_counts_b + offs_v, mask=mask, other=0)
    in_prompt = tl.load(in_prompt_ptr + row * stride_in_prompt_b + offs_v, mask=mask, other=0)

    generated = count > 0
    repetition = tl.zeros_like(x) + tl.load(repetition_ptr + row)
    repeated = tl.where(x > 0.0, tl.div_rn(x, repetition), x * repetition)
    y = tl.where(generated | (in_prompt != 0), repeated, x)
    y -= tl.load(frequency_ptr + row) * count.to(tl.float32)
    y -= tl.where(generated, tl.load(presence_ptr + row), 0.0)
    tl.store(y_ptr + row * stride_y_b + offs_v, y, mask=mask)


@triton.jit
def maxima_kernel(
    logits_ptr, maxima_ptr, state_ptr,  # [B, V], [B, chunks], [B, stride_state_b]
    stride_logits_b, stride_state_b,
    V,
    DEPENDENT: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """The greatest logit of each chunk and its id, packed; the state becomes zero."""
    wait_for_predecessor(DEPENDENT)
    row, pid_v, num_chunks = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    offs = tl.arange(0, CHUNK)
    offs_v = pid_v * CHUNK + offs
    mask = offs_v < V
    x = tl.load(logits_ptr + row * stride_logits_b + offs_v, mask=mask, other=0.0)
    greatest = tl.max(tl.where(mask, packed(x, offs_v), 0), axis=0)
    tl.store(maxima_ptr + row * num_chunks + pid_v, greatest)
    state_ptr += row * stride_state_b
    for begin in tl.range(pid_v * CHUNK, stride_state_b, num_chunks * CHUNK, num_stages=1):
        mask = begin + offs < stride_state_b
        tl.store(state_ptr + begin + offs, tl.zeros([CHUNK], tl.int64), mask=mask)


@triton.jit(
    do_not_specialize_on_alignment=[
        "temperature_ptr", "top_p_ptr", "min_p_ptr", "seeds_ptr", "positions_ptr"
    ]
)  # fmt: skip
def draw_kernel(
    logits_ptr, temperature_ptr, top_p_ptr, min_p_ptr,  # [B, V], [B], [B], [B]
    seeds_ptr, positions_ptr, ids_ptr,  # [B], [B], [B]
    maxima_ptr, state_ptr, list_ptr,  # [B, chunks], [B, stride_state_b], [B, V]
    stride_logits_b, stride_state_b,
    V,
    IS_RANDOM: tl.constexpr,
    HAS_TOP_K: tl.constexpr,
    HAS_TOP_P: tl.constexpr,
    HAS_MIN_P: tl.constexpr,
    DEPENDENT: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """The greatest of the logits that are kept, with their noise."""
    wait_for_predecessor(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride_logits_b
    state_ptr += row * stride_state_b
    IS_NARROWED: tl.constexpr = HAS_TOP_K or HAS_TOP_P
    if IS_NARROWED:  # loads that wait for nothing come first
        decided = tl.load(state_ptr + DECIDED).to(tl.int32)
        list_end = tl.load(state_ptr + LIST_END).to(tl.int32)
        k_first = tl.load(state_ptr + K_FIRST).to(tl.int32)
        k_end = tl.load(state_ptr + K_END).to(tl.int32)
    if IS_RANDOM:
        temperature = tl.load(temperature_ptr + row)
        seed, position = tl.load(seeds_ptr + row), tl.load(positions_ptr + row)
    offs_v = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    mask = offs_v < V
    x = tl.load(logits_ptr + offs_v, mask=mask, other=-float("inf"))

    best = tl.full([], 0, tl.int64)
    last_key = tl.full([], LAST_KEY, tl.int32)
    if IS_NARROWED or HAS_MIN_P:
        maxima = chunk_maxima(maxima_ptr + row * tl.num_programs(1), BLOCK_C)
        best = tl.max(maxima, axis=0)
        key = descending_keys(scaled_logits(x, packed_value(best), temperature))
        if HAS_MIN_P:
            least = tl.minimum(tl.log(tl.load(min_p_ptr + row)), 0.0)
            last_key = tl.minimum(last_key, descending_keys(least))
        mask = key <= last_key
    if IS_NARROWED:
        mask = mask & (key < decided)
        is_listed = (key >= decided) & ((key < list_end) | ((key >= k_first) & (key < k_end)))
        list_ptr += row * V
        list_tokens(is_listed, offs_v, list_ptr, state_ptr)
    if tl.max(mask.to(tl.int32), axis=0) > 0:
        if IS_RANDOM:
            x = noisy_logits(x, temperature, seed, position, offs_v)
        drawn = tl.max(tl.where(mask, packed(x, offs_v), 0), axis=0)
        tl.atomic_max(state_ptr + DRAWN, drawn, sem="relaxed")

    if is_last_program(state_ptr):
        drawn = tl.load(state_ptr + DRAWN, cache_modifier=".cg")
        if IS_NARROWED:
            p = tl.load(top_p_ptr + row) if HAS_TOP_P else 1.0
            listed = greatest_listed(
                logits_ptr, list_ptr, state_ptr,
                packed_value(best), temperature, p, last_key, seed, position,
                HAS_TOP_K, HAS_TOP_P, TILE,
            )  # fmt: skip
            drawn = tl.maximum(drawn, listed)
        tl.store(ids_ptr + row, packed_id(tl.where(drawn > 0, drawn, best)))


def _check_logits(logits: Tensor) -> None:
    check_tensors(logits)
    require(logits.dtype == torch.float32, f"logits are {logits.dtype}, must be torch.float32")
    require(logits.dim() == 2, f"logits are {list(logits.shape)}, must be [B, V]")
    V = logits.shape[1]
    require(0 < V <= MAX_VOCAB_SIZE, f"vocabulary of {V} is not in 1 to {MAX_VOCAB_SIZE}")
    check_rows("logits", logits, V)


def _check_settings(logits: Tensor, **settings: Tensor | None) -> None:
    check_tensors(logits, **settings)
    for name, setting in settings.items():
        if setting is not None:
            require(setting.dtype == torch.float32, f"{name} is {setting.dtype}, must be float32")
            check_shape(name, setting, logits.shape[0])


def penalize(
    logits: Tensor,
    output_counts: Tensor,
    in_prompt: Tensor,
    repetition: Tensor,
    presence: Tensor,
    frequency: Tensor,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Penalised logits [B, V], from how often each token was generated and whether it was prompted.

    logits [B, V] float32, output_counts [B, V] int, in_prompt [B, V] bool; repetition, presence,
    frequency [B] float32.
    """
    _check_logits(logits)
    B, V = logits.shape
    check_tensors(logits, output_counts=output_counts, in_prompt=in_prompt)
    counts_dtype = output_counts.dtype
    require(
        counts_dtype in (torch.int32, torch.int64),
        f"output_counts is {counts_dtype}, must be int64 or int32",
    )
    require(in_prompt.dtype == torch.bool, f"in_prompt is {in_prompt.dtype}, must be torch.bool")
    for name, x in (("output_counts", output_counts), ("in_prompt", in_prompt)):
        check_rows(name, x, V)
        require(x.shape[0] == B, f"{name} has {x.shape[0]} rows, the logits {B}")
    _check_settings(logits, repetition=repetition, presence=presence, frequency=frequency)

    settings = (repetition, presence, frequency)
    y = result(out, (B, V), logits, logits.dtype, logits, output_counts, in_prompt, *settings)
    if B:
        penalize_kernel[(B, triton.cdiv(V, CHUNK))](
            logits_ptr=logits, counts_ptr=output_counts, in_prompt_ptr=in_prompt, y_ptr=y,
            repetition_ptr=repetition, presence_ptr=presence, frequency_ptr=frequency,
            stride_logits_b=logits.stride(0), stride_counts_b=output_counts.stride(0),
            stride_in_prompt_b=in_prompt.stride(0), stride_y_b=V,
            V=V, CHUNK=CHUNK, num_warps=8,
            **dependent_launch(logits.device),
        )  # fmt: skip
    return y


def sample(
    logits: Tensor,
    temperature: Tensor | None = None,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
    seeds: Tensor | None = None,
    positions: Tensor | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """One token id for each row: logits [B, V] float32 -> [B] int64.

    temperature, top_p, min_p [B] float32; top_k, seeds, positions [B] int.  None means that no row
    uses a setting; temperature None takes the maximum of every row.
    """
    _check_logits(logits)
    B = logits.shape[0]
    _check_settings(logits, temperature=temperature, top_p=top_p, min_p=min_p)
    for name, x in (("top_k", top_k), ("seeds", seeds), ("positions", positions)):
        if x is not None:
            check_tensors(logits, **{name: x})
            check_index(name, x, B)
    require(
        temperature is None or (seeds is not None and positions is not None),
        "temperature needs seeds and positions, of which one is None",
    )
    settings = (temperature, top_k, top_p, min_p, seeds, positions)
    ids = result(out, (B,), logits, torch.int64, logits, *settings)
    if B:
        _choose_(ids, logits, *settings)
    return ids


def _choose_(
    ids: Tensor,
    logits: Tensor,
    temperature: Tensor | None,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    seeds: Tensor | None,
    positions: Tensor | None,
) -> Tensor:
    """Write the ids; return the state of every row (top_k_top_p.py), which holds its threshold."""
    B, V = logits.shape
    grid = (B, triton.cdiv(V, CHUNK))
    is_random = temperature is not None
    has_top_k, has_top_p = is_random and top_k is not None, is_random and top_p is not None
    has_min_p = is_random and min_p is not None
    device, width = logits.device, FIELDS.value + BUCKETS * (has_top_k + has_top_p)
    maxima = listed = None
    shared = {"logits_ptr": logits, "stride_logits_b": logits.stride(0), "stride_state_b": width}
    shared |= {"V": V, "CHUNK": CHUNK, "num_warps": 16, **dependent_launch(device)}
    chunks = {"BLOCK_C": triton.next_power_of_2(grid[1])}

    if has_top_k or has_top_p or has_min_p:
        state = torch.empty((B, width), device=device, dtype=torch.int64)
        maxima = torch.empty(grid, device=device, dtype=torch.int64)
        maxima_kernel[grid](maxima_ptr=maxima, state_ptr=state, **shared)
    else:
        state = torch.zeros((B, width), device=device, dtype=torch.int64)
    if has_top_k or has_top_p:
        listed = torch.empty((B, V), device=device, dtype=torch.int32)
        narrow_kernel[grid](
            temperature_ptr=temperature, top_k_ptr=top_k, top_p_ptr=top_p,
            maxima_ptr=maxima, state_ptr=state,
            HAS_TOP_K=has_top_k, HAS_TOP_P=has_top_p, BUCKETS=BUCKETS, TILE=TILE,
            **chunks, **shared,
        )  # fmt: skip
    draw_kernel[grid](
        temperature_ptr=temperature, top_p_ptr=top_p, min_p_ptr=min_p,
        seeds_ptr=seeds, positions_ptr=positions, ids_ptr=ids,
        maxima_ptr=maxima, state_ptr=state, list_ptr=listed,
        IS_RANDOM=is_random, HAS_TOP_K=has_top_k, HAS_TOP_P=has_top_p, HAS_MIN_P=has_min_p,
        TILE=TILE, maxnreg=DRAW_REGISTERS, **chunks, **shared,
    )  # fmt: skip
    return state
