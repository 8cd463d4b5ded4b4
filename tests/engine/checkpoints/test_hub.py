"""resolve_checkpoint: the demo, folders, and the Hugging Face Hub with its failures."""

from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from gemcut.engine.checkpoints import hub
from gemcut.engine.checkpoints.hub import resolve_checkpoint, take_hub_options


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


def cached(cache: Path, revision: str = "main", files: tuple[str, ...] = ("config.json",)) -> Path:
    """The folder of google/gemma-test in a cache of the Hub, with these files, each an object."""
    repository = cache / "models--google--gemma-test"
    snapshot = repository / "snapshots" / (str(len(revision)) * 40)
    for file in files:
        (snapshot / file).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / file).write_text("{}")
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / revision).write_text(snapshot.name)
    return snapshot


def test_offline_reads_the_cache(offline):
    snapshot = cached(offline)
    assert resolve_checkpoint("google/gemma-test") == snapshot


def test_options_choose_cache_revision_and_folder(tmp_path):
    main, pinned = cached(tmp_path), cached(tmp_path, "v1.0", ("config.json", "part/config.json"))
    where = {"cache_dir": tmp_path, "local_files_only": True}
    assert resolve_checkpoint("google/gemma-test", **where) == main
    assert resolve_checkpoint("google/gemma-test", **where, revision="v1.0") == pinned
    part = resolve_checkpoint("google/gemma-test", **where, revision="v1.0", subfolder="part")
    assert part == pinned / "part"
    with pytest.raises(ValueError, match="in revision 'v2', and local_files_only"):
        resolve_checkpoint("google/gemma-test", **where, revision="v2")


def test_options_reach_the_hub(monkeypatch, tmp_path):
    asked = {}
    monkeypatch.setattr(hub, "snapshot_download", lambda name, **k: asked.update(k) or tmp_path)
    options = {"token": "hf_x", "revision": "v1", "cache_dir": "/c", "force_download": True}
    options |= {"subfolder": "", "local_files_only": False}
    resolve_checkpoint("google/gemma-test", files=["config.json"], **options)
    del options["subfolder"]
    assert asked == options | {"allow_patterns": ["config.json"]}
    (tmp_path / "part").mkdir()
    resolve_checkpoint("google/gemma-test", files=["config.json"], subfolder="part")
    assert asked["allow_patterns"] == ["part/config.json"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"token": 3}, "token is a int"),
        ({"revision": ""}, "revision '' is no name"),
        ({"cache_dir": 3}, "cache_dir 3 is no path"),
        ({"local_files_only": "yes"}, "local_files_only 'yes' is neither"),
        ({"force_download": 1}, "force_download 1 is neither"),
        ({"subfolder": "../x"}, "subfolder '../x' is no folder within"),
        ({"subfolder": "/x"}, "subfolder '/x' is no folder within"),
        ({"subfolder": "x"}, "has no folder 'x'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        resolve_checkpoint("demo", **options)


def test_keywords_about_the_hub_are_taken_out():
    options = {"token": None, "revision": "v1", "trust_remote_code": True, "proxies": None, "x": 1}
    assert take_hub_options(options) == {"token": None, "revision": "v1"}
    assert options == {"x": 1}
    assert take_hub_options({"subfolder": None}) == {"subfolder": ""}
    with pytest.raises(NotImplementedError, match="not supported; set HTTPS_PROXY"):
        take_hub_options({"proxies": {"https": "foo"}})


def test_offline_without_cache(offline):
    with pytest.raises(ValueError, match=r"'google/gemma-test' .*not in the cache") as error:
        resolve_checkpoint("google/gemma-test")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        pytest.param(GatedRepoError, "is gated: accept its terms at https://", id="gated"),
        pytest.param(RepositoryNotFoundError, "unknown to the Hugging Face Hub", id="unknown"),
        pytest.param(RevisionNotFoundError, "has no revision 'v9'", id="revision"),
        pytest.param(ConnectionError, "cannot be fetched: first line$", id="network"),
    ],
)
def test_hub_failures(monkeypatch, failure, message):
    def fail(model, *, allow_patterns, **options):
        assert "*.safetensors" in allow_patterns
        assert not any("bin" in pattern or "py" in pattern for pattern in allow_patterns)
        text = "first line\nsecond line"
        raise failure(text) if failure is ConnectionError else failure.__new__(failure, text)

    monkeypatch.setattr(hub, "snapshot_download", fail)
    with pytest.raises(ValueError, match=message) as error:
        resolve_checkpoint("google/gemma-test", revision="v9")
    assert "\n" not in str(error.value)
