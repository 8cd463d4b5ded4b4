"""Loading of a Hugging Face checkpoint: Weights, tokenizer, and a search for non-finite values.

Tensors are copied one at a time out of the memory-mapped file into their rows of the fused ones, so
that the model is in memory once.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from gemcut.engine.checkpoints.huggingface import (
    FLOATS,
    match_headers,
    open_file,
    open_tensors,
    require_files,
)
from gemcut.engine.checkpoints.stored_tensors import pieces
from gemcut.engine.checkpoints.weight_files import byte_bar
from gemcut.engine.config.model_config import ModelConfig
from gemcut.engine.execution.weights import (
    CheckpointTensor,
    Weights,
    checkpoint_tensors,
    empty_weights,
)
from gemcut.tokenizer import Tokenizer
from gemcut.tokenizer.chat import check_template
from gemcut.tokenizer.tokenizer_files import JSON_FILE, MODEL_FILE


def load_checkpoint(
    path: str | Path,
    config: ModelConfig,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    any_head: bool = False,
    new_head: Callable[[str, Tensor], object] | None = None,
) -> Weights:
    """The weights in folder `path`, on `device` in `dtype`; ValueError names what is at fault.

    Expects exactly the tensors of `config`.  Left aside are rotary buffers of old files, and what
    belongs to the vision part of a multimodal Gemma 3; with `any_head`, for models that stop at
    hidden states, heads too.  `new_head` fills a classifier's tensors where the files have none.
    """
    if dtype == torch.float16:
        raise ValueError("dtype float16 is refused: Gemma's activations overflow it; use bfloat16")
    if not dtype.is_floating_point:
        raise ValueError(f"dtype {dtype} is refused: weights are bfloat16 or float32")
    folder = Path(path)
    may_lack = new_head is not None
    stored = match_headers(folder, open_tensors(folder), config, any_head or may_lack, may_lack)
    expected = {tensor.name: tensor for tensor in checkpoint_tensors(config)}
    new = [tensor for name, tensor in expected.items() if name not in stored]

    try:
        weights = empty_weights(config, device=device, dtype=dtype)
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        size = config.num_parameters() * dtype.itemsize
        raise MemoryError(
            f"the weights take {size / 1e9:.2f} GB in {dtype}, which {device} does not have"
        ) from error
    by_file: dict[Path, list[tuple[str, CheckpointTensor]]] = {}
    for name, header in stored.items():
        by_file.setdefault(header.file, []).append((header.key, expected[name]))
    size = sum(torch.Size(x.shape).numel() * FLOATS[x.dtype].itemsize for x in stored.values())
    with byte_bar("loading", size) as bar:
        for file, tensors in by_file.items():
            with open_file(file) as shard:
                for key, tensor in tensors:
                    source, target = shard.get_tensor(key), tensor.of(weights)
                    for piece, place in zip(pieces(source), pieces(target), strict=True):
                        place.copy_(piece)
                        bar.update(piece.nbytes)
    for tensor in new:
        assert new_head is not None
        new_head(tensor.name, tensor.of(weights))
    return weights


def find_nonfinite(path: str | Path) -> list[str]:
    """The names of the tensors in folder `path` that hold a NaN or an infinity."""
    found = []
    for file in require_files(Path(path)):
        with open_file(file) as shard:
            for key in sorted(shard.keys()):
                tensor = shard.get_tensor(key)
                if tensor.is_floating_point() and not all(
                    piece.float().isfinite().all() for piece in pieces(tensor)
                ):
                    found.append(key)
    return found


def load_tokenizer(folder: Path, config: ModelConfig) -> Tokenizer:
    """The tokenizer of a checkpoint, checked with its chat template, before weights are read."""
    if not any((folder / name).is_file() for name in (MODEL_FILE, JSON_FILE)):
        raise ValueError(
            f"{folder} holds neither {MODEL_FILE} nor {JSON_FILE}; with skip_tokenizer_init=True "
            "an engine takes token ids alone"
        )
    tokenizer = Tokenizer.from_file(folder)
    tokenizer.check_embedding(config.vocab_size)
    check_template(tokenizer)
    return tokenizer
