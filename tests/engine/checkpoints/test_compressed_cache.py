"""The scales of a KV cache in fp8 that checkpoints of compressed-tensors hold."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from compressed_checkpoints import SIZES, calibrate_cache_, rewrite_config, save_compressed
from engines import one_line
from random_models import random_model
from saved_models import rewrite
from twins import assert_same_logits, random_ids

from gemcut.engine import Engine
from gemcut.engine.checkpoints import stored_weights
from gemcut.engine.config.model_config import ModelConfig
from gemcut.engine.execution.cache_scales import scales_of

pytest.importorskip("compressed_tensors")

IDS = random_ids(24, 97)
KEYS, VALUES = "model.layers.1.self_attn.k_scale", "model.layers.2.self_attn.v_scale"
NOTE = "the scales of its KV cache are left aside"
by_strategy = pytest.mark.parametrize("strategy", ["tensor", "attn_head"])


def save(folder: Path, strategy: str, schemes=None, model_type="gemma3_text", **options):
    """A calibrated model, saved; it stays calibrated."""
    model = random_model(model_type, **SIZES)
    scheme = calibrate_cache_(model, strategy, IDS)
    save_compressed(folder, model, schemes or {}, cache_scheme=scheme, **options)
    return model


def made(folder: Path, **options) -> Engine:
    options = {"dtype": "float32", "kv_cache_dtype": "fp8", "ops": "reference"} | options
    return Engine.from_pretrained(folder, skip_tokenizer_init=True, prefill_chunk=64, **options)


def scales(folder: Path, **options) -> list[tuple[torch.Tensor, torch.Tensor]]:
    with made(folder, **options) as engine:
        return [(layer.k_scale, layer.v_scale) for layer in engine.cache.layers]


@by_strategy
@pytest.mark.parametrize("model_type", ["gemma", "gemma2", "gemma3_text"])
@pytest.mark.filterwarnings("error")
def test_logits_are_those_of_the_package_s_cache(tmp_path, strategy, model_type):
    """Both round keys and values to the same numbers of e4m3, and nothing warns."""
    model = save(tmp_path, strategy, model_type=model_type)
    with torch.inference_mode():
        expected = model(input_ids=IDS[None], use_cache=True).logits[0]
        with made(tmp_path) as engine:
            hidden = engine.model.prefill(IDS, engine.cache, 0)
            assert_same_logits(engine.model.logits(hidden), expected)


@by_strategy
@pytest.mark.parametrize("schemes", [{}, {"int8": ("Linear",)}], ids=["plain", "int8"])
def test_the_scales_are_those_of_the_files(tmp_path, strategy, schemes):
    model = save(tmp_path, strategy, schemes, dtype=torch.bfloat16)
    for layer, (keys, values) in zip(model.base_model.layers, scales(tmp_path), strict=True):
        for found, stored in ((keys, layer.self_attn.k_scale), (values, layer.self_attn.v_scale)):
            assert found.dtype == torch.float32
            assert torch.equal(found, stored.float().flatten().expand(2))


def test_older_files_name_them_by_the_projections(tmp_path):
    save(tmp_path, "tensor")
    expected = scales(tmp_path)

    def rename(tensors):
        for name in [name for name in tensors if name.endswith("_scale")]:
            place, _, kind = name.rpartition(".")
            tensors[f"{place}.{kind[0]}_proj.output_scale"] = tensors.pop(name)

    rewrite(tmp_path, rename)
    assert all(
        torch.equal(a, b)
        for found, meant in zip(scales(tmp_path), expected, strict=True)
        for a, b in zip(found, meant, strict=True)
    )


def test_the_text_part_of_a_multimodal_checkpoint(tmp_path):
    save(tmp_path, "attn_head", {"int8": ("Linear",)})
    expected = scales(tmp_path)

    def rename(tensors):
        for name in list(tensors):
            tensors[name.replace("model.", "language_model.model.", 1)] = tensors.pop(name)

    rewrite(tmp_path, rename)
    file = tmp_path / "config.json"
    text = json.loads(file.read_text())
    outer = {"quantization_config": text.pop("quantization_config")}
    file.write_text(json.dumps(outer | {"model_type": "gemma3", "text_config": text}))
    assert torch.equal(scales(tmp_path)[3][1], expected[3][1])


# Where they are not taken


def notes(folder: Path, **options) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        made(folder, **options).close()
    return [str(warning.message).removeprefix(f"{folder}: ") for warning in found]


def test_a_cache_of_floats_leaves_them_aside_with_a_note(tmp_path):
    save(tmp_path, "tensor")
    assert notes(tmp_path, kv_cache_dtype="auto") == [NOTE]
    assert notes(tmp_path) == []


@pytest.mark.parametrize(
    "change",
    [{"type": "int"}, {"symmetric": False}, {"dynamic": True}, {"strategy": "group"}],
    ids=str,
)
def test_scales_of_other_kinds_are_left_aside(tmp_path, change):
    save(tmp_path, "tensor")
    rewrite_config(tmp_path, lambda values: values["kv_cache_scheme"].update(change))
    assert notes(tmp_path) == [NOTE]
    assert_bounds(tmp_path)


def test_a_scheme_without_scales_is_said_and_the_bounds_are_taken(tmp_path):
    save(tmp_path, "tensor")
    rewrite(tmp_path, lambda t: [t.pop(name) for name in list(t) if name.endswith("_scale")])
    message = "kv_cache_scheme is there, but no scales of keys and values: those of the weights"
    assert notes(tmp_path)[0].startswith(message)
    assert_bounds(tmp_path)


def assert_bounds(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with made(folder) as engine:
            for layer, bound in zip(engine.cache.layers, scales_of(engine.model), strict=True):
                assert torch.equal(layer.k_scale, bound[0])
                assert torch.equal(layer.v_scale, bound[1])


def test_a_cache_s_scheme_alone_leaves_the_weights_plain(tmp_path):
    save(tmp_path, "tensor")
    assert ModelConfig.from_file(tmp_path).quantization.schemes == ()
    made(tmp_path, quantization="int8").close()


# What is refused


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (KEYS, lambda x: x * 0, r"k_scale is \[0.0\]; scales are finite and above 0"),
        (VALUES, lambda x: -x, r"v_scale is \[-.*; scales are finite and above 0"),
        (VALUES, lambda x: x * float("inf"), r"v_scale is \[inf\]; scales"),
        (KEYS, lambda x: x * float("nan"), r"k_scale is \[nan\]; scales"),
        (KEYS, lambda x: x.expand(2), r"k_scale is \[2\], must be \[1\] \(tensor\)"),
        (KEYS, lambda x: x[:0], r"k_scale is \[0\], must be \[1\]"),
        (KEYS, lambda x: x.int(), "k_scale is I32, must be BF16"),
        (VALUES, None, r"model.layers.2.self_attn.v_scale is missing"),
    ],
)
def test_a_damaged_scale_is_named(tmp_path, monkeypatch, name, change, message):
    save(tmp_path, "tensor")

    def spoil(tensors):
        if change is None:
            del tensors[name]
        else:
            tensors[name] = change(tensors[name]).contiguous()

    rewrite(tmp_path, spoil)
    monkeypatch.setattr(stored_weights, "empty_weights", lambda *a, **k: pytest.fail("allocated"))
    with pytest.raises(ValueError, match=message) as error:
        made(tmp_path)
    one_line(error)


def test_scales_by_head_are_as_many_as_heads(tmp_path):
    save(tmp_path, "attn_head")
    rewrite(tmp_path, lambda tensors: tensors.update({KEYS: torch.ones(3, 1, 1)}))
    with pytest.raises(ValueError, match=r"k_scale is \[3, 1, 1\], must be \[2\] \(attn_head\)"):
        made(tmp_path)


def test_a_scheme_that_is_no_object_is_named(tmp_path):
    save(tmp_path, "tensor")
    rewrite_config(tmp_path, lambda values: values.update(kv_cache_scheme="fp8"))
    with pytest.raises(ValueError, match="kv_cache_scheme 'fp8' is not an object") as error:
        made(tmp_path)
    one_line(error)


def test_the_check_of_files_names_it(tmp_path, run):
    save(tmp_path, "tensor")
    rewrite(tmp_path, lambda tensors: tensors.update({KEYS: torch.zeros(1)}))
    code, out, err = run("info", "--model", str(tmp_path), "--check")
    assert code == 1
    assert "k_scale is [0.0]; scales are finite and above 0" in out + err
