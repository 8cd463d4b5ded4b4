"""gemcut's ops in vLLM: providers of its IR, its custom ops replaced, their numbers, the switches.

vLLM runs on a CPU, in an environment of its own: see tests/vllm_environment.py.  Ours are there the
ops of gemcut.kernels.cpu, or the kernels in Triton's interpreter.
"""

import pytest

pytest.importorskip("tomllib")

from vllm_environment import (
    OURS,
    assert_same,
    expected,
    needs_vllm,
    registered,
    request,
    served,
    vaultgemma,
)

pytestmark = needs_vllm
BOTH = {"GEMCUT_VLLM_OPS": "gemma_rms_norm,gelu_and_mul"}
KERNELS = {"TRITON_INTERPRET": "1"}
PROVIDERS = {"rms_norm": ["gemcut"], "fused_add_rms_norm": ["gemcut"]}


@pytest.fixture
def model(tmp_path):
    return vaultgemma(tmp_path / "model", tie_word_embeddings=False)


def assert_near(shares: dict[str, float]) -> None:
    """Within what the IR's own tests allow; the mistake is not."""
    assert shares.pop("wrong") > 1
    assert max(shares.values()) < 1, shares


def test_registered_and_asked_for(model, tmp_path):
    found = registered(tmp_path, tmp_path / "model", **BOTH)
    assert found["class"] == f"gemcut.engine.adapters.vllm_vaultgemma.{OURS}"
    assert found["packed"].keys() == {"qkv_proj", "gate_up_proj"}
    assert found["pp"]
    assert found["lora"]
    assert not found["cuda"]  # processes that vLLM forks would fail
    assert found["replaced"] == found["replaced again"] == ["GeluAndMul", "GemmaRMSNorm"]
    assert found["hashed"]
    names = {"gemma_rms_norm": "GemcutRMSNorm", "gelu_and_mul": "GemcutGeluAndMul"}
    assert found["layers"]["classes"] == names
    assert_near(found["layers"]["shares"])
    assert_near(found["providers"])


def test_without_the_setting_no_op_is_replaced(model, tmp_path):
    """By the kernels this time, in the interpreter: the providers are there all the same."""
    found = registered(tmp_path, tmp_path / "model", **KERNELS)
    assert found["replaced"] == found["replaced again"] == []
    assert not found["hashed"]
    names = {"gemma_rms_norm": "GemmaRMSNorm", "gelu_and_mul": "GeluAndMul"}
    assert found["layers"]["classes"] == names
    assert_near(found["providers"])


@pytest.mark.parametrize(
    ("settings", "compiled"), [(BOTH, True), (BOTH | KERNELS, False)], ids=["cpu", "kernels"]
)
def test_a_model_with_our_ops(model, tmp_path, settings, compiled):
    asked = request(llm={"enforce_eager": not compiled})
    found = served(tmp_path / "model", tmp_path, asked, **settings)
    layers = found["layers"]
    assert layers["model.norm"] == layers["model.layers.0.input_layernorm"] == "GemcutRMSNorm"
    assert layers["model.layers.0.mlp.act_fn"] == "GemcutGeluAndMul"
    assert_same(found["answers"][""], expected(model))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_model_on_our_providers(model, tmp_path, compiled):
    """Which are really asked: one that is broken gives another text, where nothing is compiled."""
    llm = {"kernel_config": {"ir_op_priority": PROVIDERS}, "enforce_eager": not compiled}
    asked = request(llm=llm, mutations=[] if compiled else ["broken_provider"])
    found = served(tmp_path / "model", tmp_path, asked)
    assert [names[0] for names in found["providers"].values()] == ["gemcut", "gemcut"]
    theirs = expected(model)
    assert_same(found["answers"].pop(""), theirs)
    for wrong in found["answers"].values():
        with pytest.raises(AssertionError):
            assert_same(wrong, theirs)
