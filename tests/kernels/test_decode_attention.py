import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from accuracy import DEVICE, assert_accurate, by_dtype, random

from gemcut.kernels import decode_attention
from gemcut.kernels.decode_attention import _tile, attention_decode
from gemcut.kernels.gpu_arch import SHARED_MEMORY

pytestmark = pytest.mark.usefixtures("poisoned")
by_q_len = pytest.mark.parametrize("T", [1, 3, 8])
W = 8
SCALE = 0.3  # not head_dim ** -0.5


def use_tile(monkeypatch, **tile: int) -> None:
    monkeypatch.setattr(decode_attention, "_tile", lambda *_: dict(tile))


@pytest.fixture
def small_tiles(monkeypatch) -> None:
    """Splits of two tiles of 16 keys: a few dozen keys make several."""
    use_tile(monkeypatch, SPLIT=32, BLOCK_N=16, num_warps=4, num_stages=2)


def rows(
    positions: list[int],
    slots: list[int] | None = None,
    *,
    T: int = 1,
    dtype: torch.dtype = torch.float32,
    shape: tuple[int, int, int] = (2, 1, 32),  # HQ, HK, K
    C: int = 128,
    sliding_window: int | None = None,
    softcap: float | None = None,
    index: torch.dtype = torch.int64,
) -> dict:
    """Arguments of an op; the cache holds NaN wherever no query of these rows may look."""
    (HQ, HK, K), slots = shape, slots or list(range(len(positions)))
    k_cache, v_cache = (random(max(slots) + 2, HK, C, K, dtype=dtype) for _ in range(2))
    unseen = torch.ones(max(slots) + 2, C, dtype=torch.bool, device=DEVICE)
    for first, slot in zip(positions, slots, strict=True):
        oldest = 0 if sliding_window is None else max(0, first - sliding_window + 1)
        unseen[slot, [position % C for position in range(oldest, first + T)]] = False
    for cache in (k_cache, v_cache):
        cache.transpose(1, 2)[unseen] = torch.nan
    return {
        "q": random(len(positions), T, HQ, K, dtype=dtype), "k_cache": k_cache, "v_cache": v_cache,
        "slots": torch.tensor(slots, device=DEVICE, dtype=index),
        "positions": torch.tensor(positions, device=DEVICE, dtype=index),
        "scale": SCALE, "softcap": softcap, "sliding_window": sliding_window,
    }  # fmt: skip


@by_dtype
@pytest.mark.parametrize("softcap", [None, 5.0], ids=["no-softcap", "softcap"])
@by_q_len
def test_a_window_in_a_ring(T, softcap, dtype):
    """kv_len 1, W - 1, W, W + 1 and 3 W + 5, where the capacity is the least that holds it."""
    torch.manual_seed(0)
    positions = [kv_len - 1 for kv_len in (1, W - 1, W, W + 1, 3 * W + 5, 20 * W)]
    arguments = rows(positions, T=T, dtype=dtype, C=W + T - 1, sliding_window=W, softcap=softcap)
    assert_accurate(attention_decode, **arguments)


@by_dtype
@pytest.mark.parametrize("softcap", [None, 5.0], ids=["no-softcap", "softcap"])
@by_q_len
@pytest.mark.usefixtures("small_tiles")
def test_several_splits(T, softcap, dtype):
    """Lengths about a split's and a tile's end, and all that the slot holds."""
    torch.manual_seed(0)
    positions = [128 - T, 31, 0, 32, 63 - T]
    arguments = rows(positions, [3, 0, 5, 1, 4], T=T, dtype=dtype, softcap=softcap)
    assert_accurate(attention_decode, **arguments)


@by_dtype
@by_q_len
@pytest.mark.usefixtures("small_tiles")
def test_a_window_over_several_splits(T, dtype):
    """The first tokens' window ends in another split than the last ones' where T is 8."""
    torch.manual_seed(0)
    arguments = rows(
        [500, 59, 95, 66], [2, 0, 4, 1],
        T=T, dtype=dtype, C=70, shape=(4, 2, 32), sliding_window=60, index=torch.int32,
    )  # fmt: skip
    assert_accurate(attention_decode, **arguments)


def test_a_split_that_a_token_does_not_see(monkeypatch):
    """The first token sees nothing of the last split, the last token nothing of the first."""
    torch.manual_seed(0)
    use_tile(monkeypatch, SPLIT=16, BLOCK_N=16, num_warps=4, num_stages=2)
    assert_accurate(attention_decode, **rows([29], T=8, sliding_window=15, C=22))


def test_more_splits_than_are_loaded_at_once(monkeypatch):
    """428 splits, 8 at a time, the later the greater the scores."""
    torch.manual_seed(0)
    use_tile(monkeypatch, SPLIT=16, BLOCK_N=16, num_warps=4, num_stages=2)
    monkeypatch.setitem(decode_attention.COMBINED, "BLOCK_S", 8)
    arguments = rows([11999, 90], C=12000, shape=(2, 1, 16))
    arguments["q"] = arguments["q"].abs()
    arguments["k_cache"] += torch.linspace(0, 1, 12000, device=DEVICE)[:, None]
    assert_accurate(attention_decode, **arguments)


@by_dtype
@pytest.mark.parametrize("window", [None, 400], ids=["global", "local"])
def test_the_number_of_programs_changes_no_bit(window, dtype, monkeypatch):
    """One program takes all splits of a head, or several share them."""
    torch.manual_seed(0)
    use_tile(monkeypatch, SPLIT=16, BLOCK_N=16, num_warps=4, num_stages=2)
    arguments = rows([600, 3], dtype=dtype, sliding_window=window, C=604)
    expected = attention_decode(**arguments)
    assert_accurate(attention_decode, **arguments)
    for programs in (1, 2, 5):
        monkeypatch.setattr(decode_attention, "MANY_PROGRAMS", programs * 2)
        assert torch.equal(attention_decode(**arguments), expected)


BY_ROW = ("q", "slots", "positions")


@pytest.fixture
def summed_in_order(monkeypatch) -> None:
    """The interpreter's products: NumPy's library adds up by a row's place in the matrix.

    Splits are added up four at a time, so that the place of each shows in the sum.
    """
    monkeypatch.setitem(decode_attention.COMBINED, "BLOCK_S", 4)
    monkeypatch.setattr(np, "matmul", lambda a, b, dtype: (a[:, :, None] * b).sum(1, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("heads", [(2, 1), (8, 1)], ids=["one-tile", "four-tiles"])
@pytest.mark.parametrize("window", [None, 250], ids=["global", "local"])
@pytest.mark.usefixtures("summed_in_order")
def test_a_draft_is_the_same_bits_as_its_tokens_alone(window, heads, dtype, monkeypatch):
    """Where a split ends; alone, each token has its own window and its own first split."""
    torch.manual_seed(0)
    use_tile(monkeypatch, SPLIT=16, BLOCK_N=16, num_warps=4, num_stages=2)
    # of a window of 250 from 501 on, the first key crosses a split's end as well
    draft = rows(
        [0, 12, 252, 501], T=8, dtype=dtype, C=512, shape=(*heads, 16), sliding_window=window
    )
    together = attention_decode(**draft)
    assert_accurate(attention_decode, **draft)
    for t in range(8):
        token = {"q": draft["q"][:, t : t + 1], "positions": draft["positions"] + t}
        assert torch.equal(attention_decode(**draft | token)[:, 0], together[:, t]), t
    three = {"q": draft["q"][:, 2:5], "positions": draft["positions"] + 2}
    assert torch.equal(attention_decode(**draft | three), together[:, 2:5])
    alone = {name: draft[name][2:3] for name in BY_ROW}
    assert torch.equal(attention_decode(**draft | alone)[0], together[2])


@pytest.mark.usefixtures("summed_in_order")
def test_a_draft_where_splits_double(monkeypatch):
    """Split 256 is the first of 32 keys, and key 4096 its first; the draft is at 4092 to 4099."""
    torch.manual_seed(0)
    use_tile(monkeypatch, SPLIT=16, BLOCK_N=16, num_warps=4, num_stages=2)
    draft = rows([4092], T=8, dtype=torch.bfloat16, C=4100, shape=(2, 1, 16))
    together = attention_decode(**draft)
    assert_accurate(attention_decode, **draft)
    for t in (0, 3, 4, 7):
        token = {"q": draft["q"][:, t : t + 1], "positions": draft["positions"] + t}
        assert torch.equal(attention_decode(**draft | token)[:, 0], together[:, t]), t


LAUNCHES = """
import torch
from gemcut.kernels import attention_decode
from gemcut.tools.launches import recorded

for dtype, K, G, window in SETTINGS:
    with recorded("sm_90") as found:
        for T, B, C, slots in CALLS:
            k, v = (torch.empty(slots, 2, C, K, device="cuda", dtype=dtype) for _ in range(2))
            width = (2 * G + 4) * K  # of q, k and v side by side
            strides = (T * width, width, K, 1)
            q = torch.empty_strided((B, T, 2 * G, K), strides, device="cuda", dtype=dtype)
            index = torch.empty(B, device="cuda", dtype=torch.int64)
            attention_decode(q, k, v, index, index, 0.1, None, window)
    print(*sorted(launch.kernel for launch in found), sep=",")
"""


def test_two_compiled_kernels_serve_every_call_of_a_model():
    """T, B, the capacity and the number of slots are neither constants nor known divisors."""
    settings = [(torch.bfloat16, 256, 2, None), (torch.bfloat16, 256, 8, 4096)]
    settings += [(torch.float32, 64, 1, 100)]
    calls = [(T, B, C, slots) for T in (1, 3, 8) for B, C, slots in ((1, 8192, 1), (16, 999, 16))]
    code = f"import torch\nSETTINGS, CALLS = {settings}, {calls}\n{LAUNCHES}"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-P", "-c", code]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    both = "attention_combine_kernel,attention_decode_kernel"
    assert run.stdout.split() == [both] * len(settings), run.stderr


def test_a_long_cache_is_cut_into_longer_splits(monkeypatch):
    use_tile(monkeypatch, SPLIT=16, BLOCK_N=16, num_warps=4, num_stages=2)
    monkeypatch.setattr(decode_attention, "MAX_SPLITS", 2)
    torch.manual_seed(0)
    assert_accurate(attention_decode, **rows([127, 70, 3]))


def test_a_long_window_is_cut_into_longer_splits(monkeypatch):
    use_tile(monkeypatch, SPLIT=16, BLOCK_N=16, num_warps=4, num_stages=2)
    monkeypatch.setattr(decode_attention, "UNIFORM_SPLITS", 2)
    torch.manual_seed(0)
    assert_accurate(attention_decode, **rows([299, 150, 3], sliding_window=100))


@by_dtype
@pytest.mark.parametrize("head_dim", [64, 128, 256, 96, 40, 18, 2])
@pytest.mark.usefixtures("small_tiles")
def test_head_dims(head_dim, dtype):
    torch.manual_seed(0)
    arguments = rows([40, 3], dtype=dtype, shape=(2, 1, head_dim), C=48)
    assert_accurate(attention_decode, **arguments | {"scale": head_dim**-0.5})


@by_q_len
@pytest.mark.parametrize("heads", [(3, 3), (4, 2), (4, 1), (8, 1), (6, 2)], ids=str)
@pytest.mark.usefixtures("small_tiles")
def test_groups(heads, T):
    torch.manual_seed(0)
    assert_accurate(attention_decode, **rows([50, 9], T=T, shape=(*heads, 16)))


@by_dtype
@pytest.mark.usefixtures("small_tiles")
def test_queries_that_lie_apart(dtype):
    torch.manual_seed(0)
    arguments = rows([40, 3], T=2, dtype=dtype)
    fused = random(2, 2, 4, 32, dtype=dtype)[:, :, :2]  # as a QKV product leaves them
    by_head = random(2, 2, 2, 32, dtype=dtype).transpose(1, 2)
    for q in (fused, by_head):
        assert_accurate(attention_decode, **arguments | {"q": q})


@by_dtype
@pytest.mark.parametrize("arch", SHARED_MEMORY)
def test_the_tiles_of_each_arch(arch, dtype, monkeypatch):
    torch.manual_seed(0)
    use_tile(monkeypatch, **_tile(64, 2, dtype.itemsize, arch))
    assert_accurate(attention_decode, **rows([299, 200], dtype=dtype, shape=(2, 1, 64), C=300))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("window", [None, 50], ids=["global", "local"])
@pytest.mark.usefixtures("small_tiles")
def test_a_row_is_the_same_bits_in_any_company(window, dtype):
    torch.manual_seed(0)
    positions = [100, 31, 0, 64, 90, -1, 33, 7, 126, 63, 62, 99, 50, 15, 16, 80]
    everything = rows(positions, dtype=dtype, shape=(2, 1, 16), sliding_window=window)

    def of(chosen: list[int]) -> torch.Tensor:
        return attention_decode(**everything | {name: everything[name][chosen] for name in BY_ROW})

    alone = torch.cat([of([row]) for row in (0, 1, 3, 8)])
    assert torch.equal(of(list(range(16)))[[0, 1, 3, 8]], alone)
    assert torch.equal(of([8, 2, 3, 1, 0])[[4, 3, 2, 0]], alone)
    assert torch.equal(of([0, 5])[0], alone[0])


@by_dtype
@by_q_len
@pytest.mark.usefixtures("small_tiles")
def test_an_inactive_row_yields_zeros(T, dtype):
    """Its slot and its keys are not read, whatever stands there."""
    torch.manual_seed(0)
    arguments = rows([3, 50], T=T, dtype=dtype)
    arguments["positions"][0] = -1
    arguments["k_cache"][0] = torch.nan
    assert_accurate(attention_decode, **arguments)
    arguments["positions"][0] = -5
    arguments["slots"][0] = 1000
    y = attention_decode(**arguments)
    assert torch.all(y[0] == 0)
    assert not y[1].isnan().any()


def test_no_element_is_left_unwritten(monkeypatch):
    """More columns and splits than one program of the sum takes, inactive rows among them."""
    monkeypatch.setitem(decode_attention.COMBINED, "BLOCK_S", 2)
    use_tile(monkeypatch, SPLIT=16, BLOCK_N=16, num_warps=4, num_stages=2)
    torch.manual_seed(0)
    arguments = rows([100, 5, 40], T=3, shape=(6, 2, 40))
    arguments["positions"][1] = -1
    assert_accurate(attention_decode, **arguments)


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param({"slots": -1}, id="slot-below"),
        pytest.param({"slots": 4}, id="slot-above"),
        pytest.param({"positions": 126}, id="longer-than-the-cache"),
        pytest.param({"positions": 2**40}, id="far-longer-than-the-cache"),
        pytest.param({"positions": 2**63 - 1}, id="beyond-64-bits"),
    ],
)
@pytest.mark.usefixtures("small_tiles")
def test_what_no_slot_holds_yields_nan(wrong):
    torch.manual_seed(0)
    arguments = rows([5, 100, 70], T=3)
    expected = attention_decode(**arguments)
    for name, value in wrong.items():
        arguments[name][1] = value
    y = attention_decode(**arguments)
    assert y[1].isnan().all()
    assert torch.equal(y[[0, 2]], expected[[0, 2]])


def test_a_window_that_the_ring_has_overwritten_yields_nan():
    arguments = rows([40], T=3, C=W + 2, sliding_window=W)
    assert not attention_decode(**arguments).isnan().any()
    arguments["k_cache"], arguments["v_cache"] = (random(2, 1, W + 1, 32) for _ in range(2))
    assert attention_decode(**arguments).isnan().all()


@pytest.mark.usefixtures("small_tiles")
def test_a_cache_beyond_32_bits():
    """Slot 32 begins 2 ** 31 elements into the cache; 4 GiB of it are never touched."""
    torch.manual_seed(0)
    seen = random(1, 1, 64, 64, dtype=torch.float16)
    cache = seen.new_empty(33, 1, 2**20, 64)
    cache[32, 0, :64] = seen[0, 0]
    arguments = rows([10], C=64, dtype=torch.float16, shape=(2, 1, 64))
    # a window of 64 sees the same keys, and keeps the grid small
    expected = attention_decode(**arguments | {"k_cache": seen, "v_cache": seen})
    arguments |= {"k_cache": cache, "v_cache": cache, "sliding_window": 64}
    arguments["slots"] = torch.tensor([32], device=DEVICE)
    assert torch.equal(attention_decode(**arguments), expected)


def test_no_rows():
    nothing = torch.zeros(0, device=DEVICE, dtype=torch.int64)
    arguments = rows([0]) | {"q": random(0, 1, 2, 32), "slots": nothing, "positions": nothing}
    assert attention_decode(**arguments).shape == (0, 1, 2, 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": random(2, 4, 32)}, r"q is \[2, 4, 32\], must be \[B, T, HQ, K\]"),
        ({"q": random(2, 1, 4, 16)}, "q has head_dim 16, the cache 32"),
        ({"q": random(2, 1, 4, 32).double()}, "dtype torch.float64 is not supported"),
        ({"q": random(2, 1, 4, 64)[..., ::2]}, "the last must be 1"),
        ({"q": random(2, 1, 3, 32)}, "3 query heads cannot share 2 KV heads evenly"),
        ({"q": random(2, 9, 4, 32)}, "9 new tokens are not in 1 to 8"),
        ({"q": random(2, 0, 4, 32)}, "0 new tokens are not in 1 to 8"),
        ({"q": random(2, 1, 130, 32)}, "65 query heads on a KV head exceed 64"),
        ({"k_cache": random(2, 128, 32)}, "k_cache is .*, must be .slots, HK, C, K"),
        ({"v_cache": random(3, 2, 127, 32)}, r"\[3, 2, 127, 32\], must be \[3, 2, 128, 32\]"),
        ({"v_cache": random(3, 2, 128, 32).half()}, "v_cache is torch.float16, the input"),
        ({"slots": torch.zeros(2, device=DEVICE)}, "slots is torch.float32"),
        ({"positions": torch.zeros(3, device=DEVICE).long()}, r"is \[3\], must be \[2\]"),
        ({"positions": torch.zeros(2, device="meta").long()}, "positions is on meta"),
        ({"scale": -1.0}, "scale -1.0 is not above 0"),
        ({"scale": math.inf}, "scale inf is not above 0 and finite"),
        ({"softcap": math.inf}, "softcap is inf, must be above 0 and finite"),
        ({"softcap": -1.0}, "softcap is -1.0, must be above 0"),
        ({"sliding_window": 0}, "sliding_window 0 is below 1"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        attention_decode(**rows([5, 0], shape=(4, 2, 32)) | change)


def test_more_tokens_than_the_cache_holds():
    with pytest.raises(ValueError, match="3 new tokens do not fit a capacity of 2"):
        attention_decode(**rows([0], T=2, C=2) | {"q": random(1, 3, 2, 32)})


@pytest.mark.parametrize("head_dim", [258, 17])
def test_bad_head_dim(head_dim):
    with pytest.raises(ValueError, match=f"head_dim {head_dim} is not even and in 2 to 256"):
        attention_decode(**rows([5], shape=(1, 1, head_dim)))
