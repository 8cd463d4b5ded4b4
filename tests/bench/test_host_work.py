"""gemcut-bench host-work: what the engine does in a step whose device takes no time."""

import json
import time

import pytest

from gemcut.bench import cli
from gemcut.bench.engines import host_work
from gemcut.bench.engines.host_work import CALLERS, make_engine
from gemcut.bench.report.markdown_page import run_report

SMALL = ["host-work", "--device", "cpu", "--batch", "1", "3", "--new-tokens", "9"]


def measure(*arguments, capsys):
    code = cli.main([*SMALL, "--repeats", "2", *arguments])
    lines = capsys.readouterr().out.splitlines()
    return code, "\n".join(lines[:-1]), json.loads(lines[-1])


def test_a_row_for_each_batch_and_kind_of_caller(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(host_work, "LIMITS_US", {1: 1e9})
    file = tmp_path / "host.json"
    code, text, report = measure("--json", str(file), capsys=capsys)
    assert code == 0
    assert json.loads(file.read_text()) == report
    assert not report["interrupted"]
    assert [row["case"] for row in report["rows"]] == [
        f"demo/batch={batch}/{caller}"
        for batch in (1, 3)
        for caller in ("generate", "astream", "serve")
    ]
    for row in report["rows"]:
        assert len(row["step_us"]["all"]) == 2
        assert row["step_us"]["low"] > 0
        assert row["limit_us"] == (1e9 if row["batch"] == 1 else None)
        assert row["case"] in text
    assert run_report([file], tmp_path / "page", None, check=False) == 0
    page = (tmp_path / "page" / "report.md").read_text()
    assert "Work of the host" in page
    assert "| demo | 3 | astream |" in page


def test_what_the_host_does_is_counted_and_the_device_is_not(monkeypatch, capsys):
    """A scheduler that sleeps shows, a model that sleeps does not."""
    with make_engine(host_work.choose_setup(cli._parser().parse_args(SMALL)), 1) as engine:
        monkeypatch.setattr(engine.model, "decode", None)
        next_ones = type(engine._scheduler).decoding.fget
        for caller in CALLERS.values():
            quick = caller(engine, 1, 20)
            with monkeypatch.context() as patch:
                patch.setattr(
                    type(engine._scheduler),
                    "decoding",
                    property(lambda scheduler: (time.sleep(0.002), next_ones(scheduler))[1]),
                )
                slow = caller(engine, 1, 20)
            assert slow > quick + 2000


def test_what_passes_its_limit_fails_the_run(monkeypatch, capsys):
    monkeypatch.setattr(host_work, "LIMITS_US", {1: 1e-3, 3: 1e9})
    assert measure(capsys=capsys)[0] == 1


def test_an_interrupted_run_says_so(monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setitem(CALLERS, "astream", interrupted)
    code, text, report = measure(capsys=capsys)
    assert code == 130
    assert "interrupted" in text
    assert report["interrupted"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "0"], "batch 0 is outside 1.."),
        (["--new-tokens", "2"], "new tokens 2 is outside 3.."),
        (["--new-tokens", "511"], "outside 3..510"),
        (["--repeats", "0"], "repeats 0 is outside 1.."),
        (["--json", "no/such.json"], "no such folder"),
    ],
)
def test_bad_input(arguments, message, capsys):
    assert cli.main([*SMALL, *arguments]) == 1
    assert message in capsys.readouterr().err
