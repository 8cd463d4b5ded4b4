"""Tiles that are measured: what is tried for which kernel and shape, and that kernels take it."""

from itertools import chain

import pytest
import torch

from gemcut.bench.ops.cases import Grid, Shapes
from gemcut.bench.ops.decode_cases import decode_cases
from gemcut.engine.config.model_config import PUBLISHED
from gemcut.kernels import matmul, tiles
from gemcut.kernels.gpu_arch import SHARED_MEMORY, arch_of
from gemcut.kernels.interpreter import INTERPRETED
from gemcut.tools.tuning import search_space, trials
from gemcut.tools.tuning.search_space import Candidate, find_subjects, looked_up

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HERE = arch_of(DEVICE)
ELSEWHERE = next(name for name in SHARED_MEMORY if name != HERE)
BF16 = torch.bfloat16

CONSTANTS = {
    "linear_geglu": {"BLOCK_F": 16},
    "skinny_linear": {"BLOCK_N": 32},
    "lm_head": {"BLOCK_V": 32},
    "linear_rope_and_store": {"BLOCK_I": 16},
    "attention_decode": {"SPLIT": 16, "BLOCK_N": 16},
    "attention_prefill": {"BLOCK_M": 16, "BLOCK_N": 16},
}


# What kernels take


@pytest.mark.parametrize("kernel", CONSTANTS)
def test_a_kernel_takes_what_was_measured(kernel, folder, launches, small_grid, monkeypatch):
    """And computes the same op with it."""
    subject, *_ = find_subjects([str(folder)], [kernel], HERE, DEVICE, BF16)
    for constants in ({}, CONSTANTS[kernel]):
        monkeypatch.setattr(tiles, "TUNED", {HERE: {subject.key: constants}})
        for case in subject.cases:
            check = trials.Check(case, case.make())
            launches.clear()
            verdict = check.gemcut(trials.builder(subject, case, Candidate(constants), DEVICE))
            assert verdict.passed, (case.name, verdict)
            name, launched = launches[0]
            assert name.startswith(kernel)
            taken = {key: launched[key] for key in CONSTANTS[kernel]}
            assert (taken == CONSTANTS[kernel]) == bool(constants)


def test_a_measured_tile_is_for_its_arch_shape_and_dtype(monkeypatch):
    x = torch.zeros(2, 48, dtype=BF16, device=DEVICE)
    weight, other = torch.zeros(32, 48, device=DEVICE), torch.zeros(64, 48, device=DEVICE)
    key = ("skinny_linear", (32, 48))
    rule = matmul._tile(weight, x)
    monkeypatch.setattr(tiles, "TUNED", {HERE: {key: {"BLOCK_N": 8, "SPLITS": 3}}})
    assert matmul._tile(weight, x) == rule | {"BLOCK_N": 8, "SPLITS": 3}
    assert matmul._tile(weight, x.half()) == rule | {"BLOCK_N": 8, "SPLITS": 3}
    assert matmul.count_parts(weight, x) == 3
    assert matmul._tile(other, x)["BLOCK_N"] != 8
    assert matmul._tile(weight, x.float())["BLOCK_N"] != 8
    monkeypatch.setattr(tiles, "TUNED", {ELSEWHERE: {key: {"BLOCK_N": 8}}})
    assert matmul._tile(weight, x) == rule


@pytest.mark.parametrize("model", ["gemma-2b", "gemma-2-9b", "gemma-3-1b"])
def test_no_key_depends_on_rows(model):
    """Nor on the length of a context: keys for 1 row are those for 2, 16, 17 and 100."""
    device, name = (DEVICE, HERE) if INTERPRETED else (torch.device("cuda", 0), "sm_90")

    def asked(batches, contexts):
        shapes = Shapes(model, PUBLISHED[model], device, BF16)
        cases = decode_cases(shapes, Grid(batches, contexts, (), 1, 512))
        return {key for case in cases for key in looked_up(case, name)}

    alone = asked((1,), (1024,))
    assert asked((1, 2, 16, 17, 100), (300, 1024, 8192)) == alone
    assert {kernel for kernel, _ in alone} >= {"skinny_linear", "lm_head", "attention_decode"}


# What is tried


@pytest.mark.parametrize("name", ["gemma-2-2b", "gemma-2-27b", "gemma-3-1b", "gemma-3-270m"])
def test_candidates_are_tiles(name):
    """Powers of two, each once; a split of keys holds whole tiles, or keys would count twice."""
    config = PUBLISHED[name]
    heads = (config.num_q_heads, config.num_kv_heads, config.head_dim)
    shapes = {"attention_decode": heads, "attention_prefill": heads}
    for kernel, candidates in search_space.CANDIDATES.items():
        found = list(candidates(shapes.get(kernel, (1024, 1152))))
        assert 20 < len(found) < 100, (kernel, len(found))
        assert len({Candidate(tile).name for tile in found}) == len(found)
        for tile in found:
            powers = {key: n for key, n in tile.items() if key not in ("num_stages", "maxnreg")}
            assert all(n & (n - 1) == 0 for n in powers.values()), tile
            assert tile.get("SPLIT", 0) % tile.get("BLOCK_N", 1) == 0, tile
            # launchers and kernels that share it take it as a constant
            assert "BLOCK_M" not in tile or kernel == "attention_prefill"


def test_the_tile_in_use_is_tried_first(monkeypatch):
    key = ("skinny_linear", (2304, 9216))
    before = search_space.candidate_tiles(key, "sm_90")
    for in_use in (before[-1], {"BLOCK_N": 64, "num_warps": 1}):
        monkeypatch.setattr(tiles, "TUNED", {"sm_90": {key: in_use}})
        first, *others = search_space.candidate_tiles(key, "sm_90")
        assert first == in_use
        assert others == [tile for tile in before if tile != in_use]


def test_a_subject_has_the_cases_of_every_batch(folder, small_grid):
    subjects = find_subjects([str(folder)] * 2, list(search_space.CANDIDATES), HERE, DEVICE, BF16)
    by_kernel = {}
    for subject in subjects:
        by_kernel.setdefault(subject.key[0], []).append(subject)
    assert list(by_kernel) == list(search_space.CANDIDATES)
    assert len(by_kernel["skinny_linear"]) == 2  # after attention, and after the MLP
    (head,) = by_kernel["lm_head"]
    assert {case.op for case in head.cases} == {"lm_head", "lm_head_argmax"}
    for subject in chain.from_iterable(by_kernel.values()):
        batches = {case.facts.get("batch") for case in subject.cases}
        assert batches == ({None} if subject.key[0] == "attention_prefill" else {1, 3})
        assert "no softcap" not in {case.facts.get("variant") for case in subject.cases}
