"""New weights while requests run: what becomes of them, and of what the slots hold."""

import threading

import pytest
import torch
from engines import logits_of, one_line, run_as_on_a_gpu
from random_models import random_model
from torch import Tensor
from updated_engines import PROMPT, bits, make, pair_of

from gemcut.engine import Engine, EngineFault, SamplingParams, weight_updates
from gemcut.engine.weight_updates import WeightUpdate


@pytest.mark.parametrize("late", [False, True], ids=["read at once", "read late"])
def test_no_prefix_of_old_weights_is_reused(late):
    first, second = pair_of()
    with make(first) as engine, make(second) as new:
        for each in (engine, new) if late else ():
            run_as_on_a_gpu(each)
        expected = new.generate(PROMPT, SamplingParams(temperature=0.0, max_tokens=6)).token_ids
        for reused in (0, len(PROMPT) - 1):
            output = engine.generate(PROMPT, SamplingParams(temperature=0.0, max_tokens=6))
            assert output.metrics.reused_prefix_tokens == reused
        engine.update_weights(second.state_dict())
        output = engine.generate(PROMPT, SamplingParams(temperature=0.0, max_tokens=6))
        assert output.metrics.reused_prefix_tokens == 0
        assert output.token_ids == expected


def begun(engine: Engine, count: int = 20) -> None:
    """A request that has two tokens or more."""
    params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
    engine.add(PROMPT, params, request_id="a")
    found = 0
    while found < 2:
        found += sum(len(delta.token_ids) for delta in engine.step())


def finished(engine: Engine) -> dict[str, tuple[int, str | None]]:
    """Tokens and ends of all requests of `add`, from here on."""
    found: dict[str, tuple[int, str | None]] = {}
    while engine.has_work:
        for delta in engine.step():
            count, _ = found.get(delta.request_id, (0, None))
            found[delta.request_id] = count + len(delta.token_ids), delta.finish_reason
    return found


@pytest.mark.parametrize("late", [False, True], ids=["read at once", "read late"])
def test_running_requests_are_refused_ended_or_kept(late):
    first, second = pair_of()
    with make(first) as engine, make(second) as new:
        if late:
            run_as_on_a_gpu(engine)
        begun(engine)
        before = bits(engine)
        with pytest.raises(RuntimeError, match="1 completions run, and would go on") as error:
            engine.update_weights(second.state_dict())
        one_line(error)
        assert bits(engine) == before
        engine.update_weights(second.state_dict(), running="keep")
        assert bits(engine) == bits(new)
        # neither while it runs nor after it has ended is what it holds reused
        params = SamplingParams(temperature=0.0, max_tokens=2)
        engine.add(PROMPT, params, request_id="b")
        ends = finished(engine)
        assert engine.metrics()["reused_tokens"] == 0
        assert ends["a"][1] == "length"
        assert engine.generate(PROMPT, params).metrics.reused_prefix_tokens in (0, 4)
        begun(engine)
        engine.update_weights(first.state_dict(), running="abort")
        assert finished(engine)["a"][1] == "abort"
        assert engine.metrics()["running"] == 0


def test_a_kept_request_goes_on_with_new_weights_over_old_keys():
    first, second = pair_of()
    seen = []

    def keep(generated: list[int], logits: Tensor) -> Tensor:
        seen.append(logits.clone())
        return logits

    with make(first) as engine, make(first) as old, make(second) as new:
        params = SamplingParams(temperature=0.0, max_tokens=9, logits_processors=[keep])
        engine.add(PROMPT, params)
        engine.step()
        text = [*PROMPT, *engine._scheduler.running[0].output_ids]
        engine.update_weights(second.state_dict(), running="keep")
        engine.step()
        # by hand, over the keys of the old model and over those of the new one
        position = torch.tensor([len(text) - 1])
        near = []
        for keys in (old, new):
            keys.model.prefill(torch.tensor(text[:-1]), keys.cache, 0)
            slots = torch.tensor([0])
            hidden = new.model.decode(torch.tensor(text[-1:]), keys.cache, slots, position)
            expected = new.model.logits(hidden)[0]
            near.append((seen[-1] - expected).abs().max() < 1e-4 * expected.abs().max())
        assert near == [True, False]


def test_waiting_requests_are_computed_by_the_new_weights():
    first, second = pair_of()
    params = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)
    with make(first) as engine, make(second) as new:
        engine.add(PROMPT, params)
        engine.update_weights(second.state_dict())
        ids = []
        while engine.has_work:
            ids += [token for delta in engine.step() for token in delta.token_ids]
        assert ids == new.generate(PROMPT, params).token_ids


def test_another_thread_may_update_while_requests_run():
    first, second = pair_of()
    states = first.state_dict(), second.state_dict()
    with make(first) as engine:
        stop, errors = threading.Event(), []

        def update() -> None:
            try:
                for i in range(20):
                    engine.update_weights(states[(i + 1) % 2], running="keep")
            except Exception as error:
                errors.append(error)
            stop.set()

        thread = threading.Thread(target=update)
        thread.start()
        params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
        while not stop.is_set():
            assert len(engine.generate(PROMPT, params).token_ids) == 12
        thread.join()
        assert errors == []
        with make(first, reuse_prefixes=False) as new:
            assert torch.equal(logits_of(engine, PROMPT[1:]), logits_of(new, PROMPT[1:]))


def test_a_score_that_is_ended_is_an_error(monkeypatch):
    first, second = pair_of()
    with make(first, prefill_chunk=2) as engine:
        step, threads = engine._loop.step, []

        def update() -> None:
            engine.update_weights(second.state_dict(), running="abort")

        def step_and_update() -> None:
            step()
            if not threads:
                threads.append(threading.Thread(target=update))
                threads[0].start()
                while not engine._worker._commands:
                    threads[0].join(0.001)

        monkeypatch.setattr(engine._loop, "step", step_and_update)
        with pytest.raises(RuntimeError, match="the text is not scored: its request was aborted"):
            engine.score(PROMPT * 2)
        threads[0].join()
        assert len(engine.score(PROMPT * 2).logprobs) == 9


def test_an_interrupted_update_that_cannot_be_finished_ends_the_engine(monkeypatch):
    (first, second), name = pair_of(), "model.layers.1.self_attn.q_proj.weight"
    with make(first, quantization="int8") as engine:
        state, write = second.state_dict(), WeightUpdate._write_matrix

        def interrupted(self, place, parts):
            write(self, place, parts)
            monkeypatch.setattr(WeightUpdate, "_write_matrix", write)
            raise KeyboardInterrupt

        monkeypatch.setattr(WeightUpdate, "_write_matrix", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.update_weights(state)
        state[name].fill_(torch.nan)  # while the caller still holds what is half written
        with pytest.raises(EngineFault, match=f"{name} holds a NaN"):
            engine.generate(PROMPT)


def test_a_thread_that_ctrl_c_leaves_behind_ends_before_other_weights_come(monkeypatch):
    (first, second), third = pair_of(), random_model("gemma2", seed=2)
    with make(first) as engine, make(third) as new:
        write, compute = WeightUpdate._write_matrix, weight_updates.in_temporary_thread
        left_behind, go_on = [], threading.Event()

        def slow_write(self, place, parts):
            if threading.current_thread() in left_behind:
                go_on.wait()
            write(self, place, parts)

        def interrupted(work):
            if checks.pop():
                return compute(work)
            monkeypatch.setattr(weight_updates, "in_temporary_thread", compute)
            left_behind.append(threading.Thread(target=work))
            left_behind[0].start()
            raise KeyboardInterrupt

        checks = [False, True]  # from the end: the check, and the writing
        monkeypatch.setattr(WeightUpdate, "_write_matrix", slow_write)
        monkeypatch.setattr(weight_updates, "in_temporary_thread", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.update_weights(second.state_dict())
        threading.Timer(0.2, go_on.set).start()
        engine.update_weights(third.state_dict())
        left_behind[0].join()
        assert bits(engine) == bits(new)


def test_a_closed_engine_takes_none():
    first, second = pair_of()
    engine = make(first)
    engine.close()
    with pytest.raises(RuntimeError, match="the engine is closed"):
        engine.update_weights(second.state_dict())
