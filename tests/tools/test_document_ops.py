"""tools/document_ops.py: the page of the ops is what is registered."""

import pytest

from gemcut import kernels
from gemcut.kernels.contracts import CONTRACTS
from gemcut.tools import document_ops


def test_the_page_is_up_to_date(capsys):
    assert document_ops.main(["--check"]) == 0, capsys.readouterr().err


def test_every_op_has_its_block():
    text = document_ops.PAGE.read_text()
    for name in kernels.__all__:
        assert f"\n### {name}\n" in text
        assert document_ops.documented(name) in text


def test_a_page_of_another_time_is_told_and_written_anew(tmp_path, monkeypatch, capsys):
    page = tmp_path / "README.md"
    page.write_text(document_ops.PAGE.read_text().replace("[M, 2 F]", "[M, 3 F]"))
    monkeypatch.setattr(document_ops, "PAGE", page)
    assert document_ops.main(["--check"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert "[M, 3 F]" in page.read_text()
    assert document_ops.main([]) == 0
    assert document_ops.main(["--check"]) == 0


def test_another_contract_makes_another_page(monkeypatch):
    text = document_ops.PAGE.read_text()
    assert document_ops.page(text) == text
    monkeypatch.setitem(CONTRACTS, "geglu", CONTRACTS["rmsnorm"])
    assert document_ops.page(text) != text


def test_a_page_without_marks_is_refused():
    with pytest.raises(ValueError, match="has not the lines '<!-- begin of the ops"):
        document_ops.page("# Kernels\n")


def test_a_block_says_what_is_written_and_what_may_be_none():
    lines = document_ops.documented("add_rmsnorm_").splitlines()
    (residual,) = (line.split() for line in lines if line.startswith("    residual "))
    assert residual == ["residual", "[M,", "D]", "float", "strided", "written"]
    (post,) = (line for line in lines if line.startswith("    post_weight "))
    assert post.split()[-3:] == ["dense", "or", "None"]
    assert "    torch.ops.gemcut.add_rmsnorm_(...), .add_rmsnorm_out(..., out)" in lines
