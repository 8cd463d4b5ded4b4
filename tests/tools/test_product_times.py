"""tools/prediction/product_times.py: products become launches; others are refused."""

import json

import pytest
from predicted import cell, loop, product

from gemcut.kernels.interpreter import INTERPRETED
from gemcut.tools.machine import H200
from gemcut.tools.prediction import product_times
from gemcut.tools.prediction.fit_machine import fit
from gemcut.tools.prediction.launch_time import facts_of
from gemcut.tools.prediction.product_times import TimedProduct, is_list, pair, read_products

ROW = {"kernel": "skinny_linear", "N": 2304, "D": 9216, "us": 13.6}
ROW |= {"tile": {"BLOCK_N": 64, "BLOCK_D": 128, "SPLITS": 4, "num_warps": 4, "num_stages": 4}}


def written(tmp_path, found):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(found))
    return file


def test_rows_are_read(tmp_path):
    file = written(tmp_path, [ROW, ROW | {"tile": {}}])
    assert is_list(file)
    first, rule = read_products(file)
    assert (first.us, first.tile["SPLITS"]) == (13.6, 4)
    assert rule.name == "skinny_linear 2304 x 9216 the rule"


@pytest.mark.skipif(INTERPRETED, reason="interpreted kernels have no launches to note")
def test_a_row_is_launched_with_its_tile():
    facts = facts_of(TimedProduct(**ROW).made("sm_90"))
    assert (facts["split_d"], facts["num_stages"]) == (2304, 4)


def test_products_are_fitted_alike(monkeypatch):
    """Each without the gap before it."""
    times = ((132, 10.0), (4000, 150.0))
    products = [TimedProduct("lm_head", n * 64, 1152, {}, us) for n, us in times]
    made = {one.name: product(one.name, one.N, one.D) for one in products}
    monkeypatch.setattr(TimedProduct, "made", lambda one, arch: made[one.name])
    cells = {one.launch: cell(one, loop(0, 300, multiplies=True)) for one in made.values()}
    monkeypatch.setattr(product_times, "compile_all", lambda *_: cells)
    profile, step = pair(products, "sm_90", 1, H200)
    assert profile.kernels[products[0].name] == (1.0, 10.0 - H200.launch_gap_us)
    assert {profile.weight(one.name) for one in products} == {0.5}
    fitted, residuals = fit([(profile, step)])
    assert fitted.launch_gap_us == H200.launch_gap_us
    assert len(residuals) == 2


@pytest.mark.parametrize(
    ("found", "message"),
    [
        pytest.param([], "holds no rows", id="empty"),
        pytest.param([3], "row 0: TypeError", id="no row"),
        pytest.param([ROW | {"us": 0}], "us must be above 0", id="no time"),
        pytest.param([ROW, ROW | {"kernel": "norm"}], "row 1: ValueError: 'norm'", id="no product"),
        pytest.param([ROW | {"tile": 3}], "row 0: AttributeError", id="no tile"),
    ],
)
def test_what_is_no_list_of_products(found, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read_products(written(tmp_path, found))
