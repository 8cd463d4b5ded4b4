"""Sampling settings: bias, penalties and seeds."""

import torch

from gemcut.engine import Engine, SamplingParams
from gemcut.engine.execution.sampler import FULL
from gemcut.engine.execution.steps import NO_DRAFT

PROMPTS = ["Once upon a time", "It was", "The quick brown fox jumps over the lazy dog. " * 2]
GREEDY = SamplingParams(temperature=0, max_tokens=20)


def test_logit_bias_forces_and_bans(engine):
    best = engine.generate(PROMPTS[0], GREEDY).token_ids[0]
    banned = SamplingParams(temperature=0, max_tokens=20, logit_bias={best: -float("inf")})
    assert best not in engine.generate(PROMPTS[0], banned).token_ids
    forced = SamplingParams(max_tokens=3, logit_bias={77: 100.0})
    assert engine.generate(PROMPTS[0], forced).token_ids == [77] * 3


def test_penalties_spread_tokens(engine):
    fixed = {"temperature": 0, "max_tokens": 40, "ignore_eos": True}
    plain = engine.generate("x", SamplingParams(**fixed)).token_ids
    for penalty in (
        {"repetition_penalty": 5.0},
        {"presence_penalty": 50.0},
        {"frequency_penalty": 50.0},
    ):
        spread = engine.generate("x", SamplingParams(**fixed, **penalty)).token_ids
        assert len(set(spread)) > len(set(plain))
    absolute = SamplingParams(**fixed, presence_penalty=1e6)
    assert len(set(engine.generate("x", absolute).token_ids)) == 40


@torch.inference_mode()
def test_a_step_with_drafts_counts_one_token_of_a_slot_without_one(folder):
    """Penalties must not count what padding samples, beside the draft of another request."""
    with Engine.from_pretrained(folder, max_batch_size=2, dtype="float32", device="cpu") as engine:
        steps = engine._loop.runner.steps
        steps.state.positions[:2] = 3
        steps.state.limits[:2] = 50
        drafts = torch.tensor([[5, 6, 7], [NO_DRAFT] * 3])
        steps.verify(torch.tensor([0, 1]), drafts, FULL)
        assert steps.state.output_counts[1].sum() == 1


def test_a_seed_gives_the_same_text_whatever_else_runs(engine):
    params = SamplingParams(seed=7, max_tokens=30, top_p=0.95, ignore_eos=True)
    alone = engine.generate(PROMPTS[0], params).token_ids
    assert engine.generate(PROMPTS[0], params).token_ids == alone
    others = [
        SamplingParams(max_tokens=25, top_k=5, repetition_penalty=1.2),
        params,
        SamplingParams(max_tokens=11, temperature=0),
        SamplingParams(max_tokens=31, logit_bias={5: 1.0}, min_tokens=3),
    ]
    together = engine.generate([PROMPTS[1], PROMPTS[0], PROMPTS[2], "x"], others)
    assert together[1].token_ids == alone
    unseeded = [engine.generate(PROMPTS[0], SamplingParams(max_tokens=30)) for _ in range(2)]
    assert unseeded[0].token_ids != unseeded[1].token_ids


def test_n_completions_draw_with_successive_seeds(engine):
    params = SamplingParams(n=5, seed=3, max_tokens=12, ignore_eos=True)
    output = engine.generate(PROMPTS[0], params)
    assert [c.index for c in output.outputs] == list(range(5))
    for index, completion in enumerate(output.outputs):
        single = SamplingParams(seed=3 + index, max_tokens=12, ignore_eos=True)
        assert engine.generate(PROMPTS[0], single).token_ids == completion.token_ids
    deltas = list(engine.stream(PROMPTS[0], params))
    for completion in output.outputs:
        mine = [delta.text for delta in deltas if delta.index == completion.index]
        assert "".join(mine) == completion.text


def test_greedy_ignores_the_seed(engine):
    outputs = [
        engine.generate("x", SamplingParams(temperature=0, seed=s, max_tokens=9)) for s in (1, 2)
    ]
    assert outputs[0].token_ids == outputs[1].token_ids
