"""Token choice: penalties, then temperature, top-k, top-p, min-p and the draw, one id for a row.

    penalize    y = x / r where x > 0, else x * r      for tokens generated or in the prompt
                y - frequency * count - presence * (count > 0)
    sample      id = argmax over the kept v of  scaled[v] + noise[v]
                scaled = (logits - max logits) / temperature
                noise = -log(-log(u)),  u = (top 23 bits of hash(seed, position, v) + 1/2) / 2**23

logits [B, V] float32, every setting [B].  min_p keeps scaled >= log(min_p), a share of the greatest
probability; top-k and top-p are thresholds too (top_k_top_p.py), so nothing is sorted and the
draw needs no list of what is kept.  The hash is SplitMix64 in 64-bit integers: bit for bit the
oracle's.  A row of temperature 0, or one where nothing can be drawn (NaN), takes the maximum; NaN
counts as the greatest, as in torch.

A program takes a chunk of a row's vocabulary, whatever B is: a row's id never depends on the batch.
Chunks meet in an atomic maximum of (value, lowest id) packed into 63 bits, exact in any order.

Cost: penalize moves 13 bytes for each logit (int32 counts), bound by memory bandwidth.  sample
reads 4 B V bytes in each launch, from L2, about 10 operations for a logit to find the maximum, 30
in a pass of top-k or top-p, 60 in the draw; bound by latency up to some 4 rows, then by the integer
and logarithm units.  Launches, after one fill of the state with zeros:

    temperature None: 1      with temperatures: 2      and 3 for top-k, 3 for top-p, 0 for min-p
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gemcut.kernels.checks import check_index, check_rows, check_shape, check_tensors, require
from gemcut.kernels.dependent_launch import dependent_launch, wait_for_predecessor
from gemcut.kernels.top_k_top_p import (
    BEST,
    BUCKETS,
    DRAWN,
    FIELDS,
    LAST_KEY,
    MAX_VOCAB_SIZE,
    THRESHOLD,
    descending_keys,
    is_last_program,
    narrow_,
    packed,
    packed_id,
    packed_value,
    scaled_logits,
)

CHUNK = 2048  # logits of a program: 8 KiB, and 125 programs for a row of 256 000

# SplitMix64 (Steele, Lea, Flood, 2014, "Fast splittable pseudorandom number generators")
GOLDEN_GAMMA = tl.constexpr(0x9E3779B97F4A7C15)
MIX_1 = tl.constexpr(0xBF58476D1CE4E5B9)
MIX_2 = tl.constexpr(0x94D049BB133111EB)


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


@triton.jit(do_not_specialize_on_alignment=["temperature_ptr", "top_k_ptr"])
def best_kernel(
    logits_ptr, temperature_ptr, top_k_ptr,  # [B, V], [B], [B]
    maxima_ptr, state_ptr, ids_ptr,  # [B, chunks], [B, FIELDS + BUCKETS], [B]
    stride_logits_b, stride_state_b,
    V, num_chunks,
    HAS_TOP_K: tl.constexpr,
    BLOCK_C: tl.constexpr,  # num_chunks or more
    DEPENDENT: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """The maximum and its id; a first threshold for top-k, below which no chunk need look."""
    wait_for_predecessor(DEPENDENT)
    row, pid_v = tl.program_id(0).to(tl.int64), tl.program_id(1)
    offs_v = pid_v * CHUNK + tl.arange(0, CHUNK)
    mask = offs_v < V
    x = tl.load(logits_ptr + row * stride_logits_b + offs_v, mask=mask, other=-float("inf"))
    best = tl.max(tl.where(mask, packed(x, offs_v), 0), axis=0)
    state_ptr += row * stride_state_b
    tl.atomic_max(state_ptr + BEST, best, sem="relaxed")
    if HAS_TOP_K:
        maxima_ptr += row * num_chunks
        tl.store(maxima_ptr + pid_v, tl.max(x, axis=0))

    if is_last_program(state_ptr):
        best = tl.load(state_ptr + BEST, cache_modifier=".cg")
        tl.store(ids_ptr + row, packed_id(best))
        threshold = tl.full([], LAST_KEY, tl.int32)
        if HAS_TOP_K:
            # k chunks have a maximum as high as the k-th of these, so k tokens are
            offs_c = tl.arange(0, BLOCK_C)
            maxima = tl.load(
                maxima_ptr + offs_c, mask=offs_c < num_chunks, other=-float("inf"),
                cache_modifier=".cg",
            )  # fmt: skip
            is_kth = offs_c == tl.load(top_k_ptr + row) - 1
            kth = tl.max(tl.where(is_kth, tl.sort(maxima, descending=True), -float("inf")), axis=0)
            temperature = tl.load(temperature_ptr + row)
            temperature = tl.where(temperature == 0.0, 1.0, temperature)
            kth = scaled_logits(kth, packed_value(best), temperature)
            threshold = tl.minimum(threshold, descending_keys(kth))
        tl.store(state_ptr + THRESHOLD, threshold.to(tl.int64))


@triton.jit
def mix64(x):
    x = (x ^ (x >> 30)) * MIX_1
    x = (x ^ (x >> 27)) * MIX_2
    return x ^ (x >> 31)


@triton.jit
def noise_bits(seed, position, token_ids):
    """The hash of reference.gumbel_noise, its top 23 bits: [N] int32."""
    gamma = tl.full([], GOLDEN_GAMMA, tl.uint64)
    stream = mix64(seed.to(tl.uint64) + (position + 1).to(tl.uint64) * gamma)
    return (mix64(stream + (token_ids + 1).to(tl.uint64) * gamma) >> 41).to(tl.int32)


@triton.jit
def gumbel(bits):
    uniform = (bits.to(tl.float32) + 0.5) * (2.0**-23)
    return -tl.log(-tl.log(uniform))


@triton.jit(
    do_not_specialize_on_alignment=["temperature_ptr", "min_p_ptr", "seeds_ptr", "positions_ptr"]
)
def draw_kernel(
    logits_ptr, temperature_ptr, min_p_ptr,  # [B, V], [B], [B]
    seeds_ptr, positions_ptr, state_ptr, ids_ptr,  # [B], [B], [B, FIELDS + BUCKETS], [B]
    stride_logits_b, stride_state_b,
    V,
    HAS_MIN_P: tl.constexpr,
    DEPENDENT: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    wait_for_predecessor(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperature_ptr + row)
    if temperature == 0.0:
        return  # best_kernel has written the id
    state_ptr += row * stride_state_b
    offs_v = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    mask = offs_v < V
    x = tl.load(logits_ptr + row * stride_logits_b + offs_v, mask=mask, other=-float("inf"))
    scaled = scaled_logits(x, packed_value(tl.load(state_ptr + BEST)), temperature)
    threshold = tl.load(state_ptr + THRESHOLD).to(tl.int32)
    mask = mask & (descending_keys(scaled) <= threshold)
    if HAS_MIN_P:
        mask = mask & (scaled >= tl.log(tl.load(min_p_ptr + row)))

    position = tl.load(positions_ptr + row).to(tl.int64)
    noisy = scaled + gumbel(noise_bits(tl.load(seeds_ptr + row), position, offs_v))
    drawn = tl.max(tl.where(mask, packed(noisy, offs_v), 0), axis=0)
    tl.atomic_max(state_ptr + DRAWN, drawn, sem="relaxed")
    if is_last_program(state_ptr):
        drawn = tl.load(state_ptr + DRAWN, cache_modifier=".cg")
        tl.store(ids_ptr + row, packed_id(drawn), mask=drawn > 0)


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

    y = torch.empty((B, V), device=logits.device, dtype=logits.dtype)
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
    ids = torch.empty(B, device=logits.device, dtype=torch.int64)
    if B:
        _choose_(ids, logits, temperature, top_k, top_p, min_p, seeds, positions)
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
    num_chunks = triton.cdiv(V, CHUNK)
    grid = (B, num_chunks)
    is_random = temperature is not None
    has_top_k = is_random and top_k is not None
    has_top_p = is_random and top_p is not None
    width = FIELDS.value + (BUCKETS if has_top_k or has_top_p else 0)
    state = torch.zeros((B, width), device=logits.device, dtype=torch.int64)
    maxima = torch.empty(grid, device=logits.device, dtype=logits.dtype) if has_top_k else None

    best_kernel[grid](
        logits_ptr=logits, temperature_ptr=temperature, top_k_ptr=top_k,
        maxima_ptr=maxima, state_ptr=state, ids_ptr=ids,
        stride_logits_b=logits.stride(0), stride_state_b=width,
        V=V, num_chunks=num_chunks,
        HAS_TOP_K=has_top_k, BLOCK_C=triton.next_power_of_2(num_chunks), CHUNK=CHUNK, num_warps=8,
        **dependent_launch(logits.device),
    )  # fmt: skip
    if temperature is None:
        return state
    if top_k is not None:
        narrow_(state, logits, temperature, top_k, is_mass=False, chunk=CHUNK)
    if top_p is not None:
        narrow_(state, logits, temperature, top_p, is_mass=True, chunk=CHUNK)
    draw_kernel[grid](
        logits_ptr=logits, temperature_ptr=temperature, min_p_ptr=min_p,
        seeds_ptr=seeds, positions_ptr=positions, state_ptr=state, ids_ptr=ids,
        stride_logits_b=logits.stride(0), stride_state_b=width,
        V=V, HAS_MIN_P=min_p is not None, CHUNK=CHUNK, num_warps=8,
        **dependent_launch(logits.device),
    )  # fmt: skip
    return state
