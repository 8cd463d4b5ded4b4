"""Layouts of a model's matrices: plain floats or a format of small numbers, and their bytes.

A layout is known before a tensor is there: by it memory is counted and allocated.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gemcut.kernels.quantized_weight import (
    FEWEST,
    FORMATS,
    QuantizedWeight,
    Weight,
    packed_width,
    quantize,
)


@dataclass(frozen=True)
class Layout:
    """How a matrix is quantised; see kernels/quantized_weight.py."""

    format: str  # int8, fp8 or int4
    group_size: int  # columns that share a scale; 0: the whole row
    scales_dtype: torch.dtype
    has_zero_points: bool = False

    def groups(self, columns: int) -> int:
        """Scales of a row; ValueError where groups do not fill it."""
        size = self.group_size or columns
        if columns % size or (size < columns and size % FEWEST):
            raise ValueError(
                f"{columns} columns do not divide into groups of {size}, "
                f"which must be a multiple of {FEWEST}"
            )
        return columns // size

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a matrix of this layout."""
        rows, columns = shape
        scales = self.groups(columns) * self.scales_dtype.itemsize * (1 + self.has_zero_points)
        return rows * (self._width(columns) * FORMATS[self.format].itemsize + scales)

    def empty(
        self, shape: tuple[int, ...], device: torch.device | str, dtype: torch.dtype
    ) -> QuantizedWeight:
        """An uninitialised matrix [N, D] that stands for rows of `dtype`."""
        rows, columns = shape
        groups, scales_dtype = self.groups(columns), self.scales_dtype
        values = torch.empty(rows, self._width(columns), dtype=FORMATS[self.format], device=device)
        scales = torch.empty(rows, groups, dtype=scales_dtype, device=device)
        zero_points = torch.empty_like(scales) if self.has_zero_points else None
        return QuantizedWeight(values, scales, zero_points, columns, dtype)

    def quantize(self, weight: Tensor) -> QuantizedWeight:
        """The nearest weight of this layout, which has no zero points: [N, D]."""
        return quantize(weight, self.format, self.group_size or None, self.scales_dtype)

    def _width(self, columns: int) -> int:
        return packed_width(columns) if self.format == "int4" else columns


Layouts = Mapping[tuple[int | None, str], Layout]  # by layer and field; others are plain floats


def layout_of(weight: Weight) -> Layout | None:
    """The layout of a weight that is there; None of plain floats."""
    if isinstance(weight, Tensor):
        return None
    by_row = weight.group_size == weight.columns
    return Layout(
        weight.format,
        0 if by_row else weight.group_size,
        weight.scales.dtype,
        weight.zero_points is not None,
    )
