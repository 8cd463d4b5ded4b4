"""The KV cache in fp8: its scales, whole models on it, and the engine's ways of using it."""

import math

import pytest
import torch
from accuracy import DEVICE, assert_within_budget
from engines import one_line, run_as_on_a_gpu
from random_models import MODEL_TYPES, random_model
from torch import Tensor
from twins import gemcut_twin, new_cache, random_ids

from gemcut import kernels
from gemcut.engine import Engine, SamplingParams
from gemcut.engine.execution.cache_scales import bounds, scales_of
from gemcut.engine.execution.model import Gemma
from gemcut.kernels import cpu, reference
from gemcut.kernels.quantized_weight import quantize

FP8 = torch.float8_e4m3fn
GREATEST = 448
REPEATED = [2, *[30, 31, 32, 33, 34] * 8]  # what drafts are found in


# Scales: no text can exceed what the weights allow

VARIANTS = [(model_type, {}) for model_type in MODEL_TYPES]
VARIANTS += [("gemma", {"attention_bias": True})]
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
YARN |= {"original_max_position_embeddings": 32}
VARIANTS += [("gemma2", {"rope_parameters": YARN})]
by_variant = pytest.mark.parametrize(("model_type", "overrides"), VARIANTS, ids=str)


def model_with_norms(model_type: str, overrides: dict, dtype=torch.float32) -> Gemma:
    """A random model whose norms and biases are not zero, which they are at the beginning."""
    theirs = random_model(model_type, **overrides)
    generator = torch.Generator().manual_seed(1)
    for name, x in theirs.named_parameters():
        if "norm" in name or "bias" in name:
            x.data = 0.5 * torch.randn(x.shape, generator=generator)
    return gemcut_twin(theirs, cpu, dtype)


def aligned_(model: Gemma, row: int) -> None:
    """Make token 5 the worst text for a row of the first layer's keys and values."""
    layer = model.weights.layers[0]
    q_size = model.config.num_q_heads * model.config.head_dim
    direction = layer.qkv[q_size + row] * (1 + layer.input_norm)
    if layer.qkv_bias is not None:
        direction = direction * layer.qkv_bias[q_size + row].sign()
    model.weights.embedding[5] = direction / direction.norm()


@by_variant
@torch.inference_mode()
def test_no_key_or_value_exceeds_its_bound_and_the_worst_reaches_it(model_type, overrides):
    model = model_with_norms(model_type, overrides)
    HK, K = model.config.num_kv_heads, model.config.head_dim
    reached = []
    for row in range(2 * HK * K):
        aligned_(model, row)
        cache = new_cache(model)
        model.prefill(torch.tensor([5, 5, 9]), cache, 0)
        of_text = []
        for i, layer in enumerate(cache.layers):
            greatest = [x[0, :, :3].abs().amax((1, 2)) for x in (layer.k, layer.v)]
            for found, bound in zip(greatest, bounds(model, i), strict=True):
                assert (found <= bound * 1.0001).all()
            of_text.append([x / b for x, b in zip(greatest, bounds(model, i), strict=True)])
        reached.append(of_text[0][1] if row >= HK * K else of_text[0][0])
    keys, values = torch.stack(reached).view(2, HK * K, HK).amax(1)
    assert (values > 0.95).all()
    assert (keys > (0.1 if model.weights.layers[0].k_norm is not None else 0.5)).all()


def test_a_rotation_that_scales_keys_scales_their_bound():
    plain, scaled = (model_with_norms("gemma2", x) for x in ({}, {"rope_parameters": YARN}))
    factor = scaled.rope_global.attention_scaling
    assert factor > 1.1
    for i in range(4):
        (keys, values), (more, same) = bounds(plain, i), bounds(scaled, i)
        torch.testing.assert_close(more, keys * factor)
        assert torch.equal(same, values)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_scales_are_powers_of_two_that_fit(model_type):
    model = model_with_norms(model_type, {})
    for i, pair in enumerate(scales_of(model)):
        for scale, bound in zip(pair, bounds(model, i), strict=True):
            assert scale.dtype == torch.float32
            assert torch.equal(scale.log2(), scale.log2().round())
            assert (bound / scale <= GREATEST).all()
            assert (bound / scale > GREATEST / 2.1).all()


def test_scales_of_quantised_and_of_packed_weights():
    """Those of what the weights stand for."""
    model = model_with_norms("gemma2", {"hidden_size": 64}, torch.bfloat16)
    plain = [bounds(model, i) for i in range(4)]
    model.weights.pack_()
    for found, expected in zip([bounds(model, i) for i in range(4)], plain, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    model = model_with_norms("gemma2", {"hidden_size": 64}, torch.bfloat16)
    for layer in model.weights.layers:
        layer.qkv = quantize(layer.qkv, "int8")
    for found, expected in zip([bounds(model, i) for i in range(4)], plain, strict=True):
        torch.testing.assert_close(found, expected, rtol=0.02, atol=0)


def test_heads_without_a_bound_are_not_scaled():
    model = model_with_norms("gemma", {})
    model.weights.layers[0].qkv.zero_()
    model.weights.layers[1].qkv.fill_(torch.nan)
    for keys, values in scales_of(model)[:2]:
        assert keys.tolist() == values.tolist() == [1.0, 1.0]


# Whole models


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@torch.inference_mode()
def test_logits_of_every_family(model_type):
    """On the kernels by the rule: the oracle's keys in float64 are rounded to e4m3 as well."""
    ids = random_ids(26, 97).to(DEVICE)

    def logits(ops, dtype: torch.dtype) -> Tensor:
        model = gemcut_twin(random_model(model_type), ops, dtype, DEVICE)
        cache = new_cache(model, prefill_chunk=7, in_fp8=True)
        found = [model.logits(model.prefill(ids[:18], cache, 0))]
        for position in range(18, 26):
            places = torch.zeros(1, dtype=torch.int64, device=DEVICE)
            hidden = model.decode(ids[position : position + 1], cache, places, places + position)
            found.append(model.logits(hidden))
        return torch.cat(found)

    exact = logits(reference, torch.float64).double()
    for dtype in (torch.float32, torch.bfloat16):
        eager = logits(reference, dtype)
        assert_within_budget(f"logits in {dtype}", logits(kernels, dtype), eager, exact)
        if DEVICE == "cpu":
            assert_within_budget(f"logits in {dtype}", logits(cpu, dtype), eager, exact)


# The engine


def made(folder, **options) -> Engine:
    options = {"dtype": "float32", "prefill_chunk": 8, "max_batch_size": 3} | options
    return Engine.from_pretrained(folder, kv_cache_dtype="fp8", **options)


@pytest.mark.parametrize("late", [False, True], ids=["read-at-once", "read-late"])
@pytest.mark.parametrize("name", ["gemma2", "gemma3_text"])
def test_reused_prefixes_and_drafts_change_no_token(folders, name, late):
    params = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True)
    prompts = [REPEATED, [*REPEATED[:30], 50, 51], REPEATED[:36]]
    with made(folders[name], reuse_prefixes=False) as engine:
        alone = [engine.generate(prompt, params).token_ids for prompt in prompts]
    with made(folders[name]) as engine:
        if late:
            run_as_on_a_gpu(engine)
        drafting = SamplingParams(
            max_tokens=16, temperature=0, ignore_eos=True, prompt_lookup_num_tokens=5
        )
        for _ in range(2):
            for prompt, expected in zip(prompts, alone, strict=True):
                assert engine.generate(prompt, params).token_ids == expected
                assert engine.generate(prompt, drafting).token_ids == expected
        together = engine.generate(prompts, params)
        assert [output.token_ids for output in together] == alone
        metrics = engine.metrics()
        assert metrics["reused_tokens"] > 0
        assert metrics["accepted_tokens"] > 0


def test_nan_in_a_slot_is_found_and_cleared(folders):
    with made(folders["gemma2"]) as engine:
        cache = engine.cache
        assert not cache.holds_nan(1, 5)
        cache.layers[2].v[1, 1, 4, 3] = torch.nan
        assert cache.holds_nan(1, 5)
        assert not cache.holds_nan(1, 4)
        assert not cache.holds_nan(0, 5)
        cache.clear(1)
        assert not cache.holds_nan(1, 5)


def test_the_scales_of_a_checkpoint_are_taken(folders):
    plain = Engine.from_pretrained(folders["gemma2"], dtype="float32")
    model = plain.model
    given = [(torch.full((2,), 2.0), torch.full((2,), 3.0)) for _ in model.weights.layers]
    with Engine(model, None, kv_cache_dtype="fp8", kv_scales=given) as engine:
        assert all(layer.k_scale.eq(2).all() and layer.v_scale.eq(3).all()
                   for layer in engine.cache.layers)  # fmt: skip
    plain.close()


GOOD = torch.ones(2)
BAD_SCALES = {
    "one layer short": (lambda pairs: pairs[1:], "a pair of tensors for each of the"),
    "no pairs": (lambda pairs: "scales", "a pair of tensors for each of the"),
    "none at all": (lambda pairs: [], "a pair of tensors for each of the"),
    "three": (lambda pairs: [(GOOD, GOOD, GOOD), *pairs[1:]], "a pair of tensors for each"),
    "float64": (lambda pairs: [(GOOD, GOOD.double()), *pairs[1:]], "values in layer 0 must be a t"),
    "one head more": (lambda pairs: [(torch.ones(3), GOOD), *pairs[1:]], r"contiguous \[2\]"),
    "strided": (lambda pairs: [*pairs[:-1], (torch.ones(4)[::2], GOOD)], "must be contiguous"),
    "zero": (
        lambda pairs: [(GOOD * 0, GOOD), *pairs[1:]],
        "keys in layer 0 are .0.0, 0.0.; scales",
    ),
    "NaN": (
        lambda pairs: [(GOOD, GOOD * torch.nan), *pairs[1:]],
        "values in layer 0 are .nan, nan",
    ),
    "negative": (lambda pairs: [(-GOOD, GOOD), *pairs[1:]], "finite and above 0"),
}


@pytest.mark.parametrize("case", BAD_SCALES)
def test_scales_that_are_none_are_refused(folders, case):
    change, message = BAD_SCALES[case]
    with Engine.from_pretrained(folders["gemma2"], dtype="float32") as plain:
        given = change([(GOOD, GOOD) for _ in plain.model.weights.layers])
        with pytest.raises(ValueError, match=message) as error:
            Engine(plain.model, None, kv_cache_dtype="fp8", kv_scales=given)
        one_line(error)


def test_scales_without_fp8_are_refused(folders):
    with Engine.from_pretrained(folders["gemma2"], dtype="float32") as plain:
        given = [(GOOD, GOOD) for _ in plain.model.weights.layers]
        with pytest.raises(ValueError, match="kv_scales are for a cache in fp8"):
            Engine(plain.model, None, kv_scales=given)


def test_the_demo_writes_about_as_well():
    """By its own text: the log-probability of what it writes changes by less than 1 %."""
    with Engine.from_pretrained("demo", dtype="float32") as engine:
        prompt = "It was late in the evening when Holmes"
        text = prompt + engine.generate(prompt, SamplingParams(max_tokens=300, seed=0)).text
        expected = engine.score(text).perplexity
    with Engine.from_pretrained("demo", dtype="float32", kv_cache_dtype="fp8") as engine:
        assert math.isclose(engine.score(text).perplexity, expected, rel_tol=0.01)


@pytest.mark.parametrize("value", ["int8", "fp8_e5m2", None, torch.float8_e4m3fn])
def test_unknown_values_are_refused(folders, value):
    with pytest.raises(ValueError, match="is not supported; give 'auto' or 'fp8'") as error:
        Engine.from_pretrained(folders["gemma2"], kv_cache_dtype=value)
    one_line(error)


def test_the_commands_take_it(run):
    info = ("info", "--model", "demo", "--dtype", "bfloat16", "--max-seq-len", "500")
    assert "10.24 MB KV cache" in run(*info)[1]
    assert "5.12 MB KV cache" in run(*info, "--kv-cache-dtype", "fp8")[1]
    code, out, err = run(
        "generate", "--model", "demo", "--kv-cache-dtype", "fp8", "--max-tokens", "3", "Once"
    )
    assert (code, err) == (0, "")
    assert out.strip()
    assert run("generate", "--model", "demo", "--kv-cache-dtype", "int8", "Once")[0] == 2
