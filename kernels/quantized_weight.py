"""A matrix as small numbers with scales: what it is, how one is made, and what it stands for.

    weight[n, d] = (values[n, d] - zero_points[n, g]) * scales[n, g]        g = d // group_size

    format    values                                        group_size
    int8      int8 [N, D]                                   D (one scale a row), or a multiple of 32
    fp8       float8_e4m3fn [N, D]                          the same; 128 where a format has blocks
    int4      uint8 [N, ceil(D / 64) * 32], two a byte      a multiple of 32

int4 values are -8 to 7 and are stored as value + 8.  Of each 64 columns, byte j holds column j in
its low half and column j + 32 in its high half: so both halves of 16 bytes are runs of columns, and
no group of 32 is divided.  Columns past D hold value 0.  Zero points, where there are any, count in
units of values.

Every op that takes a weight takes one of these in its place.  Products multiply in x's dtype, which
holds every value exactly, add up in float32 and scale the sum of each group: so nothing is rounded
that a plain weight would not round.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

FORMATS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn, "int4": torch.uint8}
FEWEST = 32  # columns of a group
PAIR = 64  # columns that share 32 bytes in int4
BITS = {"int8": 8, "fp8": 8, "int4": 4}  # of a value
GREATEST = {"int8": 127, "fp8": 448, "int4": 7}  # in both signs
WHOLE = {"int8": (-127, 127), "int4": (-8, 7)}  # values that `quantize` makes
FARTHEST = {"int8": 127, "fp8": 448, "int4": 8}  # of them from 0
# Steps of int4 from 0 to the greatest number of a group, which may be cut: four halve the loss that
# 7 alone has in bits per byte, eight gain no more (bench/NOTES.md)
RANGES = 7.0, 7.5, 8.0, 8.5
AT_ONCE = 2**18  # numbers that are quantised at once


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A matrix [N, D]; see the module.  `dtype` is that of its rows where they are read as rows."""

    values: Tensor
    scales: Tensor  # [N, D / group_size], a float dtype
    zero_points: Tensor | None  # as scales
    columns: int  # D
    dtype: torch.dtype

    def __post_init__(self) -> None:
        check_quantized(self)

    @property
    def format(self) -> str:
        """int8, fp8 or int4."""
        return next(name for name, dtype in FORMATS.items() if dtype == self.values.dtype)

    @property
    def shape(self) -> torch.Size:
        """[N, D]."""
        return torch.Size((self.values.shape[0], self.columns))

    @property
    def group_size(self) -> int:
        """Columns that share a scale."""
        return self.columns // self.scales.shape[1]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What it is in memory."""
        every = (self.values, self.scales, self.zero_points)
        return tuple(x for x in every if x is not None)

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return self.values.device

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(x.nbytes for x in self.tensors)

    def __getitem__(self, rows: slice | Tensor) -> "QuantizedWeight":
        """Some rows: a view by a slice, a copy by a tensor of indices [M]."""
        return self._with(lambda x: x[rows])

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "QuantizedWeight":
        """The same weight on a device, standing for rows of a dtype."""
        return replace(self._with(lambda x: x.to(device)), dtype=dtype or self.dtype)

    def _with(self, change: Any) -> "QuantizedWeight":
        zero_points = None if self.zero_points is None else change(self.zero_points)
        return replace(
            self, values=change(self.values), scales=change(self.scales), zero_points=zero_points
        )


Weight = Tensor | QuantizedWeight  # [N, D]


def check_quantized(weight: QuantizedWeight) -> None:
    """ValueError unless its tensors make a matrix."""
    values, scales, D = weight.values, weight.scales, weight.columns
    if values.dtype not in FORMATS.values():
        raise ValueError(f"values are {values.dtype}, must be int8, float8_e4m3fn or uint8 (int4)")
    width = packed_width(D) if values.dtype == torch.uint8 else D
    if values.dim() != 2 or values.shape[1] != width:
        raise ValueError(f"values are {list(values.shape)}, must be [N, {width}] for {D} columns")
    if scales.dim() != 2 or len(scales) != len(values) or not scales.is_floating_point():
        raise ValueError(f"scales are {list(scales.shape)} {scales.dtype}, must be floats [N, G]")
    groups = scales.shape[1]
    if not groups or D % groups or (groups > 1 and D // groups % FEWEST):
        raise ValueError(
            f"{D} columns do not make {groups} groups of a multiple of {FEWEST} columns"
        )
    zeros = weight.zero_points
    if zeros is not None and (zeros.shape, zeros.dtype) != (scales.shape, scales.dtype):
        raise ValueError(
            f"zero points are {list(zeros.shape)} {zeros.dtype}, scales {list(scales.shape)} "
            f"{scales.dtype}"
        )
    if any(x.device != values.device for x in weight.tensors):
        raise ValueError("values, scales and zero points are on several devices")


def packed_width(columns: int) -> int:
    """Bytes of a row of int4."""
    return -(-columns // PAIR) * PAIR // 2


def pack_int4(values: Tensor) -> Tensor:
    """Whole numbers -8 to 7 [N, D], two to a byte [N, packed_width(D)]; see the module."""
    padding = 2 * packed_width(values.shape[1]) - values.shape[1]
    padded = torch.nn.functional.pad((values + 8).to(torch.uint8), (0, padding), value=8)
    low, high = padded.unflatten(1, (-1, 2, PAIR // 2)).unbind(2)
    return (low | high << 4).flatten(1)


def unpack_int4(packed: Tensor, columns: int) -> Tensor:
    """The values of `pack_int4`: [N, packed_width(D)] -> int8 [N, D]."""
    halves = packed.unflatten(1, (-1, PAIR // 2))
    both = torch.stack([halves & 15, halves >> 4], dim=2).flatten(1)
    return both[:, :columns].to(torch.int8) - 8


def dequantized(weight: QuantizedWeight, dtype: torch.dtype | None = None) -> Tensor:
    """The matrix [N, D] that a weight stands for, rounded once to a dtype, its own by default."""
    dtype = dtype or weight.dtype
    wide = torch.promote_types(dtype, torch.float32)
    values = weight.values
    if weight.format == "int4":
        values = unpack_int4(values, weight.columns)
    elif weight.format == "fp8" and values.is_cpu:
        # torch converts one in 8 to 15 ns there, and finds it in a table in half a nanosecond
        every = torch.arange(256, dtype=torch.uint8, device="cpu").view(values.dtype).float()
        codes = values.view(torch.uint8).flatten().to(torch.int32)
        values = every.index_select(0, codes).view(values.shape)
    groups = values.to(wide).unflatten(1, (weight.scales.shape[1], -1))  # [N, G, group_size]
    if weight.zero_points is not None:
        groups = groups - weight.zero_points.to(wide).unsqueeze(-1)
    return (groups * weight.scales.to(wide).unsqueeze(-1)).flatten(1).to(dtype)


def quantize(
    weight: Tensor,
    format: str,
    group_size: int | None = None,
    scales_dtype: torch.dtype | None = None,
) -> QuantizedWeight:
    """A weight of a format near [N, D] in any float dtype, without zero points.

    group_size: None for a scale a row.  Scales are above 0; float32 by row, and in weight's dtype
    by group, unless `scales_dtype` is given.  int8 and fp8 give a group's greatest number the
    greatest of the format.  int4, whose steps are coarse, takes of the scales of `RANGES`, each
    then fitted to the values that it gives, the one with the least squared error.  ValueError
    where finite numbers are too great for a scale; others, and NaN, show in theirs.

    Some rows at a time, so that it needs little memory beside the result.
    """
    if format not in list(FORMATS):
        raise ValueError(f"format {format!r} is not known; there are {', '.join(FORMATS)}")
    if weight.dim() != 2 or not weight.numel() or not weight.is_floating_point():
        raise ValueError(f"weight is {list(weight.shape)} {weight.dtype}, must be floats [N, D]")
    D = weight.shape[1]
    group_size = D if group_size is None else group_size
    if type(group_size) is not int or group_size < 1:
        raise ValueError(f"group size {group_size!r} is no positive number")
    if D % group_size:
        raise ValueError(f"{D} columns are no multiple of the group size {group_size}")
    scales_dtype = scales_dtype or (torch.float32 if group_size == D else weight.dtype)
    blocks = weight.split(max(1, AT_ONCE // D))
    some = [_quantized(x, format, group_size, scales_dtype) for x in blocks]
    values, scales = (torch.cat(parts) for parts in zip(*some, strict=True))
    return QuantizedWeight(values, scales, None, D, weight.dtype)


def _quantized(
    weight: Tensor, format: str, group_size: int, scales_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Values and scales of some rows."""
    groups = weight.float().unflatten(1, (-1, group_size))
    greatest = groups.abs().amax(-1, keepdim=True)
    scales = _fitted_scales(groups, greatest) if format == "int4" else greatest / GREATEST[format]
    scales = _held(scales, greatest, weight, format, scales_dtype)
    values = groups / scales.float()
    if format == "fp8":
        values = values.clamp_(-GREATEST[format], GREATEST[format]).to(torch.float8_e4m3fn)
    else:
        values = values.round_().clamp_(*WHOLE[format]).to(torch.int8)
    values = values.flatten(1)
    return pack_int4(values) if format == "int4" else values, scales.squeeze(-1)


def _held(
    scales: Tensor, greatest: Tensor, weight: Tensor, format: str, dtype: torch.dtype
) -> Tensor:
    """Scales [N, G, 1] rounded to a dtype: above 0, and each value times its scale is finite.

    ValueError where one would be infinite though its numbers are not.
    """
    info, most = torch.finfo(dtype), torch.finfo(weight.dtype).max
    most = min(most, torch.finfo(torch.float32).max) / FARTHEST[format] * (1 - info.eps)
    least = max(info.tiny * info.eps, 2**-149)  # in float32 too
    scales = scales.to(dtype)
    if not scales.isfinite().all():
        groups = weight.unflatten(1, (scales.shape[1], -1))
        beyond = ~scales.isfinite() & groups.isfinite().all(-1, keepdim=True)
        if beyond.any():
            numbers = groups.abs().amax(-1, keepdim=True)[beyond].max().item()
            raise ValueError(f"numbers up to {numbers:.2g} are too great for scales in {dtype}")
    fitting = scales.clamp(least, min(most, info.max)).masked_fill(greatest == 0, 1)
    return fitting.where(scales.isfinite(), scales)  # nothing hides a NaN or an infinity


def _fitted_scales(groups: Tensor, greatest: Tensor) -> Tensor:
    """Scales of int4 with little squared error: [N, G, group_size], [N, G, 1] -> [N, G, 1].

    With values q the best scale of numbers w is (w . q) / (q . q), and what it takes off the square
    of w is (w . q)^2 / (q . q).  Numbers are in units of a power of two near the greatest, so that
    no square is 0 or infinite.
    """
    unit = greatest.clamp(2.0**-126, 2.0**127).log2().floor().exp2()
    groups, greatest = groups / unit, greatest / unit
    best, most = torch.zeros_like(greatest), torch.zeros_like(greatest)
    for steps in RANGES:
        inverse = (steps / greatest).masked_fill_(greatest == 0, 0)
        values = (groups * inverse).round_().clamp_(*WHOLE["int4"])
        products = torch.linalg.vecdot(groups, values).unsqueeze(-1)
        squares = torch.linalg.vecdot(values, values).unsqueeze(-1).clamp_(min=1)
        taken = products * products / squares
        best = torch.where(taken > most, products / squares, best)
        most = torch.maximum(taken, most)
    return (best * unit).where(greatest.isfinite(), greatest)
