"""Ctrl-C at any line of the engine: the interrupted call raises it, all others get their tokens.

On a CPU the main thread may make steps for other callers.  Here a trace function raises
KeyboardInterrupt at the n-th line that it executes inside the engine, for one n after another.
"""

import gc
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from engines import assert_serves

from gemcut.engine import Engine, SamplingParams, StructuredOutputsParams

FOLDER = Path(sys.modules["gemcut.engine"].__file__).parent
NAMES = """
    serving/step_loop serving/scheduler execution/runner execution/pending_tokens
    execution/slot_state execution/cache execution/token_masks requests/sequence requests/grammars
"""
FILES = {str(FOLDER / f"{name}.py") for name in NAMES.split()}
PLACING = {"admit", "place", "_prefill", "copy_prefix"}  # where a slot and its tokens change hands
SETTINGS = {
    "greedy": {"temperature": 0},
    "penalised": {"seed": 3, "repetition_penalty": 1.5, "frequency_penalty": 0.5},
    "stopped": {"seed": 5, "logit_bias": {9: 2.0}, "stop": ["zzz"], "min_tokens": 4},
    "guessed": {"temperature": 0, "prompt_lookup_num_tokens": 4},
}
if find_spec("llguidance") is not None:
    form = StructuredOutputsParams(regex="([a-z]{2} ){500}")
    SETTINGS["structured"] = {"seed": 7, "structured_outputs": form}


class InterruptAt:
    """Raises KeyboardInterrupt at the n-th line of a step, once; counts lines where n is None."""

    def __init__(self, n: int | None) -> None:
        self.n, self.lines = n, 0
        self.placing: list[int] = []  # the lines at which a slot is given out

    def __enter__(self) -> "InterruptAt":
        gc.disable()  # it would close engines of other tests, where an exception is lost
        sys.settrace(self._call)
        return self

    def __exit__(self, *exc_info: object) -> None:
        sys.settrace(None)
        gc.enable()

    def _call(self, frame, event, arg):
        if frame.f_code.co_filename not in FILES:
            return None
        # what is raised at the very edge of this callback is dropped: the next Ctrl-C counts
        if frame.f_back is not None and "llguidance" in frame.f_back.f_code.co_filename:
            return None
        if frame.f_code.co_name in ("step", "add", "cancel") and _is_step_loop(frame):
            return self._line
        return self._line if self._within(frame) else None

    def _within(self, frame) -> bool:
        """Whether a step is being made: lines of a caller outside of steps do not count."""
        while frame is not None:
            if _is_step_loop(frame):
                return True
            frame = frame.f_back
        return False

    def _line(self, frame, event, arg):
        if event == "line":
            self.lines += 1
            if frame.f_code.co_name in PLACING:
                self.placing.append(self.lines)
            if self.lines == self.n:
                raise KeyboardInterrupt
        return self._line


def _is_step_loop(frame) -> bool:
    return frame.f_code.co_filename.endswith("step_loop.py")


@pytest.fixture(scope="module")
def engine(folder):
    options = {"max_batch_size": 2, "prefill_chunk": 8, "dtype": "float32", "device": "cpu"}
    with Engine.from_pretrained(folder, **options) as engine:
        yield engine


@pytest.mark.parametrize("setting", SETTINGS)
def test_an_interrupted_step_harms_no_other(engine, setting):
    """The main thread makes steps for itself and for a stream that it began before.

    The prefix that both prompts share, and that is copied from slot to slot, differs for each n.
    """
    params = SamplingParams(max_tokens=6, ignore_eos=True, **SETTINGS[setting])
    options = {"max_batch_size": 1, "reuse_prefixes": False}
    anew = Engine(engine.model, engine.tokenizer, **options)

    def run(n: int | None) -> InterruptAt:
        shared = [2, *range(40 + (n or 0) % 300, 49 + (n or 0) % 300)]
        prompts = [[*shared, 20, 21], [*shared, 30]]
        alone = [anew.generate(prompt, params).token_ids for prompt in prompts]
        other = engine.stream(prompts[0], params)
        ids = next(other).token_ids
        with InterruptAt(n) as interrupt:
            try:
                assert engine.generate(prompts[1], params).token_ids == alone[1]
            except KeyboardInterrupt:
                interrupted = True
            else:
                interrupted = False
        # with other guesses it takes other steps, perhaps fewer
        assert interrupted == (n is not None and interrupt.lines >= n)
        failed = None
        try:
            for delta in other:
                ids = ids + delta.token_ids
        except RuntimeError as error:  # interrupted while it took a token: it cannot go on
            failed = str(error)
        assert failed in (None, "interrupted in the midst of a token"), n
        assert ids == (alone[0] if failed is None else alone[0][: len(ids)]), n
        # a slot that claimed what it does not hold would show here
        assert engine.generate(prompts[1], params).token_ids == alone[1], n
        assert_serves(engine)
        assert engine._scheduler.free_slots == 2, n
        return interrupt

    whole = run(None)
    assert whole.lines > 300
    sampled = set(range(1, whole.lines + 1, whole.lines // 40))
    for n in sorted(sampled | set(whole.placing if setting == "greedy" else ())):
        run(n)
