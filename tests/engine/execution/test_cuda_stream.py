"""The CUDA stream of an engine: all its work runs there, ordered with the streams of its callers.

Streams are stand-ins that note who waits for whom, and each op notes the stream that it runs in.
"""

import asyncio
import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from engines import run_as_on_a_gpu

from gemcut.engine import Engine, SamplingParams
from gemcut.engine.execution import cuda_stream
from gemcut.engine.execution.cache import KVCache
from gemcut.engine.execution.model import Gemma
from gemcut.engine.execution.slot_state import SlotState
from gemcut.kernels import launch_switch, reference

STEPS = "steps"
PARAMS = SamplingParams(max_tokens=5, ignore_eos=True, seed=1)
ENDLESS = SamplingParams(ignore_eos=True)
CPU = torch.device("cpu")


class Stream:
    """A stream that notes what is asked of it."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self._log = name, log

    def wait_stream(self, other: "Stream") -> None:
        self._log.append(f"{self.name} waits for {other.name}")

    def synchronize(self) -> None:
        self._log.append("synchronize")


class Streams:
    """The current stream of each thread, and what happened in which order."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self._current = threading.local()

    def current(self, device: object = None) -> Stream:
        name = threading.current_thread().name
        return getattr(self._current, "stream", None) or Stream(name, self.log)

    @contextmanager
    def entered(self, stream: Stream) -> Iterator[None]:
        before, self._current.stream = self.current(), stream
        self.log.append(f"enter {stream.name}")
        yield
        self._current.stream = before

    def work(self, kind: str) -> None:
        self.log.append(f"{kind} in {self.current().name}")

    def noting(self, kind: str, op):
        def noted(*args, **kwargs):
            self.work(kind)
            return op(*args, **kwargs)

        return noted


@pytest.fixture
def streams(monkeypatch) -> Streams:
    streams = Streams()
    monkeypatch.setattr(cuda_stream, "new_stream", lambda device: Stream(STEPS, streams.log))
    monkeypatch.setattr(torch.cuda, "current_stream", streams.current)
    monkeypatch.setattr(torch.cuda, "stream", streams.entered)
    for owner, name in ((KVCache, "copy_prefix"), (SlotState, "admit")):
        monkeypatch.setattr(owner, name, streams.noting("work", getattr(owner, name)))
    for owner in (KVCache, SlotState):
        made = streams.noting("allocation", owner.__init__)
        monkeypatch.setattr(owner, "__init__", made)
    return streams


@pytest.fixture(params=["callers-drive", "own-thread"])
def engine(folder, streams, request):
    """An engine whose every op notes the stream that it runs in."""
    with Engine.from_pretrained(folder, device="cpu", dtype="float32") as plain:
        ops = {name: getattr(reference, name) for name in reference.__all__}
    noting = SimpleNamespace(**{name: streams.noting("work", op) for name, op in ops.items()})
    model = Gemma(plain.config, plain.model.weights, noting)
    streams.log.clear()
    with Engine(model, plain.tokenizer, max_batch_size=2, prefill_chunk=8) as engine:
        if request.param == "own-thread":
            run_as_on_a_gpu(engine)
        yield engine


def caller() -> str:
    return threading.current_thread().name


def check_order(log: list[str]) -> None:
    """All work is in the engine's stream, between a wait for the caller and one of the caller."""
    places = [i for i, entry in enumerate(log) if entry.startswith("work")]
    assert {log[i] for i in places} == {f"work in {STEPS}"}
    before = [i for i, entry in enumerate(log) if entry == f"{STEPS} waits for {caller()}"]
    after = [i for i, entry in enumerate(log) if entry == f"{caller()} waits for {STEPS}"]
    assert before[0] < places[0]
    assert after[-1] > places[-1]


def test_what_construction_made_is_there_before_the_first_step(engine, streams):
    first = streams.log[:3]
    assert first[:2] == [f"allocation in {caller()}"] * 2
    assert first[2] == f"{STEPS} waits for {caller()}"


@pytest.mark.parametrize("call", ["generate", "score", "stream", "chat", "warmup", "agenerate"])
def test_steps_run_in_the_engine_s_stream_whoever_drives(engine, streams, call):
    calls = {
        "generate": lambda: engine.generate(["It was", "Once upon a time there was a"], PARAMS),
        "score": lambda: engine.score("It was a bright cold morning"),
        "stream": lambda: list(engine.stream("It was", PARAMS)),
        "chat": lambda: engine.chat([{"role": "user", "content": "Who?"}], PARAMS),
        "warmup": engine.warmup,
        "agenerate": lambda: asyncio.run(engine.agenerate("It was", PARAMS)),
    }
    for _ in range(2):  # the second time, prefixes are copied and taken over
        streams.log.clear()
        calls[call]()
        if call == "stream" and not engine._worker.inline:
            streams.log.append(f"{caller()} waits for {STEPS}")  # deltas hold no tensor
        check_order(streams.log)


def test_tensors_of_a_warm_up_are_made_where_they_are_read(engine, streams, monkeypatch):
    """With a progress bar all steps are known before the first is made."""
    calls = engine._loop.runner.steps.warm_up_calls

    def noted():
        for call in calls():
            streams.work("work")
            yield call

    monkeypatch.setattr(engine._loop.runner.steps, "warm_up_calls", noted)
    streams.log.clear()
    engine.warmup(use_tqdm=True)
    check_order(streams.log)


def test_a_single_step_is_ordered_with_its_caller_s_stream(engine, streams):
    """In any thread, and in any stream of the thread."""
    engine.add("It was", PARAMS)
    failures = []

    def make_steps() -> None:
        try:
            with streams.entered(Stream("another", streams.log)):
                while engine.has_work:
                    streams.log.clear()
                    engine.step()
                    log = [entry for entry in streams.log if not entry.startswith("enter")]
                    assert log[0] == f"{STEPS} waits for another"
                    assert log[-1] == f"another waits for {STEPS}"
                    assert all(x == f"work in {STEPS}" for x in log if x.startswith("work"))
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=make_steps)
    thread.start()
    thread.join(timeout=60)
    assert failures == []


def test_a_processor_runs_in_the_engine_s_stream_after_what_its_caller_had_made(engine, streams):
    def processor(generated, logits):
        streams.work("work")
        return logits

    streams.log.clear()
    params = SamplingParams(max_tokens=3, ignore_eos=True, logits_processors=[processor])
    engine.generate("It was", params)
    check_order(streams.log)


def test_what_a_caller_does_between_deltas_is_ordered_with_the_steps_that_it_makes(engine, streams):
    deltas = engine.stream("It was", PARAMS)
    next(deltas)
    next(deltas)  # of the first step too
    streams.log.clear()
    next(deltas)
    if engine._worker.inline:
        check_order(streams.log)
    deltas.close()


def test_a_stream_is_entered_once_for_many_steps(engine, streams):
    engine.generate("It was", PARAMS)
    streams.log.clear()
    before = engine.metrics()["steps"]
    engine.generate("Once", SamplingParams(max_tokens=30, ignore_eos=True))
    assert engine.metrics()["steps"] - before >= 25
    assert streams.log.count(f"enter {STEPS}") <= 5  # the engine's thread looks again when woken


@pytest.mark.parametrize("threads", ["callers-drive", "own-thread"])
@pytest.mark.parametrize("chosen", [True, False])
def test_every_op_launches_as_the_engine_was_told(folder, streams, threads, chosen):
    seen = set()

    def noting(op):
        def noted(*args, **kwargs):
            seen.add(launch_switch.is_on())
            return op(*args, **kwargs)

        return noted

    with Engine.from_pretrained(folder, device="cpu", dtype="float32") as plain:
        ops = {name: noting(getattr(reference, name)) for name in reference.__all__}
    model = Gemma(plain.config, plain.model.weights, SimpleNamespace(**ops))
    with Engine(model, plain.tokenizer, dependent_launches=chosen) as engine:
        if threads == "own-thread":
            run_as_on_a_gpu(engine)
        engine.generate("It was", PARAMS)
        engine.warmup()
    assert seen == {chosen}
    assert launch_switch.is_on()  # the caller's own launches are as they were


@pytest.mark.parametrize("ending", ["close", "collected"])
def test_no_memory_goes_back_before_the_device_is_done(folder, streams, ending):
    with Engine.from_pretrained(folder, device="cpu", dtype="float32") as first:
        engine = Engine(first.model, first.tokenizer)
    run_as_on_a_gpu(engine)
    deltas = engine.stream("Once", ENDLESS)
    next(deltas)
    streams.log.clear()
    runner = engine._loop.runner
    runner.start_decode = streams.noting("work", runner.start_decode)
    if ending == "close":
        engine.close()
    del engine, deltas
    gc.collect()
    assert streams.log.count("synchronize") == 1
    assert "work in steps" not in streams.log[streams.log.index("synchronize") :]


def test_a_device_that_has_failed_keeps_nobody_from_closing(folder, streams, monkeypatch):
    def fail(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    engine = Engine.from_pretrained(folder, device="cpu", dtype="float32")
    monkeypatch.setattr(Stream, "wait_stream", fail)
    monkeypatch.setattr(Stream, "synchronize", fail)
    assert engine.generate("x", PARAMS).token_ids  # a step on a real device would raise the reason
    engine.close()


def test_on_a_cpu_there_is_no_stream():
    stream = cuda_stream.StepStream(CPU)
    assert stream._stream is None
    with stream.entered():
        stream.wait_for_caller()
        stream.make_caller_wait()
        stream.synchronize()
