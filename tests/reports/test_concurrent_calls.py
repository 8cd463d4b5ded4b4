"""Calls at once on one model: in threads, within each other's callbacks, and across a fork."""

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from documented_twins import random_ids, twins

from gemcut.engine import Engine, SamplingParams
from gemcut.engine.transformers_api import DynamicCache

IDS = random_ids(length=6)
COUNT, THREADS = 120, 8


@pytest.fixture
def model():
    return twins("AutoModelForCausalLM", "gemma2", tie_word_embeddings=False, eos_token_id=None)[1]


class Gate:
    """A streamer that lets the next call draw its seeds once this one has drawn them."""

    one = threading.Lock()

    def __init__(self, seed: int) -> None:
        self.one.acquire()
        self.is_open = False
        torch.manual_seed(seed)

    def put(self, ids: torch.Tensor) -> None:
        if not self.is_open:
            self.is_open = True
            self.one.release()

    def end(self) -> None:
        pass


def random_call(model, seed: int) -> Callable[[], torch.Tensor]:
    """A call of `generate` with prompts, padding and settings that this seed draws."""
    draw = random.Random(seed)
    rows, length = draw.randint(1, 3), draw.randint(2, 12)
    ids = random_ids(rows, length, seed)
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, : draw.choice([0, 0, draw.randrange(length)])] = 0
    settings: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": draw.randint(1, 8)}
    if draw.random() < 0.3:
        settings |= {"eos_token_id": draw.sample(range(4, 97), 12), "pad_token_id": 0}
    if draw.random() < 0.2:
        settings["logits_processor"] = [lambda ids, logits: logits.roll(1, -1)]
    if draw.random() < 0.2:
        settings["repetition_penalty"] = 1.3
    if draw.random() < 0.1:  # a call within a call
        within = {"max_new_tokens": 2}
        settings["stopping_criteria"] = [lambda *_: not len(model.generate(ids, **within))]
    samples, has_cache = draw.random() < 0.3, draw.random() < 0.2
    if samples:
        settings |= {"do_sample": True, "temperature": 1.2, "top_k": draw.choice([0, 5])}

    def call() -> torch.Tensor:
        more = {"past_key_values": DynamicCache()} if has_cache else {}
        more |= {"streamer": Gate(seed)} if samples else {}
        return model.generate(ids, **settings, **more)

    return call


def in_threads(calls: list[Callable[[], Any]]) -> list[Any]:
    """What each call returns or raises, made by several threads at once in any order."""
    results: list[Any] = [None] * len(calls)
    left = list(range(len(calls)))
    random.Random(0).shuffle(left)

    def work() -> None:
        while True:
            try:
                number = left.pop()
            except IndexError:
                return
            try:
                results[number] = calls[number]()
            except Exception as error:
                results[number] = error

    threads = [threading.Thread(target=work) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_random_calls_in_threads_are_as_alone(model):
    calls = [random_call(model, seed) for seed in range(COUNT)]
    alone = [call() for call in calls]
    for number, (actual, expected) in enumerate(zip(in_threads(calls), alone, strict=True)):
        assert isinstance(actual, torch.Tensor), (number, actual)
        assert torch.equal(actual, expected), number


def test_forward_in_threads(model):
    prompts = [random_ids(2, 3 + seed % 9, seed) for seed in range(40)]
    expected = [model(ids).logits for ids in prompts]
    actual = in_threads([lambda ids=ids: model(ids).logits for ids in prompts])
    assert all(map(torch.equal, actual, expected))


def test_calls_within_callbacks_and_beside_a_streamer(model):
    expected = model.generate(IDS, max_new_tokens=6)
    other = random_ids(2, 5, seed=4)
    within = model.generate(other, max_new_tokens=4)

    def process(ids, logits):
        assert torch.equal(model.generate(other, max_new_tokens=4), within)
        return logits

    def stop(ids, scores):
        assert torch.equal(model.generate(other, max_new_tokens=4), within)
        assert model(other).logits.isfinite().all()
        return torch.zeros(len(ids), dtype=torch.bool)

    class Streamer:
        def put(self, ids):
            assert all(torch.equal(ids, within) for ids in in_threads([call, call]))

        def end(self):
            pass

    def call():
        return model.generate(other, max_new_tokens=4)

    for given in (
        {"logits_processor": [process]},
        {"stopping_criteria": [stop]},
        {"streamer": Streamer()},
    ):
        assert torch.equal(model.generate(IDS, max_new_tokens=6, **given), expected)


def test_a_call_keeps_memory_for_the_next_and_no_more(model):
    in_threads([lambda: model.generate(IDS, max_new_tokens=3)] * 40)
    kept = len(model._spare_caches)
    assert 1 <= kept <= THREADS
    model.generate(IDS, max_new_tokens=3)
    assert len(model._spare_caches) == kept
    with pytest.raises(ZeroDivisionError):
        model.generate(IDS, max_new_tokens=3, stopping_criteria=[lambda *_: 1 // 0])
    assert len(model._spare_caches) == kept


# Forks


def what_a_child_says(work: Callable[[], Any]) -> str:
    """What a forked child returns or raises; a failure where it hangs."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            said = f"returned {work()}"
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(writer, said[:500].encode())
        os._exit(0)
    os.close(writer)
    until = time.monotonic() + 30
    while time.monotonic() < until:
        if os.waitpid(child, os.WNOHANG)[0]:
            with os.fdopen(reader) as pipe:
                return pipe.read()
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    pytest.fail("the child hangs")


def beside(work: Callable[[], Any], meanwhile: Callable[[], str]) -> str:
    """What `meanwhile` says while another thread does `work` again and again."""
    stop, started = threading.Event(), threading.Event()

    def repeat() -> None:
        while not stop.is_set():
            work()
            started.set()

    thread = threading.Thread(target=repeat)
    thread.start()
    started.wait()
    try:
        return meanwhile()
    finally:
        stop.set()
        thread.join()


forks = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


@forks
@pytest.mark.usefixtures("two_threads")
def test_a_child_of_a_thread_that_computed_gets_an_error(model):
    model.generate(IDS, max_new_tokens=2)
    for call in (lambda: model.generate(IDS, max_new_tokens=2), lambda: model(IDS)):
        assert "forked by a thread that had computed" in what_a_child_says(call)

    def fork_within(ids, scores):
        said.append(what_a_child_says(lambda: model(IDS)))
        return False

    said: list[str] = []
    model.generate(IDS, max_new_tokens=2, stopping_criteria=[fork_within])
    assert all("forked by a thread that had computed" in x for x in said)
    assert len(said) == 2

    def alone() -> torch.Tensor:
        torch.set_num_threads(1)
        return model.generate(IDS, max_new_tokens=2).shape

    assert what_a_child_says(alone) == "returned torch.Size([3, 8])"


@forks
def test_a_child_that_was_forked_beside_a_call_does_not_hang(model):
    cache = DynamicCache()
    model(IDS, past_key_values=cache)

    def call() -> torch.Tensor:
        torch.set_num_threads(1)
        return model.generate(IDS, max_new_tokens=2).shape

    said = beside(lambda: model.generate(IDS, max_new_tokens=20), lambda: what_a_child_says(call))
    assert said == "returned torch.Size([3, 8])"


@forks
def test_a_child_of_a_stepping_engine_gets_an_error():
    within, forked = threading.Event(), threading.Event()

    def hold(ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        """Keep the engine within this step until the child is there."""
        within.set()
        assert forked.wait(60)
        return logits

    held = SamplingParams(max_tokens=2, logits_processors=[hold])
    with Engine.from_pretrained("demo", max_batch_size=2) as engine, ThreadPoolExecutor(1) as pool:

        def ask_and_close() -> None:
            try:
                engine.generate("It was")
            finally:
                engine.close()

        answer = pool.submit(engine.generate, "It was a bright", held)
        assert within.wait(60)
        try:
            said = what_a_child_says(ask_and_close)
        finally:
            forked.set()
        assert said.startswith("RuntimeError: this process was forked while the engine made a step")
        assert len(answer.result().token_ids) == 2
        assert engine.generate("It was").text


@forks
def test_a_child_of_an_idle_engine_may_ask_it():
    greedy = SamplingParams(max_tokens=8, temperature=0)
    with Engine.from_pretrained("demo", max_batch_size=2) as engine:
        expected = engine.generate("It was", greedy).text

        def ask() -> str:
            torch.set_num_threads(1)
            return engine.generate("It was", greedy).text

        assert what_a_child_says(ask) == f"returned {expected}"
