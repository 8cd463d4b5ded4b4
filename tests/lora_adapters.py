"""LoRA adapters in folders, made by hand as peft saves them, and what one makes of a matrix."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

PREFIX = "base_model.model."


def write_adapter(folder: Path, tensors: Mapping[str, Tensor], **config: Any) -> Path:
    """An adapter of these tensors; `config` beside what every adapter_config.json has."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8} | config
    (folder / "adapter_config.json").write_text(json.dumps(values))
    save_file({PREFIX + name: x.contiguous() for name, x in tensors.items()}, weights_of(folder))
    return folder


def weights_of(folder: Path) -> Path:
    return folder / "adapter_model.safetensors"


def low_rank(model: Any, *ends: str, r: int = 4, layers: Any = None) -> dict[str, Tensor]:
    """A random A and B for each linear module whose name has one of these ends."""
    generator, found = torch.Generator().manual_seed(3), {}
    for name, module in model.named_modules():
        if not name.endswith(ends) or (layers and f".{layers}." not in name):
            continue
        N, D = module.weight.shape
        found[f"{name}.lora_A.weight"] = 0.3 * torch.randn(r, D, generator=generator)
        found[f"{name}.lora_B.weight"] = 0.3 * torch.randn(N, r, generator=generator)
    return found


def merged(weight: Tensor, down: Tensor, up: Tensor, scaling: float) -> Tensor:
    """W + scaling * B @ A in the dtype of its arguments, element by element of the rank."""
    for r in range(down.shape[0]):
        weight = weight + scaling * up[:, r : r + 1] * down[r : r + 1]
    return weight


def change_tensors(folder: Path, change: Any) -> None:
    """Apply `change` to the dictionary of an adapter's tensors, whose names lack the prefix."""
    read = {name.removeprefix(PREFIX): x for name, x in load_file(weights_of(folder)).items()}
    change(read)
    save_file({PREFIX + name: x.contiguous() for name, x in read.items()}, weights_of(folder))


def change_config(folder: Path, **values: Any) -> None:
    """Set fields of an adapter_config.json."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
