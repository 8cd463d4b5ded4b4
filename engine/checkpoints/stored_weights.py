"""A model's tensors as a file of any format holds them, and the filling of Weights from them.

Readers turn a file into a StoredWeight for each checkpoint tensor, known by its header and not yet
read.  `fill_weights` then reads one after another into its rows of the fused matrices: quantised
ones as they are, plain ones quantised on the way where that is asked for.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gemcut.engine.checkpoints.stored_tensors import name_of, row_ranges
from gemcut.engine.checkpoints.weight_files import byte_bar
from gemcut.engine.checks import shorten, warn_caller
from gemcut.engine.config.model_config import ModelConfig
from gemcut.engine.execution.weight_layouts import Layout, Layouts, layout_of
from gemcut.engine.execution.weights import (
    QUANTIZATIONS,
    Weights,
    checkpoint_tensors,
    empty_weights,
    fused_layouts,
    fused_shapes,
    made_layouts,
)
from gemcut.kernels.quantized_weight import Weight, dequantized

__all__ = ["Layout", "StoredWeight", "check_quantization", "fill_weights", "write_tensor"]

PIECE = 2**18  # elements converted at a time, and beside them some of these in float32


@dataclass(frozen=True)
class StoredWeight:
    """One checkpoint tensor in a file."""

    place: str  # file and name, for messages
    shape: tuple[int, ...]
    layout: Layout | None  # None: plain floats
    load: Callable[[], Weight]  # on the CPU, perhaps memory-mapped


def check_quantization(quantization: str | None, config: ModelConfig) -> None:
    """Nothing, or ValueError where the matrices of a model cannot be quantised so."""
    if quantization is None:
        return
    if quantization not in QUANTIZATIONS:
        known = ", ".join(QUANTIZATIONS)
        raise ValueError(f"quantization {shorten(quantization)} is unknown; there are {known}")
    if config.quantization is not None and config.quantization.schemes:
        raise ValueError(
            f"quantization {quantization!r} is for plain checkpoints, and this one is quantised "
            f"already; leave it out"
        )
    shapes = fused_shapes(config)
    for (layer, field), layout in made_layouts(config, quantization).items():
        columns = shapes[layer, field][1]
        if columns % (layout.group_size or 1):
            raise ValueError(
                f"quantization {quantization!r} has groups of {layout.group_size} columns, but "
                f"{field} has {columns}; int8 and fp8 have a scale a row"
            )


def fill_weights(
    config: ModelConfig,
    stored: Mapping[str, StoredWeight],
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    quantization: str | None = None,
    dequantize: bool = False,
) -> Weights:
    """Weights on `device` of the tensors `stored` by their names; others stay unfilled.

    Plain tensors become `dtype`, and with `quantization` the matrices among them are quantised.
    Parts of one fused matrix that are quantised differently become `dtype` too, with a warning;
    with `dequantize` all do.  Beside the weights a quantised tensor is in memory at a time, of a
    plain one a piece.  MemoryError says what they take.
    """
    if dequantize:
        layouts = {}
    elif quantization is None:
        layouts = _stored_layouts(config, stored, dtype)
    else:
        refuse_quantized(stored, quantization)
        layouts = made_layouts(config, quantization)
    try:
        weights = empty_weights(config, device=device, dtype=dtype, layouts=layouts)
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        meant = empty_weights(config, device="meta", dtype=dtype, layouts=layouts)
        raise MemoryError(
            f"the weights take {meant.nbytes / 1e9:.2f} GB, which {device} does not have"
        ) from error
    with byte_bar("quantizing" if quantization else "loading", weights.nbytes) as bar:
        for tensor in checkpoint_tensors(config):
            if tensor.name not in stored:
                continue
            for written in write_tensor(stored[tensor.name], tensor.of(weights)):
                bar.update(written)
    return weights


def write_tensor(
    stored: StoredWeight, target: Weight, layout: Layout | None = None
) -> Iterator[int]:
    """Write a tensor into its place, as that holds it, while the bytes of each piece are yielded.

    layout: that of the place, where it is no longer what it was made with.
    """
    source = stored.load()
    for rows in row_ranges(stored.shape, PIECE):
        yield _fill(target[rows], source[rows], stored.place, layout)


def _stored_layouts(
    config: ModelConfig, stored: Mapping[str, StoredWeight], dtype: torch.dtype
) -> Layouts:
    """The layouts of the fused matrices: those of their parts, where these agree."""
    by_name = {name: weight.layout for name, weight in stored.items()}
    layouts, disagreeing = fused_layouts(config, by_name)
    if disagreeing:
        first, more = stored[disagreeing[0]].place, len(disagreeing) - 1
        warn_caller(
            f"{first} and {more} more are read as {name_of(dtype)}: they are quantised otherwise "
            f"than what is fused with them"
        )
    return layouts


def refuse_quantized(stored: Mapping[str, StoredWeight], quantization: str) -> None:
    """Nothing, or ValueError where a tensor is quantised already."""
    for weight in stored.values():
        if weight.layout is not None:
            raise ValueError(
                f"quantization {quantization!r} is for plain checkpoints, and {weight.place} is "
                f"{weight.layout.format} already; leave it out"
            )


def check_finite(place: str, weight: Tensor) -> None:
    """Nothing, or ValueError where a weight cannot be quantised."""
    if not weight.isfinite().all():
        raise ValueError(f"{place} holds a NaN or an infinity, which cannot be quantised")


def _fill(target: Weight, source: Weight, place: str, layout: Layout | None) -> int:
    """Write rows into their place, as it holds them; the bytes written."""
    if isinstance(target, Tensor):
        is_plain = isinstance(source, Tensor)
        target.copy_(source if is_plain else dequantized(source, target.dtype))
        return target.nbytes
    if isinstance(source, Tensor):
        layout = layout or layout_of(target)
        assert layout is not None
        check_finite(place, source)
        source = layout.quantize(source.to(target.device))
    for there, made in zip(target.tensors, source.tensors, strict=True):
        there.copy_(made)
    return target.nbytes
