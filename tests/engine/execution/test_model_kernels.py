"""The whole model on the kernels, beside the same model on their oracles."""

import pytest
import torch
from accuracy import DEVICE, assert_within_budget
from random_models import MODEL_TYPES, random_model
from torch import Tensor
from twins import (
    decoded_logits,
    gemcut_twin,
    greedy,
    load_model,
    new_cache,
    random_ids,
    stepwise_logits,
)

from gemcut import kernels
from gemcut.engine import Engine, SamplingParams
from gemcut.engine.checkpoints.hub import DEMO
from gemcut.engine.execution.model import Gemma
from gemcut.kernels import reference

by_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def random_twin(model_type: str, ops, dtype: torch.dtype) -> Gemma:
    """A small random model of a family: window 5, so a prefill chunk of 7 makes a ring of 12."""
    theirs = random_model(model_type, max_position_embeddings=128)
    return gemcut_twin(theirs, ops, dtype, DEVICE)


def assert_same_logits_by_the_rule(model_of, ids: Tensor, prefilled: int, chunk: int) -> None:
    """Logits of a chunked prefill and of decode steps after it, in model_of(ops, dtype)."""

    def logits(ops, dtype: torch.dtype) -> Tensor:
        return stepwise_logits(model_of(ops, dtype), ids, prefilled, chunk)

    exact = logits(reference, torch.float64).double()
    for dtype in (torch.float32, torch.bfloat16):
        eager, actual = logits(reference, dtype), logits(kernels, dtype)
        assert_within_budget(f"logits in {dtype}", actual, eager, exact)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_logits_of_every_family(model_type):
    """26 tokens are five windows and more than two turns of the ring."""
    ids = random_ids(26, 97).to(DEVICE)
    assert_same_logits_by_the_rule(
        lambda ops, dtype: random_twin(model_type, ops, dtype), ids, prefilled=18, chunk=7
    )


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_greedy_tokens_of_every_family(model_type):
    prompts = [random_ids(length, 97, seed=length).to(DEVICE) for length in (3, 11)]
    expected = greedy(random_twin(model_type, reference, torch.float32), prompts, 15, 7)
    actual = greedy(random_twin(model_type, kernels, torch.float32), prompts, 15, 7)
    assert torch.equal(actual, expected)


def test_logits_of_the_demo_model():
    """Its window is 64; with chunks of 16 its ring holds 80 tokens, and 84 wrap around it."""
    ids = torch.randint(4, 3000, (84,), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    assert_same_logits_by_the_rule(
        lambda ops, dtype: load_model(DEMO, ops, dtype, DEVICE), ids, prefilled=78, chunk=16
    )


@by_dtype
@torch.inference_mode()
def test_a_sequence_decodes_to_the_same_bits_in_any_company(dtype):
    """Alone, and as each row of a batch of three of other lengths, one of which is inactive."""
    model = random_twin("gemma2", kernels, dtype)
    lengths = (3, 18, 9)
    cache = new_cache(model, len(lengths), prefill_chunk=7)
    for slot, length in enumerate(lengths):
        model.prefill(random_ids(length, 97, seed=slot).to(DEVICE), cache, slot)
    ids, slots = torch.tensor([5, 6, 7], device=DEVICE), torch.arange(3, device=DEVICE)
    positions = torch.tensor(lengths, device=DEVICE)

    together = decoded_logits(model, ids, cache, slots, positions)
    for row in range(3):
        one = slice(row, row + 1)
        alone = decoded_logits(model, ids[one], cache, slots[one], positions[one])
        assert torch.equal(alone[0], together[row])
    without = decoded_logits(model, ids, cache, slots, positions.where(slots != 1, -1))
    assert torch.equal(without[[0, 2]], together[[0, 2]])


@by_dtype
@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text"])
@torch.inference_mode()
def test_a_padded_chunk_is_what_its_tokens_are(model_type, dtype, poisoned):
    """Except for the rounding of products of other sizes.  Fresh buffers and the cache are NaN."""
    model = random_twin(model_type, kernels, dtype)
    ids = random_ids(19, 97).to(DEVICE)
    caches = [new_cache(model, 2, prefill_chunk=7) for _ in range(2)]
    for start, count in ((0, 5), (5, 7), (12, 6), (18, 1)):
        tokens = torch.zeros(7, dtype=torch.int64, device=DEVICE)
        tokens[:count] = ids[start : start + count]
        place = torch.tensor([1, start, count, len(ids)], device=DEVICE)
        padded = model.prefill_padded(tokens, caches[0], place)
        plain = model.prefill_chunk(ids[start : start + count], caches[1], 1, start, len(ids))
        torch.testing.assert_close(padded[:count], plain)
        assert padded.isfinite().all()  # initcheck would report a value that was never written
    for one, other in zip(caches[0].layers, caches[1].layers, strict=True):
        torch.testing.assert_close(one.k, other.k, equal_nan=True)
        torch.testing.assert_close(one.v, other.v, equal_nan=True)


def test_the_engine_on_the_kernels_gives_the_references_text():
    """Greedy and seeded, past the window and past one turn of the ring."""
    prompt = "It was a bright cold morning of the early spring, and we sat after breakfast " * 4
    texts = []
    for ops in ("triton", "reference"):
        with Engine.from_pretrained(
            "demo", ops=ops, dtype="float32", device=DEVICE, max_seq_len=256, prefill_chunk=16
        ) as engine:
            assert len(engine.tokenizer.encode(prompt)) > 64
            params = [
                SamplingParams(max_tokens=18, temperature=0),
                SamplingParams(max_tokens=18, temperature=0.8, top_k=40, top_p=0.9, seed=7),
            ]
            outputs = engine.generate([prompt, prompt], params)
            texts.append([output.text for output in outputs])
    assert texts[0] == texts[1]
    assert texts[0][0] != texts[0][1]
