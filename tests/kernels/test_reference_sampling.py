"""Token choice: what is kept, how often each is drawn, and on what a draw depends."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from gemcut.kernels.reference import filter_logits, gumbel_noise, penalize, sample

V = 50


def random_logits(seed: int, rows: int = 1) -> torch.Tensor:
    return torch.randn(rows, V, generator=torch.Generator().manual_seed(seed))


def draw(logits: torch.Tensor, draws: int, temperature: float = 1.0, seed: int = 0):
    """Many draws from one row of logits [V], at one position after the other."""
    return sample(
        logits.expand(draws, -1),
        torch.full((draws,), temperature),
        seeds=torch.full((draws,), seed),
        positions=torch.arange(draws),
    )


def assert_distributed(drawn: torch.Tensor, probabilities: torch.Tensor) -> None:
    """Pearson's chi-square test at a significance of 1e-6; the draws are the same in every run."""
    observed = drawn.bincount(minlength=len(probabilities)).double()
    expected = probabilities.double() * len(drawn)
    assert expected.min() > 5, "too few draws for the test"
    statistic = ((observed - expected) ** 2 / expected).sum()
    freedom = len(probabilities) - 1
    upper_tail = torch.special.gammaincc(torch.tensor(freedom / 2.0).double(), statistic / 2)
    assert upper_tail > 1e-6, f"chi-square {statistic:.1f} with {freedom} degrees of freedom"


@given(st.integers(0, 2**31), st.integers(0, V), st.floats(0.05, 1.0), st.floats(0.0, 0.5))
def test_kept_tokens_are_those_of_transformers(seed, top_k, top_p, min_p):
    logits = random_logits(seed)
    expected = logits
    for warper in (
        TopKLogitsWarper(top_k or V),
        TopPLogitsWarper(top_p),
        MinPLogitsWarper(min_p),
    ):
        expected = warper(None, expected)
    kept = filter_logits(
        logits, torch.tensor([top_k]), torch.tensor([top_p]), torch.tensor([min_p])
    )
    assert torch.equal(kept, expected)


def test_filters_keep_ties():
    logits = torch.tensor([[3.0, 1.0, 2.0, 2.0, 2.0, 0.0]])
    kept = filter_logits(logits, torch.tensor([2]), None, None)
    assert kept.isfinite().tolist() == [[True, False, True, True, True, False]]


def test_rows_are_filtered_apart():
    """Each row by its own settings, and a row without filters keeps all beside one with them."""
    logits = random_logits(1, rows=3)
    kept = filter_logits(
        logits,
        torch.tensor([0, 4, 0]),
        torch.tensor([1.0, 1.0, 0.5]),
        torch.tensor([0.0, 0.0, 0.0]),
    )
    assert kept[0].equal(logits[0])
    assert kept[1].isfinite().sum() == 4
    assert kept[2:].equal(TopPLogitsWarper(0.5)(None, logits[2:]))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 1e29])
def test_draws_follow_the_softmax(temperature):
    logits = random_logits(2)[0, :12]
    drawn = draw(logits, 40_000, temperature)
    assert_distributed(drawn, (logits / temperature).softmax(-1))


@pytest.mark.parametrize("axis", ["seeds", "positions"])
def test_noise_is_uniform_over_seeds_and_over_positions(axis):
    n = 20_000
    varying, fixed = torch.arange(n), torch.full((n,), 7)
    seeds, positions = (varying, fixed) if axis == "seeds" else (fixed, varying)
    uniform = torch.exp(-torch.exp(-gumbel_noise(seeds, positions, 3).double()))
    for token in range(3):
        assert_distributed((uniform[:, token] * 64).long().clamp(max=63), torch.full((64,), 1 / 64))
    correlation = torch.corrcoef(uniform.T) - torch.eye(3)
    # five standard deviations of the correlation of n independent pairs
    assert correlation.abs().max() < 5 * n**-0.5


def test_noise_is_finite_over_many_draws():
    noise = gumbel_noise(torch.arange(200), torch.arange(200), 10_000)
    assert noise.isfinite().all()
    # 2 million draws should come near the ends of Gumbel's range
    assert noise.min() < -2
    assert noise.max() > 13


def test_the_same_seed_draws_the_same_whatever_the_batch():
    logits = random_logits(3, rows=4)
    temperature = torch.ones(4)
    seeds, positions = torch.tensor([5, 6, 5, 8]), torch.tensor([10, 11, 12, 13])
    together = sample(logits, temperature, seeds=seeds, positions=positions)
    # with filters that keep all: another row's filters must not change this row
    filters = (torch.zeros(4).long(), torch.ones(4), torch.zeros(4))
    filtered = sample(logits, temperature, *filters, seeds=seeds, positions=positions)
    assert filtered.equal(together)
    for row in range(4):
        one = slice(row, row + 1)
        alone = sample(logits[one], temperature[one], seeds=seeds[one], positions=positions[one])
        assert alone.equal(together[one])


def test_another_seed_draws_otherwise():
    logits = torch.zeros(V)
    assert not draw(logits, 64, seed=1).equal(draw(logits, 64, seed=2))
    assert draw(logits, 64, seed=-(2**63)).unique().numel() > 1


def test_greedy_rows_beside_random_ones():
    logits = random_logits(4, rows=2)
    chosen = sample(
        logits,
        torch.tensor([0.0, 1e-30]),  # a temperature so low draws the maximum, without overflow
        seeds=torch.zeros(2).long(),
        positions=torch.zeros(2).long(),
    )
    assert chosen.equal(logits.argmax(-1))
    assert sample(logits).equal(logits.argmax(-1))


def test_temperature_0_is_greedy_by_the_definition_itself():
    """The noise vanishes: nothing about a row's maximum is known, and the lowest id wins a tie."""
    logits = random_logits(4, rows=3)
    logits[1, 7] = logits[1, 30] = 9.0
    logits[2] = torch.tensor([-0.0, 0.0, -torch.inf]).repeat(V)[:V]
    zeros = torch.zeros(3).long()
    assert (logits + 0.0 * gumbel_noise(zeros, zeros, V)).argmax(-1).equal(logits.argmax(-1))
    chosen = sample(logits, torch.zeros(3), seeds=zeros, positions=zeros)
    assert chosen.tolist() == [logits[0].argmax(), 7, 0]


def test_what_cannot_be_compared_counts_as_the_greatest():
    """NaN is chosen, so that the engine sees it; among tokens that are all banned, the first."""
    nan, inf = torch.nan, torch.inf
    logits = torch.tensor([[1.0, nan, 2.0], [-inf, -inf, -inf], [0.0, inf, 1.0]])
    zeros, ones = torch.zeros(3).long(), torch.ones(3)
    for filters in ((), (zeros + 2,), (None, 0.5 * ones), (zeros + 2, 0.5 * ones, 0.1 * ones)):
        assert sample(logits, ones, *filters, seeds=zeros, positions=zeros).tolist() == [1, 0, 1]


def test_repetition_penalty_is_that_of_transformers():
    logits = random_logits(5)
    prompt, output = [3, 8, 8], [8, 20, 20, 20]
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([prompt + output]), logits)
    actual = penalize(logits, *seen(prompt, output), torch.tensor([1.7]), *torch.zeros(2, 1))
    assert actual.equal(expected)


def test_presence_and_frequency_count_the_output_alone():
    logits = random_logits(6)
    actual = penalize(
        logits,
        *seen([3, 8], [8, 20, 20, 20]),
        torch.tensor([1.0]),
        torch.tensor([0.5]),
        torch.tensor([0.25]),
    )
    expected = logits.clone()
    expected[0, 8] -= 0.5 + 0.25
    expected[0, 20] -= 0.5 + 3 * 0.25
    torch.testing.assert_close(actual, expected)


def seen(prompt: list[int], output: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    counts = torch.tensor(output).bincount(minlength=V).int()
    in_prompt = torch.zeros(V, dtype=torch.bool)
    in_prompt[prompt] = True
    return counts[None], in_prompt[None]
