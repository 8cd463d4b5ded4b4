"""The runner: starts the prefills and decode steps of sequences, and their first tokens.

The host starts a step and goes on; pending_tokens.py reads the tokens that it has sampled.
"""

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from gemcut.engine.execution.logprobs import describe_tokens, prompt_logprobs, prompt_scores
from gemcut.engine.execution.pending_tokens import PendingTokens
from gemcut.engine.execution.sampler import FULL, GREEDY, Features, run_processors
from gemcut.engine.execution.slot_state import upload
from gemcut.engine.execution.steps import NO_DRAFT, Steps
from gemcut.engine.execution.token_masks import TokenMasks
from gemcut.engine.requests.outputs import TokenLogprobs
from gemcut.engine.requests.sequence import TokenSequence
from gemcut.tokenizer import Tokenizer

# sequences, and their logits [B, V] -> the scores [B, V] of which their tokens are chosen
Scorer = Callable[[list[TokenSequence], Tensor], Tensor]


class Runner:
    """Starts prefills and decode steps: `steps` compute them, over one model and one cache.

    The tokenizer shows tokens in log-probabilities; without one, and where a request wants no text,
    they have none.
    """

    def __init__(self, steps: Steps, tokenizer: Tokenizer | None) -> None:
        self.steps, self._tokenizer = steps, tokenizer
        self.model, self.cache, self.state = steps.model, steps.cache, steps.state
        self.device = self.model.device
        # steps whose tokens may be unread while the next is started: a GPU computes beside the host
        self.depth = int(self.device.type == "cuda")
        self._batch: tuple[Sequence[int | None], Tensor] | None = None
        self._masks = TokenMasks(self.device)

    def start_prefill(self, sequence: TokenSequence, count: int) -> PendingTokens | None:
        """Compute `count` more tokens of a prompt -> the first new token, if they are the last."""
        assert sequence.slot is not None
        start, end = sequence.prefilled, sequence.prefilled + count
        prompt_ids = sequence.prompt_ids
        hidden = self.steps.prefill(prompt_ids[start:end], sequence.slot, start, len(prompt_ids))
        following_ids = prompt_ids[start + 1 : end + 1]
        if sequence.score_from is not None and end == len(prompt_ids):
            following_ids.append(sequence.next_id)
        following = upload(following_ids, self.device)
        if (first := sequence.score_from) is not None:
            skipped = max(0, first - 1 - start)
            scores = prompt_scores(self.model, hidden[skipped:], following[skipped:])
            sequence.scores[max(0, start + 1 - first) :] = scores
        if (top := sequence.params.prompt_logprobs) is not None:
            entries = prompt_logprobs(self.model, hidden, following, top, self._shower(sequence))
            sequence.prompt_logprobs = (sequence.prompt_logprobs or [None])[: start + 1] + entries
        sequence.prefilled = end
        sequence.written = max(sequence.written, end)
        if sequence.score_only or not sequence.is_prefilled:
            return None
        return self.start_first_token([sequence], hidden[-1:])

    def start_first_token(
        self, sequences: list[TokenSequence], hidden: Tensor, scorer: Scorer | None = None
    ) -> PendingTokens:
        """Sample the next token of sequences from the states [B, D] of their last tokens.

        It is the first one of a prompt that is in the cache, or the next one of a text whose states
        were computed elsewhere.  scorer: makes scores of the logits of all of them at once.
        """
        for sequence in sequences:
            assert sequence.slot is not None
            self.state.admit(sequence.slot, sequence)
        slots = upload([s.slot for s in sequences], self.device)
        features = _features(sequences)
        if scorer is not None or any(s.needs_logits for s in sequences):
            logits = self.steps.first_logits(hidden)
            return self._sample(sequences, logits, slots, features, scorer)
        return self._pending(sequences, self.steps.choose(hidden, slots, features))

    def start_decode(
        self,
        sequences: list[TokenSequence],
        drafts: list[list[int]] | None,
        scorer: Scorer | None = None,
    ) -> PendingTokens:
        """Decode one step of all these sequences, with a draft, perhaps empty, for each or none."""
        slots, features = self._slots(sequences), _features(sequences)
        if drafts is not None and not self._fits_drafts(sequences):
            drafts = None
        width = 1 if drafts is None else 1 + max(map(len, drafts))
        for sequence in sequences:
            newest = sequence.length + sequence.in_flight - 1  # its position
            sequence.written = max(sequence.written, newest + width)
        if scorer is not None or any(s.needs_logits for s in sequences):
            return self._sample(sequences, self.steps.logits(slots), slots, features, scorer)
        if drafts is None:
            return self._pending(sequences, self.steps.decode(slots, features))
        padded = [draft + [NO_DRAFT] * (width - 1 - len(draft)) for draft in drafts]
        ids = self.steps.verify(slots, upload(padded, self.device), features)
        return self._pending(sequences, ids, drafts=drafts)

    def _fits_drafts(self, sequences: list[TokenSequence]) -> bool:
        """Whether every row has room for the longest draft, to which a graph pads all of them.

        A row that would see more keys than its slot holds is NaN, padding or not.
        """
        width = self.steps.draft_width(len(sequences))
        newest = max(s.length + s.in_flight - 1 for s in sequences)
        return newest + width <= self.cache.max_seq_len

    def rewind(self, sequence: TokenSequence) -> None:
        """Let the next step of a sequence go on from the tokens that the host has read."""
        assert sequence.slot is not None
        sequence.in_flight = 0
        if sequence.output_ids:
            self.state.admit(sequence.slot, sequence)
        else:
            sequence.prefilled = sequence.reused = 0

    def warm_up_prefill(self, slot: int, lengths: Collection[int]) -> None:
        """Run chunks of these lengths, the longest first, in a slot whose content is not needed."""
        nowhere = upload([self.state.num_slots], self.device)
        for count in sorted(lengths, reverse=True):
            last = self.steps.prefill([0] * count, slot, 0, count)[-1:]
            for features in (FULL, GREEDY):
                self.steps.choose(last, nowhere, features)

    def _sample(
        self,
        sequences: list[TokenSequence],
        logits: Tensor,
        slots: Tensor,
        features: Features,
        scorer: Scorer | None,
    ) -> PendingTokens:
        """Sample from logits that the host may see and change: logits [B, V], slots [B]."""
        score = run_processors if scorer is None else lambda x, rows: scorer(rows, x)
        scores = self._masks.mask(score(logits, sequences), sequences)
        ids = self.steps.sample(scores, slots, features)
        logprobs: list[TokenLogprobs | None] = [None] * len(sequences)
        for row, sequence in enumerate(sequences):
            if (top := sequence.params.logprobs) is not None:
                one = slice(row, row + 1)
                sampled = ids[one].clamp(min=0)
                (logprobs[row],) = describe_tokens(
                    logits[one], sampled, top, self._shower(sequence)
                )
        return self._pending(sequences, ids, logprobs=logprobs)

    def _shower(self, sequence: TokenSequence) -> Tokenizer | None:
        return self._tokenizer if sequence.params.detokenize else None

    def _pending(self, sequences: list[TokenSequence], ids: Tensor, **facts) -> PendingTokens:
        event = None
        if self.device.type == "cuda":
            ids = ids.to("cpu", non_blocking=True)  # to pinned memory
            event = torch.cuda.Event()
            event.record()
        for sequence in sequences:
            sequence.in_flight += 1
        return PendingTokens(sequences, ids, event, **facts)

    def _slots(self, sequences: list[TokenSequence]) -> Tensor:
        """The slots of sequences [B], uploaded only when the batch has changed."""
        slots = [s.slot for s in sequences]
        if self._batch is None or self._batch[0] != slots:
            self._batch = (slots, upload(slots, self.device))
        return self._batch[1]


def _features(sequences: list[TokenSequence]) -> Features:
    """The sampling features that any of these sequences uses."""
    return frozenset().union(*(s.uses for s in sequences))
