"""Quantised matrices in safetensors files, as the package compressed-tensors stores them.

    X.weight_packed     int32 [N, ceil(D * bits / 32)]: values + 2 ** (bits - 1), the first lowest
    X.weight_shape      N and D of it
    X.weight            int8 or float8_e4m3fn [N, D], where it is not packed
    X.weight_scale      of the tensor [1], each row [N, 1], groups [N, G] or blocks [rows, columns]
    X.weight_zero_point as the scales, or int32 with the values of a column packed as above

quantization_config says which it is (config/quantization_config.py).  They go into the layout of
kernels/quantized_weight.py without a detour through floats.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gemcut.engine.checkpoints.safetensor_headers import FLOATS, TensorHeader
from gemcut.engine.checkpoints.stored_weights import Layout
from gemcut.engine.checks import shorten
from gemcut.engine.config.model_config import ModelConfig
from gemcut.engine.config.quantization_config import INSTEAD, Scheme
from gemcut.engine.execution.weight_layouts import Layouts
from gemcut.engine.execution.weights import CheckpointTensor, checkpoint_tensors, fused_layouts
from gemcut.kernels.quantized_weight import FEWEST, QuantizedWeight, pack_int4, packed_width

_PART = re.compile(r"(.*\.weight)(_packed|_shape|_scale|_zero_point|_g_idx|_global_scale)")
# of activations and of the cache
_LEFT_ASIDE = re.compile(
    r"\.((in|out)put_(scale|zero_point|global_scale)|[qkv]_(scale|zero_point))$"
)
_DTYPES = {"int8": "I8", "int4": "I8", "fp8": "F8_E4M3"}
ROWS = 2**12  # repacked at a time


@dataclass(frozen=True)
class QuantizedHeader:
    """A quantised matrix [N, D], by the headers of its parts."""

    shape: tuple[int, int]
    scheme: Scheme
    values: TensorHeader
    scales: TensorHeader
    zero_points: TensorHeader | None
    count: int  # of the parts

    def __str__(self) -> str:
        return str(self.values)

    @property
    def layout(self) -> Layout:
        """Its layout in memory."""
        return layout_of_scheme(self.scheme, self.shape[1], FLOATS[self.scales.dtype])

    def load(self) -> QuantizedWeight:
        """The matrix, in the kernels' layout."""
        values, scheme, D = self.values.load(), self.scheme, self.shape[1]
        if scheme.is_packed:
            repack = _repacked_int4 if scheme.num_bits == 4 else _bytes_of
            values = torch.cat([repack(rows, D) for rows in values.split(ROWS)])
        elif scheme.format == "int4":
            if values.min() < -8 or values.max() > 7:
                raise ValueError(f"{self.values} has values outside -8..7")
            values = pack_int4(values)
        elif scheme.format == "fp8" and (values.view(torch.uint8) & 127 == 127).any():
            raise ValueError(f"{self.values} holds a NaN")
        scales = _expanded(self.scales.load(), scheme, self.shape).to(self.layout.scales_dtype)
        zero_points = None
        if self.layout.has_zero_points:
            zero_points = _expanded(self._stored_zero_points(), scheme, self.shape).to(scales.dtype)
        return QuantizedWeight(values, scales, zero_points, D, torch.bfloat16)

    def check(self) -> None:
        """Nothing, or ValueError where shapes, scales or zero points are not what they must be."""
        (N, D), scheme = self.shape, self.scheme
        width = math.ceil(D * scheme.num_bits / 32) if scheme.is_packed else D
        dtype = "I32" if scheme.is_packed else _DTYPES[scheme.format]
        _check_header(self.values, dtype, (N, width))
        check_floats(self.scales)
        try:
            self.layout.groups(D)
        except ValueError as error:
            raise ValueError(f"{self.values}: {error}") from None
        _check_count(self.scales, scheme, self.shape)
        scales = self.scales.load().float()
        if not (scales.isfinite() & (scales > 0)).all():
            bad = scales[~(scales.isfinite() & (scales > 0))][0].item()
            raise ValueError(f"{self.scales} holds {bad}; scales are finite and above 0")
        if self.zero_points is not None:
            self._check_zero_points(self.zero_points)

    def _check_zero_points(self, header: TensorHeader) -> None:
        bits = self.scheme.num_bits
        if header.dtype == "I32" and self.scheme.is_packed:
            G = math.prod(_scale_shape(self.scheme, self.shape)[1:])
            _check_header(header, "I32", (math.ceil(self.shape[0] * bits / 32), G))
        else:
            _check_count(header, self.scheme, self.shape)
            if header.dtype != "I8":
                raise ValueError(f"{header} is {header.dtype}, must be I8")
        zero_points, limit = self._stored_zero_points().int(), 2 ** (bits - 1)
        if zero_points.min() < -limit or zero_points.max() >= limit:
            raise ValueError(f"{header} is outside {-limit}..{limit - 1}")
        if self.scheme.symmetric and zero_points.any():
            raise ValueError(f"{header} is not zero, but the scheme is symmetric")

    def _stored_zero_points(self) -> Tensor:
        """Whole numbers, as many as there are scales."""
        assert self.zero_points is not None
        stored = self.zero_points.load()
        if stored.dtype != torch.int32:
            return stored
        columns, N = stored.T.contiguous(), self.shape[0]
        if self.scheme.num_bits == 8:
            return _bytes_of(columns, N).T
        return (_nibbles(columns)[:, :N].to(torch.int8) - 8).T


def gather(
    stored: Mapping[str, TensorHeader],
    config: ModelConfig,
    expected: Mapping[str, CheckpointTensor],
) -> dict[str, TensorHeader | QuantizedHeader]:
    """The tensors of a checkpoint with the parts of each quantised matrix as one, checked."""
    parts: dict[str, dict[str, TensorHeader]] = {}
    found: dict[str, TensorHeader | QuantizedHeader] = {}
    for name, header in stored.items():
        if (part := _PART.fullmatch(name)) is not None and part[1] in expected:
            parts.setdefault(part[1], {})[part[2]] = header
        elif not _LEFT_ASIDE.search(name):
            found[name] = header
    for name, tensor in expected.items():
        of_it = parts.setdefault(name, {})
        whole = found.get(name)
        if isinstance(whole, TensorHeader) and (of_it or whole.dtype not in FLOATS):
            of_it[""] = whole
        if of_it:
            found[name] = _joined(name, tensor, of_it, config)
    return found


def _joined(
    name: str, tensor: CheckpointTensor, parts: Mapping[str, TensorHeader], config: ModelConfig
) -> QuantizedHeader:
    some = next(iter(parts.values()))
    scheme = None if config.quantization is None else config.quantization.scheme_of(name)
    if scheme is None or len(tensor.shape) != 2:
        raise ValueError(f"{some}: quantization_config has no scheme for {name}")
    for suffix, what in (("_g_idx", "an order of columns"), ("_global_scale", "NVFP4")):
        if suffix in parts:
            raise ValueError(f"{parts[suffix]} ({what}) is not read; {INSTEAD}")
    for suffix in ("_packed" if scheme.is_packed else "", "_scale"):
        if suffix not in parts:
            raise ValueError(f"{some.file.name}: {name}{suffix} is missing")
    if not scheme.symmetric and "_zero_point" not in parts:
        raise ValueError(f"{some.file.name}: {name}_zero_point is missing")
    N, D = tensor.shape
    if "_shape" in parts and (shape := parts["_shape"].load().flatten().tolist()) != [N, D]:
        raise ValueError(f"{parts['_shape']} is {shorten(shape)}, the config says {[N, D]}")
    if scheme.is_packed and "" in parts:
        raise ValueError(f"{parts['']} and {parts['_packed']} are the same weight")
    values = parts["_packed" if scheme.is_packed else ""]
    scales, zero_points = parts["_scale"], parts.get("_zero_point")
    joined = QuantizedHeader((N, D), scheme, values, scales, zero_points, len(parts))
    joined.check()
    return joined


def config_layouts(config: ModelConfig) -> Layouts:
    """The layouts that quantization_config gives the fused matrices, with bfloat16 scales."""
    if config.quantization is None:
        return {}
    layouts: dict[str, Layout | None] = {}
    for tensor in checkpoint_tensors(config):
        scheme = config.quantization.scheme_of(tensor.name) if len(tensor.shape) == 2 else None
        if scheme is not None:
            layouts[tensor.name] = layout_of_scheme(scheme, tensor.shape[1], torch.bfloat16)
    return fused_layouts(config, layouts)[0]


def layout_of_scheme(scheme: Scheme, columns: int, scales_dtype: torch.dtype) -> Layout:
    """The layout in memory of a matrix with so many columns."""
    size = scheme.block[1] or columns
    if scheme.strategy == "block":  # the last one may be cut short, and all groups are alike
        size = math.gcd(size, columns)
    by_row = size == columns
    if by_row or scales_dtype != torch.bfloat16:
        scales_dtype = torch.float32
    return Layout(scheme.format, 0 if by_row else size, scales_dtype, not scheme.symmetric)


def _check_header(header: TensorHeader, dtype: str, shape: tuple[int, ...]) -> None:
    if (header.dtype, header.shape) != (dtype, shape):
        raise ValueError(
            f"{header} is {header.dtype} {list(header.shape)}, must be {dtype} {list(shape)}"
        )


def _scale_shape(scheme: Scheme, shape: tuple[int, int]) -> tuple[int, int]:
    rows, columns = (size or whole for size, whole in zip(scheme.block, shape, strict=True))
    return math.ceil(shape[0] / rows), math.ceil(shape[1] / columns)


def check_floats(header: TensorHeader) -> None:
    """Nothing, or ValueError unless a tensor holds floats."""
    if header.dtype not in FLOATS:
        raise ValueError(f"{header} is {header.dtype}, must be {', '.join(FLOATS)}")


def _check_count(header: TensorHeader, scheme: Scheme, shape: tuple[int, int]) -> None:
    """Nothing, or ValueError unless there is a number for each row, group or block."""
    meant = _scale_shape(scheme, shape)
    axes = [size for size in header.shape if size != 1], [size for size in meant if size != 1]
    if axes[0] != axes[1]:
        raise ValueError(f"{header} is {list(header.shape)}, must be {list(meant)}")


def _expanded(stored: Tensor, scheme: Scheme, shape: tuple[int, int]) -> Tensor:
    """Numbers of rows, groups or blocks, one for each group of each row: [N, G]."""
    rows, columns = _scale_shape(scheme, shape)
    stored, (N, D) = stored.reshape(rows, columns), shape
    if scheme.strategy == "tensor":
        return stored.expand(N, 1)
    if scheme.strategy == "block":
        height, width = scheme.block
        starts = torch.arange(0, D, math.gcd(width, D), device="cpu")
        return stored[torch.arange(N, device="cpu").div(height, rounding_mode="floor")][
            :, starts // width
        ]
    return stored


def _bytes_of(packed: Tensor, columns: int) -> Tensor:
    """Values of 8 bits: int32 [N, W] -> int8 [N, columns]."""
    return (packed.contiguous().view(torch.uint8)[:, :columns] ^ 128).view(torch.int8)


def _nibbles(packed: Tensor) -> Tensor:
    """Values of 4 bits, + 8: int32 [N, W] -> uint8 [N, 8 W]."""
    pairs = packed.contiguous().view(torch.uint8)
    return torch.stack([pairs & 15, pairs >> 4], -1).flatten(1)


def _repacked_int4(packed: Tensor, columns: int) -> Tensor:
    """Values of 4 bits: int32 [N, W] -> uint8 [N, packed_width(columns)], as `pack_int4` has them.

    There byte b holds columns 2 b and 2 b + 1; here byte j of 32 holds columns j and j + 32.
    """
    if columns % 8:  # the rest of the last word is not what it must be here
        return pack_int4(_nibbles(packed)[:, :columns].to(torch.int8) - 8)
    stored = packed.contiguous().view(torch.uint8)
    missing = packed_width(columns) - stored.shape[1]
    halves = torch.nn.functional.pad(stored, (0, missing), value=0x88).unflatten(
        1, (-1, 2, FEWEST // 2)
    )
    first, second = halves.unbind(2)  # columns 0 to 31, and 32 to 63, of each PAIR
    even, odd = first & 15 | second << 4, first >> 4 | second & 240
    return torch.stack([even, odd], -1).flatten(1)
