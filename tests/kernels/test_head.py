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

from gemcut.kernels import head, reference, sample
from gemcut.kernels.advance import MAX_RANGES
from gemcut.kernels.head import embed, lm_head, lm_head_argmax
from gemcut.kernels.reference import best_of_ranges

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


@by_dtype
@by_weight
@pytest.mark.parametrize("D", [48, 300, 4608], ids=["narrow", "odd", "two-programs"])
def test_embed_of_a_quantised_table(D, kind, dtype):
    torch.manual_seed(0)
    scale = torch.tensor(D**0.5, dtype=dtype).item()
    assert_accurate(embed, ids_tensor(12, 0, 5, 5), quantized(13, D, kind, dtype), scale)


@by_weight
def test_an_id_outside_a_quantised_table_is_nan(kind):
    y = embed(ids_tensor(13, 1, -1, 2**40), quantized(13, 96, kind), 2.0)
    assert y.isnan().all(-1).tolist() == [True, False, True, True]
    assert not y[1].isnan().any()


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
@by_weight
@pytest.mark.parametrize(("M", "V", "D"), [(1, 128, 384), (3, 97, 300)], ids=["even", "odd"])
def test_a_quantised_head(M, V, D, kind, dtype, monkeypatch):
    """Logits by the rule, and their argmax bit for bit: a program walks over several blocks."""
    torch.manual_seed(0)
    monkeypatch.setattr(head, "rows_of_weight", lambda *_: 16)
    x, weight = random(M, D, dtype=dtype), quantized(V, D, kind, dtype)
    assert_accurate(lm_head, x, weight, 3.0)
    ids, scores = best(x, weight, 3.0)
    expected = lm_head(x, weight, 3.0).max(-1)
    assert torch.equal(scores, expected.values)
    assert torch.equal(ids, expected.indices)


@by_weight
def test_a_row_by_a_quantised_head_does_not_depend_on_its_company(kind):
    x, weight = random(18, 384, dtype=torch.bfloat16), quantized(150, 384, kind)
    assert_row_invariant(lambda rows: best(x[rows], weight, 30.0), 18)


@pytest.fixture(params=[1, 3, 100], ids="{} blocks".format)
def programs(request, monkeypatch):
    """So many blocks, of 16 tokens, in each range of a vocabulary."""
    monkeypatch.setattr(head, "BLOCKS_OF_A_PROGRAM", request.param)
    monkeypatch.setattr(head, "rows_of_weight", lambda *_: 16)
    return request.param


def best(x: Tensor, weight: Tensor, softcap: float | None, *draw: Tensor) -> tuple[Tensor, Tensor]:
    """Ids and scores of the whole vocabulary: [M] each."""
    scores, ids = lm_head_argmax(x, weight, softcap, *draw)
    return best_of_ranges(ids, scores)


@by_dtype
@by_softcap
@by_shape
def test_argmax_is_that_of_the_logits_bit_for_bit(M, V, D, softcap, dtype, programs):
    torch.manual_seed(0)
    x, weight = random(M, D, dtype=dtype), random(V, D, dtype=dtype, scale=4 * D**-0.5)
    ids, scores = best(x, weight, softcap)
    expected = lm_head(x, weight, softcap).max(-1)
    assert torch.equal(scores, expected.values)
    assert torch.equal(ids, expected.indices)


@pytest.mark.parametrize(("V", "blocks"), [(256, 16), (97, 7), (300, 19)])
def test_every_range_has_its_own_best(V, blocks, monkeypatch):
    """19 blocks of 16 tokens: 3 programs of 7, 7 and 5."""
    monkeypatch.setattr(head, "BLOCKS_OF_A_PROGRAM", -(-blocks // 3))
    monkeypatch.setattr(head, "rows_of_weight", lambda *_: 16)
    x, weight = random(3, 40), random(V, 40)
    scores, ids = lm_head_argmax(x, weight, None)
    size = 16 * -(-blocks // 3)
    logits = lm_head(x, weight, None)
    assert len(scores) == head.count_ranges(weight, x) == 3
    for part, (of_part, found) in enumerate(zip(scores, ids, strict=True)):
        expected = logits[:, part * size : (part + 1) * size].max(-1)
        assert torch.equal(of_part, expected.values)
        assert torch.equal(found, part * size + expected.indices)


@pytest.mark.parametrize("V", [2**20, 256_000, 262_144, 65_536, 1000, 64, 5])
def test_ranges_are_equal_short_and_no_more_than_can_be_compared(V):
    """None has more blocks than another; the last may lack some."""
    blocks = -(-V // 64)
    ranges, each = head._ranges(blocks)
    assert (ranges - 1) * each < blocks <= ranges * each
    assert ranges <= MAX_RANGES
    assert each == (4 if V == 2**20 else 2)


def settings(M: int, temperature: float = 0.7) -> tuple[Tensor, Tensor, Tensor]:
    """Temperature, 0 in every third row, seeds and positions of M rows."""
    temperatures = torch.full((M,), temperature, device=DEVICE)
    temperatures[1::3] = 0.0
    seeds = torch.arange(M, device=DEVICE) * 2**40 - 3
    return temperatures, seeds, torch.arange(M, device=DEVICE) + 7


@by_dtype
@by_softcap
@by_shape
def test_a_draw_is_that_of_sample_bit_for_bit(M, V, D, softcap, dtype, programs):
    """A mixed batch draws from stored logits: its rows must not notice."""
    torch.manual_seed(0)
    x, weight = random(M, D, dtype=dtype), random(V, D, dtype=dtype, scale=4 * D**-0.5)
    draw = settings(M)
    ids, scores = best(x, weight, softcap, *draw)
    logits, (temperature, seeds, positions) = lm_head(x, weight, softcap), draw
    assert torch.equal(ids, sample(logits, temperature, seeds=seeds, positions=positions))
    noise = reference.gumbel_noise(seeds, positions, V)
    noisy = logits + temperature[:, None] * noise
    torch.testing.assert_close(scores, noisy.max(-1).values)
    greedy = temperature == 0
    assert torch.equal(scores[greedy], logits.max(-1).values[greedy])


def test_each_row_draws_by_the_settings_of_its_slot():
    torch.manual_seed(0)
    x, weight, of_slots = random(3, 40), random(500, 40), settings(5, temperature=3.0)
    slots = torch.tensor([4, 0, 3], device=DEVICE)
    expected = lm_head_argmax(x, weight, None, *(setting[slots] for setting in of_slots))
    for op in (lm_head_argmax, reference.lm_head_argmax):
        ids, scores = best_of_ranges(*op(x, weight, None, *of_slots, slots)[::-1])
        assert torch.equal(ids, best_of_ranges(*expected[::-1])[0])
        torch.testing.assert_close(scores, best_of_ranges(*expected[::-1])[1])
    outside = torch.tensor([5, -1, 2**40], device=DEVICE)
    ids, _ = best(x, weight, None, *of_slots, outside)  # reads no foreign memory
    assert torch.equal(ids, best(x, weight, None)[0])


def test_draws_follow_the_logits():
    """As often as softmax(logits / temperature) says, by a chi-square of 2000 rows."""
    M, V, temperature = 2000, 6, 0.5
    logits = torch.tensor([1.0, 0.5, 0.0, -0.5, 0.25, 0.75], device=DEVICE)
    x = torch.ones(M, 1, device=DEVICE)
    seeds = torch.arange(M, device=DEVICE)
    ids, _ = best(x, logits[:, None].contiguous(), None, settings(M)[0] * 0 + 0.5, seeds, seeds)
    expected = M * torch.softmax(logits / temperature, 0)
    counts = ids.bincount(minlength=V)
    assert ((counts - expected).square() / expected).sum() < 20.5  # one in 1000 at 5 degrees


def test_the_lowest_id_wins_a_tie(programs):
    weight = torch.zeros(300, 8, device=DEVICE)
    weight[[70, 71, 200, 299], 0] = 1.0  # in several blocks
    x = random(2, 8).abs()
    assert best(x, weight, None)[0].tolist() == [70, 70]
    assert best(-x, weight, None)[0].tolist() == [0, 0]


def test_nan_is_the_greatest(programs):
    """A broken model must not look like one that has made up its mind."""
    x, weight = random(2, 8), random(200, 8)
    x[0, 3] = torch.nan
    for draw in ((), settings(2)):
        ids, scores = best(x, weight, None, *draw)
        assert scores.isnan().tolist() == [True, False]
        assert ids[0] == 0
    weight[150] = torch.nan  # one token alone, not in the first block
    assert best(random(1, 8), weight, None)[0].tolist() == [150]


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")
def test_what_a_row_cannot_choose_is_a_token_all_the_same(programs):
    """All logits are -inf: the first id, and a score that says so."""
    weight = torch.full((200, 8), -torch.inf, device=DEVICE)
    ids, scores = best(torch.ones(1, 8, device=DEVICE), weight, None)
    assert (ids.tolist(), scores.tolist()) == ([0], [-torch.inf])


@by_dtype
def test_a_row_does_not_depend_on_its_company(dtype):
    x, weight = random(18, 300, dtype=dtype), random(150, 300, dtype=dtype)
    assert_row_invariant(lambda rows: lm_head(x[rows], weight, 30.0), 18)
    assert_row_invariant(lambda rows: best(x[rows], weight, 30.0), 18)
    draw = settings(18)
    assert_row_invariant(lambda rows: best(x[rows], weight, None, *(y[rows] for y in draw)), 18)


def test_no_rows():
    assert embed(ids_tensor(), random(5, 8), 1.0).shape == (0, 8)
    assert lm_head(random(0, 8), random(5, 8), None).shape == (0, 5)
    assert [x.shape for x in lm_head_argmax(random(0, 8), random(5, 8), None)] == [(1, 0), (1, 0)]


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
    temperature, seeds, positions = settings(3)
    with pytest.raises(ValueError, match="temperature needs seeds and positions"):
        lm_head_argmax(x, weight, None, temperature, seeds)
    with pytest.raises(ValueError, match=r"temperature is torch.float16, must be torch.float32"):
        lm_head_argmax(x, weight, None, temperature.half(), seeds, positions)
    with pytest.raises(ValueError, match=r"temperature is \[2\], must be \[3\]"):
        lm_head_argmax(x, weight, None, temperature[:2], seeds, positions)
    with pytest.raises(ValueError, match=r"seeds is torch.float32, must be int64 or int32"):
        lm_head_argmax(x, weight, None, temperature, temperature, positions)
    with pytest.raises(ValueError, match=r"positions is \[2\], must be \[3\]"):
        lm_head_argmax(x, weight, None, temperature, seeds, positions[:2])
    with pytest.raises(ValueError, match=r"rows is \[2\], must be \[3\]"):
        lm_head_argmax(x, weight, None, *settings(5), seeds[:2])
    with pytest.raises(ValueError, match=r"seeds is \[3\], must be \[5\]"):
        lm_head_argmax(x, weight, None, settings(5)[0], seeds, positions, seeds)
