"""A patched model of transformers: the logits of the plain one, by the rule, and its way back."""

import copy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accuracy import assert_within_budget
from random_models import MODEL_TYPES, random_model
from torch import nn
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
)
from twins import assert_same_logits

from gemcut import kernels
from gemcut.engine.adapters import transformers_attention, transformers_patch
from gemcut.engine.adapters.transformers_patch import patch_transformers, unpatch_transformers
from gemcut.kernels import cpu

by_family = pytest.mark.parametrize("family", MODEL_TYPES)
PADDED = (0, 3, 7)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def inputs(length: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and a mask of padding before two of three texts."""
    ids = torch.randint(4, 97, (3, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    for row, count in zip(mask, PADDED, strict=True):
        row[:count] = 0
    return ids, mask


def assert_within_rule(model, dtype: torch.dtype, padded: bool = True) -> None:
    """The patched model beside the plain one, for real tokens; exact is each row in float64."""
    ids, mask = inputs()
    mask = mask if padded else torch.ones_like(mask)
    real, wide = mask.bool(), copy.deepcopy(model).double()
    exact = torch.cat(
        [wide(row[seen][None]).logits[0] for row, seen in zip(ids, real, strict=True)]
    )
    model = model.to(dtype)
    eager = model(ids, attention_mask=mask).logits
    with patch_transformers(model):
        actual = model(ids, attention_mask=mask).logits
    assert_within_budget("logits", actual[real], eager[real], exact)


@by_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "left-padded"])
def test_logits_are_those_of_the_plain_model(family, dtype, padded):
    assert_within_rule(random_model(family), dtype, padded)


@by_family
def test_the_kernels_give_the_same(family, monkeypatch):
    """As on a GPU, in Triton's interpreter."""
    for module in (transformers_attention, transformers_patch):
        monkeypatch.setattr(module, "ops_on", lambda device: kernels)
    assert_within_rule(random_model(family, num_hidden_layers=2), torch.float32)


@pytest.mark.parametrize("family", ["gemma", "gemma2"])
def test_biases_are_added(family):
    assert_within_rule(random_model(family, attention_bias=True), torch.float32)


def test_biases_are_added_by_the_kernels(monkeypatch):
    monkeypatch.setattr(transformers_patch, "ops_on", lambda device: kernels)
    assert_within_rule(
        random_model("gemma3_text", attention_bias=True, num_hidden_layers=2), torch.float32
    )


@by_family
@pytest.mark.parametrize("static", [None, "static"])
def test_generate_gives_the_same_tokens(family, static):
    model = random_model(family, tie_word_embeddings=False)
    ids, mask = inputs()
    settings = {"attention_mask": mask, "max_new_tokens": 20, "pad_token_id": 0}
    settings |= {"cache_implementation": static, "eos_token_id": None}
    for do_sample in (False, True):
        torch.manual_seed(0)
        expected = model.generate(ids, do_sample=do_sample, **settings)
        with patch_transformers(model):
            torch.manual_seed(0)
            assert torch.equal(model.generate(ids, do_sample=do_sample, **settings), expected)


@by_family
def test_undone_the_model_is_what_it_was_bit_for_bit(family):
    model = random_model(family)
    ids, mask = inputs()
    before = model(ids, attention_mask=mask, output_hidden_states=True)
    state = {name: x.clone() for name, x in model.state_dict().items()}
    members = [dict(vars(module)) for module in model.modules()]
    patch = patch_transformers(model)
    patched = model(ids, attention_mask=mask, output_hidden_states=True)
    assert not torch.equal(patched.logits, before.logits)  # other ops did run
    assert len(patched.hidden_states) == len(before.hidden_states)
    patch.undo()
    after = model(ids, attention_mask=mask, output_hidden_states=True)
    for one, other in zip(before.hidden_states, after.hidden_states, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(before.logits, after.logits)
    assert [vars(module).keys() for module in model.modules()] == [m.keys() for m in members]
    assert model.config._attn_implementation == "eager"
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())


def test_one_instance_is_patched_and_no_other():
    model, other = random_model("gemma2"), random_model("gemma2")
    ids, _ = inputs()
    before = other(ids).logits
    patch_transformers(model)
    assert other.config._attn_implementation == "eager"
    assert torch.equal(other(ids).logits, before)
    twin = copy.deepcopy(model)  # which is patched too, and undone by itself
    unpatch_transformers(model)
    assert not torch.equal(twin(ids).logits, before)
    unpatch_transformers(twin)
    assert torch.equal(twin(ids).logits, before)


def test_a_pickled_model_is_patched_too(tmp_path):
    """Read by a process that has not registered the attention, and undone there."""
    model = random_model("gemma2")
    ids, _ = inputs()
    before = model(ids).logits
    patch_transformers(model)
    torch.save((model, ids, before, model(ids).logits), tmp_path / "model.pt")
    check = """
import sys, torch
torch.set_grad_enabled(False)
model, ids, before, patched = torch.load(sys.argv[1], weights_only=False)
assert torch.equal(model(ids).logits, patched)
model._gemcut_patch.undo()
assert torch.equal(model(ids).logits, before)
"""
    subprocess.run([sys.executable, "-P", "-c", check, tmp_path / "model.pt"], check=True)


def test_what_is_undone_within_stays_undone():
    model = random_model("gemma2")
    with patch_transformers(model):
        unpatch_transformers(model)

    def undone_before_an_error():
        with patch_transformers(model):
            unpatch_transformers(model)
            raise KeyError

    with pytest.raises(KeyError):  # which no other error hides
        undone_before_an_error()
    del patch_transformers(model).text.norm.forward  # somebody else's undo
    unpatch_transformers(model)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("mistake", ["norm", "rotation", "gate", "softcap"])
def test_mistakes_are_seen(mistake, monkeypatch):
    """One op of kernels.cpu each, changed."""
    if mistake == "norm":
        original = cpu.rmsnorm
        monkeypatch.setattr(cpu, "rmsnorm", lambda x, w, eps: original(x, w - 0.01, eps))
    elif mistake == "rotation":
        original = cpu.rope_tables
        monkeypatch.setattr(cpu, "rope_tables", lambda p, *rest: original(p * 2, *rest))
    elif mistake == "gate":
        exact = SimpleNamespace(gelu=lambda x, approximate: torch.nn.functional.gelu(x))
        monkeypatch.setattr(transformers_patch, "F", exact)
    else:
        monkeypatch.setattr(transformers_patch, "_softcap", lambda module: None)
    with pytest.raises(AssertionError):
        assert_within_rule(random_model("gemma2"), torch.float32)


def test_a_base_model_and_the_text_of_a_multimodal_one():
    ids, mask = inputs()
    base = random_model("gemma2").model
    expected = base(ids, attention_mask=mask).last_hidden_state
    with patch_transformers(base):
        found = base(ids, attention_mask=mask).last_hidden_state
    assert_same_logits(found[mask.bool()], expected[mask.bool()])
    model = multimodal_model()
    model.set_attn_implementation({"": "eager", "text_config": "eager", "vision_config": "sdpa"})
    expected = model(input_ids=ids, attention_mask=mask).logits
    with patch_transformers(model):
        found = model(input_ids=ids, attention_mask=mask).logits
        assert not torch.equal(found, expected)
        images = {"pixel_values": torch.randn(1, 3, 16, 16)}
        ids[0, 3:7] = model.config.image_token_id
        with pytest.raises(ValueError, match="tokens that see later ones"):
            model(input_ids=ids, token_type_ids=(ids == ids[0, 3]).long(), **images)
    assert_same_logits(found[mask.bool()], expected[mask.bool()])
    ids[:] = inputs()[0]
    assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, expected)
    assert model.config.vision_config._attn_implementation == "sdpa"


def multimodal_model():
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 1, "image_size": 16, "patch_size": 8}
    text = random_model("gemma3_text").config.to_dict()
    config = Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=3
    )
    return Gemma3ForConditionalGeneration(config).eval()


# What is refused, with nothing changed


def assert_refused(model: nn.Module, match: str) -> None:
    before = [dict(vars(module)) for module in model.modules()]
    with pytest.raises(ValueError, match=match) as caught:
        patch_transformers(model)
    assert "\n" not in str(caught.value)
    assert [dict(vars(module)).keys() for module in model.modules()] == [m.keys() for m in before]


def test_another_model_is_refused():
    config = GPT2Config(n_embd=16, n_layer=1, n_head=1, vocab_size=97)
    assert_refused(GPT2LMHeadModel(config), "GPT2LMHeadModel has 0 decoders")
    assert_refused(nn.Linear(2, 2), "Linear has 0 decoders")


def test_a_model_is_patched_once():
    model = random_model("gemma2")
    patch = patch_transformers(model)
    assert_refused(model, "patched already")
    assert_refused(model.model, "patched already")
    patch.undo()
    with pytest.raises(ValueError, match="is not patched"):
        patch.undo()
    with pytest.raises(ValueError, match="is not patched"):
        unpatch_transformers(model)


def test_a_half_patched_model_is_refused():
    model = random_model("gemma2")
    model.model.norm.forward = lambda x: x
    assert_refused(model, "norm has its own forward")


class Quantised(torch.Tensor):
    """As torchao has one."""


@pytest.mark.parametrize(
    "change", ["dtype", "mixed", "device", "linear", "hook", "weight", "act", "rope"]
)
def test_a_model_that_is_not_plain_is_refused(change):
    if change == "act":
        return assert_refused(random_model("gemma2", hidden_activation="silu"), "activation")
    if change == "rope":
        rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
        return assert_refused(random_model("gemma2", rope_parameters=rope), "'dynamic'")
    model = random_model("gemma2")
    if change == "dtype":
        return assert_refused(model.half(), "torch.float16, and must be one of")
    if change == "mixed":
        model.model.norm.bfloat16()
        return assert_refused(model, "torch.bfloat16, torch.float32, and must be")
    if change == "device":
        return assert_refused(model.to("meta"), "are meta, and must be one of cuda, cpu")
    layer = model.model.layers[1].mlp
    if change == "weight":
        layer.up_proj.weight = nn.Parameter(layer.up_proj.weight.as_subclass(Quantised))
        return assert_refused(model, r"layers\.1\.mlp\.up_proj of .* is a Quantised")
    if change == "hook":
        layer.up_proj.register_forward_hook(lambda *_: None)
    else:
        layer.up_proj = nn.Sequential(layer.up_proj)
    return assert_refused(model, r"layers\.1\.mlp\.up_proj of Gemma2ForCausalLM")


@by_family
@pytest.mark.parametrize("change", ["hook", "adapter"])
def test_what_a_patched_layer_would_leave_out_is_refused(family, change):
    """An adapter that is added afterwards, as peft has it: a layer around a Linear."""
    model = random_model(family)
    ids, _ = inputs()
    for name in transformers_patch.LINEARS:
        twin = copy.deepcopy(model)
        patch_transformers(twin)
        parent = twin.model.layers[1].self_attn if name[0] in "qkvo" else twin.model.layers[1].mlp
        layer = getattr(parent, name)
        if change == "hook":
            layer.register_forward_hook(lambda *_: None)
        else:
            layer.__class__ = type("Adapted", (nn.Linear,), {})
        with pytest.raises(ValueError, match="a projection of this patched model is a"):
            twin(ids)


def test_gradients_are_refused():
    model = random_model("gemma2")
    ids, _ = inputs()
    with patch_transformers(model), torch.enable_grad():
        with pytest.raises(RuntimeError, match="no gradients"):
            model(ids)
        model.requires_grad_(False)
        model(ids)  # nothing is asked for


def test_the_page_runs(capsys):
    """The snippet of engine/adapters/README.md."""
    page = (Path(transformers_patch.__file__).parent / "README.md").read_text()
    section = page.partition("\n## transformers\n")[2]
    snippet = section.partition("```python\n")[2].partition("```")[0]
    exec(compile(snippet, "README.md", "exec"), {})
    assert "It was a bright cold morning" in capsys.readouterr().out
