"""What stands before the first layer of a decode step, beside the ops that it joins."""

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

from gemcut.kernels import embed, rmsnorm, rope_tables
from gemcut.kernels.begin import begin_step

pytestmark = pytest.mark.usefixtures("poisoned")
EPS = 1e-6
by_kinds = pytest.mark.parametrize("kinds", [1, 2], ids=["one-kind", "two-kinds"])


def index(*values: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def case(D: int, K: int, kinds: int, dtype: torch.dtype = torch.float32) -> dict:
    """Four rows that take theirs among six, of which one is inactive."""
    inv_freqs = [base ** -torch.arange(0, 1, 2 / K, device=DEVICE) for base in (1e6, 1e4)]
    return {
        "token_ids": index(3, 12, 0, 5, 7, 9),
        "positions": index(0, 257, -1, 131071, 8191, 1),
        "rows": index(4, 1, 3, 2),
        "table": random(13, D, dtype=dtype),
        "scale": torch.tensor(D**0.5, dtype=dtype).item(),
        "norm_weight": random(D, dtype=dtype),
        "eps": EPS,
        "inv_freqs": inv_freqs[:kinds],
        "attention_scalings": [1.0, 1.37][:kinds],
    }


@by_dtype
@by_kinds
@pytest.mark.parametrize(("D", "K"), [(64, 16), (333, 18), (2304, 256)], ids=str)
def test_matches_its_oracle(D, K, kinds, dtype):
    torch.manual_seed(0)
    assert_accurate(begin_step, **case(D, K, kinds, dtype))


@by_dtype
@by_weight
def test_a_quantised_table(kind, dtype):
    torch.manual_seed(0)
    for D in (96, 333):
        table = quantized(13, D, kind, dtype)
        arguments = case(D, 16, 2, dtype) | {"table": table}
        assert_accurate(begin_step, **arguments)
        _, residual, *_ = begin_step(**arguments)
        token_ids = arguments["token_ids"][arguments["rows"]]
        assert residual.equal(embed(token_ids, table, arguments["scale"]))


@by_dtype
@by_kinds
def test_it_is_the_ops_that_it_joins_bit_for_bit(kinds, dtype):
    """A step with drafts or with tables of its own begins by these."""
    arguments = case(333, 18, kinds, dtype)
    positions, residual, y, cos, sin = begin_step(**arguments)
    rows = arguments["rows"]
    assert positions.equal(arguments["positions"][rows])
    token_ids = arguments["token_ids"][rows]
    expected = embed(token_ids, arguments["table"], arguments["scale"])
    assert residual.equal(expected)
    assert y.equal(rmsnorm(expected, arguments["norm_weight"], EPS))
    for r, (inv_freq, scaling) in enumerate(
        zip(arguments["inv_freqs"], arguments["attention_scalings"], strict=True)
    ):
        tables = rope_tables(positions, inv_freq, scaling, dtype)
        assert cos[r].equal(tables[0])
        assert sin[r].equal(tables[1])


@by_kinds
def test_rows_of_their_own(kinds):
    """Without `rows` each has the token and the position of its own number."""
    arguments = case(64, 16, kinds)
    rows = arguments["rows"]
    own = arguments | {"rows": None}
    own |= {name: arguments[name][rows] for name in ("token_ids", "positions")}
    for one, other in zip(begin_step(**own), begin_step(**arguments), strict=True):
        assert one.equal(other)


def test_frequencies_by_row():
    """Of dynamic and longrope, beside those that all rows share."""
    arguments = case(64, 16, 2)
    by_row = arguments["inv_freqs"][0] / torch.arange(1, 5, device=DEVICE)[:, None]
    for inv_freqs in ([by_row, arguments["inv_freqs"][1]], [arguments["inv_freqs"][1], by_row]):
        assert_accurate(begin_step, **arguments | {"inv_freqs": inv_freqs})


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_either_index_type(dtype):
    arguments = case(64, 16, 1)
    narrow = {name: arguments[name].to(dtype) for name in ("token_ids", "positions", "rows")}
    found = begin_step(**arguments | narrow)
    assert found[0].dtype == dtype
    for one, other in zip(found, begin_step(**arguments), strict=True):
        assert torch.equal(one, other)


def test_a_row_outside_reads_no_foreign_memory():
    """It is inactive, and shows; so does a token outside the table."""
    arguments = case(64, 16, 2)
    arguments["token_ids"][1] = 13
    arguments["rows"] = index(6, -1, 2**40, 1, 0)
    positions, residual, y, *_ = begin_step(**arguments)
    assert positions.tolist() == [-1, -1, -1, 257, 0]
    for x in (residual, y):
        assert x.isnan().all(-1).tolist() == [True, True, True, True, False]


def test_a_row_does_not_depend_on_its_company():
    arguments = case(333, 18, 2, torch.bfloat16)

    def begun(rows: slice) -> tuple[Tensor, ...]:
        *by_row, cos, sin = begin_step(**arguments | {"rows": arguments["rows"][rows]})
        return *by_row, cos.transpose(0, 1), sin.transpose(0, 1)

    assert_row_invariant(begun, 4)


def test_no_rows():
    found = begin_step(**case(64, 16, 2) | {"rows": index()})
    assert [tuple(x.shape) for x in found] == [(0,), *[(0, 64)] * 2, *[(2, 0, 1, 16)] * 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"table": random(64)}, r"table is \[64\], must be \[V, D\]"),
        ({"norm_weight": random(63)}, r"norm_weight is \[63\], must be \[64\]"),
        ({"token_ids": index(1, 2)}, r"token_ids is \[2\], must be \[6\]"),
        ({"positions": torch.zeros(6, device=DEVICE)}, "positions is torch.float32"),
        ({"rows": index(1, 2)[None]}, r"rows is \[1, 2\], must be \[2\]"),
        ({"rows": index(1).short()}, "rows is torch.int16, must be int64 or int32"),
        ({"inv_freqs": []}, "0 inv_freqs and 1 scalings, must be 1 or 2 of each"),
        ({"attention_scalings": [1.0, 1.0]}, "1 inv_freqs and 2 scalings"),
        ({"inv_freqs": [torch.ones(8, device=DEVICE).half()]}, "must be torch.float32"),
        ({"inv_freqs": [torch.ones(3, 8, device=DEVICE)]}, r"is \[3, 8\], must be \[4, 8\]"),
        ({"inv_freqs": [torch.ones(129, device=DEVICE)]}, "head_dim 258 is not in 2 to 256"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        begin_step(**case(64, 16, 1) | change)


def test_two_kinds_of_one_width():
    freqs = [torch.ones(n, device=DEVICE) for n in (8, 9)]
    with pytest.raises(ValueError, match="inv_freqs differ in width"):
        begin_step(**case(64, 16, 2) | {"inv_freqs": freqs})
