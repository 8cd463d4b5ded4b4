"""Many threads on one engine: each call gets its answer, and no slot or thread is left over."""

import gc
import random
import subprocess
import sys
import threading
import weakref

import pytest
from engines import assert_serves, run_as_on_a_gpu

from gemcut.engine import Engine, QueueFullError, SamplingParams

ENDLESS = SamplingParams(ignore_eos=True)


def engine_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "gemcut"]


@pytest.mark.parametrize("late", [False, True], ids=["read-at-once", "read-late"])
def test_200_requests_from_16_threads_with_random_cancels(folder, late):
    engine = Engine.from_pretrained(folder, max_batch_size=4, prefill_chunk=8, dtype="float32")
    before = set(threading.enumerate())
    if late:
        run_as_on_a_gpu(engine)
    kinds = [
        {"temperature": 0, "max_tokens": 9},
        {"seed": 5, "max_tokens": 30, "top_k": 20},
        {"seed": 6, "max_tokens": 14, "n": 2},
        {"temperature": 0, "max_tokens": 25, "prompt_lookup_num_tokens": 6},
    ]
    prompts = [[2, *range(30, 30 + n)] for n in (1, 6, 20, 41)]
    params = [SamplingParams(ignore_eos=True, **kind) for kind in kinds]
    with Engine(engine.model, engine.tokenizer, max_batch_size=1, reuse_prefixes=False) as alone:
        expected = {
            (p, k): [c.token_ids for c in alone.generate(prompts[p], params[k]).outputs]
            for p in range(4)
            for k in range(4)
        }
    accounts: list[str] = []

    def call(number: int) -> None:
        rng = random.Random(number)
        p, k = rng.randrange(4), rng.randrange(4)
        kind = rng.choice(["generate", "stream", "leave", "score"])
        try:
            if kind == "generate":
                output = engine.generate(prompts[p], params[k])
                assert [c.token_ids for c in output.outputs] == expected[p, k]
            elif kind == "score":
                assert len(engine.score([2, *prompts[p]]).logprobs) == len(prompts[p])
            else:
                tokens = [[] for _ in range(params[k].n)]
                left = rng.randrange(12) if kind == "leave" else 10**9
                for delta in engine.stream(prompts[p], params[k]):
                    tokens[delta.index] += delta.token_ids
                    left -= 1
                    if left < 0:
                        break
                for mine, whole in zip(tokens, expected[p, k], strict=True):
                    assert mine == (whole if kind == "stream" else whole[: len(mine)])
            accounts.append(kind)
        except BaseException as error:
            accounts.append(f"{number} {kind}: {error!r}")

    numbers = iter(range(200))

    def work() -> None:
        for number in numbers:
            call(number)

    lock = threading.Lock()
    numbers = _locked(numbers, lock)
    threads = [threading.Thread(target=work) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert len(accounts) == 200
    assert set(accounts) == {"generate", "stream", "leave", "score"}
    assert_serves(engine)
    assert engine._scheduler.free_slots == 4
    metrics = engine.metrics()
    assert metrics["running"] == metrics["waiting"] == 0
    assert metrics["ended"]["abort"] > 10
    engine.close()
    assert set(threading.enumerate()) <= before


def _locked(numbers, lock):
    while True:
        with lock:
            number = next(numbers, None)
        if number is None:
            return
        yield number


by_stepping_thread = pytest.mark.parametrize(
    "late", [False, True], ids=["callers-drive", "own-thread"]
)


@by_stepping_thread
def test_one_thread_at_most_serves_and_ends_with_the_engine(folder, late):
    before = len(engine_threads())
    engine = Engine.from_pretrained(folder, dtype="float32")
    if late:
        run_as_on_a_gpu(engine)
    assert len(engine_threads()) == before  # none before it has work
    engine.generate("x", SamplingParams(max_tokens=2))
    engine.generate("x", SamplingParams(max_tokens=2))
    own = late or engine.model.device.type == "cuda"
    assert len(engine_threads()) == before + own
    engine.close()
    engine.close()
    assert len(engine_threads()) == before


@by_stepping_thread
def test_an_engine_that_nobody_holds_is_collected_with_its_thread(folder, late):
    before = len(engine_threads())
    engine = Engine.from_pretrained(folder, dtype="float32")
    if late:
        run_as_on_a_gpu(engine)
    stream = engine.stream("x", ENDLESS)
    next(stream)
    cache = weakref.ref(engine.cache)
    del engine, stream
    gc.collect()
    assert len(engine_threads()) == before
    gc.collect()
    assert cache() is None


def test_callers_hand_the_turn_to_each_other(folder):
    """On a CPU the main thread makes the steps while it waits, and then the engine's own thread."""
    with Engine.from_pretrained(folder, max_batch_size=2, dtype="float32") as engine:
        long = SamplingParams(max_tokens=100, ignore_eos=True)
        short = SamplingParams(max_tokens=5, ignore_eos=True)
        lengths: list[int] = []

        def call(params: SamplingParams) -> None:
            lengths.append(len(engine.generate("x", params).token_ids))

        for _ in range(5):
            threads = [threading.Thread(target=call, args=(p,)) for p in (short, long, short)]
            call(short)
            for thread in threads:
                thread.start()
            call(short)  # perhaps beside the engine's thread, perhaps before it
            for thread in threads:
                thread.join(timeout=30)
                assert not thread.is_alive()
        assert sorted(lengths) == [5] * 20 + [100] * 5
        assert_serves(engine)


@pytest.mark.parametrize("ending", ["", "raise SystemExit(3)", "1 / 0"])
def test_a_process_may_end_with_requests_in_flight(ending):
    code = (
        "from gemcut.engine import Engine, SamplingParams\n"
        "engine = Engine.from_pretrained('demo')\n"
        "stream = engine.stream('Once', SamplingParams(ignore_eos=True))\n"
        "print(len([next(stream) for _ in range(3)]))\n" + ending
    )
    run = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=120
    )
    assert run.stdout == "3\n"
    assert run.returncode == {"": 0, "raise SystemExit(3)": 3, "1 / 0": 1}[ending]
    assert "Fatal" not in run.stderr
    assert ("ZeroDivisionError" in run.stderr) == (ending == "1 / 0")


def test_close_ends_requests_that_run_and_that_wait(folder):
    engine = Engine.from_pretrained(folder, max_batch_size=1, dtype="float32")
    errors: list[str] = []

    def call() -> None:
        try:
            engine.generate(["x", "y"], ENDLESS)
        except RuntimeError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    while engine.metrics()["waiting"] < 7:
        pass
    engine.close()
    for thread in threads:
        thread.join(timeout=30)
    assert errors == ["the engine was closed"] * 4


def test_a_full_queue_refuses_all_of_a_call_or_nothing(folder):
    with Engine.from_pretrained(folder, max_batch_size=1, max_waiting=3, dtype="float32") as engine:
        stream = engine.stream("x", ENDLESS)
        next(stream)  # it has the slot
        waiting = [engine.add("x", SamplingParams(max_tokens=2)) for _ in range(2)]
        with pytest.raises(QueueFullError, match=r"2 completions wait .* max_waiting 3"):
            engine.generate(["y", "z"])
        with pytest.raises(QueueFullError, match="and 4 more"):
            next(engine.stream("y", SamplingParams(n=4)))
        with pytest.raises(QueueFullError):
            engine.add("y", SamplingParams(n=2), request_id="refused")
        assert engine.metrics()["waiting"] == 2
        waiting.append(engine.add("y", request_id="refused"))  # it has room, and its id is free
        with pytest.raises(QueueFullError):
            engine.generate("y")
        for request_id in waiting:
            engine.cancel(request_id)
        assert engine.metrics()["waiting"] == 0
        stream.close()
        assert_serves(engine)


def test_where_nobody_may_wait_free_slots_still_serve(folder):
    with Engine.from_pretrained(folder, max_batch_size=2, max_waiting=0, dtype="float32") as engine:
        assert len(engine.generate(["x", "y"], SamplingParams(max_tokens=3))) == 2
        with pytest.raises(QueueFullError):
            engine.generate(["x", "y", "z"])
        assert_serves(engine)


@pytest.mark.parametrize("value", [-1, 1.5, True, "many"])
def test_bad_max_waiting(folder, value):
    with pytest.raises(ValueError, match="max_waiting"):
        Engine.from_pretrained(folder, max_waiting=value, dtype="float32")


def test_a_consumer_that_stops_reading_holds_nothing_up(folder):
    """Its request ends by itself, and what it has not read waits for it."""
    with Engine.from_pretrained(folder, max_batch_size=1, dtype="float32") as engine:
        unread = engine.stream("x", SamplingParams(max_tokens=50, ignore_eos=True))
        next(unread)
        assert engine.generate("y", SamplingParams(max_tokens=3, ignore_eos=True)).token_ids
        assert len(list(unread)) == 49
