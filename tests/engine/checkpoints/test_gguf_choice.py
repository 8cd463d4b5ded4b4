"""Which GGUF file is meant: of a folder, of a repository, by its name or its quantisation."""

import re
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub.errors import RepositoryNotFoundError

from gemcut.engine.checkpoints import hub
from gemcut.engine.checkpoints.gguf_choice import choose_file, split_tag
from gemcut.engine.checkpoints.hub import resolve_checkpoint

NAMES = ["m-it-Q4_0.gguf", "m-it-Q4_K_M.gguf", "m-it-BF16.gguf", "mmproj-m-F16.gguf", "README.md"]


@pytest.mark.parametrize(
    ("tag", "name"),
    [
        ("Q4_0", "m-it-Q4_0.gguf"),
        ("q4_k_m", "m-it-Q4_K_M.gguf"),
        ("bf16", "m-it-BF16.gguf"),
        ("m-it-Q4_0.gguf", "m-it-Q4_0.gguf"),
        ("m-it-BF16", "m-it-BF16.gguf"),
    ],
)
def test_a_tag_names_a_file(tag, name):
    assert choose_file("owner/m", NAMES, tag) == name


def test_the_only_one():
    assert choose_file("owner/m", [NAMES[0], *NAMES[3:]], None) == NAMES[0]
    assert choose_file("owner/m", NAMES[3:], None) is None
    parts = [f"BF16/m-{i:05}-of-00003.gguf" for i in (1, 2, 3)]
    assert choose_file("owner/m", parts, None) == parts[0]  # its header says what to do


@pytest.mark.parametrize(
    ("tag", "message"),
    [
        (
            None,
            "owner/m holds the GGUF files m-it-BF16.gguf, m-it-Q4_0.gguf, m-it-Q4_K_M.gguf; say "
            "which, as in owner/m:BF16",
        ),
        ("Q8_0", "owner/m holds no GGUF file 'Q8_0'; it holds m-it-BF16.gguf, m-it-Q4_0.gguf, m-i"),
        ("0", "holds no GGUF file '0'"),
        ("F16", "holds no GGUF file 'F16'"),
    ],
)
def test_what_is_asked(tag, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        choose_file("owner/m", NAMES, tag)


def test_two_with_one_tag():
    names = ["a-Q4_0.gguf", "b-Q4_0.gguf", "b-Q8_0.gguf"]
    with pytest.raises(
        ValueError, match=r"files a-Q4_0\.gguf, b-Q4_0\.gguf; say which, as in owner/m:a-"
    ):
        choose_file("owner/m", names, "Q4_0")
    assert choose_file("owner/m", names, "b-Q4_0") == "b-Q4_0.gguf"


def test_tags():
    assert split_tag("owner/m:Q4_0") == ("owner/m", "Q4_0")
    assert split_tag("owner/m") == ("owner/m", None)
    assert split_tag("a:b/m") == ("a:b/m", None)
    assert split_tag(":Q4_0") == (":Q4_0", None)
    assert split_tag("owner/m:") == ("owner/m:", None)


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def test_a_folder(tmp_path):
    assert resolve_checkpoint(touch(tmp_path, NAMES[0]), gguf=True) == tmp_path / NAMES[0]
    touch(tmp_path, *NAMES)
    with pytest.raises(ValueError, match=r"holds the GGUF files m-it-BF16\.gguf, .*; say which"):
        resolve_checkpoint(tmp_path, gguf=True)
    assert resolve_checkpoint(f"{tmp_path}:Q4_0", gguf=True) == tmp_path / NAMES[0]
    file = tmp_path / NAMES[1]
    assert resolve_checkpoint(file, gguf=True) == resolve_checkpoint(str(file), gguf=True) == file
    touch(tmp_path, "model.safetensors")
    assert resolve_checkpoint(tmp_path, gguf=True) == tmp_path
    assert resolve_checkpoint(f"{tmp_path}:Q4_0", gguf=True) == tmp_path / NAMES[0]


def test_where_no_gguf_file_is_taken(tmp_path):
    touch(tmp_path, NAMES[0])
    assert resolve_checkpoint(tmp_path) == tmp_path
    with pytest.raises(ValueError, match=r"is a GGUF file, which Engine\.from_pretrained and the"):
        resolve_checkpoint(tmp_path / NAMES[0])
    with pytest.raises(ValueError, match="is neither 'demo', an existing folder, nor a"):
        resolve_checkpoint("owner/m:Q4_0")


def test_no_such_file_asks_no_network(monkeypatch, tmp_path):
    monkeypatch.setattr(hub, "snapshot_download", lambda *a, **k: pytest.fail("asked the Hub"))
    for model in ("models/gemma.gguf", tmp_path / "gemma.gguf"):
        with pytest.raises(ValueError, match=r"gemma\.gguf': no such file"):
            resolve_checkpoint(model, gguf=True)


@pytest.fixture
def repository(monkeypatch, tmp_path):
    """A repository of files by name, of which those that are asked for come into a folder."""

    def make(*names: str) -> list[list[str]]:
        asked = []

        def fetch(name, *, allow_patterns, **options):
            assert name == "owner/m"
            asked.append(list(allow_patterns))
            touch(tmp_path / "snapshot", *(n for n in names if n in allow_patterns))
            return str(tmp_path / "snapshot")

        monkeypatch.setattr(hub, "snapshot_download", fetch)
        files = [SimpleNamespace(rfilename=name) for name in names]
        monkeypatch.setattr(hub, "model_info", lambda name, **k: SimpleNamespace(siblings=files))
        return asked

    return make


def test_a_repository_of_gguf_files(repository, tmp_path):
    asked = repository(*NAMES, "config.json")
    folder = tmp_path / "snapshot"
    small = {"files": ["config.json"], "gguf": True}
    assert resolve_checkpoint("owner/m:Q4_0", **small) == folder / NAMES[0]
    assert asked == [["config.json"], [NAMES[0]]]
    with pytest.raises(ValueError, match=r"^owner/m holds the GGUF files m-it-BF16\.gguf, .*say"):
        resolve_checkpoint("owner/m", **small)
    with pytest.raises(ValueError, match="owner/m holds no GGUF file 'Q8_0'"):
        resolve_checkpoint("owner/m:Q8_0", **small)


def test_a_subfolder_of_a_repository(repository, tmp_path):
    repository("part/x-Q4_0.gguf", "other/x-Q8_0.gguf")
    path = resolve_checkpoint("owner/m", files=[], gguf=True, subfolder="part")
    assert path == tmp_path / "snapshot" / "part" / "x-Q4_0.gguf"
    path = resolve_checkpoint("owner/m:Q8_0", files=[], gguf=True)
    assert path == tmp_path / "snapshot" / "other" / "x-Q8_0.gguf"


def test_safetensors_beside_gguf_files_win(repository, tmp_path):
    repository(*NAMES, "config.json", "model-00001-of-00002.safetensors")
    found = resolve_checkpoint("owner/m", files=["config.json"], gguf=True)
    assert found == tmp_path / "snapshot"


def test_offline_the_cache_is_read(monkeypatch, tmp_path):
    def out_of_reach(*arguments, **options):
        raise RuntimeError

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "model_info", out_of_reach)
    place = tmp_path / "models--owner--m"
    snapshot = touch(place / "snapshots" / ("4" * 40), *NAMES[:2])
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("4" * 40)
    assert resolve_checkpoint("owner/m:Q4_0", gguf=True) == snapshot / NAMES[0]
    assert resolve_checkpoint("owner/m:Q4_K_M", gguf=True, local_files_only=True).is_file()
    with pytest.raises(ValueError, match="holds the GGUF files"):
        resolve_checkpoint("owner/m", gguf=True)


def test_failures_name_the_model(monkeypatch):
    def fail(name, **options):
        raise RepositoryNotFoundError.__new__(RepositoryNotFoundError, "x")

    monkeypatch.setattr(hub, "snapshot_download", fail)
    with pytest.raises(ValueError, match=r"^model 'owner/m:Q4_0' is no existing folder, and"):
        resolve_checkpoint("owner/m:Q4_0", gguf=True)
