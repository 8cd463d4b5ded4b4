"""A cache in fp8 with a scale a head: what is stored, and attention over it."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from accuracy import DEVICE, assert_accurate, assert_row_invariant, random
from op_cases import in_fp8, index, positional, small_calls
from torch import Tensor

from gemcut import kernels
from gemcut.kernels import checks, cpu, cpu_rows, decode_attention, prefill_attention, reference
from gemcut.kernels.quantized_weight import quantize

pytestmark = pytest.mark.usefixtures("poisoned")
FP8 = torch.float8_e4m3fn
GREATEST = 448
OPS = ["attention_decode", "attention_prefill", "linear_rope_and_store_", "rope_and_store_"]
TABLES = [kernels, cpu] if DEVICE == "cpu" else [kernels]
by_table = pytest.mark.parametrize("ops", TABLES, ids=lambda ops: ops.__name__.split(".")[-1])
by_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
by_window = pytest.mark.parametrize("window", [None, 20], ids=["global", "local"])


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def small_tiles(monkeypatch) -> None:
    """A few dozen tokens cross several tiles and splits."""
    tile = {"BLOCK_N": 16, "num_warps": 4, "num_stages": 2}
    monkeypatch.setattr(decode_attention, "_tile", lambda *_: {"SPLIT": 32, **tile})
    monkeypatch.setattr(prefill_attention, "_tile", lambda *_: {"BLOCK_M": 16, **tile})


@by_table
@pytest.mark.parametrize("name", OPS)
def test_small_calls(name, ops):
    assert_accurate(getattr(ops, name), **in_fp8(small_calls()[name]))


@by_table
def test_beside_a_quantised_weight(ops):
    arguments = in_fp8(small_calls()["linear_rope_and_store_"])
    arguments["weight"] = quantize(arguments["weight"], "int8")
    assert_accurate(ops.linear_rope_and_store_, **arguments)


@pytest.mark.parametrize("name", OPS)
def test_opcheck(name):
    arguments = positional(name, in_fp8(small_calls()[name]))
    op = getattr(torch.ops.gemcut, name).default
    cloned = tuple(x.clone() if isinstance(x, Tensor) else x for x in arguments)
    # the other checks compare tensors, which torch cannot in fp8
    results = torch.library.opcheck(op, cloned, test_utils="test_faketensor")
    assert set(results.values()) == {"SUCCESS"}


def cache_of(positions: list[int], dtype: torch.dtype, window: int | None, C: int, T: int) -> dict:
    """Rows with their cache, NaN wherever no query looks; the scales differ by a factor of 100."""
    HQ, HK, K = 4, 2, 32
    caches = {f"{name}_cache": random(len(positions) + 1, HK, C, K) for name in "kv"}
    unseen = torch.ones(len(positions) + 1, C, dtype=torch.bool, device=DEVICE)
    for slot, first in enumerate(positions):
        oldest = 0 if window is None else max(0, first - window + 1)
        unseen[slot, [position % C for position in range(oldest, first + T)]] = False
    for cache in caches.values():
        cache.transpose(1, 2)[unseen] = torch.nan
    return {
        "q": random(len(positions), T, HQ, K, dtype=dtype),
        **{name: (20 * cache).to(FP8) for name, cache in caches.items()},
        "k_scale": torch.tensor([0.05, 0.0005], device=DEVICE),
        "v_scale": torch.tensor([3.0, 0.03], device=DEVICE),
        "slots": torch.arange(len(positions), device=DEVICE),
        "scale": 0.3,
        "softcap": 5.0,
        "sliding_window": window,
    }


@by_table
@by_window
@by_dtype
@pytest.mark.parametrize("T", [1, 5])
@pytest.mark.usefixtures("small_tiles")
def test_decode(T, dtype, window, ops):
    positions = [0, 19, 20, 21, 65 if window is None else 200]
    arguments = cache_of(positions, dtype, window, 70, T)
    assert_accurate(ops.attention_decode, **arguments, positions=index(*positions))


@by_table
@by_window
@by_dtype
@pytest.mark.usefixtures("small_tiles")
def test_prefill(dtype, window, ops):
    starts = [0, 20, 33 if window is None else 150]
    arguments = cache_of(starts, dtype, window, 72, T=37)
    arguments["q"] = arguments["q"].flatten(0, 1)
    chunks = {"starts": index(*starts), "cu_seqlens": index(0, 37, 74, 111)}
    assert_accurate(ops.attention_prefill, **arguments, **chunks)


@pytest.mark.usefixtures("small_tiles")
def test_a_head_dim_that_no_power_of_two_divides():
    cache, scale = (3 * random(2, 1, 40, 18)).to(FP8), torch.tensor([0.3], device=DEVICE)
    common = {"k_cache": cache, "v_cache": cache.clone(), "k_scale": scale, "v_scale": scale}
    common |= {"slots": index(0, 1), "scale": 0.3, "softcap": None, "sliding_window": None}
    q, positions = random(2, 1, 2, 18, dtype=torch.bfloat16), index(30, 7)
    assert_accurate(kernels.attention_decode, q=q, positions=positions, **common)
    chunks = {"starts": positions, "cu_seqlens": index(0, 1, 2)}
    assert_accurate(kernels.attention_prefill, q=q[:, 0], **chunks, **common)


@by_dtype
@pytest.mark.usefixtures("small_tiles")
def test_a_row_does_not_depend_on_its_company(dtype):
    positions = [40, 3, 33, 62]
    arguments = cache_of(positions, dtype, None, 70, T=1)
    by_row = {name: arguments.pop(name) for name in ("q", "slots")}

    def attended(rows: slice) -> Tensor:
        own = {name: x[rows] for name, x in by_row.items()}
        return kernels.attention_decode(**own, positions=index(*positions)[rows], **arguments)

    assert_row_invariant(attended, 4)


@by_dtype
@pytest.mark.usefixtures("small_tiles")
def test_drafts_are_what_their_tokens_are_alone(dtype, monkeypatch):
    # NumPy's library would add up by a row's place in the matrix
    monkeypatch.setattr(np, "matmul", lambda a, b, dtype: (a[:, :, None] * b).sum(1, dtype=dtype))
    arguments = cache_of([30, 0], dtype, None, 70, T=4)
    positions = index(30, 0)
    together = kernels.attention_decode(**arguments, positions=positions)
    for t in range(4):
        alone = arguments | {"q": arguments["q"][:, t : t + 1], "positions": positions + t}
        assert torch.equal(kernels.attention_decode(**alone)[:, 0], together[:, t])


# What is stored: without a rotation, and at scales that are powers of two, exactly the cast


def storing(values: Tensor, scale: float) -> dict:
    """Values [M, 3 K] of one head's q, k and v that no angle turns, at positions 0 to M - 1."""
    M, K = values.shape[0], values.shape[1] // 3
    cos, sin = (torch.full((M, 1, K), x, device=DEVICE, dtype=values.dtype) for x in (1.0, 0.0))
    cache = torch.full((1, 1, M, K), torch.nan, device=DEVICE).to(FP8)
    return {
        "qkv": values,
        "k_cache": cache,
        "v_cache": cache.clone(),
        "slots": torch.zeros(M, dtype=torch.int64, device=DEVICE),
        "positions": torch.arange(M, device=DEVICE),
        "cos": cos,
        "sin": sin,
        "k_scale": torch.tensor([scale], device=DEVICE),
        "v_scale": torch.tensor([2 * scale], device=DEVICE),
    }


def edges(dtype: torch.dtype) -> Tensor:
    """Every value of e4m3, halfway between two, beside that, and far beyond the greatest."""
    values = torch.arange(1, 127, dtype=torch.uint8).view(FP8).float()
    halfway = (values[1:] + values[:-1]) / 2
    far = torch.tensor([460, 464, 479, 480, 1e4, 1e30, 2e-3, 5e-4, 1e-12])
    x = torch.cat([values, halfway, 0.99 * halfway, 1.01 * halfway, far])
    return torch.cat([x, -x])[:1024].to(DEVICE, dtype)


def expected(x: Tensor, scale: float) -> Tensor:
    """The definition in bytes: to the nearest, ties to even, saturated."""
    return (x.float() / scale).clamp(-GREATEST, GREATEST).to(FP8).view(torch.uint8)


@pytest.mark.parametrize("ops", [*TABLES, reference], ids=lambda ops: ops.__name__.split(".")[-1])
@by_dtype
@pytest.mark.parametrize("scale", [1.0, 0.25, 8.0])
def test_stores_round_to_the_nearest_and_saturate(scale, dtype, ops):
    x = edges(dtype)
    x = torch.nn.functional.pad(x, (0, -len(x) % 32)).view(-1, 32)
    arguments = storing(torch.cat([x, x * scale, x * 2 * scale], 1), scale)
    q = ops.rope_and_store_(**arguments)
    assert torch.equal(q[:, 0], x)
    for name, factor in (("k", scale), ("v", 2 * scale)):
        stored = arguments[f"{name}_cache"][0, 0].view(torch.uint8)
        assert torch.equal(stored, expected(x * factor, factor)), name


@pytest.mark.parametrize("ops", [*TABLES, reference], ids=lambda ops: ops.__name__.split(".")[-1])
def test_the_product_that_stores(ops):
    """The same of linear_rope_and_store_, whose weight is the identity."""
    x = edges(torch.float32)[:992].view(-1, 32)
    arguments = storing(torch.cat([x, x, x], 1), 1.0)
    arguments |= {"x": arguments.pop("qkv"), "weight": torch.eye(96, device=DEVICE), "bias": None}
    ops.linear_rope_and_store_(**arguments)
    assert torch.equal(arguments["k_cache"][0, 0].view(torch.uint8), expected(x, 1.0))
    assert torch.equal(arguments["v_cache"][0, 0].view(torch.uint8), expected(x, 2.0))


@by_table
@pytest.mark.parametrize("name", ["k", "v"])
def test_nan_stays_nan(name, ops):
    x = torch.ones(4, 96, device=DEVICE)
    x[2, 40 if name == "k" else 70] = torch.nan
    arguments = storing(x, 1.0)
    ops.rope_and_store_(**arguments)
    assert arguments[f"{name}_cache"].isnan().any(-1).tolist() == [[[False, False, True, False]]]
    caches = {key: arguments[key] for key in ("k_cache", "v_cache", "k_scale", "v_scale")}
    seen = ops.attention_decode(
        x[:, None, None, :32].nan_to_num(), **caches, slots=index(0, 0, 0, 0),
        positions=arguments["positions"], scale=1.0, softcap=None, sliding_window=None,
    )  # fmt: skip
    assert seen.isnan().flatten(1).any(1).tolist() == [False, False, True, True]


def test_every_byte_is_widened():
    x = torch.arange(256, dtype=torch.uint8).view(FP8)
    assert cpu_rows.holds_nan(x)
    assert not cpu_rows.holds_nan(x[:127])
    assert not cpu_rows.holds_nan(x[128:255])
    assert not cpu_rows.holds_nan(x[:0])
    for part in (x, x[:127], x[128:255], x[:0], x[:120].view(4, 30)[:, 3:20]):
        widened = cpu_rows.widened(part)
        torch.testing.assert_close(widened, part.float(), rtol=0, atol=0, equal_nan=True)
        assert torch.equal(widened.signbit(), part.float().signbit())


ONE = torch.ones(2)


@pytest.mark.parametrize("name", ["attention_decode", "rope_and_store_"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k_scale": None}, r"a cache of fp8 needs k_scale \[2\]"),
        ({"v_scale": None}, r"a cache of fp8 needs v_scale \[2\]"),
        ({"k_scale": torch.ones(3)}, r"k_scale is \[3\], must be \[2\]"),
        ({"v_scale": ONE.double()}, "v_scale is torch.float64, must be torch.float32|float32"),
        ({"v_cache": random(2, 2, 8, 16)}, "v_cache is torch.float32, k_cache torch.float8_e4m3fn"),
        ({"k_cache": random(2, 2, 8, 16)}, "scales are for a cache of fp8|v_cache is torch.float8"),
        ({name: random(2, 2, 8, 16) for name in ("k_cache", "v_cache")}, "scales are for a cache"),
        ({"k_cache": torch.zeros(2, 2, 8, 16).to(torch.float8_e5m2)}, "float8_e5m2"),
    ],
)
def test_bad_input(name, change, message):
    arguments = in_fp8(small_calls()[name])
    change = {key: x if x is None else x.to(DEVICE) for key, x in change.items()}
    with pytest.raises(ValueError, match=message):
        getattr(kernels, name)(**arguments | change)


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0)], ids=str)
def test_gpus_that_cannot_convert_are_refused(capability, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    checks.converts_fp8.cache_clear()
    expected = nullcontext() if capability >= (8, 9) else pytest.raises(ValueError, match="sm_89")
    with expected:
        checks.check_converts_fp8(torch.device("cuda", 0))
    checks.converts_fp8.cache_clear()
