"""The `gemcut` command in a process of its own: signals, pipes, and a terminal."""

import os
import re
import signal
import subprocess
from contextlib import contextmanager

from processes import COMMAND, ENVIRONMENT, PATIENCE
from terminals import PROMPT


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
