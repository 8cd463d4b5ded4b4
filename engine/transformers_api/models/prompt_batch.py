"""The prompts of one `generate`: the whole batch, and the columns that are not yet in the cache."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gemcut.engine.execution.model import Gemma
from gemcut.engine.transformers_api.models.caches import StaticCache
from gemcut.engine.transformers_api.models.forward import Batch
from gemcut.engine.transformers_api.models.generation_config import GenerationConfig
from gemcut.engine.transformers_api.models.inputs import check_is_stored, read_batch, read_ids


@dataclass
class PromptBatch:
    """A batch of prompts, and the columns of it that must be computed."""

    whole: Batch
    new: Batch  # the columns that are not in the cache
    ids: Tensor  # [B, T] on the device, with padding; [B, 0] where embeddings are given alone
    token_ids: list[list[int]]  # of each row, without padding; zeros where there are no ids
    counts_ranks: bool  # whether positions are the ranks of tokens in their row

    def next_positions(self, count: int) -> Tensor:
        """The positions of the tokens after `count` new ones: int64 [B, 1] on the host."""
        if self.counts_ranks:
            lengths = torch.tensor([[len(ids)] for ids in self.token_ids], device="cpu")
        else:
            lengths = self.whole.position_ids[:, -1:] + 1
        return lengths + count


def read_prompts(
    model: Gemma,
    cache: StaticCache,
    ids: Any,
    mask: Any,
    embeds: Any,
    position_ids: Any,
    config: GenerationConfig,
) -> PromptBatch:
    """The prompts in these arrays; the cache may hold their first columns.

    Embeddings beside ids are what is computed.  Without both, the prompt is bos_token_id alone.
    ValueError says what is wrong with an array, or that it does not fit the cache.
    """
    if ids is None and embeds is None and config.bos_token_id is not None:
        ids = torch.tensor([[config.bos_token_id]], device=model.device)
    past = cache.get_seq_length()
    computed = ids if embeds is None else None
    whole = read_batch(
        model, StaticCache(), computed, mask, position_ids, embeds, may_be_packed=False
    )
    (B, T) = whole.shape
    given = torch.zeros(B, 0, dtype=torch.int64, device=model.device)
    if ids is not None:
        given = read_ids("input_ids", ids, model)
        if given.shape != (B, T):
            raise ValueError(
                f"input_ids is {list(given.shape)}, inputs_embeds {[B, T]} and its width: "
                f"they must agree where both are given"
            )
    if past >= T:
        raise ValueError(
            f"the prompt has {T} columns, of which the cache holds {past}: give all of them, "
            f"and at least one more"
        )
    if whole.mask is None and whole.token_ids is not None:
        whole.mask = _mask_of_padding(whole.token_ids, config)
    if whole.mask is not None and not (rows := whole.mask[:, past:].any(1)).all():
        row = int((~rows).nonzero()[0])
        raise ValueError(f"row {row} of the prompt has no token that is not masked")
    real = whole.mask
    if real is None:
        real = torch.ones(B, T, dtype=torch.bool, device="cpu")
    ranks = (real.long().cumsum(-1) - 1).clamp(min=0)  # as transformers counts in generate
    if position_ids is None:
        whole.position_ids = ranks
    new = Batch(
        None if whole.token_ids is None else whole.token_ids[:, past:],
        None if whole.embeds is None else whole.embeds[:, past:],
        (B, T - past),
        whole.mask,
        whole.position_ids[:, past:],
        None,
    )
    if past and whole.mask is not None:
        check_is_stored(whole.mask, cache)
    elif cache.has_holes:
        raise ValueError("the cache was filled with padding: give attention_mask here too")
    on_host = given.cpu()
    return PromptBatch(
        whole,
        new,
        given,
        [
            on_host[row, real[row]].tolist() if len(on_host[row]) else [0] * int(real[row].sum())
            for row in range(B)
        ],
        counts_ranks=torch.equal(whole.position_ids[real], ranks[real]),
    )


def _mask_of_padding(ids: Tensor, config: GenerationConfig) -> Tensor | None:
    """The mask that pad_token_id implies, [B, T] bool on the host; None without padding."""
    pad = config.pad_token_id
    if pad is None or pad in config.eos_token_id:
        return None
    real = (ids != pad).cpu()
    return None if real.all() else real
