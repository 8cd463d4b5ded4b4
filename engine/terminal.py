"""The terminal side of a chat: lines read, answers shown, notes, and what Ctrl-C does.

Without a model and without torch: the answers may come from another process.
"""

import re
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress

WELCOME = "/reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer"
RESET_HELP = "/reset begins a new one"

Messages = list[dict[str, str]]


def prepare_terminal() -> None:
    """Give the lines of a terminal their editing."""
    if on_terminal():
        with suppress(ImportError):  # not on Windows
            import readline  # noqa: F401  # gives input() its line editing; writes to a pipe too


def talk(answer: Callable[[Messages], Messages], system: str | None) -> int:
    """Talk until the user leaves; 0, or 1 where a turn from a file or pipe was refused.

    `answer` takes the conversation with the user's turn, shows the answer as it comes, and returns
    the conversation with both.  Its ValueError concerns this turn only: the conversation goes on
    without it.
    """
    beginning: Messages = [{"role": "system", "content": system}] if system else []
    messages = beginning
    refused = False
    if on_terminal():
        note(WELCOME)
    while True:
        try:
            text = _ask() if on_terminal() else _next_line()
            if text is None or text == "/exit":
                break
            if text == "/reset":
                messages = beginning
                note("the conversation is forgotten")
            elif text.strip():
                messages = answer([*messages, {"role": "user", "content": text}])
        except ValueError as error:
            note(f"error: {error}")
            refused = True
    return int(refused and not on_terminal())


def until_ctrl_c() -> AbstractContextManager[None]:
    """Of an answer: Ctrl-C on a terminal ends it at once, and the chat goes on."""
    return suppress(KeyboardInterrupt) if on_terminal() else nullcontext()


def on_terminal() -> bool:
    """Whether somebody types and reads."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def read_prompt() -> str:
    """Standard input without the one newline that echo and editors put at the end."""
    if sys.stdin.isatty():
        note("reading the prompt; Ctrl-D ends it")
    return _decode(sys.stdin.buffer.read())


def _ask() -> str | None:
    """A line typed at the prompt; None at Ctrl-D."""
    try:
        return input(">>> ")
    except EOFError:
        print()
        return None


def _next_line() -> str | None:
    """The next line of standard input; None at its end."""
    line = sys.stdin.buffer.readline()
    return _decode(line) if line else None


def _decode(data: bytes) -> str:
    """The text of bytes from standard input; ValueError where they cannot be decoded."""
    # Not sys.stdin.read(): in the C locale it accepts broken bytes, and it alters "\r\n".
    try:
        return re.sub(r"\r?\n\Z", "", data.decode(sys.stdin.encoding))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"standard input is not {error.encoding}: byte 0x{data[error.start]:02x} "
            f"at position {error.start} ({error.reason})"
        ) from None


def show(text: str) -> None:
    """A piece of an answer, at once."""
    if text:
        print(text, end="", flush=True)


def note(text: str) -> None:
    """A line on standard error."""
    print(f"gemcut: {text}", file=sys.stderr, flush=True)
