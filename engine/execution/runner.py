"""From sequences to steps of the device, and back from its tokens.

The host launches a step and goes on: `Launch.read` waits for the tokens, which a GPU copies to
pinned memory behind the step.  By then the next step is on its way (core.py), so the device never
waits for the host.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from gemcut.engine.execution.cache import KVCache
from gemcut.engine.execution.cuda_graphs import ROWS, Graphs, can_be_captured, graph_sizes
from gemcut.engine.execution.logprobs import describe_tokens, prompt_logprobs, prompt_scores
from gemcut.engine.execution.model import Gemma
from gemcut.engine.execution.prefill_chunks import padded_sizes
from gemcut.engine.execution.sampler import FILTERED, FULL, GREEDY, RANDOM, Features, run_processors
from gemcut.engine.execution.slot_state import SlotState, upload
from gemcut.engine.execution.steps import PLACE, Steps
from gemcut.engine.requests.outputs import TokenLogprobs
from gemcut.engine.requests.sampling_params import MAX_DRAFT
from gemcut.engine.requests.sequence import TokenSequence
from gemcut.tokenizer import Tokenizer

NO_DRAFT = -1
KINDS = (FULL, FILTERED, RANDOM, GREEDY)  # what a graph computes, the most first


@dataclass
class Launch:
    """A step under way: the tokens of its sequences, one or more for each."""

    sequences: list[TokenSequence]
    ids: Tensor  # [B] or [B, T], on the host when `event` has happened
    event: torch.cuda.Event | None
    drafts: list[list[int]] = field(default_factory=list)
    logprobs: list[TokenLogprobs | None] = field(default_factory=list)

    def read(self) -> list[list[int]]:
        """The tokens of each sequence, at least one; -1 stands where none could be chosen."""
        if self.event is not None:
            self.event.synchronize()
        rows = self.ids.tolist()
        if not self.drafts:
            return [[token_id] for token_id in rows[: len(self.sequences)]]
        return [
            row[: 1 + count_accepted(row, draft)]
            for row, draft in zip(rows, self.drafts, strict=False)
        ]


def count_accepted(chosen: Sequence[int], draft: Sequence[int]) -> int:
    """How many tokens of a draft are what the model chose itself, up to the first that is not."""
    count = 0
    while count < len(draft) and chosen[count] == draft[count]:
        count += 1
    return count


class Runner:
    """Launches prefills and decode steps of one model over one cache.

    The tokenizer shows tokens in log-probabilities; without one they have no text.  Without
    `cuda_graphs` a GPU computes the same steps one kernel after the other.
    """

    def __init__(
        self,
        model: Gemma,
        cache: KVCache,
        state: SlotState,
        tokenizer: Tokenizer | None,
        *,
        cuda_graphs: bool = True,
    ) -> None:
        self.model, self.cache, self.state, self._tokenizer = model, cache, state, tokenizer
        self.steps = Steps(model, cache, state)
        self.device = model.device
        capturable = can_be_captured(self.device, model.ops)
        self.graphs = Graphs() if capturable and cuda_graphs else None
        self._sizes = sorted(graph_sizes(state.num_slots))
        # padded without graphs too, so that cuBLAS computes the same with them and without
        self.prefill_sizes: list[int] = []
        if capturable:
            self.prefill_sizes = padded_sizes(model.config, cache.prefill_chunk, cache.max_seq_len)
        self._batch: tuple[Sequence[int | None], Tensor] | None = None

    def prefill(self, sequence: TokenSequence, count: int) -> Launch | None:
        """Compute `count` more tokens of a prompt; the last of them bring the first token."""
        assert sequence.slot is not None
        start, end = sequence.prefilled, sequence.prefilled + count
        hidden = self._hidden(sequence.prompt_ids, sequence.slot, start, end)
        following = upload(sequence.prompt_ids[start + 1 : end + 1], self.device)
        if sequence.score_only:
            sequence.scores[start:] = prompt_scores(self.model, hidden, following)
        if (top := sequence.params.prompt_logprobs) is not None:
            entries = prompt_logprobs(self.model, hidden, following, top, self._tokenizer)
            sequence.prompt_logprobs = (sequence.prompt_logprobs or [None])[: start + 1] + entries
        sequence.prefilled = end
        sequence.written = max(sequence.written, end)
        if sequence.score_only or not sequence.is_prefilled:
            return None
        return self.begin([sequence], hidden[-1:])

    def _hidden(self, prompt_ids: list[int], slot: int, start: int, end: int) -> Tensor:
        """Normed hidden states of a chunk's tokens: [end - start, D]."""
        ids, count = prompt_ids[start:end], end - start
        size = next((size for size in self.prefill_sizes if size >= count), None)
        if size is None:
            chunk = upload(ids, self.device)
            return self.model.prefill_chunk(chunk, self.cache, slot, start, len(prompt_ids))
        ids += [0] * (size - count) + [slot, start, count, len(prompt_ids)]
        return self._prefill(upload(ids, self.device))[:count]

    def begin(self, sequences: list[TokenSequence], hidden: Tensor) -> Launch:
        """The next token of sequences from the states [B, D] of all that they hold.

        The first one of a prompt that is in the cache, or one that was computed elsewhere.
        """
        for sequence in sequences:
            assert sequence.slot is not None
            self.state.admit(sequence.slot, sequence)
        logits = self.model.logits(hidden)[:, : self.state.vocab_size]
        slots = upload([s.slot for s in sequences], self.device)
        features = self._known(frozenset().union(*(s.uses for s in sequences)))
        return self._choose(sequences, logits, slots, features)

    def decode(self, sequences: list[TokenSequence], drafts: list[list[int]] | None) -> Launch:
        """One step for all these sequences; with drafts, perhaps empty ones, for each of them."""
        slots = self._slots(sequences)
        width = 1
        if drafts is not None:  # a graph has one width for each size
            longest = 1 + max(map(len, drafts))
            width = longest if self.graphs is None else self.draft_width(len(sequences))
        for sequence in sequences:
            newest = sequence.length + sequence.in_flight - 1  # its position
            sequence.written = max(sequence.written, newest + width)
        features = self._known(frozenset().union(*(s.uses for s in sequences)))
        if any(s.needs_logits for s in sequences):
            logits = self._logits(slots)[: len(sequences)]
            return self._choose(sequences, logits, slots[: len(sequences)], features)
        if drafts is None:
            return self._launch(sequences, self._decode(slots, features))
        padded = [draft + [NO_DRAFT] * (width - 1 - len(draft)) for draft in drafts]
        padded += [[NO_DRAFT] * (width - 1)] * (len(slots) - len(drafts))
        ids = self._verify(slots, upload(padded, self.device), features)
        return self._launch(sequences, ids, drafts=drafts)

    def rewind(self, sequence: TokenSequence) -> None:
        """Let the next step go on from where the host knows that a sequence stands."""
        assert sequence.slot is not None
        sequence.in_flight = 0
        if sequence.output_ids:
            self.state.admit(sequence.slot, sequence)
        else:
            sequence.prefilled = sequence.reused = 0

    def draft_width(self, rows: int) -> int:
        """Tokens of each of so many rows that one pass over the weights verifies.

        The newest one is among them: 1 where there is no room for a draft.
        """
        return max(1, min(1 + MAX_DRAFT, ROWS // self._size(rows)))

    def warm_up_prefill(self, slot: int, lengths: Collection[int]) -> None:
        """Run chunks of these lengths, the longest first, in a slot that holds nothing of use."""
        for count in sorted(lengths, reverse=True):
            self.model.logits(self._hidden([0] * count, slot, 0, count)[-1:])

    def kinds_of_steps(self) -> Iterator[Callable[[], Tensor]]:
        """Calls that run every kind of step once, with no active row: what a warm-up does.

        The largest come first: the others fit the memory that they have taken.
        """
        for size in reversed(self.prefill_sizes):
            yield partial(
                self._prefill, torch.zeros(size + PLACE, dtype=torch.int64, device=self.device)
            )
        for size in reversed(self._sizes) if self.graphs is not None else [1]:
            slots = torch.full((size,), self.state.num_slots, device=self.device)
            logits = torch.zeros(size, self.state.vocab_size, device=self.device)
            yield partial(self._logits, slots)
            for features in KINDS:
                yield partial(self._decode, slots, features)
                yield partial(self.steps.choose, logits, slots, features)
                if (width := self.draft_width(size)) > 1:
                    drafts = torch.full((size, width - 1), NO_DRAFT, device=self.device)
                    yield partial(self._verify, slots, drafts, features)

    def _prefill(self, chunk: Tensor) -> Tensor:
        """A padded chunk; one of zeros has no token."""
        if self.graphs is None:
            return self.steps.prefill(chunk)
        key = ("prefill", len(chunk))
        return self.graphs.run(key, self.steps.prefill, (chunk,), blank=torch.zeros_like)

    def _logits(self, slots: Tensor) -> Tensor:
        return self._run("logits", self.steps.logits, slots)

    def _decode(self, slots: Tensor, features: Features) -> Tensor:
        return self._run(
            ("decode", features), lambda slots: self.steps.decode(slots, features), slots
        )

    def _verify(self, slots: Tensor, drafts: Tensor, features: Features) -> Tensor:
        return self._run(
            ("verify", features),
            lambda slots, drafts: self.steps.verify(slots, drafts, features),
            slots,
            drafts,
        )

    def _choose(
        self, sequences: list[TokenSequence], logits: Tensor, slots: Tensor, features: Features
    ) -> Launch:
        """The choice from logits that the host may see and change: logits [B, V], slots [B]."""
        ids = self.steps.choose(run_processors(logits, sequences), slots, features)
        logprobs: list[TokenLogprobs | None] = [None] * len(sequences)
        for row, sequence in enumerate(sequences):
            if (top := sequence.params.logprobs) is not None:
                one = slice(row, row + 1)
                chosen = ids[one].clamp(min=0)
                (logprobs[row],) = describe_tokens(logits[one], chosen, top, self._tokenizer)
        return self._launch(sequences, ids, logprobs=logprobs)

    def _launch(self, sequences: list[TokenSequence], ids: Tensor, **facts) -> Launch:
        event = None
        if self.device.type == "cuda":
            ids = ids.to("cpu", non_blocking=True)  # to pinned memory
            event = torch.cuda.Event()
            event.record()
        for sequence in sequences:
            sequence.in_flight += 1
        return Launch(sequences, ids, event, **facts)

    def _run(self, key: object, step, slots: Tensor, *others: Tensor) -> Tensor:
        if self.graphs is None:
            return step(slots, *others)
        inputs = (slots, *others)
        return self.graphs.run((key, len(slots)), step, inputs, blank=self._blank)

    def _blank(self, x: Tensor) -> Tensor:
        """Inputs of which no row is active: slots [B] or drafts [B, T]."""
        return torch.full_like(x, self.state.num_slots if x.dim() == 1 else NO_DRAFT)

    def _slots(self, sequences: list[TokenSequence]) -> Tensor:
        """Their slots, padded to the size of a graph; uploaded only when the batch has changed."""
        slots = [s.slot for s in sequences]
        slots += [self.state.num_slots] * (self._size(len(slots)) - len(slots))
        if self._batch is not None and self._batch[0] == slots:
            return self._batch[1]
        self._batch = (slots, uploaded := upload(slots, self.device))
        return uploaded

    def _size(self, rows: int) -> int:
        """Rows of the step that serves so many."""
        if self.graphs is None:
            return rows
        return next(size for size in self._sizes if size >= rows)

    def _known(self, features: Features) -> Features:
        """What is computed: just that on a CPU, and by a graph the least that holds it."""
        if self.graphs is None:
            return features
        return next(kind for kind in reversed(KINDS) if features <= kind)
