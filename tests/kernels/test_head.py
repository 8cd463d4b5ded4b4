import pytest
import torch
from accuracy import DEVICE, assert_accurate, assert_row_invariant, by_dtype, random
from torch import Tensor

from gemcut.kernels.head import embed, lm_head, lm_head_argmax

pytestmark = pytest.mark.usefixtures("poisoned")
by_softcap = pytest.mark.parametrize("softcap", [None, 3.0], ids=["uncapped", "capped"])
by_shape = pytest.mark.parametrize(
    ("M", "V", "D"),
    [
        pytest.param(1, 256, 512, id="one-decode-step"),
        pytest.param(3, 97, 300, id="nothing-divides"),
        pytest.param(18, 70, 24, id="more-rows-than-a-tile"),
    ],
)


def ids_tensor(*ids: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(ids, dtype=dtype, device=DEVICE)


@by_dtype
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("D", [48, 4999], ids=["narrow", "two-programs"])
def test_embed(D, index, dtype):
    table = random(13, D, dtype=dtype)
    scale = torch.tensor(D**0.5, dtype=dtype).item()
    assert_accurate(embed, ids_tensor(12, 0, 5, 5, dtype=index), table, scale)


def test_an_id_outside_the_table_is_nan_not_foreign_memory():
    y = embed(ids_tensor(13, 1, -1, 2**40), random(13, 8), 2.0)
    assert y.isnan().all(-1).tolist() == [True, False, True, True]


@by_dtype
@by_softcap
@by_shape
def test_lm_head(M, V, D, softcap, dtype):
    torch.manual_seed(0)
    x, weight = random(M, D, dtype=dtype), random(V, D, dtype=dtype, scale=4 * D**-0.5)
    assert_accurate(lm_head, x, weight, softcap)


@by_dtype
@by_softcap
@by_shape
def test_argmax_is_that_of_the_logits_bit_for_bit(M, V, D, softcap, dtype):
    torch.manual_seed(0)
    x, weight = random(M, D, dtype=dtype), random(V, D, dtype=dtype, scale=4 * D**-0.5)
    best, ids = lm_head_argmax(x, weight, softcap)
    expected = lm_head(x, weight, softcap).max(-1)
    assert torch.equal(best, expected.values)
    assert torch.equal(ids, expected.indices)


def test_the_lowest_id_wins_a_tie():
    weight = torch.zeros(300, 8, device=DEVICE)
    weight[[70, 71, 200, 299], 0] = 1.0  # in several programs
    x = random(2, 8).abs()
    assert lm_head_argmax(x, weight, None)[1].tolist() == [70, 70]
    assert lm_head_argmax(-x, weight, None)[1].tolist() == [0, 0]


def test_nan_is_the_greatest():
    """A broken model must not look like one that has made up its mind."""
    x = random(2, 8)
    x[0, 3] = torch.nan
    best, ids = lm_head_argmax(x, random(200, 8), None)
    assert best.isnan().tolist() == [True, False]
    assert ids[0] == 0


@by_dtype
def test_a_row_does_not_depend_on_its_company(dtype):
    x, weight = random(18, 300, dtype=dtype), random(150, 300, dtype=dtype)
    assert_row_invariant(lambda rows: lm_head(x[rows], weight, 30.0), 18)
    assert_row_invariant(lambda rows: lm_head_argmax(x[rows], weight, 30.0), 18)


def test_counters_are_zero_again():
    x, weight = random(18, 24), random(150, 24)
    counters = torch.zeros(40, dtype=torch.int32, device=DEVICE)
    first = lm_head_argmax(x, weight, None, counters)
    assert not counters.any()
    second = lm_head_argmax(x, weight, None, counters)
    assert torch.equal(first[1], second[1])


def test_no_rows():
    assert embed(ids_tensor(), random(5, 8), 1.0).shape == (0, 8)
    assert lm_head(random(0, 8), random(5, 8), None).shape == (0, 5)
    assert [x.shape for x in lm_head_argmax(random(0, 8), random(5, 8), None)] == [(0,), (0,)]


def test_bad_input():
    x, weight = random(3, 8), random(5, 8)
    with pytest.raises(ValueError, match=r"table is \[8\], must be \[V, D\]"):
        embed(ids_tensor(1), random(8), 1.0)
    with pytest.raises(ValueError, match=r"token_ids is torch.int16, must be int64 or int32"):
        embed(ids_tensor(1).short(), weight, 1.0)
    with pytest.raises(ValueError, match=r"token_ids is \[1, 2\], must be \[2\]"):
        embed(ids_tensor(1, 2)[None], weight, 1.0)
    with pytest.raises(ValueError, match=r"x is \[3, 9\], must be \[M, 8\]"):
        lm_head(random(3, 9), weight, None)
    with pytest.raises(ValueError, match=r"softcap is 0\.0, must be above 0 and finite, or None"):
        lm_head(x, weight, 0.0)
    with pytest.raises(ValueError, match=r"counters are torch.int64, must be int32"):
        lm_head_argmax(x, weight, None, torch.zeros(1, dtype=torch.int64, device=DEVICE))
    with pytest.raises(ValueError, match=r"counters is \[1\], must be dense and at least \[36\]"):
        lm_head_argmax(random(17, 8), weight, None, ids_tensor(0, dtype=torch.int32))
    crooked = torch.zeros(40, dtype=torch.int32, device=DEVICE)[1:]
    with pytest.raises(ValueError, match="counters must begin at a multiple of 8 bytes"):
        lm_head_argmax(x, weight, None, crooked)
