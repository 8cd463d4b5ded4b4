"""Penalties on the device, against the oracle."""

import pytest
import torch
from accuracy import DEVICE, assert_accurate, random

from gemcut.kernels.sampling import penalize

pytestmark = pytest.mark.usefixtures("poisoned")


def penalties(B: int, V: int, counts=torch.int32) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "logits": random(B, V, scale=5),
        "output_counts": (torch.randint(0, 12, (B, V)) - 8).clamp(min=0).to(DEVICE, counts),
        "in_prompt": (torch.rand(B, V) < 0.3).to(DEVICE),
        "repetition": (0.5 + torch.rand(B)).to(DEVICE),
        "presence": random(B),
        "frequency": random(B),
    }


@pytest.mark.parametrize("V", [97, 5000], ids=["one-chunk", "ragged-chunks"])
@pytest.mark.parametrize("counts", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_penalize(counts, V):
    assert_accurate(penalize, **penalties(3, V, counts))


def test_penalize_rows_that_lie_apart():
    arguments = penalties(3, 150)
    whole = penalize(**arguments)
    for name in ("logits", "output_counts", "in_prompt"):
        arguments[name] = arguments[name][:, 3:99]
    assert_accurate(penalize, **arguments)
    assert penalize(**arguments).equal(whole[:, 3:99])


def test_penalize_leaves_bans_and_unseen_tokens():
    arguments = penalties(2, 40)
    arguments["logits"][:, ::2] = -torch.inf
    y = penalize(**arguments)
    assert y[:, ::2].eq(-torch.inf).all()
    unseen = (arguments["output_counts"] == 0) & ~arguments["in_prompt"]
    assert y[unseen].equal(arguments["logits"][unseen])


def test_no_rows():
    assert penalize(**penalties(0, 9)).shape == (0, 9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": random(3, 8).bfloat16()}, "logits are torch.bfloat16"),
        ({"output_counts": random(3, 8)}, "output_counts is torch.float32, must be int64 or int32"),
        ({"output_counts": torch.ones(3, 9).int()}, r"output_counts is \[3, 9\], must be \[M, 8\]"),
        ({"output_counts": torch.ones(2, 8).int()}, "output_counts has 2 rows, the logits 3"),
        ({"in_prompt": torch.ones(3, 8).int()}, "in_prompt is torch.int32, must be torch.bool"),
        ({"in_prompt": torch.ones(8, 3).bool().mT}, r"strides \[1, 3\], the last must be 1"),
        ({"repetition": torch.ones(2)}, r"repetition is \[2\], must be \[3\]"),
        ({"presence": torch.ones(3).int()}, "presence is torch.int32, must be float32"),
        ({"frequency": torch.ones(1, 3)}, r"frequency is \[1, 3\], must be \[3\]"),
    ],
)
def test_bad_input_to_the_penalties(change, message):
    change = {name: x.to(DEVICE) for name, x in change.items()}
    with pytest.raises(ValueError, match=message):
        penalize(**penalties(3, 8) | change)
