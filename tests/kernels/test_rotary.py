"""Rotation and the cache's filling, against the oracle; and what must not be written."""

import pytest
import torch
from accuracy import DEVICE, assert_accurate, by_dtype, random

from gemcut.kernels import reference
from gemcut.kernels.rotary import rope_and_store_, rope_tables

pytestmark = pytest.mark.usefixtures("poisoned")
NUM_SLOTS, C = 3, 7


def frequencies(K: int, theta: float = 10_000.0) -> torch.Tensor:
    return (theta ** -(torch.arange(0, K, 2) / K)).to(DEVICE)


def step(HQ: int, HK: int, K: int, dtype: torch.dtype, norm: bool = False) -> dict:
    """Tokens of three slots out of order, at the ring's start, wrapped, and at 131071.

    What the cache held before is NaN: only what is stored may change.
    """
    torch.manual_seed(0)
    slots = torch.tensor([2, 0, 1, 0, 2], device=DEVICE)
    positions = torch.tensor([3, 9, 131071, C - 1, C], device=DEVICE)
    cos, sin = reference.rope_tables(positions, frequencies(K), 1.0, dtype)
    cache = torch.full((NUM_SLOTS, HK, C, K), torch.nan, device=DEVICE, dtype=dtype)
    return {
        "qkv": random(5, (HQ + 2 * HK) * K, dtype=dtype, scale=3),
        "k_cache": cache,
        "v_cache": cache.clone(),
        "slots": slots,
        "positions": positions,
        "cos": cos,
        "sin": sin,
        "q_norm_weight": random(K, dtype=dtype) if norm else None,
        "k_norm_weight": random(K, dtype=dtype) if norm else None,
    }


@by_dtype
@pytest.mark.parametrize("norm", [True, False], ids=["gemma-3", "no-norm"])
@pytest.mark.parametrize(
    ("HQ", "HK", "K"),
    [
        pytest.param(4, 1, 256, id="group-4"),
        pytest.param(4, 2, 128, id="group-2"),
        pytest.param(3, 3, 64, id="group-1-odd-head-count"),
        pytest.param(2, 1, 18, id="head-dim-not-power-of-two"),
        pytest.param(1, 1, 2, id="smallest-head"),
    ],
)
def test_rope_and_store(HQ, HK, K, norm, dtype):
    assert_accurate(rope_and_store_, **step(HQ, HK, K, dtype, norm))


@by_dtype
@pytest.mark.parametrize("norm", [True, False], ids=["gemma-3", "no-norm"])
def test_rows_that_lie_apart(norm, dtype):
    arguments = step(2, 1, 64, dtype, norm)
    arguments["qkv"] = random(5, 300, dtype=dtype)[:, 11 : 11 + 256]
    assert_accurate(rope_and_store_, **arguments)


def test_indices_of_32_bits():
    arguments = step(2, 1, 64, torch.float32)
    arguments |= {name: arguments[name].int() for name in ("slots", "positions")}
    assert_accurate(rope_and_store_, **arguments)


def test_one_decode_step_of_one_row():
    arguments = step(2, 1, 64, torch.bfloat16)
    for name in ("qkv", "slots", "positions", "cos", "sin"):
        arguments[name] = arguments[name][:1]
    assert_accurate(rope_and_store_, **arguments)


def test_values_are_stored_as_they_are():
    arguments = step(2, 1, 64, torch.bfloat16, norm=True)
    rope_and_store_(**arguments)
    stored = arguments["v_cache"][arguments["slots"], 0, arguments["positions"] % C]
    assert stored.equal(arguments["qkv"][:, -64:])


def test_a_row_does_not_depend_on_the_batch():
    together = step(4, 2, 64, torch.bfloat16, norm=True)
    q = rope_and_store_(**together)
    for row in range(5):
        alone = step(4, 2, 64, torch.bfloat16, norm=True)
        for name in ("qkv", "slots", "positions", "cos", "sin"):
            alone[name] = alone[name][row : row + 1]
        assert rope_and_store_(**alone)[0].equal(q[row])
        place = (alone["slots"], slice(None), alone["positions"] % C)
        assert alone["k_cache"][place].equal(together["k_cache"][place])


def test_an_inactive_row_stores_nothing():
    arguments = step(2, 1, 64, torch.float32)
    arguments["positions"] = torch.tensor([-1, 9, -1, -7, C], device=DEVICE)
    # slot 1, index -1 would be the end of slot 0
    arguments["slots"] = torch.tensor([1, 0, -77, 99, 2], device=DEVICE)
    assert_accurate(rope_and_store_, **arguments)


def test_a_slot_outside_the_cache_yields_nan_and_writes_nothing():
    """The host cannot check a slot without waiting for the device, and memory stays safe."""
    arguments = step(2, 1, 64, torch.float32)
    arguments["slots"] = torch.tensor([-1, NUM_SLOTS, 2**40, 1, -(2**62)], device=DEVICE)
    q = rope_and_store_(**arguments)
    assert q.isnan().flatten(1).all(1).tolist() == [True, True, True, False, True]
    assert not q[3].isnan().any()
    for cache in (arguments["k_cache"], arguments["v_cache"]):
        stored = cache.isfinite()
        assert stored[1, :, C - 1].all()
        assert stored.sum() == 64


def test_the_norm_weight_is_an_offset_from_one():
    """Multiplying by w instead of 1 + w would give zeros."""
    arguments = step(1, 1, 2, torch.float32)
    arguments |= {
        name: torch.zeros(2, device=DEVICE) for name in ("q_norm_weight", "k_norm_weight")
    }
    arguments["qkv"] = torch.full((5, 6), 3.0, device=DEVICE)
    q = rope_and_store_(**arguments)
    torch.testing.assert_close(q.square().sum(-1), torch.full((5, 1), 2.0, device=DEVICE))


@by_dtype
@pytest.mark.parametrize("integer", [torch.int64, torch.int32], ids=["int64", "int32"])
@pytest.mark.parametrize("scaling", [1.0, 1.37], ids=["plain", "scaled"])
@pytest.mark.parametrize("K", [256, 18])
@pytest.mark.parametrize("by_row", [False, True], ids=["shared", "frequencies-by-row"])
def test_rope_tables(by_row, K, scaling, integer, dtype):
    positions = torch.tensor([0, 1, 257, 8191, 131071], device=DEVICE, dtype=integer)
    inv_freq = frequencies(K)
    if by_row:  # dynamic and longrope
        inv_freq = inv_freq / torch.arange(1, 6, device=DEVICE)[:, None]
    assert_accurate(rope_tables, positions, inv_freq, scaling, dtype)


def test_no_rows():
    none = torch.empty(0, dtype=torch.int64, device=DEVICE)
    tables = rope_tables(none, frequencies(64), 1.0, torch.float32)
    assert [table.shape for table in tables] == [(0, 1, 64)] * 2
    arguments = step(2, 1, 64, torch.float32)
    for name in ("qkv", "slots", "positions", "cos", "sin"):
        arguments[name] = arguments[name][:0]
    assert rope_and_store_(**arguments).shape == (0, 2, 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv": random(5, 33)}, r"qkv is 33 wide, must be \(HQ \+ 2 \* 2\) \* 8"),
        ({"qkv": random(5, 4 * 8)}, "qkv is 32 wide"),
        ({"qkv": random(5, 7 * 8)}, "HQ a multiple of 2"),
        ({"qkv": random(5, 96)[:, ::2]}, r"strides \[96, 2\], the last must be 1"),
        ({"qkv": random(5, 6, 8)}, r"qkv is 8 wide, must be"),
        ({"qkv": random(48)}, r"qkv is \[48\], must be \[M,"),
        ({"qkv": random(2, 5, 48).half()}, "qkv is torch.float16, partial sums must be float32"),
        ({"qkv": random(5, 48).half()}, "k_cache is torch.float32, the input torch.float16"),
        ({"qkv": random(5, 48).double()}, "torch.float64 is not supported"),
        ({"qkv": torch.empty(5, 48, device="meta")}, "not meta"),
        ({"k_cache": random(3, 2, 8)}, r"k_cache is \[3, 2, 8\], must be \[slots"),
        ({"k_cache": random(3, 2, 4, 7)}, "head_dim 7 is not even"),
        ({"k_cache": random(1, 1, 1, 258)}, "head_dim 258 is not even and in 2 to 256"),
        ({"k_cache": random(3, 0, 4, 8)}, "must hold heads"),
        ({"k_cache": random(3, 4, 2, 8).transpose(1, 2)}, r"v_cache has strides .*, as k_cache"),
        ({"v_cache": random(3, 2, 5, 8)}, r"v_cache is \[3, 2, 5, 8\], must be \[3, 2, 4, 8\]"),
        ({"slots": torch.zeros(4, dtype=torch.int64)}, r"slots is \[4\], must be \[5\]"),
        ({"slots": torch.zeros(5)}, "slots is torch.float32, must be int64 or int32"),
        ({"positions": torch.zeros(5, 1, dtype=torch.int64)}, r"positions is \[5, 1\]"),
        ({"positions": torch.zeros(10, dtype=torch.int64, device=DEVICE)[::2]}, "must be contig"),
        ({"cos": random(5, 8)}, r"cos is \[5, 8\], must be \[5, 1, 8\]"),
        ({"sin": random(4, 1, 8)}, r"sin is \[4, 1, 8\], must be \[5, 1, 8\]"),
        ({"q_norm_weight": random(8)}, r"q_norm_weight is given as \[8\] and k_norm_weight absent"),
        (
            {"q_norm_weight": random(8), "k_norm_weight": random(9)},
            r"k_norm_weight is \[9\], must be \[8\]",
        ),
    ],
)
def test_bad_input(change, message):
    arguments = {
        "qkv": random(5, 6 * 8),
        "k_cache": random(3, 2, 4, 8),
        "v_cache": random(3, 2, 4, 8),
        "slots": torch.zeros(5, dtype=torch.int64, device=DEVICE),
        "positions": torch.zeros(5, dtype=torch.int64, device=DEVICE),
        "cos": random(5, 1, 8),
        "sin": random(5, 1, 8),
    }
    with pytest.raises(ValueError, match=message):
        rope_and_store_(
            **arguments | {name: x if x.is_meta else x.to(DEVICE) for name, x in change.items()}
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positions": torch.zeros(3)}, "positions is torch.float32"),
        ({"positions": torch.zeros(3, 1).long()}, r"positions is \[3, 1\], must be \[M\]"),
        ({"inv_freq": torch.ones(4).double()}, "torch.float64"),
        ({"inv_freq": torch.ones(4).half()}, "inv_freq is torch.float16, must be torch.float32"),
        ({"inv_freq": torch.ones(2, 4)}, r"inv_freq is \[2, 4\], must be \[3, 4\]"),
        ({"inv_freq": torch.ones(2, 3, 4)}, r"must be \[K/2\] or \[M, K/2\]"),
        ({"inv_freq": torch.ones(129)}, "head_dim 258 is not in 2 to 256"),
        ({"inv_freq": torch.ones(8, device=DEVICE)[::2]}, "must be contiguous"),
        ({"dtype": torch.float64}, "torch.float64 is not supported"),
    ],
)
def test_bad_input_to_the_tables(change, message):
    arguments = {"positions": torch.zeros(3).long(), "inv_freq": torch.ones(4)} | change
    arguments = {
        name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()
    }
    with pytest.raises(ValueError, match=message):
        rope_tables(**{"attention_scaling": 1.0, "dtype": torch.float32} | arguments)
