"""Weights quantised on load, and matrices whose parts are quantised in several ways."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from allocations import peak_bytes, resident, tensor_bytes
from random_models import random_model
from saved_models import load, rewrite
from torch import Tensor

from gemcut.engine import Engine
from gemcut.engine.checkpoints import stored_weights
from gemcut.engine.checkpoints.load import load_checkpoint
from gemcut.engine.checkpoints.stored_weights import Layout, StoredWeight, fill_weights
from gemcut.engine.config.model_config import ModelConfig
from gemcut.engine.execution.weights import QUANTIZATIONS, Weights, checkpoint_tensors, plain
from gemcut.kernels.quantized_weight import QuantizedWeight, dequantized, quantize

SIZES = {"hidden_size": 64, "intermediate_size": 96}
MATRICES = ("qkv", "o", "gate_up", "down")
every_format = pytest.mark.parametrize("quantization", QUANTIZATIONS)


@pytest.fixture
def folder(tmp_path) -> Path:
    random_model("gemma3_text", **SIZES).to(torch.bfloat16).save_pretrained(tmp_path)
    return tmp_path


def quantized(folder: Path, quantization: str, dtype: torch.dtype = torch.bfloat16) -> Weights:
    config = ModelConfig.from_file(folder)
    return load_checkpoint(folder, config, device="cpu", dtype=dtype, quantization=quantization)


def assert_same(found: QuantizedWeight, meant: QuantizedWeight) -> None:
    assert (found.format, found.shape, found.group_size) == (
        meant.format,
        meant.shape,
        meant.group_size,
    )
    for a, b in zip(found.tensors, meant.tensors, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@every_format
@pytest.mark.parametrize("piece", [7, 2**18], ids=["a-row-at-a-time", "whole"])
def test_every_matrix_is_what_quantize_makes_of_it(folder, monkeypatch, quantization, piece):
    monkeypatch.setattr(stored_weights, "PIECE", piece)
    exact, weights = load(folder, torch.bfloat16), quantized(folder, quantization)
    assert weights.lm_head is weights.embedding
    assert_same(weights.embedding, quantize(exact.embedding, "int8"))
    assert torch.equal(weights.norm, exact.norm)
    for layer, meant in zip(weights.layers, exact.layers, strict=True):
        for name, whole in vars(meant).items():
            found = getattr(layer, name)
            if name not in MATRICES:
                assert found is whole is None or torch.equal(found, whole)
            elif quantization == "int4":
                assert_same(found, quantize(whole, "int4", 32))
            else:
                assert_same(found, quantize(whole, quantization))


def test_a_weight_stands_for_rows_of_the_dtype_asked_for(folder):
    for dtype in (torch.float32, torch.bfloat16):
        weights = quantized(folder, "int4", dtype)
        assert weights.embedding.dtype == weights.layers[0].down.dtype == dtype
        assert weights.layers[0].down.scales.dtype == torch.bfloat16  # of groups, always
        assert weights.norm.dtype == dtype


def test_weights_move_with_their_dtype_and_stay_tied(folder):
    moved = quantized(folder, "int8").to(torch.device("meta"), torch.float32)
    assert moved.lm_head is moved.embedding
    assert moved.embedding.device.type == "meta"
    assert moved.embedding.dtype == moved.norm.dtype == torch.float32


def test_a_head_of_its_own_is_quantised_too(tmp_path):
    model = random_model("gemma2", tie_word_embeddings=False, **SIZES)
    model.save_pretrained(tmp_path)
    weights = quantized(tmp_path, "int4")
    assert_same(weights.lm_head, quantize(model.lm_head.weight.detach(), "int8"))


def test_only_a_plain_weight_has_elements(folder):
    weights = quantized(folder, "int8")
    with pytest.raises(ValueError, match="the weight is int8: only a plain one has elements"):
        plain(weights.embedding)


# Refusals, before anything is allocated


@pytest.fixture
def nothing_allocated(monkeypatch):
    monkeypatch.setattr(stored_weights, "empty_weights", lambda *a, **k: pytest.fail("allocated"))


def test_columns_that_groups_do_not_divide_are_named(tmp_path, nothing_allocated):
    random_model("gemma2").save_pretrained(tmp_path)
    message = (
        r"quantization 'int4' has groups of 32 columns, but qkv has 48; int8 and fp8 have a scale"
    )
    with pytest.raises(ValueError, match=message):
        quantized(tmp_path, "int4")
    with pytest.raises(ValueError, match=message):
        Engine.from_pretrained(tmp_path, quantization="int4", skip_tokenizer_init=True)


@pytest.mark.parametrize("unknown", ["int2", "gptq", "", 8])
def test_an_unknown_quantization_is_named(folder, nothing_allocated, unknown):
    with pytest.raises(ValueError, match="is unknown; there are int8, int4, fp8"):
        Engine.from_pretrained(folder, quantization=unknown, skip_tokenizer_init=True)


@every_format
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_what_cannot_be_quantised_is_named(folder, quantization, value):
    name = "model.layers.2.self_attn.k_proj.weight"
    rewrite(folder, lambda tensors: tensors[name][3].fill_(value))
    message = f"model.safetensors: {name} holds a NaN or an infinity, which cannot be quantised"
    with pytest.raises(ValueError, match=message):
        quantized(folder, quantization)
    assert load(folder) is not None  # as it is, it loads


# Parts of one matrix


def stored(folder: Path, layouts: dict[str, Layout]) -> dict[str, StoredWeight]:
    """The tensors of a checkpoint, those in `layouts` as if the file had them quantised."""
    weights, config = load(folder), ModelConfig.from_file(folder)

    def weight(name: str, tensor: Tensor) -> StoredWeight:
        layout = layouts.get(name)
        if layout is None:
            return StoredWeight(name, tuple(tensor.shape), None, lambda: tensor)
        return StoredWeight(name, tuple(tensor.shape), layout, lambda: layout.quantize(tensor))

    return {
        each.name: weight(each.name, plain(each.of(weights))) for each in checkpoint_tensors(config)
    }


def test_parts_of_one_layout_stay_and_others_become_floats(folder):
    by_group = Layout("int4", 32, torch.float32)
    names = [f"model.layers.0.self_attn.{x}_proj.weight" for x in "qkv"]
    layouts = dict.fromkeys(names, by_group)
    config = ModelConfig.from_file(folder)
    whole = fill_weights(config, stored(folder, layouts), device="cpu", dtype=torch.float32)
    assert_same(whole.layers[0].qkv, by_group.quantize(load(folder).layers[0].qkv))
    layouts[names[1]] = Layout("int8", 0, torch.float32)
    with pytest.warns(UserWarning, match="q_proj.weight and 2 more are read as float32"):
        mixed = fill_weights(config, stored(folder, layouts), device="cpu", dtype=torch.float32)
    rows = mixed.layers[0].qkv
    assert isinstance(rows, Tensor)
    parts = load(folder).layers[0].qkv.split([64, 32, 32])
    meant = [dequantized(layouts[n].quantize(x)) for n, x in zip(names, parts, strict=True)]
    assert torch.equal(rows, torch.cat(meant))


def test_what_is_quantised_is_not_quantised_again(folder):
    name = "model.layers.1.mlp.down_proj.weight"
    found = stored(folder, {name: Layout("int8", 0, torch.float32)})
    config = ModelConfig.from_file(folder)
    with pytest.raises(ValueError, match=f"{name} is int8 already; leave it out"):
        fill_weights(config, found, device="cpu", dtype=torch.float32, quantization="int4")


# Memory

WIDE = {"hidden_size": 512, "intermediate_size": 4096, "head_dim": 64, "vocab_size": 8192}
WIDE |= {"num_hidden_layers": 6}


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    """A model of 89 MB in bfloat16, 13 MB a layer."""
    folder = tmp_path_factory.mktemp("wide")
    random_model("gemma3_text", **WIDE).to(torch.bfloat16).save_pretrained(folder)
    return folder


def layer_bytes(folder: Path) -> int:
    """Bytes of a layer in float32: what quantising it at once would take."""
    return tensor_bytes(load(folder).layers[0])


@every_format
def test_the_peak_is_the_quantised_size_and_less_than_a_layer(wide, quantization):
    size = tensor_bytes(quantized(wide, quantization))
    file = (wide / "model.safetensors").stat().st_size
    assert size < 0.6 * file
    peak = peak_bytes(lambda: quantized(wide, quantization), aside=file)
    assert size <= peak <= size + layer_bytes(wide)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@every_format
def test_a_process_grows_by_the_quantised_size_and_less_than_a_layer(wide, quantization):
    # a mapping for each tensor: what is freed goes back at once, and does not linger in the heap
    settings = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    settings |= {"MALLOC_MMAP_THRESHOLD_": "131072"}
    done = subprocess.run(
        [sys.executable, "-P", __file__, wide, quantization],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | settings,
    )
    grown, size = map(int, done.stdout.split())
    assert 0.9 * size <= grown <= size + layer_bytes(wide)


def main(folder: str, quantization: str) -> None:
    """Print how much private memory a process takes at most to load, and the size of it."""
    quantize(torch.ones(64, 64), "int4", 32)  # so that torch's own memory is there before
    before, most, done = resident()["RssAnon"], 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.002):
            most = max(most, resident()["RssAnon"])

    watcher = threading.Thread(target=watch)
    watcher.start()
    weights = quantized(Path(folder), quantization)
    done.set()
    watcher.join()
    print(max(most, resident()["RssAnon"]) - before, tensor_bytes(weights))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
