"""The layers of the Hub kernel in transformers' models: by hand, and by the package `kernels`."""

import importlib
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from types import MethodType

import pytest
import torch
from accuracy import assert_within_budget
from hub_kernel_users import logits
from random_models import MODEL_TYPES, random_model
from torch import nn

from gemcut.tools.build_hub_kernel import build
from gemcut.tools.hub_kernel import layers

LAYERS = (layers.GemmaRMSNorm, layers.GemmaMLP, layers.RotaryPosEmb, layers.GeluTanh)
TESTS = Path(__file__).parents[1]


def with_forwards(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> int:
    """The layers' forwards put where `kernels` puts them; how many."""
    by_ending = {"RMSNorm": layers.GemmaRMSNorm, "MLP": layers.GemmaMLP}
    count = 0
    for module in model.modules():
        for ending, layer in by_ending.items():
            if type(module).__name__.endswith(ending):
                monkeypatch.setattr(module, "forward", MethodType(layer.forward, module))
                count += 1
    modelling = importlib.import_module(type(model).__module__)
    monkeypatch.setattr(modelling, "apply_rotary_pos_emb", layers.RotaryPosEmb())
    return count


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_model_gives_its_logits_by_the_rule(model_type, monkeypatch):
    model = random_model(model_type)
    eager, exact = logits(model), logits(random_model(model_type).double())
    assert with_forwards(model, monkeypatch) >= 3 * len(model.model.layers) + 1
    assert_within_budget("logits", logits(model), eager, exact)


def test_a_weight_taken_for_one_plus_it_shows(monkeypatch):
    model = random_model("gemma2")
    eager, exact = logits(model), logits(random_model("gemma2").double())
    with_forwards(model, monkeypatch)
    with torch.no_grad():
        model.model.norm.weight -= 1
    with pytest.raises(AssertionError, match="exceeds"):
        assert_within_budget("logits", logits(model), eager, exact)


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_is_pure(layer):
    """What `kernels` demands: no constructor, no member but `forward` and the two flags."""
    assert layer.__init__ is nn.Module.__init__
    own = {name for name, _ in inspect.getmembers(layer)} - {
        name for name, _ in inspect.getmembers(nn.Module)
    }
    assert own == {"can_torch_compile", "has_backward"}
    assert (layer.can_torch_compile, layer.has_backward) == (True, False)


def test_a_model_is_compiled_whole(monkeypatch):
    model = random_model("gemma3_text")
    with_forwards(model, monkeypatch)
    expected = logits(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(logits(compiled), expected)


def test_heads_are_normed_as_they_lie():
    """[B, T, H, K] transposed gives no copy, and strides that are no rows one."""
    norm = nn.Module()
    norm.weight, norm.eps = nn.Parameter(torch.randn(8)), 1e-6
    x = torch.randn(2, 5, 3, 8)
    with torch.no_grad():
        expected = layers.GemmaRMSNorm.forward(norm, x)
        of_heads = layers.GemmaRMSNorm.forward(norm, x.transpose(1, 2))
        assert torch.equal(of_heads.transpose(1, 2), expected)
        assert of_heads.transpose(1, 2).is_contiguous()
        apart = torch.randn(2, 5, 3, 16)[..., ::2].copy_(x)
        for y in (layers.GemmaRMSNorm.forward(norm, apart), layers.GemmaRMSNorm.forward(norm, x)):
            assert torch.equal(y, expected)


def test_rotation_takes_either_order_of_axes():
    q, k, cos, sin = torch.randn(2, 3, 5, 8), torch.randn(2, 1, 5, 8), *torch.randn(2, 2, 5, 8)
    rotary = layers.RotaryPosEmb()
    expected = rotary(q, k, cos, sin)
    turned = rotary(q.transpose(1, 2), k.transpose(1, 2), cos, sin, unsqueeze_dim=2)
    for x, y in zip(turned, expected, strict=True):
        assert torch.equal(x.transpose(1, 2), y)
    with pytest.raises(ValueError, match="unsqueeze_dim is 3, must be 1 or 2"):
        rotary(q, k, cos, sin, 3)


def test_another_activation_is_refused():
    model = random_model("gemma2", hidden_activation="silu")
    mlp = model.model.layers[0].mlp
    with pytest.raises(ValueError, match="activation is SiLUActivation, must be GELUTanh"):
        layers.GemmaMLP.forward(mlp, torch.randn(1, 48))


def run_with_kernels(users: str, folder: Path, **environment: str) -> None:
    """In a process of its own: what is marked or replaced stays so, rotation for every model."""
    build(folder)
    paths = [str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    run = subprocess.run(
        [sys.executable, "-P", str(TESTS / "hub_kernel_users.py"), users, str(folder)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr


def test_the_package_kernels_puts_them_in_and_out(tmp_path):
    pytest.importorskip("kernels", minversion="0.14")
    run_with_kernels("kernelize", tmp_path / "gemcut")


def test_a_lock_file_and_a_version_find_it_in_the_cache(tmp_path):
    pytest.importorskip("kernels", minversion="0.17")
    environment = {"HF_HUB_OFFLINE": "1", "KERNELS_CACHE": str(tmp_path / "cache")}
    run_with_kernels("lock", tmp_path / "gemcut", **environment)


def test_the_python_of_its_page_runs(tmp_path):
    """One program, except what needs a GPU."""
    pytest.importorskip("kernels", minversion="0.14")
    page = (TESTS.parent / "tools" / "hub_kernel" / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    code = "\n".join(b for b in blocks if "cuda" not in b or torch.cuda.is_available())
    build(tmp_path / "gemcut-kernel")
    code += (
        "assert model.model.norm.forward.__module__.startswith('_gemcut_')\nassert len(y) == 4\n"
    )
    command = [sys.executable, "-P", "-c", code]
    on_cpu = os.environ | {"TRITON_INTERPRET": "0"}
    run = subprocess.run(command, cwd=tmp_path, env=on_cpu, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_a_kernel_config_takes_them(tmp_path):
    pytest.importorskip("kernels", minversion="0.17")
    hub_kernels = importlib.import_module("transformers.integrations.hub_kernels")
    if not hub_kernels.is_kernels_available():
        pytest.skip("this transformers takes other versions of kernels")
    kernel_config = importlib.import_module("transformers.utils.kernel_config")
    if not hasattr(kernel_config, "KERNELS_SUPPORTED_DEVICE_TYPES"):
        pytest.skip("this transformers admits no CPU, even when told to")
    run_with_kernels("configure", tmp_path / "gemcut")
