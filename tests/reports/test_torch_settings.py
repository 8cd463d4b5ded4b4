"""What a program has set in torch changes no result: default device, dtype, modes, compilation."""

from contextlib import contextmanager, nullcontext

import pytest
import torch
from documented_twins import MASKS, random_ids, twins

from gemcut.engine import Engine, SamplingParams
from gemcut.engine.transformers_api import AutoModelForCausalLM, DynamicCache, pipeline

IDS = random_ids(length=12)
MASK = MASKS["left"][:, -12:]
FAMILIES = ["gemma2", "gemma3_text"]


@contextmanager
def default_device():
    before = torch.get_default_device()
    torch.set_default_device("meta")  # whatever is made there has no numbers
    yield
    torch.set_default_device(before)


@contextmanager
def default_dtype():
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


@contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


SETTINGS = {
    "device": default_device,
    "device-context": lambda: torch.device("meta"),
    "dtype": default_dtype,
    "inference": torch.inference_mode,
    "gradients": torch.enable_grad,
    "no-gradients": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "deterministic": deterministic,
}
by_setting = pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)


def results(model) -> list[torch.Tensor]:
    """What a model computes, by every path: logits, losses, masks, caches, samples."""
    labels = IDS.masked_fill(MASK == 0, -100)
    cache = DynamicCache()
    first = model(IDS, attention_mask=MASK, past_key_values=cache, output_hidden_states=True)
    second = model(IDS[:, -1:], cache=cache)
    greedy = {"max_new_tokens": 6, "do_sample": False}
    torch.manual_seed(3)
    return [
        first.logits,
        *first.hidden_states,
        second.logits,
        model(IDS, attention_mask=MASK, labels=labels).loss,
        model(IDS, attention_mask=MASKS["holes"][:, -12:], output_attentions=True).logits,
        model.generate(IDS, attention_mask=MASK, **greedy),
        model.generate(IDS, attention_mask=MASKS["holes"][:, -12:], **greedy),
        model.generate(IDS, max_new_tokens=6, do_sample=True, top_k=9, repetition_penalty=1.2),
        model.generate(IDS, num_return_sequences=2, do_sample=True, max_new_tokens=3),
        model.generate(inputs_embeds=model.get_input_embeddings()(IDS), **greedy),
    ]


def assert_equal(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for number, (x, y) in enumerate(zip(actual, expected, strict=True)):
        assert x.dtype == y.dtype, number
        assert torch.equal(x, y), number
        assert not x.requires_grad
        assert not x.is_inference()


@by_setting
@pytest.mark.parametrize("model_type", FAMILIES)
def test_results_are_as_without(model_type, setting, tmp_path):
    _, ours = twins("AutoModelForCausalLM", model_type, tie_word_embeddings=False)
    expected = results(ours)
    ours.save_pretrained(tmp_path)
    with setting():
        assert_equal(results(ours), expected)  # set before a call
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)  # before loading
        assert_equal(results(loaded), expected)
        fresh = AutoModelForCausalLM.from_config(loaded.config)
        fresh.load_state_dict(loaded.state_dict())
        assert_equal(results(fresh), expected)
    assert_equal(results(loaded), expected)  # and after it: memory that was made within is as good
    assert_equal(results(fresh), expected)
    fresh.load_state_dict(loaded.state_dict())


@by_setting
def test_an_engine_is_as_without(setting):
    prompts = ["It was a bright", "The", "A long way from the house"]
    params = [
        SamplingParams(temperature=0, max_tokens=8, logprobs=2),
        SamplingParams(temperature=0.8, top_k=20, seed=1, max_tokens=8, repetition_penalty=1.1),
        SamplingParams(temperature=0, max_tokens=8, logit_bias={9: -5.0}, prompt_logprobs=1),
    ]

    def answers(engine: Engine) -> list:
        background = engine.stream(prompts[0], params[0])  # in the engine's own thread
        text = "".join(part.text for part in background)
        outputs = engine.generate(prompts, params)
        return [text, *((o.token_ids, o.outputs[0].logprobs, o.prompt_logprobs) for o in outputs)]

    with Engine.from_pretrained("demo", max_batch_size=3) as engine:
        expected = answers(engine)
        with setting():
            assert answers(engine) == expected
    with setting(), Engine.from_pretrained("demo", max_batch_size=3) as engine:
        assert answers(engine) == expected


@pytest.mark.parametrize("mode", [nullcontext, torch.inference_mode], ids=["none", "inference"])
def test_a_compiled_model_computes_the_same(mode):
    """torch.compile can trace neither kernels nor the cache: the call runs as it is."""
    _, ours = twins("AutoModelForCausalLM", "gemma2")
    expected, tokens = ours(IDS).logits, ours.generate(IDS, max_new_tokens=3)
    with mode():
        assert torch.equal(torch.compile(ours.forward)(IDS).logits, expected)
        assert torch.equal(torch.compile(ours)(IDS).logits, expected)
        assert torch.equal(torch.compile(ours.generate)(IDS, max_new_tokens=3), tokens)
        within = torch.compile(lambda ids: ours(ids).logits + 1)
        assert torch.equal(within(IDS), expected + 1)


def test_threads_of_torch_do_not_matter():
    _, ours = twins("AutoModelForCausalLM", "gemma2")
    before, expected = torch.get_num_threads(), ours.generate(IDS, max_new_tokens=5)
    for count in (1, 2):
        torch.set_num_threads(count)
        assert torch.equal(ours.generate(IDS, max_new_tokens=5), expected)
    torch.set_num_threads(before)


def test_a_pipeline_under_another_default_device():
    generate = pipeline("text-generation", "demo")
    expected = generate("It was", max_new_tokens=4, do_sample=False)
    with torch.device("meta"):
        assert generate("It was", max_new_tokens=4, do_sample=False) == expected
