"""The Markdown page: it holds all that was measured, and nothing else; which files it reads."""

import re
import struct

import matplotlib as mpl
import pytest
from synthetic_reports import (
    cpu_report,
    decode_report,
    kernel_record,
    kernels_report,
    prefill_report,
    report,
    save,
    servers_report,
    serving_report,
)

from gemcut.bench.report.markdown_page import load_reports, readme_table, run_report


def png_size(file):
    data = file.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder with the page of a whole run."""
    folder = tmp_path_factory.mktemp("reports")
    save(
        folder,
        a=cpu_report(),
        b=kernels_report(),
        c=decode_report(),
        d=serving_report(),
        e=prefill_report(),
        f=servers_report(),
    )
    (folder / "other.json").write_text('{"benchmarks": []}')
    out = folder / "page" / "new"
    before = dict(mpl.rcParams)
    assert run_report([folder], out, None, False) == 0
    assert dict(mpl.rcParams) == before
    return out


@pytest.fixture(scope="module")
def page(written):
    return (written / "report.md").read_text()


def test_plots_are_made_and_linked(written, page):
    files = {file.name: png_size(file) for file in written.glob("*.png")}
    names = ("roofline-gemma-3-1b", "roofline-gemma-2-9b", "kernels", "attention")
    names += ("decode", "latency")
    expected = {f"nvidia-test-bfloat16-{name}.png" for name in names}
    expected |= {"nvidia-test-serve-demo.png", "nvidia-test-serve-demo-by-rate.png"}
    assert set(files) == {*expected, "test-epyc-float32-decode.png"}
    for name, (width, height) in files.items():
        assert width == 1500
        assert 400 < height < 1500
        assert f"]({name})" in page
        assert (written / name).stat().st_size > 10_000


@pytest.mark.parametrize(
    "words",
    [
        pytest.param("## NVIDIA Test", id="device"),
        pytest.param("| driver | 1.2 |", id="driver"),
        pytest.param("| torch | 2.13 |", id="version"),
        pytest.param(
            "| kernels | models gemma-3-1b gemma-2-9b | 0123456789abcdef | 4000 | 3800 | 700 |",
            id="ceilings",
        ),
        pytest.param("**Interrupted**, and complete only so far: d.json.", id="interrupted"),
        pytest.param("| kernels | x | liger | failed | no module \\| named liger |", id="reason"),
        pytest.param("#### gemma-2-9b: rmsnorm\n", id="model-and-op"),
        pytest.param(
            "| batch=1 | 20.0 (18.0 - 24.0) | 18.0 (16.2 - 21.6) | 500 GB/s | 0.12 "
            "| 2.00 (2.00 - 2.00) | 3.00 (3.00 - 3.00) |",
            id="memory-bound-kernel",
        ),
        pytest.param("450 TFLOP/s | 0.64 |", id="compute-bound-kernel"),
        pytest.param(
            "| batch 16, context 512, bfloat16 | gemcut | 1600 (1440 - 1760) |", id="decode"
        ),
        pytest.param("| batch 1, context 512, float32, threads 2 | gemcut | 510", id="decode-cpu"),
        pytest.param("| 0.20 | 5000 | 6000 | 5.00 (3.00 - 5.50) |", id="decode-ratio"),
        pytest.param(
            "| batch 1, tokens 4096 | gemcut | 23500 (23000 - 24000) | 175 (170 - 180) "
            "| 420 | 0.600 |  |",
            id="prefill",
        ),
        pytest.param(
            "| gemma-2-2b | 8.00 | 200 | gemcut | 41.0 / 52.0 / 63.0 | 41.0 / 52.0 / 63.0 "
            "| 961 (961 - 961) |",
            id="serving",
        ),
        pytest.param(
            "| 8 requests/s | slow | 50.0 / 70.0 / 79.0 | 50.0 / 70.0 / 79.0 | 50.0 / 70.0 / 79.0 "
            "| 50.0 / 30.0 / 21.0 | 20.8 (16.7 - 25.0) | 20.8 (16.7 - 25.0) |",
            id="servers",
        ),
        pytest.param(
            "| 2 requests/s | slow | fast | 2.00 (2.00 - 2.00) / 2.00 (2.00 - 2.00)",
            id="ratio-of-servers",
        ),
        pytest.param(
            "| serve | demo/rate=2 | lossy | failed | of 6 requests 1 lost; the first: cut |",
            id="server-that-lost-a-stream",
        ),
        pytest.param("| 4 | 6 | 5.00 (3.00 - 5.50) | gemma-3-1b, batch 1,", id="goal-on-a-gpu"),
        pytest.param(
            "| 2.5 | 4 | 2.30 (2.00 - 2.60) | demo, batch 1, context 512 | no |", id="goal-on-a-cpu"
        ),
        pytest.param("| 0.9 | 0.92 |  |  | not measured |", id="goal-not-measured"),
    ],
)
def test_the_page_says_what_was_measured(words, page):
    assert words in page


def test_gpus_come_first(page):
    assert page.index("## Goals") < page.index("## NVIDIA Test") < page.index("## Test EPYC")


def test_every_line_of_a_table_has_all_its_cells(page):
    for table in re.findall(
        r"(?:^\|.*\n)+", page + readme_table([kernels_report(), decode_report()]), re.M
    ):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1, table


def test_a_wrong_row_has_no_number_on_the_page(tmp_path):
    facts = {"batch": 1, "variant": ""}
    records = [
        kernel_record("rmsnorm", us=[77.0], status="wrong", detail="error 3", **facts),
        kernel_record("rmsnorm", "torch", us=[12.0], **facts),
        kernel_record("geglu", us=[10.0], **facts),
        kernel_record("geglu", "torch", us=[88.0], status="no memory", **facts),
    ]
    save(tmp_path, a=report("kernels", records))
    run_report([tmp_path], tmp_path, None, False)
    text = (tmp_path / "report.md").read_text()
    assert "| batch=1 | wrong |  |  |  |  |" in text
    assert "| 10.0 (10.0 - 10.0) | 9.00 (9.00 - 9.00) | 1000 GB/s | 0.25 | no memory |" in text
    assert "| ok |" not in text
    assert not re.search(r"\b(77|88|69|79)(\.0)?\b", text)


def test_a_folder_holds_reports_among_other_files(tmp_path, capsys):
    save(tmp_path, b=cpu_report(), a=decode_report())
    (tmp_path / "deeper").mkdir()
    save(tmp_path / "deeper", c=prefill_report())
    (tmp_path / "0.json").write_text("[]")
    found = load_reports([tmp_path])
    assert [file.name for file in found] == ["a.json", "b.json"]
    assert "passed over" in capsys.readouterr().out
    again = load_reports([tmp_path / "b.json", tmp_path, tmp_path / "deeper"])
    assert [file.name for file in again] == ["b.json", "a.json", "c.json"]


def test_bad_input_is_refused(tmp_path):
    other = tmp_path / "0.json"
    other.write_text("[]")
    file = save(tmp_path, a=cpu_report()) / "a.json"
    bare = save(tmp_path, k={**kernels_report(), "ceilings": {}}) / "k.json"
    empty = tmp_path / "empty"
    empty.mkdir()
    for arguments, message in (
        (([other], tmp_path, None, False), "0.json is no report"),
        (([empty], tmp_path, None, False), "there is no report in this folder"),
        (([tmp_path / "none"], tmp_path, None, False), "No such file"),
        (([], tmp_path, None, False), "there is no file"),
        (([file], None, None, False), "nothing to write"),
        (([file], tmp_path, None, True), "give --readme"),
        (([file], None, tmp_path / "no.md", False), "No such file"),
        (([file], other, None, False), "is no folder"),
        (([bare], tmp_path, None, False), "ceilings lack read_gbps"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            run_report(*arguments)
