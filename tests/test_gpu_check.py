"""tools/gpu_check.sh: its parts run alone, leave a log, and tell how they ended."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "tools" / "gpu_check.sh"


def run(*arguments, **environment):
    return subprocess.run(
        [SCRIPT, *map(str, arguments)],
        env={**os.environ, "DEVICE": "cpu", "PYTHON": sys.executable, **environment},
        capture_output=True,
        text=True,
    )


def test_parts_are_those_that_the_script_knows():
    parts = run("--list").stdout.split()
    source = SCRIPT.read_text()
    for part in parts:
        assert f"\n        {part}) " in source or f"\n        {part})\n" in source
    assert parts[0] == "tests-kernels"
    assert parts[-1] == "report"


def test_every_kernel_test_is_named_and_exists():
    lists = re.findall(r"^KERNEL_TESTS\+?=\(([a-z_ ]+)\)$", SCRIPT.read_text(), re.MULTILINE)
    assert len(lists) == 2
    for name in " ".join(lists).split():
        assert (SCRIPT.parents[1] / "tests" / f"test_{name}.py").exists()


def test_a_part_alone_leaves_its_log(tmp_path):
    done = run(tmp_path / "out", "sanitizer")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "sanitizer.log").read_text() == "there is none for a CPU\n"
    assert "== sanitizer: exit code 0" in done.stdout


def test_a_part_that_fails_is_told_and_the_next_one_runs(tmp_path):
    done = run(tmp_path, "report", "sanitizer")  # a folder without reports
    assert done.returncode == 1
    assert "there is no report in this folder" in done.stdout
    assert "== report: exit code 1" in done.stdout
    assert "== sanitizer: exit code 0" in done.stdout


def test_a_part_ends_in_its_time(tmp_path):
    done = run(tmp_path, "profile", LIMIT="1")
    assert done.returncode == 1
    assert "ran out of its 1 seconds" in done.stdout


@pytest.mark.parametrize("arguments", [(), ("OUT", "no-such-part")])
def test_wrong_usage_exits_with_2(arguments, tmp_path):
    done = run(*(tmp_path if one == "OUT" else one for one in arguments))
    assert done.returncode == 2
