"""The whole model, on the oracles, against transformers and against itself."""

import tempfile

import pytest
import torch
from random_models import MODEL_TYPES, random_config, random_model
from transformers import AutoModelForCausalLM
from twins import (
    all_logits,
    assert_same_logits,
    decoded_logits,
    gemcut_twin,
    greedy,
    new_cache,
    random_ids,
)

from gemcut.engine.config.model_config import PUBLISHED, ModelConfig
from gemcut.engine.execution.cache import layer_capacity, slot_bytes
from gemcut.engine.requests.sampling_params import MAX_DRAFT
from gemcut.kernels.decode_attention import MAX_Q_LEN

WINDOW = 5
LOCAL, GLOBAL = "sliding_attention", "full_attention"
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
YARN["original_max_position_embeddings"] = 32
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 32}
LONGROPE |= {"short_factor": [1.0 + 0.1 * i for i in range(8)]}
LONGROPE |= {"long_factor": [2.0 + 0.5 * i for i in range(8)]}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 3.0}
NO_SOFTCAPS = {"attn_logit_softcapping": None, "final_logit_softcapping": None}
ODD = {"vocab_size": 131, "hidden_size": 52, "intermediate_size": 75, "head_dim": 18}


def gemma3_rope(**of_global) -> dict:
    local = {"rope_type": "default", "rope_theta": 1e4}
    return {"rope_parameters": {LOCAL: local, GLOBAL: {"rope_theta": 1e6, **of_global}}}


# Random models: what each is there for, its family, and the config keys that it changes.
CASES = {
    "gemma": ("gemma", {}),
    "gemma-one-kv-head": ("gemma", {"num_key_value_heads": 1}),
    "gemma-every-head-its-own": ("gemma", {"num_key_value_heads": 4}),
    "gemma-bias": ("gemma", {"attention_bias": True}),
    "gemma-untied": ("gemma", {"tie_word_embeddings": False}),
    "gemma-odd-sizes": ("gemma", ODD),
    "gemma-linear": ("gemma", {"rope_parameters": LINEAR}),
    "gemma-dynamic": ("gemma", {"rope_parameters": DYNAMIC, "max_position_embeddings": 32}),
    "gemma-longrope": ("gemma", {"rope_parameters": LONGROPE}),
    "gemma2": ("gemma2", {}),
    "gemma2-no-softcaps": ("gemma2", NO_SOFTCAPS),
    "gemma2-one-kv-head": ("gemma2", {"num_key_value_heads": 1}),
    "gemma2-all-local": ("gemma2", {"layer_types": [LOCAL] * 4}),
    "gemma2-all-global": ("gemma2", {"layer_types": [GLOBAL] * 4}),
    "gemma2-global-first": ("gemma2", {"layer_types": [GLOBAL, LOCAL] * 2}),
    "gemma2-odd-sizes-bias-untied": (
        "gemma2",
        ODD | {"attention_bias": True, "tie_word_embeddings": False},
    ),
    "gemma2-yarn": ("gemma2", {"rope_parameters": YARN}),
    "gemma2-llama3": ("gemma2", {"rope_parameters": LLAMA3}),
    "vaultgemma": ("vaultgemma", {}),
    "vaultgemma-as-published": (
        "vaultgemma",
        NO_SOFTCAPS | {"num_key_value_heads": 4, "layer_types": [GLOBAL] * 4},
    ),
    "vaultgemma-dynamic": (
        "vaultgemma",
        {"rope_parameters": DYNAMIC, "max_position_embeddings": 32},
    ),
    "vaultgemma-bias-untied": (
        "vaultgemma",
        {"attention_bias": True, "tie_word_embeddings": False, "num_key_value_heads": 1},
    ),
    "gemma3": ("gemma3_text", {}),
    "gemma3-odd-sizes-bias": ("gemma3_text", ODD | {"attention_bias": True}),
    "gemma3-every-head-its-own": ("gemma3_text", {"num_key_value_heads": 4}),
    "gemma3-default-pattern": ("gemma3_text", {"num_hidden_layers": 7}),
    "gemma3-linear-global": ("gemma3_text", gemma3_rope(rope_type="linear", factor=8.0)),
    "gemma3-yarn-global": ("gemma3_text", gemma3_rope(**YARN)),
    "gemma3-longrope-global": ("gemma3_text", gemma3_rope(**LONGROPE)),
    "gemma3-no-final-softcap": ("gemma3_text", {"final_logit_softcapping": None}),
}
CONTEXT = {"max_position_embeddings": 128}

all_cases = pytest.mark.parametrize("case", CASES)


def random_twins(case: str):
    """A fresh transformers model (some RoPE types keep state) and gemcut's of the same weights."""
    model_type, overrides = CASES[case]
    model = random_model(model_type, **CONTEXT | overrides)
    model.generation_config.eos_token_id = None
    return model, gemcut_twin(model)


@all_cases
def test_logits_are_those_of_transformers(case):
    theirs, ours = random_twins(case)
    ids = random_ids(60, ours.config.vocab_size)
    with torch.inference_mode():
        expected = theirs(input_ids=ids[None]).logits[0]
    assert_same_logits(all_logits(ours, ids), expected)


@all_cases
def test_greedy_tokens_are_those_of_transformers(case):
    theirs, ours = random_twins(case)
    ids = random_ids(21, ours.config.vocab_size)
    expected = theirs.generate(ids[None], max_new_tokens=64, do_sample=False, pad_token_id=0)
    # chunks of 3: the ring of a local layer holds 8 tokens and turns many times
    assert greedy(ours, [ids], 64, prefill_chunk=3)[0].tolist() == expected[0, 21:].tolist()


# transformers takes the frequencies of the longest row for the whole batch where they depend on it
@pytest.mark.parametrize("case", [c for c in CASES if "dynamic" not in c and "longrope" not in c])
def test_ragged_batches_decode_as_left_padded_ones_do_in_transformers(case):
    theirs, ours = random_twins(case)
    prompts = [random_ids(length, ours.config.vocab_size, seed=length) for length in (3, 17, 9)]
    padded = torch.stack([torch.nn.functional.pad(ids, (17 - len(ids), 0)) for ids in prompts])
    mask = torch.stack([torch.arange(17) >= 17 - len(ids) for ids in prompts]).long()
    expected = theirs.generate(
        padded, attention_mask=mask, max_new_tokens=24, do_sample=False, pad_token_id=0
    )
    assert greedy(ours, prompts, 24, prefill_chunk=4).tolist() == expected[:, 17:].tolist()


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_bf16_logits_err_at_most_twice_as_much_as_those_of_transformers(model_type):
    exact_model = random_model(model_type, **CONTEXT)
    exact_model.bfloat16().float()  # the rounded weights are what both are given
    ours = gemcut_twin(exact_model, dtype=torch.bfloat16)
    ids = random_ids(40, ours.config.vocab_size)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        exact_model.save_pretrained(folder)
        # not .bfloat16(): that rounds the rotary frequencies too
        theirs = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, attn_implementation="eager"
        )
        expected = theirs(input_ids=ids[None]).logits[0].float()
        exact = all_logits(gemcut_twin(exact_model, dtype=torch.float64), ids)
    budget = (
        2 * (expected - exact).abs().max() + 2 * torch.finfo(torch.bfloat16).eps * exact.abs().max()
    )
    assert (all_logits(ours, ids) - exact).abs().max() <= budget


# Against itself, in float64: rounding is far below the smallest real difference.


@pytest.fixture(scope="module", params=MODEL_TYPES)
def precise(request):
    return gemcut_twin(random_model(request.param, **CONTEXT), dtype=torch.float64)


@pytest.mark.parametrize("chunk", [1, 7, WINDOW - 1, WINDOW + 3])
def test_prefill_in_chunks_gives_what_one_chunk_gives(precise, chunk):
    ids = random_ids(50, precise.config.vocab_size)
    torch.testing.assert_close(all_logits(precise, ids, chunk), all_logits(precise, ids))


@pytest.mark.parametrize("case", ["gemma-dynamic", "gemma-longrope"])
def test_frequencies_that_depend_on_the_length_do_not_see_the_chunks(case):
    theirs, _ = random_twins(case)
    ours = gemcut_twin(theirs, dtype=torch.float64)
    ids = random_ids(50, ours.config.vocab_size)
    torch.testing.assert_close(all_logits(ours, ids, 7), all_logits(ours, ids))


@torch.inference_mode()
def test_ring_gives_what_a_full_cache_gives(precise):
    ids = random_ids(100, precise.config.vocab_size)
    ring, full = new_cache(precise, prefill_chunk=9), new_cache(precise, prefill_chunk=128)
    assert full.layers[0].k.shape[2] == 128
    if precise.config.is_local(0):
        assert ring.layers[0].k.shape[2] == WINDOW + 9
    for cache in (ring, full):
        precise.prefill(ids[:30], cache, slot=0)
    slots = torch.tensor([0])
    for position in range(30, 100):  # seven turns of the ring
        step = (ids[position : position + 1], slots, torch.tensor([position]))
        torch.testing.assert_close(
            decoded_logits(precise, step[0], ring, *step[1:]),
            decoded_logits(precise, step[0], full, *step[1:]),
        )


@torch.inference_mode()
def test_each_row_of_a_ragged_batch_gets_what_it_gets_alone(precise):
    lengths = [1, WINDOW - 1, WINDOW, WINDOW + 1, 3 * WINDOW + 5]
    prompts = [random_ids(n, precise.config.vocab_size, seed=n) for n in lengths]
    together = new_cache(precise, len(prompts), prefill_chunk=4)
    for slot, ids in enumerate(prompts):
        precise.prefill(ids, together, slot)
    tokens, positions = random_ids(len(prompts), 97), torch.tensor(lengths)
    slots = torch.arange(len(prompts))
    batch = decoded_logits(precise, tokens, together, slots, positions)
    for row, ids in enumerate(prompts):
        alone = new_cache(precise, prefill_chunk=4)
        precise.prefill(ids, alone, slot=0)
        one = decoded_logits(
            precise, tokens[row : row + 1], alone, torch.tensor([0]), positions[row, None]
        )
        torch.testing.assert_close(batch[row : row + 1], one)


@torch.inference_mode()
def test_a_prompt_continues_where_an_earlier_one_ended(precise):
    ids = random_ids(40, precise.config.vocab_size)
    cache = new_cache(precise, prefill_chunk=6)
    first = precise.prefill(ids[:13], cache, slot=0)
    second = precise.prefill(ids[13:], cache, slot=0, start=13)
    hidden = torch.cat([first, second])
    torch.testing.assert_close(precise.logits(hidden), all_logits(precise, ids))


@pytest.mark.parametrize("start", [0, 3, 21])
@pytest.mark.parametrize(("count", "size"), [(1, 8), (7, 8), (8, 8), (5, 32), (0, 8)])
@torch.inference_mode()
def test_a_padded_chunk_gives_what_its_tokens_give(precise, count, size, start):
    """As a captured graph runs it; padding is NaN here, is not stored and is not seen.

    Slot 1 of 3, in a ring that has turned at the last start.
    """
    embed = precise.embed
    ids = random_ids(start + count, precise.config.vocab_size)
    caches = [new_cache(precise, num_slots=3, prefill_chunk=8) for _ in range(2)]
    plain, padded = caches
    for cache in caches:
        if start:
            precise.prefill(ids[:start], cache, 1)
    if count:
        expected = precise.prefill_chunk(ids[start:], plain, 1, start, 40)
    place = torch.tensor([1, start, count, 40])
    tokens = torch.cat([ids[start:], torch.zeros(size - count, dtype=torch.int64)])

    def embed_with_nan(token_ids):
        return embed(token_ids).masked_fill((torch.arange(size) >= count)[:, None], torch.nan)

    precise.embed = embed_with_nan
    try:
        states = precise.prefill_padded(tokens, padded, place)
    finally:
        precise.embed = embed
    assert states.shape == (size, precise.config.hidden_size)
    if count:
        torch.testing.assert_close(states[:count], expected)
    for one, other in zip(plain.layers, padded.layers, strict=True):
        torch.testing.assert_close(one.k, other.k, equal_nan=True)
        torch.testing.assert_close(one.v, other.v, equal_nan=True)


@torch.inference_mode()
def test_frequencies_of_a_padded_chunk_are_those_of_its_prompt():
    """Of the whole prompt's 50 tokens, and not of the chunk or of the padding."""
    ours = gemcut_twin(random_twins("gemma-dynamic")[0], dtype=torch.float64)
    ids = random_ids(50, ours.config.vocab_size)
    states = ours.prefill_padded(
        torch.cat([ids[:20], ids[:12]]), new_cache(ours), torch.tensor([0, 0, 20, 50])
    )
    expected = ours.prefill_chunk(ids[:20], new_cache(ours), 0, 0, 50)
    torch.testing.assert_close(states[:20], expected)


@torch.inference_mode()
def test_inactive_rows_change_nothing(precise):
    """A negative position, as a captured graph has it for unused slots."""
    cache = new_cache(precise, 2, prefill_chunk=4)
    precise.prefill(random_ids(9, 97), cache, slot=0)
    before = [layer.k.clone() for layer in cache.layers]
    tokens, slots = torch.tensor([5, 5]), torch.tensor([1, 0])
    decoded_logits(precise, tokens, cache, slots, torch.tensor([-1, -1]))
    for layer, k in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.k.nan_to_num(123.0), k.nan_to_num(123.0))


def test_what_a_cache_takes():
    """Rings: Gemma-2-9b at 8192 tokens takes 0.76 of a full cache with chunks of 128."""
    config = PUBLISHED["gemma-2-9b"]
    full = 8192 * config.kv_bytes_per_token(2)
    assert slot_bytes(config, 8192, 8192, torch.bfloat16) == full
    assert slot_bytes(config, 8192, 128, torch.bfloat16) / full <= 0.76
    assert slot_bytes(config, 8192, 512, torch.bfloat16) / full <= 0.79


def test_drafts_fit_a_ring_of_short_chunks():
    config = ModelConfig.from_dict(random_config("gemma2").to_dict())
    assert 1 + MAX_DRAFT == MAX_Q_LEN
    for chunk, capacity in ((1, WINDOW + 8), (8, WINDOW + 8), (9, WINDOW + 9), (60, 64)):
        assert layer_capacity(config, 0, 64, chunk) == capacity
        assert layer_capacity(config, 1, 64, chunk) == 64


def test_a_prefill_past_the_slot_is_refused(precise):
    cache = new_cache(precise, num_slots=2, max_seq_len=8)
    for slot, start, count in ((0, 0, 9), (0, 5, 4), (2, 0, 1), (-1, 0, 1), (0, 0, 0), (0, -1, 2)):
        with pytest.raises(ValueError, match="do not fit a cache of 2 slots of 8 tokens"):
            precise.prefill(random_ids(count, 97), cache, slot, start)


def test_a_cache_that_does_not_fit_names_its_size():
    model = gemcut_twin(random_model("gemma2"))
    with pytest.raises(MemoryError, match=r"of 1000000 tokens takes .* GB"):
        new_cache(model, 10_000_000, 1_000_000)
