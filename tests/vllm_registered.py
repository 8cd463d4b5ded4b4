"""What gemcut's plugin registers in a vLLM, and its ops' numbers: run by the Python of that vLLM.

    python tests/vllm_registered.py OUTPUT MODEL [CONFIG...]

writes JSON to OUTPUT: what vLLM knows of the VaultGemma in the folder MODEL after it has loaded its
plugins, which classes make its layers, how far our ops are from its own, and how our model refuses
the config.json of each folder CONFIG.
"""

# ruff: noqa: E402
import json
import sys
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoConfig
from vllm import platforms
from vllm.platforms.cpu import CpuPlatform

platforms.current_platform = CpuPlatform()  # in a CUDA build too, before modules take theirs

from vllm import ModelRegistry, envs, ir, plugins
from vllm.config import ModelConfig, VllmConfig, set_current_vllm_config
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers.activation import GeluAndMul
from vllm.model_executor.layers.layernorm import GemmaRMSNorm

from gemcut.engine.adapters.vllm_vaultgemma import check_config

NAME = "VaultGemmaForCausalLM"
SIZES = ((1, 64), (5, 1152), (3, 16384))


def share(actual: Any, expected: Any, op: Any = ir.ops.rms_norm) -> float:
    """The greatest error as a share of what the IR's own tests allow; above 1 is a failure."""
    worst = 0.0
    pairs = (
        zip(actual, expected, strict=True) if isinstance(actual, tuple) else [(actual, expected)]
    )
    for ours, theirs in pairs:
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        tolerance = op.get_tolerance(theirs.dtype)
        allowed = tolerance["atol"] + tolerance["rtol"] * theirs.double().abs()
        worst = max(worst, ((ours.double() - theirs.double()).abs() / allowed).max().item())
    return worst


def of_providers() -> dict[str, float]:
    """The share by op, dtype of rows, dtype of weights, and rows."""
    found = {}
    for op in (ir.ops.rms_norm, ir.ops.fused_add_rms_norm):
        ours, native = op.impls["gemcut"], op.impls["native"]
        for dtype in (torch.float32, torch.bfloat16):
            for num_tokens, hidden_size in SIZES:
                torch.manual_seed(0)
                *rows, weight, epsilon = op.generate_inputs(
                    num_tokens=num_tokens, hidden_size=hidden_size, dtype=dtype
                )
                for name, w in (("own", weight), ("float", weight.float()), ("none", None)):
                    arguments = (*rows, w, epsilon)
                    assert ours.supports_args(*arguments)
                    error = share(ours.func_impl_fn(*arguments), native.impl_fn(*arguments), op)
                    found[f"{op.name} {dtype} {name} {num_tokens}"] = error
        assert not ours.supports_args(*rows, weight, epsilon, 8)
    # an easy mistake: the weight taken as Gemma's checkpoints hold it
    wrong = torch.ops.gemcut.rmsnorm(rows[0], weight, epsilon)
    found["wrong"] = share(wrong, ir.ops.rms_norm.impls["native"].impl_fn(rows[0], weight, epsilon))
    return found


def of_layers() -> dict[str, Any]:
    """The classes that models get, and the share of their results from those of vLLM's own."""
    torch.manual_seed(0)
    x, residual = torch.randn(2, 5, 96), torch.randn(2, 5, 96)
    norm, exact, tanh = GemmaRMSNorm(96), GeluAndMul(), GeluAndMul(approximate="tanh")
    norm.weight.data.normal_()
    heads = torch.randn(5, 200)[:, 8:].unflatten(1, (2, 96))  # of a qkv: no matrix of rows
    native_norm, native_geglu = GemmaRMSNorm.forward_native, GeluAndMul.forward_native
    shares = {
        "add": share(norm(x, residual.clone()), native_norm(norm, x, residual)),
        "norm": share(norm(x), native_norm(norm, x)),
        "heads": share(norm(heads), native_norm(norm, heads)),
        "tanh": share(tanh(x), native_geglu(tanh, x)),
        "exact": share(exact(x), native_geglu(exact, x)),
        "wrong": share(tanh(x), native_geglu(exact, x)),
    }
    names = {"gemma_rms_norm": type(norm).__name__, "gelu_and_mul": type(tanh).__name__}
    return {"classes": names, "shares": shares}


def refusals(folders: Sequence[str]) -> list[str]:
    """The error of each config in a model of our class, or nothing."""
    found = []
    for folder in folders:
        try:
            check_config(AutoConfig.from_pretrained(folder))
            found.append("")
        except ValueError as error:
            found.append(str(error))
    return found


def main(output: str, model: str, *configs: str) -> None:
    """Load the plugins as vLLM does, look, and look again after a second loading."""
    plugins.load_general_plugins()
    found: dict[str, Any] = {"cuda": torch.cuda.is_initialized()}
    found["replaced"] = sorted(op_registry_oot)
    found["hashed"] = "GEMCUT_VLLM_OPS" in envs.compile_factors()
    model_config = ModelConfig(model, skip_tokenizer_init=True)
    cls, _ = ModelRegistry.resolve_model_cls(NAME, model_config)
    found["class"] = f"{cls.__module__}.{cls.__name__}"
    found["packed"] = cls.packed_modules_mapping
    found["pp"] = ModelRegistry.is_pp_supported_model(NAME, model_config)
    found["lora"] = cls.supports_lora
    with set_current_vllm_config(VllmConfig()):
        found["layers"] = of_layers()
    found["providers"] = of_providers()
    found["refusals"] = refusals([model, *configs])
    plugins.plugins_loaded = False
    plugins.load_general_plugins()
    found["replaced again"] = sorted(op_registry_oot)
    with open(output, "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
