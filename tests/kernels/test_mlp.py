import pytest
import torch
from accuracy import (
    assert_accurate,
    assert_row_invariant,
    by_dtype,
    by_weight,
    quantized,
    random,
)

from gemcut.kernels import gpu_arch, mlp
from gemcut.kernels.mlp import geglu, linear_geglu

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
@pytest.mark.parametrize(
    ("M", "F", "D"),
    [
        pytest.param(1, 64, 512, id="one-decode-step"),
        pytest.param(3, 37, 300, id="nothing-divides"),
        pytest.param(18, 8, 24, id="more-rows-than-a-tile"),
    ],
)
def test_linear_geglu(M, F, D, dtype):
    torch.manual_seed(0)
    weight = random(2 * F, D, dtype=dtype, scale=D**-0.5)
    assert_accurate(linear_geglu, random(M, D, dtype=dtype), weight)


@by_dtype
@by_weight
@pytest.mark.parametrize(("M", "F", "D"), [(1, 64, 384), (3, 37, 300)], ids=["even", "odd"])
def test_linear_geglu_of_quantised_weights(M, F, D, kind, dtype):
    torch.manual_seed(0)
    assert_accurate(linear_geglu, random(M, D, dtype=dtype), quantized(2 * F, D, kind, dtype))


@by_weight
def test_programs_of_fewer_rows_of_a_quantised_weight(kind, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(mlp, "_share", lambda *_: 7)
    dtype = torch.bfloat16
    assert_accurate(linear_geglu, random(3, 384, dtype=dtype), quantized(74, 384, kind, dtype))


@by_dtype
@pytest.mark.parametrize("share", [1, 7, 20])
def test_programs_of_fewer_rows_than_their_tile(share, dtype, monkeypatch):
    """Every row once, the last program's fewer ones too."""
    torch.manual_seed(0)
    monkeypatch.setattr(mlp, "_share", lambda *_: share)
    weight = random(2 * 37, 48, dtype=dtype, scale=48**-0.5)
    assert_accurate(linear_geglu, random(3, 48, dtype=dtype), weight)


@pytest.mark.parametrize(
    ("F", "share"),
    [
        pytest.param(9216, 24, id="gemma-2-2b: 384 of 396 places"),
        pytest.param(14336, 28, id="gemma-2-9b: 512 of 528"),
        pytest.param(6912, 18, id="vaultgemma-1b: 384 of 396"),
        pytest.param(36864, 32, id="gemma-2-27b: three waves but for 36"),
        pytest.param(2048, 32, id="gemma-3-270m: a program a processor"),
        pytest.param(10**6, 32, id="many waves"),
    ],
)
def test_rows_of_a_program_on_an_h200(F, share, monkeypatch):
    monkeypatch.setattr(gpu_arch, "ARCH_OF_A_CPU", "sm_90")
    x = torch.empty(1, 2304, dtype=torch.bfloat16)
    weight = torch.empty(2 * F, 2304, device="meta", dtype=torch.bfloat16)
    assert mlp._share(weight, x, mlp._tile(weight, x)) == share


@by_dtype
def test_rows_of_x_that_lie_apart(dtype):
    assert_accurate(linear_geglu, random(3, 40, dtype=dtype)[:, 8:32], random(20, 24, dtype=dtype))


@by_dtype
def test_a_row_does_not_depend_on_its_company(dtype):
    x, weight = random(18, 300, dtype=dtype), random(2 * 40, 300, dtype=dtype)
    assert_row_invariant(lambda rows: linear_geglu(x[rows], weight), 18)


@by_weight
def test_a_row_by_a_quantised_weight_does_not_depend_on_its_company(kind):
    x, weight = random(18, 384, dtype=torch.bfloat16), quantized(80, 384, kind)
    assert_row_invariant(lambda rows: linear_geglu(x[rows], weight), 18)


def test_no_rows():
    assert geglu(random(0, 8)).shape == (0, 4)
    assert linear_geglu(random(0, 8), random(10, 8)).shape == (0, 5)


def test_bad_input():
    with pytest.raises(ValueError, match=r"gate_up is \[3, 7\], must be \[M, 2 F\]"):
        geglu(random(3, 7))
    with pytest.raises(ValueError, match=r"gate_up is \[8\], must be \[M, 2 F\]"):
        geglu(random(8))
    with pytest.raises(ValueError, match=r"strides \[16, 2\], the last must be 1"):
        geglu(random(3, 16)[:, ::2])
    with pytest.raises(ValueError, match="gate_up_weight has 9 rows"):
        linear_geglu(random(3, 8), random(9, 8))
    with pytest.raises(ValueError, match=r"x is \[3, 9\], must be \[M, 8\]"):
        linear_geglu(random(3, 9), random(10, 8))
