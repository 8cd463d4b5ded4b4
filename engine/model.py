"""Gemma over a static cache: token ids in, hidden states and logits out.

    residual = embed(ids)                                   h = norm(residual)
    for each layer:
        q  = rope_and_store(h @ qkv)                        keys and values go to the cache
        h  = add_norm(residual, attention(q) @ o)           post-norm, add, next norm
        h  = add_norm(residual, geglu(h @ gate_up) @ down)
    logits = softcap(h @ lm_head)

One loop serves all four families: where a family lacks a norm, its weight is None.  Prefill and
decode differ in which attention reads the cache.  `ops` is a module of kernels/: the oracles of
`gemcut.kernels.reference` on any machine, or kernels of the same names and signatures.
"""

from collections.abc import Callable
from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from gemcut.engine.cache import KVCache
from gemcut.engine.config import GemmaConfig
from gemcut.engine.rope import Rope
from gemcut.engine.weights import Weights


class Gemma:
    """The weights of one model and the ops that it is computed with."""

    def __init__(self, config: GemmaConfig, weights: Weights, ops: ModuleType) -> None:
        self.config = config
        self.weights = weights
        self.ops = ops
        table = weights.embedding
        self.device, self.dtype = table.device, table.dtype
        # sqrt(hidden_size) is rounded to the table's dtype first: 55.5 for 3072 in bf16
        self.embedding_scale = torch.tensor(config.embedding_scale, dtype=self.dtype).item()
        rotary = partial(
            Rope,
            head_dim=config.head_dim,
            max_position_embeddings=config.max_position_embeddings,
            device=self.device,
        )
        self.rope_global = rotary(config.rope)
        one_kind = config.rope_local == config.rope  # all but Gemma 3
        self.rope_local = self.rope_global if one_kind else rotary(config.rope_local)
        # what each layer's last add is normalised by: the next layer's first norm
        self.next_norms = [layer.input_norm for layer in weights.layers[1:]] + [weights.norm]

    def prefill(self, token_ids: Tensor, cache: KVCache, slot: int, start: int = 0) -> Tensor:
        """Normed hidden states of one sequence's new tokens: token_ids [T] -> [T, D].

        The tokens stand at positions start to start + T - 1 of the slot, whose earlier positions
        are already there.  Long prompts are computed in chunks of `cache.prefill_chunk`.
        """
        length = start + token_ids.shape[0]  # frequencies that depend on it must not see the chunks
        if not (0 <= slot < cache.num_slots and 0 <= start < length <= cache.max_seq_len):
            raise ValueError(
                f"tokens {start} to {length - 1} in slot {slot} do not fit a cache of "
                f"{cache.num_slots} slots of {cache.max_seq_len} tokens"
            )
        chunks = token_ids.split(cache.prefill_chunk)
        states = []
        for chunk in chunks:
            states.append(self._prefill_chunk(chunk, cache, slot, start, length))
            start += chunk.shape[0]
        return states[0] if len(states) == 1 else torch.cat(states)

    def _prefill_chunk(
        self, token_ids: Tensor, cache: KVCache, slot: int, start: int, length: int
    ) -> Tensor:
        T = token_ids.shape[0]
        positions = torch.arange(start, start + T, device=self.device)
        attend = partial(
            self.ops.attention_prefill,
            slots=torch.tensor([slot], device=self.device),
            starts=torch.tensor([start], device=self.device),
            cu_seqlens=torch.tensor([0, T], device=self.device),
        )
        slots = torch.full_like(positions, slot)
        lengths = torch.full_like(positions, length)
        return self._layers(token_ids, cache, slots, positions, lengths, attend)

    def decode(self, token_ids: Tensor, cache: KVCache, slots: Tensor, positions: Tensor) -> Tensor:
        """Logits after one more token in each row: ids, slots, positions [B] -> [B, V] float32.

        Rows may be of any lengths; a row with a negative position is inactive.
        """

        def attend(q: Tensor, k_cache: Tensor, v_cache: Tensor, **options: object) -> Tensor:
            return self.ops.attention_decode(
                q.unsqueeze(1), k_cache, v_cache, slots=slots, positions=positions, **options
            ).squeeze(1)

        hidden = self._layers(token_ids, cache, slots, positions, positions + 1, attend)
        return self.logits(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """The head: normed hidden states [M, D] -> logits [M, V] in float32."""
        return self.ops.lm_head(hidden, self.weights.lm_head, self.config.final_softcap)

    def _layers(
        self,
        token_ids: Tensor,  # [M]
        cache: KVCache,
        slots: Tensor,  # [M]
        positions: Tensor,  # [M]
        lengths: Tensor,  # [M]: how long each token's sequence is as the token is computed
        attend: Callable[..., Tensor],
    ) -> Tensor:
        ops, config, eps = self.ops, self.config, self.config.rms_norm_eps
        tables = {
            rope: ops.rope_tables(
                positions, rope.inv_freq(lengths), rope.attention_scaling, self.dtype
            )
            for rope in {self.rope_global, self.rope_local}
        }

        residual = ops.embed(token_ids, self.weights.embedding, self.embedding_scale)  # [M, D]
        h = ops.rmsnorm(residual, self.weights.layers[0].input_norm, eps)
        for i, layer in enumerate(self.weights.layers):
            local = config.is_local(i)
            cos, sin = tables[self.rope_local if local else self.rope_global]
            q = ops.rope_and_store_(
                ops.linear(h, layer.qkv, layer.qkv_bias),
                cache.layers[i].k,
                cache.layers[i].v,
                slots,
                positions,
                cos,
                sin,
                layer.q_norm,
                layer.k_norm,
                eps,
            )  # [M, HQ, K]
            attended = attend(
                q,
                cache.layers[i].k,
                cache.layers[i].v,
                scale=config.scale,
                softcap=config.attn_softcap,
                sliding_window=config.sliding_window if local else None,
            )
            branch = ops.linear(attended.flatten(1), layer.o, layer.o_bias)
            h = ops.add_rmsnorm_(
                residual, branch, layer.post_attention_norm, layer.pre_mlp_norm, eps
            )
            branch = ops.linear(ops.linear_geglu(h, layer.gate_up), layer.down)
            h = ops.add_rmsnorm_(residual, branch, layer.post_mlp_norm, self.next_norms[i], eps)
        return h
