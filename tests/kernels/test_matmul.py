from dataclasses import replace

import numpy as np
import pytest
import torch
from accuracy import (
    DEVICE,
    WEIGHTS,
    assert_accurate,
    assert_row_invariant,
    assert_within_budget,
    by_dtype,
    by_weight,
    quantized,
    random,
)
from torch import Tensor

from gemcut.kernels import matmul, product_tiles, reference
from gemcut.kernels.matmul import linear, skinny_linear
from gemcut.kernels.quantized_weight import dequantized

pytestmark = pytest.mark.usefixtures("poisoned")
by_shape = pytest.mark.parametrize(
    ("M", "N", "D"),
    [
        pytest.param(1, 64, 512, id="one-decode-step"),
        pytest.param(3, 37, 300, id="nothing-divides"),
        pytest.param(16, 16, 40, id="one-tile-shorter-than-a-step"),
        pytest.param(19, 20, 24, id="more-rows-than-a-tile"),
    ],
)


def product(M: int, N: int, D: int, dtype: torch.dtype) -> dict[str, Tensor]:
    torch.manual_seed(0)
    weight = random(N, D, dtype=dtype, scale=D**-0.5)
    return {"x": random(M, D, dtype=dtype), "weight": weight}


def added_up(*args, **kwargs) -> Tensor:
    """The product itself: the oracle leaves one partial sum, the kernel as many as it likes."""
    return skinny_linear(*args, **kwargs).sum(0, keepdim=True)


@by_dtype
@by_shape
def test_skinny_linear(M, N, D, dtype):
    arguments = product(M, N, D, dtype)
    assert_accurate(added_up, **arguments, oracle=reference.skinny_linear)
    arguments |= {"bias": random(N, dtype=dtype)}
    assert_accurate(added_up, **arguments, oracle=reference.skinny_linear)


@by_dtype
@by_weight
@pytest.mark.parametrize(
    ("M", "N", "D"),
    [
        pytest.param(1, 64, 512, id="one-decode-step"),
        pytest.param(3, 37, 300, id="nothing-divides"),
        pytest.param(2, 70, 288, id="a-step-and-a-part"),
        pytest.param(17, 20, 96, id="more-rows-than-a-tile"),
    ],
)
def test_skinny_linear_of_quantised_weights(M, N, D, kind, dtype):
    torch.manual_seed(0)
    arguments = {"x": random(M, D, dtype=dtype), "weight": quantized(N, D, kind, dtype)}
    assert_accurate(added_up, **arguments, oracle=reference.skinny_linear)
    arguments |= {"bias": random(N, dtype=dtype)}
    assert_accurate(added_up, **arguments, oracle=reference.skinny_linear)


@by_weight
@pytest.mark.parametrize("column", [0, 31, 32, 63, 64, 127, 128, 299])
def test_each_column_has_its_number_and_its_scale(column, kind):
    """A token that is 1 at one column and 0 elsewhere reads that column alone."""
    torch.manual_seed(0)
    for D in (300, 384):
        weight, x = quantized(20, D, kind), torch.zeros(1, D, device=DEVICE)
        x[0, column] = 1
        expected = dequantized(weight)[:, column]
        assert torch.allclose(added_up(x, weight)[0, 0], expected, rtol=1e-6, atol=0)


@by_dtype
@pytest.mark.parametrize("kind", [kind for kind in WEIGHTS if "int4" in kind])
@pytest.mark.parametrize(("M", "N", "D"), [(1, 256, 384), (3, 170, 300)], ids=["even", "odd"])
def test_programs_of_128_rows(M, N, D, kind, dtype, monkeypatch):
    """As large weights of int4 have them."""
    torch.manual_seed(0)
    monkeypatch.setattr(product_tiles, "WIDE", 1)
    weight, x = quantized(N, D, kind, dtype), random(M, D, dtype=dtype)
    assert matmul._tile(weight, x)["BLOCK_N"] == 128
    assert_accurate(added_up, x, weight, None, oracle=reference.skinny_linear)


@by_weight
def test_parts_of_a_quantised_weight_are_sums_over_whole_steps(kind):
    """Of whole numbers by scales that are powers of two, so that nothing is rounded."""
    torch.manual_seed(0)
    x, weight = random(2, 768).round(), quantized(64, 768, kind)
    scales = 2.0 ** torch.randint(-3, 3, weight.scales.shape)
    weight = replace(weight, scales=scales.to(weight.scales))
    if weight.format == "fp8":
        weight = replace(weight, values=weight.values.float().round().to(weight.values.dtype))
    y, plain = skinny_linear(x, weight), dequantized(weight)
    columns = 768 // len(y)
    assert len(y) == matmul.count_parts(weight, x) > 1
    for s, part in enumerate(y):
        mine = slice(s * columns, (s + 1) * columns)
        assert torch.equal(part, x[:, mine] @ plain[:, mine].T)


def test_parts_are_sums_over_whole_steps():
    """Each part's own columns, and no others: what another part lacks would show nowhere else."""
    torch.manual_seed(0)
    x, weight = random(2, 640), random(64, 640)
    block_d = matmul._tile(weight, x)["BLOCK_D"]
    y = skinny_linear(x, weight)
    columns = 640 // len(y)
    assert len(y) == matmul.count_parts(weight, x) > 1
    assert columns % block_d == 0
    for s, part in enumerate(y):
        mine = slice(s * columns, (s + 1) * columns)
        eager = x[:, mine] @ weight[:, mine].T
        exact = x[:, mine].double() @ weight[:, mine].double().T
        assert_within_budget(f"part {s}", part, eager, exact)


@pytest.mark.parametrize(
    ("N", "D", "parts"),
    [
        pytest.param(2304, 9216, 11, id="down-of-gemma-2-2b"),
        pytest.param(2304, 2048, 11, id="o-of-gemma-2-2b"),
        pytest.param(3584, 14336, 7, id="down-of-gemma-2-9b"),
        pytest.param(1152, 1024, 8, id="o-of-vaultgemma-1b"),
        pytest.param(4608, 36864, 7, id="down-of-gemma-2-27b"),
        pytest.param(256000, 1152, 1, id="wide"),
        pytest.param(64, 24, 1, id="tiny"),
    ],
)
def test_how_many_parts(N, D, parts):
    """Three programs for each processor of an H100 or four, as far as steps and rows divide."""
    weight = torch.empty(N, D, device="meta", dtype=torch.bfloat16)
    assert matmul.count_parts(weight, weight) == parts


@by_dtype
def test_linear(dtype):
    assert_accurate(linear, **product(40, 24, 32, dtype), bias=random(24, dtype=dtype))


@by_dtype
@by_weight
@pytest.mark.parametrize("scratch", [10**6, 7 * 288 * 4, 1], ids="{} bytes".format)
def test_linear_of_quantised_weights(scratch, kind, dtype, monkeypatch):
    """In one part, in several, and a row at a time."""
    torch.manual_seed(0)
    monkeypatch.setattr(matmul, "SCRATCH", scratch)
    arguments = {"x": random(5, 288, dtype=dtype), "weight": quantized(22, 288, kind, dtype)}
    assert_accurate(linear, **arguments)
    assert_accurate(linear, **arguments, bias=random(22, dtype=dtype))


def test_rows_that_lie_apart():
    weight = random(20, 24)
    assert_accurate(added_up, random(3, 40)[:, 8:32], weight, None, oracle=reference.skinny_linear)


@by_dtype
def test_a_row_does_not_depend_on_its_company(dtype):
    weight, bias = random(48, 300, dtype=dtype), random(48, dtype=dtype)
    x = random(18, 300, dtype=dtype)
    assert_row_invariant(lambda rows: skinny_linear(x[rows], weight, bias).transpose(0, 1), 18)


@by_weight
def test_a_row_by_a_quantised_weight_does_not_depend_on_its_company(kind):
    weight, x = quantized(48, 384, kind), random(18, 384, dtype=torch.bfloat16)
    assert_row_invariant(lambda rows: skinny_linear(x[rows], weight).transpose(0, 1), 18)


def test_addresses_past_32_bits():
    """A row of a strided x further than 2**31 elements away: a 32-bit product would wrap."""
    stride, dtype = (1 << 30) + 8, torch.bfloat16
    # 4 GB of address space, of which three pages are touched
    zeros = torch.from_numpy(np.zeros(2 * stride + 32, dtype=np.int16)).view(dtype).to(DEVICE)
    x = zeros.as_strided((3, 32), (stride, 1))
    x[2] = random(32, dtype=dtype)
    weight = random(16, 32, dtype=dtype)
    assert torch.equal(skinny_linear(x, weight)[:, 2:], skinny_linear(x[2:].clone(), weight))


def test_no_rows():
    weight = quantized(5, 64, "int4 in 32s")
    assert skinny_linear(random(0, 64), weight).shape == (1, 0, 5)
    assert linear(random(0, 64), weight).shape == (0, 5)
    assert skinny_linear(random(0, 8), random(5, 8)).shape == (1, 0, 5)
    assert linear(random(0, 8), random(5, 8)).shape == (0, 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": random(3, 9)}, r"x is \[3, 9\], must be \[M, 8\]"),
        ({"x": random(8)}, r"x is \[8\], must be \[M, 8\]"),
        ({"x": random(3, 16)[:, ::2]}, r"strides \[16, 2\], the last must be 1"),
        ({"weight": random(8)}, r"weight is \[8\], must be \[N, D\]"),
        ({"weight": random(8, 5).T}, r"weight has strides \[1, 5\], must be contiguous"),
        ({"weight": random(5, 8).half()}, "weight is torch.float16, the input torch.float32"),
        ({"weight": random(0, 8)}, r"weight is \[0, 8\]: an empty product"),
        ({"bias": random(6)}, r"bias is \[6\], must be \[5\]"),
        ({"bias": torch.empty(5, device="meta")}, "bias is on meta, the input on"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        skinny_linear(**{"x": random(3, 8), "weight": random(5, 8)} | change)
