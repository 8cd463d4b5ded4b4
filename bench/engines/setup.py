"""The model that a benchmark runs: a checkpoint, or a published size with random weights."""

import argparse
import os
from functools import cached_property, partial
from pathlib import Path

import torch

from gemcut.bench.engines.random_model import published_config, random_tokenizer, random_weights
from gemcut.engine.checkpoints.hub import resolve_checkpoint
from gemcut.engine.checkpoints.load import load_checkpoint
from gemcut.engine.checkpoints.stored_weights import StoredWeight, fill_weights
from gemcut.engine.config.model_config import PUBLISHED, ModelConfig
from gemcut.engine.execution.model import Gemma
from gemcut.engine.execution.weights import checkpoint_tensors, empty_weights, made_layouts
from gemcut.engine.memory import free_bytes
from gemcut.engine.placement import choose_device, choose_dtype, choose_ops
from gemcut.kernels import cpu
from gemcut.kernels.cpu_products import packs
from gemcut.tokenizer import Tokenizer


class Setup:
    """A model on a device, loaded when it is first asked for and shared by all contestants.

    `folder` is None where the weights are random: then all contestants share one set of tensors.
    """

    def __init__(
        self,
        name: str,  # as reports have it
        config: ModelConfig,
        device: torch.device,
        dtype: torch.dtype,
        folder: Path | None = None,
    ) -> None:
        self.name, self.config, self.folder = name, config, folder
        self.device, self.dtype = device, dtype
        self._ops = choose_ops("auto", device)
        self._quantized: dict[str, Gemma] = {}

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def whole_config(self) -> ModelConfig:
        """Of the model before layers were cut."""
        return self.config if self.folder is not None else PUBLISHED[self.name]

    @property
    def weight_bytes(self) -> int:
        return self.config.num_parameters() * self.dtype.itemsize

    @cached_property
    def model(self) -> Gemma:
        """MemoryError says how much is missing."""
        require_memory(self.device, {"weights": self.weight_bytes})
        where = {"device": self.device, "dtype": self.dtype}
        if self.folder is None:
            weights = random_weights(self.config, **where)
        else:
            weights = load_checkpoint(self.folder, self.config, **where)
        return Gemma(self.config, weights, self._ops)

    def quantized_model(self, quantization: str | None) -> Gemma:
        """The model with the weights that an engine makes of these; of None the model itself."""
        model = self.model
        if quantization is None:
            return model
        if quantization not in self._quantized:
            stored = {
                tensor.name: StoredWeight(tensor.name, tensor.shape, None, rows)
                for tensor in checkpoint_tensors(self.config)
                for rows in [partial(tensor.of, model.weights)]
            }
            layouts = made_layouts(self.config, quantization)
            where = {"device": self.device, "dtype": self.dtype}
            meant = empty_weights(self.config, device="meta", dtype=self.dtype, layouts=layouts)
            require_memory(self.device, {f"{quantization} weights": meant.nbytes})
            weights = fill_weights(self.config, stored, **where, quantization=quantization)
            self._quantized[quantization] = Gemma(self.config, weights, self._ops)
        return self._quantized[quantization]

    @property
    def packed_bytes(self) -> int:
        """Bytes of `packed_model` beside those of the plain one."""
        shape = self.config.vocab_size, self.config.hidden_size
        return self.weight_bytes if self._ops is cpu and packs(shape, self.dtype) else 0

    def packed_model(self, quantization: str | None = None) -> Gemma:
        """The same as an engine loads it; others share the plain one, and check tokens by it."""
        model = self.quantized_model(quantization)
        if model.ops is not cpu:
            return model
        return Gemma(model.config, model.weights.packed(), model.ops)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        if self.folder is None:
            return random_tokenizer(self.config.vocab_size)
        return Tokenizer.from_file(self.folder)


def require_memory(device: torch.device, needs: dict[str, float]) -> None:
    """MemoryError where the device lacks room for so many bytes."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what torch holds and does not use counts as free
    missing = sum(needs.values()) - free_bytes(device)
    if missing > 0:
        parts = " and ".join(f"{size / 1e9:.3g} GB of {what}" for what, size in needs.items())
        raise MemoryError(f"{missing / 1e9:.3g} GB are missing on {device} for {parts}")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that say which model runs."""
    parser.add_argument("--model", help="demo (the default), a folder or a Hugging Face id")
    parser.add_argument(
        "--random",
        metavar="NAME",
        help=f"random weights instead, without a download: one of {', '.join(PUBLISHED)}",
    )
    parser.add_argument("--layers", type=int, metavar="N", help="cut --random to so many layers")


def choose_setup(arguments: argparse.Namespace) -> Setup:
    """The model asked for, not yet loaded; ValueError names what is wrong."""
    device = choose_device(arguments.device)
    dtype = choose_dtype(arguments.dtype, device)
    if arguments.random is not None:
        if arguments.model is not None:
            raise ValueError(f"--random {arguments.random!r} and --model exclude each other")
        config = published_config(arguments.random, arguments.layers)
        return Setup(arguments.random, config, device, dtype)
    if arguments.layers is not None:
        raise ValueError(f"--layers {arguments.layers} cuts a model of --random, not a checkpoint")
    model = "demo" if arguments.model is None else arguments.model
    folder = resolve_checkpoint(model)
    # of a folder no more than its name: reports are published
    is_folder = os.path.isdir(os.path.expanduser(model))
    name = os.path.basename(os.path.abspath(folder)) if is_folder else model
    return Setup(name, ModelConfig.from_file(folder), device, dtype, folder)
