"""The ops in plain torch, which stand for a user's own model, compute what the oracles do."""

import pytest
import torch
from accuracy import assert_accurate
from random_models import MODEL_TYPES, random_config

from gemcut.bench.ops.cases import Grid, Shapes
from gemcut.bench.ops.kernels import model_cases
from gemcut.bench.ops.torch_peers import as_in_a_model
from gemcut.engine.config.model_config import ModelConfig
from gemcut.kernels import reference

GRID = Grid(batches=(1, 3), contexts=(7, 40), tokens=(23,), large_bytes=4096, chunk=9)


def small_cases(model_type, **overrides):
    values = random_config(model_type, **overrides).to_dict()
    config = ModelConfig.from_dict(values)
    return model_cases(Shapes("small", config, torch.device("cpu"), torch.float32), GRID)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_eager_ops_match_the_oracles(model_type):
    for case in small_cases(model_type):
        if case.op != "sample":
            torch.manual_seed(0)  # a case's numbers are its own, whichever cases stand before it
            oracle = getattr(reference, case.op)
            assert_accurate(as_in_a_model(case.op), oracle=oracle, **case.make())


def test_the_eager_draw_has_the_oracle_s_distribution():
    torch.manual_seed(0)
    draws = 20_000
    logits = torch.tensor([2.0, 1.0, 1.5, -1.0, 0.0, 0.5])
    setting = torch.ones(draws)
    arguments = {"temperature": 0.7 * setting, "top_k": 4 * setting.long(), "top_p": 0.9 * setting}
    chosen = as_in_a_model("sample")(logits.expand(draws, -1), **arguments)
    one_row = (arguments["top_k"][:1], arguments["top_p"][:1], None)
    exact = reference.filter_logits(logits[None] / 0.7, *one_row).softmax(-1)[0]
    shares = chosen.bincount(minlength=6) / draws
    assert (shares[exact == 0] == 0).all()
    # five standard deviations of a share
    assert ((shares - exact).abs() <= 5 * (exact * (1 - exact) / draws).sqrt()).all()


def test_the_eager_maximum_is_the_oracle_s():
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(as_in_a_model("sample")(logits), reference.sample(logits))
