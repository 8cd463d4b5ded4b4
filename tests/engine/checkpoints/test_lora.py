"""LoRA adapters made by hand: the merge written out, where one goes, and what is refused."""

import json
import math
from pathlib import Path

import pytest
import torch
from accuracy import assert_within_budget
from engines import logits_of, one_line, save_random_model
from lora_adapters import change_config, change_tensors, low_rank, merged, weights_of, write_adapter
from random_models import MODEL_TYPES, random_model
from safetensors.torch import load_file
from saved_models import all_weights
from torch import Tensor

from gemcut.engine import Engine, ModelConfig
from gemcut.engine.checkpoints import load as load_module
from gemcut.engine.checkpoints import lora_config
from gemcut.engine.checkpoints.convert import convert
from gemcut.engine.checkpoints.load import load_checkpoint
from gemcut.engine.checkpoints.lora import open_adapter

PROMPT = [2, 5, 9, 11, 30]
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SMALL = {"device": "cpu", "max_batch_size": 1, "skip_tokenizer_init": True}
Q, NORM = "model.layers.1.self_attn.q_proj", "model.norm.weight"
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


@pytest.fixture
def saved(tmp_path, tokenizer_file) -> tuple[Path, Path]:
    """A Gemma 2, and an adapter of its q_proj and down_proj."""
    model = save_random_model(tmp_path / "model", tokenizer_file)
    tensors = low_rank(model, "q_proj", "down_proj")
    adapter = tmp_path / "adapter"
    write_adapter(adapter, tensors, target_modules=["q_proj", "down_proj"])
    return tmp_path / "model", adapter


def load_merged(folder: Path, adapter: Path, dtype=torch.float32) -> dict[str, Tensor]:
    config = ModelConfig.from_file(folder)
    opened = open_adapter(adapter, config)
    weights = load_checkpoint(folder, config, device="cpu", dtype=dtype, adapter=opened)
    return all_weights(opened.config, weights)


# The merge


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["to fp32", "to bf16"])
@pytest.mark.parametrize("use_rslora", [False, True], ids=["lora", "rslora"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_each_matrix_is_its_sum_rounded_once(model_type, use_rslora, dtype, stored, tmp_path):
    model = random_model(model_type).to(stored)
    model.save_pretrained(tmp_path / "model")
    tensors = low_rank(model, *LINEAR, r=3)
    write_adapter(
        tmp_path / "lora", tensors, r=3, lora_alpha=5, use_rslora=use_rslora,
        target_modules="all-linear",
    )  # fmt: skip
    found = load_merged(tmp_path / "model", tmp_path / "lora", dtype)
    scaling = 5 / math.sqrt(3) if use_rslora else 5 / 3
    for name, x in found.items():
        module, base = name.removesuffix(".weight"), model.get_parameter(name).detach()
        if f"{module}.lora_A.weight" not in tensors:
            assert torch.equal(x, base.to(dtype)), name
            continue
        down, up = (tensors[f"{module}.lora_{part}.weight"] for part in "AB")
        eager = merged(base.float(), down, up, scaling).to(dtype)
        exact = merged(base.double(), down.double(), up.double(), scaling)
        assert_within_budget(name, x, eager, exact)
        assert (x.double() - exact).abs().max() < 0.1 * (base.double() - exact).abs().max()


def test_quantised_weights_are_those_of_the_merged_model(saved, tmp_path):
    folder, adapter = saved
    convert(folder, tmp_path / "merged", lora=adapter)
    with Engine.from_pretrained(tmp_path / "merged", quantization="int8", **SMALL) as engine:
        expected = logits_of(engine, PROMPT)
    with Engine.from_pretrained(folder, lora=adapter, quantization="int8", **SMALL) as engine:
        assert torch.equal(logits_of(engine, PROMPT), expected)


def test_an_engine_of_tensors_takes_one_too(saved, tmp_path):
    folder, adapter = saved
    with Engine.from_pretrained(folder, lora=adapter, dtype="float32", **SMALL) as engine:
        expected = logits_of(engine, PROMPT)
    with Engine.from_pretrained(folder, dtype="float32", **SMALL) as engine:
        assert not torch.equal(logits_of(engine, PROMPT), expected)
    state = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    options = {"device": "cpu", "max_batch_size": 1, "dtype": "float32"}
    with Engine.from_state_dict(config, state, lora=adapter, **options) as engine:
        assert torch.equal(logits_of(engine, PROMPT), expected)


def test_the_converted_checkpoint_is_the_merged_model(saved, tmp_path):
    folder, adapter = saved
    done = convert(folder, tmp_path / "merged", lora=adapter)
    assert done.config.tie_word_embeddings
    found, expected = load_file(tmp_path / "merged" / "model.safetensors"), load_merged(*saved)
    assert found.keys() == expected.keys()
    assert all(torch.equal(x, expected[name]) for name, x in found.items())
    with pytest.raises(ValueError, match="merged into weights in Hugging Face's format") as error:
        convert(_as_flax(folder, tmp_path), tmp_path / "other", lora=adapter)
    one_line(error)


def _as_flax(folder: Path, tmp_path: Path) -> Path:
    convert(folder, tmp_path / "flax", to="flax")
    return tmp_path / "flax"


# Embedding and head, whole tensors, names


def embedding_parts(V: int, D: int, r: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        f"{EMBEDDING}.lora_embedding_A": 0.3 * torch.randn(r, V, generator=generator),
        f"{EMBEDDING}.lora_embedding_B": 0.3 * torch.randn(D, r, generator=generator),
    }


@pytest.mark.parametrize("changed", [EMBEDDING, HEAD])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_change_of_embedding_or_head_is_of_that_alone(changed, tied, tmp_path):
    model = random_model("gemma2", tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "model")
    table, head = (model.get_parameter(f"{x}.weight").detach() for x in (EMBEDDING, HEAD))
    tensors = embedding_parts(*table.shape) if changed == EMBEDDING else low_rank(model, HEAD)
    write_adapter(tmp_path / "lora", tensors, target_modules=[changed.split(".")[-1]])
    found = load_merged(tmp_path / "model", tmp_path / "lora")
    same, other = (HEAD, head) if changed == EMBEDDING else (EMBEDDING, table)
    assert torch.equal(found[f"{same}.weight"], other)
    down, up = tensors.values()
    old = table.T if changed == EMBEDDING else head
    eager, exact = merged(old, down, up, 2.0), merged(old.double(), down.double(), up.double(), 2.0)
    eager, exact = (x.T if changed == EMBEDDING else x for x in (eager, exact))
    assert_within_budget(changed, found[f"{changed}.weight"], eager, exact)
    done = convert(tmp_path / "model", tmp_path / "merged", lora=tmp_path / "lora")
    assert not done.config.tie_word_embeddings
    with Engine.from_pretrained(tmp_path / "merged", dtype="float32", **SMALL) as engine:
        expected = logits_of(engine, PROMPT)
    options = SMALL | {"lora": tmp_path / "lora", "dtype": "float32"}
    with Engine.from_pretrained(tmp_path / "model", **options) as engine:
        assert torch.equal(logits_of(engine, PROMPT), expected)


def test_tied_tables_stay_tied_where_the_adapter_ties_them(tmp_path):
    model = random_model("gemma2")
    model.save_pretrained(tmp_path / "model")
    tensors = embedding_parts(*model.model.embed_tokens.weight.shape)
    config = {"target_modules": ["embed_tokens", HEAD], "ensure_weight_tying": True}
    write_adapter(tmp_path / "lora", tensors, **config)
    opened = open_adapter(tmp_path / "lora", ModelConfig.from_file(tmp_path / "model"))
    assert opened.config.tie_word_embeddings
    write_adapter(tmp_path / "head", low_rank(model, HEAD), **config)
    with pytest.raises(ValueError, match=r"embed_tokens is missing"):
        open_adapter(tmp_path / "head", ModelConfig.from_file(tmp_path / "model"))


def test_whole_tensors_take_the_place_of_the_models(saved):
    folder, adapter = saved
    norm = torch.full((48,), 0.25, dtype=torch.bfloat16)
    change_tensors(adapter, lambda x: x.update({NORM: norm}))
    change_config(adapter, modules_to_save=["norm"])
    found = load_merged(folder, adapter)
    assert torch.equal(found[NORM], norm.float())


@pytest.mark.parametrize("spelling", ["bare", "multimodal", "old multimodal", "with adapter name"])
def test_names_are_those_that_peft_has_given_them(spelling, tmp_path):
    model = random_model("gemma3_text")
    model.save_pretrained(tmp_path / "model")
    tensors, vision = low_rank(model, "q_proj", "up_proj"), {}
    expected = load_merged(
        tmp_path / "model",
        write_adapter(tmp_path / "plain", tensors, target_modules=["q_proj", "up_proj"]),
    )
    new = {"bare": "", "multimodal": "model.language_model."}.get(spelling, "model.")
    new = "language_model.model." if spelling == "old multimodal" else new
    if "multimodal" in spelling:
        vision = {"model.vision_tower.layers.0.q_proj.lora_A.weight": torch.ones(4, 8)}
    renamed = {new + name.removeprefix("model."): x for name, x in tensors.items()}
    if spelling == "with adapter name":
        renamed = {x.replace(".weight", ".default.weight"): y for x, y in tensors.items()}
    # a pattern sees the names that the adapted model has
    pattern = r".*(language_model|^|model)\.?.*layers\.\d+\.\w+\.(q|up)_proj"
    write_adapter(tmp_path / "other", renamed | vision, target_modules=pattern)
    found = load_merged(tmp_path / "model", tmp_path / "other")
    assert all(torch.equal(x, expected[name]) for name, x in found.items())


def test_patterns_of_rank_and_alpha_count(saved):
    folder, adapter = saved
    model = random_model("gemma2", vocab_size=ModelConfig.from_file(folder).vocab_size)
    tensors = low_rank(model, "q_proj", "down_proj") | low_rank(model, "1.self_attn.q_proj", r=2)
    config = {"rank_pattern": {r"layers\.1\.self_attn\.q_proj": 2, "q_proj": 4}}
    config |= {"alpha_pattern": {"1.self_attn.q_proj": 3}, "r": 4}
    write_adapter(adapter, tensors, target_modules=["q_proj", "down_proj"], **config)
    base, found = load_file(folder / "model.safetensors"), load_merged(folder, adapter)
    for layer, scaling in ((0, 2.0), (1, 1.5)):
        name = f"model.layers.{layer}.self_attn.q_proj"
        down, up = (tensors[f"{name}.lora_{part}.weight"] for part in "AB")
        wide = merged(base[f"{name}.weight"].double(), down.double(), up.double(), scaling)
        eager = merged(base[f"{name}.weight"], down, up, scaling)
        assert_within_budget(name, found[f"{name}.weight"], eager, wide)


def test_commands_take_one(saved, run, tmp_path):
    folder, adapter = saved
    options = [
        "--temperature",
        "3",
        "--seed",
        "1",
        "--max-tokens",
        "12",
        "--ignore-eos",
        "--device",
        "cpu",
    ]
    merged_to = tmp_path / "merged"
    code, out, _ = run("convert", str(folder), str(merged_to), "--lora", str(adapter))
    assert (code, out.startswith(f"{merged_to}: huggingface to huggingface")) == (0, True)
    _, expected, _ = run("generate", "It was", "--model", str(merged_to), *options)
    given = ["--model", str(folder), "--lora", str(adapter), *options]
    assert run("generate", "It was", *given) == (0, expected, "")
    assert run("generate", "It was", *given[:2], *options)[1] != expected
    code, out, _ = run("info", str(folder), "--lora", str(adapter), "--check")
    assert code == 0
    assert f"{folder} with {adapter}" in out
    change_tensors(adapter, lambda x: x[A].fill_(torch.nan))
    code, out, _ = run("info", str(folder), "--lora", str(adapter), "--check", "--json")
    (problem,) = json.loads(out)["problems"]
    assert (code, problem.endswith(f"{A} holds a NaN or an infinity")) == (1, True)
    change_tensors(adapter, lambda x: x.pop(A))
    code, out, err = run("info", str(folder), "--lora", str(adapter))
    assert (code, out, err.count("\n")) == (1, "", 1)


# What is refused, before a weight is read


def drop(*ends: str):
    return lambda x: [x.pop(name) for name in list(x) if name.endswith(ends)]


def reshape(name: str, *shape: int):
    return lambda x: x.update({name: torch.zeros(shape)})


A, B = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"
SLOW = r"(\w+\.?)+!"  # seconds for the names of this model, years for longer ones
BAD_TENSORS = {
    "no A": (drop("1.self_attn.q_proj.lora_A.weight"), f"{Q}.lora_A is missing"),
    "no B": (drop("1.self_attn.q_proj.lora_B.weight"), f"{Q}.lora_B is missing"),
    "no module": (drop(*(f"1.self_attn.q_proj.lora_{x}.weight" for x in "AB")), f"{Q} is missing"),
    "nothing": (lambda x: x.clear(), "changes nothing of this model"),
    "rank": (reshape(A, 5, 48), r"lora_A.weight is \[5, 48\], for this model it is \[4, 48\]"),
    "rank of B": (reshape(B, 64, 5), r"lora_B.weight is \[64, 5\], for this model it is \[64, 4\]"),
    "width": (reshape(A, 4, 50), r"lora_A.weight is \[4, 50\], for this model it is \[4, 48\]"),
    "another layer": (reshape("model.layers.9.self_attn.q_proj.lora_A.weight", 4, 48), "no tensor"),
    "another module": (reshape("model.layers.0.mlp.fc1.lora_A.weight", 4, 48), "no tensor"),
    "not a target": (
        lambda x: x.update({n.replace("q_proj", "v_proj"): y[: 32 if "B" in n else 4].clone()
                            for n, y in list(x.items()) if "q_proj" in n}),
        "v_proj is no target by it",
    ),
    "integers": (lambda x: x.update({A: x[A].int()}), "lora_A.weight is I32; supported are BF16"),
    "vector": (reshape("model.norm.lora_A.weight", 4, 48), "norm.lora_A.weight is for no such"),
    "kind": (reshape(f"{Q}.lora_embedding_A", 4, 48), "lora_embedding_A is for no such module"),
    "table": (reshape(f"{EMBEDDING}.lora_A.weight", 4, 48), "embed_tokens is no target by it"),
    "bias of B": (reshape(f"{Q}.lora_B.bias", 64), "lora_B.bias is not supported"),
    "magnitude": (reshape(f"{Q}.lora_magnitude_vector", 64), "is there, and use_dora is false"),
    "whole": (reshape(NORM, 3), r"model.norm.weight is \[3\], for this model it is \[48\]"),
    "lines": (reshape("a\nb", 3), r"'base_model\.model\.a\\nb' is for no tensor of this model"),
    "unknown": (reshape("model.other.weight", 3), "model.other.weight is for no tensor of this"),
}  # fmt: skip
BAD_CONFIGS = {
    "type": ({"peft_type": "IA3"}, "peft_type 'IA3' is not supported; LORA is"),
    "dora": ({"use_dora": True}, "lora_magnitude_vector is missing, and use_dora is true"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights 'pissa_niter_4' is not"),
    "alora": ({"alora_invocation_tokens": [3]}, r"alora_invocation_tokens \[3\] is not supported"),
    "bias": ({"lora_bias": True}, "lora_bias True is not supported"),
    "tokens": ({"trainable_token_indices": [1]}, r"trainable_token_indices \[1\] is not supported"),
    "parameters": ({"target_parameters": ["a"]}, "target_parameters .* is not supported"),
    "replication": ({"layer_replication": [[0, 2]]}, "layer_replication .* is not supported"),
    "unknown": ({"use_next_years_method": True}, "use_next_years_method True is not supported"),
    "rank": ({"r": 0}, "r 0 is outside"),
    "other rank": ({"r": 8}, r"is \[4, \d+\], for this model it is \[8, \d+\]"),
    "alpha": ({"lora_alpha": "x"}, "lora_alpha 'x' is not a number"),
    "rslora": ({"use_rslora": 1}, "use_rslora 1 is neither True nor False"),
    "pattern": ({"rank_pattern": {"q_proj": 2}}, r"is \[4, 48\], for this model it is \[2, 48\]"),
    "no pattern": ({"rank_pattern": [2]}, r"rank_pattern \[2\] is not an object"),
    "regex": ({"target_modules": "q_proj("}, r"target_modules 'q_proj\(' is no pattern"),
    "flags": ({"rank_pattern": {"(?i)q_proj": 4}}, r"rank_pattern '\(\?i\)q_proj' is no pattern"),
    "repeat": ({"target_modules": "a{99999999999}"}, r"target_modules 'a\{9+\}' is no pattern"),
    "depth": ({"alpha_pattern": {"(" * 3000 + ")" * 3000: 4}}, "alpha_pattern .* is no pattern"),
    "too great": ({"lora_alpha": 1e308}, "lora_alpha 1e\\+308 must be below 1e\\+30"),
    "lines": ({"a\nb": 1}, r"'a\\nb' 1 is not supported"),
    "targets": ({"target_modules": 3}, "target_modules 3 is neither a pattern nor a list"),
    "more": ({"target_modules": ["q_proj", "down_proj", "o_proj"]}, "o_proj and 3 more are missi"),
    "fewer": ({"target_modules": ["q_proj"]}, "down_proj is no target by it"),
    "layers": ({"layers_to_transform": [1]}, "layers.0.* is no target by it"),
    "to save": ({"modules_to_save": ["norm"]}, "norm is missing, a module to save"),
}  # fmt: skip


@pytest.mark.parametrize("kind", [*BAD_TENSORS, *(f"config: {kind}" for kind in BAD_CONFIGS)])
def test_what_does_not_fit_is_named_before_weights_are_read(kind, saved, monkeypatch):
    folder, adapter = saved
    if kind in BAD_TENSORS:
        change, message = BAD_TENSORS[kind]
        change_tensors(adapter, change)
    else:
        values, message = BAD_CONFIGS[kind.removeprefix("config: ")]
        change_config(adapter, **values)
    monkeypatch.setattr(load_module, "fill_weights", lambda *_, **__: pytest.fail("read"))
    with pytest.raises(ValueError, match=message) as error:
        Engine.from_pretrained(folder, lora=adapter, **SMALL)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "values",
    [
        {"target_modules": SLOW},
        {"target_modules": "[\0-\U0010ffff]" * 999},  # to compile
        {"exclude_modules": SLOW},
        {"modules_to_save": [SLOW]},
        {"layers_pattern": [SLOW], "layers_to_transform": [1]},
        {"rank_pattern": {SLOW: 4}},
        {"alpha_pattern": {SLOW: 4}},
    ],
    ids=lambda values: next(iter(values)),
)
def test_a_pattern_that_takes_too_long_is_refused(values, saved, monkeypatch):
    folder, adapter = saved
    monkeypatch.setattr(lora_config, "_PATIENCE", 0.1)
    change_config(adapter, **values)
    message = f"a pattern of {next(iter(values))} takes too much time or memory to match"
    with pytest.raises(ValueError, match=message) as error:
        open_adapter(adapter, ModelConfig.from_file(folder))
    one_line(error)


def test_a_config_that_is_no_file_is_refused(saved):
    folder, adapter = saved
    (adapter / "adapter_config.json").unlink()
    (adapter / "adapter_config.json").symlink_to("/dev/null")
    with pytest.raises(ValueError, match=r"adapter_config\.json: neither a file nor a folder"):
        open_adapter(adapter, ModelConfig.from_file(folder))


def test_a_folder_that_is_no_adapter_says_so(saved, tmp_path):
    folder, adapter = saved
    config = ModelConfig.from_file(folder)
    with pytest.raises(ValueError, match=r"adapter_config\.json: no such file"):
        open_adapter(folder, config)
    with pytest.raises(ValueError, match="lora: model 'nowhere' is neither"):
        open_adapter("nowhere", config)
    weights_of(adapter).rename(adapter / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"adapter_model.bin is a pickle, save it as safetensors"):
        open_adapter(adapter, config)


def test_a_quantised_model_is_refused(saved, tmp_path):
    folder, adapter = saved
    convert(folder, tmp_path / "int8", quantization="int8")
    with pytest.raises(ValueError, match="merged into plain weights, and this model is quantised"):
        Engine.from_pretrained(tmp_path / "int8", lora=adapter, **SMALL)


def test_an_adapter_given_as_the_model_is_told_of(saved):
    with pytest.raises(ValueError, match=r"holds a PEFT adapter, no model: .* by lora=") as error:
        Engine.from_pretrained(saved[1])
    one_line(error)
