"""Files of measured tiles: merged, written, read and refused."""

import json
import shutil

import pytest

from gemcut.kernels import tiles
from gemcut.kernels.gpu_arch import SHARED_MEMORY
from gemcut.kernels.tiles import TILES_FILE, Measured, read_measured, tiles_by_arch
from gemcut.tools import tune
from gemcut.tools.tuning import search_space
from gemcut.tools.tuning.tile_file import merged, render, write_measured


def block(arch="sm_90", date="2026-01-01", **tiles):
    """A measured block; tiles by kernel, of shapes (n,)."""
    by_shape = {
        kernel: {(n,): tile for n, tile in found.items()} for kernel, found in tiles.items()
    }
    return Measured(arch, "NVIDIA H200", date, "3.6.0", "2.11.0", "0123abc", by_shape)


def merged_one_by_one(measured):
    result = ()
    for one in measured:
        result = merged(result, one)
    return result


def test_the_list_of_the_repository():
    """Empty, or measured: whole numbers for kernels and archs that exist, and nothing twice."""
    measured = read_measured(TILES_FILE)
    assert measured == tiles.MEASURED
    assert tiles_by_arch(measured) == tiles.TUNED
    assert set(tiles.TUNED) <= set(SHARED_MEMORY)
    keys = [(b.arch, key) for b in measured for key in tiles_by_arch([b])[b.arch]]
    assert len(keys) == len(set(keys))
    assert {kernel for _, (kernel, _) in keys} <= set(search_space.CANDIDATES)
    assert render(measured) == render(merged_one_by_one(measured))
    assert json.loads(render(measured)) == json.loads(TILES_FILE.read_text())


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


def test_the_file_holds_what_was_written(tmp_path):
    """However often it is written, and beside what it held."""
    file = tmp_path / "measured_tiles.json"
    shutil.copy(TILES_FILE, file)
    shape = (16, 8, 256)
    new = Measured("sm_90", "A cárd", "2026-01-01", "3.6.0", "2.11.0", "abc", {
        "attention_decode": {shape: LONG},
        "skinny_linear": {(2304, 9216): {"BLOCK_N": 16, "num_stages": 4}, (2304, 2048): {}},
    })  # fmt: skip
    tune.keep(new, [file])
    text = file.read_text()
    measured = read_measured(file)
    assert measured == merged(tiles.MEASURED, new)
    assert tiles_by_arch(measured)["sm_90"].items() >= tiles_by_arch([new])["sm_90"].items()
    assert tiles_by_arch(measured)["sm_90"]["attention_decode", shape] == LONG
    tune.keep(new, [file])
    assert file.read_text() == text
    assert list(tmp_path.iterdir()) == [file]
    write_measured(file, ())
    assert read_measured(file) == ()


def test_what_another_machine_measured_is_merged(tmp_path, monkeypatch):
    ours, theirs = tmp_path / "measured_tiles.json", tmp_path / "tiles-sm_90.json"
    write_measured(ours, ())
    monkeypatch.setattr(tune, "TILES_FILE", ours)
    write_measured(theirs, (block(skinny_linear={1: LONG}),))
    assert tune.main(["--merge", str(theirs)]) == 0
    assert read_measured(ours) == (block(skinny_linear={1: LONG}),)


def test_what_no_gpu_measured_is_not_merged(tmp_path, capsys):
    """Here, of an interpreter; kernels/measured_tiles.json is not touched."""
    before, file = TILES_FILE.read_text(), tmp_path / "tiles.json"
    write_measured(file, (block(arch="interpreter", lm_head={1: {}}),))
    assert tune.main(["--merge", str(file)]) == 1
    assert "arch 'interpreter' is not sm_80" in capsys.readouterr().err
    assert TILES_FILE.read_text() == before


GOOD = render((block(lm_head={1: {"BLOCK_V": 32}}),))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"tiles": []}', "it is no list"),
        ("[1]", "block 1 is no object"),
        ('[{"arch": "sm_90"}]', "block 1 gives arch"),
        ("[", "Expecting value: line 1"),
        (GOOD.replace("32", '"x"'), "no whole numbers"),
        (GOOD.replace("32", "true"), "no whole numbers"),
        (GOOD.replace("32", "3.5"), "no whole numbers"),
        (GOOD.replace('"1"', '"1xN"'), "shape '1xN' is no whole numbers"),
        (GOOD.replace('"NVIDIA H200"', "[]"), "block 1 is malformed"),
        (GOOD.replace('"lm_head": {', '"lm_head": 1, "x": {'), "block 1 is malformed"),
    ],
)
def test_a_file_that_is_no_list(text, reason, tmp_path):
    file = tmp_path / "tiles.json"
    file.write_text(text)
    with pytest.raises(
        ValueError, match=rf"tiles.json holds no list of measured tiles: .*{reason}"
    ):
        read_measured(file)
