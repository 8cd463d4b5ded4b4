"""The README's table: what it holds of the reports, and where it is written."""

from pathlib import Path

import pytest
from synthetic_reports import (
    CPU,
    cpu_report,
    decode_record,
    decode_report,
    kernel_record,
    kernels_report,
    report,
    save,
    serving_report,
)

from gemcut.bench.report.load import cases, like_gemcut
from gemcut.bench.report.markdown_page import BEGIN, END, NO_GPU, readme_table, run_report


def test_a_readme_has_gpu_kernels_and_cpu_decoding():
    table = readme_table([kernels_report(), decode_report(), cpu_report()])
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
    assert "interrupted" not in readme_table([decode_report(), serving_report()])
    assert "A run was interrupted." in readme_table([{**decode_report(), "interrupted": True}])


def test_a_readme_sets_weights_beside_their_like():
    records = [
        decode_record("gemma-2b", rate=[100.0]),
        decode_record("gemma-2b", "torch", rate=[50.0]),
    ]
    peer = decode_record("gemma-2b", "gpt-fast-int8", rate=[400.0], quantization="int8")
    records += [peer, decode_record("gemma-2b", rate=[200.0], quantization="int8")]
    records += [{**peer, "case": records[-1]["case"]}]
    lines = readme_table([report("decode", records)]).splitlines()
    assert "| over torch | over gpt-fast-int8 |" in lines[2]
    assert lines[4].endswith("| 2.00 (2.00 - 2.00) |  |")
    assert lines[5].endswith("|  | 0.500 (0.500 - 0.500) |")


def test_of_two_reports_of_a_case_a_readme_takes_the_one_with_more_peers():
    one = [kernel_record("rmsnorm", us=[1.0])]
    both = [kernel_record("rmsnorm", us=[2.0]), kernel_record("rmsnorm", "liger", us=[3.0])]
    for reports in ((one, both), (both, one)):
        assert "| 1.50 (1.50 - 1.50), liger |" in readme_table(
            [report("kernels", records) for records in reports]
        )


def test_what_is_alike_reads_as_many_bytes():
    records = [
        kernel_record("skinny_linear", name, us=[1.0])
        for name in ("gemcut", "blas", "torchao-int8", "gemlite-int4")
    ]
    (case,) = cases([report("kernels", records)], "kernels")
    assert list(like_gemcut(case)) == ["gemcut", "blas"]


def test_a_readme_has_the_context_nearest_to_1k():
    records = [decode_record("gemma-2b", rate=[n], context=n) for n in (512, 1000, 4096)]
    table = readme_table([report("decode", records)])
    assert "| gemma-2b | bfloat16 | 1000 |" in table
    assert table.count("| gemma-2b |") == 1


def test_without_a_gpu_a_readme_says_so():
    assert readme_table([]) == NO_GPU
    table = readme_table([cpu_report(), {**kernels_report(), "machine": CPU}])
    assert table.startswith(f"{NO_GPU}\n\nTest EPYC")
    assert "| demo |" in table
    assert "rmsnorm" not in table
    wrong = decode_record("gemma-2b", rate=[1.0], status="wrong")
    assert readme_table([report("decode", [wrong])]) == NO_GPU


def test_a_readme_is_changed_between_its_markers_only(tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(f"# before\n{BEGIN}\nold\n{END}\nafter\n")
    file = save(tmp_path, a=cpu_report()) / "a.json"
    assert run_report([file], None, readme, True) == 1
    assert readme.read_text() == f"# before\n{BEGIN}\nold\n{END}\nafter\n"
    assert "differs" in capsys.readouterr().out
    assert run_report([file], None, readme, False) == 0
    text = readme.read_text()
    assert text == f"# before\n{BEGIN}\n{readme_table([cpu_report()])}\n{END}\nafter\n"
    assert run_report([file], None, readme, True) == 0
    assert run_report([file], None, readme, False) == 0
    assert readme.read_text() == text


@pytest.mark.parametrize(
    "text", ["", BEGIN, END, f"{END}\n{BEGIN}", f"{BEGIN}{BEGIN}{END}", f"{BEGIN}{END}{END}"]
)
def test_a_readme_without_markers_is_refused(text, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(text)
    file = save(tmp_path, a=cpu_report()) / "a.json"
    with pytest.raises(ValueError, match=r"README\.md: the lines <!-- results: begin -->"):
        run_report([file], None, readme, False)
    assert readme.read_text() == text


def test_the_readme_is_as_the_kept_results_have_it():
    root = Path(__file__).parents[2]
    folders = sorted((root / "bench" / "results").iterdir())
    assert run_report(folders, None, root / "README.md", check=True) == 0
