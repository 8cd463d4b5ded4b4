"""Saved checkpoints: loaded, compared, changed."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from gemcut.engine.checkpoints.load import load_checkpoint
from gemcut.engine.config.model_config import ModelConfig
from gemcut.engine.execution.weights import Weights, checkpoint_tensors


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Weights:
    return load_checkpoint(folder, ModelConfig.from_file(folder), device="cpu", dtype=dtype)


def all_weights(config: ModelConfig, weights: Weights) -> dict[str, torch.Tensor]:
    return {tensor.name: tensor.of(weights) for tensor in checkpoint_tensors(config)}


def assert_equal(weights: Weights, config: ModelConfig, state: dict[str, torch.Tensor]) -> None:
    ours = all_weights(config, weights)
    assert ours.keys() | {"lm_head.weight"} == state.keys() | {"lm_head.weight"}
    for name, tensor in ours.items():
        assert torch.equal(tensor, state[name]), name
    assert torch.equal(weights.lm_head, state["lm_head.weight"])


def rewrite(folder: Path, change) -> None:
    """Apply `change` to the dictionary of tensors in the folder's file."""
    file = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def snapshot(folder: Path) -> dict[str, bytes]:
    """The bytes of every file in a folder."""
    return {file.name: file.read_bytes() for file in folder.rglob("*")}
