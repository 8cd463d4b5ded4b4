"""`generate`: checks its arguments; continuation.py makes the steps."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemcut.engine.checks import shorten
from gemcut.engine.requests.sampling_params import LogitsProcessor
from gemcut.engine.transformers_api.models.arrays import convert, converter_to_kind_of
from gemcut.engine.transformers_api.models.caches import StaticCache, one_cache
from gemcut.engine.transformers_api.models.continuation import Continuation
from gemcut.engine.transformers_api.models.generation_config import GenerationConfig
from gemcut.engine.transformers_api.models.outputs import GenerateDecoderOnlyOutput
from gemcut.engine.transformers_api.models.pretrained import PreTrainedModel, on_its_device
from gemcut.engine.transformers_api.models.prompt_batch import read_prompts
from gemcut.tokenizer import Tokenizer

SPARE_CACHES = 8  # kept for later calls: as many calls at once take no new memory


class GenerativeModel(PreTrainedModel):
    """A model with a head, and its `generate`."""

    generation_config: GenerationConfig

    def __init__(self, config: Any, **options: Any) -> None:
        super().__init__(config, **options)
        self.generation_config = GenerationConfig.of_model(config, None)

    def _read_more(self, folder: Path) -> None:
        self.generation_config = GenerationConfig.of_model(self.config, folder)

    def can_generate(self) -> bool:
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
        logits_processor: Sequence[Callable[[Tensor, Tensor], Tensor]] | None = None,
        stopping_criteria: Sequence[Callable[..., Any]] | None = None,
        streamer: Any = None,
        *,
        input_ids: Any = None,
        attention_mask: Any = None,
        inputs_embeds: Any = None,
        past_key_values: StaticCache | None = None,
        cache: StaticCache | None = None,
        tokenizer: Any = None,
        **settings: Any,
    ) -> Any:
        """Prompts and their continuations: ids [B, T] -> ids [B * num_return_sequences, T + new].

        A row ends with its EOS and is filled up with pad_token_id.  attention_mask [B, T] hides
        padding, on whichever side; without one, pad_token_id does where it is no EOS.  `settings`
        are GenerationConfig's, and come before those of the model.  inputs_embeds [B, T, D] in
        place of ids: only the new ids come back.  past_key_values, or cache: what holds the first
        columns; afterwards it holds all but the newest token.  logits_processor: functions of
        (ids [1, n], logits [1, V]), without padding; stopping_criteria: of (ids [B, n], None),
        true where a row, or all, should end.  streamer: an object with put(ids) and end().
        tokenizer: only needed for stop_strings.  Sampling draws its seeds from torch's generator.
        With return_dict_in_generate the result is an object: sequences, logits, past_key_values.
        Memory that a call takes is kept for the next, until the model moves.
        """
        if inputs is not None:
            if input_ids is not None:
                raise ValueError("give the prompt's ids once: by position, or as input_ids")
            input_ids = inputs
        own = self.generation_config
        if generation_config is not None:
            own = generation_config.with_ids_of(own)
        config = own.updated(settings)
        config.check_token_ids(self.config.vocab_size)
        given = one_cache(past_key_values, cache)
        with self._cache_for(given) as held:
            continuation = Continuation(
                model=self._gemma,
                config=config,
                prompt=read_prompts(
                    self._gemma, held, input_ids, attention_mask, inputs_embeds, config
                ),
                cache=held,
                processors=[_for_one_row(p) for p in logits_processor or ()],
                criteria=list(stopping_criteria or ()),
                streamer=streamer,
                tokenizer=_codec_of(tokenizer, config),
            )
            ids = continuation.run()
        kind = converter_to_kind_of(inputs_embeds if input_ids is None else input_ids)
        sequences = kind(ids)
        if not config.return_dict_in_generate:
            return sequences
        return GenerateDecoderOnlyOutput(
            sequences=sequences,
            logits=convert(continuation.logits(), kind) if config.output_logits else None,
            past_key_values=given,
        )

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


def _for_one_row(processor: Callable[[Tensor, Tensor], Tensor]) -> LogitsProcessor:
    """A processor of transformers' signature, for the ids and logits of one row."""

    def process(ids: list[int], logits: Tensor) -> Tensor:
        return processor(torch.tensor([ids], device=logits.device), logits.unsqueeze(0)).squeeze(0)

    return process


def _codec_of(tokenizer: Any, config: GenerationConfig) -> Tokenizer | None:
    """The Tokenizer that finds stop strings; ValueError where one is needed and missing."""
    if not config.stop_strings:
        return None
    codec = getattr(tokenizer, "codec", tokenizer)
    if not isinstance(codec, Tokenizer):
        raise ValueError(
            f"stop_strings need tokenizer=, a GemmaTokenizer of a tokenizer.model; "
            f"{shorten(tokenizer)} is none"
        )
    return codec
