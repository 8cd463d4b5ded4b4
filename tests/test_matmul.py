import numpy as np
import pytest
import torch
from accuracy import DEVICE, DTYPES, assert_accurate, assert_row_invariant, random
from torch import Tensor

from gemcut.kernels.matmul import linear, norm_linear, skinny_linear

EPS = 1e-6
pytestmark = pytest.mark.usefixtures("poisoned")
by_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
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


def stream(M: int, D: int, dtype: torch.dtype, kind: str) -> dict:
    """A residual stream and what stands before a product: the branch, the norms."""
    return {
        "residual": random(M, D, dtype=dtype, scale=5),
        "branch": None if kind == "first-layer" else random(M, D, dtype=dtype),
        "post_weight": random(D, dtype=dtype) if kind == "sandwich" else None,
        "norm_weight": random(D, dtype=dtype),
        "eps": EPS,
    }


by_kind = pytest.mark.parametrize("kind", ["sandwich", "plain", "first-layer"])


@by_dtype
@by_shape
def test_skinny_linear(M, N, D, dtype):
    arguments = product(M, N, D, dtype)
    assert_accurate(skinny_linear, **arguments)
    arguments |= {"bias": random(N, dtype=dtype), "residual": random(M, N, dtype=dtype)}
    assert_accurate(skinny_linear, **arguments)


@by_dtype
def test_linear(dtype):
    assert_accurate(linear, **product(40, 24, 32, dtype), bias=random(24, dtype=dtype))


@by_dtype
@by_kind
@by_shape
def test_norm_linear(M, N, D, kind, dtype):
    torch.manual_seed(0)
    weight = random(N, D, dtype=dtype, scale=D**-0.5)
    assert_accurate(norm_linear, **stream(M, D, dtype, kind), weight=weight)


@by_dtype
def test_norm_linear_with_bias(dtype):
    weight, bias = random(48, 32, dtype=dtype), random(48, dtype=dtype)
    assert_accurate(norm_linear, **stream(2, 32, dtype, "sandwich"), weight=weight, bias=bias)


def test_rows_that_lie_apart():
    weight = random(20, 24)
    x, residual = random(3, 40)[:, 8:32], random(3, 30)[:, :20]
    assert_accurate(skinny_linear, x, weight, None, residual)


def test_no_branch_gives_the_residual_itself():
    arguments = stream(2, 24, torch.float32, "first-layer")
    _, summed = norm_linear(**arguments, weight=random(8, 24))
    assert summed is arguments["residual"]


@by_dtype
def test_a_row_does_not_depend_on_its_company(dtype):
    weight, bias = random(48, 300, dtype=dtype), random(48, dtype=dtype)
    x, residual = random(18, 300, dtype=dtype), random(18, 48, dtype=dtype)

    def projected(rows: slice) -> Tensor:
        return skinny_linear(x[rows], weight, bias, residual[rows])

    assert_row_invariant(projected, 18)


@by_dtype
@by_kind
def test_a_normed_row_does_not_depend_on_its_company(kind, dtype):
    weight, before = random(48, 300, dtype=dtype), stream(18, 300, dtype, kind)

    def projected(rows: slice) -> tuple[Tensor, Tensor]:
        taken = {k: before[k] if before[k] is None else before[k][rows] for k in per_row}
        return norm_linear(**before | taken, weight=weight)

    per_row = ("residual", "branch")
    assert_row_invariant(projected, 18)


def test_addresses_past_32_bits():
    """A row of a strided x further than 2**31 elements away: a 32-bit product would wrap."""
    stride, dtype = (1 << 30) + 8, torch.bfloat16
    # 4 GB of address space, of which three pages are touched
    zeros = torch.from_numpy(np.zeros(2 * stride + 32, dtype=np.int16)).view(dtype).to(DEVICE)
    x = zeros.as_strided((3, 32), (stride, 1))
    x[2] = random(32, dtype=dtype)
    weight = random(16, 32, dtype=dtype)
    assert torch.equal(skinny_linear(x, weight)[2], skinny_linear(x[2:].clone(), weight)[0])


def test_no_rows():
    assert skinny_linear(random(0, 8), random(5, 8)).shape == (0, 5)
    assert linear(random(0, 8), random(5, 8)).shape == (0, 5)
    y, summed = norm_linear(**stream(0, 8, torch.float32, "sandwich"), weight=random(5, 8))
    assert (y.shape, summed.shape) == ((0, 5), (0, 8))


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
        ({"residual": random(3, 6)}, r"residual is \[3, 6\], must be \[M, 5\]"),
        ({"residual": random(4, 5)}, "residual has 4 rows, x 3"),
        ({"residual": random(3, 5).half()}, "residual is torch.float16"),
        ({"bias": torch.empty(5, device="meta")}, "bias is on meta, the input on"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        skinny_linear(**{"x": random(3, 8), "weight": random(5, 8)} | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"residual": random(3, 9)}, r"residual is \[3, 9\]|norm_weight is \[8\], must be \[9\]"),
        ({"residual": random(3, 16)[:, :8]}, "residual has strides"),
        ({"branch": random(2, 8)}, r"branch is \[2, 8\], must be \[3, 8\]"),
        ({"branch": None}, "post_weight normalises a branch, but branch is None"),
        ({"post_weight": random(9)}, r"post_weight is \[9\], must be \[8\]"),
        ({"norm_weight": random(9)}, r"norm_weight is \[9\], must be \[8\]"),
        ({"weight": random(5, 9)}, r"\[M, 9\]"),
    ],
)
def test_bad_input_before_a_product(change, message):
    arguments = stream(3, 8, torch.float32, "sandwich") | {"weight": random(5, 8)}
    with pytest.raises(ValueError, match=message):
        norm_linear(**arguments | change)
