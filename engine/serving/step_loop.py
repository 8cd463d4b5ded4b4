"""The step loop: it starts the steps that the scheduler chooses, and hands out their tokens.

    admit     a waiting sequence gets a slot, with what a slot already holds of its prompt
    prefill   one chunk of one prompt; while nothing decodes, a longer one, or several short prompts
    decode    one token for every prefilled sequence; with a draft, its accepted tokens and one more
    collect   the tokens of the previous step go to their callers

On a GPU the host reads the tokens of a step while the next step runs; a sequence that has ended by
then takes no more.  It reads them at once on a CPU, and where it must know a token before the next
step (logits processors, bad words, log-probabilities, drafts).

One thread at a time calls a step loop (worker.py).
"""

from collections.abc import Callable, Iterable, Sequence

import torch

from gemcut.engine.execution.cache import KVCache
from gemcut.engine.execution.pending_tokens import PendingTokens, TokenCollector
from gemcut.engine.execution.runner import Runner
from gemcut.engine.requests.sequence import Request, TokenSequence
from gemcut.engine.serving.metrics import EngineMetrics
from gemcut.engine.serving.scheduler import Scheduler

Work = Callable[[], object]


class EngineFault(RuntimeError):
    """The device has failed, and with it every request; only a new process helps."""


class EngineClosedError(RuntimeError):
    """The engine was closed, before a call or while it ran."""


class StepLoop:
    """A scheduler, a runner, and the requests under way; `step` is called again and again."""

    def __init__(self, runner: Runner, scheduler: Scheduler, cache: KVCache) -> None:
        self.runner, self.scheduler, self._cache = runner, scheduler, cache
        self.metrics = EngineMetrics()
        self.background: set[Request] = set()  # unfinished, stepped by the engine's own thread
        self.fault: Exception | None = None
        self.depth = runner.depth  # steps whose tokens may stay unread
        self._collector = TokenCollector()
        self._owners: dict[TokenSequence, Request] = {}

    def add(self, request: Request) -> None:
        """Queue a request's sequences."""
        if request.in_background:
            self.background.add(request)
        for sequence in request.sequences:
            self._owners[sequence] = request
            self.scheduler.add(sequence)
        if self.fault is not None:
            self._fail(request.sequences, self.fault)

    def cancel(self, request: Request) -> None:
        """End a request now; one that has already ended stays as it is."""
        for sequence in request.sequences:
            sequence.abort()
            self._settle(sequence)

    def close(self) -> None:
        """End every request."""
        self._collector.clear()
        self._fail(self.scheduler.all(), EngineClosedError("the engine was closed"))

    @property
    def is_busy(self) -> bool:
        """Whether there is a sequence that has not ended."""
        return bool(self._owners)

    def step(self) -> None:
        """Compute a chunk and decode a token; a failure ends only the sequences concerned."""
        self.metrics.steps += 1
        self._prefill()
        if self._must_be_read():
            self._collect(0)
        sequences = self.scheduler.decoding
        if sequences:
            self._guarded(sequences, lambda: self._decode(sequences))
        is_late = sequences and not self._must_be_read()
        self._collect(self.depth if is_late else 0)

    def warm_up(self, shown: Callable[[Iterable[Work]], Iterable[Work]] = iter) -> None:
        """Make every kind of step once, as `shown` yields them; no slot in use changes.

        The stepping thread makes their tensors here, in the stream in which they are read.
        """
        self._collect(0)
        if (slot := self.scheduler.empty_slot()) is not None:
            end = self._cache.max_seq_len
            longest = self.scheduler.chunk_at(0, end, others_decode=False)
            usual = self.scheduler.chunk_at(0, end, others_decode=True)
            self.runner.warm_up_prefill(slot, {longest, usual, 1})
        for run in shown(self.runner.steps.warm_up_calls()):
            run()

    def change_weights(self, check: Work, write: Work, running: str) -> None:
        """Write other weights between two steps, if `check` finds nothing; what is cached is old.

        running: what becomes of requests that have begun: "refuse" raises RuntimeError, "abort"
        ends them and those that wait, "keep" lets them go on.
        """
        if self.fault is not None:
            raise self.fault
        begun = self.scheduler.running
        if begun and running == "refuse":
            raise RuntimeError(
                f"{len(begun)} completions run, and would go on with other weights: let them end, "
                f"or give running='abort' or 'keep'"
            )
        check()
        self._collect(0)
        if running == "abort":
            for sequence in self.scheduler.all():
                sequence.abort()
                self._settle(sequence)
        self.scheduler.forget_prefixes()
        try:
            write()
        except Exception as error:  # some are new: no token must come of that
            self.die(error)
            raise

    # The parts of a step

    def _prefill(self) -> None:
        """Compute a chunk of a prompt, or several up to `prefill_chunk` while nothing decodes."""
        scheduler = self.scheduler
        others_decode = bool(scheduler.decoding)
        room = scheduler.prefill_chunk
        while True:
            sequence = scheduler.prefilling()
            if sequence is None:
                if (admission := scheduler.admit()) is None:
                    return
                sequence = admission.sequence
                if admission.source is not None:
                    copied = (admission.source, admission.slot, admission.reused)
                    self._guarded([sequence], lambda c=copied: self._cache.copy_prefix(*c))
                self.metrics.reused_tokens += admission.reused
                if sequence.finished:
                    continue
            start, end = sequence.prefilled, len(sequence.prompt_ids)
            count = scheduler.chunk_at(start, end, others_decode=others_decode)
            if count > room and room < scheduler.prefill_chunk:  # not the first of this step
                return
            room -= count
            self._guarded([sequence], lambda s=sequence, n=count: self._prefill_chunk(s, n))
            if others_decode or room <= 0:
                return

    def _prefill_chunk(self, sequence: TokenSequence, count: int) -> None:
        self.metrics.prefill_chunks += 1
        self.metrics.prefill_tokens += count
        first = self.runner.start_prefill(sequence, count)
        if first is not None:
            self._collector.add(first)
            if self.depth == 0:
                self._collect(0)
        elif sequence.score_only and sequence.is_prefilled:
            sequence.finish_scored()

    def _decode(self, sequences: list[TokenSequence]) -> None:
        self.metrics.decode_steps += 1
        self.metrics.decoded_rows += len(sequences)
        self._collector.add(self.runner.start_decode(sequences, self._drafts(sequences)))

    def _drafts(self, sequences: list[TokenSequence]) -> list[list[int]] | None:
        """A draft for each sequence, perhaps empty; None where none is wanted or found."""
        most = self.runner.steps.draft_width(len(sequences)) - 1
        if most == 0 or any(s.needs_logits for s in sequences):
            return None
        drafts = [sequence.draft(most) for sequence in sequences]
        self.metrics.drafted_tokens += sum(map(len, drafts))
        return drafts if any(drafts) else None

    def _must_be_read(self) -> bool:
        """Whether the host must know every token before the next step."""
        return self.depth == 0 or any(
            s.needs_logits or s.params.prompt_lookup_num_tokens for s in self.scheduler.running
        )

    def _collect(self, keep: int) -> None:
        """Hand out the tokens of all steps except the latest `keep`."""
        self._collector.collect(keep, self._hand_out)

    def _hand_out(self, pending: PendingTokens) -> None:
        """Give the sequences of a step their tokens, and count these."""

        def hand_out() -> None:
            taken, accepted = pending.hand_out()
            self.metrics.generated_tokens += taken
            self.metrics.accepted_tokens += accepted

        self._guarded(pending.sequences, hand_out)

    # Ends

    def recover(self) -> None:
        """Undo an interrupted step: sequences go on from the tokens that the host has read."""
        self._collector.clear()
        for sequence in list(self._owners):
            sequence.fail_if_interrupted()
            self._settle(sequence)
        self.scheduler.recover()
        for sequence in self.scheduler.running:
            self._guarded([sequence], lambda s=sequence: self.runner.rewind(s))

    def _guarded(self, sequences: Sequence[TokenSequence], work: Work) -> None:
        """Do `work`; where it fails, only these sequences end, with the error as the reason."""
        try:
            work()
        except Exception as error:
            if self._is_fatal(error):
                self.die(error)
            self._fail(sequences, error)
        for sequence in sequences:
            self._settle(sequence)

    def _fail(self, sequences: Sequence[TokenSequence], error: Exception) -> None:
        for sequence in sequences:
            sequence.fail(error)
            self._settle(sequence)

    def _settle(self, sequence: TokenSequence) -> None:
        """Free the slot of a sequence that has ended, and end its request if that was the last."""
        if not sequence.finished or (request := self._owners.get(sequence)) is None:
            return
        self._clean(sequence)
        self.scheduler.remove(sequence)
        self.metrics.count_end(sequence)
        # several may have finished in this step: the one that is settled last ends the request
        others = (one for one in request.sequences if one is not sequence)
        if not any(other in self._owners for other in others):
            self.background.discard(request)
            request.ended(request)
        del self._owners[sequence]  # last of all: if interrupted before, all this is done again

    def _clean(self, sequence: TokenSequence) -> None:
        """Clear the slot of a sequence that leaves NaN in it."""
        if sequence.slot is None or sequence.is_proven or self.fault is not None:
            return
        if self._cache.holds_nan(sequence.slot, sequence.written):
            sequence.is_spoiled = True
            self._cache.clear(sequence.slot)

    def _is_fatal(self, error: Exception) -> bool:
        """Whether the device itself has failed, so that nothing runs on it any more."""
        if isinstance(error, torch.AcceleratorError):
            return True
        try:  # Triton raises plain errors, and a fault may surface at any call
            if self.runner.device.type == "cuda":
                torch.cuda.synchronize(self.runner.device)
        except RuntimeError:
            return True
        return False

    def die(self, error: Exception) -> None:
        """End every request, and all later ones, with the error that broke the engine."""
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        self.fault = EngineFault(f"the engine is dead: {reason}")
        self._collector.clear()
        self._fail(self.scheduler.all(), self.fault)
