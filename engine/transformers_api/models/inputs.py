"""Checks of the arrays given to a model: each error is one line that says what to do."""

from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from gemcut.engine.checks import shorten
from gemcut.engine.execution.model import Gemma
from gemcut.engine.transformers_api.models.arrays import as_tensor
from gemcut.engine.transformers_api.models.caches import StaticCache
from gemcut.engine.transformers_api.models.forward import Batch

MAX_POSITION = 2**24  # float32 counts that far exactly
IGNORED = -100  # a label that takes no part in the loss
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def read_batch(
    model: Gemma,
    cache: StaticCache,
    input_ids: Any,
    attention_mask: Any,
    position_ids: Any,
    inputs_embeds: Any,
    *,
    may_be_packed: bool,
) -> Batch:
    """The batch that these arrays hold; ValueError names one that is invalid.

    `may_be_packed`: position_ids that begin anew within a row tell several sequences apart, as they
    do in transformers where there is neither a mask nor a cache.
    """
    if (input_ids is None) == (inputs_embeds is None):
        given = "neither" if input_ids is None else "both"
        raise ValueError(f"give input_ids or inputs_embeds; {given} of them came")
    ids = embeds = None
    if input_ids is not None:
        ids = read_ids("input_ids", input_ids, model)
        B, T = ids.shape
    else:
        embeds = as_tensor("inputs_embeds", inputs_embeds, model.device)
        width = model.config.hidden_size
        if embeds.dim() != 3 or embeds.shape[2] != width or not embeds.is_floating_point():
            raise ValueError(
                f"inputs_embeds is {embeds.dtype} {list(embeds.shape)}, "
                f"must be of floats [batch, length, {width}]"
            )
        B, T = embeds.shape[:2]
    if B == 0 or T == 0:
        raise ValueError(f"the batch is empty: {B} rows of {T} columns")
    past = cache.get_seq_length()
    mask = _read_mask(attention_mask, B, T, cache, model)
    positions = _read_positions(position_ids, B, T, past, model)
    segments = None
    if may_be_packed and position_ids is not None and mask is None:
        segments = (positions.diff(prepend=positions[:, :1] - 1) != 1).cumsum(-1)
        segments = segments if segments.any() else None
    return Batch(ids, embeds, (B, T), mask, positions, segments)


def read_ids(name: str, value: Any, model: Gemma) -> Tensor:
    """Token ids [B, T] int64 on the model's device, each within the vocabulary."""
    ids = as_tensor(name, value, model.device)
    if ids.dtype not in INTEGERS or ids.dim() != 2:
        raise ValueError(
            f"{name} is {ids.dtype} {list(ids.shape)}, must be integers [batch, length]"
        )
    ids = ids.to(torch.int64)
    # an id out of range on a GPU would read foreign memory, and kill the context
    _check_range(name, ids, 0, model.config.vocab_size - 1)
    return ids


def read_labels(value: Any, shape: tuple[int, ...], classes: int, device: torch.device) -> Tensor:
    """Labels of this shape, each -100 or a class: int64 on `device`."""
    labels = as_tensor("labels", value, device)
    if labels.dtype not in INTEGERS:
        raise ValueError(f"labels are {labels.dtype}, must be integers")
    if tuple(labels.shape) != shape:
        raise ValueError(f"labels are {list(labels.shape)}, must be {list(shape)}")
    labels = labels.to(torch.int64)
    _check_range("labels", labels.masked_fill(labels == IGNORED, 0), 0, classes - 1, "-100 or ")
    return labels


def check_sees_tokens(
    lost: Tensor, columns: Tensor, what: str, hint: str = f"set that label to {IGNORED}"
) -> None:
    """Nothing, or ValueError where a column that is asked for is masked, and so is all it sees.

    lost bool and columns int64 [B, n], on the host.
    """
    if (wrong := lost.nonzero()).numel():
        row, place = wrong[0].tolist()
        raise ValueError(
            f"{what} column {int(columns[row, place])} of row {row}, which attention_mask hides "
            f"with all that it sees; {hint}"
        )


def check_is_stored(mask: Tensor, cache: StaticCache) -> None:
    """Nothing, or ValueError where a mask [B, past + T] shows a column that is not cached."""
    past = cache.get_seq_length()
    for row in range(mask.shape[0] if past else 0):
        stored = torch.zeros(past, dtype=torch.bool, device="cpu")
        stored[cache.shown_columns(row)] = True
        if (lost := (mask[row, :past] & ~stored).nonzero()).numel():
            raise ValueError(
                f"attention_mask shows column {int(lost[0])} of row {row}, but it was hidden when "
                f"the cache was filled, and is not in it"
            )


def check_cache_position(value: Any, past: int, count: int, device: torch.device) -> None:
    """Nothing, or ValueError where the new columns would not follow the cached ones."""
    if value is None:
        return
    expected = torch.arange(past, past + count, device="cpu")
    if not torch.equal(as_tensor("cache_position", value, device).cpu().to(torch.int64), expected):
        raise ValueError(
            f"cache_position {shorten(value)} is not {past} to {past + count - 1}, where the cache "
            f"goes on; leave it out"
        )


def read_columns(which: Any, shape: tuple[int, int], device: torch.device) -> Tensor:
    """The columns of which logits are wanted: int64 [kept] or [B, kept], or bool [B, T]."""
    T = shape[1]
    if isinstance(which, Integral) and not isinstance(which, bool):
        if which < 0:
            raise ValueError(f"logits_to_keep {which} is negative; 0 keeps all columns")
        return torch.arange(T, device=device)[-int(which) :]
    columns = as_tensor("logits_to_keep", which, device)
    if columns.dtype == torch.bool and tuple(columns.shape) == shape:
        return columns
    if columns.dtype not in INTEGERS or columns.dim() not in (1, 2):
        raise ValueError(
            f"logits_to_keep is {columns.dtype} {list(columns.shape)}, must be a number, columns "
            f"[kept] or [{shape[0]}, kept], or a bool for each of {list(shape)}"
        )
    if columns.dim() == 2 and columns.shape[0] != shape[0]:
        raise ValueError(f"logits_to_keep has {columns.shape[0]} rows, the batch {shape[0]}")
    columns = columns.to(torch.int64)
    if columns.numel() and not (int(columns.min()) >= -T and int(columns.max()) < T):
        raise ValueError(f"logits_to_keep names a column outside {-T}..{T - 1}")
    return columns % T


def keep_columns(x: Tensor, columns: Tensor) -> Tensor:
    """The columns of x [B, T, D] that `read_columns` has chosen: [B, kept, D] or [kept, D]."""
    if columns.dtype == torch.bool:
        return x[columns]
    if columns.dim() == 1:
        return x.index_select(1, columns)
    return x.take_along_dim(columns.unsqueeze(-1), dim=1)


def _read_mask(
    value: Any, rows: int, columns: int, cache: StaticCache, model: Gemma
) -> Tensor | None:
    past = cache.get_seq_length()
    if value is None:
        return None
    mask = as_tensor("attention_mask", value, model.device)
    if mask.dim() == 4:
        raise NotImplementedError("attention_mask has 4 axes; give one entry a column: [batch, S]")
    wanted = past + columns
    shape = tuple(mask.shape)
    if len(shape) == 2 and shape[0] == rows and shape[1] == cache.max_cache_len:
        mask = mask[:, :wanted]  # Flax's callers give one entry for each place of the cache
    elif shape != (rows, wanted):
        of = f"{past} columns of the cache and {columns} new ones" if past else "the input's"
        raise ValueError(f"attention_mask is {list(shape)}, must be [{rows}, {wanted}]: {of}")
    mask = mask.cpu()
    if mask.dtype != torch.bool:
        if not ((mask == 0) | (mask == 1)).all():
            raise ValueError("attention_mask holds other values than 0 (padding) and 1 (token)")
        mask = mask != 0
    check_is_stored(mask, cache)
    return mask


def _read_positions(value: Any, rows: int, columns: int, past: int, model: Gemma) -> Tensor:
    if value is None:
        return torch.arange(past, past + columns, device="cpu").expand(rows, columns)
    positions = as_tensor("position_ids", value, model.device)
    shape = tuple(positions.shape)
    if positions.dtype not in INTEGERS or shape not in ((rows, columns), (1, columns)):
        raise ValueError(
            f"position_ids is {positions.dtype} {list(shape)}, "
            f"must be integers [{rows}, {columns}] or [1, {columns}]"
        )
    positions = positions.cpu().to(torch.int64).expand(rows, columns)
    _check_range("position_ids", positions, 0, MAX_POSITION - 1)
    return positions


def _check_range(name: str, x: Tensor, low: int, high: int, also: str = "") -> None:
    if x.numel() == 0:
        return
    smallest, largest = (int(bound) for bound in torch.aminmax(x))
    for value in (smallest, largest):
        if not low <= value <= high:
            raise ValueError(f"{name}: {value} is outside {also}{low}..{high}")
