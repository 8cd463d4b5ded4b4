"""The scheduler: which sequence gets which slot, and which prefix of its prompt is reused."""

from dataclasses import dataclass, field

import pytest

from gemcut.engine.requests.prefix_reuse import Held, Ring
from gemcut.engine.serving.scheduler import Scheduler


@dataclass(eq=False)
class Stub:
    """The part of a sequence that a scheduler uses."""

    prompt_ids: list[int]
    answer: list[int] = field(default_factory=list)
    may_reuse: bool = True
    score_from: int | None = None
    slot: int | None = None
    reused: int = 0
    written: int = 0
    is_prefilled: bool = True
    is_spoiled: bool = False

    @property
    def length(self) -> int:
        return len(self.prompt_ids) + len(self.answer)

    def place(self, slot: int, reused: int, written: int) -> None:
        self.slot, self.reused, self.written = slot, reused, written

    def held(self) -> Held:
        tokens = self.prompt_ids + self.answer
        return Held(tokens, max(self.written, len(tokens)))


def run(scheduler: Scheduler, *prompts: list[int], keep: bool = False) -> list[tuple]:
    """(slot, reused, source) of prompts that come and end one after the other."""
    admissions = []
    for prompt in prompts:
        sequence = Stub(prompt)
        scheduler.add(sequence)
        admission = scheduler.admit()
        assert admission.sequence is sequence
        assert (sequence.slot, sequence.reused) == (admission.slot, admission.reused)
        admissions.append((admission.slot, admission.reused, admission.source))
        if not keep:
            scheduler.remove(sequence)
    return admissions


LONG, OTHER = list(range(100)), list(range(500, 600))


def test_without_a_prefix_the_slot_that_was_unused_longest_is_taken():
    scheduler = Scheduler(3, 8)
    prompts = [[n] * 9 for n in range(5)]
    assert [slot for slot, *_ in run(scheduler, *prompts)] == [0, 1, 2, 0, 1]


def test_what_goes_on_is_taken_over_in_place():
    scheduler = Scheduler(3, 8)
    run(scheduler, OTHER, LONG)
    assert run(scheduler, [*LONG, 7, 8], [*LONG, 7, 8, 9]) == [(1, 100, None), (1, 102, None)]


def test_what_only_begins_alike_is_copied_and_both_stay():
    scheduler = Scheduler(3, 8)
    run(scheduler, LONG)
    assert run(scheduler, [*LONG[:30], 7]) == [(1, 30, 0)]
    assert run(scheduler, [*LONG, 9]) == [(0, 100, None)]
    assert run(scheduler, [*LONG[:30], 7, 8]) == [(1, 31, None)]


def test_in_the_only_free_slot_it_is_in_place():
    scheduler = Scheduler(2, 8)
    run(scheduler, OTHER, keep=True)
    run(scheduler, LONG)
    assert run(scheduler, [*LONG[:30], 7]) == [(1, 30, None)]


def test_a_slot_that_runs_is_copied_from():
    scheduler = Scheduler(3, 8)
    assert run(scheduler, LONG, LONG, [*LONG, 5], keep=True) == [
        (0, 0, None),
        (1, 99, 0),
        (2, 100, 0),
    ]


def test_the_longest_prefix_wins_and_a_free_slot_among_equals():
    scheduler = Scheduler(4, 8)
    run(scheduler, LONG[:40], keep=True)
    assert run(scheduler, [*LONG[:40], 1]) == [(1, 40, 0)]
    assert run(scheduler, [*LONG[:60], 2]) == [(1, 40, None)]  # both hold 40
    assert run(scheduler, [*LONG[:50], 3]) == [(1, 50, None)]


@pytest.mark.parametrize("reuse", [{"reuse_prefixes": False}, {}], ids=["engine", "request"])
def test_where_nothing_may_be_reused_nothing_is(reuse):
    scheduler = Scheduler(2, 8, **reuse)
    run(scheduler, LONG)
    sequence = Stub(LONG, may_reuse=bool(reuse))
    scheduler.add(sequence)
    assert (scheduler.admit().reused, sequence.written) == (0, 0)


def test_what_was_written_behind_a_prefix_is_not_forgotten():
    """`written` tells what a ring has lost; a prefix that is taken over has lost the same."""
    scheduler = Scheduler(1, 8, ring=Ring(window=5, capacity=13))
    run(scheduler, list(range(13)))
    sequence = Stub([*range(6), 99])
    scheduler.add(sequence)
    assert (scheduler.admit().reused, sequence.written) == (6, 13)


def test_nothing_of_a_spoiled_sequence_is_reused():
    scheduler = Scheduler(2, 8)
    spoiled = Stub(LONG)
    scheduler.add(spoiled)
    scheduler.admit()
    spoiled.is_spoiled = True
    scheduler.remove(spoiled)
    assert run(scheduler, [*LONG, 7]) == [(1, 0, None)]
    assert run(scheduler, OTHER) == [(0, 0, None)]


def test_a_cancelled_sequence_leaves_the_queue_and_its_slot():
    scheduler = Scheduler(1, 8)
    first, second, third = (Stub([n]) for n in range(3))
    for sequence in (first, second, third):
        scheduler.add(sequence)
    scheduler.admit()
    scheduler.remove(second)
    scheduler.remove(second)
    assert (scheduler.waiting, scheduler.admitted, scheduler.admit()) == (1, 2, None)
    scheduler.remove(first)
    scheduler.remove(first)
    assert scheduler.admit().sequence is third
    assert (scheduler.waiting, scheduler.admitted, scheduler.free_slots) == (0, 3, 0)


def test_an_admission_that_was_interrupted_is_made_again():
    """Interrupted before the queue forgot the sequence, and before its slot was assigned."""
    scheduler = Scheduler(2, 8)
    sequence = Stub(LONG)
    scheduler.add(sequence)
    scheduler.admit()
    scheduler._waiting[sequence] = None
    scheduler.recover()
    assert (sequence.slot, scheduler.waiting, scheduler.free_slots) == (None, 1, 2)
    del scheduler._free[0]
    scheduler.recover()
    assert scheduler.free_slots == 2
    assert scheduler.admit().sequence is sequence
    assert (scheduler.waiting, scheduler.free_slots) == (0, 1)


def test_tokens_may_be_counted_while_slots_change_hands():
    """Another thread counts: here the slots change in the middle of its count."""
    scheduler = Scheduler(3, 8)

    class Changing(Stub):
        @property
        def length(self) -> int:
            run(scheduler, OTHER, keep=True)
            return 9

    scheduler.add(Changing([1]))
    scheduler.admit()
    assert scheduler.held_tokens == 9
    assert scheduler.free_slots == 1
