"""The bytes of a decode step and the operations of a prefill, counted in other ways."""

from dataclasses import replace

import pytest
import torch

from gemcut.bench.engines.step_bytes import decode_bytes, prefill_flops, print_step_bytes
from gemcut.engine.config.model_config import PUBLISHED
from gemcut.engine.execution.cache import KVCache
from gemcut.engine.execution.weights import QUANTIZATIONS, empty_weights, made_layouts

BF16 = torch.bfloat16
# from notes on the published models: bytes of weights in bf16, and of keys and values a token
GIGABYTES = {
    "gemma-2b": (5.0, 18),
    "gemma-7b": (17.1, 448),
    "gemma-2-2b": (5.2, 104),
    "gemma-2-9b": (18.5, 336),
    "gemma-2-27b": (54.5, 368),
    "vaultgemma-1b": (2.1, 104),
}
LENGTHS = (1, 511, 512, 513, 4096, 8192)


def bytes_of(name, *, batch=1, context=1.0, dtype=BF16, **changes):
    config = replace(PUBLISHED[name], **changes)
    return decode_bytes(config, batch=batch, context=context, dtype=dtype)


@pytest.mark.parametrize("name", GIGABYTES)
def test_published_bytes(name):
    gigabytes, kibibytes = GIGABYTES[name]
    counted = bytes_of(name, context=100)
    assert round(counted.weights / 1e9, 1) == gigabytes
    assert counted.kv_read == 100 * kibibytes * 1024
    assert counted.kv_written == kibibytes * 1024


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("tied", [True, False])
def test_weights_are_those_that_a_step_reads(name, tied):
    config = replace(PUBLISHED[name], tie_word_embeddings=tied, attention_bias=True)
    weights = empty_weights(config, device="meta", dtype=BF16)
    kinds = dict.fromkeys(("norms", "qkv", "o", "gate_up", "down"), 0)
    for layer in weights.layers:
        for field, tensor in vars(layer).items():
            kind = field.removesuffix("_bias")
            if tensor is not None:
                kinds[kind if kind in kinds else "norms"] += tensor.nbytes
    kinds["norms"] += weights.norm.nbytes
    kinds["head"] = weights.lm_head.nbytes
    counted = decode_bytes(config, batch=1, context=1, dtype=BF16)
    assert {kind: getattr(counted, kind) for kind in kinds} == kinds
    read = config.num_parameters() - (0 if tied else config.vocab_size * config.hidden_size)
    assert counted.weights == 2 * read


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("context", LENGTHS)
def test_keys_are_those_of_a_cache_that_holds_what_is_seen(name, context):
    cache = KVCache(
        PUBLISHED[name],
        num_slots=3,
        max_seq_len=context,
        prefill_chunk=1,
        device="meta",
        dtype=BF16,
    )
    window = PUBLISHED[name].sliding_window or context  # a ring has room beyond its window
    tensors = [
        tensor[:, :, : window if PUBLISHED[name].is_local(layer) else context]
        for layer, kv in enumerate(cache.layers)
        for tensor in (kv.k, kv.v)
    ]
    counted = bytes_of(name, batch=3, context=context)
    assert counted.kv_read == sum(tensor.nbytes for tensor in tensors)
    assert counted.kv_written == sum(tensor[:, :, :1].nbytes for tensor in tensors)


def test_the_rest_grows_with_the_batch_alone():
    one, four = bytes_of("gemma-2-2b"), bytes_of("gemma-2-2b", batch=4)
    assert one.embedding == 2 * 2304
    assert one.logits == 2 * 4 * 256000
    assert (four.embedding, four.logits) == (4 * one.embedding, 4 * one.logits)
    assert four.weights == one.weights
    kinds = ("embedding", "kv_read", "kv_written", "logits")
    assert one.total == one.weights + sum(getattr(one, kind) for kind in kinds)


def test_a_mean_context_gives_the_mean_bytes():
    # the window of 512 is passed by none of them, and by all of them
    for first, last in ((10, 13), (600, 631)):
        lengths = range(first, last + 1)
        exact = [bytes_of("gemma-3-1b", context=n).kv_read for n in lengths]
        mean = bytes_of("gemma-3-1b", context=(first + last) / 2).kv_read
        assert mean == sum(exact) / len(exact)


def test_quantised_matrices_are_smaller_and_norms_are_not():
    config = PUBLISHED["gemma-2-9b"]
    plain = decode_bytes(config, batch=1, context=1, dtype=BF16)
    int4 = decode_bytes(config, batch=1, context=1, dtype=BF16, weight_bits=4)
    for kind in ("qkv", "o", "gate_up", "down", "head"):
        assert 4 * getattr(int4, kind) == getattr(plain, kind)
    for kind in ("norms", "embedding", "kv_read", "kv_written", "logits"):
        assert getattr(int4, kind) == getattr(plain, kind)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_a_quantised_model_is_read_with_its_scales(quantization):
    config = PUBLISHED["gemma-2-9b"]
    plain = decode_bytes(config, batch=1, context=1, dtype=BF16)
    counted = decode_bytes(config, batch=1, context=1, dtype=BF16, quantization=quantization)
    layouts = made_layouts(config, quantization)
    weights = empty_weights(config, device="meta", dtype=BF16, layouts=layouts)
    assert counted.weights == weights.nbytes
    assert counted.total - counted.weights == plain.total - plain.weights


@pytest.mark.parametrize("name", ["gemma-2b", "gemma-2-2b", "gemma-3-270m"])
@pytest.mark.parametrize("tokens", [1, 512, 513, 700])
def test_prefill_operations(name, tokens):
    config = replace(PUBLISHED[name], sliding_window=512 if name != "gemma-2b" else None)
    weights = empty_weights(config, device="meta", dtype=BF16)
    elements = sum(
        tensor.numel()
        for layer in weights.layers
        for tensor in vars(layer).values()
        if tensor is not None and tensor.ndim == 2
    )
    position = torch.arange(tokens)
    distance = position[:, None] - position
    attention = 0
    for layer in range(config.num_layers):
        seen = distance >= 0
        if config.is_local(layer):
            seen &= distance < config.sliding_window
        attention += 4 * config.num_q_heads * config.head_dim * int(seen.sum())
    head = 2 * weights.lm_head.numel()
    expected = 2 * elements * tokens + attention + head
    assert prefill_flops(config, batch=1, tokens=tokens) == expected
    assert prefill_flops(config, batch=3, tokens=tokens) == 3 * expected


def test_the_table_names_every_kind_with_its_share_and_time(capsys):
    cut = bytes_of("gemma-2-2b", num_layers=2, layer_types=PUBLISHED["gemma-2-2b"].layer_types[:2])
    print_step_bytes(cut, 100.0, ("all 26 layers", bytes_of("gemma-2-2b")))
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.count("us at 100.0 GB/s") == 2
    assert "all 26 layers: MB" in header
    cells = {line.split()[0]: line.split()[1:] for line in lines}
    assert set(cells) == {*cut.__dataclass_fields__, "total"}
    assert cells["head"] == ["1179.648", "79.0%", "11796.5", "1179.648", "22.6%", "11796.5"]
    assert cells["total"][1::3] == ["100.0%", "100.0%"]
    assert float(cells["total"][3]) == pytest.approx(5230, rel=1e-3)
