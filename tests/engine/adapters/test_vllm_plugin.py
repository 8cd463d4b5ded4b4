"""vLLM's plugin: inert without vLLM, at most a warning with a vLLM that it does not know.

What a real vLLM does with it is in test_vllm_vaultgemma.py and test_vllm_ops.py.
"""

import logging
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from gemcut.engine.adapters import vllm_plugin

tomllib = pytest.importorskip("tomllib")
PROJECT = Path(__file__).parents[3] / "pyproject.toml"
GROUP = "vllm.general_plugins"
VALUE = tomllib.loads(PROJECT.read_text())["project"]["entry-points"][GROUP]["gemcut"]


class Registry:
    """vLLM's ModelRegistry, as far as the plugin uses it."""

    def __init__(self, module: str | None) -> None:
        known = SimpleNamespace(module_name=module)
        self.models = {} if module is None else {vllm_plugin.MODEL: known}
        self.registered: list[tuple[str, str]] = []

    def register_model(self, name: str, cls: str) -> None:
        self.registered.append((name, cls))


@pytest.fixture
def registry(request, monkeypatch) -> Registry:
    """A vLLM that has a registry of models and nothing else."""
    vllm = ModuleType("vllm")
    vllm.ModelRegistry = Registry(getattr(request, "param", None))  # pyright: ignore
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    for name in ("vllm_ir", "vllm_ops"):
        monkeypatch.delitem(sys.modules, f"gemcut.engine.adapters.{name}", raising=False)
    monkeypatch.setattr(vllm_plugin, "version", lambda name: {"vllm": "0.99.0"}[name])
    monkeypatch.delenv(vllm_plugin.SETTING, raising=False)
    return vllm.ModelRegistry  # pyright: ignore


def test_its_import_loads_neither_torch_nor_triton_nor_vllm():
    code = (
        "import sys\n"
        "from importlib.metadata import EntryPoint\n"
        f"EntryPoint('gemcut', {VALUE!r}, {GROUP!r}).load()\n"
        "print({'torch', 'triton', 'vllm', 'numpy'} & set(sys.modules))\n"
    )
    command = [sys.executable, "-P", "-c", code]
    assert subprocess.run(command, text=True, capture_output=True).stdout == "set()\n"


def test_the_entry_point_leads_to_it():
    assert EntryPoint("gemcut", VALUE, GROUP).load() is vllm_plugin.register


def test_without_vllm_each_part_is_a_warning_and_nothing_breaks(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.delitem(sys.modules, "gemcut.engine.adapters.vllm_ir", raising=False)
    monkeypatch.delenv(vllm_plugin.SETTING, raising=False)
    vllm_plugin.register()
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2


@pytest.mark.parametrize("asked", ["", "gelu_and_mul"])
def test_a_vllm_without_the_rest_gets_the_model_and_a_warning_each(
    registry, monkeypatch, caplog, asked
):
    monkeypatch.setenv(vllm_plugin.SETTING, asked)
    vllm_plugin.register()
    assert registry.registered == [(vllm_plugin.MODEL, vllm_plugin.MODEL_CLASS)]
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1 + bool(asked)
    for message, what in zip(messages, ["the provider gemcut", "gelu_and_mul"], strict=False):
        assert "\n" not in message
        assert message.startswith("gemcut: vLLM 0.99.0 runs without ")
        assert what in message


def test_where_gemma_2_has_been_moved_the_fallback_is_the_model(registry, monkeypatch, caplog):
    monkeypatch.delitem(sys.modules, "gemcut.engine.adapters.vllm_vaultgemma", raising=False)
    name = "vllm.model_executor.models.transformers"
    for end in (1, 2, 3, 4):
        part = ".".join(name.split(".")[:end])
        module = ModuleType(part)
        module.__path__ = []
        monkeypatch.setitem(sys.modules, part, module)
    fallback = sys.modules[name].TransformersForCausalLM = type("Fallback", (), {})  # pyright: ignore
    module, _, cls = vllm_plugin.MODEL_CLASS.partition(":")
    assert getattr(sys.modules[module], cls) is fallback
    (record,) = caplog.records
    assert record.getMessage().startswith("gemcut: vLLM 0.99.0 runs without the native model")
    with pytest.raises(AttributeError, match="has no attribute 'Gemma2'"):
        vllm_plugin.Gemma2  # noqa: B018


@pytest.mark.parametrize("registry", ["vllm.models.vaultgemma"], indirect=True)
def test_a_native_model_of_vllm_itself_is_left_alone(registry):
    vllm_plugin.register()
    assert registry.registered == []


@pytest.mark.parametrize("registry", ["vllm.model_executor.models.transformers"], indirect=True)
def test_the_fallback_is_replaced(registry):
    vllm_plugin.register()
    assert len(registry.registered) == 1


@pytest.mark.parametrize("asked", ["rms_norm", "all", "gelu_and_mul,rope"])
def test_an_op_that_is_none_is_an_error_and_nothing_is_registered(registry, monkeypatch, asked):
    monkeypatch.setenv(vllm_plugin.SETTING, asked)
    with pytest.raises(ValueError, match=r"its ops are gemma_rms_norm, gelu_and_mul$") as error:
        vllm_plugin.register()
    assert repr(asked.split(",")[-1]) in str(error.value)
    assert registry.registered == []


def test_names_may_have_spaces_and_come_twice(monkeypatch):
    monkeypatch.setenv(vllm_plugin.SETTING, " gelu_and_mul, gemma_rms_norm ,,gelu_and_mul")
    assert vllm_plugin.asked_ops() == ["gelu_and_mul", "gemma_rms_norm"]
