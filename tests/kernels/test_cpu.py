"""The op table that is fast on a CPU against the definitions that it rewrites."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_accurate, assert_within_budget, outcome

from gemcut.kernels import cpu, cpu_products, reference
from gemcut.kernels.cpu_products import FEW_ROWS, HEAD_ROWS, SMALL
from gemcut.kernels.reference.attention import attention_masked

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp64"])
# one row, the most that torch's own choice takes of a small weight, one more, and many
by_rows = pytest.mark.parametrize("M", [1, FEW_ROWS, FEW_ROWS + 1, 17], ids=lambda M: f"{M}-rows")
by_softcap = pytest.mark.parametrize("softcap", [None, 2.0], ids=["no-softcap", "softcap"])
by_window = pytest.mark.parametrize("window", [None, 8], ids=["global", "local"])
by_norm = pytest.mark.parametrize("norm", [False, True], ids=["no-norm", "norm"])
EPS, C = 1e-6, 40
HEADS = [(2, 2), (4, 2), (4, 1)]  # HQ, HK
by_heads = pytest.mark.parametrize("heads", HEADS, ids=["group-1", "group-2", "group-4"])


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=[False, True], ids=["whole", "blocks"])
def one_row(request, monkeypatch):
    """Either way for one row, whichever is faster here."""
    monkeypatch.setattr(cpu_products, "blocks_are_fast", lambda: request.param)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape).to(dtype)


def partial_sums(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return normal(*shape, dtype=torch.promote_types(dtype, torch.float32))


def hold(op: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """The rule of accuracy.py, for float64 too.

    There the oracle is the exact result, and its error unknown: it is taken to be that in float32,
    smaller by the ratio of the two epsilons.
    """
    oracle = getattr(reference, op.__name__, attention_masked)
    arguments = inspect.signature(oracle).bind(*args, **kwargs).arguments
    if not any(
        isinstance(x, torch.Tensor) and x.dtype == torch.float64 for x in arguments.values()
    ):
        assert_accurate(op, oracle=oracle, **arguments)
        return

    def single(x: Any) -> Any:
        return x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    exact, actual = outcome(oracle, arguments), outcome(op, arguments)
    rough = outcome(oracle, {name: single(x) for name, x in arguments.items()})
    ratio = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    assert actual.keys() == exact.keys()
    for name, x in exact.items():
        eager = x + (rough[name] - x) * ratio if x.is_floating_point() else x
        assert_within_budget(name, actual[name], eager, x)


def test_it_has_the_oracles_names_and_signatures():
    assert cpu.__all__ == reference.__all__
    for name in cpu.__all__:
        found = [inspect.signature(getattr(ops, name)) for ops in (cpu, reference)]
        one, other = (
            [(p.name, p.kind, p.default) for p in signature.parameters.values()]
            for signature in found
        )
        assert one == other, name


def test_what_is_rewritten_is_tested():
    """A test of its name, or of the op of many rows that it is made of, for each."""
    rewritten = {n for n in cpu.__all__ if getattr(cpu, n) is not getattr(reference, n)}
    assert rewritten == {
        "add_rmsnorm_",
        "attention_decode",
        "attention_prefill",
        "begin_step",
        "geglu",
        "linear",
        "linear_geglu",
        "linear_rope_and_store_",
        "lm_head",
        "lm_head_argmax",
        "rmsnorm",
        "rope_and_store_",
        "rope_tables",
        "skinny_linear",
    }


# Norms


@by_dtype
@pytest.mark.parametrize("shape", [(1, 64), (3, 5, 40), (17, 333)], ids=str)
def test_rmsnorm(shape, dtype):
    hold(cpu.rmsnorm, normal(*shape, dtype=dtype), normal(shape[-1], dtype=dtype), EPS)


@by_dtype
@by_rows
@by_norm
@pytest.mark.parametrize("splits", [0, 1, 3], ids=["rows", "one-sum", "three-sums"])
def test_add_rmsnorm(splits, norm, M, dtype):
    x = partial_sums(splits, M, 40, dtype=dtype) if splits else normal(M, 40, dtype=dtype)
    residual, post, following = (normal(*s, dtype=dtype) for s in ((M, 40), (40,), (40,)))
    hold(cpu.add_rmsnorm_, residual, x, post if norm else None, following, EPS)


# Products


@by_dtype
@by_rows
@pytest.mark.parametrize("N", [7, 12, 4 + SMALL // 40], ids=["odd", "small", "large"])
@pytest.mark.parametrize("has_bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("op", [cpu.linear, cpu.skinny_linear], ids=["linear", "skinny_linear"])
def test_products(one_row, op, has_bias, N, M, dtype):
    bias = normal(N, dtype=dtype) if has_bias else None
    hold(op, normal(M, 40, dtype=dtype), normal(N, 40, dtype=dtype), bias)


@pytest.mark.parametrize("M", [1, 3, 16, 17], ids=lambda M: f"{M}-rows")
@pytest.mark.parametrize("N", [7, 12, 4 + SMALL // 40], ids=["odd", "small", "large"])
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("ops", [cpu, reference], ids=["cpu", "reference"])
def test_linear_is_the_product_by_any_way(one_row, ops, M, N, bias):
    x, weight, b = torch.randn(M, 40), torch.randn(N, 40), torch.randn(N) if bias else None
    exact = x.double() @ weight.double().T + (0 if b is None else b.double())
    y = ops.linear(x, weight, b)
    assert y.shape == (M, N)
    assert y.is_contiguous()
    budget = 2 * (F.linear(x, weight, b) - exact).abs().max()
    budget += 2 * torch.finfo(torch.float32).eps * exact.abs().max()
    assert (y - exact).abs().max() <= budget


@by_dtype
@by_rows
def test_geglu(M, dtype):
    hold(cpu.geglu, normal(M, 2 * 21, dtype=dtype))


@by_dtype
@by_rows
def test_linear_geglu(M, dtype):
    hold(cpu.linear_geglu, normal(M, 40, dtype=dtype), normal(2 * 21, 40, dtype=dtype))


@by_dtype
@by_rows
@pytest.mark.parametrize("softcap", [None, 8.0], ids=["no-softcap", "softcap"])
@pytest.mark.parametrize("op", [cpu.lm_head, cpu.lm_head_argmax], ids=["lm_head", "lm_head_argmax"])
def test_the_head(op, softcap, M, dtype):
    weight = normal(1 + SMALL // 40, 40, dtype=dtype)
    hold(op, normal(M, 40, dtype=dtype), weight, softcap)


@by_dtype
@by_rows
@pytest.mark.parametrize("ops", [cpu, reference], ids=["cpu", "reference"])
def test_a_draw_is_that_of_sample(ops, M, dtype):
    """A mixed batch draws from stored logits: the same token, its logits rounded alike."""
    x, weight = normal(M, 40, dtype=dtype), normal(300, 40, dtype=dtype)
    temperature = torch.rand(M).where(torch.arange(M) % 3 != 0, torch.zeros(M))
    seeds, positions = torch.arange(M), torch.arange(M) + 5
    scores, ids = ops.lm_head_argmax(x, weight, 8.0, temperature, seeds, positions)
    logits = ops.lm_head(x, weight, 8.0)
    chosen = ops.sample(logits, temperature, seeds=seeds, positions=positions)
    assert ids.equal(chosen.unsqueeze(0))
    backwards = torch.arange(M).flip(0)
    of_slots = (setting.flip(0) for setting in (temperature, seeds, positions))
    assert ops.lm_head_argmax(x, weight, 8.0, *of_slots, backwards)[1].equal(ids)
    greedy = temperature == 0
    assert scores[0, greedy].equal(logits.max(-1).values[greedy])


@by_dtype
@by_rows
@pytest.mark.parametrize("kinds", [1, 2], ids=["one-kind", "two-kinds"])
def test_begin_step(kinds, M, dtype):
    inv_freqs = [base ** -torch.arange(0, 1, 1 / 9) for base in (1e6, 1e4)][:kinds]
    of_slots = {"token_ids": torch.arange(30) % 13, "positions": 250 + torch.arange(30)}
    model = {"table": normal(13, 40, dtype=dtype), "scale": 2.5, "eps": EPS}
    model |= {"norm_weight": normal(40, dtype=dtype), "inv_freqs": inv_freqs}
    model |= {"attention_scalings": [1.0, 1.37][:kinds]}
    hold(cpu.begin_step, **of_slots, rows=29 - torch.arange(M), **model)
    hold(cpu.begin_step, **{n: x[:M] for n, x in of_slots.items()}, rows=None, **model)


@pytest.mark.parametrize("onednn", [True, False], ids=["onednn", "blocks"])
@pytest.mark.parametrize("ops", [cpu, reference], ids=["cpu", "reference"])
def test_logits_of_a_bf16_head_are_not_rounded(ops, onednn, monkeypatch):
    if not onednn:
        monkeypatch.setattr(cpu_products, "_by_onednn", frozenset)
    x, weight = torch.randn(3, 8).bfloat16(), torch.randn(2 * HEAD_ROWS + 7, 8).bfloat16()
    exact = x.double() @ weight.double().T
    torch.testing.assert_close(ops.lm_head(x, weight, None), exact.float())


# Rotary embedding and cache


def rotation(M: int, HK: int, K: int, norm: bool, dtype: torch.dtype, first: int) -> dict:
    """Where M tokens go, from position `first` on and the last to no place, and how they turn."""
    slots, positions = torch.arange(M) % 3, first + torch.arange(M)
    if M > 1:
        positions[-1] = -1
    inv_freq = 100 ** -torch.arange(0, 1, 2 / K)
    cos, sin = reference.rope_tables(positions, inv_freq, 1.5, dtype)
    found = {"k_cache": normal(3, HK, C, K, dtype=dtype), "v_cache": normal(3, HK, C, K).to(dtype)}
    found |= {"slots": slots, "positions": positions, "cos": cos, "sin": sin}
    if norm:
        weights = normal(K, dtype=dtype), normal(K, dtype=dtype)
        found |= {"q_norm_weight": weights[0], "k_norm_weight": weights[1], "eps": EPS}
    return found


@by_dtype
@by_rows
@pytest.mark.parametrize("scaling", [1.0, 1.5])
@pytest.mark.parametrize("by_token", [False, True], ids=["shared", "by-token"])
def test_rope_tables(by_token, scaling, M, dtype):
    inv_freq = 100 ** -torch.arange(0, 1, 1 / 9)
    inv_freq = torch.stack([inv_freq / (1 + m) for m in range(M)]) if by_token else inv_freq
    hold(cpu.rope_tables, 250 + torch.arange(M), inv_freq, scaling, dtype)


@by_dtype
@by_rows
@by_norm
@by_heads
@pytest.mark.parametrize("first", [3, C - 1], ids=["in-order", "ring"])
def test_rope_and_store(first, heads, norm, M, dtype):
    (HQ, HK), K = heads, 18
    width, turn = (HQ + 2 * HK) * K, rotation(M, HK, K, norm, dtype, first)
    hold(cpu.rope_and_store_, normal(M, width, dtype=dtype), **turn)
    hold(cpu.rope_and_store_, partial_sums(3, M, width, dtype=dtype), **turn)


@by_dtype
@by_rows
@by_norm
def test_linear_rope_and_store(norm, M, dtype):
    (HQ, HK), K = (4, 2), 18
    turn = rotation(M, HK, K, norm, dtype, C - 1)
    width = (HQ + 2 * HK) * K
    x, weight, bias = (normal(*s, dtype=dtype) for s in ((M, 24), (width, 24), (width,)))
    hold(cpu.linear_rope_and_store_, x, weight, bias, **turn)


# Attention


def attention(
    slots: list[int],
    starts: list[int],
    lengths: list[int],
    heads: tuple[int, int],
    dtype: torch.dtype,
    softcap: float | None,
    window: int | None,
) -> dict:
    """What attention is told beside q; the cache holds NaN wherever no query may look."""
    HK, K, ring = heads[1], 18, C if window is None else window + max(lengths) - 1
    caches = [torch.full((max(slots) + 1, HK, ring, K), torch.nan, dtype=dtype) for _ in range(2)]
    for slot, start, length in zip(slots, starts, lengths, strict=True):
        if start >= 0:
            oldest = 0 if window is None else max(0, start - window + 1)
            for cache in caches:
                seen = [position % ring for position in range(oldest, start + length)]
                cache[slot, :, seen] = normal(HK, len(seen), K, dtype=dtype)
    return {
        "k_cache": caches[0],
        "v_cache": caches[1],
        "slots": torch.tensor(slots),
        "scale": 0.3,
        "softcap": softcap,
        "sliding_window": window,
    }


# slots and positions of the first new token: runs of equally long rows in adjacent slots, one in no
# order, an inactive one, and one past the ring's end where there is a window
DECODED = {
    "one-row": ([1], [11]),
    "two-rows": ([3, 1], [0, 30]),
    "runs": ([0, 1, 2, 5, 4, 3, 6], [9, 9, 9, 9, 9, -1, 31]),
    "sixteen-equal-rows": (list(range(16)), [21] * 16),
    "seventeen-rows": (list(range(17)), [*range(5, 21), 20]),
}


@by_dtype
@by_softcap
@by_window
@by_heads
@pytest.mark.parametrize("T", [1, 3], ids=["one-token", "three-tokens"])
@pytest.mark.parametrize("rows", DECODED)
def test_attention_decode(rows, T, heads, window, softcap, dtype):
    slots, starts = DECODED[rows]
    told = attention(slots, starts, [T] * len(slots), heads, dtype, softcap, window)
    q = normal(len(slots), T, heads[0], 18, dtype=dtype)
    hold(cpu.attention_decode, q=q, positions=torch.tensor(starts), **told)


@by_dtype
@by_softcap
@by_window
@by_heads
def test_attention_prefill(heads, window, softcap, dtype):
    """Chunks of 1, 5, 17, 0, 2 and 16 tokens: at the beginning, past the ring's end, inactive.

    Of 17 and more, heads are computed one by one.
    """
    slots, starts, lengths = [2, 0, 1, 4, 3, 5], [0, 0, 20, 7, -1, 24], [1, 5, 17, 0, 2, 16]
    told = attention(slots, starts, lengths, heads, dtype, softcap, window)
    places = {"starts": torch.tensor(starts), "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0)}
    q = normal(sum(lengths), heads[0], 18, dtype=dtype)
    hold(cpu.attention_prefill, q=q, **places, **told)


@pytest.mark.parametrize("T", [1, 3], ids=["one-token", "three-tokens"])
@pytest.mark.parametrize("window", [None, 4], ids=["global", "local"])
@pytest.mark.parametrize("ops", [cpu, reference], ids=["cpu", "reference"])
def test_rows_side_by_side_are_what_each_is_alone(ops, window, T):
    """Equally long ones are one product; an inactive row's slot may lie outside the cache."""
    slots, starts = [1, 2, 3, 4, 0, 5, 6], [5, 5, 5, 8, 5, -1, -1]
    q = torch.randn(len(slots), T, 4, 6, dtype=torch.float64)
    caches = [torch.full((5, 2, 12, 6), torch.nan, dtype=torch.float64) for _ in range(2)]
    for slot, start in zip(slots[:5], starts, strict=False):
        for cache in caches:
            cache[slot, :, : start + T].normal_()

    def attended(rows: slice) -> torch.Tensor:
        places = torch.tensor(slots[rows]), torch.tensor(starts[rows])
        return ops.attention_decode(q[rows], *caches, *places, 0.3, 2.0, window)

    alone = torch.cat([attended(slice(b, b + 1)) for b in range(len(slots))])
    together = attended(slice(None))
    torch.testing.assert_close(together, alone)
    assert not together[:5].isnan().any()
    assert not together[5:].any()


@pytest.mark.parametrize("ops", [cpu, reference], ids=["cpu", "reference"])
def test_no_rows_give_an_empty_result(ops):
    cache, none = torch.zeros(1, 1, 4, 8), torch.empty(0).long()
    tables = ops.rope_tables(none, torch.ones(4), 1.0, torch.float32)
    q = ops.rope_and_store_(torch.empty(0, 4 * 8), cache, cache, none, none, *tables)
    assert q.shape == (0, 2, 8)
    options = (1.0, None, None)
    decoded = ops.attention_decode(q[:, None], cache, cache, none, none, *options)
    assert decoded.shape == (0, 1, 2, 8)
    zero = torch.zeros(1).long()
    assert ops.attention_prefill(q, cache, cache, none, none, zero, *options).shape == q.shape
    assert ops.linear(torch.empty(0, 8), torch.empty(12, 8)).shape == (0, 12)


@by_dtype
@by_softcap
@by_heads
@pytest.mark.parametrize(("T", "first", "S"), [(1, 3, 30), (7, 0, 20), (5, 35, 12)], ids=str)
def test_attention_masked(T, first, S, heads, softcap, dtype):
    """The last one's keys wrap around the ring of 40."""
    HQ, HK = heads
    visible = torch.rand(T, S) < 0.5
    visible[:, 0] = True
    caches = (normal(3, HK, C, 16, dtype=dtype) for _ in range(2))
    hold(
        cpu.attention_masked,
        normal(T, HQ, 16, dtype=dtype),
        *caches,
        1,
        first,
        visible,
        0.3,
        softcap,
    )
