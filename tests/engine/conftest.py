"""The `gemcut` command run in the process of the tests."""

import io
import sys

import pytest

from gemcut.engine.cli import main


@pytest.fixture
def run(capsys, monkeypatch):
    """Run `gemcut` in this process: exit code, standard output, standard error."""

    def run(*args: str, stdin: bytes = b"") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        try:
            code = main(args)
        except SystemExit as exit:
            code = exit.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run
