"""The page, its plots and a README's table hold all that was measured, and nothing else."""

import json
import re
import struct
from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.text import Text
from synthetic_reports import CEILINGS, CPU, decode_row, kernel_row, report, row

from gemcut.bench.report.load import cases, like_gemcut
from gemcut.bench.report.plots import OTHER, STYLES, make_plots
from gemcut.bench.report.report_page import (
    BEGIN,
    END,
    NO_GPU,
    load_reports,
    readme_table,
    run_report,
)
from gemcut.bench.report.roofline import roofline

MODELS = {"gemma-3-1b": 5.0, "gemma-2-9b": 20.0}  # microseconds of a kernel
OPS = {  # phase, operations, peers
    "rmsnorm": ("prefill", 10_000_000, ("torch", "liger")),
    "skinny_linear": ("decode", 11_000_000, ("blas", "gemlite-int8")),
    "lm_head_argmax": ("decode", 12_000_000, ("blas",)),
    "linear": ("prefill", 9_000_000_000, ("blas",)),
    "embed": ("decode", 0, ()),
}
ROUNDS = (1.0, 0.9, 1.2)


def kernels():
    rows = []
    facts: dict[str, Any]
    for model, us in MODELS.items():
        for op, (phase, flops, peers) in OPS.items():
            facts = {"model": model, "phase": phase, "flops": flops, "batch": 1, "variant": ""}
            for i, contestant in enumerate(("gemcut", *peers), 1):
                slower = 0.5 if contestant == "gemlite-int8" else i
                times = [slower * us * factor for factor in ROUNDS]
                rows.append(kernel_row(op, contestant, us=times, **facts))
        for tokens in (512, 4096):
            facts = {"model": model, "phase": "prefill", "layer": "global", "variant": ""}
            facts |= {"tokens": tokens, "softcap": 50.0, "flops": tokens * 10**7}
            for contestant in ("gemcut", "flex"):
                rows.append(kernel_row("attention_prefill", contestant, us=[90, 100], **facts))
            facts |= {"softcap": None, "variant": "no softcap"}
            for contestant in ("gemcut", "flex", "sdpa"):
                rows.append(kernel_row("attention_prefill", contestant, us=[80, 90], **facts))
    rows.append(row("x", "liger", "failed", "no module | named\nliger", op="geglu", model="demo"))
    rows[-1]["phase"] = "prefill"
    return report("kernels", rows, models=list(MODELS), json=None)


def decode(machine=None, **values):
    rows = [
        decode_row(model, contestant, rate=rates, batch=batch, share=share, **values)
        for model in MODELS
        for batch in (1, 16)
        for contestant, share, rates in (
            ("gemcut", 0.7, [100 * batch, 110 * batch, 90 * batch]),
            ("transformers", 0.2, [20 * batch, 20 * batch, 30 * batch]),
        )
    ]
    fast = {"quantization": "int8", "share": 1.9, **values}
    rows += [decode_row(model, "gpt-fast-int8", rate=[300, 300, 300], **fast) for model in MODELS]
    return report("decode", rows, *([] if machine is None else [machine]))


def prefill():
    values: dict[str, Any] = {"model": "gemma-2-9b", "tokens": 4096, "batch": 1}
    values |= {"tflops": 420.5, "share": 0.6}
    values |= {"first_token_ms": [170.0, 180.0], "tokens_per_second": [24000.0, 23000.0]}
    return report("prefill", [row("gemma-2-9b/4096", **values)])


def serving():
    one = row("x", model="gemma-2-2b", rate=8.0, requests=200, tokens_per_second=[961.0])
    percentiles = {"median": 1, "low": 1, "high": 1, "all": [1], "p50": 41.0, "p90": 52, "p99": 63}
    one |= dict.fromkeys(("first_token_ms", "between_tokens_ms"), percentiles)
    return report("serve-sim", [one], interrupted=True)


def cpu():
    rows = [
        decode_row("demo", name, rate=rates, dtype="float32")
        for name, rates in (("gemcut", [500.0, 520.0]), ("transformers", [250.0, 200.0]))
    ]
    return report("decode", rows, {**CPU, "cpu": "Test EPYC", "threads": 2})


def save(folder, **reports):
    for name, content in reports.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def png_size(file):
    data = file.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder with the page of a whole run."""
    folder = tmp_path_factory.mktemp("reports")
    save(folder, a=cpu(), b=kernels(), c=decode(), d=serving(), e=prefill())
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
    assert set(files) == {*expected, "test-epyc-float32-decode.png"}
    for name, (width, height) in files.items():
        assert width == 1500
        assert 400 < height < 1500
        assert f"]({name})" in page
        assert (written / name).stat().st_size > 10_000


@pytest.mark.parametrize(
    ("reports", "names"),
    [
        pytest.param([], [], id="nothing"),
        pytest.param([prefill(), serving()], [], id="no-plot-of-these"),
        pytest.param(
            [report("kernels", [kernel_row("embed", us=[1.0], flops=0)])],
            ["kernels"],
            id="no-operations",
        ),
        pytest.param(
            [report("decode", [decode_row("gemma-2-2b", rate=[1.0], batch=16)])],
            [],
            id="one-batch-and-not-1",
        ),
        pytest.param(
            [report("decode", [decode_row("gemma-2-2b", rate=[1.0], status="wrong")])],
            [],
            id="wrong",
        ),
    ],
)
def test_no_plot_without_data(reports, names, tmp_path):
    files = [file.name for file in make_plots(reports, tmp_path)]
    assert files == [f"nvidia-test-bfloat16-{name}.png" for name in names]


def test_contestants_of_one_plot_look_different():
    rows = ["gemcut", "torch", "torch.compile", "rms_norm", "liger", "blas"]
    attention = ["gemcut", "torch", "torch.compile", "sdpa", "flex", "flashinfer"]
    engines = ["gemcut", "transformers", "transformers-static", "transformers-compiled"]
    for names in (rows, attention, [*engines, "gpt-fast"]):
        for i in range(3):  # colour, mark, hatch
            looks = [STYLES[name][i] for name in names]
            assert i == 2 or len(set(looks)) == len(names), names
        assert len({(STYLES[name][0], STYLES[name][2]) for name in names}) == len(names)
    assert OTHER[0] != STYLES["gemcut"][0]


def test_a_roofline_puts_kernels_at_their_intensity_and_numbers_apart():
    rows = [
        # ten kernels at nearly one place
        kernel_row(f"op {i}", us=[4.0 + i / 50], flops=100_000_000 + i, variant="")
        for i in range(9)
    ]
    rows.append(kernel_row("op 9", us=[100.0], flops=60_000_000_000, phase="prefill"))
    rows.append(kernel_row("op 8", us=[100.0], flops=1_000_000, read_bytes=10))  # a smaller case
    figure = roofline(rows, CEILINGS, "title")
    figure.draw_without_rendering()
    axes = figure.axes[0]
    points = [tuple(xy) for group in axes.collections for xy in np.asarray(group.get_offsets())]
    for one in rows:
        moved, us = one["read_bytes"] + one["written_bytes"], one["cold_us"]["median"]
        assert (one["flops"] / moved, pytest.approx(one["flops"] / us * 1e6)) in points
    # the roof: 4000 GB/s up to 700 TFLOP/s
    (roof,) = axes.lines
    x, y = np.asarray(roof.get_data())
    assert y == pytest.approx(np.minimum(700e12, 4e12 * x))
    numbers = [text for text in axes.texts if text.get_text().isdigit()]
    assert sorted(int(text.get_text()) for text in numbers) == list(range(1, 11))
    boxes = [Text.get_window_extent(text) for text in numbers]  # without the line to the mark
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
    marks = axes.transData.transform(points)
    assert not any(box.contains(*mark) for box in boxes for mark in marks)


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
        pytest.param("| 4 | 6 | 5.00 (3.00 - 5.50) | gemma-3-1b, batch 1,", id="goal-on-a-gpu"),
        pytest.param(
            "| 2 | 4 | 2.30 (2.00 - 2.60) | demo, batch 1, context 512 | must |", id="goal-on-a-cpu"
        ),
        pytest.param("| 0.9 | 0.92 |  |  | not measured |", id="goal-not-measured"),
    ],
)
def test_the_page_says_what_was_measured(words, page):
    assert words in page


def test_gpus_come_first(page):
    assert page.index("## Goals") < page.index("## NVIDIA Test") < page.index("## Test EPYC")


def test_every_line_of_a_table_has_all_its_cells(page):
    for table in re.findall(r"(?:^\|.*\n)+", page + readme_table([kernels(), decode()]), re.M):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1, table


def test_a_wrong_row_has_no_number_on_the_page(tmp_path):
    facts = {"batch": 1, "variant": ""}
    rows = [
        kernel_row("rmsnorm", us=[77.0], status="wrong", detail="error 3", **facts),
        kernel_row("rmsnorm", "torch", us=[12.0], **facts),
        kernel_row("geglu", us=[10.0], **facts),
        kernel_row("geglu", "torch", us=[88.0], status="no memory", **facts),
    ]
    save(tmp_path, a=report("kernels", rows))
    run_report([tmp_path], tmp_path, None, False)
    text = (tmp_path / "report.md").read_text()
    assert "| batch=1 | wrong |  |  |  |  |" in text
    assert "| 10.0 (10.0 - 10.0) | 9.00 (9.00 - 9.00) | 1000 GB/s | 0.25 | no memory |" in text
    assert "| ok |" not in text
    assert not re.search(r"\b(77|88|69|79)(\.0)?\b", text)


def test_a_readme_has_gpu_kernels_and_cpu_decoding():
    table = readme_table([kernels(), decode(), cpu()])
    assert table.startswith("NVIDIA Test, driver 1.2, torch 2.13, commit 0123456789ab; median")
    for line in (
        "| gemma-2-9b | bfloat16 | 512 | 100 (90.0 - 110) | 0.70 | 5.00 (3.00 - 5.50) |",
        "| skinny_linear | batch=1 | 20.0 (18.0 - 24.0) | 500 GB/s | 0.12 "
        "| 2.00 (2.00 - 2.00), blas |",
        "Test EPYC, torch 2.13, commit 0123456789ab; median (range) of the rounds.",
        "| demo | float32 | 512 | 1 | 2 | 510 (500 - 520) | 0.50 | 2.30 (2.00 - 2.60) |",
    ):
        assert line in table
    assert NO_GPU not in table
    assert "-int8" not in table  # reads fewer bytes than gemcut
    assert "no softcap" not in table
    assert table.count("| gemma-2-9b | bfloat16 |") == 1  # at batch 1
    assert "interrupted" not in readme_table([decode(), serving()])
    assert "A run was interrupted." in readme_table([{**decode(), "interrupted": True}])


def test_a_readme_sets_weights_beside_their_like():
    rows = [decode_row("gemma-2b", rate=[100.0]), decode_row("gemma-2b", "torch", rate=[50.0])]
    peer = decode_row("gemma-2b", "gpt-fast-int8", rate=[400.0], quantization="int8")
    rows += [peer, decode_row("gemma-2b", rate=[200.0], quantization="int8")]
    rows += [{**peer, "case": rows[-1]["case"]}]
    lines = readme_table([report("decode", rows)]).splitlines()
    assert "| over torch | over gpt-fast-int8 |" in lines[2]
    assert lines[4].endswith("| 2.00 (2.00 - 2.00) |  |")
    assert lines[5].endswith("|  | 0.500 (0.500 - 0.500) |")


def test_of_two_reports_of_a_case_a_readme_takes_the_one_with_more_peers():
    one = [kernel_row("rmsnorm", us=[1.0])]
    both = [kernel_row("rmsnorm", us=[2.0]), kernel_row("rmsnorm", "liger", us=[3.0])]
    for reports in ((one, both), (both, one)):
        assert "| 1.50 (1.50 - 1.50), liger |" in readme_table(
            [report("kernels", rows) for rows in reports]
        )


def test_what_is_alike_reads_as_many_bytes():
    rows = [
        kernel_row("skinny_linear", name, us=[1.0])
        for name in ("gemcut", "blas", "torchao-int8", "gemlite-int4")
    ]
    (case,) = cases([report("kernels", rows)], "kernels")
    assert list(like_gemcut(case)) == ["gemcut", "blas"]


def test_a_readme_has_the_context_nearest_to_1k():
    rows = [decode_row("gemma-2b", rate=[n], context=n) for n in (512, 1000, 4096)]
    table = readme_table([report("decode", rows)])
    assert "| gemma-2b | bfloat16 | 1000 |" in table
    assert table.count("| gemma-2b |") == 1


def test_without_a_gpu_a_readme_says_so():
    assert readme_table([]) == NO_GPU
    table = readme_table([cpu(), {**kernels(), "machine": CPU}])
    assert table.startswith(f"{NO_GPU}\n\nTest EPYC")
    assert "| demo |" in table
    assert "rmsnorm" not in table
    wrong = decode_row("gemma-2b", rate=[1.0], status="wrong")
    assert readme_table([report("decode", [wrong])]) == NO_GPU


def test_a_readme_is_changed_between_its_markers_only(tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(f"# before\n{BEGIN}\nold\n{END}\nafter\n")
    file = save(tmp_path, a=cpu()) / "a.json"
    assert run_report([file], None, readme, True) == 1
    assert readme.read_text() == f"# before\n{BEGIN}\nold\n{END}\nafter\n"
    assert "differs" in capsys.readouterr().out
    assert run_report([file], None, readme, False) == 0
    text = readme.read_text()
    assert text == f"# before\n{BEGIN}\n{readme_table([cpu()])}\n{END}\nafter\n"
    assert run_report([file], None, readme, True) == 0
    assert run_report([file], None, readme, False) == 0
    assert readme.read_text() == text


@pytest.mark.parametrize(
    "text", ["", BEGIN, END, f"{END}\n{BEGIN}", f"{BEGIN}{BEGIN}{END}", f"{BEGIN}{END}{END}"]
)
def test_a_readme_without_markers_is_refused(text, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(text)
    file = save(tmp_path, a=cpu()) / "a.json"
    with pytest.raises(ValueError, match=r"README\.md: the lines <!-- results: begin -->"):
        run_report([file], None, readme, False)
    assert readme.read_text() == text


def test_a_folder_holds_reports_among_other_files(tmp_path, capsys):
    save(tmp_path, b=cpu(), a=decode())
    (tmp_path / "deeper").mkdir()
    save(tmp_path / "deeper", c=prefill())
    (tmp_path / "0.json").write_text("[]")
    found = load_reports([tmp_path])
    assert [file.name for file in found] == ["a.json", "b.json"]
    assert "passed over" in capsys.readouterr().out
    again = load_reports([tmp_path / "b.json", tmp_path, tmp_path / "deeper"])
    assert [file.name for file in again] == ["b.json", "a.json", "c.json"]


def test_bad_input_is_refused(tmp_path):
    other = tmp_path / "0.json"
    other.write_text("[]")
    file = save(tmp_path, a=cpu()) / "a.json"
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
        (([save(tmp_path, k={**kernels(), "ceilings": {}}) / "k.json"], tmp_path, None, False),
         "ceilings lack read_gbps"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            run_report(*arguments)


def test_the_readme_is_as_the_kept_results_have_it():
    root = Path(__file__).parents[2]
    folders = sorted((root / "bench" / "results").iterdir())
    assert run_report(folders, None, root / "README.md", check=True) == 0
