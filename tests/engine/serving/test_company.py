"""A request gets the same tokens beside others as alone, and every slot is freed.

Random requests arrive, stop and are cancelled between random steps, through the step interface, so
that an example is the same in every run.
"""

from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec

import pytest
import torch
from accuracy import DEVICE
from engines import run_as_on_a_gpu, save_random_model
from hypothesis import given, settings
from hypothesis import strategies as st

from gemcut.engine import Engine, SamplingParams, StructuredOutputsParams

SLOTS, CHUNK = 3, 7
TEXT = [2, *range(40, 60)]  # what most prompts begin with
# window 5: a prompt of 20 tokens wraps the ring of 13
SETTINGS = [
    {"temperature": 0},
    {"seed": 1},
    {"seed": 2, "top_k": 9, "top_p": 0.8, "min_p": 0.01},
    {"temperature": 0, "repetition_penalty": 1.4, "frequency_penalty": 0.3},
    {"seed": 3, "min_tokens": 3, "logit_bias": {7: 2.0}},
    {"temperature": 0, "prompt_lookup_num_tokens": 5},
    {"seed": 4, "prompt_lookup_num_tokens": 7, "temperature": 0.4},
    {"seed": 5, "logprobs": 1},
    {"seed": 6, "allowed_token_ids": list(range(9, 400, 7))},
    {"seed": 7, "top_k": 20, "bad_words": ["a", "the", "It was"]},
]
if find_spec("llguidance") is not None:
    SETTINGS.append(
        {"seed": 8, "structured_outputs": StructuredOutputsParams(regex="[a-zA-Z ]{500,}")}
    )


@dataclass(frozen=True)
class Job:
    """A request, the step before which it comes, and the step before which it is cancelled."""

    shared: int  # tokens of TEXT that its prompt begins with
    own: tuple[int, ...]
    max_tokens: int
    setting: int
    stops: bool  # at any of a quarter of all tokens
    arrives: int
    cancelled: int | None

    @property
    def prompt(self) -> list[int]:
        return TEXT[: self.shared] + list(self.own)

    def params(self) -> SamplingParams:
        stop_token_ids = list(range(3, 520, 4)) if self.stops else None
        setting = dict(SETTINGS[self.setting])
        setting["min_tokens"] = min(setting.get("min_tokens", 0), self.max_tokens)
        return SamplingParams(
            max_tokens=self.max_tokens, stop_token_ids=stop_token_ids, ignore_eos=True, **setting
        )


def jobs(most_tokens: int):
    return st.builds(
        Job,
        shared=st.integers(1, len(TEXT)),
        own=st.lists(st.integers(4, 519), max_size=12).map(tuple),
        max_tokens=st.integers(1, most_tokens),
        setting=st.integers(0, len(SETTINGS) - 1),
        stops=st.booleans(),
        arrives=st.integers(0, 20),
        cancelled=st.none() | st.integers(1, 30),
    )


class Rig:
    """An engine whose steps a test makes, and another that runs each request alone."""

    def __init__(self, folder, *, late: bool = False, reuse: bool = True, **options) -> None:
        options = {"dtype": "float32", "prefill_chunk": CHUNK, "max_seq_len": 64} | options
        self.engine = Engine.from_pretrained(
            folder, max_batch_size=SLOTS, reuse_prefixes=reuse, **options
        )
        if late:
            run_as_on_a_gpu(self.engine)
        self._alone = Engine.from_pretrained(
            folder, max_batch_size=1, reuse_prefixes=False, **options
        )
        self.alone = lru_cache(maxsize=None)(self._get_alone)

    def _get_alone(self, job: Job) -> list[int]:
        return self._alone.generate(job.prompt, job.params()).token_ids

    def close(self) -> None:
        self.engine.close()
        self._alone.close()

    def run(self, batch: list[Job]) -> dict[int, tuple[list[int], str]]:
        """Tokens and finish_reason of each job."""
        engine, admitted = self.engine, []
        admit = engine._scheduler.admit

        def noted():
            admission = admit()
            if admission is not None:
                admitted.append(int(admission.sequence.request_id))
            return admission

        engine._scheduler.admit = noted
        tokens: dict[int, list[int]] = {i: [] for i in range(len(batch))}
        reasons: dict[int, str] = {}
        arrived: list[int] = []
        cancelled: set[int] = set()
        # a job's chunks and tokens, one after the other, is the longest that all may take
        patience = 31 + sum(len(job.prompt) // CHUNK + 2 + job.max_tokens for job in batch)
        step = 0
        while len(reasons) < len(batch):
            assert step < patience, "someone starves"
            for i, job in enumerate(batch):
                if job.arrives == step:
                    assert engine.add(job.prompt, job.params(), request_id=str(i)) == str(i)
                    arrived.append(i)
                if job.cancelled == step and i in arrived and i not in reasons:
                    try:
                        engine.cancel(str(i))
                    except ValueError:  # it has ended: the next step returns its last delta
                        continue
                    cancelled.add(i)
            for delta in engine.step():
                i = int(delta.request_id)
                assert i not in reasons, "a delta after the last"
                assert delta.error is None
                tokens[i] += delta.token_ids
                if delta.finish_reason is not None:
                    reasons[i] = delta.finish_reason
            step += 1
        engine._scheduler.admit = admit
        self.engine.step()  # what was started before the last one ended is dropped
        assert admitted == [i for i in arrived if i in admitted], "not in the order of arrival"
        assert all(i in admitted for i in arrived if i not in cancelled)
        assert not engine.has_work
        assert engine._scheduler.all() == []
        assert engine._scheduler.free_slots == SLOTS
        assert engine._loop._owners == {}
        return {i: (tokens[i], reasons[i]) for i in tokens}

    def check(self, batch: list[Job]) -> None:
        for i, (tokens, reason) in self.run(batch).items():
            alone = self.alone(batch[i])
            if reason == "abort":
                assert tokens == alone[: len(tokens)]
            else:
                assert tokens == alone
                assert reason == ("length" if len(tokens) == batch[i].max_tokens else "stop") or (
                    batch[i].stops and tokens[-1] % 4 == 3
                )


def rigs(folder, **options):
    rig = Rig(folder, **options)
    yield rig
    rig.close()


@pytest.fixture(scope="module", params=["gemma2", "gemma3_text"])
def small_folder(request, tmp_path_factory, tokenizer_file):
    path = tmp_path_factory.mktemp("model")
    save_random_model(path, tokenizer_file, request.param)
    return path


@pytest.fixture(scope="module", params=["read-at-once", "read-late"])
def rig(small_folder, request):
    yield from rigs(small_folder, ops="reference", device=DEVICE, late=request.param == "read-late")


@settings(max_examples=60)
@given(st.lists(jobs(12), min_size=1, max_size=8))
def test_a_request_gets_what_it_gets_alone(rig, batch):
    """On the oracles, in float32: rounding differs, but by less than any two tokens do here."""
    rig.check(batch)


@pytest.fixture(scope="module", params=["auto"])
def exact_rig(tmp_path_factory, tokenizer_file, request):
    path = tmp_path_factory.mktemp("model")
    save_random_model(path, tokenizer_file, num_hidden_layers=2)
    options = {"ops": "triton", "device": DEVICE, "dtype": "bfloat16"}
    options["kv_cache_dtype"] = request.param
    yield from rigs(path, late=True, reuse=False, **options)


@settings(max_examples=4)
@given(st.lists(jobs(4), min_size=2, max_size=4))
def test_on_the_kernels_it_is_the_same_bit_for_bit(exact_rig, batch):
    """In bfloat16, where logits are so close that another rounding would show."""
    assert torch.bfloat16 == exact_rig.engine.model.dtype
    exact_rig.check(batch)


@pytest.mark.parametrize("exact_rig", ["fp8"], indirect=True)
def test_with_a_cache_in_fp8_it_is_the_same_bit_for_bit(exact_rig):
    """Two prompts of several chunks, one of them with drafts, and one that comes between."""
    assert torch.float8_e4m3fn == exact_rig.engine.cache.layers[0].k.dtype
    drafts = next(i for i, x in enumerate(SETTINGS) if "prompt_lookup_num_tokens" in x)
    exact_rig.check([Job(16, (41, 42), 4, drafts, False, 0, None),
                     Job(9, (77,), 4, 0, False, 1, None),
                     Job(3, (8, 9), 2, 1, False, 2, None)])  # fmt: skip
