"""Checkpoints to load and to convert."""

import shutil
from pathlib import Path

import pytest
from foreign_files import small_model
from random_models import random_model


@pytest.fixture
def saved(tmp_path) -> Path:
    """A small Gemma 2 in one file."""
    random_model("gemma2", num_hidden_layers=2).save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def sharded(tmp_path) -> Path:
    random_model("gemma2", num_hidden_layers=2).save_pretrained(tmp_path, max_shard_size="40KB")
    return tmp_path


@pytest.fixture
def source(tmp_path, tokenizer_file) -> Path:
    """A small Gemma 2 with its tokenizer, as transformers saves it."""
    folder = tmp_path / "source"
    small_model("gemma2").save_pretrained(folder)
    shutil.copy(tokenizer_file, folder / "tokenizer.model")
    return folder


@pytest.fixture
def target(tmp_path) -> Path:
    return tmp_path / "target"
