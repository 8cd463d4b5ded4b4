"""quantization_config: what of it is read, and what is refused by name."""

import copy

import pytest

from gemcut.engine.config.model_config import ModelConfig
from gemcut.engine.config.quantization_config import INSTEAD, read_quantization

GOOD = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32},
        }
    },
    "ignore": ["lm_head"],
}


def changed(**values) -> dict:
    """GOOD with other values; those of weights and of the group by their names after _."""
    found = copy.deepcopy(GOOD)
    group = found["config_groups"]["group_0"]
    for name, value in values.items():
        if name.startswith("weights_"):
            group["weights"][name.removeprefix("weights_")] = value
        elif name.startswith("group_"):
            group[name.removeprefix("group_")] = value
        else:
            found[name] = value
    return found


def test_a_config_is_read_and_written_back():
    values = {"model_type": "gemma3_text", "quantization_config": GOOD}
    config = ModelConfig.from_dict(values)
    assert config.quantization is not None
    scheme = config.quantization.scheme_of("model.layers.3.mlp.down_proj.weight")
    assert scheme is not None
    assert (scheme.format, scheme.block, scheme.symmetric) == ("int4", (1, 32), True)
    assert config.quantization.scheme_of("lm_head.weight") is None
    assert config.quantization.scheme_of("model.embed_tokens.weight") is None
    assert config.to_dict()["quantization_config"] == GOOD
    assert ModelConfig.from_dict(config.to_dict()) == config
    assert hash(config) == hash(ModelConfig.from_dict(values))


@pytest.mark.parametrize("nothing", [None, {}])
def test_without_one_nothing_is_quantised(nothing):
    config = ModelConfig.from_dict({"model_type": "gemma", "quantization_config": nothing})
    assert config.quantization is None
    assert "quantization_config" not in config.to_dict()


@pytest.mark.parametrize(
    ("weights", "block"),
    [
        ({"group_size": -1}, (1, 0)),
        ({"group_size": None}, (0, 0)),
        ({"group_size": 128}, (1, 128)),
        ({"strategy": "block", "block_structure": [128, 64], "group_size": None}, (128, 64)),
        ({"strategy": "block", "block_structure": "128x64", "group_size": None}, (128, 64)),
    ],
    ids=str,
)
def test_what_shares_a_scale(weights, block):
    values = changed()
    values["config_groups"]["group_0"]["weights"] = {"num_bits": 8} | weights
    quantization = read_quantization(values)
    assert quantization is not None
    assert quantization.schemes[0].block == block


@pytest.mark.parametrize(
    ("method", "name"),
    [
        ("gptq", "GPTQ"),
        ("awq", "AWQ"),
        ("bitsandbytes", "bitsandbytes"),
        ("torchao", "torchao"),
        ("quanto", "Quanto"),
        ("modelopt", "NVFP4"),
        ("mxfp4", "MXFP4"),
        ("something-new", "something-new"),
        (None, "of no method"),
    ],
)
def test_other_methods_are_refused_by_name_with_what_to_do(method, name):
    with pytest.raises(ValueError, match=name) as error:
        read_quantization(changed(quant_method=method))
    assert str(error.value).endswith(INSTEAD)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (changed(format="nvfp4-pack-quantized"), r"format 'nvfp4-pack-quantized' \(NVFP4\)"),
        (changed(format="mxfp4-pack-quantized"), "MXFP4"),
        (changed(format="marlin-24"), "2:4 sparsity"),
        (changed(format="sparse-24-bitmask"), "2:4 sparsity"),
        (changed(format="dense"), "weights that are not compressed"),
        (changed(format=None), "has format None"),
        (changed(group_format="mxfp8-quantized"), "MXFP8"),
        (changed(sparsity_config={"format": "sparse-24-bitmask"}), "sparsity .* is not read"),
        (changed(transform_config={"config_groups": {}}), "transforms are not read"),
        (changed(quantization_status="frozen"), "quantization_status 'frozen' is not read"),
        (changed(config_groups={}), r"config_groups \{\} is not an object with entries"),
        (changed(config_groups={"W4A16": ["Linear"]}), "W4A16 .* is not an object"),
        (changed(group_targets="Linear"), "targets of group_0 'Linear' is not a list"),
        (changed(group_targets=["re:("]), "'re:\\(' is no pattern"),
        (changed(group_targets=["re:(.*)*(.*)*x$"]), r"x\$' may take forever: it repeats a group"),
        (changed(ignore=["re:" + ".*a" * 5]), "may take forever: .* or more than 4 parts"),
        (changed(ignore=["re:" + "a" * 2000]), "may take forever: .* or is longer than 1000"),
        (changed(ignore=[3]), r"ignore \[3\] is not a list of names"),
        (changed(weights_num_bits=3), "'int' of 3 bits, but int of 4 and 8"),
        (changed(weights_type="float"), "'float' of 4 bits"),
        (changed(weights_symmetric="no"), "symmetric 'no' of group_0"),
        (changed(weights_dynamic=True), "dynamic weights of group_0"),
        (changed(weights_actorder="group"), "in the order of activations"),
        (changed(weights_actorder=["group"]), "in the order of activations"),
        (changed(weights_group_size=0), r"group_size of group_0 0 is outside 1\.\."),
        (changed(weights_group_size="32"), "group_size of group_0 '32' is not an integer"),
        (changed(weights_strategy="tensor_group"), "strategy 'tensor_group' of group_0"),
        (
            changed(weights_strategy="block", weights_block_structure=[128]),
            r"block_structure \[128\]",
        ),
        (
            changed(weights_strategy="block", weights_block_structure=[float("inf"), 128]),
            "block_structure of group_0 inf is not an integer",
        ),
        (
            changed(weights_strategy="block", weights_block_structure=[128.5, 128]),
            "block_structure of group_0 128.5 is not an integer",
        ),
        (
            changed(weights_strategy="block", weights_block_structure="0x128"),
            "block_structure of group_0 0 is outside",
        ),
        (3, "quantization_config 3 is not an object"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_read_is_named(values, message):
    with pytest.raises(ValueError, match=message) as error:
        read_quantization(values)
    assert "\n" not in str(error.value)


def test_an_order_that_is_only_of_calibration_is_read():
    quantization = read_quantization(changed(weights_actorder="weight"))
    assert quantization is not None
    assert len(quantization.schemes) == 1
