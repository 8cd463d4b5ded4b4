"""The compiled peer against transformers and gemcut's own model: it must compute the same Gemma.

Nearly all of it runs uncompiled, since that is the same program.
"""

from dataclasses import replace

import pytest
import torch
from random_models import MODEL_TYPES, random_model
from torch import Tensor, nn
from twins import assert_same_logits, gemcut_twin, greedy, random_ids
from twins import stepwise_logits as engine_logits

from gemcut.bench.engines.compiled_gemma import CompiledGemma, choose
from gemcut.engine.config.model_config import PUBLISHED
from gemcut.engine.execution.weights import empty_weights

LOCAL, GLOBAL = "sliding_attention", "full_attention"
NO_SOFTCAPS = {"attn_logit_softcapping": None, "final_logit_softcapping": None}
ODD = {"vocab_size": 131, "hidden_size": 52, "intermediate_size": 75, "head_dim": 18}
DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 3.0}}
DYNAMIC |= {"max_position_embeddings": 32}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
YARN["original_max_position_embeddings"] = 32

# What each is there for, the family, and what it changes.  The window is 5.
CASES = {
    "gemma": ("gemma", {}),
    "gemma-one-kv-head": ("gemma", {"num_key_value_heads": 1}),
    "gemma2": ("gemma2", {}),
    "gemma2-global-first": ("gemma2", {"layer_types": [GLOBAL, LOCAL] * 2}),
    "gemma2-odd-sizes-bias": ("gemma2", ODD | {"attention_bias": True}),
    "gemma2-yarn": ("gemma2", {"rope_parameters": YARN}),
    "vaultgemma": ("vaultgemma", {}),
    "vaultgemma-as-published": (
        "vaultgemma",
        NO_SOFTCAPS | {"num_key_value_heads": 4, "layer_types": [GLOBAL] * 4},
    ),
    "gemma3": ("gemma3_text", {}),
    "gemma3-bias": ("gemma3_text", {"attention_bias": True, "num_key_value_heads": 4}),
}


def random_twins(model_type: str, **overrides):
    """A transformers model, and gemcut's of the same weights.

    The head is not the embedding: a random model that ties them repeats one token for ever.
    """
    untied = {"max_position_embeddings": 128, "tie_word_embeddings": False}
    model = random_model(model_type, **untied | overrides)
    return model, gemcut_twin(model)


def eager(twin, **settings) -> CompiledGemma:
    return CompiledGemma(twin.config, twin.weights, compiled=False, **settings)


def batch_of(batch: int, length: int, vocab_size: int = 97) -> Tensor:
    return torch.stack([random_ids(length, vocab_size, seed) for seed in range(batch)])


@torch.no_grad()
def stepwise_logits(gemma: CompiledGemma, ids: Tensor, prefilled: int) -> Tensor:
    """Logits by a prefill of the first tokens and a step for each other: -> [B, 1 + others, V]."""
    model = gemma.model
    inputs = [kind.of_prompt(prefilled) for kind in model.kinds]
    logits = [model(ids[:, :prefilled], inputs)]
    for position in range(prefilled, ids.shape[1]):
        inputs = [kind.of_step(torch.tensor([position]), model.flex) for kind in model.kinds]
        logits.append(model(ids[:, position : position + 1], inputs))
    return torch.stack(logits, dim=1)


def assert_same_model(case: str, prefilled: int, flex: bool) -> None:
    model_type, overrides = CASES[case]
    theirs, twin = random_twins(model_type, **overrides)
    ids = batch_of(3, 40, twin.config.vocab_size)
    gemma = eager(twin, batch=3, max_seq_len=40, flex=flex)
    with torch.inference_mode():
        expected = theirs(input_ids=ids).logits
    assert_same_logits(stepwise_logits(gemma, ids, prefilled), expected[:, prefilled - 1 :])


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(case):
    assert_same_model(case, prefilled=21, flex=False)


@pytest.mark.parametrize("prefilled", [1, 4, 5, 6])
def test_a_ring_that_is_not_full_yet(prefilled):
    assert_same_model("gemma3", prefilled, flex=False)


@pytest.mark.parametrize("case", ["gemma", "gemma2", "gemma3"])
def test_flex_decodes_the_same(case):
    assert_same_model(case, prefilled=35, flex=True)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_bfloat16_errs_no_more_than_twice_as_gemcut_does(model_type):
    theirs, exact = random_twins(model_type)
    rounded = gemcut_twin(theirs, dtype=torch.bfloat16)
    ids = batch_of(1, 40)
    expected = stepwise_logits(eager(exact, batch=1, max_seq_len=40), ids, 21)
    actual = stepwise_logits(eager(rounded, batch=1, max_seq_len=40), ids, 21)
    gemcuts = engine_logits(rounded, ids[0], prefilled=20)[20:]
    budget = 2 * (gemcuts - expected[0]).abs().max() + 2 * 2**-8 * expected.abs().max()
    assert (actual - expected).abs().max() <= budget


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_tokens_are_those_of_gemcut(model_type, batch):
    _, twin = random_twins(model_type)
    prompts = batch_of(batch, 11)
    expected = greedy(twin, list(prompts), 40).tolist()
    assert all(len(set(row)) > 5 for row in expected)
    gemma = eager(twin, batch=batch, max_seq_len=51)
    assert gemma.generate(prompts.tolist(), 40) == expected


def test_tokens_are_those_of_transformers():
    # frequencies by length, and a prompt that is longer than the 32 positions of the training
    theirs, twin = random_twins("gemma", **DYNAMIC)
    theirs.generation_config.eos_token_id = None
    prompt = batch_of(1, 40)
    expected = theirs.generate(prompt, max_new_tokens=40, do_sample=False, pad_token_id=0)
    gemma = eager(twin, batch=1, max_seq_len=80)
    assert gemma.generate(prompt.tolist(), 40) == expected[:, 40:].tolist()


def test_one_call_leaves_nothing_to_the_next():
    _, twin = random_twins("gemma2")
    gemma = eager(twin, batch=2, max_seq_len=40)
    for length, new_tokens in [(30, 10), (3, 20), (1, 1), (8, 32)]:
        prompts = batch_of(2, length).tolist()
        fresh = eager(twin, batch=2, max_seq_len=40)
        assert gemma.generate(prompts, new_tokens) == fresh.generate(prompts, new_tokens)


def test_the_first_token_is_announced_before_the_second():
    _, twin = random_twins("gemma")
    gemma = eager(twin, batch=2, max_seq_len=20)
    calls = []
    rows = gemma.generate(
        batch_of(2, 7).tolist(), 5, lambda: calls.append(gemma.sequence[:, 7:9].tolist())
    )
    assert calls == [[[row[0], 0] for row in rows]]


def test_an_end_of_sequence_ends_nothing():
    _, twin = random_twins("gemma")
    prompts = batch_of(1, 7).tolist()
    (row,) = eager(twin, batch=1, max_seq_len=20).generate(prompts, 9)
    ending = replace(twin.config, eos_token_ids=tuple(set(row)))
    gemma = CompiledGemma(ending, twin.weights, batch=1, max_seq_len=20, compiled=False)
    assert gemma.generate(prompts, 9) == [row]


@pytest.mark.parametrize("vocab_size", [97, 96, 1024], ids=["prime", "32-parts", "256-parts"])
def test_choice_is_the_first_of_the_greatest(vocab_size):
    logits = torch.randn(5, vocab_size).round()  # with ties
    first = (logits == logits.amax(-1, keepdim=True)).int().argmax(-1)
    assert choose(logits).tolist() == first.tolist()


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_weights_are_shared(model_type):
    _, twin = random_twins(model_type, attention_bias=True)
    gemma = eager(twin, batch=1, max_seq_len=8)
    weights = twin.weights
    assert gemma.model.head.weight.data_ptr() == weights.lm_head.data_ptr()
    assert gemma.model.embedding.data_ptr() == weights.embedding.data_ptr()
    for layer, own in zip(gemma.model.layers, weights.layers, strict=True):
        F = own.down.shape[1]
        for module, weight, bias in (
            (layer.qkv, own.qkv, own.qkv_bias),
            (layer.o, own.o, own.o_bias),
            (layer.gate, own.gate_up[:F], None),
            (layer.up, own.gate_up[F:], None),
            (layer.down, own.down, None),
        ):
            assert module.weight.data_ptr() == weight.data_ptr()
            assert module.weight.shape == weight.shape
            assert (module.bias is None) == (bias is None)
            assert bias is None or module.bias.data_ptr() == bias.data_ptr()


@pytest.mark.parametrize(("name", "scale"), [("gemma-7b", 55.5), ("gemma-3-270m", 25.25)])
def test_the_embedding_scale_is_rounded(name, scale):
    config = PUBLISHED[name]
    weights = empty_weights(config, device="meta", dtype=torch.bfloat16)
    gemma = CompiledGemma(config, weights, batch=1, max_seq_len=8)
    assert gemma.model.embedding_scale == scale


def test_a_local_layer_keeps_its_window_alone():
    config = PUBLISHED["gemma-3-270m"]
    weights = empty_weights(config, device="meta", dtype=torch.bfloat16)
    gemma = CompiledGemma(config, weights, batch=2, max_seq_len=2048)
    places = [layer.kv_cache.shape[3] for layer in gemma.model.layers]
    assert places == [512 if config.is_local(i) else 2048 for i in range(18)]


@pytest.mark.parametrize("model_type", ["gemma3_text", "gemma2"])
def test_compiled_is_the_same(model_type):
    """SDPA, and FlexAttention for softcaps: of views, its CPU kernel computes other numbers."""
    _, twin = random_twins(model_type, num_hidden_layers=1)
    settings = torch._inductor.config.get_config_copy()
    prompts = batch_of(2, 4).tolist()
    gemma = CompiledGemma(twin.config, twin.weights, batch=2, max_seq_len=24)
    expected = eager(twin, batch=2, max_seq_len=24).generate(prompts, 20)
    for _ in range(2):
        assert gemma.generate(prompts, 20) == expected
    assert torch._inductor.config.get_config_copy() == settings


class TestQuantized:
    @pytest.fixture(autouse=True)
    def _torchao(self):
        pytest.importorskip("torchao")

    def test_int8_is_the_model_of_the_rounded_weights(self):
        _, twin = random_twins("gemma2", attention_bias=True)
        before = [linear.weight.clone() for linear in linears(eager(twin, batch=1, max_seq_len=1))]
        settings = torch._inductor.config.get_config_copy()
        gemma = eager(twin, batch=3, max_seq_len=40, quantization="int8")
        assert torch._inductor.config.get_config_copy() == settings

        plain = eager(twin, batch=3, max_seq_len=40)
        for module, quantised, original in zip(linears(plain), linears(gemma), before, strict=True):
            assert torch.equal(module.weight, original)
            assert quantised.weight.qdata.dtype == torch.int8
            step = original.abs().amax(1, keepdim=True) / 127
            rounded = quantised.weight.dequantize()
            assert ((rounded - original).abs() <= 0.51 * step).all()
            module.weight = nn.Parameter(rounded, requires_grad=False)

        ids = batch_of(3, 40)
        expected = stepwise_logits(plain, ids, 21)
        assert_same_logits(stepwise_logits(gemma, ids, 21), expected)
        assert gemma.generate(ids[:, :21].tolist(), 19) == plain.generate(ids[:, :21].tolist(), 19)

    def test_a_tied_embedding_stays_as_it_is(self):
        _, twin = random_twins("gemma", tie_word_embeddings=True)
        gemma = eager(twin, batch=1, max_seq_len=8, quantization="int8")
        assert gemma.model.embedding.data_ptr() == twin.weights.lm_head.data_ptr()
        assert gemma.model.head.weight.qdata.dtype == torch.int8

    @pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU may have it")
    def test_int4_without_a_gpu_is_refused_with_the_reason(self):
        _, twin = random_twins("gemma", hidden_size=128)
        with pytest.raises(NotImplementedError, match=r"cannot quantise to int4: \w+"):
            eager(twin, batch=1, max_seq_len=8, quantization="int4")

    @pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU may have it")
    def test_int4_of_a_width_that_groups_do_not_divide_is_refused(self):
        _, twin = random_twins("gemma", hidden_size=48)
        with pytest.raises(NotImplementedError, match=r"not quantised to int4: .*in_features=48"):
            eager(twin, batch=1, max_seq_len=8, quantization="int4")


def linears(gemma: CompiledGemma) -> list[nn.Linear]:
    return [module for module in gemma.model.modules() if isinstance(module, nn.Linear)]


@pytest.mark.parametrize(
    ("prompts", "new_tokens", "message"),
    [
        ([[5, 6]], 1, "1 prompts; the batch is 2"),
        ([[5, 6]] * 3, 1, "3 prompts; the batch is 2"),
        ([], 1, "0 prompts; the batch is 2"),
        ([[5, 6], [5]], 1, r"\[1, 2\] tokens"),
        ([[], []], 1, "prompt tokens 0"),
        ([[5, 6]] * 2, 0, "new tokens 0"),
        ([[5, 6]] * 2, 7, "are 9; max_seq_len is 8"),
    ],
)
def test_other_prompts_than_announced_are_refused(prompts, new_tokens, message):
    _, twin = random_twins("gemma")
    gemma = eager(twin, batch=2, max_seq_len=8)
    with pytest.raises(ValueError, match=message):
        gemma.generate(prompts, new_tokens)
    assert [len(row) for row in gemma.generate([[5, 6]] * 2, 6)] == [6, 6]


def test_an_unknown_quantization_is_refused():
    _, twin = random_twins("gemma")
    with pytest.raises(ValueError, match="'int3' is unknown; there are int8 and int4"):
        eager(twin, batch=1, max_seq_len=8, quantization="int3")
