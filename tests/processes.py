"""The `gemcut` command in a process of its own, and the one line of its errors."""

import os
import subprocess
import sys
from collections.abc import Sequence

GREEDY = ["--temperature", "0"]
PATIENCE = 30  # seconds for a process to import torch and to answer
COMMAND = [sys.executable, "-P", "-c", "import sys; from gemcut.engine.cli import main\n"]
COMMAND[-1] += "sys.exit(main())"
# unbuffered, Python would write at once what the command forgets to flush; and users have no
# interpreter on
UNWANTED = {"PYTHONUNBUFFERED", "TRITON_INTERPRET"}
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in UNWANTED}


def gemcut(*arguments: object, command: Sequence[str] = COMMAND) -> tuple[int, str, str]:
    """Run a real process: exit code, standard output and standard error."""
    done = subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, env=ENVIRONMENT
    )
    return done.returncode, done.stdout, done.stderr


def error_line(result: tuple[int, str, str]) -> str:
    """The message of a run that ended with an error: code 1, one line, nothing printed."""
    code, out, err = result
    assert (code, out) == (1, "")
    assert err.startswith("gemcut: error: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1
    return err
