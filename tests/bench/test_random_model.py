"""Models with random weights: the published shapes, one set of tensors, and text with variety."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from gemcut.bench.engines.peers import Stage, Workload
from gemcut.bench.engines.random_model import published_config, random_tokenizer, random_weights
from gemcut.bench.engines.setup import Setup
from gemcut.engine import Engine, SamplingParams
from gemcut.engine.config.model_config import PUBLISHED
from gemcut.engine.execution.model import Gemma
from gemcut.engine.execution.weights import checkpoint_tensors
from gemcut.kernels import reference

CPU = torch.device("cpu")
FAMILIES = ("gemma-2b", "gemma-2-2b", "vaultgemma-1b", "gemma-3-270m")
SMALL = {"vocab_size": 4000, "hidden_size": 256, "intermediate_size": 512}


def small_config(name, num_layers=2, **changes):
    """The first layers of a published model, narrow and with few words."""
    return replace(published_config(name, num_layers), **(SMALL | changes))


def test_layers_are_cut_from_the_end():
    whole, cut = PUBLISHED["gemma-3-1b"], published_config("gemma-3-1b", 7)
    assert cut == replace(whole, num_layers=7, layer_types=whole.layer_types[:7])
    assert published_config("gemma-3-1b") is whole


def test_weights_have_the_spread_that_keeps_variance():
    config = small_config("gemma-2-2b", attention_bias=True)
    weights = random_weights(config, device=CPU, dtype=torch.float32)
    layer = weights.layers[1]
    for matrix in (layer.qkv, layer.o, layer.gate_up, layer.down):
        assert matrix.std().item() == pytest.approx(matrix.shape[1] ** -0.5, rel=0.02)
    assert layer.input_norm.std().item() == pytest.approx(0.1, rel=0.2)
    assert weights.lm_head is weights.embedding


def test_a_seed_gives_the_same_weights():
    config = small_config("gemma-2-2b")
    first, again, other = (
        random_weights(config, device=CPU, dtype=torch.bfloat16, seed=seed) for seed in (1, 1, 2)
    )
    for tensor in checkpoint_tensors(config):
        assert torch.equal(tensor.of(first), tensor.of(again))
        assert not torch.equal(tensor.of(first), tensor.of(other))


def repeats(model):
    """How many of 31 greedy tokens are the token before."""
    tokenizer = random_tokenizer(model.config.vocab_size)
    params = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)
    with Engine(model, tokenizer, max_batch_size=1, max_seq_len=64) as engine:
        tokens = engine.generate("The ferry left", params).token_ids
    return sum(a == b for a, b in pairwise(tokens))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("num_layers", [1, 6])
def test_text_has_variety_and_logits_have_spread(name, tied, num_layers):
    config = small_config(name, num_layers, tie_word_embeddings=tied)
    model = Gemma(config, random_weights(config, device=CPU, dtype=torch.float32), reference)
    assert repeats(model) < 16
    hidden = torch.randn(64, config.hidden_size)
    logits = model.logits(reference.rmsnorm(hidden, model.weights.norm, config.rms_norm_eps))
    assert 2 < logits.std().item() < 4


def test_rows_as_large_as_a_branch_would_repeat_one_token(monkeypatch):
    monkeypatch.setattr("gemcut.bench.engines.random_model.EMBEDDED", 1.0)
    config = small_config("gemma-2b", 1)
    model = Gemma(config, random_weights(config, device=CPU, dtype=torch.float32), reference)
    assert repeats(model) == 31


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_reads_the_very_tensors(name):
    setup = Setup(name, small_config(name, 1), CPU, torch.bfloat16)
    stage = Stage(setup, Workload(1, 4, 4))
    theirs = dict(stage.transformers_model.named_parameters(remove_duplicate=False))
    for tensor in checkpoint_tensors(setup.config):
        assert theirs[tensor.name].data_ptr() == tensor.of(setup.model.weights).data_ptr()
        assert theirs[tensor.name].shape == tensor.shape
    assert theirs["lm_head.weight"].data_ptr() == setup.model.weights.lm_head.data_ptr()
    assert not any(buffer.is_meta for buffer in stage.transformers_model.buffers())


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_computes_the_same(name):
    config = small_config(name, 1 if name == "gemma-2b" else 6, tie_word_embeddings=False)
    setup = Setup(name, config, CPU, torch.float32)
    ids = torch.randint(4, config.vocab_size, (1, 40), generator=torch.Generator().manual_seed(0))
    cache_and_slot = _cache(setup, 40), 0
    with torch.inference_mode():
        hidden = setup.model.prefill(ids[0], *cache_and_slot)
        ours = setup.model.logits(hidden)
        theirs = Stage(setup, Workload(1, 4, 4)).transformers_model(ids).logits[0]
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


def _cache(setup, length):
    with Engine(setup.model, setup.tokenizer, max_batch_size=1, max_seq_len=length) as engine:
        return engine.cache


@pytest.mark.parametrize("size", [3073, 256000])
def test_the_vocabulary_has_the_size_and_every_piece_is_text(size):
    tokenizer = random_tokenizer(size)
    assert len(tokenizer) == size
    assert tokenizer.decode([size - 1]) == f" w{size - 1}"
    assert tokenizer.decode(tokenizer.encode("The ferry left at six.")) == "The ferry left at six."
    assert len({tokenizer.piece(i) for i in range(3000, size)}) == size - 3000
