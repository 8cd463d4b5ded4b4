import os
from pathlib import Path

# Under pytest-xdist the processes share the cores: a thread each, or they wait for one another.
if "PYTEST_XDIST_WORKER" in os.environ:
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(name, "1")

import hypothesis
import pytest
import torch

# Without a GPU the kernels run in Triton's interpreter, which must be on before the first import
# of gemcut.kernels.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from engines import save_random_model
from vocabulary import hugging_face_twin, train_vocabulary

from gemcut.kernels import gpu_arch
from gemcut.tokenizer import Tokenizer

# the same examples in every run: a failure on one machine is a failure on all
hypothesis.settings.register_profile(
    "deterministic", derandomize=True, deadline=None, max_examples=300
)
hypothesis.settings.load_profile("deterministic")


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("vocabulary") / "tokenizer.model"
    train_vocabulary(path)
    return path


@pytest.fixture(scope="session")
def tokenizer(tokenizer_file):
    return Tokenizer.from_file(tokenizer_file)


@pytest.fixture(scope="session")
def twin(tokenizer_file):
    return hugging_face_twin(tokenizer_file)


@pytest.fixture(scope="session")
def folder(tmp_path_factory, tokenizer_file) -> Path:
    """A small random Gemma 2 with its tokenizer, as a published checkpoint has them."""
    path = tmp_path_factory.mktemp("model")
    save_random_model(path, tokenizer_file)
    return path


@pytest.fixture
def poisoned(monkeypatch) -> None:
    """Fresh buffers hold NaN, and integers that are no index: an unwritten element shows.

    Tiles are those of a GPU, in the interpreter too.
    """
    monkeypatch.setattr(gpu_arch, "ARCH_OF_A_CPU", "sm_90")

    def poisoning(allocate):
        def poisoned_buffer(*args, **kwargs):
            buffer = allocate(*args, **kwargs)
            return buffer.fill_(torch.nan if buffer.is_floating_point() else -77)

        return poisoned_buffer

    monkeypatch.setattr(torch, "empty", poisoning(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoning(torch.empty_like))


@pytest.fixture
def two_threads():
    """Two threads of torch, whatever the machine has."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
