"""The prompts of one `generate`: the whole batch, and the columns that are not yet in the cache."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gemcut.engine.config.config_file import as_token_ids
from gemcut.engine.execution.model import Gemma
from gemcut.engine.transformers_api.models.caches import StaticCache
from gemcut.engine.transformers_api.models.forward import Batch
from gemcut.engine.transformers_api.models.generation_config import GenerationConfig
from gemcut.engine.transformers_api.models.inputs import check_is_stored, read_batch


@dataclass
class PromptBatch:
    """A batch of prompts, and the columns of it that must be computed."""

    whole: Batch
    new: Batch  # the columns that are not in the cache
    token_ids: list[list[int]]  # of each row, without padding; zeros where embeddings are given


def read_prompts(
    model: Gemma, cache: StaticCache, ids: Any, mask: Any, embeds: Any, config: GenerationConfig
) -> PromptBatch:
    """The prompts in these arrays; the cache may hold their first columns.

    ValueError says what is wrong with an array, or that it does not fit the cache.
    """
    past = cache.get_seq_length()
    whole = read_batch(model, StaticCache(), ids, mask, None, embeds, may_be_packed=False)
    (B, T) = whole.shape
    if past >= T:
        raise ValueError(
            f"the prompt has {T} columns, of which the cache holds {past}: give all of them, "
            f"and at least one more"
        )
    if whole.mask is None and whole.token_ids is not None:
        whole.mask = _mask_of_padding(whole.token_ids, config)
    if whole.mask is not None:
        if not (rows := whole.mask[:, past:].any(1)).all():
            row = int((~rows).nonzero()[0])
            raise ValueError(f"row {row} of the prompt has no token that is not masked")
        # ranks, as transformers has them in generate
        whole.position_ids = (whole.mask.long().cumsum(-1) - 1).clamp(min=0)
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
    return PromptBatch(whole, new, [_token_ids(whole, row) for row in range(B)])


def _token_ids(batch: Batch, row: int) -> list[int]:
    mask = batch.mask
    if batch.token_ids is None:
        return [0] * (batch.shape[1] if mask is None else int(mask[row].sum()))
    ids = batch.token_ids[row].cpu()
    return (ids if mask is None else ids[mask[row]]).tolist()


def _mask_of_padding(ids: Tensor, config: GenerationConfig) -> Tensor | None:
    """The mask that pad_token_id implies, [B, T] bool on the host; None without padding."""
    pad = config.pad_token_id
    if pad is None or pad in as_token_ids(config.eos_token_id):
        return None
    real = (ids != pad).cpu()
    return None if real.all() else real
