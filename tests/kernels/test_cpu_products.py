"""The products of the op table for a CPU: packed weights, heads in bfloat16, any number of threads.

Their accuracy is held by test_cpu.py.
"""

import pytest
import torch
from accuracy import assert_within_budget

from gemcut.kernels import cpu, cpu_products, reference
from gemcut.kernels.cpu import JOINT_QUERIES
from gemcut.kernels.cpu_products import (
    BLOCK,
    FEW_ROWS,
    MOST_NEAR,
    SMALL,
    packed,
    packed_head,
    packs,
)

ROWS_TRIED = [1, FEW_ROWS, FEW_ROWS + 1, 17]
needs_bf16 = pytest.mark.skipif(
    not packs((BLOCK, BLOCK), torch.bfloat16), reason="no bfloat16 in oneDNN here"
)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("M", ROWS_TRIED)
@pytest.mark.parametrize(
    "shape", [(7, 40), (BLOCK, 2 * BLOCK), (BLOCK + SMALL // 64, 64)], ids=["odd", "small", "large"]
)
def test_a_packed_weight_gives_the_same_bits(shape, M, dtype):
    weight, x = torch.randn(shape).to(dtype), torch.randn(M, shape[1]).to(dtype)
    bias = torch.randn(shape[0]).to(dtype)
    blocks = packed(weight)
    assert (blocks is weight) is not packs(shape, dtype)
    for b in (None, bias):
        assert torch.equal(cpu.linear(x, blocks, b), cpu.linear(x, weight, b))
    assert torch.equal(cpu.lm_head(x, packed_head(weight), 3.0), cpu.lm_head(x, weight, 3.0))


@pytest.fixture(params=[False, True], ids=["whole", "blocks"])
def one_row(request, monkeypatch):
    """Either way for one row, whichever is faster here."""
    monkeypatch.setattr(cpu_products, "blocks_are_fast", lambda: request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("M", ROWS_TRIED)
@pytest.mark.parametrize("N", [BLOCK, BLOCK + SMALL // 64], ids=["small", "large"])
def test_any_number_of_threads_gives_the_same_bits(one_row, N, M, dtype):
    weight, x = torch.randn(N, 64).to(dtype), torch.randn(M, 64).to(dtype)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append([cpu.linear(x, weight), cpu.lm_head(x, packed_head(weight), None)])
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@needs_bf16
@pytest.mark.parametrize("softcap", [None, 200.0], ids=["no-softcap", "softcap"])
@pytest.mark.parametrize(
    "spread", [1.0, 1e-3, 0.0], ids=["few-are-near", "many-are-near", "all-are-equal"]
)
@pytest.mark.parametrize("sign", [1, -1], ids=["some-positive", "all-negative"])
@pytest.mark.parametrize("head", [torch.Tensor.clone, packed_head], ids=["plain", "packed"])
def test_the_greatest_logit_is_found_among_rounded_ones(head, sign, spread, softcap):
    """Where logits differ by less than rounding, too: the rows near the greatest are exact."""
    V, D = 2 * MOST_NEAR, 64
    base = torch.ones(1, D) if sign == 1 else -torch.ones(1, D)
    weight = (base + spread * torch.randn(V, D)).bfloat16()
    x = torch.ones(3, D).bfloat16() + torch.rand(3, D).bfloat16()
    logits = reference.lm_head(x.double(), weight.double(), softcap)
    best = logits.max(-1).values.unsqueeze(0)
    eager, _ = reference.lm_head_argmax(x, weight, softcap)
    scores, ids = cpu.lm_head_argmax(x, head(weight), softcap)
    assert_within_budget("scores", scores, eager, best)
    of_ids = logits.gather(-1, ids.mT).mT
    assert_within_budget("exact logits of the ids", of_ids.float(), eager, best)


def test_the_way_of_one_row_is_the_faster_one(two_threads, monkeypatch):
    took = {True: [1.0, 3.0], False: [2.0, 2.5]}  # in blocks, and not
    monkeypatch.setattr(cpu_products, "_seconds", lambda in_blocks, *_: took[in_blocks])
    measure = cpu_products.blocks_are_fast.__wrapped__
    assert measure()
    took[True] = [2.0, 3.0]
    assert not measure()
    assert torch.get_num_threads() == 2


def test_a_way_is_timed_with_each_of_the_weights():
    for in_blocks in (True, False):
        seconds = cpu_products._seconds(in_blocks, torch.ones(1, 8), torch.ones(3, 12, 8))
        assert len(seconds) == 3
        assert min(seconds) > 0


@needs_bf16
def test_a_nan_among_the_logits_is_seen():
    weight = torch.randn(2 * BLOCK, BLOCK).bfloat16()
    weight[5] = torch.nan
    scores, _ = cpu.lm_head_argmax(torch.ones(2, BLOCK).bfloat16(), packed_head(weight), None)
    assert scores.isnan().all()


@pytest.mark.parametrize("window", [None, 8], ids=["global", "local"])
@pytest.mark.parametrize("softcap", [None, 2.0], ids=["no-softcap", "softcap"])
def test_queries_in_blocks_attend_as_all_at_once(softcap, window, monkeypatch):
    """A prompt's queries see their keys whatever the blocks are, in a ring and out of it."""
    T, HQ, HK, K, start = 3 * JOINT_QUERIES + 5, 4, 2, 16, 30
    capacity = start + T if window is None else window + T
    caches = [torch.randn(1, HK, capacity, K, dtype=torch.float64) for _ in range(2)]
    q = torch.randn(T, HQ, K, dtype=torch.float64)
    places = torch.tensor([0]), torch.tensor([start]), torch.tensor([0, T])
    found = []
    for size in (T, 1, 7, JOINT_QUERIES):
        monkeypatch.setattr(cpu, "QUERIES", size)
        found.append(cpu.attention_prefill(q, *caches, *places, 0.3, softcap, window))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])
