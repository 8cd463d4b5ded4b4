"""A paged cache, and slots of any strides: the same bits as dense slots, where both hold the same.

Whatever a table names for no query is no block at all, and whatever no query sees is NaN.
"""

import pytest
import torch
from accuracy import DEVICE, assert_accurate, random
from op_cases import in_blocks, in_fp8, index, positional, small_calls
from torch import Tensor

from gemcut import kernels
from gemcut.kernels import cpu, decode_attention, prefill_attention, reference

pytestmark = pytest.mark.usefixtures("poisoned")
FP8 = torch.float8_e4m3fn
OPS = ["attention_decode", "attention_prefill", "linear_rope_and_store_", "rope_and_store_"]
STORES = OPS[2:]
TABLES = [kernels, cpu] if DEVICE == "cpu" else [kernels]
by_table = pytest.mark.parametrize("ops", TABLES, ids=lambda ops: ops.__name__.split(".")[-1])
by_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, FP8], ids=["fp32", "bf16", "fp8"]
)
by_window = pytest.mark.parametrize("window", [None, 20], ids=["global", "local"])
by_block = pytest.mark.parametrize("block_size", [1, 7, 16, 32])
NO_BLOCKS = (-1, 2**31 - 1, -(2**31))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def small_tiles(monkeypatch) -> None:
    """A few dozen tokens cross several tiles and splits."""
    tile = {"BLOCK_N": 16, "num_warps": 4, "num_stages": 2}
    monkeypatch.setattr(decode_attention, "_tile", lambda *_: {"SPLIT": 32, **tile})
    monkeypatch.setattr(prefill_attention, "_tile", lambda *_: {"BLOCK_M": 16, **tile})


def call(
    starts: list[int], T: int, window: int | None, dtype: torch.dtype, softcap: float | None = None
) -> dict:
    """Rows of T new tokens over dense slots, which hold NaN wherever no query looks."""
    HQ, HK, K, C = 2, 2, 16, 96
    rows = len(starts)
    unseen = torch.ones(rows + 1, C, dtype=torch.bool, device=DEVICE)
    slots = list(range(rows, 0, -1))
    for slot, start in zip(slots, starts, strict=True):
        unseen[slot, max(0, start - (window or C) + 1) : start + T] = False
    found = {}
    for name in ("k_cache", "v_cache"):
        cache = 20 * random(rows + 1, HK, C, K) if dtype == FP8 else random(rows + 1, HK, C, K)
        cache.transpose(1, 2)[unseen] = torch.nan
        found[name] = cache.to(dtype)
    if dtype == FP8:
        found["k_scale"] = torch.tensor([0.05, 0.0005], device=DEVICE)
        found["v_scale"] = torch.tensor([3.0, 0.03], device=DEVICE)
    return found | {
        "q": random(rows, T, HQ, K, dtype=torch.bfloat16 if dtype == FP8 else dtype),
        "slots": index(*slots),
        "positions": index(*starts),
        "scale": 0.3,
        "softcap": softcap,
        "sliding_window": window,
    }


def as_prefill(arguments: dict) -> dict:
    """The same rows as chunks of a prefill."""
    rows, T = arguments["q"].shape[:2]
    chunks = {"starts": arguments["positions"], "cu_seqlens": index(*range(0, rows * T + 1, T))}
    rest = {name: x for name, x in arguments.items() if name != "positions"}
    return rest | chunks | {"q": arguments["q"].flatten(0, 1)}


def paged(arguments: dict, block_size: int) -> dict:
    """In blocks; an entry of a block that holds nothing is no block."""
    found = in_blocks(arguments, block_size)
    tables, k_cache = found["block_tables"], found["k_cache"]
    is_empty = k_cache[tables.long()].float().isnan().flatten(2).all(-1)
    wrong = torch.tensor(NO_BLOCKS, dtype=torch.int32, device=DEVICE)
    tables[is_empty] = wrong[torch.randint(3, (int(is_empty.sum()),), device=DEVICE)]
    return found


def as_vllm_had_it(arguments: dict) -> dict:
    """Keys in one half of a tensor, values in the other, [2, blocks, block_size, HK, K]."""
    k_cache, v_cache = torch.stack([arguments["k_cache"], arguments["v_cache"]]).unbind(0)
    return arguments | {"k_cache": k_cache, "v_cache": v_cache}


def heads_before_tokens(arguments: dict) -> dict:
    """[blocks, HK, block_size, K], as FlashInfer's HND layout has it."""
    swapped = {}
    for name in ("k_cache", "v_cache"):
        swapped[name] = arguments[name].transpose(1, 2).contiguous().transpose(1, 2)
    return arguments | swapped


@by_dtype
@by_block
@pytest.mark.parametrize(
    ("T", "window", "softcap"),
    [(1, None, 5.0), (1, 20, None), (5, None, None), (5, 20, 5.0)],
    ids=["global", "local", "drafts", "local drafts"],
)
@pytest.mark.usefixtures("small_tiles")
def test_decode_is_that_of_slots_bit_for_bit(T, window, softcap, block_size, dtype):
    arguments = call([0, 20, 70], T, window, dtype, softcap)
    expected = kernels.attention_decode(**arguments)
    assert not expected.isnan().any()
    assert torch.equal(kernels.attention_decode(**paged(arguments, block_size)), expected)


@by_dtype
@by_block
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (20, 5.0)], ids=["global", "local"])
@pytest.mark.usefixtures("small_tiles")
def test_prefill_is_that_of_slots_bit_for_bit(window, softcap, block_size, dtype):
    arguments = as_prefill(call([0, 43], 37, window, dtype, softcap))
    expected = kernels.attention_prefill(**arguments)
    assert not expected.isnan().any()
    assert torch.equal(kernels.attention_prefill(**paged(arguments, block_size)), expected)


@by_dtype
@pytest.mark.parametrize("layout", [as_vllm_had_it, heads_before_tokens])
def test_other_layouts_of_blocks(layout, dtype):
    decode = call([3, 40, 70], 2, 20, dtype)
    prefill = as_prefill(call([3, 40], 25, None, dtype))
    for op, arguments in ((kernels.attention_decode, decode), (kernels.attention_prefill, prefill)):
        expected = op(**arguments)
        assert torch.equal(op(**layout(paged(arguments, 16))), expected)


@by_dtype
@by_window
def test_slots_of_other_strides(window, dtype):
    """Tokens before heads, as transformers has them before it transposes."""
    arguments = call([3, 40, 70], 2, window, dtype)
    prefill = as_prefill(arguments)
    swapped = {}
    for name in ("k_cache", "v_cache"):
        swapped[name] = arguments[name].transpose(1, 2).contiguous().transpose(1, 2)
    assert not swapped["k_cache"].is_contiguous()
    expected = kernels.attention_decode(**arguments)
    assert torch.equal(kernels.attention_decode(**arguments | swapped), expected)
    expected = kernels.attention_prefill(**prefill)
    assert torch.equal(kernels.attention_prefill(**prefill | swapped), expected)


@by_table
def test_slots_that_begin_at_any_token_of_a_row(ops):
    """Rows with padding on the left, one [B, HK, S, K]: slot b * HK * S + pad is row b's."""
    B, HK, S, K, pads, lengths = 3, 2, 40, 32, [4, 0, 31], [36, 40, 9]
    # as_strided must find all of the last slot, of S tokens from its pad on
    rows = {name: random(B + 1, HK, S, K)[:B] for name in ("k_cache", "v_cache")}
    views, dense = {}, {}
    for name, x in rows.items():
        for b, pad in enumerate(pads):
            x[b, :, :pad] = torch.nan
        count = (B - 1) * HK * S + S
        views[name] = x.as_strided((count, HK, S, K), (K, S * K, K, 1))
        dense[name] = torch.stack([x[b].roll(-pad, 1) for b, pad in enumerate(pads)])
    common = {"q": random(B, 1, 4, K), "scale": 0.3, "softcap": None, "sliding_window": None}
    common["positions"] = index(*(n - 1 for n in lengths))
    slots = index(*(b * HK * S + pad for b, pad in enumerate(pads)))
    found = ops.attention_decode(**common, **views, slots=slots)
    expected = ops.attention_decode(**common, **dense, slots=index(0, 1, 2))
    assert torch.equal(found, expected)


@by_table
@by_block
@pytest.mark.parametrize("window", [None, 9], ids=["global", "local"])
@pytest.mark.usefixtures("small_tiles")
def test_rows_that_share_their_first_blocks(window, block_size, ops):
    """A prefix in common is there once; each goes on in blocks of its own."""
    arguments = call([63, 63], 3, None, torch.float32) | {"sliding_window": window}
    shared = 60 // block_size * block_size
    for name in ("k_cache", "v_cache"):
        arguments[name][1, :, :shared] = arguments[name][2, :, :shared]
    found = in_blocks(arguments, block_size)
    tables, count = found["block_tables"], shared // block_size
    tables[1, :count] = tables[2, :count]
    expected = ops.attention_decode(**arguments)
    assert torch.equal(ops.attention_decode(**found), expected)
    expected = ops.attention_prefill(**as_prefill(arguments))
    assert torch.equal(ops.attention_prefill(**as_prefill(found)), expected)


@by_table
@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("block_size", [1, 3, 8])
def test_small_calls(name, block_size, ops):
    for arguments in (small_calls()[name], in_fp8(small_calls()[name])):
        assert_accurate(getattr(ops, name), **in_blocks(arguments, block_size))


@pytest.mark.parametrize("name", OPS)
def test_opcheck(name):
    arguments = positional(name, in_blocks(small_calls()[name]))
    op = getattr(torch.ops.gemcut, name).default
    results = torch.library.opcheck(op, tuple(_cloned(x) for x in arguments))
    assert set(results.values()) == {"SUCCESS"}


def _cloned(x):
    """A copy with the same strides, of which keys and values share no memory."""
    return x.clone(memory_format=torch.preserve_format) if isinstance(x, Tensor) else x


@by_table
@pytest.mark.parametrize("name", STORES)
@pytest.mark.parametrize("block_size", [1, 3, 8])
def test_tokens_are_stored_where_slots_would_have_them(name, block_size, ops):
    for in_dtype in (lambda x: x, in_fp8):
        arguments = in_dtype(small_calls()[name])
        blocks = in_blocks(arguments, block_size)
        expected = getattr(ops, name)(**arguments)
        assert torch.equal(getattr(ops, name)(**blocks), expected)
        again = in_blocks(arguments, block_size)  # of the slots, written
        order, of_order = blocks["block_tables"].long(), again["block_tables"].long()
        for cache in ("k_cache", "v_cache"):
            assert_same_bits(blocks[cache][order], again[cache][of_order])


def assert_same_bits(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a.float(), b.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.usefixtures("small_tiles")
@by_window
@pytest.mark.parametrize("wrong", [*NO_BLOCKS, "one-too-many"])
def test_an_entry_that_is_no_block_yields_nan(wrong, window):
    """Where a query sees it; what stands beyond the blocks is never read."""
    decode = call([8, 60, 70], 3, window, torch.float32)
    for op, arguments in (
        (kernels.attention_decode, decode),
        (kernels.attention_prefill, as_prefill(decode)),
    ):
        found = paged(arguments, 8)
        expected = op(**found).clone()
        blocks = len(found["k_cache"])
        found["block_tables"][2, 7] = blocks if wrong == "one-too-many" else wrong
        y = op(**found).reshape(3, 3, 2, 16)
        expected = expected.reshape(3, 3, 2, 16)
        assert y[1].isnan().all()  # its tokens, 60 to 62, all see block 7
        assert torch.equal(y[[0, 2]], expected[[0, 2]])


@pytest.mark.usefixtures("small_tiles")
def test_a_token_before_the_wrong_block_is_not_alone_in_seeing_none():
    """Decode, tokens 54 to 58, of which the last three see the block of 56: they yield NaN."""
    found = paged(call([54], 5, None, torch.float32), 8)
    expected = kernels.attention_decode(**found)
    found["block_tables"][1, 7] = -1
    y = kernels.attention_decode(**found)
    assert y[0, 2:].isnan().all()
    assert torch.equal(y[0, :2], expected[0, :2])


@pytest.mark.parametrize("op", ["attention_decode", "attention_prefill"])
def test_more_tokens_than_a_table_has_yield_nan(op):
    """A window does not make a ring of blocks."""
    arguments = in_blocks(call([70, 80], 3, 9, torch.float32), 16)
    arguments["block_tables"] = arguments["block_tables"][:, :5].contiguous()
    if op == "attention_prefill":
        arguments = as_prefill(arguments)
    y = getattr(kernels, op)(**arguments).reshape(2, -1)
    assert not y[0].isnan().any()
    assert y[1].isnan().all()


@pytest.mark.parametrize("name", STORES)
@pytest.mark.parametrize("wrong", [*NO_BLOCKS, "beyond-the-table", "one-too-many", "slot"])
def test_a_token_without_a_block_is_not_stored(name, wrong):
    arguments = in_blocks(small_calls()[name], 3)  # tokens at 3 of slot 1, at 5 of slot 0
    if wrong == "slot":
        arguments["slots"] = index(2, 0)
    elif wrong == "beyond-the-table":
        arguments["positions"] = index(9, 5)
    else:
        count = len(arguments["k_cache"])
        arguments["block_tables"][1, 1] = count if wrong == "one-too-many" else wrong
    before = {name: arguments[name].clone() for name in ("k_cache", "v_cache")}
    q = getattr(kernels, name)(**arguments)
    assert q[0].isnan().all()
    assert not q[1].isnan().any()
    block = arguments["block_tables"][0, 1]
    for cache, old in before.items():
        old[block, 2] = arguments[cache][block, 2]  # of the token that has one
        assert_same_bits(arguments[cache], old)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("wrong", [-1, 8])
def test_a_cpu_says_which_entry_is_no_block(op, wrong):
    arguments = in_blocks(small_calls()[op], 3)
    arguments["block_tables"][1, 1] = wrong
    for ops in (cpu, reference):
        with pytest.raises(ValueError, match=f"block_tables holds {wrong}, must be in 0 to 7"):
            getattr(ops, op)(**arguments)
    arguments["block_tables"] = arguments["block_tables"][:, :1].contiguous()
    with pytest.raises(ValueError, match=r"position \d is beyond the 3 tokens of a block table"):
        getattr(cpu, op)(**arguments)


@by_dtype
@by_window
@pytest.mark.usefixtures("small_tiles")
def test_a_row_is_the_same_bits_in_any_company(window, dtype):
    everything = paged(call([0, 20, 40, 93], 1, window, dtype), 8)

    def of(rows: list[int]) -> Tensor:
        chosen = {name: everything[name][rows] for name in ("q", "slots", "positions")}
        return kernels.attention_decode(**everything | chosen)

    together = of(list(range(4)))
    for row in range(4):
        assert torch.equal(of([row])[0], together[row])
    assert torch.equal(of([3, 0, 2]), together[[3, 0, 2]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_tables": torch.zeros(2, 3).long()}, "is torch.int64, must be torch.int32"),
        ({"block_tables": torch.zeros(6).int()}, r"block_tables is \[6\], must be \[slots, N\]"),
        ({"block_tables": torch.zeros(2, 6).int()[:, ::2]}, r"strides \[6, 2\], the last"),
        ({"block_tables": torch.zeros(2, 3, device="meta").int()}, "block_tables is on meta"),
        ({"block_tables": torch.zeros(2, 0).int()}, "must hold heads and positions"),
        ({"k_cache": random(8, 3, 16)}, r"must be \[blocks, block_size, HK, K\]"),
        ({"v_cache": random(8, 3, 2, 16)}, r"v_cache has strides .*, must have \[192, 32, 16, 1\]"),
        ({"v_cache": random(8, 4, 2, 16)}, r"v_cache is \[8, 4, 2, 16\], must be \[8, 3, 2, 16\]"),
    ],
)  # fmt: skip
def test_bad_input(change, message):
    change = {name: x.to(DEVICE) if x.device.type == "cpu" else x for name, x in change.items()}
    for name in OPS:
        arguments = in_blocks(small_calls()[name], 3) | change
        with pytest.raises(ValueError, match=message):
            getattr(kernels, name)(**arguments)


def test_too_long_a_table():
    arguments = in_blocks(small_calls()["attention_decode"], 3)
    arguments["block_tables"] = random(1).int().expand(2, 1).new_empty(2, 2**30)
    with pytest.raises(ValueError, match="1073741824 blocks of 3 tokens are not below"):
        kernels.attention_decode(**arguments)
