"""The forward pass of a batch as transformers lays it out: [rows, columns], with padding.

Padding costs nothing here: only the real tokens of a row are computed, one after the other, at
their ranks in the cache (caches.py).  Masked columns are zero in every output, except those that a
label or a classifier asks for: these are computed too, and seen by none.

A row whose tokens are side by side is just a sequence, and the attention kernels compute it; one
new column is a decode step, in its fewer and larger kernels.  What these cannot express goes
through attention_masked, in plain torch: holes in a mask that make the distance in columns, by
which windows are measured, differ from that in tokens; several sequences packed in a row; a mask
that hides tokens which are in the cache; and attention weights as an output.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gemcut.engine.execution.cache import KVCache
from gemcut.engine.execution.cuda_graphs import ROWS
from gemcut.engine.execution.model import Gemma
from gemcut.engine.transformers_api.models.arrays import Convert, convert
from gemcut.engine.transformers_api.models.caches import StaticCache
from gemcut.engine.transformers_api.models.outputs import ModelOutput
from gemcut.kernels.cpu import attention_masked


@dataclass
class Batch:
    """New columns of a batch, checked.  All that decides where tokens go is on the host."""

    token_ids: Tensor | None  # [B, T] on the device, or
    embeds: Tensor | None  # [B, T, D] on the device
    shape: tuple[int, int]  # B, T
    mask: Tensor | None  # [B, past + T] bool on the host; None: no column is masked
    position_ids: Tensor  # [B, T] int64 on the host: by which tokens are rotated
    segments: Tensor | None  # [B, T] on the host: which of several packed sequences
    hidden: Tensor | None = None  # [B, T] bool on the host: masked columns that are computed too


@dataclass
class States:
    """Hidden states and attentions of a call, in the model's dtype; masked columns are zero."""

    last: Tensor  # [B, T, D]
    hidden: tuple[Tensor, ...] | None  # L + 1 of [B, T, D]
    attentions: tuple[Tensor, ...] | None  # L of [B, HQ, T, past + T]


@dataclass
class Run:
    """A call whose arguments are checked; its states are computed when they are first asked for."""

    model: Gemma
    batch: Batch
    cache: StaticCache
    returns_cache: bool
    output_hidden_states: bool
    output_attentions: bool
    kind: Convert  # to the kind of the caller's arrays
    as_mapping: bool

    @cached_property
    def states(self) -> States:
        return forward(
            self.model,
            self.batch,
            self.cache,
            output_hidden_states=self.output_hidden_states,
            output_attentions=self.output_attentions,
        )

    @property
    def past(self) -> int:
        """Columns that were in the cache before this call."""
        return 0 if self.batch.mask is None else self.batch.mask.shape[1] - self.batch.shape[1]

    @property
    def seen(self) -> Tensor | None:
        """Which new columns hold tokens: [B, T] bool on the host, None where all do."""
        mask = self.batch.mask
        return None if mask is None else mask[:, -self.batch.shape[1] :]

    def ask_for(self, columns: Tensor, asked: Tensor) -> Tensor:
        """Have these new columns computed even where they are masked -> those that see no token.

        columns int64 and asked bool [B, n], on the host.  The state of a column that sees nothing
        would depend on how attention over nothing is defined.
        """
        mask, (B, T), window = self.batch.mask, self.batch.shape, self.model.config.sliding_window
        if mask is None:
            return torch.zeros_like(asked)
        seen = mask.cumsum(1)
        if window is not None:
            seen = seen - F.pad(seen, (window, 0))[:, : seen.shape[1]]
        masked = asked & ~mask[:, -T:].gather(1, columns)
        sees_any = (seen[:, -T:] > 0).gather(1, columns)
        count = torch.zeros(B, T, dtype=torch.int64, device="cpu")
        count.scatter_add_(1, columns, (masked & sees_any).long())
        if count.any():
            self.batch.hidden = count > 0
        return masked & ~sees_any

    def answer(self, output_class: type[ModelOutput], **values: Any) -> Any:
        """The output with these values, the cache, the hidden states and the attentions."""
        values |= {
            "past_key_values": self.cache if self.returns_cache else None,
            "hidden_states": self.states.hidden,
            "attentions": self.states.attentions,
        }
        known = {name: values[name] for name in output_class.FIELDS if name in values}
        output = output_class(**{k: convert(x, self.kind) for k, x in known.items()})
        return output if self.as_mapping else output.to_tuple()


@dataclass
class Piece:
    """Tokens of one row that are computed together."""

    row: int
    columns: Tensor  # of the tokens, counted from the batch's first new one  [n]
    start: int  # rank of the first of them


def forward(
    model: Gemma,
    batch: Batch,
    cache: StaticCache,
    *,
    output_hidden_states: bool = False,
    output_attentions: bool = False,
) -> States:
    """Compute a batch that goes on from what the cache holds, and add it there."""
    if late := max(map(len, cache.late), default=0):
        batch = _after_late_tokens(model, batch, cache, late)
    (B, T), past, config = batch.shape, cache.get_seq_length() - late, model.config
    kv = cache.prepare(config, B, past + T, model.device, model.dtype)
    real = [_real_columns(batch, row, past, cache, late) for row in range(B)]
    held = cache.lengths
    columns = [
        torch.cat([cache.columns_of(row), new + past]) for row, new in enumerate(real)
    ]  # of each row: the column of each token, cached ones and new ones

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, device=model.device, dtype=model.dtype)

    last = zeros(B * T, config.hidden_size)
    hidden = attentions = None
    if output_hidden_states:
        hidden = [torch.zeros_like(last) for _ in range(config.num_layers)]
    if output_attentions:
        shape = (B, config.num_q_heads, T, past + T)
        attentions = [zeros(*shape) for _ in range(config.num_layers)]
    is_plain = attentions is None and batch.segments is None
    is_plain = is_plain and rows_are_plain(batch.mask, columns, past + T, config.sliding_window)

    def compute(pieces: list[Piece]) -> None:
        flat = torch.cat([piece.row * T + piece.columns for piece in pieces])
        where = _upload(flat, model)
        if is_plain:
            attend = _attend_plainly(model, kv, pieces)
        else:
            attend = _attend_by_mask(model, kv, pieces, batch, columns, past, attentions)

        def observe(layer: int, residual: Tensor) -> None:
            if hidden is not None:
                hidden[layer].index_copy_(0, where, residual)

        normed = model.run_layers(
            _residual(model, batch, where),
            kv,
            _upload(torch.cat([torch.full_like(p.columns, p.row) for p in pieces]), model),
            _upload(torch.cat([_ranks(p) for p in pieces]), model),
            _rope_tables(model, batch, flat),
            attend,
            observe,
        )
        last.index_copy_(0, where, normed)

    if T == 1 and B <= ROWS and is_plain and hidden is None and batch.token_ids is not None:
        _step(model, kv, batch, real, held, last)
    else:
        for pieces in _chunks(real, held, kv.prefill_chunk):
            compute(pieces)
    cache.extend(T, real)

    def by_row(x: Tensor) -> Tensor:
        return x.view(B, T, -1)[:, late:]

    return States(
        last=by_row(last),
        hidden=None if hidden is None else tuple(by_row(x) for x in (*hidden, last)),
        attentions=None if attentions is None else tuple(x[:, :, late:] for x in attentions),
    )


def _after_late_tokens(model: Gemma, batch: Batch, cache: StaticCache, width: int) -> Batch:
    """A batch with the cache's last `width` columns before it, and their late tokens in these."""
    (B, T), late = batch.shape, cache.late
    ids = torch.zeros(B, width, dtype=torch.int64, device="cpu")
    positions = torch.zeros_like(ids)
    for row, tokens in enumerate(late):
        first = width - len(tokens)
        ids[row, first:], positions[row, first:] = tokens.token_ids, tokens.positions
    ids, token_ids, embeds = _upload(ids, model), batch.token_ids, batch.embeds
    if token_ids is not None:
        token_ids = torch.cat([ids, token_ids], dim=1)
    if embeds is not None:
        before = model.embed(ids.flatten()).view(B, width, -1)
        embeds = torch.cat([before.to(embeds.dtype), embeds], dim=1)
    return Batch(
        token_ids,
        embeds,
        (B, width + T),
        batch.mask,
        torch.cat([positions, batch.position_ids], dim=1),
        batch.segments,
        None if batch.hidden is None else F.pad(batch.hidden, (width, 0)),
    )


def _step(
    model: Gemma, kv: KVCache, batch: Batch, real: list[Tensor], held: list[int], last: Tensor
) -> None:
    """Decode one token of each row that has one; its state goes to last [B, D]."""
    rows = _on_host([row for row, columns in enumerate(real) if len(columns)])
    if len(rows):
        assert batch.token_ids is not None
        where = _upload(rows, model)
        ranks = _upload(_on_host(held)[rows], model)
        ids = batch.token_ids.flatten().index_select(0, where)
        tables = _rope_tables(model, batch, rows)
        last.index_copy_(0, where, model.decode(ids, kv, where, ranks, tables))


def _real_columns(batch: Batch, row: int, past: int, cache: StaticCache, late: int) -> Tensor:
    """The columns whose tokens are computed, of the `late` cached ones and the new ones."""
    columns = torch.arange(batch.shape[1], device="cpu")
    is_real = torch.ones_like(columns, dtype=torch.bool)
    if late:  # the others of these columns are in the cache
        is_real[: late - len(cache.late[row])] = False
    if batch.mask is not None:
        shown = batch.mask[row, past:]
        is_real &= shown if batch.hidden is None else shown | batch.hidden[row]
    return columns[is_real]


def _chunks(real: list[Tensor], held: list[int], chunk: int) -> list[list[Piece]]:
    """The new tokens of all rows, in chunks that fit every row's ring."""
    longest = max((len(columns) for columns in real), default=0)
    return [
        [
            Piece(row, columns[first : first + chunk], held[row] + first)
            for row, columns in enumerate(real)
            if len(columns) > first
        ]
        for first in range(0, longest, chunk)
    ]


def rows_are_plain(
    mask: Tensor | None, columns: list[Tensor], end: int, window: int | None
) -> bool:
    """Whether each row is one sequence up to column `end`, of which all tokens are seen in order.

    Holes count where some of the columns are outside the window.
    """
    if window is not None and end > window and any(_has_holes(of_row) for of_row in columns):
        return False
    if mask is None:
        return True
    return all(bool(mask[row, of_row].all()) for row, of_row in enumerate(columns))


def _has_holes(columns: Tensor) -> bool:
    """Whether there are masked columns between those [n] that hold a row's tokens."""
    return len(columns) > 0 and int(columns[-1] - columns[0]) + 1 != len(columns)


def _residual(model: Gemma, batch: Batch, where: Tensor) -> Tensor:
    if batch.token_ids is not None:
        return model.embed(batch.token_ids.flatten().index_select(0, where))
    assert batch.embeds is not None
    return batch.embeds.flatten(0, 1).index_select(0, where).to(model.dtype)


def _rope_tables(model: Gemma, batch: Batch, flat: Tensor) -> list[tuple[Tensor, Tensor]]:
    # frequencies that depend on the length see the longest row's, as in transformers
    length = int(batch.position_ids.max()) + 1
    positions = _upload(batch.position_ids.flatten()[flat], model)
    return model.rope_tables(positions, torch.full_like(positions, length))


def _attend_plainly(
    model: Gemma, kv: KVCache, pieces: list[Piece]
) -> Callable[[int, Tensor], Tensor]:
    lengths = _on_host([0, *(len(piece.columns) for piece in pieces)])
    where = {
        "slots": _upload(_on_host([piece.row for piece in pieces]), model),
        "starts": _upload(_on_host([piece.start for piece in pieces]), model),
        "cu_seqlens": _upload(lengths.cumsum(0), model),
    }

    def attend(layer: int, q: Tensor) -> Tensor:
        held = kv.layers[layer]
        return model.ops.attention_prefill(q, held.k, held.v, **where, **model.attention(layer))

    return attend


def _attend_by_mask(
    model: Gemma,
    kv: KVCache,
    pieces: list[Piece],
    batch: Batch,
    columns: list[Tensor],
    past: int,
    attentions: list[Tensor] | None,
) -> Callable[[int, Tensor], Tensor]:
    def attend(layer: int, q: Tensor) -> Tensor:
        held, settings = kv.layers[layer], model.attention(layer)
        window = settings["sliding_window"]
        out, begin = torch.empty_like(q), 0
        for piece in pieces:
            count = len(piece.columns)
            # a window of columns holds no more tokens than a window of ranks
            first = 0 if window is None else max(0, piece.start - window + 1)
            keys = columns[piece.row][first : piece.start + count]
            visible = _visible(piece, keys, batch, past, window)
            rows = slice(begin, begin + count)
            out[rows], weights = attention_masked(
                q[rows],
                held.k,
                held.v,
                piece.row,
                first,
                visible.to(model.device),
                settings["scale"],
                settings["softcap"],
            )
            begin += count
            if attentions is not None:
                queries, seen = _upload(piece.columns, model), _upload(keys, model)
                attentions[layer][piece.row, :, queries.unsqueeze(-1), seen] = weights
        return out

    return attend


def _visible(piece: Piece, keys: Tensor, batch: Batch, past: int, window: int | None) -> Tensor:
    """Which keys the tokens of a piece see: keys [S], their columns -> [n, S] bool."""
    queries = (piece.columns + past).unsqueeze(-1)
    visible = keys <= queries
    if window is not None:
        visible &= keys > queries - window
    if batch.mask is not None:
        visible &= batch.mask[piece.row, keys]
    if batch.segments is not None:  # of a first call: columns are counted from its beginning
        of_row = batch.segments[piece.row]
        visible &= of_row[keys] == of_row[piece.columns].unsqueeze(-1)
    return visible


def _on_host(numbers: list[int]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device="cpu")  # whatever torch's default is


def _ranks(piece: Piece) -> Tensor:
    return torch.arange(piece.start, piece.start + len(piece.columns), device="cpu")


def _upload(x: Tensor, model: Gemma) -> Tensor:
    if model.device.type == "cuda":
        return x.pin_memory().to(model.device, non_blocking=True)
    return x
