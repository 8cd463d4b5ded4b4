"""What follows a choice on the device: the next token, position and end of each slot."""

import pytest
import torch
from accuracy import DEVICE

from gemcut.kernels import reference
from gemcut.kernels.advance import advance_

pytestmark = pytest.mark.usefixtures("poisoned")
INF, NAN = float("inf"), float("nan")


def case(B: int, V: int = 50, slots: int | None = None, seed: int = 0) -> dict[str, torch.Tensor]:
    """B rows in other slots than their own number, some inactive, ended, at their limit, or NaN."""
    torch.manual_seed(seed)
    S = B + 3 if slots is None else slots
    scores = torch.randn(B)
    for i, value in enumerate((INF, -INF, NAN)):
        scores[i::7] = value
    positions = torch.randint(-1, 6, (S,))
    arguments = {
        "chosen": torch.randint(V, (B,)),
        "scores": scores,
        "slots": torch.randperm(S)[:B],
        "tokens": torch.randint(V, (S,)),
        "positions": positions,
        "limits": torch.randint(1, 9, (S,)),
        "is_end": torch.rand(S, V) < 0.2,
    }
    return {name: x.to(DEVICE) for name, x in arguments.items()}


def both(arguments: dict[str, torch.Tensor]) -> None:
    """The kernel writes and returns what its oracle does."""
    twin = {name: x.clone() for name, x in arguments.items()}
    expected = reference.advance_(**twin)
    assert advance_(**arguments).equal(expected)
    for name in ("tokens", "positions"):
        assert arguments[name].equal(twin[name]), name


@pytest.mark.parametrize("B", [1, 5, 40])
def test_matches_its_oracle(B):
    for seed in range(5):
        both(case(B, seed=seed))


@pytest.mark.parametrize("S", [1, 2, 64, 250])
def test_the_greatest_of_several_scores_counts(S):
    """NaN is the greatest of all: a row that has one has nothing to choose."""
    for seed in range(5):
        arguments = case(5, seed=seed)
        scores = torch.randn(S, 5).round(decimals=1)  # with ties
        scores[S // 2, 1], scores[S - 1, 2] = NAN, INF
        scores[:, 3] = -INF
        chosen = torch.randint(50, (S, 5))
        arguments |= {"scores": scores.to(DEVICE), "chosen": chosen.to(DEVICE)}
        both(arguments)


def test_of_equal_scores_the_first_counts():
    arguments = case(1)
    arguments["scores"] = torch.tensor([[1.0], [2.0], [2.0], [-0.0]], device=DEVICE)
    arguments["chosen"] = torch.tensor([[9], [30], [4], [1]], device=DEVICE)
    slot = arguments["slots"].item()
    advance_(**arguments)
    assert arguments["tokens"][slot] == 30


@pytest.mark.parametrize("op", [advance_, reference.advance_], ids=["kernel", "oracle"])
def test_each_rule_by_itself(op):
    def index(*values):
        return torch.tensor(values, device=DEVICE)

    positions, tokens = index(4, 4, 4, -1, 4, 4), index(0, 0, 0, 9, 0, 0)
    is_end = torch.zeros(6, 8, dtype=torch.bool, device=DEVICE)
    is_end[1, 3] = True
    ids = op(
        index(3, 3, 3, 3, 3, 3),
        torch.tensor([1.0, 1.0, NAN, 1.0, 1.0, -INF], device=DEVICE),
        index(0, 1, 2, 3, 4, 5),
        tokens,
        positions,
        index(6, 6, 6, 6, 5, 6),
        is_end,
    )
    # goes on, is an end, chose nothing, was inactive, is at its limit, had all tokens banned
    assert ids.tolist() == [3, 3, -1, -1, 3, -1]
    assert positions.tolist() == [5, -1, -1, -1, -1, -1]
    assert tokens.tolist() == [3] * 6


def test_rows_of_padding_share_a_slot():
    arguments = case(4, slots=5)
    arguments["slots"] = torch.tensor([1, 4, 4, 4], device=DEVICE)
    arguments["positions"][4] = -1
    both(arguments)
    assert arguments["positions"][4] == -1


def test_a_slot_outside_writes_nowhere():
    arguments = case(3)
    arguments["slots"] = torch.tensor([6, -1, 10**9], device=DEVICE)
    before = {name: x.clone() for name, x in arguments.items()}
    assert advance_(**arguments).tolist() == [-1, -1, -1]
    for name in ("tokens", "positions"):
        assert arguments[name].equal(before[name]), name


def test_no_rows():
    assert advance_(**case(0)).shape == (0,)


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("scores", torch.ones(3).bfloat16(), "scores are torch.bfloat16"),
        ("scores", torch.ones(2), r"scores is \[2\], must be \[3\]"),
        ("scores", torch.ones(1, 3), r"scores is \[1, 3\], must be \[3\]"),
        ("chosen", torch.ones(3), "chosen is torch.float32"),
        ("chosen", torch.ones(1, 1, 3).long(), r"chosen is \[1, 1, 3\], must be \[B\] or \[S, B\]"),
        ("chosen", torch.ones(0, 3).long(), "chosen has 0 ranges, must be in 1 to 4096"),
        ("slots", torch.ones(4).long(), r"slots is \[4\], must be \[3\]"),
        ("tokens", torch.ones(6).int(), "tokens is torch.int32"),
        ("positions", torch.ones(5).long(), r"positions is \[5\], must be \[6\]"),
        ("limits", torch.ones(12, device=DEVICE).long()[::2], "must be contiguous"),
        ("is_end", torch.ones(6, 50), "is_end is torch.float32"),
    ],
)
def test_bad_arguments(name, wrong, message):
    with pytest.raises(ValueError, match=message):
        advance_(**case(3) | {name: wrong.to(DEVICE)})
