"""The layout of quantised weights, and that one stands for the nearest numbers of its format."""

import pytest
import torch

from gemcut.kernels import quantized_weight
from gemcut.kernels.quantized_weight import (
    GREATEST,
    QuantizedWeight,
    dequantized,
    pack_int4,
    quantize,
    unpack_int4,
)

FORMATS = pytest.mark.parametrize("format", GREATEST)


@pytest.mark.parametrize("columns", [1, 31, 32, 33, 64, 100, 640])
def test_int4_comes_back(columns):
    values = torch.arange(3 * columns).view(3, columns) % 16 - 8
    packed = pack_int4(values)
    assert packed.shape == (3, -(-columns // 64) * 32)
    assert torch.equal(unpack_int4(packed, columns), values.to(torch.int8))


def test_a_byte_holds_columns_32_apart():
    values = torch.zeros(1, 128, dtype=torch.int8)
    values[0, 64 + 5], values[0, 64 + 5 + 32] = 3, -8
    packed = pack_int4(values)
    assert packed[0, 32 + 5] == (-8 + 8) << 4 | 3 + 8
    assert (packed == 0x88).sum() == 63  # all others are 0


@pytest.mark.parametrize("format", ["int8", "fp8"])
@pytest.mark.parametrize("group_size", [None, 32, 96])
def test_values_err_by_half_a_step(format, group_size):
    torch.manual_seed(0)
    weight = torch.randn(7, 288)
    quantized = quantize(weight, format, group_size)
    assert quantized.format == format
    assert quantized.group_size == (group_size or 288)
    groups = weight.unflatten(1, (-1, group_size or 288))
    step = groups.abs().amax(-1, keepdim=True) / GREATEST[format]
    if format == "fp8":  # three bits after the first: 2^-4 of a number, or of the least normal one
        step = 2 * groups.abs().clamp(min=step * 2**-6) * 2**-4
    error = (dequantized(quantized) - weight).unflatten(1, (-1, group_size or 288)).abs()
    assert (error <= step / 2 * (1 + 2**-20)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("group_size", [None, 32, 96])
def test_scales_of_int4_have_little_error(group_size, dtype):
    """In each group at most what a scale has that gives the greatest number 7, or 8, or cuts it."""
    torch.manual_seed(0)
    weight = torch.randn(40, 288).to(dtype)
    groups = weight.double().unflatten(1, (-1, group_size or 288))

    def squares(scales: torch.Tensor) -> torch.Tensor:
        values = (groups / scales).round().clamp(-8, 7)
        return (values * scales - groups).square().sum(-1)

    quantized = quantize(weight, "int4", group_size)
    assert (quantized.scales > 0).all()
    greatest = groups.abs().amax(-1, keepdim=True)
    found = squares(quantized.scales.double().unsqueeze(-1))
    stored = dequantized(quantized, torch.float64).unflatten(1, (-1, group_size or 288))
    torch.testing.assert_close(found, (stored - groups).square().sum(-1))
    rounding = 1 + 4 * torch.finfo(dtype).eps  # of scales: near the best they count little
    for steps in (7.0, 7.5, 8.0, 8.5):
        assert (found <= squares(greatest / steps) * rounding).all(), steps
    assert found.sum() < 0.9 * squares(greatest / 7).sum()


@FORMATS
def test_rows_are_quantised_alike_in_blocks_of_any_size(format, monkeypatch):
    weight = torch.randn(23, 64)
    whole = quantize(weight, format, 32)
    monkeypatch.setattr(quantized_weight, "AT_ONCE", 5 * 64)
    parts = quantize(weight, format, 32)
    assert torch.equal(parts.values.view(torch.uint8), whole.values.view(torch.uint8))
    assert torch.equal(parts.scales, whole.scales)


def test_zero_points_count_in_values():
    values = torch.tensor([[5, -3]], dtype=torch.int8)
    scales, zeros = torch.tensor([[0.5]]), torch.tensor([[2.0]])
    weight = QuantizedWeight(values, scales, zeros, 2, torch.float32)
    assert dequantized(weight).tolist() == [[1.5, -2.5]]


@FORMATS
def test_rows_are_views(format):
    quantized = quantize(torch.randn(6, 64), format, 32)
    rows = quantized[2:4]
    assert rows.values.data_ptr() == quantized.values[2:].data_ptr()
    assert torch.equal(dequantized(rows), dequantized(quantized)[2:4])
    assert rows.nbytes == quantized.nbytes // 3


@FORMATS
def test_a_group_of_zeros_stays_zero(format):
    quantized = quantize(torch.zeros(2, 64), format, 32)
    assert torch.equal(dequantized(quantized), torch.zeros(2, 64))
    assert (quantized.scales > 0).all()  # as checkpoints must have them


@FORMATS
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_no_number_shows_in_its_scale(format, value):
    weight = torch.randn(3, 64)
    weight[1, 40] = value
    scales = quantize(weight, format, 32).scales
    assert (~scales.isfinite()).nonzero().tolist() == [[1, 1]]


EXTREMES = {
    "greatest": lambda info: info.max,
    "least-normal": lambda info: info.tiny,
    "least": lambda info: info.tiny * info.eps,
}


@FORMATS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("group_size", [None, 32])
@pytest.mark.parametrize("extreme", EXTREMES)
def test_numbers_at_an_end_of_their_dtype_are_quantised_as_others(
    extreme, group_size, dtype, format
):
    """With errors of half a step, or of a whole one at the end, or of the least scale."""
    torch.manual_seed(0)
    size = EXTREMES[extreme](torch.finfo(dtype))
    weight = (torch.rand(4, 64, dtype=torch.float64) * 2 - 1) * size
    weight[0, 0], weight[1, 1], weight[2] = size, -size, 0
    weight = weight.to(dtype)
    found = quantize(weight, format, group_size)
    assert (found.scales.isfinite() & (found.scales > 0)).all()
    stored = dequantized(found)
    assert stored.isfinite().all()
    info = torch.finfo(found.scales.dtype)
    step = max(size * {"int8": 1 / 127, "int4": 1 / 7, "fp8": 1 / 8}[format], info.tiny * info.eps)
    assert ((stored.double() - weight.double()).abs() <= step).all()


@FORMATS
def test_numbers_that_no_scale_holds_are_refused(format):
    with pytest.raises(
        ValueError, match=r"numbers up to 1e\+300 are too great for scales in torch"
    ):
        quantize(torch.full((2, 64), 1e300, dtype=torch.float64), format)
    with pytest.raises(ValueError, match=r"numbers up to 1e\+38 are .* in torch.float16"):
        quantize(torch.full((2, 64), 1e38), format, 32, torch.float16)


BAD = {
    "values are torch.int32": {"values": torch.zeros(2, 64, dtype=torch.int32)},
    r"values are \[2, 64\], must be \[N, 65\]": {"columns": 65},
    r"scales are \[3, 2\]": {"scales": torch.ones(3, 2)},
    "64 columns do not make 3 groups": {"scales": torch.ones(2, 3)},
    "64 columns do not make 4 groups of a multiple of 32": {"scales": torch.ones(2, 4)},
    "zero points are": {"zero_points": torch.zeros(2, 1)},
}


@pytest.mark.parametrize("message", BAD)
def test_tensors_that_make_no_matrix_are_refused(message):
    good = {
        "values": torch.zeros(2, 64, dtype=torch.int8),
        "scales": torch.ones(2, 2),
        "zero_points": None,
        "columns": 64,
        "dtype": torch.bfloat16,
    }
    QuantizedWeight(**good)
    with pytest.raises(ValueError, match=message):
        QuantizedWeight(**(good | BAD[message]))


def test_bad_calls_of_quantize():
    with pytest.raises(ValueError, match="format 'int3' is not known; there are int8, fp8, int4"):
        quantize(torch.zeros(2, 64), "int3")
    with pytest.raises(ValueError, match="64 columns are no multiple of the group size 48"):
        quantize(torch.zeros(2, 64), "int8", 48)
    for size in (-32, 32.0, 0):
        with pytest.raises(ValueError, match=f"group size {size} is no positive number"):
            quantize(torch.zeros(2, 64), "int8", size)
    for weight in (torch.zeros(64), torch.zeros(2, 0), torch.zeros(2, 64, dtype=torch.int8)):
        with pytest.raises(ValueError, match=r"weight is .*, must be floats \[N, D\]"):
            quantize(weight, "int8")
