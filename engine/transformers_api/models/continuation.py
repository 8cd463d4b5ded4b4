"""The steps of one `generate`: from prompts in the cache to the last token of each row.

The steps are those of an Engine, CUDA graphs on a GPU: runner.py starts them, pending_tokens.py
hands out their tokens, and TokenSequence says when a row ends.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gemcut.engine.config.config_file import as_token_ids
from gemcut.engine.execution.graphed_steps import choose_steps
from gemcut.engine.execution.model import Gemma
from gemcut.engine.execution.pending_tokens import PendingTokens, TokenCollector
from gemcut.engine.execution.runner import Runner
from gemcut.engine.execution.slot_state import SlotState, upload
from gemcut.engine.requests.sampling_params import INT64_MAX, LogitsProcessor, SamplingParams
from gemcut.engine.requests.sequence import TokenSequence
from gemcut.engine.transformers_api.models.caches import LateTokens, StaticCache
from gemcut.engine.transformers_api.models.forward import Batch, forward, rows_are_plain
from gemcut.engine.transformers_api.models.generation_config import GenerationConfig
from gemcut.engine.transformers_api.models.prompt_batch import PromptBatch
from gemcut.tokenizer import Tokenizer

Start = Callable[[list[TokenSequence]], PendingTokens]


class Continuation:
    """One call of `generate` with its checked settings, and its sequences."""

    def __init__(
        self,
        *,
        model: Gemma,
        config: GenerationConfig,
        prompt: PromptBatch,
        cache: StaticCache,
        processors: list[LogitsProcessor],
        criteria: list[Callable[..., Any]],
        streamer: Any,
        tokenizer: Tokenizer | None,
    ) -> None:
        self._model, self._config, self._prompt, self._cache = model, config, prompt, cache
        self._criteria, self._streamer = criteria, streamer
        columns = prompt.whole.shape[1]
        self._new_tokens = config.new_tokens(columns, model.config.context_length)
        self._times = config.num_return_sequences
        self._seen_logits: list[list[Tensor]] = []
        eos_ids = frozenset(as_token_ids(config.eos_token_id))
        pad = config.pad_token_id
        self._pad_id = min(eos_ids, default=0) if pad is None else pad
        rows = [row for row in range(prompt.whole.shape[0]) for _ in range(self._times)]
        seeds = [0] * len(rows)
        if config.do_sample:  # of torch's generator: its seed decides, as in transformers
            seeds = torch.randint(INT64_MAX, (len(rows),), device="cpu").tolist()
        self._sequences = []
        for slot, (row, seed) in enumerate(zip(rows, seeds, strict=True)):
            ids = list(prompt.token_ids[row])
            sequence = TokenSequence(
                ids,
                self._params(columns, ids, processors),
                tokenizer,
                eos_ids,
                max_seq_len=len(ids) + self._new_tokens,
                seed=seed,
                slot=slot,
                prefilled=len(ids),
            )
            sequence.params.check_token_ids(model.config.vocab_size)
            self._sequences.append(sequence)

    def _params(
        self, columns: int, prompt_ids: list[int], processors: list[LogitsProcessor]
    ) -> SamplingParams:
        config, seen = self._config, []
        if config.output_logits:
            self._seen_logits.append(seen)

            def see(output_ids: list[int], logits: Tensor) -> Tensor:
                seen.append(logits.clone())
                return logits

            processors = [see, *processors]
        fewest = config.min_new_tokens
        if fewest is None:
            fewest = max(0, config.min_length - columns)
        drawn = {}
        if config.do_sample:
            drawn = {"top_k": config.top_k or 0, "min_p": config.min_p or 0.0}
            drawn["top_p"] = 1.0 if config.top_p is None else config.top_p
        with_prompt = [_with_prompt(prompt_ids, processor) for processor in processors]
        return SamplingParams(
            temperature=config.temperature if config.do_sample else 0.0,
            **drawn,
            max_tokens=self._new_tokens,
            min_tokens=min(fewest, self._new_tokens),
            stop=config.stop_strings,
            repetition_penalty=config.repetition_penalty,
            logits_processors=with_prompt or None,
        )

    def run(self) -> Tensor:
        """The ids of prompts and continuations: [B * times, T + new] on the model's device."""
        states, cache = self._prefill()
        whole, cache_columns = self._prompt.whole, cache.get_seq_length()
        held = [cache.columns_of(row) for row in range(len(self._sequences))]
        mask = None if whole.mask is None else whole.mask.repeat_interleave(self._times, dim=0)
        window, end = self._model.config.sliding_window, cache_columns + self._new_tokens
        runner = self._runner(cache)
        if self._streamer is not None and whole.token_ids is not None:
            self._streamer.put(self._result(0).cpu())
        first = runner.start_first_token(self._sequences, states)
        if rows_are_plain(mask, held, end, window):
            # a GPU computes the next step while the host reads the last
            reads_at_once = self._criteria or any(s.needs_logits for s in self._sequences)
            depth = 0 if reads_at_once else runner.depth
            self._run_steps(first, lambda rows: runner.start_decode(rows, None), depth)
            self._note_decoded(cache)
        else:
            self._run_steps(first, self._masked_steps(runner, mask, cache), depth=0)
        self._note_late(cache)
        if self._streamer is not None:
            self._streamer.end()
        return self._result(max(len(s.output_ids) for s in self._sequences))

    def logits(self) -> tuple[Tensor, ...]:
        """The logits of each new token, [B * times, V]; those of rows that have ended are zero."""
        steps = max(map(len, self._seen_logits))
        blank = torch.zeros_like(self._seen_logits[0][0])
        return tuple(
            torch.stack([of_row[i] if i < len(of_row) else blank for of_row in self._seen_logits])
            for i in range(steps)
        )

    def _prefill(self) -> tuple[Tensor, StaticCache]:
        """The state of each row's last token [B * times, D], and the cache of all of them."""
        cache, new, model = self._cache, self._prompt.new, self._model
        rows, end = len(self._sequences), self._prompt.whole.shape[1] + self._new_tokens
        place = model.config, rows, end, model.device, model.dtype
        if self._times == 1:
            cache.prepare(*place)
            states = forward(model, new, cache)
        elif cache.get_seq_length():
            raise ValueError("num_return_sequences needs an empty cache: leave past_key_values out")
        else:  # each prompt is computed once
            once = StaticCache(cache.config)
            states = forward(model, new, once)
            cache.prepare(*place)
            cache.take(once, self._times)
        last = states.last[:, -1]
        if new.mask is not None:
            columns = torch.arange(new.shape[1], device="cpu") * new.mask[:, -new.shape[1] :]
            where = columns.argmax(1).to(model.device)
            last = states.last[torch.arange(len(where), device=model.device), where]
        return last.repeat_interleave(self._times, dim=0), cache

    def _runner(self, cache: StaticCache) -> Runner:
        """The runner of steps over this cache; later calls use its graphs too."""
        if cache.runner is None or cache.runner.model is not self._model:
            assert cache.kv is not None
            state = SlotState(cache.kv.num_slots, self._model.config.vocab_size, self._model.device)
            cache.runner = Runner(choose_steps(self._model, cache.kv, state), tokenizer=None)
        return cache.runner

    def _run_steps(self, first: PendingTokens, start: Start, depth: int) -> None:
        """Start step after step until no row wants a token; up to `depth` may stay unread."""
        collector = TokenCollector()
        collector.add(first)
        collector.collect(depth, self._take)
        while wanting := [s for s in self._sequences if s.wants_token]:
            collector.add(start(wanting))
            collector.collect(depth, self._take)
        collector.collect(0, self._take)

    def _masked_steps(self, runner: Runner, mask: Tensor | None, cache: StaticCache) -> Start:
        """A function that starts a step by `forward`: decode kernels would ignore the mask."""
        model, rows = self._model, len(self._sequences)

        def start(wanting: list[TokenSequence]) -> PendingTokens:
            nonlocal mask
            newest = upload([[s.output_ids[-1]] for s in self._sequences], model.device)
            goes_on = _on_host([[s.wants_token] for s in self._sequences]).bool()
            past = cache.get_seq_length()
            before = mask
            if before is None:
                before = torch.ones(rows, past, dtype=torch.bool, device="cpu")
            mask = torch.cat([before, goes_on], dim=1)
            positions = _on_host([[s.length - 1] for s in self._sequences])
            batch = Batch(newest, None, (rows, 1), mask, positions, None)
            states = forward(model, batch, cache).last[:, 0]
            slots = torch.tensor([s.slot for s in wanting], device=model.device)
            return runner.start_first_token(wanting, states.index_select(0, slots))

        return start

    def _take(self, pending: PendingTokens) -> None:
        """Hand out the tokens of a step, show them to the streamer, and ask the criteria."""
        before = max(len(s.output_ids) for s in self._sequences)
        pending.hand_out()
        for sequence in pending.sequences:
            if sequence.error is not None:
                raise sequence.error
        count = max(len(s.output_ids) for s in self._sequences)
        if count == before:
            return  # a step started ahead, when all rows had ended
        if self._streamer is not None:
            self._streamer.put(self._result(count)[:, -1].cpu())
        for criterion in self._criteria:
            ends = torch.as_tensor(criterion(self._result(count), None)).cpu()
            for sequence, ends_here in zip(
                self._sequences, ends.expand(len(self._sequences)), strict=True
            ):
                if ends_here and not sequence.finished:
                    sequence.finish_reason = "stop"

    def _note_decoded(self, cache: StaticCache) -> None:
        """Tell the cache which tokens the steps have left in it: all but each row's newest."""
        counts = [len(s.output_ids) - 1 for s in self._sequences]
        cache.extend(max(counts), [torch.arange(count, device="cpu") for count in counts])

    def _note_late(self, cache: StaticCache) -> None:
        """Tell the cache what no step has computed: the ends of rows that end before others."""
        end = max(len(s.output_ids) for s in self._sequences) - 1
        late = []
        for s in self._sequences:
            ids = (s.output_ids + [self._pad_id] * end)[len(s.output_ids) - 1 : end]
            first = s.length - 1  # the position of its newest token
            late.append(LateTokens(_on_host(ids), _on_host(range(first, first + len(ids)))))
        cache.leave_late(late)

    def _result(self, count: int) -> Tensor:
        """The prompts, where they are ids, and `count` new ones: [B * times, T + count]."""
        rows = [s.output_ids[:count] for s in self._sequences]
        padded = [row + [self._pad_id] * (count - len(row)) for row in rows]
        new = torch.tensor(padded, dtype=torch.int64, device=self._model.device)
        prompt_ids = self._prompt.whole.token_ids
        if prompt_ids is None:
            return new
        return torch.cat([prompt_ids.repeat_interleave(self._times, dim=0), new], dim=1)


def _with_prompt(prompt_ids: list[int], processor: LogitsProcessor) -> LogitsProcessor:
    """A processor that sees the prompt too."""
    return lambda output_ids, logits: processor(prompt_ids + output_ids, logits)


def _on_host(numbers: Sequence[Any]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device="cpu")  # whatever torch's default is
