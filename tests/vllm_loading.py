"""Whether vLLM's loaders fill our VaultGemma: run by the Python of any vLLM; no model runs.

    python tests/vllm_loading.py FOLDER

builds the model of the folder's config on vLLM's platform for CPUs, in a CUDA build without a GPU
too, loads model.safetensors of the folder, and compares every parameter with the file's.
"""

# ruff: noqa: E402
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from vllm import ModelRegistry, platforms
from vllm.platforms.cpu import CpuPlatform

platforms.current_platform = CpuPlatform()  # in a CUDA build too, before modules take theirs

from vllm.config import ModelConfig, VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.plugins import load_general_plugins

NAME = "VaultGemmaForCausalLM"
PACKED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}


def stored(name: str, tensors: dict[str, Tensor]) -> Tensor:
    """What the file has of a parameter: itself, or those that are packed in it, in their order."""
    for packed, parts in PACKED.items():
        if packed in name:
            return torch.cat([tensors[name.replace(packed, part)] for part in parts])
    return tensors[name]


def main(folder: str) -> None:
    """AssertionError where a parameter is not the file's, or was not reported as loaded."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29613"}
    load_general_plugins()
    config = VllmConfig(ModelConfig(folder, skip_tokenizer_init=True, dtype="float32"))
    tensors = load_file(Path(folder) / "model.safetensors")
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, "env://", 0, "gloo")
        initialize_model_parallel()
        cls, _ = ModelRegistry.resolve_model_cls(NAME, config.model_config)
        assert cls.__module__ == "gemcut.engine.adapters.vllm_vaultgemma"
        torch.set_default_dtype(torch.float32)
        model = cls(vllm_config=config)
    loaded = model.load_weights(tensors.items())
    parameters = dict(model.named_parameters())
    assert set(loaded) == set(parameters), set(loaded) ^ set(parameters)
    used = 0
    for name, parameter in parameters.items():
        expected = stored(name, tensors)
        actual = parameter[: len(expected)]  # tables are padded at their end
        assert torch.equal(actual, expected), name
        used += expected.numel()
    assert used == sum(tensor.numel() for tensor in tensors.values())
    print("loaded", used)


if __name__ == "__main__":
    main(*sys.argv[1:])
