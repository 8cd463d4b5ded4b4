"""The `gemcut` command in a process of its own: signals, pipes, and a terminal."""

import fcntl
import os
import pty
import re
import select
import signal
import subprocess
import termios
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from processes import COMMAND, ENVIRONMENT, PATIENCE


@contextmanager
def process(*arguments: str):
    """A running `gemcut`, killed at the end of the test."""
    started = subprocess.Popen(
        [*COMMAND, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
    )
    try:
        yield started
    finally:
        started.kill()
        started.communicate()


ENDLESS = ["generate", "It was", "--ignore-eos", "--max-tokens", "500"]  # seconds of work


def test_text_comes_as_it_is_made_and_ctrl_c_ends_it():
    with process(*ENDLESS) as running:
        assert running.stdout.read(1)  # unflushed, it would come with the end: too late for Ctrl-C
        running.send_signal(signal.SIGINT)
        _, err = running.communicate(timeout=PATIENCE)
    assert (running.returncode, err) == (130, b"\n")


def test_a_reader_that_leaves_is_no_error():
    with process(*ENDLESS) as running:
        assert running.stdout.read(5)
        running.stdout.close()
        assert running.wait(PATIENCE) == 141
        assert running.stderr.read() == b""


def test_help_for_a_reader_that_has_left():
    read_end, write_end = os.pipe()
    os.close(read_end)
    shown = subprocess.run(
        [*COMMAND, "--help"], stdout=write_end, stderr=subprocess.PIPE, env=ENVIRONMENT
    )
    os.close(write_end)
    assert (shown.returncode, shown.stderr) == (141, b"")


def test_a_full_disk_is_an_error():
    with open("/dev/full", "wb") as full:
        shown = subprocess.run(
            [*COMMAND, "--version"], stdout=full, stderr=subprocess.PIPE, env=ENVIRONMENT
        )
    assert shown.returncode == 1
    assert shown.stderr == b"gemcut: error: [Errno 28] No space left on device\n"


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


@pytest.fixture
def terminal():
    opened = []

    def open_terminal(*arguments: str) -> Terminal:
        opened.append(Terminal(*arguments))
        return opened[-1]

    yield open_terminal
    for each in opened:
        each.close()


PROMPT = rb">>> $"


def test_chat_on_a_terminal(terminal):
    chat = terminal("chat", "--ignore-eos", "--seed", "0")
    assert b"/reset forgets" in chat.expect(PROMPT)

    chat.type("Žižkov?\n".encode())
    chat.expect(rb"\?\r\n.*\w")  # the echo of the line, and the beginning of an answer
    chat.type(b"\x03")
    chat.expect(rb"\^C\r\n>>> $")  # Ctrl-C ends the answer, not the chat

    chat.type(b"\xff\n")
    assert re.search(rb"gemcut: error: [^\n]+\r\n>>> $", chat.expect(rb"error.*" + PROMPT))
    chat.type(b"/reset\n")
    assert b"forgotten" in chat.expect(rb"forgotten.*" + PROMPT)
    chat.type(b"And you?\n")
    chat.expect(rb"\?\r\n.*\w")
    chat.type(b"\x03")
    chat.expect(PROMPT)

    chat.type(b"\x04")
    code, shown = chat.end()
    assert code == 0
    assert shown.endswith(b"\r\n")  # the shell's prompt gets a line of its own
    assert b"Traceback" not in shown


def test_ctrl_c_at_the_prompt_leaves(terminal):
    chat = terminal("chat")
    chat.expect(PROMPT)
    chat.type(b"half a line")
    chat.expect(rb"half a line")
    chat.wait_until_it_waits()
    chat.type(b"\x03")
    code, shown = chat.end()
    assert code == 130
    assert shown.endswith(b"\r\n")
    assert b"Traceback" not in shown
