"""tools/gpu_visit.py: however a block ends, the visit keeps its records and goes on."""

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch
from visit_blocks import seconds_of

from gemcut.bench.measure import report_file
from gemcut.bench.report.load import CEILINGS
from gemcut.bench.report.markdown_page import load_reports
from gemcut.tools import gpu_visit
from gemcut.tools.gpu_visit import BLOCKS, LIMIT, RESERVE
from gemcut.tools.visit import bits, report

# where the children find visit_blocks.py, and what this process was given
SEARCHED = os.pathsep.join(
    filter(None, [os.environ.get("PYTHONPATH"), str(Path(__file__).parents[1])])
)
STUBS = ("--device", "cpu", "--blocks", "visit_blocks")


@pytest.fixture(autouse=True)
def _stubs(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", SEARCHED)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def visit(*arguments, background=False):
    """The visit as its users start it."""
    command = [sys.executable, "-P", "-m", "gemcut.tools.gpu_visit", *map(str, arguments)]
    if background:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.run(command, capture_output=True, text=True)


def ends(out):
    return {end["block"]: end["status"] for end in report.ends(out)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A visit whose blocks end in all ways."""
    out = tmp_path_factory.mktemp("visit") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", SEARCHED)
        return out, visit(out, *STUBS)


def test_every_end_is_told_and_the_next_block_runs(whole):
    out, done = whole
    assert done.returncode == 1
    assert ends(out) == {
        "right": "finished",
        "wrong": "finished",
        "raises": "failed",
        "hangs": "timed out",
        "dies": "failed",
        "spawns": "timed out",
        "last": "finished",
    }
    details = {end["block"]: end.get("detail") for end in report.ends(out)}
    assert details["raises"] == "RuntimeError: no such thing"
    assert details["dies"] == "killed by SIGKILL"
    assert details["hangs"] == "not done after 3 s"
    for block in ends(out):  # what each had found before it ended
        assert report.records(out, block)[0]["case"] == "first"


def test_a_block_is_ended_with_what_it_started(whole):
    out, _ = whole
    processes = [p.read_bytes() for p in Path("/proc").glob("[0-9]*/cmdline") if p.exists()]
    assert not any(seconds_of(out).encode() in command for command in processes)


def test_failures_stand_first_in_the_table(whole):
    out, done = whole
    lines = (out / "table.txt").read_text().splitlines()
    assert "\n".join(lines) in done.stdout
    assert lines[1:4] == [
        "-- 2 rows are not right",
        "wrong a check wrong: error 2, where 1 is allowed",
        "wrong a failure failed: TypeError: first line",
    ]
    assert lines[4] == "-- blocks"
    assert any(line.startswith("hangs     timed out (not done after 3 s)") for line in lines)
    start = lines.index("-- right")
    assert lines[start + 1 : start + 4] == [
        "right said this",
        "line 0",
        "... and 5 more: see rows/",
    ]


def test_the_table_holds_at_most_a_hundred_lines(tmp_path):
    (tmp_path / "rows").mkdir()
    quotas = {block.name: block.lines for block in BLOCKS}
    for name in quotas:
        for i in range(60):
            record = {"case": str(i), "status": "wrong" if i % 2 else "ok", "line": "x" * 500}
            report.append(tmp_path / "rows" / f"{name}.jsonl", record)
        end = {"block": name, "status": "finished", "seconds": 1.0}
        report.append(tmp_path / "visit.jsonl", end)
    lines = report.table(tmp_path, quotas)
    assert len(lines) == report.MOST_LINES
    assert max(map(len, lines)) == report.WIDTH
    assert lines[1] == f"-- {30 * len(quotas)} rows are not right"


def test_a_second_try_of_a_case_counts(whole):
    out, _ = whole
    found = {record["case"]: record["status"] for record in report.records(out, "right")}
    assert found["a case"] == "ok"
    assert found["another"] == "skipped"


def test_a_line_that_a_kill_cut_off_is_passed_over(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"case": "a", "status": "ok"}\n{"case": "b", "sta')
    assert [record["case"] for record in report.read(tmp_path / "x.jsonl")] == ["a"]


def test_everything_is_in_the_archive(whole):
    out, _ = whole
    with tarfile.open(out / "all.tgz") as tar:
        names = set(tar.getnames())
    files = {str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()}
    assert names == files - {"all.tgz"}
    assert {"table.txt", "visit.jsonl", "rows/hangs.jsonl", "logs/raises.log"} <= names


def test_reports_are_read_by_the_benchmarks_page(whole):
    out, _ = whole
    reports = load_reports([out])
    assert {file.name for file in reports} == {f"visit-{block}.json" for block in ends(out)}
    interrupted = {file.name for file, report in reports.items() if report["interrupted"]}
    assert interrupted == {f"visit-{x}.json" for x in ("raises", "hangs", "dies", "spawns")}


def test_only_these_blocks_and_an_archive_elsewhere(tmp_path):
    archive = tmp_path / "kept.tgz"
    done = visit(tmp_path / "out", *STUBS, "--only", "last", "--archive", archive)
    assert done.returncode == 0, done.stdout + done.stderr
    assert ends(tmp_path / "out") == {"last": "finished"}
    assert tarfile.is_tarfile(archive)


def test_resuming_runs_what_has_not_finished(tmp_path):
    out = tmp_path / "out"
    running = visit(out, *STUBS, "--only", "right", "hangs", "last", background=True)
    deadline = time.monotonic() + 60
    while not report.records(out, "hangs") and time.monotonic() < deadline:
        time.sleep(0.1)
    running.kill()  # which no handler sees
    running.communicate()
    assert ends(out) == {"right": "finished"}
    assert report.records(out, "hangs")[0]["case"] == "first"
    with tarfile.open(out / "all.tgz") as tar:  # written after each block
        assert "rows/right.jsonl" in tar.getnames()

    done = visit(out, *STUBS, "--only", "right", "hangs", "last", "--resume")
    assert done.returncode == 1
    assert "== right" not in done.stdout
    assert ends(out) == {"right": "finished", "hangs": "timed out", "last": "finished"}
    assert [record["case"] for record in report.read(out / "rows" / "hangs.jsonl")] == ["first"] * 2


def test_an_interrupt_keeps_what_was_measured(tmp_path):
    out = tmp_path / "out"
    running = visit(out, *STUBS, "--only", "spawns", "last", background=True)
    deadline = time.monotonic() + 60
    while not report.records(out, "spawns") and time.monotonic() < deadline:
        time.sleep(0.1)
    running.send_signal(signal.SIGTERM)
    stdout, stderr = running.communicate(timeout=30)
    assert running.returncode == 1
    assert "gpu_visit: interrupted" in stderr
    assert "spawns said this" in stdout
    assert tarfile.is_tarfile(out / "all.tgz")


def test_a_visit_ends_within_its_limit(tmp_path):
    began = time.monotonic()
    done = visit(tmp_path / "out", *STUBS, "--only", "hangs", "last", "--limit", RESERVE + 5)
    assert time.monotonic() - began < 15
    assert done.returncode == 1
    assert ends(tmp_path / "out") == {"hangs": "timed out", "last": "no time was left"}


def test_words_are_those_of_the_benchmarks():
    assert (report.OK, report.WRONG) == (report_file.OK, report_file.WRONG)
    assert (report.FAILED, report.NO_MEMORY) == (
        report_file.FAILED,
        report_file.NO_MEMORY,
    )
    assert (report.SCHEMA, report.CEILINGS) == (report_file.SCHEMA, CEILINGS)


def test_a_block_gives_way_to_the_limit():
    assert sum(block.expected for block in BLOCKS if not block.by_name) <= LIMIT - RESERVE
    assert all(block.expected <= block.seconds for block in BLOCKS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_no_gpu_is_one_line(tmp_path):
    done = visit(tmp_path / "out", "--only", "machine", "ops")
    assert done.returncode == 1
    assert done.stderr == "gpu_visit: device 'cuda': torch sees 0 CUDA devices\n"
    assert ends(tmp_path / "out") == {"machine": "failed"}  # and no further block was tried


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["OUT", "--only", "no-such-block"], "there is no block 'no-such-block'"),
        (["OUT", "--limit", "0"], "--limit 0.0 is not above 0"),
        (["OUT", "--resume"], "holds no visit to resume"),
        (["EXISTS"], "exists: name a new folder, or --resume"),
        (["--keep", "EXISTS"], "holds no report of a visit"),
        (["--keep", "OUT"], "No such file or directory"),
    ],
)
def test_bad_input_is_one_line(arguments, message, tmp_path, capsys):
    folders = {"OUT": tmp_path / "out", "EXISTS": tmp_path}
    assert gpu_visit.main([str(folders.get(one, one)) for one in arguments]) == 1
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1


def test_without_a_folder_it_is_wrong_usage():
    with pytest.raises(SystemExit) as error:
        gpu_visit.main([])
    assert error.value.code == 2


def test_reports_are_kept_by_device(whole, tmp_path):
    out, _ = whole
    with pytest.raises(ValueError, match="which device"):
        report.keep(out, tmp_path)
    folder = tmp_path / "visit"
    (folder / "rows").mkdir(parents=True)
    machine = {"device": "NVIDIA H200", "versions": {}, "commit": None}
    record = {"case": "machine", "status": "ok", "machine": machine}
    report.append(folder / "rows" / "machine.jsonl", record)
    report.write_report(folder, "machine")
    (folder / "breakdown-x-b1.json").write_text("{}")
    (folder / "other.json").write_text("{}")
    archive = tmp_path / "all.tgz"
    report.pack(folder, archive)
    assert gpu_visit.main(["--keep", str(archive), "--results", str(tmp_path / "results")]) == 0
    kept = sorted(file.name for file in (tmp_path / "results" / "nvidia-h200").iterdir())
    assert kept == ["breakdown-x-b1.json", "visit-machine.json"]
    stored = json.loads((tmp_path / "results" / "nvidia-h200" / "visit-machine.json").read_text())
    assert stored["machine"]["device"] == "NVIDIA H200"


# What blocks find


def test_stored_texts_are_what_the_oracles_choose():
    from gemcut.engine.checkpoints.hub import DEMO
    from gemcut.engine.checkpoints.load import load_checkpoint
    from gemcut.engine.config.model_config import ModelConfig
    from gemcut.engine.execution.model import Gemma
    from gemcut.kernels import reference
    from gemcut.tokenizer import Tokenizer

    config, tokenizer = ModelConfig.from_file(DEMO), Tokenizer.from_file(DEMO)
    weights = load_checkpoint(DEMO, config, device=torch.device("cpu"), dtype=torch.float32)
    model = Gemma(config, weights, reference)
    with torch.inference_mode():
        for prompt, text in bits.TEXTS.items():
            ids = bits.generate(model, tokenizer.encode(prompt), bits.NEW_TOKENS)
            assert tokenizer.decode(ids) == text


def test_a_small_visit_to_a_cpu(tmp_path):
    """The checks, the steps and the chains at their smallest, as they run on a GPU."""
    out = tmp_path / "out"
    names = [block.name for block in BLOCKS if block.name not in ("compile", "tiles", "peers")]
    done = visit(out, "--device", "cpu", "--only", *names)
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(ends(out)) == set(names)
    checked = {record["case"] for record in report.records(out, "ops")}
    for op in ("attention_decode", "attention_prefill", "linear_geglu", "sample", "penalize"):
        assert any(case.startswith(op) for case in checked)
    assert "drafts/demo" in checked
    on_fp8 = {record["case"] for record in report.records(out, "quantized")}
    assert "rows of attention_decode/demo/batch=3/context=24/local/fp8" in on_fp8
    timed = {record["case"] for record in report.records(out, "steps")}
    assert "demo/context=24, cache in fp8" in timed
    assert (out / "breakdown-demo-b1.json").exists()


# What is launched among late kernels: name, whether it waits, whether it is launched dependently
LATE = """
import torch

from gemcut import kernels
from gemcut.tools.launches import recorded
from gemcut.tools.visit.waits import UNWAITING, late_kernels

made = []
with recorded("sm_90", made):
    x, y = (torch.empty(1, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    with late_kernels(torch.empty(2, device="cuda", dtype=torch.int32), UNWAITING):
        kernels.rmsnorm(x, x.select(0, 0), 1e-6)
        kernels.add_rmsnorm_(x, y, None, x.select(0, 0), 1e-6)
for one in made:
    print(one.name, dict(one.numbers)["DEPENDENT"], dict(one.launch.options)["launch_pdl"])
"""


def test_a_late_kernel_stands_before_each():
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-P", "-c", LATE]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.stdout.splitlines() == [
        "late_store_kernel 1 True",
        "rmsnorm_kernel 1 True",
        "late_store_kernel 1 True",
        "add_rmsnorm_kernel 0 True",
    ], run.stderr
