"""The target of a conversion: replaced whole or left as it was."""

import shutil

import pytest
from foreign_files import assert_same_model, original_state, save_ckpt, small_model
from processes import COMMAND, gemcut
from saved_models import snapshot

from gemcut.engine.checkpoints import convert as driver
from gemcut.engine.checkpoints import target as target_module
from gemcut.engine.checkpoints.convert import convert
from gemcut.engine.checkpoints.formats import FORMATS


def test_files_are_as_readable_as_any(source, target):
    convert(source, target)
    assert len({file.stat().st_mode for file in target.iterdir()}) == 1


@pytest.mark.parametrize("failure", [OSError("disk full"), KeyboardInterrupt()], ids=repr)
def test_what_fails_leaves_the_target_as_it_was(source, target, monkeypatch, failure):
    convert(source, target)
    before = snapshot(target)

    def fail(*args):
        raise failure

    monkeypatch.setattr(driver, "verify", fail)
    with pytest.raises(type(failure)):
        convert(source, target, to="flax", overwrite=True)
    assert snapshot(target) == before


def test_a_target_that_is_not_empty(source, target):
    target.mkdir()
    convert(source, target)  # an empty one is fine
    before = snapshot(target)
    with pytest.raises(ValueError, match="not empty; --overwrite replaces the model in it"):
        convert(source, target)
    assert snapshot(target) == before


def test_overwriting_leaves_one_model(source, target):
    for to, limit in [
        ("huggingface", 40_000),
        ("original", 40_000),
        ("flax", 40_000),
        ("original", 10**9),
        ("flax", 10**9),
        ("huggingface", 10**9),
    ]:
        target.mkdir(exist_ok=True)
        (target / "notes.txt").write_text("mine")
        done = convert(source, target, to=to, max_shard_bytes=limit, overwrite=True)
        index = {FORMATS[to].INDEX} if limit == 40_000 else set()
        names = {*done.files, *index, "config.json", "notes.txt", "tokenizer.model"}
        assert {file.name for file in target.iterdir()} - {"generation_config.json"} == names
    assert_same_model(target, small_model("gemma2"))


def test_source_and_target_may_not_be_one(source, tmp_path):
    before = snapshot(source)
    (tmp_path / "link").symlink_to(source)
    for same in (source, tmp_path / "link", source / ".." / "source"):
        with pytest.raises(ValueError, match="the source is there; give another folder"):
            convert(source, same, overwrite=True)
    file = save_ckpt(source / "m.ckpt", original_state(small_model("gemma2")))
    with pytest.raises(ValueError, match="the source is there"):
        convert(file, source, overwrite=True)
    file.unlink()
    assert snapshot(source) == before


def test_a_target_that_cannot_be(source, target, tmp_path):
    target.write_text("a file")
    with pytest.raises(ValueError, match="target: a file; the target is a folder"):
        convert(source, target, overwrite=True)
    with pytest.raises(OSError, match="Not a directory"):
        convert(source, target / "below")


def test_too_little_space(source, target, monkeypatch):
    usage = shutil.disk_usage(source)._replace(free=1000)
    monkeypatch.setattr(target_module.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"target: the result takes 0.00 GB, 0.00 GB are free"):
        convert(source, target)
    assert not target.exists()


@pytest.mark.parametrize("to", FORMATS)
def test_a_disk_that_fills_up(source, target, to):
    """A limit on a file's size imitates it: the write comes back short."""
    limited = ["sh", "-c", 'ulimit -f 150; exec "$@"', "sh", *COMMAND]
    code, out, err = gemcut("convert", source, target, "--to", to, command=limited)
    assert (code, out) == (1, "")
    assert err.startswith("gemcut: error: ")
    assert err.count("\n") == 1
    assert not target.exists()
