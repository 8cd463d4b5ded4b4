import pytest
import torch
import triton
import triton.language as tl
from accuracy import DEVICE, assert_accurate, by_dtype, random
from torch import Tensor

from gemcut.kernels import attention_tiles, prefill_attention
from gemcut.kernels.gpu_arch import SHARED_MEMORY
from gemcut.kernels.interpreter import INTERPRETED
from gemcut.kernels.prefill_attention import _tile, attention_prefill

pytestmark = pytest.mark.usefixtures("poisoned")
W = 8
SCALE = 0.3  # not head_dim ** -0.5


def use_tile(monkeypatch, **tile: int) -> None:
    monkeypatch.setattr(prefill_attention, "_tile", lambda *_: dict(tile))


@pytest.fixture
def small_tiles(monkeypatch) -> None:
    """Tiles of 16 x 16: a few dozen tokens cross several."""
    use_tile(monkeypatch, BLOCK_M=16, BLOCK_N=16, num_warps=4, num_stages=2)


def chunks(
    lengths: list[int],
    starts: list[int],
    slots: list[int] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    shape: tuple[int, int, int] = (2, 1, 32),  # HQ, HK, K
    C: int = 64,
    sliding_window: int | None = None,
    softcap: float | None = None,
    index: torch.dtype = torch.int64,
) -> dict:
    """Arguments of an op; the cache holds NaN wherever no query of these chunks may look."""
    (HQ, HK, K), slots = shape, slots or list(range(len(lengths)))
    k_cache, v_cache = (random(max(slots) + 2, HK, C, K, dtype=dtype) for _ in range(2))
    unseen = torch.ones(max(slots) + 2, C, dtype=torch.bool, device=DEVICE)
    for length, start, slot in zip(lengths, starts, slots, strict=True):
        oldest = 0 if sliding_window is None else max(0, start - sliding_window + 1)
        unseen[slot, [position % C for position in range(oldest, start + length)]] = False
    for cache in (k_cache, v_cache):
        cache.transpose(1, 2)[unseen] = torch.nan
    ends = torch.tensor([0, *lengths]).cumsum(0)
    return {
        "q": random(int(ends[-1]), HQ, K, dtype=dtype), "k_cache": k_cache, "v_cache": v_cache,
        "slots": torch.tensor(slots, device=DEVICE, dtype=index),
        "starts": torch.tensor(starts, device=DEVICE, dtype=index),
        "cu_seqlens": ends.to(DEVICE, index),
        "scale": SCALE, "softcap": softcap, "sliding_window": sliding_window,
    }  # fmt: skip


@by_dtype
@pytest.mark.parametrize("softcap", [None, 5.0], ids=["no-softcap", "softcap"])
@pytest.mark.parametrize("kv_len", [1, W - 1, W, W + 1, 3 * W + 5])
@pytest.mark.usefixtures("small_tiles")
def test_a_whole_prompt_in_a_window(kv_len, softcap, dtype):
    torch.manual_seed(0)
    arguments = chunks([kv_len], [0], dtype=dtype, sliding_window=W, softcap=softcap)
    assert_accurate(attention_prefill, **arguments)


@by_dtype
@pytest.mark.parametrize("kv_len", [W - 1, W, W + 1, 3 * W + 5])
@pytest.mark.usefixtures("small_tiles")
def test_the_last_chunk_in_a_ring(kv_len, dtype):
    """The capacity is the least that holds the chunk and its window; the ring wraps three times."""
    torch.manual_seed(0)
    C = W - 1 + 3
    arguments = chunks([3], [kv_len - 3], dtype=dtype, C=C, sliding_window=W)
    assert_accurate(attention_prefill, **arguments)


@by_dtype
@pytest.mark.parametrize("softcap", [None, 5.0], ids=["no-softcap", "softcap"])
@pytest.mark.parametrize(
    ("length", "start", "window"),
    [
        pytest.param(70, 0, None, id="first-chunk"),
        pytest.param(33, 46, None, id="one-key-beyond-a-tile's-first-query"),
        pytest.param(70, 1, 20, id="window-over-two-tiles"),
        pytest.param(40, 613, 45, id="window-with-whole-tiles-in-a-ring"),
        pytest.param(18, 100, 20, id="one-key-outside-the-last-tile's-window"),
    ],
)
@pytest.mark.usefixtures("small_tiles")
def test_several_tiles(length, start, window, softcap, dtype):
    torch.manual_seed(0)
    C = 96 if window else length + start
    arguments = chunks([length], [start], dtype=dtype, C=C, sliding_window=window, softcap=softcap)
    assert_accurate(attention_prefill, **arguments)


@by_dtype
@pytest.mark.parametrize("window", [None, W], ids=["global", "local"])
@pytest.mark.usefixtures("small_tiles")
def test_chunks_of_several_requests(window, dtype):
    torch.manual_seed(0)
    arguments = chunks(
        [5, 1, 35, 16], [20, 63 if window is None else 200, 0, 3], [3, 0, 4, 1],
        dtype=dtype, shape=(4, 2, 32), sliding_window=window, index=torch.int32,
    )  # fmt: skip
    assert_accurate(attention_prefill, **arguments)


@pytest.mark.usefixtures("small_tiles")
def test_an_empty_chunk_changes_nothing():
    torch.manual_seed(0)
    arguments = chunks([17, 20], [0, 30], [2, 0])
    expected = attention_prefill(**arguments)
    for name, values in {
        "slots": [1, 2, 1, 1, 0, 1], "starts": [7, 0, 0, 50, 30, 0],
        "cu_seqlens": [0, 0, 17, 17, 17, 37, 37],
    }.items():  # fmt: skip
        arguments[name] = torch.tensor(values, device=DEVICE)
    assert torch.equal(attention_prefill(**arguments), expected)


@by_dtype
@pytest.mark.parametrize("head_dim", [64, 128, 256, 96, 40, 18, 2])
@pytest.mark.usefixtures("small_tiles")
def test_head_dims(head_dim, dtype):
    torch.manual_seed(0)
    arguments = chunks([5], [20], dtype=dtype, shape=(1, 1, head_dim), C=25)
    assert_accurate(attention_prefill, **arguments | {"scale": head_dim**-0.5})


@pytest.mark.parametrize("heads", [(3, 3), (4, 2), (4, 1), (16, 2)], ids=lambda heads: str(heads))
@pytest.mark.usefixtures("small_tiles")
def test_groups(heads):
    torch.manual_seed(0)
    assert_accurate(attention_prefill, **chunks([5], [20], shape=(*heads, 16)))


@by_dtype
@pytest.mark.usefixtures("small_tiles")
def test_queries_that_lie_apart(dtype):
    torch.manual_seed(0)
    arguments = chunks([21], [0], dtype=dtype, shape=(2, 1, 32))
    fused = random(21, 4, 32, dtype=dtype)[:, :2]  # as a QKV product leaves them
    by_head = random(2, 21, 32, dtype=dtype).transpose(0, 1)
    for q in (fused, by_head):
        assert_accurate(attention_prefill, **arguments | {"q": q})


@by_dtype
@pytest.mark.parametrize("arch", SHARED_MEMORY)
def test_the_tiles_of_each_arch(arch, dtype, monkeypatch):
    torch.manual_seed(0)
    use_tile(monkeypatch, **_tile(64, dtype.itemsize, arch))
    arguments = chunks([150], [50], dtype=dtype, shape=(1, 1, 64), C=200, sliding_window=90)
    assert_accurate(attention_prefill, **arguments)


@by_dtype
@pytest.mark.usefixtures("small_tiles")
def test_an_inactive_chunk_yields_zeros(dtype):
    """Its slot and its keys are not read, whatever stands there."""
    torch.manual_seed(0)
    arguments = chunks([5, 3], [0, 0], dtype=dtype)
    arguments["starts"][0] = -1
    arguments["k_cache"][0] = torch.nan
    assert_accurate(attention_prefill, **arguments)
    arguments["slots"][0] = 1000
    y = attention_prefill(**arguments)
    assert torch.all(y[:5] == 0)
    assert not y[5:].isnan().any()


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param({"slots": -1}, id="slot-below"),
        pytest.param({"slots": 4}, id="slot-above"),
        pytest.param({"starts": 60}, id="longer-than-the-cache"),
        pytest.param({"starts": 2**40}, id="far-longer-than-the-cache"),
    ],
)
@pytest.mark.usefixtures("small_tiles")
def test_what_no_slot_holds_yields_nan(wrong):
    torch.manual_seed(0)
    arguments = chunks([5, 20, 3], [0, 1, 2])
    expected = attention_prefill(**arguments)
    for name, value in wrong.items():
        arguments[name][1] = value
    y = attention_prefill(**arguments)
    assert y[5:25].isnan().all()
    assert torch.equal(y[:5], expected[:5])
    assert torch.equal(y[25:], expected[25:])


def test_a_window_that_the_ring_has_overwritten_yields_nan():
    arguments = chunks([10], [40], C=W - 1 + 10, sliding_window=W)
    assert not attention_prefill(**arguments).isnan().any()
    arguments["k_cache"], arguments["v_cache"] = (random(2, 1, W - 1 + 9, 32) for _ in range(2))
    assert attention_prefill(**arguments).isnan().all()


@pytest.mark.usefixtures("small_tiles")
def test_a_cache_beyond_32_bits():
    """Slot 32 begins 2 ** 31 elements into the cache; 4 GiB of it are never touched."""
    torch.manual_seed(0)
    small = chunks([5], [20], dtype=torch.float16)
    cache = random(1).half().new_empty(33, 1, 2**20, 64)
    cache[32, 0, :64, :32] = small["k_cache"][0, 0]
    cache[32, 0, :64, 32:] = small["v_cache"][0, 0]
    k_cache = cache[32:, :, :64].contiguous()
    large = small | {"q": random(5, 2, 64, dtype=torch.float16), "k_cache": cache, "v_cache": cache}
    expected = attention_prefill(**large | {"k_cache": k_cache, "v_cache": k_cache})
    large["slots"] = torch.tensor([32], device=DEVICE)
    assert torch.equal(attention_prefill(**large), expected)


@triton.jit
def coarse_tanh(x, APPROXIMATE: tl.constexpr):
    """Tanh with a relative error of 2 ** -11, the hardware's worst, up or down by the bits of x."""
    t = attention_tiles_tanh(x, False)
    bits = x.to(tl.int32, bitcast=True)
    up = ((bits ^ (bits >> 7) ^ (bits >> 13)) & 1) == 1
    return t * tl.where(up, 1.0 + 2.0**-11, 1.0 - 2.0**-11)


attention_tiles_tanh = attention_tiles.tanh


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("spread", [1.0, 4.0])
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.skipif(not INTERPRETED, reason="a GPU takes the instruction itself, in every test")
def test_the_hardware_tanh_is_accurate_enough(spread, dtype, monkeypatch):
    """The interpreter gets its worst error."""
    torch.manual_seed(0)
    monkeypatch.setattr(attention_tiles, "tanh", coarse_tanh)
    arguments = chunks([60], [0], dtype=dtype, shape=(2, 1, 64), softcap=50.0)
    assert_accurate(attention_prefill, **arguments | {"scale": spread / 8})


def test_no_rows():
    assert attention_prefill(**chunks([0], [0])).shape == (0, 2, 32)
    arguments = chunks([0], [0]) | {name: torch.empty(0).long() for name in ("slots", "starts")}
    arguments["cu_seqlens"] = torch.zeros(1).long()
    assert attention_prefill(**{k: _moved(v) for k, v in arguments.items()}).shape == (0, 2, 32)


def _moved(x):
    return x.to(DEVICE) if isinstance(x, Tensor) else x


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": random(5, 64)}, r"q is \[5, 64\], must be \[M, HQ, K\]"),
        ({"q": random(5, 2, 16)}, "q has head_dim 16, the cache 32"),
        ({"q": random(5, 2, 32).double()}, "dtype torch.float64 is not supported"),
        ({"q": random(5, 2, 64)[..., ::2]}, r"strides \[128, 64, 2\], the last must be 1"),
        ({"q": random(5, 3, 32)}, "3 query heads cannot share 2 KV heads evenly"),
        ({"k_cache": random(2, 64, 32)}, r"k_cache is \[2, 64, 32\], must be \[slots, HK, C, K\]"),
        ({"k_cache": random(2, 64, 2, 32).transpose(1, 2)}, r"v_cache has strides .*, as k_cache"),
        ({"v_cache": random(2, 2, 63, 32)}, r"\[2, 2, 63, 32\], must be \[2, 2, 64, 32\]"),
        ({"v_cache": random(2, 2, 64, 32).half()}, "v_cache is torch.float16, the input"),
        ({"slots": torch.zeros(1, device=DEVICE)}, "slots is torch.float32"),
        ({"starts": torch.zeros(2, device=DEVICE).long()}, r"starts is \[2\], must be \[1\]"),
        ({"cu_seqlens": torch.zeros(1, device=DEVICE).long()}, r"is \[1\], must be \[2\]"),
        ({"slots": torch.zeros(1, device="meta").long()}, "slots is on meta"),
        ({"q": random(65, 2, 32)}, "65 rows in 1 chunks do not fit a capacity of 64"),
        ({"scale": 0.0}, "scale 0.0 is not above 0"),
        ({"softcap": 0.0}, "softcap is 0.0, must be above 0"),
        ({"sliding_window": 0}, "sliding_window 0 is below 1"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        attention_prefill(**chunks([5], [0], shape=(2, 2, 32)) | change)


@pytest.mark.parametrize("head_dim", [258, 17])
def test_bad_head_dim(head_dim):
    with pytest.raises(ValueError, match=f"head_dim {head_dim} is not even and in 2 to 256"):
        attention_prefill(**chunks([5], [0], shape=(1, 1, head_dim)))


def test_a_slot_beyond_32_bits():
    """Offsets within a head are 32-bit; no published model comes near.  No memory is touched."""
    cache = random(1).new_empty(1, 1, 2**26, 32)
    with pytest.raises(ValueError, match="67108864 tokens of a head, 32 elements apart, are not"):
        attention_prefill(**chunks([5], [0]) | {"k_cache": cache, "v_cache": cache})
