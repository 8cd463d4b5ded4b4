"""Products with quantised weights on a CPU, by every kernel that reads them and by none."""

import pytest
import torch
from accuracy import assert_row_invariant, assert_within_budget
from allocations import peak_bytes
from torch import Tensor

from gemcut.kernels import cpu, cpu_products, cpu_quantized, reference
from gemcut.kernels.cpu_products import PackedHead, packed, packed_head, packs
from gemcut.kernels.cpu_quantized import (
    BUFFER,
    FEW_QUANTIZED_ROWS,
    INT4_ROWS,
    PackedInt4,
    by_integers,
    int4_is_known,
    integers_are_exact,
    packed_bytes,
    packed_int4,
)
from gemcut.kernels.quantized_weight import QuantizedWeight, dequantized, quantize

KINDS = [("int8", None), ("int8", 32), ("int8", 64), ("int4", None), ("int4", 32), ("int4", 64)]
KINDS += [("fp8", None), ("fp8", 64)]
by_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind[0]}-{kind[1]}")
by_rows = pytest.mark.parametrize("M", [0, 1, FEW_QUANTIZED_ROWS, FEW_QUANTIZED_ROWS + 1])
by_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
# few columns: in float32 oneDNN adds them one by one, and comes near the rule's limit with more
SHAPE, ODD = (3 * INT4_ROWS, 128), (100, 128)  # the rows of ODD are no whole blocks of torch's int4
by_shape = pytest.mark.parametrize("shape", [SHAPE, ODD], ids=["whole-blocks", "odd"])


needs_int4 = pytest.mark.skipif(
    not (int4_is_known() and packs((64, 64), torch.bfloat16)), reason="no int4 in torch here"
)
needs_integers = pytest.mark.skipif(not integers_are_exact(), reason="no exact int8 products here")


@pytest.fixture(autouse=True)
def _seed(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(cpu_quantized, "BUFFER", 2 * INT4_ROWS * SHAPE[1])  # two blocks


def some_weight(shape: tuple[int, int], kind, dtype: torch.dtype, zeros=False) -> QuantizedWeight:
    """A weight with rows of very different sizes, and perhaps with zero points."""
    weight = torch.randn(shape) * torch.rand(shape[0], 1)
    found = quantize(weight.to(dtype), *kind)
    if not zeros:
        return found
    points = torch.randint(-3, 4, found.scales.shape).to(found.scales.dtype)
    return QuantizedWeight(found.values, found.scales, points, shape[1], dtype)


def hold(op, x: Tensor, read: object, weight: QuantizedWeight, *args) -> None:
    """The rule of accuracy.py, where the op reads another form of the weight than the oracle."""
    oracle = getattr(reference, op.__name__)
    wide = [a.double() if isinstance(a, Tensor) else a for a in args]
    exact, eager = oracle(x.double(), weight, *wide), oracle(x, weight, *args)
    assert_within_budget(op.__name__, op(x, read, *args), eager, exact)


@by_dtype
@by_kind
@by_shape
@by_rows
@pytest.mark.parametrize("zeros", [False, True], ids=["symmetric", "zero-points"])
def test_products(zeros, M, shape, kind, dtype):
    weight, x = some_weight(shape, kind, dtype, zeros), torch.randn(M, shape[1]).to(dtype)
    bias = torch.randn(shape[0]).to(dtype)
    for read in (weight, packed(weight)):
        for b in (None, bias):
            hold(cpu.linear, x, read, weight, b)
            assert torch.equal(cpu.skinny_linear(x, read, b)[0], cpu.linear(x, read, b).float())
        hold(cpu.linear_geglu, x, read, weight)


@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize("group_size", [96, 128, 256, 384, 768])
def test_groups_that_torch_knows_and_others(group_size, format):
    weight, x = some_weight((64, 768), (format, group_size), torch.bfloat16), torch.randn(2, 768)
    hold(cpu.linear, x.bfloat16(), packed(weight), weight)


@by_dtype
@by_kind
@by_rows
@pytest.mark.parametrize("softcap", [None, 8.0], ids=["no-softcap", "softcap"])
def test_logits(softcap, M, kind, dtype):
    weight, x = some_weight(SHAPE, kind, dtype), torch.randn(M, SHAPE[1]).to(dtype)
    hold(cpu.lm_head, x, weight, weight, softcap)
    hold(cpu.lm_head, x, packed_head(weight), weight, softcap)


@by_dtype
@by_kind
@pytest.mark.parametrize("spread", [1.0, 1e-3], ids=["few-are-near", "many-are-near"])
def test_the_greatest_logit(spread, kind, dtype):
    """Found where logits differ by less than a rounded product, and scales, say."""
    base = torch.randn(1, 256) + spread * torch.randn(4096, 256)
    weight, x = quantize(base.to(dtype), *kind), torch.randn(3, 256).to(dtype)
    x[1, 9] = 60
    logits = reference.lm_head(x.double(), weight, None)
    best = logits.max(-1).values.unsqueeze(0)
    eager, _ = reference.lm_head_argmax(x, weight, None)
    scores, ids = cpu.lm_head_argmax(x, packed_head(weight), None)
    assert_within_budget("scores", scores, eager, best)
    assert_within_budget("logits of the ids", logits.gather(-1, ids.mT).mT.float(), eager, best)
    for m in range(3):
        score, _ = found = cpu.lm_head_argmax(x[m : m + 1], packed_head(weight), None)
        assert_within_budget("score", score, eager[:, m : m + 1], best[:, m : m + 1])
        if dtype == torch.bfloat16 and spread == 1:
            assert [part.item() for part in found] == [scores[0, m].item(), ids[0, m].item()]


def test_scales_that_bfloat16_rounds_do_not_hide_the_greatest_logit():
    """Rows almost alike, and scales less than a unit of bfloat16 apart."""
    base = torch.randint(-100, 100, (1, 256))
    values = (base + torch.randint(-1, 2, (512, 256))).to(torch.int8)
    scales = (1 + torch.rand(512, 1) / 256) / 64
    weight = QuantizedWeight(values, scales, None, 256, torch.bfloat16)
    for seed in range(8):
        x = (base + torch.randint(-9, 9, (1, 256))).to(torch.bfloat16)
        _, ids = cpu.lm_head_argmax(x, packed_head(weight), None)
        assert ids.item() == reference.lm_head(x.double(), weight, None).argmax(), seed


@by_dtype
@pytest.mark.parametrize("vocabulary", [1024, 1023, 520], ids=["runs", "odd", "short-runs"])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_a_row_without_an_end_does_not_change_the_choice_of_others(value, vocabulary, dtype):
    weight, x = torch.randn(vocabulary, 64).to(dtype), torch.randn(3, 64).to(dtype)
    alone = cpu.lm_head_argmax(x, packed_head(weight), None)
    x[1, 5] = value
    scores, ids = cpu.lm_head_argmax(x, packed_head(weight), None)
    meant, places = reference.lm_head_argmax(x, weight, None)
    assert torch.equal(ids[:, [0, 2]], alone[1][:, [0, 2]])
    assert torch.equal(ids, places)
    torch.testing.assert_close(scores, meant, equal_nan=True)


@by_dtype
@by_kind
def test_embeddings_are_those_of_the_definition(kind, dtype):
    table, ids = some_weight(SHAPE, kind, dtype), torch.tensor([5, 0, 191, 5])
    assert torch.equal(cpu.embed(ids, table, 16.0), reference.embed(ids, table, 16.0))
    head = packed_head(table)
    assert (head.plain if isinstance(head, PackedHead) else head) is table


@needs_int4
@by_kind
def test_every_kind_has_its_kernel(kind):
    """Else the tests above would hold dequantised rows alone."""
    read = packed(some_weight(SHAPE, kind, torch.bfloat16))
    if kind == ("int8", None):
        assert isinstance(read, QuantizedWeight)
        assert read.scales.dtype == torch.bfloat16
    else:
        assert isinstance(read, Tensor if kind[0] == "fp8" else PackedInt4)
    odd = packed(some_weight(ODD, kind, torch.bfloat16))
    assert isinstance(odd, QuantizedWeight if kind == ("int8", None) else Tensor)


def test_float32_keeps_a_weight_as_it_is():
    weight = some_weight(SHAPE, ("int4", 32), torch.float32)
    assert packed(weight) is weight
    assert packed_head(weight) is weight


@needs_int4
@by_kind
@pytest.mark.parametrize("zeros", [False, True], ids=["symmetric", "zero-points"])
def test_packed_rows_stand_for_what_the_weight_does(zeros, kind):
    if kind[0] == "fp8":
        return
    weight = some_weight(SHAPE, kind, torch.bfloat16, zeros)
    scales = weight.scales.float().log2().round().exp2()  # exact in bfloat16, offsets too
    points = None if weight.zero_points is None else weight.zero_points.float()
    weight = QuantizedWeight(weight.values, scales, points, SHAPE[1], torch.bfloat16)
    read = packed_int4(weight)
    assert read is not None
    assert torch.equal(read.rows(64, 192, torch.float32), dequantized(weight[64:], torch.float32))


@needs_int4
def test_packed_weights_take_the_bytes_of_their_format():
    for kind, most in ((("int4", 32), 0.5 + 4 / 32), (("int8", 32), 1 + 8 / 32)):
        assert packed(some_weight(SHAPE, kind, torch.bfloat16)).nbytes == most * SHAPE[0] * SHAPE[1]
        assert packed_bytes(kind[0], SHAPE, kind[1], False) == most * SHAPE[0] * SHAPE[1]


@by_dtype
@by_kind
def test_a_row_has_the_same_bits_in_any_company_and_on_any_threads(kind, dtype):
    weight = packed(some_weight(SHAPE, kind, dtype))
    x = torch.randn(FEW_QUANTIZED_ROWS, SHAPE[1]).to(dtype)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(cpu.linear(x, weight))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found)
    by_kernel = isinstance(weight, PackedInt4) or kind == ("int8", None)
    if by_kernel and (dtype == torch.bfloat16 or integers_are_exact()):
        assert_row_invariant(lambda rows: cpu.linear(x[rows], weight), len(x))


@needs_integers
def test_digits_hold_what_float32_holds():
    """A number far greater than the others of its row costs them no bit that counts."""
    weight = some_weight((64, 256), ("int8", None), torch.float32)
    x = torch.randn(4, 256)
    x[1, 7], x[2], x[3, 3] = 1e4, 0.0, torch.nan
    y = by_integers(x, weight)
    exact = reference.linear(x.double(), weight)
    assert_within_budget("sums", y[:3], reference.linear(x, weight)[:3], exact[:3])
    assert y[3].isnan().all()


@by_dtype
@by_kind
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_a_row_without_an_end_is_what_the_definition_says(value, kind, dtype):
    weight = some_weight((64, 64), kind, dtype)
    read, x = packed(weight), torch.randn(3, 64).to(dtype)
    alone = cpu.linear(x, read)
    x[1, 5] = value
    y = cpu.linear(x, read)
    torch.testing.assert_close(y[1], reference.linear(x, weight)[1], equal_nan=True)
    assert torch.equal(y[[0, 2]], alone[[0, 2]])


def test_packing_fp8_takes_little_beside_the_result():
    """Blocks of rows, and the matrix in bfloat16 in two orders."""
    weight = quantize(torch.randn(8192, 512).bfloat16(), "fp8")
    assert peak_bytes(lambda: packed(weight)) < 2 * 2 * 8192 * 512 + 32 * BUFFER


@by_kind
def test_without_kernels_rows_are_dequantised(kind, monkeypatch):
    monkeypatch.setattr(cpu_products, "integers_are_exact", lambda: False)
    monkeypatch.setattr(cpu_quantized, "int4_is_known", lambda: False)
    for dtype in (torch.float32, torch.bfloat16):
        weight, x = some_weight(SHAPE, kind, dtype), torch.randn(3, SHAPE[1]).to(dtype)
        read = packed(weight)
        assert not isinstance(read, PackedInt4)
        hold(cpu.linear, x, read, weight)
        hold(cpu.lm_head, x, packed_head(weight), weight, None)
