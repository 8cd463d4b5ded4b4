"""Real checkpoints, where GEMCUT_REAL_MODEL names the folder that holds them; tests skip without.

gemma-3-270m         config.json, model.safetensors, tokenizer.model
gemma-3-270m-json    the same weights with tokenizer.json and tokenizer_config.json alone
gemma-3-270m-q4_k_m.gguf
gemma3, gemini       packages of npm: package/models/ has the tokenizer.json and
                     tokenizer_config.json of Gemma 3, and of Gemma 1 and 2
"""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

NAME = "GEMCUT_REAL_MODEL"


def real_folder(name: str) -> Path:
    """A folder below that of GEMCUT_REAL_MODEL; the test skips where there is none."""
    return _found(name, Path.is_dir)


def real_file(name: str) -> Path:
    """A file there; the test skips where there is none."""
    return _found(name, Path.is_file)


def _found(name: str, is_right: Callable[[Path], bool]) -> Path:
    base = os.environ.get(NAME)
    if base is None:
        pytest.skip(f"{NAME} names no folder of real checkpoints")
    path = Path(base) / name
    if not is_right(path):
        pytest.skip(f"{NAME} has no {name}")
    return path


def real_tokenizer(name: str) -> Path:
    """The folder with the tokenizer files of "gemma3", or of "gemini" (Gemma 1 and 2)."""
    return real_folder(f"{name}/package/models")
