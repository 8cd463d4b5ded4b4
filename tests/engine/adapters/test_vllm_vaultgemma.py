"""VaultGemma in vLLM, natively: transformers' logits, past the window, with LoRA and quantised.

vLLM runs on a CPU, in an environment of its own: see tests/vllm_environment.py.
"""

import json
from copy import deepcopy
from pathlib import Path

import pytest
import torch

pytest.importorskip("tomllib")

from accuracy import assert_within_budget
from safetensors.torch import save_file
from transformers import PreTrainedModel
from twins import all_logits, assert_same_logits, load_model, random_ids
from vllm_environment import (
    OURS,
    PROMPTS,
    assert_same,
    expected,
    needs_vllm,
    registered,
    request,
    run_in_vllm,
    served,
    vaultgemma,
)

from gemcut.engine.checkpoints.convert import convert
from gemcut.kernels import reference

pytestmark = needs_vllm
MUTATIONS = ["no_softcap", "no_window", "no_final_softcap", "no_offset"]
FALLBACK = "TransformersForCausalLM"


def test_transformers_logits_and_tokens_and_easy_mistakes_show(tmp_path):
    """Prompts and decode steps, three texts in one batch."""
    theirs = expected(vaultgemma(tmp_path / "model", tie_word_embeddings=False))
    assert all(len(set(ids)) > 3 for ids, _ in theirs)  # no text that any model would give
    found = served(tmp_path / "model", tmp_path, request(mutations=MUTATIONS))
    assert found["layers"][""] == OURS
    assert_same(found["answers"].pop(""), theirs)
    assert list(found["answers"]) == MUTATIONS
    prompt = slice(len(PROMPTS[0]) - 1)
    for wrong in found["answers"].values():
        with pytest.raises(AssertionError):
            assert_same_logits(wrong[0][1][prompt], theirs[0][1][prompt])


def test_the_fallback_gives_the_same(tmp_path):
    """It keeps softcap and windows too, and may be asked for by name; the head is tied."""
    theirs = expected(vaultgemma(tmp_path / "model"))
    found = served(tmp_path / "model", tmp_path, request(llm={"model_impl": "transformers"}))
    assert found["layers"][""] == FALLBACK
    assert_same(found["answers"][""], theirs)
    found = served(tmp_path / "model", tmp_path, request())
    assert found["layers"][""] == OURS
    assert_same(found["answers"][""], theirs)


def test_in_bfloat16_it_errs_no_more_than_transformers(tmp_path):
    """By the rule, on the prompts; with our ops in place of vLLM's too."""
    model = vaultgemma(tmp_path / "model", tie_word_embeddings=False)
    asked = request(llm={"dtype": "bfloat16"}) | {"count": 1}
    for settings in ({}, {"GEMCUT_VLLM_OPS": "gemma_rms_norm,gelu_and_mul"}):
        found = served(tmp_path / "model", tmp_path, asked, **settings)
        for ids, (_, logprobs) in zip(PROMPTS, found["answers"][""], strict=True):
            given = torch.tensor([ids])
            theirs = deepcopy(model).bfloat16()(given).logits[0].float().log_softmax(-1)
            exact = deepcopy(model).double()(given).logits[0].log_softmax(-1)
            assert_within_budget("logits", logprobs, theirs.detach(), exact.detach())


def test_compiled(tmp_path):
    """By vLLM's own torch.compile, with biases."""
    theirs = expected(vaultgemma(tmp_path / "model", attention_bias=True))
    found = served(tmp_path / "model", tmp_path, request(llm={"enforce_eager": False}))
    assert found["layers"][""] == OURS
    assert_same(found["answers"][""], theirs)


def test_an_adapter_of_lora(tmp_path):
    """Of some of the packed matrices: vLLM gives what transformers gives with merged weights."""
    model = vaultgemma(tmp_path / "model")
    save_and_merge_adapter_(model, tmp_path / "adapter")
    llm = {"enable_lora": True, "max_lora_rank": 8}
    asked = request(llm=llm, lora=str(tmp_path / "adapter"))
    found = served(tmp_path / "model", tmp_path, asked)
    assert_same(found["answers"][""], expected(model))


@torch.no_grad()
def save_and_merge_adapter_(model: PreTrainedModel, folder: Path, rank: int = 4) -> None:
    """An adapter as peft saves it, and the model's weights with it merged."""
    targets = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    tensors, generator = {}, torch.Generator().manual_seed(1)
    for name, module in model.named_modules():
        if name.split(".")[-1] in targets:
            rows, columns = module.weight.shape
            a = torch.randn(rank, columns, generator=generator) * columns**-0.5
            b = torch.randn(rows, rank, generator=generator) * 0.3
            tensors[f"base_model.model.{name}.lora_A.weight"] = a
            tensors[f"base_model.model.{name}.lora_B.weight"] = b
            module.weight += 2 * b @ a  # lora_alpha / r
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank}
    config |= {"target_modules": targets, "bias": "none", "base_model_name_or_path": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def test_on_two_ranks(tmp_path):
    """Tensor parallel: heads, MLP and vocabulary are divided."""
    theirs = expected(vaultgemma(tmp_path / "model", tie_word_embeddings=False))
    settings = {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1", "VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    asked = request(llm={"tensor_parallel_size": 2})
    found = served(tmp_path / "model", tmp_path, asked, **settings)
    assert found["layers"][""] == OURS
    assert_same(found["answers"][""], theirs)


def test_its_loaders_fill_every_parameter(tmp_path):
    """No model runs: this test passes on a CUDA build without a GPU too."""
    vaultgemma(tmp_path / "model", attention_bias=True, tie_word_embeddings=False)
    assert "loaded " in run_in_vllm("vllm_loading.py", tmp_path, tmp_path / "model")


def test_quantised_by_gemcut(tmp_path):
    """Four-bit matrices keep their scheme, packed ones too."""
    vaultgemma(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "int4", quantization="int4")
    ids = random_ids(24, 97)
    output = tmp_path / "found.pt"
    arguments = (tmp_path / "int4", output, "float32", "plain", *ids.tolist())
    run_in_vllm("vllm_logits.py", tmp_path, *arguments)
    found = torch.load(output)
    quantised = {name for name, scheme in found["matrices"].items() if scheme is not None}
    names = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    assert quantised == {f"model.layers.{i}.{name}" for i in range(4) for name in names}
    ours = all_logits(load_model(tmp_path / "int4", reference, torch.float32, "cpu"), ids)
    assert_same_logits(found["logprobs"], ours.log_softmax(-1)[:-1])


REFUSED = {
    "hidden_activation": ("gelu", "hidden_activation 'gelu' is not supported"),
    "sliding_window": (None, "sliding_window is null"),
    "layer_types": (["full_attention"] * 3 + ["chunked_attention"], "layer_types[3]"),
    "query_pre_attn_scalar": (0, "query_pre_attn_scalar"),
    "model_type": ("gemma2", "is a model of type vaultgemma, not of 'gemma2'"),
}


def test_what_a_vaultgemma_cannot_have_is_refused_by_name(tmp_path):
    vaultgemma(tmp_path / "model")
    folders = [tmp_path / "model"]
    config = json.loads((folders[0] / "config.json").read_text())
    for key, (value, _) in REFUSED.items():
        folders.append(tmp_path / key)
        folders[-1].mkdir()
        (folders[-1] / "config.json").write_text(json.dumps(config | {key: value}))
    sound, *errors = registered(tmp_path, *folders)["refusals"]
    assert sound == ""
    for error, (_, message) in zip(errors, REFUSED.values(), strict=True):
        assert message in error
        assert "\n" not in error


def test_float16_is_refused(tmp_path):
    vaultgemma(tmp_path / "model")
    with pytest.raises(AssertionError, match="overflow float16; use --dtype bfloat16"):
        served(tmp_path / "model", tmp_path, request(llm={"dtype": "float16"}))
