"""Scores and log-probabilities are those of transformers."""

import pytest
import torch

from gemcut.engine import Engine, SamplingParams
from gemcut.engine.execution.logprobs import LOGITS_ROWS
from gemcut.kernels import cpu

PROMPTS = ["Once upon a time", "It was", "The quick brown fox jumps over the lazy dog. " * 2]
GREEDY = SamplingParams(temperature=0, max_tokens=20)


def their_logprobs(theirs, ids: list[int]) -> torch.Tensor:
    """Transformers' log P of every token given those before it: [T - 1, V]."""
    with torch.inference_mode():
        return theirs(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)


def test_score_is_transformers_log_probabilities(engine, theirs):
    for text, scored in zip(PROMPTS, engine.score(PROMPTS), strict=True):
        expected = their_logprobs(theirs, scored.token_ids)
        expected = expected.gather(-1, torch.tensor(scored.token_ids[1:])[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(scored.logprobs), expected, rtol=1e-4, atol=1e-4)
        assert scored.perplexity == pytest.approx((-expected.mean()).exp().item(), rel=1e-4)
        assert scored.prompt == text
    assert engine.score(PROMPTS[0]).token_ids == engine.tokenizer.encode(PROMPTS[0])


def test_score_says_whether_a_token_is_the_likeliest(engine):
    answer = engine.generate("Once", GREEDY)
    text = answer.prompt_token_ids + answer.token_ids
    other = [*text[:-1], (text[-1] + 1) % 90]
    as_chosen, one_changed = engine.score([text, other], start=len(answer.prompt_token_ids))
    assert as_chosen.is_greedy == [True] * 20
    assert one_changed.is_greedy == [True] * 19 + [False]


@pytest.mark.parametrize("start", [1, 2, 63, 64, 65, 66, 127, 128])
def test_score_from_a_token_on_is_the_end_of_the_whole(engine, start):
    text = [2, *(5 + i * i % 80 for i in range(128))]
    whole = engine.score(text)
    part = engine.score(text, start=start)
    assert part.token_ids == text
    assert part.is_greedy == whole.is_greedy[start - 1 :]
    assert part.logprobs == pytest.approx(whole.logprobs[start - 1 :], abs=1e-5)


def test_score_never_holds_the_logits_of_a_long_text(folder, monkeypatch):
    rows = []
    lm_head = cpu.lm_head

    def spy(x, weight, softcap):
        rows.append(x.shape[0])
        return lm_head(x, weight, softcap)

    monkeypatch.setattr(cpu, "lm_head", spy)
    with Engine.from_pretrained(folder, dtype="float32") as engine:
        engine.score([[2] + [9] * 127])
        assert sum(rows) == 127
        assert max(rows) <= LOGITS_ROWS
        engine.score([[2] + [9] * 127], start=120)
    assert sum(rows) == 127 + 8


def test_logprobs_are_those_of_transformers(engine, theirs):
    params = SamplingParams(
        max_tokens=10, seed=1, temperature=1.3, logprobs=3, prompt_logprobs=2, logit_bias={9: 2.0}
    )
    output = engine.generate(PROMPTS[0], params)
    ids = output.prompt_token_ids + output.token_ids
    expected = their_logprobs(theirs, ids)
    entries = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
    assert output.prompt_logprobs[0] is None
    assert len(entries) == len(ids) - 1
    total = 0.0
    for position, (entry, token_id) in enumerate(zip(entries, ids[1:], strict=True)):
        row = expected[position]
        top = 2 if position < len(output.prompt_token_ids) - 1 else 3
        assert set(entry) == set(row.topk(top).indices.tolist()) | {token_id}
        for id_, logprob in entry.items():
            assert logprob.logprob == pytest.approx(row[id_].item(), rel=1e-4, abs=1e-4)
            assert logprob.rank == 1 + (row > row[id_]).sum()
            shown = engine.tokenizer.decode([id_], skip_special_tokens=False)
            assert logprob.decoded_token == shown
        if top == 3:
            total += entry[token_id].logprob
    assert output.outputs[0].cumulative_logprob == pytest.approx(total)
    streamed = [entry for delta in engine.stream(PROMPTS[0], params) for entry in delta.logprobs]
    assert streamed == output.outputs[0].logprobs


def test_logprobs_are_absent_unless_asked_for(engine):
    output = engine.generate("x", GREEDY)
    assert output.prompt_logprobs is None
    assert output.outputs[0].logprobs is None
    assert output.outputs[0].cumulative_logprob is None
