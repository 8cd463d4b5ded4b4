"""The `gemcut` command on a pseudo-terminal."""

import fcntl
import os
import pty
import re
import select
import subprocess
import termios
import time
from pathlib import Path

from processes import COMMAND, ENVIRONMENT, PATIENCE

PROMPT = rb">>> $"


class Terminal:
    """A `gemcut` on a pseudo-terminal: keys are typed, and the shown bytes read."""

    def __init__(self, *arguments: str):
        self._keyboard, terminal = pty.openpty()
        self.process = subprocess.Popen(
            [*COMMAND, *arguments],
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # Ctrl-C is a signal there
            env={**ENVIRONMENT, "TERM": "dumb"},
        )
        os.close(terminal)
        self.shown = b""

    def type(self, keys: bytes) -> None:
        os.write(self._keyboard, keys)

    def wait_until_it_waits(self) -> None:
        """Return when the process sleeps, for input.

        CPython's readline misses a signal that comes between its last look and its sleep, and
        notices it with the next key.
        """
        stat = Path(f"/proc/{self.process.pid}/stat")
        deadline = time.monotonic() + PATIENCE
        while stat.read_text().rpartition(")")[2].split()[0] != "S":
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def expect(self, pattern: bytes) -> bytes:
        """The bytes shown since the last call, up to the end of the pattern."""
        deadline = time.monotonic() + PATIENCE
        while (match := re.search(pattern, self.shown, re.DOTALL)) is None:
            self._read(deadline, waiting_for=pattern)
        shown, self.shown = self.shown[: match.end()], self.shown[match.end() :]
        return shown

    def end(self) -> tuple[int, bytes]:
        """The exit code, and the bytes shown since the last call."""
        deadline = time.monotonic() + PATIENCE
        try:
            while True:
                self._read(deadline, waiting_for=b"the end")
        except OSError:  # EIO: the other end is closed
            return self.process.wait(PATIENCE), self.shown

    def _read(self, deadline: float, *, waiting_for: bytes) -> None:
        ready, _, _ = select.select([self._keyboard], [], [], max(0, deadline - time.monotonic()))
        assert ready, f"no {waiting_for!r} in {self.shown!r}"
        self.shown += os.read(self._keyboard, 4096)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._keyboard)
