"""Fixtures that several tests of the engine share."""

import io
import sys
from pathlib import Path

import pytest
from engines import run_as_on_a_gpu, save_random_model
from random_models import MODEL_TYPES
from terminals import Terminal
from transformers import AutoModelForCausalLM
from twins import poison

from gemcut.engine import Engine
from gemcut.engine.checkpoints import hub
from gemcut.engine.cli import main


@pytest.fixture(scope="module")
def theirs(folder):
    """Transformers' model of `folder`."""
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


@pytest.fixture(scope="module", params=["read-at-once", "read-late"])
def engine(folder, request):
    """Three slots and chunks of 8 tokens, read at once as on a CPU or late as on a GPU."""
    with Engine.from_pretrained(
        folder, max_batch_size=3, prefill_chunk=8, dtype="float32"
    ) as engine:
        if request.param == "read-late":
            run_as_on_a_gpu(engine)
        poison(engine.cache)
        yield engine


@pytest.fixture(scope="session")
def folders(tmp_path_factory, tokenizer_file) -> dict[str, Path]:
    """A small checkpoint of each family, and the demo."""
    found = {"demo": hub.DEMO}
    for model_type in MODEL_TYPES:
        found[model_type] = tmp_path_factory.mktemp(model_type)
        save_random_model(found[model_type], tokenizer_file, model_type)
    return found


@pytest.fixture
def run(capsys, monkeypatch):
    """Run `gemcut` in this process: exit code, standard output, standard error."""

    def run(*args: str, stdin: bytes = b"") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        try:
            code = main(args)
        except SystemExit as exit:
            code = exit.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def terminal():
    """A function that starts `gemcut` on a terminal; each is killed at the end of the test."""
    opened = []

    def open_terminal(*arguments: str) -> Terminal:
        opened.append(Terminal(*arguments))
        return opened[-1]

    yield open_terminal
    for each in opened:
        each.close()
