"""`pytest bench/`: the kernel cases under pytest-benchmark, with times of the device."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CASES = "--op geglu --tokens 40 --peer torch --rounds 3"


def run(storage, *options, cases=CASES):
    command = [sys.executable, "-m", "pytest", "bench/", "--kernels", cases]
    command += [f"--benchmark-storage=file://{storage}", *options]
    # pytest-benchmark measures nothing where it sees pytest-xdist, which may run these tests
    environment = {k: v for k, v in os.environ.items() if "PYTEST_XDIST" not in k}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The storage of one run, and the file in it."""
    storage = tmp_path_factory.mktemp("storage")
    done = run(storage, "--benchmark-save=before")
    assert done.returncode == 0, done.stdout
    (file,) = storage.rglob("*_before.json")
    return storage, file


def test_statistics_are_times_of_the_device(saved):
    _, file = saved
    benchmarks = json.loads(file.read_text())["benchmarks"]
    assert [one["extra_info"]["contestant"] for one in benchmarks] == ["gemcut", "torch"] * 2
    for one in benchmarks:
        facts = one["extra_info"]
        assert one["group"] == facts["case"]
        assert one["stats"]["rounds"] == 3
        assert 1e6 * one["stats"]["median"] == pytest.approx(facts["cold_us"])
        assert facts["status"] == "ok"
        assert facts["gbps"] > 0


def test_a_regression_fails_the_run(saved):
    storage, file = saved
    options = ("--benchmark-compare=0001", "--benchmark-compare-fail=median:100%")
    report = json.loads(file.read_text())
    for one in report["benchmarks"]:
        for name in ("min", "max", "mean", "median"):
            one["stats"][name] /= 100
    file.write_text(json.dumps(report))
    done = run(storage, *options)
    assert done.returncode != 0
    assert "Performance has regressed" in done.stdout + done.stderr


def test_an_unknown_op_is_told(tmp_path):
    done = run(tmp_path, cases="--op softmax")
    assert done.returncode != 0
    assert "op 'softmax' is unknown" in done.stdout + done.stderr
