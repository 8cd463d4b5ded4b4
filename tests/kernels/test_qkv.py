import pytest
import torch
from accuracy import (
    DEVICE,
    assert_accurate,
    assert_row_invariant,
    by_dtype,
    by_weight,
    quantized,
    random,
)
from torch import Tensor

from gemcut.kernels import qkv, reference
from gemcut.kernels.qkv import linear_rope_and_store_

pytestmark = pytest.mark.usefixtures("poisoned")
CAPACITY = 7
POSITIONS = [40, 3, -1, 0, 6, 7, 13, 100]  # a ring turned often, one inactive row


def layer(
    rows: int,
    *,
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 64,
    D: int = 96,
    bias: bool = False,
    qk_norm: bool = False,
    dtype: torch.dtype = torch.float32,
) -> dict:
    """What the first kernel of a layer reads; the cache is NaN, as nobody wrote it."""
    torch.manual_seed(0)
    HQ, HK = heads
    width = (HQ + 2 * HK) * head_dim
    positions = torch.tensor((POSITIONS * 3)[:rows], dtype=torch.int64, device=DEVICE)
    inv_freq = 10000 ** -torch.arange(0, 1, 2 / head_dim, device=DEVICE)
    cos, sin = reference.rope_tables(positions, inv_freq, 1.0, dtype)
    cache = torch.full((rows + 1, HK, CAPACITY, head_dim), torch.nan, dtype=dtype, device=DEVICE)
    return {
        "x": random(rows, D, dtype=dtype),
        "weight": random(width, D, dtype=dtype, scale=D**-0.5),
        "bias": random(width, dtype=dtype) if bias else None,
        "k_cache": cache,
        "v_cache": cache.clone(),
        "slots": torch.arange(rows, device=DEVICE).flip(0),
        "positions": positions,
        "cos": cos,
        "sin": sin,
        "q_norm_weight": random(head_dim, dtype=dtype) if qk_norm else None,
        "k_norm_weight": random(head_dim, dtype=dtype) if qk_norm else None,
    }


@by_dtype
@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param({"rows": 3}, id="three-rows"),
        pytest.param({"rows": 1, "heads": (4, 1), "head_dim": 256, "D": 300}, id="gemma-3-1b"),
        pytest.param({"rows": 19, "heads": (2, 2)}, id="more-rows-than-a-tile"),
        pytest.param({"rows": 8, "heads": (8, 1), "head_dim": 18, "D": 40}, id="nothing-divides"),
        pytest.param({"rows": 2, "head_dim": 96, "bias": True}, id="bias"),
        pytest.param({"rows": 4, "qk_norm": True, "bias": True}, id="q-and-k-norm"),
    ],
)
def test_sizes(sizes, dtype):
    assert_accurate(linear_rope_and_store_, **layer(**sizes, dtype=dtype))


@by_dtype
@by_weight
@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param({"rows": 3, "D": 384}, id="three-rows"),
        pytest.param({"rows": 2, "heads": (8, 1), "head_dim": 18, "D": 300}, id="nothing-divides"),
        pytest.param({"rows": 2, "qk_norm": True, "bias": True}, id="q-and-k-norm"),
    ],
)
def test_quantised_weights(sizes, kind, dtype):
    arguments = layer(**sizes, dtype=dtype)
    arguments["weight"] = quantized(*arguments["weight"].shape, kind, dtype)
    assert_accurate(linear_rope_and_store_, **arguments)


def test_indices_of_32_bits():
    arguments = layer(3)
    narrow = {name: arguments[name].int() for name in ("slots", "positions")}
    assert_accurate(linear_rope_and_store_, **arguments | narrow)


def test_a_slot_outside_the_cache_is_nan_and_stores_nothing():
    arguments = layer(3) | {"slots": torch.tensor([4, 0, -1], device=DEVICE)}
    arguments["positions"] = arguments["positions"].abs()
    q = linear_rope_and_store_(**arguments)
    assert q.isnan().all(-1).all(-1).tolist() == [True, False, True]
    written = ~arguments["k_cache"].isnan().all(-1)  # [slots, HK, C]
    assert written.nonzero()[:, 0].unique().tolist() == [0]


@by_dtype
def test_a_row_does_not_depend_on_its_company(dtype):
    arguments = layer(17, heads=(2, 1), head_dim=32, D=300, dtype=dtype)
    per_row = ("x", "slots", "positions", "cos", "sin")

    def queries_and_keys(rows: slice) -> tuple[Tensor, ...]:
        taken = {name: arguments[name][rows] for name in per_row}
        taken |= {name: arguments[name].clone() for name in ("k_cache", "v_cache")}
        q = linear_rope_and_store_(**arguments | taken)
        slots = arguments["slots"][rows]
        stored = (taken["k_cache"][slots].nan_to_num(), taken["v_cache"][slots].nan_to_num())
        return q, *stored

    assert_row_invariant(queries_and_keys, 17)


def test_no_rows():
    assert linear_rope_and_store_(**layer(0)).shape == (0, 4, 64)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("weight", random(500, 96), "weight is 500 wide, must be"),
        ("weight", random(512, 95), r"x is \[3, 96\], must be \[M, 95\]"),
        ("bias", random(511), r"bias is \[511\], must be \[512\]"),
        ("k_cache", random(4, 2, 7), r"must be \[slots, HK, C, K\]"),
        ("v_cache", random(4, 2, 8, 64), r"v_cache is \[4, 2, 8, 64\], must be \[4, 2, 7, 64\]"),
        ("k_cache", random(4, 2, 7, 64).half(), "k_cache is torch.float16"),
        ("slots", torch.zeros(2, dtype=torch.int64, device=DEVICE), r"slots is \[2\]"),
        ("positions", random(3), "positions is torch.float32, must be int64 or int32"),
        ("cos", random(3, 64), r"cos is \[3, 64\], must be \[3, 1, 64\]"),
        ("q_norm_weight", random(64), "both or neither"),
        ("x", random(3, 95), r"x is \[3, 95\]"),
    ],
)
def test_bad_input(name, value, message):
    with pytest.raises(ValueError, match=message):
        linear_rope_and_store_(**layer(3) | {name: value})


@pytest.mark.parametrize(("name", "shape"), [("k_norm_weight", (63,)), ("v_cache", (4, 2, 8, 64))])
def test_bad_input_to_the_second_launch_stops_the_first(name, shape, monkeypatch):
    """Gemma 3 takes two launches; whatever is wrong with the second is known before."""
    monkeypatch.setattr(qkv, "skinny_linear", None)
    with pytest.raises(ValueError, match=f"{name} is"):
        linear_rope_and_store_(**layer(3, qk_norm=True) | {name: random(*shape)})
