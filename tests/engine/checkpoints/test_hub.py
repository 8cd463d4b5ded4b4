"""resolve_checkpoint: the demo, folders, and the Hugging Face Hub with its failures."""

from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from gemcut.engine.checkpoints import hub
from gemcut.engine.checkpoints.hub import resolve_checkpoint


def test_demo_and_folders_are_found(tmp_path, monkeypatch):
    assert resolve_checkpoint("demo").name == "demo"
    assert resolve_checkpoint("demo").parent.name == "engine"
    assert resolve_checkpoint(tmp_path) == resolve_checkpoint(str(tmp_path)) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "gemma").mkdir()
    assert resolve_checkpoint("~/gemma") == tmp_path / "gemma"


@pytest.mark.parametrize(
    "model",
    ["./nowhere", "/no/such/folder", "gemma", "", "a/b/c", "../x", "a" * 999, Path("owner/name")],
)
def test_no_such_folder_asks_no_network(monkeypatch, tmp_path, model):
    monkeypatch.chdir(tmp_path)  # where "../x" is surely nothing
    monkeypatch.setattr(hub, "snapshot_download", lambda *a, **k: pytest.fail("asked the Hub"))
    with pytest.raises(
        ValueError, match="neither 'demo', an existing folder, nor a Hugging Face id"
    ):
        resolve_checkpoint(model)


def test_a_file_is_no_checkpoint(saved):
    with pytest.raises(ValueError, match="is a file; give the folder that holds it"):
        resolve_checkpoint(saved / "model.safetensors")


@pytest.fixture
def offline(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def test_offline_reads_the_cache(offline):
    repository = offline / "models--google--gemma-test"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    assert resolve_checkpoint("google/gemma-test") == snapshot


def test_offline_without_cache(offline):
    with pytest.raises(ValueError, match=r"'google/gemma-test' .*not in the cache") as error:
        resolve_checkpoint("google/gemma-test")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        pytest.param(GatedRepoError, "is gated: accept its terms at https://", id="gated"),
        pytest.param(RepositoryNotFoundError, "unknown to the Hugging Face Hub", id="unknown"),
        pytest.param(ConnectionError, "cannot be fetched: first line$", id="network"),
    ],
)
def test_hub_failures(monkeypatch, failure, message):
    def fail(model, allow_patterns):
        assert "*.safetensors" in allow_patterns
        assert not any("bin" in pattern or "py" in pattern for pattern in allow_patterns)
        text = "first line\nsecond line"
        raise failure(text) if failure is ConnectionError else failure.__new__(failure, text)

    monkeypatch.setattr(hub, "snapshot_download", fail)
    with pytest.raises(ValueError, match=message) as error:
        resolve_checkpoint("google/gemma-test")
    assert "\n" not in str(error.value)
