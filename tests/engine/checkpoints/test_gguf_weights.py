"""Weights of GGUF files: the layouts of blocks, and logits beside transformers'."""

import warnings

import pytest
import torch
from accuracy import assert_within_budget
from gguf_files import dequantised_state, gguf, model_for_gguf, write_gguf
from real_models import real_file
from transformers import AutoModelForCausalLM, Gemma3TextConfig
from twins import all_logits, random_ids

from gemcut.engine.checkpoints.gguf_config import read_config
from gemcut.engine.checkpoints.gguf_header import read_header
from gemcut.engine.checkpoints.gguf_weights import stored_weights
from gemcut.engine.checkpoints.load import load_checkpoint, load_config
from gemcut.engine.execution.model import Gemma
from gemcut.kernels import reference
from gemcut.kernels.quantized_weight import QuantizedWeight, dequantized, unpack_int4

KINDS = ["Q4_0", "Q8_0", "F16", "BF16", "F32", "Q5_1"]  # the last is not among the layouts here


def gemcut_logits(path, ids, dtype=torch.float32):
    config = load_config(path)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*are read as")
        weights = load_checkpoint(path, config, device="cpu", dtype=dtype)
    return all_logits(Gemma(config, weights, reference), ids)


@torch.inference_mode()
def their_logits(model, ids, dtype):
    logits = model.to(dtype)(ids[None]).logits[0]
    return logits if dtype == torch.float64 else logits.float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model_type", ["gemma", "gemma2", "gemma3_text"])
def test_logits_are_those_of_the_dequantised_file(tmp_path, model_type, kind, dtype):
    model = model_for_gguf(model_type)
    path = write_gguf(tmp_path / "model.gguf", model, kind)
    model.load_state_dict(dequantised_state(path, model))
    ids = random_ids(23, 520)
    exact = their_logits(model, ids, torch.float64)
    model.load_state_dict(dequantised_state(path, model))
    eager = their_logits(model, ids, dtype)
    assert_within_budget("logits", gemcut_logits(path, ids, dtype), eager, exact)


def test_a_head_of_its_own(tmp_path):
    model = model_for_gguf("gemma3_text", tie_word_embeddings=False)
    path = write_gguf(tmp_path / "model.gguf", model, "Q8_0")
    assert not load_config(path).tie_word_embeddings
    model.load_state_dict(dequantised_state(path, model))
    ids = random_ids(9, 520)
    eager, exact = (their_logits(model, ids, x) for x in (torch.float32, torch.float64))
    assert_within_budget("logits", gemcut_logits(path, ids), eager, exact)


@pytest.mark.parametrize("columns", [32, 64, 96, 160], ids=lambda n: f"{n // 32}-blocks")
@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
def test_every_bit_of_a_block_arrives(tmp_path, kind, columns):
    """Random bytes are all values and scales, negative ones and zero too."""
    model = model_for_gguf("gemma", intermediate_size=columns)
    path = write_gguf(tmp_path / "model.gguf", model, kind)
    header = read_header(path)
    tensor = header.tensors["blk.1.ffn_down.weight"]
    generator = torch.Generator().manual_seed(0)
    shape = 64, columns // 32, {"Q4_0": 18, "Q8_0": 34}[kind]
    blocks = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    scales = torch.randn(blocks.shape[:2], generator=generator).half()
    scales[0, 0] = 0
    blocks[..., :2] = scales.unsqueeze(-1).view(torch.uint8)
    content = bytearray(path.read_bytes())
    content[tensor.start : tensor.start + tensor.nbytes] = blocks.numpy().tobytes()
    path.write_bytes(content)

    stored = stored_weights(read_header(path), read_config(header, {}), torch.float32)
    weight = stored["model.layers.1.mlp.down_proj.weight"].load()
    assert isinstance(weight, QuantizedWeight)
    assert weight.format == {"Q4_0": "int4", "Q8_0": "int8"}[kind]
    if kind == "Q4_0":  # columns past the last hold value 0
        assert not unpack_int4(weight.values, 2 * weight.values.shape[1])[:, columns:].any()
    theirs = {x.name: x for x in gguf.GGUFReader(path).tensors}[tensor.name]
    expected = torch.tensor(gguf.dequantize(theirs.data, theirs.tensor_type))
    assert torch.equal(dequantized(weight), expected)


def test_a_norm_keeps_its_bits(tmp_path):
    """1 + w in float32 has all bits of a bfloat16 w but those of the tiniest."""
    model = model_for_gguf("gemma2").to(torch.bfloat16).float()
    path = write_gguf(tmp_path / "model.gguf", model, "F16")
    header = read_header(path)
    stored = stored_weights(header, read_config(header, {}), torch.bfloat16)
    for name, weight in model.state_dict().items():
        if name.endswith("norm.weight"):
            loaded = stored[name].load()
            large = weight.abs() > 2**-15
            assert torch.equal(loaded.bfloat16()[large], weight.bfloat16()[large])
            assert (loaded - weight).abs().max() <= 2**-24


def test_others_are_said_in_one_line(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", model_for_gguf("gemma"), "Q5_1")
    with pytest.warns(
        UserWarning, match=r"^model.gguf: Q5_1 tensors are read as bfloat16"
    ) as found:
        load_checkpoint(path, load_config(path), device="cpu", dtype=torch.bfloat16)
    assert len(found) == 1


def test_floats_can_be_quantised_on_load(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", model_for_gguf("gemma"), "F16")
    weights = load_checkpoint(
        path, load_config(path), device="cpu", dtype=torch.float32, quantization="int8"
    )
    assert isinstance(weights.layers[0].qkv, QuantizedWeight)
    path = write_gguf(tmp_path / "model.gguf", model_for_gguf("gemma"), "Q4_0")
    with pytest.raises(ValueError, match=r"'int8' is for plain checkpoints, .* is int4 already"):
        load_checkpoint(
            path, load_config(path), device="cpu", dtype=torch.float32, quantization="int8"
        )


def test_a_real_file(tmp_path):
    path = real_file("gemma-3-270m-q4_k_m.gguf")
    config = load_config(path)
    values = {name: x for name, x in config.to_dict().items() if name != "dtype"}
    model = AutoModelForCausalLM.from_config(
        Gemma3TextConfig(**values), attn_implementation="eager", dtype=torch.float32
    ).eval()
    model.load_state_dict(dequantised_state(path, model))
    ids = random_ids(40, config.vocab_size)
    eager, exact = (their_logits(model, ids, x) for x in (torch.float32, torch.float64))
    assert_within_budget("logits", gemcut_logits(path, ids), eager, exact)
