"""The Gemma model over a static cache: token ids in, hidden states and logits out.

    residual = embed(ids)                                   h = norm(residual)
    for each layer:
        q  = rope_and_store(h @ qkv)                        keys and values go to the cache
        h  = add_norm(residual, attention(q) @ o)           post-norm, add, next norm
        h  = add_norm(residual, geglu(h @ gate_up) @ down)
    logits = softcap(h @ lm_head)

Prefill runs exactly that.  Decode runs the same in ops for few rows: what stands before the first
layer is one op, rotation and GeGLU are fused into their products, and a product leaves partial sums
to the norm that reads it.  Each is one loop for all four families: where a family lacks a norm, its
weight is None.  `ops` is a module: `gemcut.kernels`, or `gemcut.kernels.reference` with the same
names and signatures, which runs on any machine.
"""

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from gemcut.engine.config.model_config import ModelConfig
from gemcut.engine.execution.cache import Cache
from gemcut.engine.execution.rope import Rope
from gemcut.engine.execution.weights import Weights
from gemcut.engine.placement import check_process

Tables = list[tuple[Tensor, Tensor]]  # cos and sin of global layers, then of local ones


class Gemma:
    """The weights of one model and the ops that compute it."""

    def __init__(self, config: ModelConfig, weights: Weights, ops: ModuleType) -> None:
        self.config = config
        self.weights = weights
        self.ops = ops
        table = weights.embedding
        self.device, self.dtype = table.device, table.dtype
        # sqrt(hidden_size) is rounded to the table's dtype first: 55.5 for 3072 in bf16
        self.embedding_scale = torch.tensor(
            config.embedding_scale, dtype=self.dtype, device="cpu"
        ).item()
        rotary = partial(
            Rope,
            head_dim=config.head_dim,
            max_position_embeddings=config.max_position_embeddings,
            device=self.device,
        )
        self.rope_global = rotary(config.rope)
        one_kind = config.rope_local == config.rope  # all but Gemma 3
        self.rope_local = self.rope_global if one_kind else rotary(config.rope_local)
        self._global_attention = {
            "scale": config.scale,
            "softcap": config.attn_softcap,
            "sliding_window": None,
        }
        self._local_attention = self._global_attention | {"sliding_window": config.sliding_window}
        # the norm after each layer's last add: the next layer's first one
        self.next_norms = [layer.input_norm for layer in weights.layers[1:]] + [weights.norm]

    @property
    def rope_depends_on_length(self) -> bool:
        """Whether a token's key depends on the length of its sequence."""
        return self.rope_global.depends_on_length or self.rope_local.depends_on_length

    def prefill(
        self,
        token_ids: Tensor,
        cache: Cache,
        slot: int,
        start: int = 0,
        length: int | None = None,
    ) -> Tensor:
        """Normed hidden states of one sequence's new tokens: token_ids [T] -> [T, D].

        The tokens go to positions start to start + T - 1 of the slot, which already holds the
        earlier ones.  Long prompts are computed in chunks of `cache.prefill_chunk`.  `length` is
        the whole prompt's, where these tokens are only a part of it: frequencies that depend on it
        must not see how it was cut.
        """
        end = start + token_ids.shape[0]
        cache.check_room(slot, start, end)
        states = []
        for chunk in token_ids.split(cache.prefill_chunk):
            states.append(self.prefill_chunk(chunk, cache, slot, start, length or end))
            start += chunk.shape[0]
        return states[0] if len(states) == 1 else torch.cat(states)

    def prefill_chunk(
        self, token_ids: Tensor, cache: Cache, slot: int, start: int, length: int
    ) -> Tensor:
        """`prefill` of one chunk: token_ids [T], no more than a ring has room for -> [T, D]."""
        T = token_ids.shape[0]
        positions = torch.arange(start, start + T, device=self.device)
        chunk = {
            # filled on the device: a copy from the host would wait for it
            "slots": torch.full((1,), slot, device=self.device),
            "starts": torch.full((1,), start, device=self.device),
            "cu_seqlens": torch.arange(0, T + 1, T, device=self.device),
        }
        slots, lengths = torch.full_like(positions, slot), torch.full_like(positions, length)
        return self._prefill_rows(token_ids, cache, slots, positions, lengths, chunk)

    def prefill_padded(self, token_ids: Tensor, cache: Cache, place: Tensor) -> Tensor:
        """Normed hidden states of a chunk padded at its end; the host knows only its size T.

        token_ids [T]; place [4], on the device: slot, position of the first token, how many tokens
        there are, length of the whole prompt -> [T, D].  A row of padding stores nothing and
        attends to nothing.
        """
        T = token_ids.shape[0]
        slot, start, count, length = place.split(1)  # [1] each
        rows = torch.arange(T, device=self.device)
        positions = torch.where(rows < count, rows + start, -1)
        chunks = {
            # the padding is a chunk of its own, of an inactive sequence: it attends to zeros
            "slots": slot.repeat(2),
            "starts": torch.cat([start, torch.full_like(start, -1)]),
            "cu_seqlens": torch.cat([torch.zeros_like(count), count, torch.full_like(count, T)]),
        }
        slots, lengths = slot.repeat(T), length.repeat(T)
        return self._prefill_rows(token_ids, cache, slots, positions, lengths, chunks)

    def _prefill_rows(
        self,
        token_ids: Tensor,
        cache: Cache,
        slots: Tensor,
        positions: Tensor,
        lengths: Tensor,
        chunks: dict[str, Tensor],
    ) -> Tensor:
        """Normed hidden states of tokens [M] at slots and positions [M] -> [M, D].

        lengths [M] are those of the whole sequences; `chunks` tells attention which rows belong
        together and where they begin.
        """
        ops = self.ops

        def attend(layer: int, q: Tensor) -> Tensor:
            kv = cache.layers[layer]
            return ops.attention_prefill(
                q, kv.k, kv.v, **chunks, **self.attention(layer), **kv.arguments
            )

        tables = self.rope_tables(positions, lengths)
        residual = self.embed(token_ids)  # [M, D]
        return self.run_layers(residual, cache, slots, positions, tables, attend)

    def embed(self, token_ids: Tensor) -> Tensor:
        """Scaled embeddings, which begin the residual stream: token_ids [M] -> [M, D]."""
        return self.ops.embed(token_ids, self.weights.embedding, self.embedding_scale)

    def run_layers(
        self,
        residual: Tensor,
        cache: Cache,
        slots: Tensor,
        positions: Tensor,
        tables: Tables,
        attend: Callable[[int, Tensor], Tensor],
        observe: Callable[[int, Tensor], object] = lambda layer, residual: None,
    ) -> Tensor:
        """Normed hidden states of many new tokens: residual [M, D], which is overwritten -> [M, D].

        Their keys and values go to slots and positions [M] of the cache, rotated by `tables`.
        `attend` computes a layer's attention for its queries [M, HQ, K]; `observe` is given each
        layer's input, and must copy what it keeps.
        """
        check_process()
        ops, config, eps = self.ops, self.config, self.config.rms_norm_eps
        h = ops.rmsnorm(residual, self.weights.layers[0].input_norm, eps)
        for i, layer in enumerate(self.weights.layers):
            observe(i, residual)
            kv = cache.layers[i]
            q = ops.rope_and_store_(
                ops.linear(h, layer.qkv, layer.qkv_bias),
                kv.k,
                kv.v,
                slots,
                positions,
                *tables[config.is_local(i)],
                layer.q_norm,
                layer.k_norm,
                eps,
                **kv.arguments,
            )  # [M, HQ, K]
            branch = ops.linear(attend(i, q).flatten(1), layer.o, layer.o_bias)
            h = ops.add_rmsnorm_(
                residual, branch, layer.post_attention_norm, layer.pre_mlp_norm, eps
            )
            branch = ops.linear(ops.geglu(ops.linear(h, layer.gate_up)), layer.down)
            h = ops.add_rmsnorm_(residual, branch, layer.post_mlp_norm, self.next_norms[i], eps)
        return h

    def decode(
        self,
        token_ids: Tensor,
        cache: Cache,
        slots: Tensor,
        positions: Tensor,
        tables: Tables | None = None,
        *,
        by_slot: bool = False,
    ) -> Tensor:
        """Normed hidden states of a few new tokens of each row.

        token_ids [B] or [B, T], slots [B], positions [B] of the first of them -> [B * T, D].  Rows
        may be of any lengths; one with a negative position is inactive, and so is a token of T > 1
        with a negative id.  `tables` replace the rotation by position.  by_slot: token_ids and
        positions [num_slots] are those of all slots, of which each row takes its own.  One kernel,
        then eight a layer, nine where q and k are normalised.
        """
        check_process()
        ops, config, eps = self.ops, self.config, self.config.rms_norm_eps
        T = token_ids.shape[1] if token_ids.dim() == 2 else 1
        token_slots, token_positions = slots, positions  # of every token [B * T]
        if T > 1:
            token_slots, token_positions = _spread(token_ids, slots, positions)
            token_ids = token_ids.clamp(min=0)
        if tables is None:
            rows = slots if by_slot else None
            token_positions, residual, h, tables = self.begin(
                token_ids.flatten(), token_positions, rows
            )
            positions = token_positions if by_slot else positions
        else:
            residual = self.embed(token_ids.flatten())
            h = ops.rmsnorm(residual, self.weights.layers[0].input_norm, eps)
        for i, layer in enumerate(self.weights.layers):
            kv = cache.layers[i]
            q = ops.linear_rope_and_store_(
                h,
                layer.qkv,
                layer.qkv_bias,
                kv.k,
                kv.v,
                token_slots,
                token_positions,
                *tables[config.is_local(i)],
                layer.q_norm,
                layer.k_norm,
                eps,
                **kv.arguments,
            )  # [B * T, HQ, K]
            attended = ops.attention_decode(
                q.unflatten(0, (-1, T)),
                kv.k,
                kv.v,
                slots,
                positions,
                **self.attention(i),
                **kv.arguments,
            )
            branch = ops.skinny_linear(attended.reshape(q.shape[0], -1), layer.o, layer.o_bias)
            h = ops.add_rmsnorm_(
                residual, branch, layer.post_attention_norm, layer.pre_mlp_norm, eps
            )
            branch = ops.skinny_linear(ops.linear_geglu(h, layer.gate_up), layer.down)
            h = ops.add_rmsnorm_(residual, branch, layer.post_mlp_norm, self.next_norms[i], eps)
        return h

    def begin(
        self, token_ids: Tensor, positions: Tensor, rows: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tables]:
        """What a decode step has before its first layer: positions [M], residual, h, tables.

        token_ids, positions [N], of which row m takes those at rows[m]; its own where that is None.
        """
        ropes = [self.rope_global]
        if self.rope_local is not self.rope_global:
            ropes.append(self.rope_local)
        lengths = None
        if self.rope_depends_on_length:  # else they would be launches for nobody
            lengths = (positions if rows is None else positions.index_select(0, rows)) + 1
        positions, residual, h, cos, sin = self.ops.begin_step(
            token_ids,
            positions,
            rows,
            self.weights.embedding,
            self.embedding_scale,
            self.weights.layers[0].input_norm,
            self.config.rms_norm_eps,
            [rope.inv_freq(lengths) for rope in ropes],
            [rope.attention_scaling for rope in ropes],
        )
        tables = list(zip(cos.unbind(), sin.unbind(), strict=True))
        return positions, residual, h, tables if len(tables) == 2 else tables * 2

    def logits(self, hidden: Tensor) -> Tensor:
        """The head: normed hidden states [M, D] -> logits [M, V] in float32."""
        return self.ops.lm_head(hidden, self.weights.lm_head, self.config.final_softcap)

    def rope_tables(self, positions: Tensor, lengths: Tensor) -> Tables:
        """Cos and sin of global layers, then of local ones: positions, lengths [M].

        `lengths`: how long each token's sequence is when the token is computed.
        """

        def of(rope: Rope) -> tuple[Tensor, Tensor]:
            return self.ops.rope_tables(
                positions, rope.inv_freq(lengths), rope.attention_scaling, self.dtype
            )

        of_global = of(self.rope_global)
        one_kind = self.rope_local is self.rope_global
        return [of_global, of_global if one_kind else of(self.rope_local)]

    def attention(self, layer: int) -> dict[str, Any]:
        """Scale, softcap and window of a layer's attention, as keyword arguments."""
        return self._local_attention if self.config.is_local(layer) else self._global_attention


def _spread(token_ids: Tensor, slots: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Slot and position of every token: token_ids [B, T], slots, positions [B] -> [B * T] x 2."""
    T = token_ids.shape[1]
    spread = positions.unsqueeze(-1) + torch.arange(T, device=positions.device)
    spread = spread.masked_fill((positions < 0).unsqueeze(-1) | (token_ids < 0), -1)
    spread = spread.flatten()
    return slots.repeat_interleave(T, output_size=spread.numel()), spread
