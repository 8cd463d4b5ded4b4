import pytest
import torch
from accuracy import DTYPES, assert_accurate, assert_row_invariant, random
from test_matmul import by_dtype, by_kind, stream
from torch import Tensor

from gemcut.kernels import mlp
from gemcut.kernels.mlp import geglu, norm_linear_geglu

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning"),
]


@by_dtype
@pytest.mark.parametrize(
    ("M", "F"),
    [
        pytest.param(1, 2048, id="two-programs"),
        pytest.param(5, 1027, id="nothing-divides"),
        pytest.param(3, 1, id="width-one"),
    ],
)
def test_geglu(M, F, dtype):
    torch.manual_seed(0)
    assert_accurate(geglu, random(M, 2 * F, dtype=dtype, scale=3))


@by_dtype
def test_geglu_far_from_zero(dtype):
    """2 ** x overflows for negative gates, where GELU is zero."""
    gate = torch.tensor([[-60000.0, -100.0, -10.0, 10.0, 100.0, 60000.0]])
    gate_up = torch.cat([gate, torch.ones_like(gate)], dim=1).to(random(1).device, dtype)
    assert_accurate(geglu, gate_up)


def test_geglu_of_rows_that_lie_apart():
    assert_accurate(geglu, random(4, 30)[:, 5:25])


@by_dtype
@by_kind
@pytest.mark.parametrize(
    ("M", "F", "D"),
    [
        pytest.param(1, 64, 512, id="one-decode-step"),
        pytest.param(3, 37, 300, id="nothing-divides"),
        pytest.param(18, 8, 24, id="more-rows-than-a-tile"),
    ],
)
def test_norm_linear_geglu(M, F, D, kind, dtype):
    torch.manual_seed(0)
    weight = random(2 * F, D, dtype=dtype, scale=D**-0.5)
    assert_accurate(norm_linear_geglu, **stream(M, D, dtype, kind), gate_up_weight=weight)


def test_a_wide_mlp_takes_larger_tiles():
    """As in gemma-2-2b and up; D is short here, to save time."""
    torch.manual_seed(0)
    weight = random(2 * 9216, 24, dtype=torch.bfloat16)
    before = stream(2, 24, torch.bfloat16, "sandwich")
    assert mlp._tile(9216, weight)["BLOCK_N"] == 64
    assert_accurate(norm_linear_geglu, **before, gate_up_weight=weight)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_a_row_does_not_depend_on_its_company(dtype):
    weight, before = random(2 * 40, 300, dtype=dtype), stream(18, 300, dtype, "sandwich")

    def combined(rows: slice) -> tuple[Tensor, Tensor]:
        taken = {"residual": before["residual"][rows], "branch": before["branch"][rows]}
        return norm_linear_geglu(**before | taken, gate_up_weight=weight)

    assert_row_invariant(combined, 18)


def test_no_rows():
    assert geglu(random(0, 8)).shape == (0, 4)
    before = stream(0, 8, torch.float32, "sandwich")
    y, summed = norm_linear_geglu(**before, gate_up_weight=random(10, 8))
    assert (y.shape, summed.shape) == ((0, 5), (0, 8))


def test_bad_input():
    with pytest.raises(ValueError, match=r"gate_up is \[3, 7\], must be \[M, 2 F\]"):
        geglu(random(3, 7))
    with pytest.raises(ValueError, match=r"gate_up is \[8\], must be \[M, 2 F\]"):
        geglu(random(8))
    with pytest.raises(ValueError, match=r"strides \[16, 2\], the last must be 1"):
        geglu(random(3, 16)[:, ::2])
    before = stream(3, 8, torch.float32, "sandwich")
    with pytest.raises(ValueError, match="gate_up_weight has 9 rows"):
        norm_linear_geglu(**before, gate_up_weight=random(9, 8))
    with pytest.raises(ValueError, match=r"branch is \[2, 8\], must be \[3, 8\]"):
        norm_linear_geglu(**before | {"branch": random(2, 8)}, gate_up_weight=random(10, 8))
