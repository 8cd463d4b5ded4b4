import pytest
import torch
from accuracy import DEVICE, assert_accurate, assert_row_invariant, by_dtype, random
from torch import Tensor

from gemcut.kernels.norm import add_rmsnorm_, rmsnorm

EPS = 1e-6
pytestmark = pytest.mark.usefixtures("poisoned")
by_shape = pytest.mark.parametrize(
    "shape",
    [
        pytest.param((1, 1152), id="one-decode-step"),
        pytest.param((7, 333), id="width-not-power-of-two"),
        pytest.param((3, 1), id="width-one"),
    ],
)


@by_dtype
@by_shape
def test_rmsnorm(shape, dtype):
    torch.manual_seed(0)
    assert_accurate(rmsnorm, random(*shape, dtype=dtype), random(shape[-1], dtype=dtype), EPS)


@by_dtype
@pytest.mark.parametrize("post_norm", [True, False], ids=["sandwich", "plain"])
@by_shape
def test_add_rmsnorm(shape, post_norm, dtype):
    torch.manual_seed(0)
    residual, x = random(*shape, dtype=dtype, scale=20), random(*shape, dtype=dtype)
    post, following = random(shape[-1], dtype=dtype), random(shape[-1], dtype=dtype)
    assert_accurate(add_rmsnorm_, residual, x, post if post_norm else None, following, EPS)


@by_dtype
@pytest.mark.parametrize("post_norm", [True, False], ids=["sandwich", "plain"])
@pytest.mark.parametrize("parts", [1, 5])
def test_partial_sums_are_added_up(parts, post_norm, dtype):
    """As skinny_linear leaves them: in float32, whatever the stream's dtype."""
    torch.manual_seed(0)
    residual, x = random(3, 300, dtype=dtype, scale=20), random(parts, 3, 300)
    post, following = random(300, dtype=dtype), random(300, dtype=dtype)
    assert_accurate(add_rmsnorm_, residual, x, post if post_norm else None, following, EPS)


@by_dtype
def test_weights_may_be_in_float32(dtype):
    """As other stacks hold a norm's; only there may dtypes differ."""
    torch.manual_seed(0)
    x, residual, w = random(3, 300, dtype=dtype), random(3, 300, dtype=dtype), random(300)
    assert_accurate(rmsnorm, x, w, EPS)
    assert_accurate(add_rmsnorm_, residual, x, w, w, EPS)
    if dtype != torch.float32:
        with pytest.raises(ValueError, match="weight is"):
            rmsnorm(x, w.double(), EPS)


def test_leading_axes_flatten():
    assert_accurate(rmsnorm, random(3, 5, 40), random(40), EPS)


@by_dtype
def test_rows_that_lie_apart(dtype):
    x, residual = random(5, 96, dtype=dtype)[:, 16:80], random(5, 70, dtype=dtype)[:, :64]
    w = random(64, dtype=dtype)
    assert_accurate(rmsnorm, x, w, EPS)
    assert_accurate(add_rmsnorm_, residual, x, w, w, EPS)


def test_zeros_are_the_identity_weight():
    """Multiplying by w instead of 1 + w would give zeros."""
    x = torch.tensor([[3.0, -3.0]], device=DEVICE)
    y = rmsnorm(x, torch.zeros(2, device=DEVICE), 0.0)
    torch.testing.assert_close(y, torch.tensor([[1.0, -1.0]], device=DEVICE))


@by_dtype
def test_a_row_does_not_depend_on_its_company(dtype):
    x, residual = random(16, 300, dtype=dtype), random(16, 300, dtype=dtype)
    w = random(300, dtype=dtype)

    def added(rows: slice) -> tuple[Tensor, Tensor]:
        kept = residual[rows].clone()
        return add_rmsnorm_(kept, x[rows], w, w, EPS), kept

    assert_row_invariant(lambda rows: rmsnorm(x[rows], w, EPS), 16)
    assert_row_invariant(added, 16)


def test_no_rows():
    w = random(8)
    assert rmsnorm(random(0, 8), w, EPS).shape == (0, 8)
    assert rmsnorm(random(2, 0, 8), w, EPS).shape == (2, 0, 8)
    assert add_rmsnorm_(random(0, 8), random(0, 8), w, w, EPS).shape == (0, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": random(7)}, r"weight is \[7\], must be \[8\]"),
        ({"weight": random(8).bfloat16()}, "weight is torch.bfloat16, the input torch.float32"),
        ({"weight": random(16)[::2]}, r"strides \[2\], must be contiguous"),
        ({"x": random(3, 8).int()}, "dtype torch.int32 is not supported"),
        ({"x": random(3, 16)[:, ::2]}, r"strides \[16, 2\], the last must be 1"),
        ({"x": random(4, 3, 8).transpose(0, 1)}, "no matrix of rows"),
        ({"x": random(1, 20000), "weight": random(20000)}, "20000 is not in 1 to 16384"),
        ({"x": torch.empty(3, 8, device="meta")}, "not meta"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        rmsnorm(**{"x": random(3, 8), "weight": random(8), "eps": EPS} | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"residual": random(4, 8)}, "residual has 4 rows, x 3"),
        ({"residual": random(3, 9)}, r"residual is \[3, 9\], must be \[M, 8\]"),
        ({"post_weight": random(9)}, r"post_weight is \[9\], must be \[8\]"),
        ({"next_weight": random(9)}, r"next_weight is \[9\], must be \[8\]"),
        ({"x": random(2, 3, 8).half()}, "x is torch.float16, partial sums must be float32"),
        ({"x": random(2, 3, 16)[..., ::2]}, r"x has strides \[48, 16, 2\], must be contiguous"),
        ({"x": random(0, 3, 8)}, r"x is \[0, 3, 8\]: not one partial sum"),
    ],
)
def test_bad_input_to_the_add(change, message):
    arguments = {"residual": random(3, 8), "x": random(3, 8), "post_weight": random(8)}
    arguments |= {"next_weight": random(8), "eps": EPS}
    with pytest.raises(ValueError, match=message):
        add_rmsnorm_(**arguments | change)
