"""Checkpoints that compressed-tensors makes: their logits are transformers', bad ones are named."""

import json
import re
import warnings
from pathlib import Path

import pytest
import torch
from accuracy import assert_within_budget
from allocations import tensor_bytes
from compressed_checkpoints import (
    SCHEMES,
    compressed_model,
    rewrite_config,
    their_logits,
)
from random_models import MODEL_TYPES
from safetensors.torch import load_file, save_file
from saved_models import load, rewrite
from twins import all_logits, assert_same_logits, load_model, random_ids

from gemcut.engine import AutoModelForCausalLM, Engine
from gemcut.engine.checkpoints import stored_weights
from gemcut.engine.checkpoints.compressed_tensors import _bytes_of, _repacked_int4
from gemcut.engine.checkpoints.load import expected_layouts
from gemcut.engine.config.model_config import ModelConfig
from gemcut.engine.execution.weights import checkpoint_tensors
from gemcut.engine.memory import Build
from gemcut.kernels import reference
from gemcut.kernels.quantized_weight import QuantizedWeight, pack_int4

pytest.importorskip("compressed_tensors")
pytestmark = pytest.mark.filterwarnings("ignore:You passed `quantization_config`")

IDS = random_ids(24, 97)
LINEAR = ("Linear",)
MATRICES = ("qkv", "o", "gate_up", "down")
PLACE = "model.layers.0.self_attn.q_proj.weight"


def ours(folder: Path, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return all_logits(load_model(folder, reference, dtype, "cpu"), IDS)


# What is read


@pytest.mark.parametrize("scheme", SCHEMES)
def test_logits_are_those_of_transformers(tmp_path, scheme):
    compressed_model(tmp_path, {scheme: LINEAR})
    weights = load(tmp_path)
    for layer in weights.layers:
        assert all(isinstance(getattr(layer, name), QuantizedWeight) for name in MATRICES)
    assert_same_logits(ours(tmp_path), their_logits(tmp_path, IDS))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_logits_of_every_family(tmp_path, model_type):
    compressed_model(tmp_path, {"int4-groups-of-32": LINEAR}, model_type)
    assert_same_logits(ours(tmp_path), their_logits(tmp_path, IDS))


@pytest.mark.parametrize("scheme", ["int4-groups-of-32", "int8", "fp8-by-row", "fp8-blocks"])
def test_a_bfloat16_checkpoint_errs_no_more_than_transformers(tmp_path, scheme):
    compressed_model(tmp_path, {scheme: LINEAR}, dtype=torch.bfloat16)
    eager = their_logits(tmp_path, IDS, torch.bfloat16)
    exact = ours(tmp_path, torch.float64)
    assert_within_budget("logits", ours(tmp_path, torch.bfloat16), eager, exact)


def test_a_quantised_head_of_its_own(tmp_path):
    compressed_model(tmp_path, {"int8": LINEAR}, "gemma2", ignore=(), tie_word_embeddings=False)
    weights = load(tmp_path)
    assert isinstance(weights.lm_head, QuantizedWeight)
    assert isinstance(weights.embedding, torch.Tensor)
    assert_same_logits(ours(tmp_path), their_logits(tmp_path, IDS))


def test_several_schemes_by_pattern_name_and_class(tmp_path):
    """A name counts before a pattern, and a pattern before a class, in whatever order they come."""
    schemes = {
        "int8-packed": LINEAR,
        "int4-groups-of-32": (r"re:.*mlp\.(gate|up)_proj$",),
        "int4-groups-of-128": ("model.layers.2.mlp.gate_proj", "model.layers.2.mlp.up_proj"),
    }
    ignore = ("lm_head", r"re:.*layers\.1\.self_attn.*")
    compressed_model(tmp_path, schemes, ignore=ignore)
    layers = load(tmp_path).layers
    assert isinstance(layers[1].qkv, torch.Tensor)
    assert layers[0].qkv.format == layers[1].down.format == "int8"
    assert layers[1].gate_up.format == "int4"
    assert [layers[i].gate_up.group_size for i in (1, 2)] == [32, 128]
    # transformers dequantises by the first scheme alone
    config = ModelConfig.from_file(tmp_path)
    assert config.quantization is not None
    of_name = config.quantization.scheme_of("model.layers.2.mlp.up_proj.weight")
    assert of_name is not None
    assert of_name.block == (1, 128)


def test_parts_that_disagree_are_dequantised_together_with_a_warning(tmp_path):
    ignore = ("lm_head", r"re:.*layers\.0\.self_attn\.v_proj")
    compressed_model(tmp_path, {"int8": LINEAR}, ignore=ignore)
    with pytest.warns(UserWarning, match=r"q_proj.weight and 2 more are read as float32") as found:
        weights = load(tmp_path)
    assert len(found) == 1
    assert isinstance(weights.layers[0].qkv, torch.Tensor)
    assert isinstance(weights.layers[1].qkv, QuantizedWeight)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_same_logits(ours(tmp_path), their_logits(tmp_path, IDS))


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_the_text_part_of_a_multimodal_checkpoint(tmp_path, prefix):
    """As Google's and others' files have it: config and names are nested, the tower is plain."""
    compressed_model(tmp_path, {"int4-groups-of-32": LINEAR})
    expected = ours(tmp_path)

    def rename(tensors):
        for name in list(tensors):
            tensors[name.replace("model.", prefix, 1)] = tensors.pop(name)
        tensors["vision_tower.vision_model.head.weight"] = torch.zeros(2, 2)

    rewrite(tmp_path, rename)
    file = tmp_path / "config.json"
    text = json.loads(file.read_text())
    quantization = text.pop("quantization_config")
    quantization["config_groups"]["group_0"]["targets"] = [rf"re:{re.escape(prefix)}layers.*"]
    quantization["ignore"] = ["re:vision_tower.*", f"{prefix}embed_tokens"]
    outer = {"model_type": "gemma3", "text_config": text, "quantization_config": quantization}
    file.write_text(json.dumps(outer))
    assert torch.equal(ours(tmp_path), expected)


def test_documented_classes_read_it_as_floats(tmp_path):
    compressed_model(tmp_path / "model", {"int4-zero-points": LINEAR})
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", ops="reference")
    logits = model(IDS[None]).logits[0]
    assert_same_logits(logits, their_logits(tmp_path / "model", IDS))
    model.save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved/config.json").read_text())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", ops="reference")
    assert torch.equal(again(IDS[None]).logits[0], logits)


def test_a_nan_in_fp8_is_named(tmp_path):
    compressed_model(tmp_path, {"fp8-by-row": LINEAR})

    def spoil(tensors):
        tensors[PLACE].view(torch.uint8)[3, 5] = 0x7F

    rewrite(tmp_path, spoil)
    with pytest.raises(ValueError, match=f"{PLACE} holds a NaN"):
        load(tmp_path)


def test_what_is_left_aside_is_one_warning_each(tmp_path):
    compressed_model(tmp_path, {"fp8-by-row": LINEAR})

    def change(values):
        activations = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
        values["config_groups"]["group_0"]["input_activations"] = activations
        values["kv_cache_scheme"] = {"num_bits": 8, "type": "float", "strategy": "tensor"}

    rewrite_config(tmp_path, change)
    rewrite(tmp_path, lambda t: t.update({PLACE.replace("weight", "input_scale"): torch.ones(1)}))
    with pytest.warns(UserWarning, match="left aside|not quantised") as found:
        load(tmp_path)
    assert [str(warning.message).removeprefix(f"{tmp_path}: ") for warning in found] == [
        "activations are not quantised here",
        "the scales of its KV cache are left aside",
    ]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_memory_is_what_the_config_says(tmp_path, scheme):
    compressed_model(tmp_path, {scheme: LINEAR}, dtype=torch.bfloat16)
    with Engine.from_pretrained(
        tmp_path, ops="reference", dtype="bfloat16", skip_tokenizer_init=True
    ) as engine:
        device, layouts = engine.model.device, expected_layouts(engine.config, None)
        build = Build(engine.config, device, torch.bfloat16, reference, layouts=layouts)
        meant = build.weight_bytes()
        assert abs(tensor_bytes(engine.model.weights) - meant) <= 0.05 * meant
        assert tensor_bytes(engine.model.weights) == engine.model.weights.nbytes


@pytest.mark.parametrize("columns", [1, 7, 8, 9, 31, 32, 33, 64, 72, 96, 129, 640])
def test_words_of_odd_widths_are_repacked(columns):
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    torch.manual_seed(columns)
    values = torch.randint(-8, 8, (5, columns), dtype=torch.int8)
    assert torch.equal(_repacked_int4(pack_to_int32(values, 4), columns), pack_int4(values))
    values = torch.randint(-128, 128, (5, columns), dtype=torch.int8)
    assert torch.equal(_bytes_of(pack_to_int32(values, 8), columns), values)


# What is refused


@pytest.fixture
def checkpoint(tmp_path, monkeypatch) -> Path:
    """A good one, of which nothing may be allocated."""
    compressed_model(tmp_path, {"int4-zero-points": LINEAR}, num_hidden_layers=2)
    monkeypatch.setattr(stored_weights, "empty_weights", lambda *a, **k: pytest.fail("allocated"))
    return tmp_path


def refusal(folder: Path) -> str:
    with pytest.raises(ValueError, match=r"model\.|config") as error:
        load(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def changed(tensors, suffix: str, change) -> None:
    tensor = tensors[PLACE + suffix]
    tensors[PLACE + suffix] = change(tensor).contiguous()


def spoiled(value: float):
    def spoil(tensor):
        tensor = tensor.clone()
        tensor[3, 1] = value
        return tensor

    return spoil


@pytest.mark.parametrize(
    ("suffix", "change", "message"),
    [
        ("_scale", spoiled(0.0), "holds 0.0; scales are finite and above 0"),
        ("_scale", spoiled(-0.5), "holds -0.5; scales"),
        ("_scale", spoiled(float("inf")), "holds inf; scales"),
        ("_scale", spoiled(float("nan")), "holds nan; scales"),
        ("_scale", lambda t: t[:, :2], r"weight_scale is \[128, 2\], must be \[128, 4\]"),
        ("_scale", lambda t: t.int(), "weight_scale is I32, must be BF16"),
        ("_packed", lambda t: t[:, 1:], r"I32 \[128, 15\], must be I32 \[128, 16\]"),
        ("_packed", lambda t: t.to(torch.int64), r"I64 \[128, 16\], must be I32"),
        ("_zero_point", lambda t: t[1:], r"weight_zero_point is I32 \[15, 4\], must be I32"),
        ("_zero_point", lambda t: t.float(), r"weight_zero_point is \[16, 4\], must be \[128, 4\]"),
        ("_shape", lambda t: t.repeat(10**5), r"weight_shape is \[128, 128, .{,60}\.\.\."),
        ("_shape", lambda t: t + 1, r"weight_shape is \[129, 129\], the config says \[128, 128\]"),
    ],
)
def test_a_damaged_part_is_named(checkpoint, suffix, change, message):
    rewrite(checkpoint, lambda tensors: changed(tensors, suffix, change))
    found = refusal(checkpoint)
    assert re.search(message, found)
    assert PLACE in found


@pytest.mark.parametrize("suffix", ["_packed", "_scale", "_zero_point"])
def test_a_missing_part_is_named(checkpoint, suffix):
    rewrite(checkpoint, lambda tensors: tensors.pop(PLACE + suffix))
    assert f"{PLACE}{suffix} is missing" in refusal(checkpoint)


@pytest.mark.parametrize(
    ("suffix", "message"),
    [("_g_idx", "an order of columns"), ("_global_scale", "NVFP4")],
)
def test_a_part_that_is_not_read_is_named(checkpoint, suffix, message):
    rewrite(checkpoint, lambda tensors: tensors.update({PLACE + suffix: torch.zeros(1)}))
    assert message in refusal(checkpoint)


def test_a_plain_weight_beside_a_packed_one_is_refused(checkpoint):
    rewrite(checkpoint, lambda tensors: tensors.update({PLACE: torch.zeros(128, 128)}))
    assert "are the same weight" in refusal(checkpoint)


def test_zero_points_out_of_range_are_named(checkpoint):
    zero_points = torch.zeros(128, 4, dtype=torch.int8)
    zero_points[5, 2] = 8
    rewrite(checkpoint, lambda t: t.update({f"{PLACE}_zero_point": zero_points}))
    assert "weight_zero_point is outside -8..7" in refusal(checkpoint)


def test_zero_points_of_a_symmetric_scheme_are_zero(checkpoint):
    rewrite_config(
        checkpoint, lambda v: v["config_groups"]["group_0"]["weights"].update(symmetric=True)
    )
    assert "is not zero, but the scheme is symmetric" in refusal(checkpoint)


def test_values_of_4_bits_in_bytes_are_in_range(tmp_path):
    compressed_model(tmp_path, {"int4-unpacked": LINEAR}, num_hidden_layers=1)
    rewrite(tmp_path, lambda tensors: changed(tensors, "", spoiled(9)))
    assert "has values outside -8..7" in refusal(tmp_path)


def test_a_matrix_without_a_scheme_is_named(checkpoint):
    rewrite_config(checkpoint, lambda values: values["ignore"].append(r"re:.*q_proj"))
    assert f"quantization_config has no scheme for {PLACE}" in refusal(checkpoint)


def test_groups_that_do_not_divide_a_row_are_named(checkpoint):
    rewrite_config(
        checkpoint, lambda v: v["config_groups"]["group_0"]["weights"].update(group_size=48)
    )
    assert "128 columns do not divide into groups of 48" in refusal(checkpoint)


def test_a_checkpoint_that_is_quantised_is_quantised_once(checkpoint):
    with pytest.raises(ValueError, match="'int8' is for plain checkpoints, and this one is quant"):
        Engine.from_pretrained(checkpoint, quantization="int8", skip_tokenizer_init=True)


def test_unquantised_tensors_of_other_kinds_are_still_refused(tmp_path):
    compressed_model(tmp_path, {"int8": LINEAR}, num_hidden_layers=1)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file) | {"model.norm.weight": torch.zeros(128, dtype=torch.int8)}
    save_file(tensors, file, metadata={"format": "pt"})
    assert "no scheme for model.norm.weight" in refusal(tmp_path)


def test_every_checkpoint_tensor_has_at_most_one_scheme():
    """The patterns of scheme_of see a module under each name that it may have."""
    values = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "config_groups": {"a": {"targets": ["Embedding"], "weights": {"group_size": -1}}},
        "ignore": None,
    }
    base = {"model_type": "gemma2", "num_hidden_layers": 1}
    config = ModelConfig.from_dict(base | {"quantization_config": values})
    assert config.quantization is not None
    found = [t.name for t in checkpoint_tensors(config) if config.quantization.scheme_of(t.name)]
    assert found == ["model.embed_tokens.weight"]
