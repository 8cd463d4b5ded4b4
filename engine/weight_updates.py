"""New weights for an engine in use: all of them checked, then written where the old ones are.

A captured graph reads tensors by their addresses, so each is filled anew in its place: a plain one,
a quantised one, which is quantised as it was before, and the scales of a cache in fp8 that follow
from the weights.  What a CPU reads packed has no graph, and is packed anew, a matrix at a time.

The values are those of an engine that is made of the new weights, bit for bit.
"""

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gemcut.engine.checkpoints.state_dict import Tensors, match_tensors
from gemcut.engine.checkpoints.stored_tensors import pieces
from gemcut.engine.checkpoints.stored_weights import StoredWeight, check_finite, write_tensor
from gemcut.engine.checks import shorten
from gemcut.engine.config.model_config import ModelConfig
from gemcut.engine.execution.cache import KVCache
from gemcut.engine.execution.cache_scales import scales_of
from gemcut.engine.execution.model import Gemma
from gemcut.engine.execution.weight_layouts import Layout
from gemcut.engine.execution.weights import CheckpointTensor, checkpoint_tensors, fused_shapes
from gemcut.engine.placement import in_temporary_thread
from gemcut.kernels.cpu_products import PackedHead, packed, packed_head
from gemcut.kernels.cpu_quantized import PackedInt4
from gemcut.kernels.quantized_weight import GREATEST

RUNNING = ("refuse", "abort", "keep")  # what becomes of requests that run
Place = tuple[int | None, str]  # layer and field of Weights


class WeightUpdate:
    """Tensors for a model, checked by name, shape and dtype; `check` and `write` do the rest."""

    def __init__(
        self,
        model: Gemma,
        tensors: Tensors,
        *,
        partial: bool = False,
        cache: KVCache | None = None,  # whose scales follow from the weights
    ) -> None:
        self._model, self._cache = model, cache
        self._is_begun = False  # the writing
        self._lock = threading.Lock()  # of the thread that reads or writes
        self._stored = match_tensors(tensors, model.config, partial=partial)
        self._layouts = model.weights.layouts
        by_matrix = _by_matrix(model.config, self._stored)
        self._check_memory([self._current(place) for place in by_matrix])
        for place, parts in by_matrix.items():
            layout, missing = self._layouts.get(place), [x for x in parts if not x[1]]
            if layout is not None and layout.has_zero_points:
                raise ValueError(
                    f"tensors: {parts[0][0].name} is held with zero points, which new weights do "
                    f"not get; load the plain checkpoint with quantization="
                )
            if missing and _is_packed(self._current(place), layout):
                raise ValueError(
                    f"tensors: {missing[0][0].name} is missing: on this CPU it is packed with "
                    f"{next(x.name for x, there in parts if there)}, and they come together"
                )

    def _check_memory(self, written: Sequence[Any]) -> None:
        """Nothing, or ValueError where a new tensor is read from what is written before."""
        plain = (x for x in written if isinstance(x, Tensor) and not x.is_mkldnn)
        own = {x.untyped_storage().data_ptr() for x in plain}
        for stored in self._stored.values():
            tensor = stored.load()
            assert isinstance(tensor, Tensor)
            if tensor.untyped_storage().data_ptr() in own:
                raise ValueError(f"tensors: {stored.place} lies in the engine's own; give a clone")

    def check(self) -> None:
        """Nothing, or ValueError where values cannot be quantised; reads what is to be."""
        if not self._is_begun:  # else they may have changed since: what was interrupted must end
            self._compute(self._check_all)

    def write(self) -> None:
        """Write all of them, and the scales; it may be done twice, after an interruption."""
        self._is_begun = True
        self._compute(self._write_all)

    def _compute(self, work: Callable[[], None]) -> None:
        """Do it on a CPU as loading does, in a thread that ends.

        Beside other programs on two cores, Gemma 3 270M in int4 took 122 s in the stepping thread,
        whose helpers spin, and 11 to 15 s so.
        """

        @torch.inference_mode()
        def alone() -> None:
            with self._lock:  # after a thread that a second Ctrl-C has left behind
                work()

        in_temporary_thread(alone) if self._model.device.type == "cpu" else alone()

    def _check_all(self) -> None:
        for tensor in checkpoint_tensors(self._model.config):
            layout = self._layouts.get((tensor.layer, tensor.field))
            if layout is not None and tensor.name in self._stored:
                _check_values(self._stored[tensor.name], layout)

    def _write_all(self) -> None:
        weights = self._model.weights
        by_matrix = _by_matrix(self._model.config, self._stored)
        for place, parts in by_matrix.items():
            self._write_matrix(place, [tensor for tensor, is_there in parts if is_there])
        table = (None, "embedding" if weights.head_table is weights.embedding else "lm_head")
        if isinstance(weights.lm_head, PackedHead) and table in by_matrix:
            weights.lm_head = weights.head_table  # lets go of the old one first
            weights.lm_head = packed_head(weights.lm_head)
        if self._cache is not None:
            _write_scales(self._model, self._cache)

    def _write_matrix(self, place: Place, parts: list[CheckpointTensor]) -> None:
        current, layout = self._current(place), self._layouts.get(place)
        target: Any = current
        if is_packed := _is_packed(current, layout):
            shape, like = fused_shapes(self._model.config)[place], self._model
            if layout is None:
                target = torch.empty(shape, device=like.device, dtype=like.dtype)
            else:
                target = layout.empty(shape, like.device, like.dtype)
        for tensor in parts:
            rows = target[tensor.start : tensor.start + tensor.shape[0]]
            for _ in write_tensor(self._stored[tensor.name], rows, layout):
                pass
        if is_packed:
            setattr(self._owner(place), place[1], packed(target))

    def _current(self, place: Place) -> Any:
        """What holds a matrix, or a vector, now; of a head what is not packed."""
        weights = self._model.weights
        return (
            weights.head_table if place[1] == "lm_head" else getattr(self._owner(place), place[1])
        )

    def _owner(self, place: Place) -> Any:
        weights = self._model.weights
        return weights if place[0] is None else weights.layers[place[0]]


def _by_matrix(
    config: ModelConfig, stored: Mapping[str, StoredWeight]
) -> dict[Place, list[tuple[CheckpointTensor, bool]]]:
    """The parts of each tensor of Weights that gets new values, and whether they are there."""
    places: dict[Place, list[tuple[CheckpointTensor, bool]]] = {}
    for tensor in checkpoint_tensors(config):
        part = tensor, tensor.name in stored
        places.setdefault((tensor.layer, tensor.field), []).append(part)
    return {place: parts for place, parts in places.items() if any(there for _, there in parts)}


def _is_packed(current: Any, layout: Layout | None) -> bool:
    """Whether a CPU reads a matrix in an order of its own, or dequantised."""
    return isinstance(current, PackedInt4) or (
        isinstance(current, Tensor) and (current.is_mkldnn or layout is not None)
    )


def _check_values(stored: StoredWeight, layout: Layout) -> None:
    """Nothing, or ValueError where a plain tensor has numbers that the layout does not hold."""
    tensor = stored.load()
    assert isinstance(tensor, Tensor)
    most = torch.finfo(layout.scales_dtype).max / 2 * GREATEST[layout.format]
    most = min(most, torch.finfo(torch.float32).max)  # it is quantised from that
    for piece in pieces(tensor):
        low, high = torch.aminmax(piece)  # NaN where there is one
        greatest = torch.maximum(-low, high).item()
        if not math.isfinite(greatest):
            check_finite(stored.place, piece)
        if greatest > most:
            raise ValueError(
                f"{stored.place} has numbers up to {greatest:.2g}, too great for scales in "
                f"{layout.scales_dtype}"
            )


def _write_scales(model: Gemma, cache: KVCache) -> None:
    """Write the scales of a cache in fp8 that follow from the weights."""
    for layer, scales in zip(cache.layers, scales_of(model), strict=True):
        for old, new in zip((layer.k_scale, layer.v_scale), scales, strict=True):
            assert old is not None
            old.copy_(new)


def check_running(running: Any, *, scales_change: bool) -> None:
    """Nothing, or ValueError where requests cannot be treated so."""
    if running not in RUNNING:
        raise ValueError(f"running {shorten(running)} is unknown; give {', '.join(RUNNING)}")
    if running == "keep" and scales_change:
        raise ValueError(
            "running 'keep' is not for kv_cache_dtype='fp8': its scales follow from the weights, "
            "and keys that are there would be read by others; give 'refuse' or 'abort'"
        )
