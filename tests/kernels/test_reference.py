"""The oracles against torch's own functions, loops written out by hand, and float64."""

import math

import pytest
import torch
import torch.nn.functional as F

from gemcut.kernels import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def test_rmsnorm_is_torchs_with_one_plus_weight():
    """Multiplying by w instead of 1 + w would give zeros here."""
    x, weight = torch.randn(3, 5, 40, dtype=torch.float64), torch.zeros(40, dtype=torch.float64)
    torch.testing.assert_close(reference.rmsnorm(x, weight, 1e-6), F.rms_norm(x, (40,), eps=1e-6))
    weight.normal_()
    expected = F.rms_norm(x, (40,), 1 + weight, eps=1e-6)
    torch.testing.assert_close(reference.rmsnorm(x, weight, 1e-6), expected)


def test_rmsnorm_rounds_once():
    """Llama's order, round and then multiply, changes a third of the bf16 results."""
    torch.manual_seed(0)
    x, weight = torch.randn(64, 256).bfloat16(), torch.randn(256).bfloat16()
    exact = reference.rmsnorm(x.double(), weight.double(), 1e-6).bfloat16()
    actual = reference.rmsnorm(x, weight, 1e-6)
    # float32 has 16 bits more: its own rounding tips about one bf16 result in 2 ** 16
    assert (actual != exact).float().mean() < 2**-12
    llama = F.rms_norm(x.float(), (256,), eps=1e-6).bfloat16() * (1 + weight)
    assert (llama != exact).float().mean() > 0.2


def test_add_rmsnorm_is_its_parts_and_writes_the_residual():
    torch.manual_seed(0)
    residual, x = torch.randn(4, 32).bfloat16(), torch.randn(4, 32).bfloat16()
    post, following = torch.randn(32).bfloat16(), torch.randn(32).bfloat16()
    for post_weight, branch in ((None, x), (post, reference.rmsnorm(x, post, 1e-6))):
        stream = residual.clone()
        h = reference.add_rmsnorm_(stream, x, post_weight, following, 1e-6)
        assert torch.equal(stream, residual + branch)
        assert torch.equal(h, reference.rmsnorm(residual + branch, following, 1e-6))


def test_rotation_turns_each_pair_by_its_angle():
    M, HQ, HK, K, C = 3, 4, 2, 8, 16
    qkv = torch.randn(M, (HQ + 2 * HK) * K, dtype=torch.float64)
    caches = [torch.full((2, HK, C, K), torch.nan, dtype=torch.float64) for _ in range(2)]
    positions, slots = torch.tensor([0, 5, 21]), torch.tensor([1, 0, 1])
    inv_freq = torch.tensor([1.0, 0.5, 0.1, 0.01])
    tables = reference.rope_tables(positions, inv_freq, 1.5, torch.float64)
    q = reference.rope_and_store_(qkv, *caches, slots, positions, *tables)

    def turned(x: torch.Tensor, position: int) -> torch.Tensor:
        pairs = torch.complex(x[: K // 2], x[K // 2 :])  # dimension i with i + K/2
        # angles are float32 whatever the dtype
        angles = (torch.tensor(float(position)) * inv_freq).double()
        pairs = pairs * torch.polar(torch.full_like(angles, 1.5), angles)
        return torch.cat([pairs.real, pairs.imag])

    heads = qkv.view(M, -1, K)
    for m, (slot, position) in enumerate(zip([1, 0, 1], [0, 5, 21], strict=True)):
        for h in range(HQ):
            expected = turned(heads[m, h], position)
            torch.testing.assert_close(q[m, h], expected, rtol=1e-6, atol=1e-6)
        for h in range(HK):
            k, v = (cache[slot, h, position % C] for cache in caches)
            expected = turned(heads[m, HQ + h], position)
            torch.testing.assert_close(k, expected, rtol=1e-6, atol=1e-6)
            assert torch.equal(v, heads[m, HQ + HK + h])
    for cache in caches:  # nothing else was written
        assert cache.isnan().all(-1).sum() == 2 * HK * C - M * HK


def test_bf16_rotation_is_right_past_position_256():
    """In bf16 positions 257 and 256 are the same number."""
    qkv = torch.randn(1, 3 * 64)
    caches = torch.zeros(1, 1, 512, 64), torch.zeros(1, 1, 512, 64)
    low = tuple(cache.bfloat16() for cache in caches)
    slots, position = torch.tensor([0]), torch.tensor([511])
    inv_freq = 1e4 ** (-torch.arange(32) / 32)
    tables = reference.rope_tables(position, inv_freq, 1.0, torch.float32)
    exact = reference.rope_and_store_(qkv, *caches, slots, position, *tables)
    tables = reference.rope_tables(position, inv_freq, 1.0, torch.bfloat16)
    actual = reference.rope_and_store_(qkv.bfloat16(), *low, slots, position, *tables)
    # inputs, cos and sin are each rounded to 8 bits: three roundings of terms up to |q|
    torch.testing.assert_close(actual.float(), exact, rtol=0, atol=3 * 2**-8 * qkv.abs().max())


def attention_by_loops(q, k_rows, v_rows, position, scale, softcap, window):
    """One query head over the keys of one KV head, by the formula: q [K], k_rows [S, K] -> [K]."""
    first = 0 if window is None else max(0, position - window + 1)
    scores = [float(q @ k_rows[j]) * scale for j in range(first, position + 1)]
    if softcap is not None:
        scores = [softcap * math.tanh(s / softcap) for s in scores]
    weights = [math.exp(s - max(scores)) for s in scores]
    total = sum(weights)
    return sum(w / total * v_rows[j] for w, j in zip(weights, range(first, position + 1)))  # noqa: B905


@pytest.mark.parametrize("window", [None, 4], ids=["global", "local"])
@pytest.mark.parametrize("softcap", [None, 2.0], ids=["no-softcap", "softcap"])
@pytest.mark.parametrize(
    ("HQ", "HK"), [(2, 2), (4, 2), (4, 1)], ids=["group-1", "group-2", "group-4"]
)
def test_attention_is_the_formula_over_a_ring_of_stale_nans(HQ, HK, softcap, window):
    torch.manual_seed(0)
    K, C, chunk = 6, 24 if window is None else 4 + 3, 3
    lengths = {2: 3, 0: 4, 1: 5, 3: 17}  # slot: tokens; W - 1, W, W + 1 and 4 W + 1
    keys = {s: torch.randn(n, HK, K, dtype=torch.float64) for s, n in lengths.items()}
    values = {s: torch.randn(n, HK, K, dtype=torch.float64) for s, n in lengths.items()}
    k_cache = torch.full((5, HK, C, K), torch.nan, dtype=torch.float64)
    v_cache = k_cache.clone()
    for slot, length in lengths.items():
        for position in range(length):
            k_cache[slot, :, position % C] = keys[slot][position]
            v_cache[slot, :, position % C] = values[slot][position]

    def expected(q, slot, position):
        return torch.stack(
            [
                attention_by_loops(
                    q[h], keys[slot][:, h * HK // HQ], values[slot][:, h * HK // HQ],
                    position, 0.3, softcap, window,
                )
                for h in range(HQ)
            ]
        )  # fmt: skip

    slots = torch.tensor(list(lengths))
    q = torch.randn(len(lengths), chunk, HQ, K, dtype=torch.float64)
    starts = torch.tensor([n - chunk for n in lengths.values()])
    options = {"scale": 0.3, "softcap": softcap, "sliding_window": window}
    decoded = reference.attention_decode(q, k_cache, v_cache, slots, starts, **options)
    bounds = torch.arange(0, chunk * len(lengths) + 1, chunk)
    prefilled = reference.attention_prefill(
        q.flatten(0, 1), k_cache, v_cache, slots, starts, bounds, **options
    )
    torch.testing.assert_close(prefilled, decoded.flatten(0, 1))
    for b, slot in enumerate(lengths):
        for t in range(chunk):
            right = expected(q[b, t], slot, int(starts[b]) + t)
            torch.testing.assert_close(decoded[b, t], right)


def test_an_inactive_row_gives_zeros_and_stores_nothing():
    cache = torch.full((1, 1, 4, 8), torch.nan)
    q = torch.randn(1, 1, 2, 8)
    out = reference.attention_decode(
        q, cache, cache, torch.tensor([0]), torch.tensor([-1]), 1.0, 5.0, 2
    )
    assert torch.equal(out, torch.zeros_like(q))
    qkv, slot, nowhere = torch.randn(1, 4 * 8), torch.tensor([0]), torch.tensor([-1])
    tables = reference.rope_tables(nowhere, torch.ones(4), 1.0, torch.float32)
    reference.rope_and_store_(qkv, cache, cache.clone(), slot, nowhere, *tables)
    assert cache.isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_geglu_is_the_tanh_approximation(dtype):
    gate_up = torch.cat([torch.linspace(-6, 6, 50), torch.linspace(1, 2, 50)]).to(dtype)
    gate, up = gate_up.double().chunk(2)
    cubic = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
    expected = 0.5 * gate * (1 + cubic.tanh()) * up
    actual = reference.geglu(gate_up.unsqueeze(0))[0]
    torch.testing.assert_close(actual, expected.to(dtype))


def test_what_decode_fuses_is_what_prefill_does_apart():
    torch.manual_seed(0)
    x, weight = torch.randn(3, 8), torch.randn(12, 8)
    expected = F.gelu(x @ weight[:6].T, approximate="tanh") * (x @ weight[6:].T)
    torch.testing.assert_close(reference.linear_geglu(x, weight), expected)


def test_partial_sums_are_summed_in_float32():
    """Rounded apart, or added to the stream one by one, they would lose what they add up to."""
    torch.manual_seed(0)
    residual, parts, w = (
        torch.randn(3, 8).bfloat16(),
        torch.randn(4, 3, 8),
        torch.zeros(8).bfloat16(),
    )
    kept = residual.clone()
    reference.add_rmsnorm_(kept, parts, None, w, 1e-6)
    assert torch.equal(kept, (residual.float() + parts.sum(0)).bfloat16())


def test_logits_are_float32_and_capped():
    x, weight = torch.randn(2, 8).bfloat16(), torch.randn(50, 8).bfloat16()
    exact = x.double() @ weight.double().T
    logits = reference.lm_head(x, weight, None)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, exact.float())
    torch.testing.assert_close(reference.lm_head(x, weight, 3.0), (3 * (exact / 3).tanh()).float())


def test_embedding_is_scaled_in_the_tables_dtype():
    table = torch.randn(10, 4).bfloat16()
    ids = torch.tensor([3, 9])
    expected = table[ids] * torch.tensor(55.5).bfloat16()  # sqrt(3072) in bf16
    assert torch.equal(reference.embed(ids, table, 55.5), expected)
