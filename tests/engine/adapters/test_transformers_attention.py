"""Attention "gemcut" in transformers: eager attention's logits, by the rule, and its refusals."""

import copy
import inspect
from itertools import pairwise

import pytest
import torch
import transformers
from accuracy import assert_within_budget
from packaging import version
from random_models import BY_FAMILY, MODEL_TYPES, random_model
from torch import Tensor
from transformers import DynamicCache, StaticCache
from twins import assert_same_logits

from gemcut import kernels
from gemcut.engine.adapters import transformers_attention, transformers_cpu
from gemcut.engine.adapters.transformers_attention import register_attention
from gemcut.kernels import cpu

register_attention()
by_family = pytest.mark.parametrize("family", MODEL_TYPES)
PADDED = (0, 3, 7)  # tokens before the text of each row
LENGTH, NEW = 12, 6


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def tokens(rows: int = 3, length: int = LENGTH, seed: int = 0) -> Tensor:
    return torch.randint(4, 97, (rows, length), generator=torch.Generator().manual_seed(seed))


def mask_of(ids: Tensor, before=PADDED) -> Tensor:
    mask = torch.ones_like(ids)
    for row, count in zip(mask, before, strict=True):
        row[:count] = 0
    return mask


def with_attention(model, name: str):
    model = copy.deepcopy(model)
    model.set_attn_implementation(name)
    return model


def on(model, cache) -> dict[str, object]:
    """The argument that gives a model its cache: transformers 5.24 renamed it."""
    names = inspect.signature(model.forward).parameters
    return {"cache" if "cache" in names else "past_key_values": cache}


def stepwise(model, ids: Tensor, mask: Tensor | None, cache) -> Tensor:
    """Logits of a prefill, a chunk of three and single tokens, on one cache: [B, T, V]."""
    bounds = [0, LENGTH - 6, LENGTH - 3, *range(LENGTH - 2, ids.shape[1] + 1)]
    logits = []
    for first, end in pairwise(bounds):
        seen = None if mask is None else mask[:, :end]
        out = model(ids[:, first:end], attention_mask=seen, use_cache=True, **on(model, cache))
        logits.append(out.logits)
    return torch.cat(logits, 1)


def new_cache(model, static: bool):
    """A cache of transformers; a static one holds more than is used."""
    if not static:
        return DynamicCache(config=model.config)
    return StaticCache(config=model.config, max_cache_len=LENGTH + NEW + 5)


def assert_same(model, other, run, dtype: torch.dtype, ids: Tensor, mask: Tensor | None) -> None:
    """The rule for `other` beside `model`, for real tokens; exact is each row alone, in float64."""
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    wide = copy.deepcopy(model).double()
    exact = torch.cat(
        [wide(row[seen][None]).logits[0] for row, seen in zip(ids, real, strict=True)]
    )
    eager, actual = run(copy.deepcopy(model).to(dtype)), run(other.to(dtype))
    assert_within_budget("logits", actual[real], eager[real], exact)


@by_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "left-padded"])
@pytest.mark.parametrize("few", [0, 1000], ids=["kernels.cpu", "torch"])
def test_logits_are_those_of_eager_attention(family, dtype, padded, few, monkeypatch):
    monkeypatch.setattr(transformers_attention, "FEW_QUERIES", few)
    model = random_model(family)
    ids = tokens()
    mask = mask_of(ids) if padded else None

    def run(one):
        return one(ids, attention_mask=mask).logits

    assert_same(model, with_attention(model, "gemcut"), run, dtype, ids, mask)


@by_family
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "left-padded"])
@pytest.mark.parametrize("few", [0, 1000], ids=["kernels.cpu", "torch"])
def test_caches_are_read_as_eager_attention_reads_them(family, static, padded, few, monkeypatch):
    monkeypatch.setattr(transformers_attention, "FEW_QUERIES", few)
    model = random_model(family)
    ids = tokens(length=LENGTH + NEW)
    mask = mask_of(ids) if padded else None

    def run(one):
        return stepwise(one, ids, mask, new_cache(one, static))

    assert_same(model, with_attention(model, "gemcut"), run, torch.float32, ids, mask)


@by_family
def test_the_kernels_give_the_same(family, monkeypatch):
    """As on a GPU, in Triton's interpreter: padded rows, a prefill, a chunk, single tokens."""
    monkeypatch.setattr(transformers_attention, "cpu", None)
    monkeypatch.setattr(transformers_attention, "ops_on", lambda device: kernels)
    model = random_model(family, num_hidden_layers=2)
    ids = tokens(length=LENGTH + 2)
    mask = mask_of(ids)

    def run(one):
        return stepwise(one, ids, mask, new_cache(one, False))

    assert_same(model, with_attention(model, "gemcut"), run, torch.float32, ids, mask)


@by_family
@pytest.mark.parametrize("static", [None, "static"])
def test_generate_gives_the_same_tokens(family, static):
    model = random_model(family, tie_word_embeddings=False)
    other = with_attention(model, "gemcut")
    ids = tokens()
    settings = {"attention_mask": mask_of(ids), "max_new_tokens": 20, "pad_token_id": 0}
    settings |= {"cache_implementation": static, "eos_token_id": None}
    expected = model.generate(ids, do_sample=False, **settings)
    assert torch.equal(other.generate(ids, do_sample=False, **settings), expected)
    torch.manual_seed(0)
    expected = model.generate(ids, do_sample=True, **settings)
    torch.manual_seed(0)
    assert torch.equal(other.generate(ids, do_sample=True, **settings), expected)


def test_padding_after_a_text_changes_nothing_before_it():
    model = random_model("gemma2")
    other = with_attention(model, "gemcut")
    ids, mask = tokens(), torch.ones(3, LENGTH, dtype=torch.int64)
    mask[1, 7:] = 0

    def run(one):
        return one(ids, attention_mask=mask).logits

    assert_same(model, other, run, torch.float32, ids, mask)


def changed_settings(name: str):
    """What goes into attention, with an easy mistake in it."""
    original = cpu.attention_prefill

    def attention(q, k, v, slots, starts, bounds, scale, softcap, window, *rest):
        if name == "window":
            window = window and window + 1
        elif name == "softcap":
            softcap = None
        elif name == "scale":
            scale = q.shape[-1] ** -0.5
        elif name == "padding":
            rest = (*rest[:2], rest[2] - rest[2][:, :1] + k.shape[0] // 3 * slots.unique()[:, None])
        return original(q, k, v, slots, starts, bounds, scale, softcap, window, *rest)

    return attention


@pytest.mark.parametrize("mistake", ["none", "window", "softcap", "scale", "padding"])
def test_mistakes_are_seen(mistake, monkeypatch):
    monkeypatch.setattr(transformers_attention, "FEW_QUERIES", 0)
    monkeypatch.setattr(cpu, "attention_prefill", changed_settings(mistake))
    model = random_model("gemma2")
    ids = tokens()
    mask = mask_of(ids)

    def run(one):
        return one(ids, attention_mask=mask).logits

    def compare():
        assert_same(model, with_attention(model, "gemcut"), run, torch.float32, ids, mask)

    if mistake == "none":
        compare()
    else:
        with pytest.raises((AssertionError, IndexError)):
            compare()


@pytest.mark.parametrize("mistake", ["window", "softcap", "scale", "padding"])
def test_mistakes_in_torchs_attention_are_seen(mistake, monkeypatch):
    attend, mask_by = transformers_cpu.masked_attention, transformers_cpu._mask

    def attention(plan, q, k, v, scale, softcap, window):
        if mistake == "window":
            window = window and window - 1
        elif mistake == "softcap":
            softcap = None
        elif mistake == "scale":
            scale = q.shape[-1] ** -0.5
        return attend(plan, q, k, v, scale, softcap, window)

    def mask_of_rows(*arguments):
        seen, visible = mask_by(*arguments)
        return seen, visible[:1].expand_as(visible)  # as if no row were padded

    monkeypatch.setattr(transformers_attention, "masked_attention", attention)
    if mistake == "padding":
        monkeypatch.setattr(transformers_cpu, "_mask", mask_of_rows)
    model = random_model("gemma2")
    ids = tokens()
    mask = mask_of(ids)

    def run(one):
        return one(ids, attention_mask=mask).logits

    with pytest.raises(AssertionError):
        assert_same(model, with_attention(model, "gemcut"), run, torch.float32, ids, mask)


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "left-padded"])
def test_torch_compile_traces_it_whole(padded):
    """As generate compiles decode steps: the plan is made before, the step is one graph."""
    model = random_model("gemma2", num_hidden_layers=2)
    other = with_attention(model, "gemcut")
    ids = tokens()
    mask = mask_of(ids) if padded else None
    kinds = [None, other.config.sliding_window]
    offsets = {"batch_size": 3, "kv_length": LENGTH, "q_length": LENGTH, "attention_mask": mask}
    function = transformers_attention.sliding_window_causal_mask_function
    plans = [transformers_attention.plan_attention(**offsets)]
    plans += [
        transformers_attention.plan_attention(
            **offsets, mask_function=function(kinds[1]), local_size=kinds[1]
        )
    ]
    masks = dict(zip(("full_attention", "sliding_attention"), plans, strict=True))
    compiled = torch.compile(other, backend="eager", fullgraph=True)
    expected = other(ids, attention_mask=masks, use_cache=False).logits
    found = compiled(ids, attention_mask=masks, use_cache=False).logits
    real = torch.ones_like(ids) if mask is None else mask
    assert_same_logits(found[real.bool()], expected[real.bool()])


def continuous_batching(model, prompts: list[list[int]]) -> list[list[int]]:
    settings = {"num_blocks": 64, "max_batch_tokens": 64, "use_cuda_graph": False}
    known = inspect.signature(transformers.ContinuousBatchingConfig).parameters
    size = "block_size" if "block_size" in known else "page_size"
    config = transformers.ContinuousBatchingConfig(**settings, **{size: 16})
    greedy = transformers.GenerationConfig(
        max_new_tokens=12, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    outputs = model.generate_batch(
        inputs=prompts,
        generation_config=greedy,
        continuous_batching_config=config,
        progress_bar=False,
    )
    return [output.generated_tokens for output in outputs.values()]


@pytest.mark.skipif(
    not hasattr(transformers, "ContinuousBatchingConfig"), reason="before transformers 5.4"
)
@by_family
def test_continuous_batching_gives_the_tokens_of_generate(family):
    """With softcap, which paged|eager drops; no longer than the window (README.md says why)."""
    model = random_model(family, tie_word_embeddings=False, sliding_window=64)
    other = with_attention(model, "gemcut")
    prompts = [tokens(1, length, seed=length)[0].tolist() for length in (12, 3, 20, 7)]
    if version.parse(transformers.__version__) >= version.parse("5.20.0"):
        with pytest.raises(ValueError, match="gemcut is not supported for continuous batching"):
            continuous_batching(other, prompts)
        return
    expected = [
        model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False, eos_token_id=-1)
        for ids in prompts
    ]
    expected = [row[0, len(ids) :].tolist() for row, ids in zip(expected, prompts, strict=True)]
    assert continuous_batching(other, prompts) == expected


# What is refused


def test_masks_that_the_kernel_does_not_have_are_refused():
    model = with_attention(random_model("gemma2"), "gemcut")
    ids = tokens()
    custom = torch.zeros(3, 1, LENGTH, LENGTH)
    with pytest.raises(ValueError, match=r"a mask of padding \[B, S\], and got a mask \[3, 1"):
        model(ids, attention_mask=custom)
    with pytest.raises(ValueError, match="got a mask"):
        model(ids, attention_mask=custom.bool())
    packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3, 4]]).expand(3, -1)
    with pytest.raises(ValueError, match="packed sequences"):
        model(ids, position_ids=packed, use_cache=False)
    holes = torch.ones_like(ids)
    holes[1, 3:5] = 0
    with pytest.raises(ValueError, match="row 1 has 2 runs of ones"):
        model(ids, attention_mask=holes)


@by_family
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_a_mask_of_other_rows_or_too_few_keys_is_refused(family, static):
    model = with_attention(random_model(family, num_hidden_layers=2), "gemcut")
    ids = tokens()
    for mask in (mask_of(ids)[1:], mask_of(ids)[1:2], mask_of(ids)[:, None].expand(3, LENGTH, -1)):
        with pytest.raises(ValueError, match=r"\[B, S\] for 3 rows, and got attention_mask \["):
            model(ids, attention_mask=mask)
    cache = new_cache(model, static)
    model(ids[:, :8], **on(model, cache))
    with pytest.raises(ValueError, match="attention_mask is 8 short"):
        model(ids[:, 8:], attention_mask=torch.ones(3, 4), **on(model, cache))


def test_tokens_that_see_later_ones_are_refused():
    model = with_attention(random_model("gemma3_text"), "gemcut")
    model.config.use_bidirectional_attention = True
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    with pytest.raises(ValueError, match="causal"):
        model(tokens())


def test_what_the_kernel_does_not_give_is_refused():
    model = with_attention(random_model("gemma2"), "gemcut")
    ids = tokens()
    with pytest.raises(ValueError, match="output_attentions"):
        model(ids, output_attentions=True)
    with torch.enable_grad(), pytest.raises(RuntimeError, match="no gradients"):
        model(ids)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    with pytest.raises(ValueError, match=r"dropout 0\.1"):
        model.train()(ids)


def test_another_family_is_refused():
    from transformers import LlamaConfig, LlamaForCausalLM

    size = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 97}
    config = LlamaConfig(num_attention_heads=2, num_key_value_heads=1, **size)
    model = LlamaForCausalLM(config).eval()
    model.set_attn_implementation("gemcut")
    with pytest.raises(ValueError, match="not llama"):
        model(tokens())


def test_a_traced_model_yields_nan_where_it_cannot_check():
    """A hole of a mask whose numbers the host does not know."""
    seen = torch.ones(2, 6, dtype=torch.bool)
    seen[1, 2] = False
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        _, slots = transformers_attention._pads(seen, 6)
        _, short = transformers_attention._pads(torch.ones(2, 6), 7)
    assert slots.tolist() == [0, -1]
    assert short.tolist() == [-1, -1]


def test_the_families_have_windows_shorter_than_the_prompts():
    assert all(values.get("sliding_window", 0) < LENGTH for values in BY_FAMILY.values())
