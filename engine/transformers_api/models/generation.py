"""`generate`: checks its arguments; continuation.py makes the steps."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemcut.engine.checks import check_int
from gemcut.engine.transformers_api.models.arrays import convert, converter_to_kind_of
from gemcut.engine.transformers_api.models.caches import StaticCache, one_cache
from gemcut.engine.transformers_api.models.continuation import Continuation
from gemcut.engine.transformers_api.models.generation_config import GenerationConfig
from gemcut.engine.transformers_api.models.generation_settings import new_tokens, settle
from gemcut.engine.transformers_api.models.logits_processors import (
    Processor,
    Shape,
    as_list,
    make_processors,
    runs_on_device,
)
from gemcut.engine.transformers_api.models.outputs import GenerateDecoderOnlyOutput
from gemcut.engine.transformers_api.models.pretrained import PreTrainedModel, on_its_device
from gemcut.engine.transformers_api.models.prompt_batch import PromptBatch, read_prompts
from gemcut.engine.transformers_api.models.setting_checks import check_token_ids
from gemcut.engine.transformers_api.models.stop_strings import StopStringCriteria

SPARE_CACHES = 8  # kept for later calls: as many calls at once take no new memory


class GenerativeModel(PreTrainedModel):
    """A model with a head, and its `generate`."""

    generation_config: GenerationConfig

    def __init__(self, config: Any, **options: Any) -> None:
        super().__init__(config, **options)
        self.generation_config = GenerationConfig.of_model(config, None)

    def _read_more(self, folder: Path) -> None:
        self.generation_config = GenerationConfig.of_model(self.config, folder)

    @classmethod
    def can_generate(cls) -> bool:
        return True

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """Write config.json, generation_config.json and the weights to a folder."""
        super().save_pretrained(save_directory, **options)
        self.generation_config.save_pretrained(save_directory)

    @on_its_device
    def generate(
        self,
        inputs: Any = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: Sequence[Processor] | None = None,
        stopping_criteria: Sequence[Callable[..., Any]] | None = None,
        prefix_allowed_tokens_fn: Callable[[int, Tensor], Any] | None = None,
        *,
        streamer: Any = None,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        inputs_embeds: Any = None,
        past_key_values: StaticCache | None = None,
        cache: StaticCache | None = None,
        tokenizer: Any = None,
        logits_to_keep: int | None = None,
        **settings: Any,
    ) -> Any:
        """Prompts and their continuations: ids [B, T] -> ids [B * num_return_sequences, T + new].

        A row ends with its EOS and is filled up with pad_token_id.  attention_mask [B, T] hides
        padding, on whichever side; without one, pad_token_id does where it is no EOS.  `settings`
        are GenerationConfig's, and come before those of `generation_config`, which come before the
        model's own.  inputs_embeds [B, T, D] in place of ids: only the new ids come back.
        past_key_values, or `cache`: the cache that holds the first columns; afterwards it holds all
        but the newest token.  logits_processor: functions of (ids [B, n], scores [B, V]), padding
        included; stopping_criteria: of (ids [B, n], scores of each step or None), true where a row,
        or all, should end; prefix_allowed_tokens_fn: of (the prompt's number, ids [n]), the ids
        that may follow.  streamer: an object with put(ids) and end().  tokenizer: only needed for
        stop_strings.  Sampling draws its seeds from torch's generator.  logits_to_keep is accepted:
        a step never has more logits than one a row.  With return_dict_in_generate the result is an
        object: sequences and what is asked for of scores, logits, attentions, hidden_states, and
        past_key_values.  Memory that a call takes is kept for the next, until the model moves.
        """
        config = settle(
            settings,
            None if generation_config is None else GenerationConfig.like(generation_config),
            GenerationConfig.like(self.generation_config),
        )
        check_token_ids(config, self.config.vocab_size)
        criteria = [
            *_own_criteria(config, tokenizer),
            *as_list("stopping_criteria", stopping_criteria),
        ]
        if inputs is not None:
            if input_ids is not None:
                raise ValueError("give the prompt's ids once: by position, or as input_ids")
            input_ids = inputs
        if logits_to_keep is not None:
            check_int("logits_to_keep", logits_to_keep, 0, 2**31 - 1)
        given = one_cache(past_key_values, cache)
        returns_cache = config.return_dict_in_generate and config.use_cache
        if given is None and returns_cache:  # what the caller gets is the caller's own
            given = StaticCache(self.config)
        custom = as_list("logits_processor", logits_processor)
        with self._cache_for(given) as used:
            prompt = read_prompts(
                self._gemma, used, input_ids, attention_mask, inputs_embeds, position_ids, config
            )
            shape = _shape_of(prompt, config, self._gemma.config.context_length)
            processors = None
            if custom or prefix_allowed_tokens_fn is not None or not runs_on_device(config, shape):
                processors = make_processors(config, shape, custom, prefix_allowed_tokens_fn)
            continuation = Continuation(
                model=self._gemma,
                config=config,
                prompt=prompt,
                shape=shape,
                cache=used,
                processors=processors,
                criteria=criteria,
                streamer=streamer,
            )
            ids = continuation.run()
        kind = converter_to_kind_of(inputs_embeds if input_ids is None else input_ids)
        sequences = kind(ids)
        if not config.return_dict_in_generate:
            return sequences
        outputs = continuation.outputs.as_tuples()
        return GenerateDecoderOnlyOutput(
            sequences=sequences,
            **{name: convert(value, kind) for name, value in outputs.items()},
            past_key_values=given if returns_cache else None,
        )

    def compute_transition_scores(
        self,
        sequences: Tensor,
        scores: Sequence[Tensor],
        beam_indices: None = None,
        normalize_logits: bool = False,
    ) -> Tensor:
        """The score of each new token: sequences [B, T + n], n scores [B, V] -> [B, n].

        normalize_logits: log-probabilities in place of scores.
        """
        if beam_indices is not None:
            raise NotImplementedError("beam_indices is not supported; leave it out")
        stacked = torch.stack(tuple(scores), dim=1)  # [B, n, V]
        if normalize_logits:
            stacked = stacked.log_softmax(-1)
        new = sequences[:, sequences.shape[1] - stacked.shape[1] :]
        return stacked.gather(2, new.unsqueeze(-1)).squeeze(-1)

    @contextmanager
    def _cache_for(self, given: StaticCache | None) -> Iterator[StaticCache]:
        """The given cache, or a spare one of the model's own, for one call alone.

        A spare cache outlives the call: its memory, and the graphs that were captured over it.
        """
        if given is not None:
            with given.in_use():
                yield given
            return
        spares = self._spare_caches
        try:
            cache = spares.pop()
        except IndexError:
            cache = StaticCache(self.config)
        cache.reset()
        try:
            yield cache
        finally:
            spares.append(cache)

    def _set_up(self, *args: Any, **kwargs: Any) -> None:
        super()._set_up(*args, **kwargs)
        # those of another device or dtype go
        self._spare_caches: deque[StaticCache] = deque(maxlen=SPARE_CACHES)


def _own_criteria(config: GenerationConfig, tokenizer: Any) -> list[Callable[..., Any]]:
    """The stopping criteria that settings ask for."""
    criteria: list[Callable[..., Any]] = []
    if config.max_time is not None:
        end = time.monotonic() + config.max_time
        criteria.append(lambda ids, scores: time.monotonic() > end)
    if config.stop_strings:
        criteria.append(StopStringCriteria(tokenizer, config.stop_strings))
    return criteria


def _shape_of(prompt: PromptBatch, config: GenerationConfig, most: int) -> Shape:
    """What steps and processors must know of the prompts; `most`: the model's positions."""
    columns, times = prompt.whole.shape[1], config.num_return_sequences
    mask = prompt.whole.mask
    if config.prompt_lookup_num_tokens and (rows := len(prompt.token_ids) * times) > 1:
        raise ValueError(f"prompt_lookup_num_tokens is for one row, not for {rows}")
    return Shape(
        columns=columns,
        id_columns=prompt.ids.shape[1],
        new_tokens=new_tokens(config, columns, most),
        times=times,
        mask=None if mask is None else mask.repeat_interleave(times, dim=0),
    )
