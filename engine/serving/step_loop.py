"""One step after the other: what the scheduler chose is launched, what was launched before is read.

    admit     a waiting sequence gets a slot, and what a slot holds of its prompt
    prefill   one chunk of one prompt; where nobody decodes, a longer one, or several short prompts
    decode    one token for all that have begun; or a draft and one token
    collect   the tokens of the step before go to their callers

On a GPU a step's tokens are read when the next step is under way.  A sequence that ended is noticed
by then: what that step chose for it is dropped.  Where the host must know a token before the next
step (logits processors, log-probabilities, drafts), and on a CPU, it is read at once.

One thread at a time calls a core (worker.py).
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence

import torch

from gemcut.engine.execution.runner import Launch, Runner
from gemcut.engine.requests.prompt_lookup import Lookup
from gemcut.engine.requests.sequence import Request, TokenSequence
from gemcut.engine.serving.metrics import EngineMetrics
from gemcut.engine.serving.scheduler import Scheduler

Work = Callable[[], object]


class EngineFault(RuntimeError):
    """The device has failed, and with it every request; only a new process helps."""


class Core:
    """The scheduler, the runner, and the requests that are under way."""

    def __init__(self, runner: Runner, scheduler: Scheduler) -> None:
        self.runner, self.scheduler = runner, scheduler
        self.metrics = EngineMetrics()
        self.attended: set[Request] = set()  # unfinished ones, for which the thread makes steps
        self.fault: Exception | None = None
        self.depth = int(runner.device.type == "cuda")  # launches that may stay unread
        self._in_flight: deque[Launch] = deque()
        self._owners: dict[TokenSequence, Request] = {}

    def add(self, request: Request) -> None:
        """Queue a request's sequences."""
        if request.attended:
            self.attended.add(request)
        for sequence in request.sequences:
            self._owners[sequence] = request
            self.scheduler.add(sequence)
        if self.fault is not None:
            self._fail(request.sequences, self.fault)

    def cancel(self, request: Request) -> None:
        """End a request where it stands; one that has ended stays as it is."""
        for sequence in request.sequences:
            sequence.abort()
            self._settle(sequence)

    def close(self) -> None:
        """End every request."""
        self._in_flight.clear()
        self._fail(self.scheduler.all(), RuntimeError("the engine was closed"))

    @property
    def is_busy(self) -> bool:
        """Whether there is a sequence that has not ended."""
        return bool(self._owners)

    def step(self) -> None:
        """One chunk and one token; a failure ends the sequences concerned, and no others."""
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
        """Make every kind of step once, as `shown` yields them: none changes a slot in use.

        Their tensors are made here, by the driver: in the stream in which they are read.
        """
        self._collect(0)
        if (slot := self.scheduler.empty_slot()) is not None:
            end = self.runner.cache.max_seq_len
            longest = self.scheduler.chunk_at(0, end, others_decode=False)
            usual = self.scheduler.chunk_at(0, end, others_decode=True)
            self.runner.warm_up_prefill(slot, {longest, usual, 1})
        for step in shown(self.runner.kinds_of_steps()):
            step()

    # The parts of a step

    def _prefill(self) -> None:
        """Chunks of waiting prompts: one, and more up to `prefill_chunk` where nobody decodes."""
        scheduler = self.scheduler
        others_wait = bool(scheduler.decoding)
        room = scheduler.prefill_chunk
        while True:
            sequence = scheduler.prefilling()
            if sequence is None:
                if (placement := scheduler.admit()) is None:
                    return
                sequence = placement.sequence
                if placement.source is not None:
                    copied = (placement.source, placement.slot, placement.reused)
                    self._guarded([sequence], lambda c=copied: self.runner.cache.copy_prefix(*c))
                self.metrics.reused_tokens += placement.reused
                if sequence.finished:
                    continue
            start, end = sequence.prefilled, len(sequence.prompt_ids)
            count = scheduler.chunk_at(start, end, others_decode=others_wait)
            if count > room and room < scheduler.prefill_chunk:  # it is not the step's first
                return
            room -= count
            self._guarded([sequence], lambda s=sequence, n=count: self._prefill_chunk(s, n))
            if others_wait or room <= 0:
                return

    def _prefill_chunk(self, sequence: TokenSequence, count: int) -> None:
        self.metrics.prefill_chunks += 1
        self.metrics.prefill_tokens += count
        launch = self.runner.prefill(sequence, count)
        if launch is not None:
            self._in_flight.append(launch)
            if self.depth == 0:
                self._collect(0)
        elif sequence.score_only and sequence.is_prefilled:
            sequence.finish_scored()

    def _decode(self, sequences: list[TokenSequence]) -> None:
        self.metrics.decode_steps += 1
        self.metrics.decoded_rows += len(sequences)
        launch = self.runner.decode(sequences, self._drafts(sequences))
        self._in_flight.append(launch)

    def _drafts(self, sequences: list[TokenSequence]) -> list[list[int]] | None:
        """A guess for each sequence that wants them, None where there is no guess at all."""
        most = self.runner.draft_width(len(sequences)) - 1
        if most == 0 or any(s.needs_logits for s in sequences):
            return None
        drafts = [_draft(sequence, most) for sequence in sequences]
        self.metrics.drafted_tokens += sum(map(len, drafts))
        return drafts if any(drafts) else None

    def _must_be_read(self) -> bool:
        """Whether the host must know every token before the next step."""
        return self.depth == 0 or any(
            s.needs_logits or s.params.prompt_lookup_num_tokens for s in self.scheduler.running
        )

    def _collect(self, keep: int) -> None:
        """Hand out the tokens of what was launched, but for the latest `keep` launches."""
        while len(self._in_flight) > keep:
            launch = self._in_flight.popleft()
            self._guarded(launch.sequences, lambda one=launch: self._hand_out(one))

    def _hand_out(self, launch: Launch) -> None:
        rows = launch.read()
        if launch.drafts:
            self.metrics.accepted_tokens += sum(len(row) - 1 for row in rows)
        for row, (sequence, token_ids) in enumerate(zip(launch.sequences, rows, strict=True)):
            sequence.in_flight -= 1
            if not sequence.finished:  # else it ended a step ago
                logprobs = launch.logprobs[row] if launch.logprobs else None
                self.metrics.generated_tokens += sequence.take(token_ids, logprobs)

    # Ends

    def recover(self) -> None:
        """Undo what an interrupted step had begun: the host says where each sequence stands."""
        self._in_flight.clear()
        for sequence in list(self._owners):
            sequence.fail_if_interrupted()
            self._settle(sequence)
        self.scheduler.recover()
        for sequence in self.scheduler.running:
            self._guarded([sequence], lambda s=sequence: self.runner.rewind(s))

    def _guarded(self, sequences: Sequence[TokenSequence], work: Work) -> None:
        """Do `work`; where it fails, the sequences concerned end with the reason, and no others."""
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
        """Free the slot of a sequence that has ended; its request may have ended with it."""
        if not sequence.finished or (request := self._owners.get(sequence)) is None:
            return
        self.scheduler.remove(sequence)
        self.metrics.count_end(sequence)
        if request.finished:
            self.attended.discard(request)
            request.ended(request)
        del self._owners[sequence]  # at last: what was interrupted is settled again

    def _is_fatal(self, error: Exception) -> bool:
        """Whether the device itself has failed: then nothing runs on it any more."""
        if isinstance(error, torch.AcceleratorError):
            return True
        try:  # Triton's errors are plain ones, and a fault may show anywhere
            if self.runner.device.type == "cuda":
                torch.cuda.synchronize(self.runner.device)
        except RuntimeError:
            return True
        return False

    def die(self, error: Exception) -> None:
        """End every request, and all that come, with what broke the engine."""
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        self.fault = EngineFault(f"the engine is dead: {reason}")
        self._in_flight.clear()
        self._fail(self.scheduler.all(), self.fault)


def _draft(sequence: TokenSequence, most: int) -> list[int]:
    """A guess of what comes next, that neither the slot nor the request ends before."""
    wanted = sequence.params.prompt_lookup_num_tokens
    count = min(most, wanted, sequence.max_tokens - len(sequence.output_ids) - 1)
    if count < 1:
        return []
    if sequence.lookup is None:
        sequence.lookup = Lookup(sequence.prompt_ids)
    lookup = sequence.lookup
    lookup.extend(sequence.output_ids[len(lookup) - len(sequence.prompt_ids) :])
    return lookup.draft(count)
