"""The model over a paged cache and over a caller's own: the bits are those of slots."""

import re

import pytest
import torch
from accuracy import DEVICE
from random_models import MODEL_TYPES, random_model
from torch import Tensor
from twins import gemcut_twin, new_cache, poison, random_ids

from gemcut import kernels
from gemcut.engine.execution.borrowed_cache import BorrowedCache, PagedKVCache
from gemcut.engine.execution.cache import Cache, LayerCache
from gemcut.engine.execution.cache_scales import scales_of
from gemcut.engine.execution.model import Gemma
from gemcut.kernels import cpu, reference

MAX_SEQ_LEN, CHUNK = 60, 7
PROMPT, STEPS = 18, 2
TABLES = [reference] + ([cpu] if DEVICE == "cpu" else [])
by_ops = pytest.mark.parametrize("ops", TABLES, ids=lambda ops: ops.__name__.split(".")[-1])


def twin(model_type: str = "gemma3_text", ops=cpu, dtype: torch.dtype = torch.float32) -> Gemma:
    """A small random model of a family: window 5, so a prefill chunk of 7 makes a ring of 12."""
    theirs = random_model(model_type, max_position_embeddings=128)
    return gemcut_twin(theirs, ops, dtype, DEVICE)


def paged_cache(model: Gemma, block_size: int = 16, num_slots: int = 2, **more) -> PagedKVCache:
    """Blocks of NaN, handed out from the last to the first, a slot's among another's."""
    count = -(-MAX_SEQ_LEN // block_size)
    sizes = {
        "num_blocks": num_slots * count + 3,
        "max_seq_len": MAX_SEQ_LEN,
        "prefill_chunk": CHUNK,
    }
    settings = sizes | {"device": model.device, "dtype": model.dtype} | more
    cache = PagedKVCache(model.config, block_size=block_size, num_slots=num_slots, **settings)
    poison(cache)
    for slot in range(num_slots):
        last = cache.num_blocks - 1 - slot
        cache.assign(slot, range(last, last - num_slots * count, -num_slots))
    return cache


@torch.inference_mode()
def logits_of(model: Gemma, cache: Cache) -> Tensor:
    """Logits of two prompts, of decode steps of both, and of one with drafts of two tokens."""
    prompts = [random_ids(PROMPT, 97, seed=1).to(DEVICE), random_ids(5, 97, seed=2).to(DEVICE)]
    found = [model.logits(model.prefill(ids, cache, slot)) for slot, ids in enumerate(prompts)]
    slots = torch.tensor([1, 0], device=DEVICE)
    positions = torch.tensor([5, PROMPT], device=DEVICE)
    for step in range(STEPS):
        token = random_ids(2, 97, seed=10 + step).to(DEVICE)
        found.append(model.logits(model.decode(token, cache, slots, positions + step)))
    drafts = random_ids(6, 97, seed=3).to(DEVICE).view(2, 3)
    found.append(model.logits(model.decode(drafts, cache, slots, positions + STEPS)))
    return torch.cat(found)


@by_ops
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_logits_are_those_of_slots(model_type, ops):
    """A ring there, whole sequences here; the window hides the same keys."""
    model = twin(model_type, ops)
    expected = logits_of(model, new_cache(model, 2, MAX_SEQ_LEN, CHUNK))
    assert not expected.isnan().any()
    assert torch.equal(logits_of(model, paged_cache(model)), expected)


@pytest.mark.parametrize(
    ("model_type", "dtype", "block_size"),
    [("gemma2", torch.float32, 16), ("gemma3_text", torch.bfloat16, 7)],
)
def test_logits_of_the_kernels_are_those_of_slots(model_type, dtype, block_size):
    model = twin(model_type, kernels, dtype)
    expected = logits_of(model, new_cache(model, 2, MAX_SEQ_LEN, CHUNK))
    assert not expected.isnan().any()
    assert torch.equal(logits_of(model, paged_cache(model, block_size)), expected)


@by_ops
@pytest.mark.parametrize("block_size", [1, 7, 64])
def test_logits_in_blocks_of_any_size(block_size, ops):
    model = twin(ops=ops, dtype=torch.bfloat16)
    expected = logits_of(model, new_cache(model, 2, MAX_SEQ_LEN, CHUNK))
    assert torch.equal(logits_of(model, paged_cache(model, block_size)), expected)


@by_ops
def test_logits_of_a_cache_in_fp8(ops):
    model = twin(ops=ops)
    expected = logits_of(model, new_cache(model, 2, MAX_SEQ_LEN, CHUNK, in_fp8=True))
    cache = paged_cache(model, dtype=torch.float8_e4m3fn, scales=scales_of(model))
    assert torch.equal(logits_of(model, cache), expected)


@by_ops
def test_logits_over_slots_of_other_strides(ops):
    """Tokens before heads; every layer holds whole sequences."""
    model = twin(ops=ops)
    config = model.config
    shape = (2, MAX_SEQ_LEN, config.num_kv_heads, config.head_dim)

    def tensor() -> Tensor:
        return torch.full(shape, torch.nan, device=DEVICE).transpose(1, 2)

    layers = [LayerCache(tensor(), tensor()) for _ in range(config.num_layers)]
    cache = BorrowedCache(config, layers, max_seq_len=MAX_SEQ_LEN, prefill_chunk=CHUNK)
    expected = logits_of(model, new_cache(model, 2, MAX_SEQ_LEN, CHUNK))
    assert torch.equal(logits_of(model, cache), expected)


@torch.inference_mode()
def test_two_slots_with_one_prefix():
    """The second slot reads the first one's whole blocks, and computes what is left."""
    model = twin()
    ids = random_ids(20, 97).to(DEVICE)
    cache = paged_cache(model, 8)
    alone = model.logits(model.prefill(ids, cache, 0))
    cache.assign(1, [*cache.blocks[0][:2], *cache.blocks[1][2:]])
    rest = model.logits(model.prefill(ids[16:], cache, 1, start=16))
    assert torch.allclose(rest, alone[16:], rtol=0, atol=1e-4 * alone.abs().max().item())
    assert not rest.isnan().any()


def test_a_prompt_that_has_no_blocks_is_refused():
    model = twin()
    cache = paged_cache(model)
    cache.assign(0, [3])
    ids = random_ids(17, 97)
    with pytest.raises(ValueError, match="tokens 0 to 16 in slot 0, whose blocks hold 16; assign"):
        model.prefill(ids, cache, 0)
    with pytest.raises(ValueError, match="tokens 0 to 16 in slot 2 do not fit a cache of 2 slots"):
        model.prefill(ids, cache, 2)


@pytest.mark.parametrize(
    ("slot", "blocks", "message"),
    [
        (2, [1], "slot 2 is not in 0 to 1"),
        (-1, [1], "slot -1 is not in 0 to 1"),
        (0, [1, 11], "block 11 is not in 0 to 10"),
        (0, [-1], "block -1 is not in 0 to 10"),
        (0, [1] * 5, "5 blocks are more than the 4 of a slot"),
    ],
)
def test_blocks_that_are_not_there(slot, blocks, message):
    cache = paged_cache(twin())
    before = cache.block_tables.clone()
    with pytest.raises(ValueError, match=re.escape(message)):
        cache.assign(slot, blocks)
    assert torch.equal(cache.block_tables, before)


def test_sizes_that_are_none():
    model = twin()
    sizes = {"num_blocks": 1, "block_size": 0, "num_slots": 1, "max_seq_len": 4}
    with pytest.raises(ValueError, match="block_size is 0, must be at least 1"):
        PagedKVCache(model.config, **sizes, device=DEVICE, dtype=model.dtype)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda shape: (2, shape[1] + 1, *shape[2:]), r"layer 0 of the cache is \[2, 3, 60, 16\]"),
        (lambda shape: (*shape[:2], 59, shape[3]), "holds 59 tokens a slot, needs 60"),
        (lambda shape: shape[1:], r"must be \[slots, HK, C, K\] with HK, K = "),
    ],
)
def test_layers_that_do_not_fit_the_model(change, message):
    config = twin("gemma").config
    shape = change((2, config.num_kv_heads, MAX_SEQ_LEN, config.head_dim))
    layers = [LayerCache(torch.zeros(shape), torch.zeros(shape))] * config.num_layers
    with pytest.raises(ValueError, match=message):
        BorrowedCache(config, layers, max_seq_len=MAX_SEQ_LEN)


def test_layers_of_another_number_of_slots():
    config = twin("gemma").config
    shape = (config.num_kv_heads, MAX_SEQ_LEN, config.head_dim)
    layers = [
        LayerCache(torch.zeros(2 + i, *shape), torch.zeros(2 + i, *shape))
        for i in range(config.num_layers)
    ]
    with pytest.raises(ValueError, match=r"layers have \[2, 3.*\] slots, must have as many each"):
        BorrowedCache(config, layers, max_seq_len=MAX_SEQ_LEN)
    with pytest.raises(ValueError, match="1 layers of a cache, the model has"):
        BorrowedCache(config, layers[:1], max_seq_len=MAX_SEQ_LEN)
