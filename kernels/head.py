"""Both ends of the model: the embedding's rows, and the product with the vocabulary.

    embed             y[m] = table[token_ids[m]] * scale, rounded to the table's dtype
    lm_head           logits = softcap * tanh(x @ weight.T / softcap), in float32
    lm_head_argmax    the greatest of them and its token id, without the logits; with temperatures
                      the greatest of logits + temperature * noise, which is a draw (gumbel.py)

Logits are float32 whatever x's dtype: bf16 logits tie, about one row in twenty would have two equal
maxima.  lm_head has a program for each BLOCK_V tokens and 16 rows.  In lm_head_argmax a program
walks over two such blocks in one loop over blocks and columns: the weights of the second are on
their way while the logits of the first are compared.  It keeps its best token in registers and
writes it once; advance_ takes the greatest of all.  Both take the same sums in the same order, so
they agree bit for bit.

Two blocks are few on purpose: whatever processor is done takes the next program.  Predicted for
gemma-2-2b on an H200: 271 us with one block a program, 267 with two, 299 with four, 265 with 16 in
250 programs that begin together; a prototype with one block was measured at 263.

Cost of embed: 2 M D elements moved.  Of the head: V D weights read once for 16 rows (1.2 GB in a
step of gemma-2-2b, a fifth of all its bytes), 2 operations each a row, some 70 more a logit for the
noise, 4 M V bytes of logits written: bound by memory bandwidth, see skinny_product.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gemcut.kernels.advance import MAX_RANGES
from gemcut.kernels.checks import (
    check_index,
    check_shape,
    check_softcap,
    check_tensors,
    check_weight,
    require,
)
from gemcut.kernels.dependent_launch import dependent_launch, wait_for_predecessor
from gemcut.kernels.gelu import tanh
from gemcut.kernels.gumbel import noisy_logits, packed, packed_id, packed_value
from gemcut.kernels.outputs import result, results
from gemcut.kernels.product_tiles import (
    BLOCK_M,
    check_linear,
    operands,
    pipeline,
    rows_of_weight,
    tuned_tile,
)
from gemcut.kernels.quantized_tiles import row_of_numbers
from gemcut.kernels.quantized_weight import Weight
from gemcut.kernels.skinny_product import add_step, prefetch_scales, product, scaled_by_row

MAX_BLOCK_D = 4096  # columns that a program of embed copies
BLOCKS_OF_A_PROGRAM = 2  # of lm_head_argmax


@triton.jit(do_not_specialize_on_alignment=["token_ids_ptr"])
def embed_kernel(
    token_ids_ptr, w_ptr, scales_ptr, zeros_ptr, y_ptr,  # [M], [V, D], [V, G] x 2, [M, D]
    V, D,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    SCALE: tl.constexpr,
    DEPENDENT: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    wait_for_predecessor(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    token_id, table = tl.load(token_ids_ptr + row), (w_ptr, scales_ptr, zeros_ptr)
    y = embedding(table, token_id, offs_d, V, D, FORMAT, GROUP, SCALE)
    tl.store(y_ptr + row * D + offs_d, y.to(y_ptr.dtype.element_ty), mask=offs_d < D)


@triton.jit
def embedding(
    table, token_id, offs_d, V, D,
    FORMAT: tl.constexpr, GROUP: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """Columns offs_d of a token's scaled row of the table [V, D], in float32."""
    token_id = token_id.to(tl.int64)
    # an id outside the table would read foreign memory: it yields NaN, which shows
    width = tl.where((token_id >= 0) & (token_id < V), D, 0)
    mask_d = offs_d < width
    if FORMAT is None:
        x = tl.load(table[0] + token_id * D + offs_d, mask=mask_d, other=float("nan"))
        x = x.to(tl.float32)
    else:
        x = row_of_numbers(table, token_id, offs_d, mask_d, D, FORMAT, GROUP)
        x = tl.where(mask_d, x, float("nan"))
    return x * SCALE


@triton.jit
def capped(logits, SOFTCAP: tl.constexpr):
    if SOFTCAP is not None:
        logits = SOFTCAP * tanh(logits / SOFTCAP, APPROXIMATE=False)
    return logits


@triton.jit(do_not_specialize=["M"])
def lm_head_kernel(
    x_ptr, w_ptr, scales_ptr, zeros_ptr, logits_ptr,  # [M, D], [V, D], [V, G] x 2, [M, V] float32
    stride_x_m,
    M, V, D,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    SOFTCAP: tl.constexpr,
    IS_EVEN: tl.constexpr,
    HAS_TAIL: tl.constexpr,
    DEPENDENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    wait_for_predecessor(DEPENDENT)
    # int64: 8389 rows of 256 000 logits pass 2**31
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_v = tl.program_id(1).to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask_m, mask_v = offs_m < M, offs_v < V
    tokens, weight = (x_ptr, stride_x_m, offs_m, mask_m), (w_ptr, scales_ptr, zeros_ptr)
    prefetch_scales(weight, offs_v, mask_v, 0, D, FORMAT, GROUP)
    acc = product(
        tokens, weight, offs_v, mask_v, D, 0, D,
        IS_EVEN, HAS_TAIL, True, FORMAT, GROUP, BLOCK_M, BLOCK_V, BLOCK_D,
    )  # fmt: skip
    logits = capped(acc, SOFTCAP)
    logits_ptrs = logits_ptr + offs_m[None, :] * V + offs_v[:, None]
    tl.store(logits_ptrs, logits, mask=mask_m[None, :] & mask_v[:, None])


@triton.jit(
    do_not_specialize=["M", "N"],
    do_not_specialize_on_alignment=["temperature_ptr", "seeds_ptr", "positions_ptr", "rows_ptr"],
)
def lm_head_argmax_kernel(
    x_ptr, w_ptr, scales_ptr, zeros_ptr,  # [M, D], [V, D], [V, G] x 2
    temperature_ptr, seeds_ptr, positions_ptr, rows_ptr,  # [N] x 3: None is greedy; [M]
    scores_ptr, ids_ptr,  # [S, M] float32, int64: the best of each range of the vocabulary
    stride_x_m,
    M, N, V, D,
    blocks,  # of BLOCK_V tokens, in a range
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    SOFTCAP: tl.constexpr,
    IS_EVEN: tl.constexpr,
    HAS_TAIL: tl.constexpr,
    DEPENDENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    wait_for_predecessor(DEPENDENT)
    IS_RANDOM: tl.constexpr = temperature_ptr is not None
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    if IS_RANDOM:
        rows = offs_m
        if rows_ptr is not None:
            rows = tl.load(rows_ptr + offs_m, mask=mask_m, other=0).to(tl.int64)
        exists = mask_m & (rows >= 0) & (rows < N)
        temperature = tl.load(temperature_ptr + rows, mask=exists, other=0.0)[None, :]
        seed = tl.load(seeds_ptr + rows, mask=exists, other=0)[None, :]
        position = tl.load(positions_ptr + rows, mask=exists, other=0)[None, :]

    tokens, weight = (x_ptr, stride_x_m, offs_m, mask_m), (w_ptr, scales_ptr, zeros_ptr)
    block = (tl.program_id(1).to(tl.int64) * blocks).to(tl.int32)  # below V
    end = tl.minimum(block + blocks, tl.cdiv(V, BLOCK_V))
    steps = (end - block).to(tl.int64) * tl.cdiv(D, BLOCK_D)
    start_d = 0
    acc = tl.zeros([BLOCK_V, BLOCK_M], dtype=tl.float32)
    best = tl.zeros([BLOCK_V, BLOCK_M], dtype=tl.int64)
    for _ in range(steps.to(tl.int32)):
        offs_v = block.to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
        mask_v = offs_v < V
        if start_d == 0:
            prefetch_scales(weight, offs_v, mask_v, 0, D, FORMAT, GROUP)
        acc = add_step(
            acc, tokens, weight, offs_v, mask_v,
            D, start_d, IS_EVEN, HAS_TAIL, True, FORMAT, GROUP, BLOCK_D,
        )  # fmt: skip

        is_last = start_d + BLOCK_D >= D
        if is_last:
            acc = scaled_by_row(acc, weight, offs_v, mask_v, FORMAT, GROUP)
            logits = capped(acc, SOFTCAP)
            if IS_RANDOM:
                logits = noisy_logits(logits, temperature, seed, position, offs_v[:, None])
            found = packed(logits, offs_v[:, None])
            best = tl.maximum(best, tl.where(mask_v[:, None], found, 0))
            acc = tl.zeros_like(acc)
        # not under the `if`: loads that depended on it would wait for the product before them
        block = tl.where(is_last, block + 1, block)
        start_d = tl.where(is_last, 0, start_d + BLOCK_D)

    best = tl.max(best, axis=0)
    offs = tl.program_id(1).to(tl.int64) * M + offs_m
    tl.store(scores_ptr + offs, packed_value(best), mask=mask_m)
    tl.store(ids_ptr + offs, packed_id(best), mask=mask_m)


def _tile(weight: Weight, x: Tensor) -> dict[str, int]:
    (V, D), block_v = weight.shape, rows_of_weight(x)
    rule = {"BLOCK_V": block_v, **pipeline(x, weight, triton.cdiv(V, block_v))}
    tile = rule | tuned_tile("lm_head", x, weight, V, D)
    has_tail = D % tile["BLOCK_D"] != 0
    is_even = not has_tail and V % tile["BLOCK_V"] == 0
    return {"BLOCK_M": BLOCK_M, "IS_EVEN": is_even, "HAS_TAIL": has_tail, **tile}


def embed(token_ids: Tensor, table: Weight, scale: float, *, out: Tensor | None = None) -> Tensor:
    """Scaled rows of the table: token_ids [M], table [V, D] -> [M, D].

    An id outside the table yields a row of NaN: the device cannot raise.
    """
    check_weight("table", table, "[V, D]")
    V, D = table.shape
    M = token_ids.numel()
    check_tensors(table, token_ids=token_ids)
    check_index("token_ids", token_ids, M)

    y = result(out, (M, D), table, table.dtype, token_ids, table)
    if y.numel():
        block_d = min(MAX_BLOCK_D, triton.next_power_of_2(D))
        embed_kernel[(M, triton.cdiv(D, block_d))](
            token_ids_ptr=token_ids, **operands(table), y_ptr=y, V=V, D=D,
            SCALE=scale, BLOCK_D=block_d, num_warps=4, **dependent_launch(table.device),
        )  # fmt: skip
    return y


def lm_head(
    x: Tensor, weight: Weight, softcap: float | None, *, out: Tensor | None = None
) -> Tensor:
    """Logits in float32 whatever x's dtype: x [M, D], weight [V, D] -> [M, V].

    A row's bits do not depend on the others.
    """
    check_linear(x, weight, None)
    check_softcap(softcap)
    M, (V, D) = x.shape[0], weight.shape
    logits = result(out, (M, V), x, torch.float32, x, weight)
    if M:
        tile = _tile(weight, x)
        lm_head_kernel[(triton.cdiv(M, BLOCK_M), triton.cdiv(V, tile["BLOCK_V"]))](
            x_ptr=x, **operands(weight), logits_ptr=logits, stride_x_m=x.stride(0),
            M=M, V=V, D=D, SOFTCAP=softcap, **tile, **dependent_launch(x.device),
        )  # fmt: skip
    return logits


def lm_head_argmax(
    x: Tensor,
    weight: Weight,
    softcap: float | None,
    temperature: Tensor | None = None,
    seeds: Tensor | None = None,
    positions: Tensor | None = None,
    rows: Tensor | None = None,
    *,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The greatest logit and its token id in each of S ranges of the vocabulary, the lowest first.

    x [M, D], weight [V, D] -> [S, M] float32, [S, M] int64.  The greatest score of a row is that of
    its token, of the first range among equals; `advance_` takes it.  With temperature [N] float32,
    seeds and positions [N] int, of which row m takes those at rows[m], or its own where rows is
    None, scores are logits + temperature * noise, and the token is that of `sample`; at temperature
    0, and for a row outside, they are logits.  The lowest id wins a tie; NaN counts as the
    greatest.  S depends on V and the arch alone, and a row's bits not on the others.
    """
    check_linear(x, weight, None)
    check_softcap(softcap)
    M, (V, D) = x.shape[0], weight.shape
    require(V < 2**31, f"vocabulary of {V} is not below 2**31")
    _check_draw(x, temperature, seeds, positions, rows)

    tile = _tile(weight, x)
    ranges, blocks = _ranges(triton.cdiv(V, tile["BLOCK_V"]))
    given, used = results(out, 2), (x, weight, temperature, seeds, positions, rows)
    scores = result(given[0], (ranges, M), x, torch.float32, *used)
    ids = result(given[1], (ranges, M), x, torch.int64, *used, given[0])
    if M:
        lm_head_argmax_kernel[(triton.cdiv(M, BLOCK_M), ranges)](
            x_ptr=x, **operands(weight),
            temperature_ptr=temperature, seeds_ptr=seeds, positions_ptr=positions, rows_ptr=rows,
            scores_ptr=scores, ids_ptr=ids, stride_x_m=x.stride(0),
            M=M, N=M if temperature is None else len(temperature), V=V, D=D, blocks=blocks,
            SOFTCAP=softcap, **tile, **dependent_launch(x.device),
        )  # fmt: skip
    return scores, ids


def _check_draw(
    x: Tensor,
    temperature: Tensor | None,
    seeds: Tensor | None,
    positions: Tensor | None,
    rows: Tensor | None,
) -> None:
    if temperature is None:
        return
    require(
        seeds is not None and positions is not None,
        "temperature needs seeds and positions, of which one is None",
    )
    M, dtype = x.shape[0], temperature.dtype
    N = M if rows is None else temperature.numel()
    require(dtype == torch.float32, f"temperature is {dtype}, must be torch.float32")
    require(temperature.device == x.device, f"temperature is on {temperature.device}, x elsewhere")
    check_tensors(temperature, seeds=seeds, positions=positions, rows=rows)
    check_shape("temperature", temperature, N)
    check_index("seeds", seeds, N)
    check_index("positions", positions, N)
    if rows is not None:
        check_index("rows", rows, M)


def count_ranges(weight: Weight, x: Tensor) -> int:
    """S of `lm_head_argmax`: in how many ranges it reads a vocabulary [V, D]."""
    V = weight.shape[0]
    return _ranges(triton.cdiv(V, _tile(weight, x)["BLOCK_V"]))[0]


def _ranges(blocks: int) -> tuple[int, int]:
    """Programs that share these blocks, and how many blocks each has; the last may have fewer."""
    each = max(BLOCKS_OF_A_PROGRAM, triton.cdiv(blocks, MAX_RANGES))
    return triton.cdiv(blocks, each), each
