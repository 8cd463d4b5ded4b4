"""Attention "gemcut" of transformers 5: gemcut's attention over the caches that transformers keeps.

`register_attention` gives it to AttentionInterface, and a mask function of the same name to
AttentionMaskInterface, so that every model of the four families takes it by

    model.set_attn_implementation("gemcut")

Softcap and windows are the kernel's own, no matrix of scores or of masks is ever made, and keys are
read where the cache has them.  The mask function says where each row's keys begin instead, a few
numbers a row; it knows causal masks, windows, and padding before or after a text.  All else is
refused: custom 4D masks, packed sequences, tokens that see later ones, attention weights, dropout,
gradients.

Letters in shape comments: B rows, T new tokens of a row, S keys, HQ and HK query and KV heads, K
head_dim, R chunks.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

from gemcut import kernels
from gemcut.engine.adapters.transformers_cpu import (
    BOUNDS,
    FEW_QUERIES,
    PADS,
    SLOTS,
    STARTS,
    masked_attention,
)
from gemcut.kernels import cpu

NAME = "gemcut"
PAGED = f"paged|{NAME}"  # what continuous batching asks for
FAMILIES = ("gemma", "gemma2", "vaultgemma", "gemma3_text")


def register_attention() -> None:
    """Make "gemcut" an attention of transformers, in this process; again changes nothing."""
    AttentionInterface.register(NAME, attention)
    AttentionInterface.register(PAGED, attention)
    AttentionMaskInterface.register(NAME, plan_attention)


def ops_on(device: torch.device) -> Any:
    """The table of ops for tensors on a device: kernels, on a CPU `kernels.cpu`, and traced ops."""
    if torch.compiler.is_compiling():
        return torch.ops.gemcut
    return kernels if device.type == "cuda" else cpu


def check_no_gradients(*tensors: Tensor) -> None:
    """RuntimeError where autograd would record what has no backward pass."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise RuntimeError(
            "gemcut's ops have no gradients: call under torch.no_grad() or torch.inference_mode(), "
            "or train with another attention and an unpatched model"
        )


# Plans, in the place of masks


def plan_attention(
    batch_size: int,
    kv_length: int,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    *,
    q_length: int | None = None,
    q_offset: int | Tensor = 0,
    cache_position: Tensor | None = None,  # before transformers 5.4, for the two above
    device: torch.device | str = "cpu",
    **_: Any,
) -> Tensor:
    """Where each row's keys begin and its queries stand, as transformers asks for a mask.

    A plan is int32 [3, 1, R + 1, 1], or [4, 1, R + 1, 1] with padding; chunk r of the queries, from
    BOUNDS[r] on, has its keys in slot SLOTS[r] and begins at position STARTS[r] of it.  Without
    padding R is B.  PADS says how many keys a row has before its first real one, and then a row of
    several tokens is two chunks: the first holds what stands before the text, and has no keys.

    It has four axes, as transformers hands a mask of four on as it is; no mask of tokens has this
    shape, as none has fewer keys than queries.  ValueError for masks that the kernel does not have.
    """
    if cache_position is not None:
        q_length, q_offset, device = len(cache_position), cache_position[0], cache_position.device
    assert q_length is not None
    plain = causal_mask_function
    if local_size is not None:
        plain = sliding_window_causal_mask_function(local_size)
    if not _same(mask_function, plain):
        raise ValueError(
            'attention "gemcut" is causal, in a window or not: packed sequences, tokens that see '
            "later ones and other custom masks are not supported; a mask of padding [B, S] is"
        )
    first = q_offset - kv_offset  # position of the first query where no row is padded
    pads = None
    if attention_mask is not None:
        if attention_mask.dim() != 2 or len(attention_mask) != batch_size:
            raise ValueError(
                f'attention "gemcut" takes a mask of padding [B, S] for {batch_size} rows, and got '
                f"attention_mask {list(attention_mask.shape)}"
            )
        pads = _pads(attention_mask[:, kv_offset : kv_offset + kv_length], first + q_length)
    rows = torch.arange(batch_size + 1, dtype=torch.int32, device=device)
    if pads is None:
        plan = [torch.zeros_like(rows) + first, rows, rows * q_length]
    elif q_length == 1:
        pads, slots = _to_width(pads[0], rows), _to_width(pads[1], rows)
        plan = [first - pads, slots, rows, pads]
    else:
        pads, slots = _to_width(pads[0], rows), _to_width(pads[1], rows)
        starts = first - pads
        before = (-starts).clamp(0, q_length)
        nothing, begins = torch.full_like(rows, -1), rows * q_length
        plan = [(nothing, starts.clamp(0)), (slots, slots), (begins, begins + before), (pads, pads)]
        plan = [torch.stack(pair, 1).flatten()[:-1] for pair in plan]
    return torch.stack(plan)[:, None, :, None].to(torch.int32)


def _to_width(x: Tensor, rows: Tensor) -> Tensor:
    return torch.nn.functional.pad(x.to(torch.int32), (0, len(rows) - len(x)))


def _pads(seen: Tensor, used: int | Tensor) -> tuple[Tensor, Tensor] | None:
    """Of a mask of padding [B, S]: each row's keys before its first real one, and its slot.

    None where no row has any.  Only the first `used` keys count.  ValueError where a row has
    padding between real tokens, or the mask fewer keys than that; where a graph is captured or
    traced the host cannot know it, and the slots are then -1, for which attention yields NaN.
    """
    S = seen.shape[1]
    places = torch.arange(S, device=seen.device)
    seen = seen.bool() & (places < used)
    begins = seen & ~torch.nn.functional.pad(seen, (1, 0))[:, :-1]  # a real token after none
    runs = begins.sum(-1)
    pads = torch.where(runs > 0, (begins * places).sum(-1), used)  # right for one run
    slots = torch.arange(len(seen), device=seen.device)
    if torch.compiler.is_compiling() or (seen.is_cuda and torch.cuda.is_current_stream_capturing()):
        return pads, torch.where((runs > 1) | (used > S), -1, slots)
    on_host = torch.stack([pads, runs, runs * 0 + used]).tolist()  # waits for the device
    if max(on_host[2], default=0) > S:
        raise ValueError(
            f'attention "gemcut" takes a mask of padding [B, S] of all keys, those in the cache '
            f"too: attention_mask is {on_host[2][0] - S} short"
        )
    if max(on_host[1], default=0) > 1:
        row = next(row for row, count in enumerate(on_host[1]) if count > 1)
        raise ValueError(
            f'attention "gemcut" takes padding before or after a text, not between its tokens: '
            f"attention_mask of row {row} has {on_host[1][row]} runs of ones"
        )
    return (pads, slots) if any(on_host[0]) else None


def _same(one: Any, other: Any) -> bool:
    """Whether two mask functions of transformers are the same code over the same values."""
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    if not (callable(one) and callable(other)):
        return type(one) is type(other) and isinstance(one, int) and one == other
    codes, cells = zip(*map(_code_and_cells, (one, other)), strict=True)
    return codes[0] is not None and codes[0] is codes[1] and _same(*cells)


def _code_and_cells(function: Any) -> tuple[Any, tuple[Any, ...]]:
    cells = getattr(function, "__closure__", None) or ()
    return getattr(function, "__code__", None), tuple(cell.cell_contents for cell in cells)


# Attention


def attention(
    module: Any,  # of transformers' attention
    query: Tensor,  # [B, HQ, T, K]
    key: Tensor,  # [B, HK, S, K]
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention by a plan, or of continuous batching: [B, T, HQ, K], and no weights.

    ValueError for what the kernel does not have, RuntimeError where gradients are asked for.
    """
    _check(module, dropout, kwargs)
    check_no_gradients(query, key, value)
    settings = (module.head_dim**-0.5 if scaling is None else scaling, softcap, sliding_window)
    if kwargs.get("cache") is not None:
        return _paged(module, query, key, value, settings, **kwargs), None
    B, HQ, T, K = query.shape
    plan = attention_mask
    if plan is None or plan.dtype != torch.int32 or plan.dim() != 4 or plan.shape[0] not in (3, 4):
        given = "no mask" if plan is None else f"a mask {list(plan.shape)} of {plan.dtype}"
        raise ValueError(f'attention "gemcut" takes a mask of padding [B, S], and got {given}')
    ops = ops_on(query.device)
    if ops is cpu and T < FEW_QUERIES:
        return masked_attention(plan, query, key, value, *settings), None
    chunks = plan.shape[2] - 1
    rows = plan[:, 0, :, 0].contiguous()
    starts, slots, bounds = rows[STARTS, :chunks], rows[SLOTS, :chunks], rows[BOUNDS]
    tables = None
    if key.stride() != value.stride() or key.stride(-1) != 1 or key.stride(0) % key.stride(2):
        key, value = key.contiguous(), value.contiguous()
    if len(rows) > PADS:
        tables = _tables(plan, rows[PADS], T, key)
        key, value = _tokens(key), _tokens(value)
    if T == 1:
        q, where = query.transpose(1, 2), (slots, starts)
        y = ops.attention_decode(q, key, value, *where, *settings, None, None, tables)
    else:
        q, where = query.transpose(1, 2).reshape(B * T, HQ, K), (slots, starts, bounds)
        y = ops.attention_prefill(q, key, value, *where, *settings, None, None, tables)
    return y.view(B, T, HQ, K), None


def _check(module: Any, dropout: float, kwargs: dict[str, Any]) -> None:
    config = module.config
    if config.model_type not in FAMILIES:
        raise ValueError(
            f'attention "gemcut" is for models of {", ".join(FAMILIES)}, not {config.model_type}'
        )
    for name in ("output_attentions", "head_mask"):
        if kwargs.get(name) is not None and kwargs[name] is not False:
            raise ValueError(f'{name} is not supported by attention "gemcut"; "eager" has it')
    if config.output_attentions:
        raise ValueError('output_attentions is not supported by attention "gemcut"; "eager" has it')
    if dropout:
        raise ValueError(f'dropout {dropout} of training is not supported by attention "gemcut"')
    if not getattr(module, "is_causal", True) or kwargs.get("is_causal") is False:
        raise ValueError('attention "gemcut" is causal, and this model is not')


def _tables(plan: Tensor, pads: Tensor, T: int, key: Tensor) -> Tensor:
    """Tables [B, S] of blocks of one token: where each row's real keys are, from the first on.

    They are the same in all layers of one kind, and kept with the plan.
    """
    B, _, S, _ = key.shape
    apart = key.stride(0) // key.stride(2)  # tokens from one row to the next
    kept = None if torch.compiler.is_compiling() else getattr(plan, "tables", None)
    if kept is not None and kept[0] == (S, apart):
        return kept[1]
    pads = pads[: 2 * B : 2] if T > 1 else pads[:B]
    rows = torch.arange(B, dtype=torch.int32, device=key.device) * apart + pads
    tables = rows[:, None] + torch.arange(S, dtype=torch.int32, device=key.device)
    if not torch.compiler.is_compiling():
        plan.tables = (S, apart), tables  # pyright: ignore[reportAttributeAccessIssue]
    return tables


def _tokens(x: Tensor) -> Tensor:
    """Keys or values [B, HK, S, K] as blocks of one token, [blocks, 1, HK, K], by a view."""
    B, HK, S, K = x.shape
    of_row, of_head, of_token, _ = x.stride()
    blocks = (B - 1) * of_row // of_token + S
    return x.as_strided((blocks, 1, HK, K), (of_token, of_token, of_head, 1))


def _paged(
    module: Any,  # of transformers' attention
    query: Tensor,  # [1, HQ, M, K]: tokens of all requests, one after the other
    key: Tensor,
    value: Tensor,
    settings: tuple[float, float | None, int | None],
    *,
    cache: Any,
    cu_seq_lens_q: Tensor,
    cu_seq_lens_k: Tensor | dict[str, Tensor],
    read_index: Any,
    write_index: Any,
    block_table: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """Attention of continuous batching [M, HQ, K]; its cache stores keys, and gathers those seen.

    Tokens after the last request yield zeros.
    """
    if block_table is not None:
        raise ValueError('attention "gemcut" needs use_cuda_graph and block tables turned off')
    if isinstance(cu_seq_lens_k, dict):
        kind = "full_attention" if settings[2] is None else "sliding_attention"
        cu_seq_lens_k = cu_seq_lens_k[kind]
    indices = {"read_index": read_index, "write_index": write_index}
    key, value = cache.update(key, value, module.layer_idx, **indices)  # [S, HK, K]
    M, B = query.shape[2], len(cu_seq_lens_q) - 1
    queries, keys = cu_seq_lens_q[: B + 1].int(), cu_seq_lens_k[: B + 1].int()
    starts = keys.diff() - queries.diff()
    starts = torch.nn.functional.pad(starts, (0, 1), value=-1)
    bounds = torch.nn.functional.pad(queries, (0, 1), value=M)
    slots = torch.arange(B + 1, dtype=torch.int32, device=query.device)
    S = torch.arange(len(key), dtype=torch.int32, device=query.device)
    tables = torch.nn.functional.pad(keys[:-1], (0, 1))[:, None] + S
    q = query[0].transpose(0, 1)
    k, v = key.unsqueeze(1).contiguous(), value.unsqueeze(1).contiguous()
    where = (slots, starts, bounds)
    ops = ops_on(query.device)
    return ops.attention_prefill(q, k, v, *where, *settings, None, None, tables)
