"""The steps of one `generate`: from prompts in the cache to the last token of each row.

The steps are those of an Engine, CUDA graphs on a GPU: runner.py starts them, pending_tokens.py
hands out their tokens, and TokenSequence says when a row ends.  Where the sampler of slots has all
the settings it chooses alone; otherwise the processors make the scores of a whole batch first.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gemcut.engine.execution.graphed_steps import choose_steps
from gemcut.engine.execution.model import Gemma
from gemcut.engine.execution.pending_tokens import PendingTokens, TokenCollector
from gemcut.engine.execution.runner import Runner
from gemcut.engine.execution.slot_state import SlotState
from gemcut.engine.requests.sampling_params import INT64_MAX, MAX_DRAFT, SamplingParams
from gemcut.engine.requests.sequence import TokenSequence
from gemcut.engine.transformers_api.models.caches import LateTokens, StaticCache
from gemcut.engine.transformers_api.models.forward import Batch, States, forward, rows_are_plain
from gemcut.engine.transformers_api.models.generation_config import GenerationConfig
from gemcut.engine.transformers_api.models.generation_settings import fewest_tokens
from gemcut.engine.transformers_api.models.logits_processors import Processor, Shape
from gemcut.engine.transformers_api.models.prompt_batch import PromptBatch
from gemcut.engine.transformers_api.models.step_outputs import StepOutputs

Start = Callable[[list[TokenSequence]], PendingTokens]
Criterion = Callable[..., Any]
ROOM = 1024  # new tokens for which memory is taken at first; a cache without a given length grows


class Continuation:
    """One call of `generate` with its checked settings, and its sequences."""

    def __init__(
        self,
        *,
        model: Gemma,
        config: GenerationConfig,
        prompt: PromptBatch,
        shape: Shape,
        cache: StaticCache,
        processors: list[Processor] | None,
        criteria: list[Criterion],
        streamer: Any,
    ) -> None:
        """processors: None lets the sampler of slots choose, by its own settings."""
        self._model, self._config, self._prompt, self._shape = model, config, prompt, shape
        self._cache, self._processors, self._criteria = cache, processors, criteria
        self._streamer = streamer
        self.outputs = StepOutputs(config, model.config)
        ends = frozenset(token_id for token_id in config.eos_token_id if token_id >= 0)
        # without an end, transformers lets rows that a criterion has ended go on beside the others
        self._waits_for_all = not ends and not any(hasattr(c, "eos_token_id") for c in criteria)
        self._ended: Tensor | None = None  # rows that a criterion has ended [B]
        first_end = next((token_id for token_id in config.eos_token_id if token_id >= 0), 0)
        self._pad_id = first_end if config.pad_token_id is None else config.pad_token_id
        rows = [row for row in range(len(prompt.token_ids)) for _ in range(shape.times)]
        seeds = [0] * len(rows)
        if config.do_sample:  # of torch's generator: its seed decides, as in transformers
            seeds = torch.randint(INT64_MAX, (len(rows),), device="cpu").tolist()
        params = self._params()
        self._sequences = []
        for slot, (row, seed) in enumerate(zip(rows, seeds, strict=True)):
            ids = list(prompt.token_ids[row])
            sequence = TokenSequence(
                ids,
                params,
                None,
                ends,
                max_seq_len=len(ids) + shape.new_tokens,
                seed=seed,
                slot=slot,
                prefilled=len(ids),
            )
            self._sequences.append(sequence)

    def _params(self) -> SamplingParams:
        """What the sampler of slots does: all of it, or the choice from finished scores."""
        config, most = self._config, self._shape.new_tokens
        drawn: dict[str, Any] = {"temperature": 1.0 if config.do_sample else 0.0}
        if self._processors is not None:
            return SamplingParams(**drawn, max_tokens=most)
        if config.do_sample:
            drawn |= {"temperature": config.temperature, "top_k": config.top_k}
            drawn |= {"top_p": config.top_p, "min_p": config.min_p or 0.0}
        drafts = config.prompt_lookup_num_tokens or 0
        if config.repetition_penalty != 1:  # each token must be known before the next
            drafts = 0
        return SamplingParams(
            **drawn,
            max_tokens=most,
            min_tokens=min(fewest_tokens(config, self._shape.columns), most),
            repetition_penalty=config.repetition_penalty,
            prompt_lookup_num_tokens=min(drafts, MAX_DRAFT),
        )

    def run(self) -> Tensor:
        """The ids of prompts and continuations: [B * times, T + new] on the model's device."""
        states, cache = self._prefill()
        cache_columns = cache.get_seq_length()
        held = [cache.columns_of(row) for row in range(len(self._sequences))]
        mask, end = self._shape.mask, cache_columns + self._shape.new_tokens
        if self._streamer is not None:
            self._streamer.put(self._result(0).cpu())
        runner = self._runner(cache)
        first = runner.start_first_token(self._sequences, states, self._choice())
        is_plain = rows_are_plain(mask, held, end, self._model.config.sliding_window)
        if is_plain and self._prompt.counts_ranks and not self.outputs.wants_states:
            # a GPU computes the next step while the host reads the last
            reads_at_once = self._criteria or self._processors is not None or self._has_drafts
            self._run_steps(first, self._start_decode, 0 if reads_at_once else runner.depth)
            self._note_decoded(cache)
        elif self.outputs.wants_states and not self._config.use_cache:
            self._run_steps(first, self._recomputed_steps(runner, mask), depth=0)
        else:
            self._run_steps(first, self._masked_steps(runner, mask, cache), depth=0)
        self._note_late(cache)
        if self._streamer is not None:
            self._streamer.end()
        return self._result(max(len(s.output_ids) for s in self._sequences))

    @property
    def _has_drafts(self) -> bool:
        return self._sequences[0].params.prompt_lookup_num_tokens > 0

    def _prefill(self) -> tuple[Tensor, StaticCache]:
        """The state of each row's last token [B * times, D], and the cache of all of them."""
        cache, new, times = self._cache, self._prompt.new, self._shape.times
        if times == 1:
            self._reserve(cache, ROOM)
            states = self._forward(new, cache)
        elif cache.get_seq_length():
            raise ValueError("num_return_sequences needs an empty cache: leave past_key_values out")
        else:  # each prompt is computed once
            once = StaticCache(cache.config)
            states = self._forward(new, once)
            self._reserve(cache, ROOM)
            cache.take(once, times)
        self.outputs.add_states(states, times)
        last = states.last[:, -1]
        if new.mask is not None:
            columns = torch.arange(new.shape[1], device="cpu") * new.mask[:, -new.shape[1] :]
            where = columns.argmax(1).to(self._model.device)
            last = states.last[torch.arange(len(where), device=self._model.device), where]
        return last.repeat_interleave(times, dim=0), cache

    def _forward(self, batch: Batch, cache: StaticCache) -> States:
        return forward(
            self._model,
            batch,
            cache,
            output_hidden_states=self.outputs.wants_hidden_states,
            output_attentions=self.outputs.wants_attentions,
        )

    def _reserve(self, cache: StaticCache, more: int) -> None:
        """Memory for the prompts and `more` new tokens, or as many as may follow."""
        if cache.max_cache_len is not None:
            more = self._shape.new_tokens  # all of it now, or an error before any step
        columns = self._shape.columns + min(more, self._shape.new_tokens)
        model = self._model
        cache.prepare(model.config, len(self._sequences), columns, model.device, model.dtype)

    def _runner(self, cache: StaticCache) -> Runner:
        """The runner of steps over this cache; later calls use its graphs too."""
        if cache.runner is None or cache.runner.model is not self._model:
            assert cache.kv is not None
            state = SlotState(cache.kv.num_slots, self._model.config.vocab_size, self._model.device)
            cache.runner = Runner(choose_steps(self._model, cache.kv, state), tokenizer=None)
        return cache.runner

    def _choice(self) -> Callable[[list[TokenSequence], Tensor], Tensor] | None:
        return None if self._processors is None else self._scores

    def _scores(self, sequences: list[TokenSequence], logits: Tensor) -> Tensor:
        """What the processors make of the logits [b, V] of some rows; all rows are shown to them.

        Rows that have ended are not computed: their logits are zero.
        """
        slots = torch.tensor([s.slot for s in sequences], device=logits.device)
        whole = logits.new_zeros(len(self._sequences), logits.shape[1])
        whole = whole.index_copy_(0, slots, logits)
        ids, scores = self._result(self._count), whole.clone()
        for processor in self._processors or ():
            scores = processor(ids, scores)
            if not isinstance(scores, Tensor) or scores.shape != whole.shape:
                raise ValueError(
                    f"a logits processor must return a tensor of shape {tuple(whole.shape)}, not "
                    f"{getattr(scores, 'shape', scores)!r}"
                )
        self.outputs.add_scores(whole, scores)
        # a rule may force a token by an infinite score; the sampler chooses finite ones
        return scores.index_select(0, slots).clamp(max=torch.finfo(scores.dtype).max)

    @property
    def _count(self) -> int:
        """Tokens that the longest row has got."""
        return max(len(s.output_ids) for s in self._sequences)

    def _run_steps(self, first: PendingTokens, start: Start, depth: int) -> None:
        """Start step after step until no row wants a token; up to `depth` may stay unread."""
        collector = TokenCollector()
        collector.add(first)
        collector.collect(depth, self._take)
        while wanting := [s for s in self._sequences if s.wants_token]:
            if not self._has_room(wanting):
                collector.collect(0, self._take)
                self._grow()
                continue
            collector.add(start(wanting))
            collector.collect(depth, self._take)
        collector.collect(0, self._take)

    def _start_decode(self, wanting: list[TokenSequence]) -> PendingTokens:
        runner, drafts = self._runner(self._cache), None
        if self._has_drafts:
            most = runner.steps.draft_width(len(wanting)) - 1
            found = [sequence.draft(most) for sequence in wanting]
            drafts = found if any(found) else None
        return runner.start_decode(wanting, drafts, self._choice())

    def _has_room(self, wanting: list[TokenSequence]) -> bool:
        """Whether the cache holds what the next step adds."""
        kv = self._cache.kv
        assert kv is not None
        more = 1 + MAX_DRAFT if self._has_drafts else 1
        ends = [min(s.length + s.in_flight - 1 + more, self._end_of(s)) for s in wanting]
        return max(ends) <= kv.max_seq_len

    def _end_of(self, sequence: TokenSequence) -> int:
        return len(sequence.prompt_ids) + sequence.max_tokens

    def _grow(self) -> None:
        """Twice the room for new tokens; the rows go on in new memory."""
        cache, kv = self._cache, self._cache.kv
        assert kv is not None
        self._reserve(cache, 2 * kv.max_seq_len)
        runner = self._runner(cache)
        for sequence in self._sequences:
            if not sequence.finished:
                runner.rewind(sequence)

    def _masked_steps(self, runner: Runner, mask: Tensor | None, cache: StaticCache) -> Start:
        """A function that starts a step by `forward`: decode kernels would ignore the mask."""
        rows = len(self._sequences)

        def start(wanting: list[TokenSequence]) -> PendingTokens:
            nonlocal mask
            if mask is None:
                mask = torch.ones(rows, cache.get_seq_length(), dtype=torch.bool, device="cpu")
            mask = torch.cat([mask, self._goes_on()], dim=1)
            newest = self._result(self._count)[:, -1:]
            batch = Batch(newest, None, (rows, 1), mask, self._newest_positions(), None)
            return self._start_from(self._forward(batch, cache), wanting, runner)

        return start

    def _recomputed_steps(self, runner: Runner, mask: Tensor | None) -> Start:
        """A function that starts a step with all columns, whose states are wanted each time."""
        positions = self._prompt.whole.position_ids.repeat_interleave(self._shape.times, dim=0)
        mask = torch.ones_like(positions, dtype=torch.bool) if mask is None else mask

        def start(wanting: list[TokenSequence]) -> PendingTokens:
            nonlocal mask, positions
            assert mask is not None
            mask = torch.cat([mask, self._goes_on()], dim=1)
            positions = torch.cat([positions, self._newest_positions()], dim=1)
            ids = self._result(self._count)
            batch = Batch(ids, None, (ids.shape[0], ids.shape[1]), mask, positions, None)
            return self._start_from(self._forward(batch, StaticCache()), wanting, runner)

        return start

    def _start_from(
        self, states: States, wanting: list[TokenSequence], runner: Runner
    ) -> PendingTokens:
        """Choose the next token of some rows from states of all of them."""
        self.outputs.add_states(states, 1)
        slots = torch.tensor([s.slot for s in wanting], device=self._model.device)
        last = states.last[:, -1].index_select(0, slots)
        return runner.start_first_token(wanting, last, self._choice())

    def _goes_on(self) -> Tensor:
        """Which rows have a newest token that is no padding: bool [B, 1]."""
        return _on_host([[s.wants_token] for s in self._sequences]).bool()

    def _newest_positions(self) -> Tensor:
        positions = self._prompt.next_positions(self._count - 1)
        return positions.repeat_interleave(self._shape.times, dim=0)

    def _take(self, pending: PendingTokens) -> None:
        """Hand out the tokens of a step, show them to the streamer, and ask the criteria."""
        before = self._count
        pending.hand_out()
        for sequence in pending.sequences:
            if sequence.error is not None:
                raise sequence.error
        count = self._count
        if count == before:
            return  # a step started ahead, when all rows had ended
        for shown in range(before + 1, count + 1):  # a draft gives one row several tokens
            if self._streamer is not None:
                self._streamer.put(self._result(shown)[:, -1].cpu())
            self._ask_criteria(shown)
            if shown == self._count:
                break

    def _ask_criteria(self, count: int) -> None:
        """End the rows of which a criterion says so, `count` tokens after the prompts."""
        if not self._criteria:
            return
        ids, rows = self._result(count), len(self._sequences)
        ended = torch.zeros(rows, dtype=torch.bool, device="cpu")
        for criterion in self._criteria:
            said = criterion(ids, self.outputs.scores_so_far)
            said = torch.as_tensor(said, dtype=torch.bool, device="cpu")
            ended |= said.reshape(-1).expand(rows)
        if self._waits_for_all and self._ended is not None:
            ended |= self._ended
        self._ended = ended
        if self._waits_for_all and not ended.all():
            return
        for sequence, is_over in zip(self._sequences, ended.tolist(), strict=True):
            if is_over:
                del sequence.output_ids[count:]
                sequence.finish_reason = sequence.finish_reason or "stop"

    def _note_decoded(self, cache: StaticCache) -> None:
        """Tell the cache which tokens the steps have left in it: all but each row's newest."""
        counts = [len(s.output_ids) - 1 for s in self._sequences]
        cache.extend(max(counts), [torch.arange(count, device="cpu") for count in counts])

    def _note_late(self, cache: StaticCache) -> None:
        """Tell the cache what no step has computed: the ends of rows that end before others."""
        end = max(len(s.output_ids) for s in self._sequences) - 1
        late = []
        for s in self._sequences:
            pads = [max(0, self._pad_id)] * end  # a pad below 0 is none
            ids = (s.output_ids + pads)[len(s.output_ids) - 1 : end]
            first = s.length - 1  # the position of its newest token
            late.append(LateTokens(_on_host(ids), _on_host(range(first, first + len(ids)))))
        cache.leave_late(late)

    def _result(self, count: int) -> Tensor:
        """The prompts, where they are ids, and `count` new ones: [B * times, T + count]."""
        rows = [s.output_ids[:count] for s in self._sequences]
        padded = [row + [self._pad_id] * (count - len(row)) for row in rows]
        new = torch.tensor(padded, dtype=torch.int64, device=self._model.device)
        ids = self._prompt.ids.repeat_interleave(self._shape.times, dim=0)
        return torch.cat([ids, new.view(len(rows), count)], dim=1)


def _on_host(numbers: Sequence[Any]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device="cpu")  # whatever torch's default is
