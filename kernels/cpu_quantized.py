"""Products with quantised weights on a CPU, by the integer kernels that torch has there.

Few rows in bfloat16, what decoding is made of:

    int8, a scale a row     torch._weight_int8pack_mm reads the values as they are
    int4                    torch._weight_int4pack_mm_for_cpu, of values in its own order
    int8 in groups          the same, of twice as many columns: value = 16 * high + low, and x twice
    all others              dequantised to bfloat16 when they are packed: no kernel reads fp8

Both kernels multiply and add in float32 and give a row the same bits on any threads and in any
company.  Their scales are bfloat16.

Few rows in float32 with int8 by row are products of whole numbers, by `limbs`: exact sums, so again
the same bits.  Everything else, and many rows, dequantises some rows of the weight at a time.

Letters in shape comments: M tokens, D columns of a weight, N its rows, G groups, C columns of int4.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from gemcut.kernels.quantized_weight import QuantizedWeight, dequantized, unpack_int4

FEW_QUANTIZED_ROWS = 16  # up to here integer kernels: bench/NOTES.md has the times
BUFFER = 2**19  # numbers that are dequantised at once: they stay in the processor's cache
INT8_WIDTH = 16  # columns that torch's int8 reads at once: a part of them crashes it
GROUP_SIZES = 256, 128, 64, 32  # that torch's int4 knows
INT4_ROWS = 64  # that it packs together
DIGITS, MIDDLE = 4, 0x808080  # of base 256, see limbs


@dataclass(frozen=True, eq=False)
class PackedInt4:
    """A weight [N, D] as torch's int4 reads it: (value - 8) * scale + offset, in bfloat16.

    Of each 64 rows and each of C columns 32 bytes; byte j has row j in its low half, j + 32 in its
    high one.  C is D, or 2 D: then the weight is the sum of both halves.
    """

    values: Tensor  # uint8 [N, C / 2]
    scales: Tensor  # [C / group_size, N, 2]: scale, offset
    columns: int  # D

    @property
    def shape(self) -> torch.Size:
        """[N, D]."""
        return torch.Size((self.values.shape[0], self.columns))

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return self.values.nbytes + self.scales.nbytes

    @property
    def group_size(self) -> int:
        """Columns that share a scale."""
        return 2 * self.values.shape[1] // self.scales.shape[0]

    @property
    def has_halves(self) -> bool:
        """Whether it is the sum of two halves."""
        return 2 * self.values.shape[1] != self.columns

    def product(self, x: Tensor) -> Tensor:
        """Rows [M, D] in bfloat16 times it -> [M, N]."""
        if self.has_halves:
            x = torch.cat([x, x], 1)
        return torch.ops.aten._weight_int4pack_mm_for_cpu(
            x.contiguous(), self.values, self.group_size, self.scales
        )

    def rows(self, start: int, end: int, dtype: torch.dtype) -> Tensor:
        """What rows `start` to `end` - 1, whole blocks of 64, stand for: [n, D], transposed."""
        blocks, C, D = (end - start) // INT4_ROWS, 2 * self.values.shape[1], self.columns
        halves = self.values[start:end].view(blocks, C, INT4_ROWS // 2)
        numbers = torch.cat([halves & 15, halves >> 4], 2)
        scale, offset = self.scales[-D // self.group_size :, start:end].unbind(-1)  # [G, n]
        if C != D:  # 16 * high + low, of which 8 of the low half is in the offset
            numbers = numbers[:, :D] << 4 | numbers[:, D:]
        middle = 8 if C == D else 136
        groups = numbers.to(torch.float32).view(blocks, len(scale), -1, INT4_ROWS).sub_(middle)
        for x, change in ((scale, groups.mul_), (offset, groups.add_)):
            change(x.float().view(len(x), blocks, 1, INT4_ROWS).transpose(0, 1))
        return groups.to(dtype).view(blocks, D, -1).transpose(0, 1).flatten(1).mT


def packed_bytes(format: str, shape: tuple[int, ...], group_size: int, zeros: bool) -> int:
    """Bytes of what a CPU reads of a weight [N, D] in bfloat16; 0 where it is the weight itself."""
    N, D = shape
    if format == "int8" and group_size == D and not zeros and D % INT8_WIDTH == 0:
        return 0
    size = _group_size(format, N, group_size)
    if size is None:
        return 2 * N * D
    columns = D if format == "int4" else 2 * D
    return N * (columns // 2 + columns // size * 4)


def _group_size(format: str, N: int, group_size: int) -> int | None:
    """The groups in which torch's int4 reads a weight of N rows, or None where it cannot."""
    if format == "fp8" or N % INT4_ROWS or not int4_is_known():
        return None
    return next((size for size in GROUP_SIZES if group_size % size == 0), None)


def packed_int4(weight: QuantizedWeight) -> PackedInt4 | None:
    """A weight of whole numbers as torch's int4 reads it, or None where it cannot."""
    N, D = weight.shape
    size = _group_size(weight.format, N, weight.group_size)
    if size is None:
        return None
    parts = 1 if weight.format == "int4" else 2
    values = torch.empty(N, parts * D // 2, dtype=torch.uint8, device="cpu")
    for start, end in blocks_of_rows(N, D):
        some = weight.values[start:end]
        if parts == 1:
            digits = unpack_int4(some, D) + 8
        else:
            digits = torch.cat([(some >> 4) + 8, some & 15], 1)
        values[start:end] = _converted(digits)
    scales = weight.scales.float()
    zeros = 0 if weight.zero_points is None else weight.zero_points.float()
    pairs = [torch.stack([scales, -zeros * scales], -1)]  # [N, G, 2]
    if parts == 2:
        pairs = [torch.stack([16 * scales, 0 * scales], -1)]
        pairs += [torch.stack([scales, (8 - zeros) * scales], -1)]
    every = torch.cat(pairs, 1).repeat_interleave(weight.group_size // size, 1)
    return PackedInt4(values, every.transpose(0, 1).to(torch.bfloat16).contiguous(), D)


def _converted(digits: Tensor) -> Tensor:
    """Numbers 0 to 15 [n, C] in the order of torch's kernel: uint8 [n, C / 2]."""
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(digits.to(torch.int32), 1)


@lru_cache
def int4_is_known() -> bool:
    """Whether torch packs int4 on this processor in the order that PackedInt4 has."""
    digits = torch.arange(2 * INT4_ROWS * 32, device="cpu").view(2 * INT4_ROWS, 32) * 7 // 5 % 16
    halves = _converted(digits).view(2, 32, INT4_ROWS // 2)
    return torch.equal(torch.cat([halves & 15, halves >> 4], 2).mT.flatten(0, 1), digits)


def is_by_row(weight: object) -> bool:
    """Whether a weight is int8 with a scale a row, in whole steps of torch's kernels."""
    return (
        isinstance(weight, QuantizedWeight)
        and weight.values.dtype == torch.int8
        and weight.scales.shape[1] == 1
        and weight.zero_points is None
        and weight.columns % INT8_WIDTH == 0
    )


def blocks_of_rows(N: int, D: int) -> Iterator[tuple[int, int]]:
    """First and end of each block of rows of a weight [N, D], in whole blocks of 64."""
    size = max(1, BUFFER // D // INT4_ROWS) * INT4_ROWS
    return ((start, min(start + size, N)) for start in range(0, N, size))


def dequantized_rows(
    weight: QuantizedWeight | PackedInt4, start: int, end: int, dtype: torch.dtype
) -> Tensor:
    """What some rows, in whole blocks of 64, stand for: [n, D]."""
    if isinstance(weight, PackedInt4):
        return weight.rows(start, end, dtype)
    return dequantized(weight[start:end], dtype)


# Products of integers


def by_integers(x: Tensor, weight: QuantizedWeight) -> Tensor:
    """A product with int8 by row: x [M, D] in float32, weight [N, D] -> [M, N].

    The sums of products of digits are exact.
    """
    digits, unit = limbs(x)
    sums = torch.ops.aten._int_mm(digits.flatten(0, 1), weight.values.mT).view(
        DIGITS, -1, len(weight.values)
    )
    y = sums[-1].float()
    for lower in sums[:-1].flip(0):
        y = torch.add(lower, y, alpha=256)
    return y.mul_(weight.scales.float().mT).mul_(unit)


def limbs(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows as digits, the lowest first, int8 [DIGITS, M, D], and what a unit of them is [M, 1].

    Numbers are whole multiples of the greatest of their row over 127 * 256^3: as exact as float32.
    """
    tiny = torch.finfo(torch.float32).tiny
    greatest = torch.linalg.vector_norm(x, torch.inf, dim=1, keepdim=True).clamp_(min=tiny)
    units = (x.double() * (127 * 256 ** (DIGITS - 1) / greatest.double())).round_()
    # digits are signed: each byte below the highest is moved by 128, and its first bit turned
    whole = units.to(torch.int32).add_(MIDDLE).bitwise_xor_(MIDDLE)
    digits = whole.view(torch.int8).view(*x.shape, DIGITS)
    return digits.permute(2, 0, 1).contiguous(), greatest / (127 * 256 ** (DIGITS - 1))


@lru_cache
def integers_are_exact() -> bool:
    """Whether torch sums products of int8 exactly here: some processors saturate at 16 bits."""
    if not torch.backends.mkldnn.is_available():
        return False  # torch's own loop is exact, and slow
    x = torch.full((2, 64), 127, dtype=torch.int8, device="cpu")
    return all(bool((torch.ops.aten._int_mm(x, y.mT) == 64 * 127 * 127).all()) for y in (x, x[:1]))
