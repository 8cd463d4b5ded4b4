"""Frequencies of every RoPE type against transformers."""

import pytest
import torch
from random_models import random_config, random_model
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from gemcut.engine.config.model_config import ModelConfig, RopeParameters
from gemcut.engine.execution.rope import Rope

HEAD_DIM, MAX_LENGTH = 16, 64
SHORT, LONG = [1.0 + 0.1 * i for i in range(8)], [2.0 + 0.5 * i for i in range(8)]

BY_TYPE = [
    pytest.param({"rope_type": "default"}, id="default"),
    pytest.param({"rope_type": "linear", "factor": 8.0}, id="linear"),
    pytest.param({"rope_type": "dynamic", "factor": 2.0}, id="dynamic"),
    pytest.param(
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, id="yarn"
    ),
    pytest.param(
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 2048,
            "beta_fast": 20.0,
            "beta_slow": 2.0,
            "truncate": False,
        },
        id="yarn-ramp-between-pairs",
    ),
    pytest.param(
        {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 1.3}
        | {"original_max_position_embeddings": 1024},
        id="yarn-mscale",
    ),
    pytest.param(
        {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.25}
        | {"original_max_position_embeddings": 1024},
        id="yarn-attention-factor",
    ),
    pytest.param(
        {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 16},
        id="yarn-factor-from-lengths",
    ),
    pytest.param(
        {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 1024},
        id="yarn-factor-below-one",
    ),
    pytest.param(
        {"rope_type": "yarn", "factor": 4.0, "beta_fast": 0, "mscale": 0, "mscale_all_dim": 1.0}
        | {"original_max_position_embeddings": 1024},
        id="yarn-zero-means-absent",
    ),
    pytest.param(
        {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 1024}
        | {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
        id="llama3",
    ),
    pytest.param(
        {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG}
        | {"original_max_position_embeddings": 16},
        id="longrope",
    ),
    pytest.param(
        {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG, "factor": 3.0}
        | {"original_max_position_embeddings": 16},
        id="longrope-factor",
    ),
    pytest.param(
        {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG}
        | {"original_max_position_embeddings": 1024},
        id="longrope-factor-below-one",
    ),
]


def both(rope: dict) -> tuple[Rope, object]:
    theirs = random_config("gemma2", rope_parameters={"rope_theta": 500.0} | rope)
    config = ModelConfig.from_dict(theirs.to_dict())
    return Rope(config.rope, HEAD_DIM, config.max_position_embeddings, "cpu"), theirs


@pytest.mark.parametrize("rope", BY_TYPE)
@pytest.mark.parametrize("length", [1, 16, 17, 64, 65, 200], ids="length{}".format)
def test_equals_transformers(rope, length):
    ours, theirs = both(rope)
    if rope["rope_type"] == "default":
        expected, scaling = 1.0 / 500.0 ** (torch.arange(0, HEAD_DIM, 2) / HEAD_DIM), 1.0
    else:
        expected, scaling = ROPE_INIT_FUNCTIONS[rope["rope_type"]](theirs, "cpu", seq_len=length)
    if ours.depends_on_length:
        actual = ours.inv_freq(torch.tensor([3, length]))[1]
    else:
        actual = ours.inv_freq()
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=4e-7, atol=0)  # four units in the last place
    assert ours.attention_scaling == pytest.approx(scaling, rel=1e-12)


def test_trained_length_beside_the_rope_object_wins():
    yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 500.0}
    yarn["original_max_position_embeddings"] = 4096
    # a copy: transformers writes into the object it is given
    theirs = random_config(
        "gemma2", rope_parameters=dict(yarn), original_max_position_embeddings=512
    )
    expected, _ = ROPE_INIT_FUNCTIONS["yarn"](theirs, "cpu")
    config = ModelConfig.from_dict(theirs.to_dict() | {"rope_parameters": yarn})
    actual = Rope(config.rope, HEAD_DIM, MAX_LENGTH, "cpu").inv_freq()
    torch.testing.assert_close(actual, expected, rtol=4e-7, atol=0)
    assert ModelConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_rows_follow_a_model_that_grows(rope_type):
    """Decoding past the trained length, a fresh transformers model turns as we do row by row."""
    rope = {"rope_type": "dynamic", "factor": 2.0}
    if rope_type == "longrope":
        rope = {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG}
        rope["original_max_position_embeddings"] = 16
    model = random_model("gemma2", rope_parameters={"rope_theta": 500.0} | rope)
    ours, _ = both(rope)
    lengths = torch.tensor([5, 16, 17, 63, 64, 65, 66, 100, 101])
    frequencies = ours.inv_freq(lengths)
    for length, row in zip(lengths.tolist(), frequencies, strict=True):
        position = torch.tensor([[length - 1]])
        cos, sin = model.model.rotary_emb(torch.zeros(1), position)
        angles = (length - 1) * row
        torch.testing.assert_close(cos[0, 0, :8], angles.cos() * ours.attention_scaling)
        torch.testing.assert_close(sin[0, 0, 8:], angles.sin() * ours.attention_scaling)


def test_dynamic_at_the_trained_length_is_the_default():
    ours, _ = both({"rope_type": "dynamic", "factor": 4.0})
    plain = Rope(RopeParameters(rope_theta=500.0), HEAD_DIM, MAX_LENGTH, "cpu")
    assert torch.equal(ours.inv_freq(torch.tensor([1, MAX_LENGTH]))[1], plain.inv_freq())
    assert not torch.equal(ours.inv_freq(torch.tensor([MAX_LENGTH + 1]))[0], plain.inv_freq())


def test_gemma3_turns_local_and_global_layers_by_their_own_base():
    theirs = random_config(
        "gemma3_text",
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    )
    model = random_model("gemma3_text", rope_parameters=theirs.rope_parameters)
    config = ModelConfig.from_dict(theirs.to_dict())
    for parameters, name in (
        (config.rope, "full_attention"),
        (config.rope_local, "sliding_attention"),
    ):
        expected = getattr(model.model.rotary_emb, f"{name}_inv_freq")
        torch.testing.assert_close(
            Rope(parameters, HEAD_DIM, MAX_LENGTH, "cpu").inv_freq(), expected, rtol=2e-7, atol=0
        )


def test_no_tensor_is_read_back():
    """On the meta device nothing can be read, so a hidden `.item()` or `if` fails."""
    for rope in (
        RopeParameters(rope_type="dynamic", factor=2.0),
        RopeParameters(
            rope_type="longrope",
            short_factor=tuple(SHORT),
            long_factor=tuple(LONG),
            original_max_position_embeddings=16,
        ),
    ):
        lengths = torch.empty(3, dtype=torch.int64, device="meta")
        assert Rope(rope, HEAD_DIM, MAX_LENGTH, "meta").inv_freq(lengths).shape == (3, 8)


def test_length_is_demanded_where_it_matters():
    rope = Rope(RopeParameters(rope_type="dynamic", factor=2.0), HEAD_DIM, MAX_LENGTH, "cpu")
    with pytest.raises(ValueError, match="dynamic needs the length"):
        rope.inv_freq(None)


def test_factors_of_another_head_dim_are_refused():
    rope = RopeParameters(
        rope_type="longrope",
        short_factor=(1.0,) * 8,
        long_factor=(1.0,) * 7,
        original_max_position_embeddings=16,
    )
    with pytest.raises(ValueError, match="long_factor has 7 entries; head_dim 16 needs 8"):
        Rope(rope, HEAD_DIM, MAX_LENGTH, "cpu")
