"""The list of measured tiles: merged, written as the formatter would, read without being run."""

import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from gemcut.kernels import tiles
from gemcut.kernels.gpu_arch import SHARED_MEMORY
from gemcut.kernels.tiles import Measured, tiles_by_arch
from gemcut.tools import tune
from gemcut.tools.tuning import search_space
from gemcut.tools.tuning.tile_file import TILES_FILE, merged, read_measured, render, write_measured

CHECKOUT = Path(__file__).parents[2]


def block(arch="sm_90", date="2026-01-01", **tiles):
    """A measured block; tiles by kernel, of shapes (n,)."""
    by_shape = {
        kernel: {(n,): tile for n, tile in found.items()} for kernel, found in tiles.items()
    }
    return Measured(arch, "NVIDIA H200", date, "3.6.0", "2.11.0", "0123abc", by_shape)


def test_the_list_of_the_repository():
    """Empty, or measured: whole numbers for kernels and archs that exist, and nothing twice."""
    measured = read_measured(TILES_FILE)
    assert measured == tiles.MEASURED
    assert tiles_by_arch(measured) == tiles.TUNED
    assert set(tiles.TUNED) <= set(SHARED_MEMORY)
    keys = [(b.arch, key) for b in measured for key in tiles_by_arch([b])[b.arch]]
    assert len(keys) == len(set(keys))
    assert {kernel for _, (kernel, _) in keys} <= set(search_space.CANDIDATES)
    source = TILES_FILE.read_text()
    assert render(measured) in source


def test_a_later_run_takes_the_place_of_an_earlier_one():
    early = block(
        skinny_linear={1: {"BLOCK_N": 8}, 2: {"BLOCK_N": 8}}, lm_head={1: {"BLOCK_V": 32}}
    )
    late = block(date="2026-02-01", skinny_linear={2: {}, 3: {"BLOCK_N": 16}})
    other = block(arch="sm_80", skinny_linear={2: {"BLOCK_N": 64}})
    result = merged(merged(merged((), early), other), late)
    assert [(b.arch, b.date) for b in result] == [
        ("sm_80", "2026-01-01"),
        ("sm_90", "2026-01-01"),
        ("sm_90", "2026-02-01"),
    ]
    assert result[0] == other
    assert result[1].tiles == {
        "lm_head": {(1,): {"BLOCK_V": 32}},
        "skinny_linear": {(1,): {"BLOCK_N": 8}},
    }
    assert result[2] == late
    assert merged(result, late) == result
    everything = block(date="2026-03-01", skinny_linear={1: {}, 2: {}, 3: {}}, lm_head={1: {}})
    assert merged(result, everything) == (other, merged((), everything)[0])


def test_runs_at_one_place_share_a_block():
    first, second = block(lm_head={1: {"BLOCK_V": 32}}), block(skinny_linear={1: {"BLOCK_N": 8}})
    (both,) = merged(merged((), second), first)
    assert both == block(lm_head={1: {"BLOCK_V": 32}}, skinny_linear={1: {"BLOCK_N": 8}})


LONG = {"SPLIT": 256, "BLOCK_N": 32, "num_warps": 4, "num_stages": 3, "maxnreg": 160}


def test_the_file_is_rewritten_as_the_formatter_would(tmp_path):
    """And holds what was written, however often; what stands around the list stays."""
    file = tmp_path / "tiles.py"
    shutil.copy(TILES_FILE, file)
    before = file.read_text()
    shape = (16, 8, 256)
    new = Measured("sm_90", "A card", "2026-01-01", "3.6.0", "2.11.0", "abc", {
        "attention_decode": {shape: LONG},
        "skinny_linear": {(2304, 9216): {"BLOCK_N": 16, "num_stages": 4}, (2304, 2048): {}},
    })  # fmt: skip
    tune.keep(new, [file])
    text = file.read_text()
    measured = read_measured(file)
    assert tiles_by_arch(measured)["sm_90"].items() >= tiles_by_arch([new])["sm_90"].items()
    tune.keep(new, [file])
    assert file.read_text() == text
    head, tail = before.split(render(tiles.MEASURED))
    assert text.startswith(head)
    assert text.endswith(tail)
    assert list(tmp_path.iterdir()) == [file]
    namespace = {"__name__": "written"}
    with mock.patch.dict(sys.modules, {"written": mock.Mock()}):
        exec(compile(text, file, "exec"), namespace)
    assert namespace["TUNED"]["sm_90"]["attention_decode", shape] == LONG
    if ruff := shutil.which("ruff", path=Path(sys.executable).parent):
        for action in (["format", "--check"], ["check"]):
            settings = ["--config", str(CHECKOUT / "pyproject.toml")]
            subprocess.run([ruff, *action, *settings, str(file)], check=True)
    write_measured(file, ())
    assert render(()) in file.read_text()


def test_what_another_machine_measured_is_merged(tmp_path, monkeypatch):
    ours, theirs = tmp_path / "tiles.py", tmp_path / "tiles-sm_90.py"
    shutil.copy(TILES_FILE, ours)
    write_measured(ours, ())
    monkeypatch.setattr(tune, "TILES_FILE", ours)
    write_measured(theirs, (block(skinny_linear={1: LONG}),))
    assert tune.main(["--merge", str(theirs)]) == 0
    assert read_measured(ours) == (block(skinny_linear={1: LONG}),)


def test_what_no_gpu_measured_is_not_merged(tmp_path, capsys):
    """Here, of an interpreter; kernels/tiles.py is not touched."""
    before = TILES_FILE.read_text()
    write_measured(tmp_path / "tiles.py", (block(arch="interpreter", lm_head={1: {}}),))
    assert tune.main(["--merge", str(tmp_path / "tiles.py")]) == 1
    assert "arch 'interpreter' is not sm_80" in capsys.readouterr().err
    assert TILES_FILE.read_text() == before


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("MEASURED: tuple = [1]", "MEASURED is no tuple"),
        ("MEASURED: tuple = (1,)", "line 1 is no Measured"),
        ("MEASURED: tuple = (Measured(arch='sm_90'),)", "line 1 gives arch"),
        ("MEASURED: tuple = (", "was never closed"),
        (render((block(lm_head={1: {"BLOCK_V": 32}}),)).replace("32", "'x'"), "no whole numbers"),
        (render((block(lm_head={1: {}}),)).replace('"NVIDIA H200"', "open('x')"), "malformed"),
    ],
)
def test_a_file_that_is_no_list(text, reason, tmp_path):
    """Nothing in it is run."""
    file = tmp_path / "tiles.py"
    file.write_text(text)
    with pytest.raises(ValueError, match=rf"tiles.py holds no list of measured tiles: .*{reason}"):
        read_measured(file)
