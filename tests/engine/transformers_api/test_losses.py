"""The memory of a loss."""

import torch
from allocations import peak_bytes

from gemcut.engine.transformers_api import GemmaConfig, GemmaForCausalLM


def test_a_loss_over_a_large_vocabulary_stays_within_a_gigabyte():
    """All logits of 4096 tokens over 256 000 words would be 4.2 GB."""
    config = GemmaConfig(
        vocab_size=256_000,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    model = GemmaForCausalLM(config)
    ids = torch.randint(0, 256_000, (1, 4096), generator=torch.Generator().manual_seed(0))
    losses = []
    peak = peak_bytes(lambda: losses.append(model(ids, labels=ids).loss))
    assert losses[0].isfinite()
    assert peak < 1e9
