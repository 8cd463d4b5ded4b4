"""The table of products on a CPU: every matrix by every way, each the same product."""

import pytest
import torch

from gemcut.engine import PUBLISHED
from gemcut.tools import cpu_products


@pytest.mark.parametrize("way", [cpu_products.in_blocks, cpu_products.from_the_weight])
def test_each_way_is_the_product(way):
    x, weight = torch.randn(1, 24), torch.randn(12, 24)
    torch.testing.assert_close(way(x, weight), x @ weight.mT)


def test_the_matrices_are_those_of_a_layer():
    config = PUBLISHED["gemma-3-270m"]
    found = list(cpu_products.matrices("gemma-3-270m"))
    in_layers = sum(N * D for name, N, D in found if name != "head") * config.num_layers
    norms = config.num_layers * (4 * config.hidden_size + 2 * config.head_dim) + config.hidden_size
    table = config.vocab_size * config.hidden_size
    assert in_layers + norms + table == config.num_parameters()


def test_a_line_for_each_matrix_and_number_of_rows(capsys, monkeypatch):
    monkeypatch.setattr(cpu_products, "COPIES_BYTES", 0)
    monkeypatch.setattr(cpu_products, "matrices", lambda model: [("qkv", 64, 64), ("odd", 7, 40)])
    assert cpu_products.main(["--rows", "1", "17", "--seconds", "0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * 2 * 2
    assert lines[0].startswith("gemma-3-270m float32 qkv 64x64 rows 1: torch ")
    assert all(" gemcut " in line for line in lines)
    assert [line.count("blocks") for line in lines] == [1, 0, 0, 0, 0, 0, 0, 0]
