"""What OpenAI-compatible servers are sent and send: addresses, keys, events, errors.

Without a connection and without torch: remote_chat.py and gemcut-bench serve bring their own.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

API_KEYS = ("GEMCUT_API_KEY", "OPENAI_API_KEY")  # of the environment, the first that is set
DONE = "[DONE]"  # the data of the last event
MAX_EVENT_BYTES = 1 << 24
SHOWN = 300  # characters of a server's message


def read_url(url: str) -> str:
    """The URL without a slash at its end; ValueError where it is no server's."""
    wanted = "an address such as http://127.0.0.1:8000/v1"
    try:
        parts = urlsplit(url)
        _ = parts.port  # ValueError where it is no number
    except ValueError as error:
        raise ValueError(f"url {one_line(url)!r} is not {wanted}: {error}") from None
    if "@" in parts.netloc:  # not shown: it holds a password
        raise ValueError("a url with a name or password is refused; --api-key is for the key")
    clean = parts.scheme in ("http", "https") and parts.hostname and url.isascii()
    if not clean or not url.isprintable() or " " in url or parts.query or parts.fragment:
        raise ValueError(f"url {one_line(url)!r} is not {wanted}")
    return url.rstrip("/")


def find_api_key(given: str | None, environment: Mapping[str, str]) -> str | None:
    """The key that was given, else the environment's; ValueError where no header can hold it."""
    found = (environment[name] for name in API_KEYS if environment.get(name))
    key = next(found, None) if given is None else given
    if key is not None and not (key.isascii() and key.isprintable() and key.strip() == key != ""):
        raise ValueError("the API key is empty, or has a character that a header cannot hold")
    return key


def headers(api_key: str | None) -> dict[str, str]:
    """The headers of every request, with the key where there is one."""
    return {
        "Content-Type": "application/json",
        "Accept": "text/event-stream, application/json",
        "User-Agent": "gemcut",
        **({} if api_key is None else {"Authorization": f"Bearer {api_key}"}),
    }


class EventParser:
    """Server-sent events from bytes as they come, cut anywhere: the `data` of each, as text.

    Lines end with LF or CR LF; comments and other fields are passed over.
    """

    def __init__(self) -> None:
        self._rest = b""  # of a line that has not ended
        self._data: list[bytes] = []  # lines of an event that has not ended
        self._nbytes = 0

    def feed(self, piece: bytes) -> Iterator[str]:
        """The events that these bytes complete; ValueError for one that is too long or no UTF-8."""
        *lines, self._rest = (self._rest + piece).split(b"\n")
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
                self._nbytes += len(line)
            elif not line and self._data:
                event, self._data, self._nbytes = b"\n".join(self._data), [], 0
                yield _decode(event)
        if self._nbytes + len(self._rest) > MAX_EVENT_BYTES:
            raise ValueError(f"the server sent an event of more than {MAX_EVENT_BYTES} bytes")


def _decode(event: bytes) -> str:
    try:
        return event.decode()
    except UnicodeDecodeError:
        raise ValueError(f"the server sent an event that is no UTF-8: {event[:40]!r}") from None


def read_chunk(event: str) -> dict[str, Any]:
    """The chunk that an event holds; ValueError with the server's message where it is an error."""
    chunk = read_object(event)
    if chunk.get("error") is not None:
        raise ValueError(error_message(event.encode()))
    return chunk


def read_object(text: str | bytes) -> dict[str, Any]:
    """The JSON object of a server's text; ValueError where it is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        shown = text if isinstance(text, str) else text.decode(errors="replace")
        raise ValueError(f"the server sent what is no JSON object: {one_line(shown, 80)!r}")
    return value


def first_choice(chunk: Mapping[str, Any]) -> dict[str, Any]:
    """The choice of a chunk, empty where it has none; ValueError where it is misshapen."""
    choices = chunk.get("choices") or []
    if not isinstance(choices, list) or not all(isinstance(one, dict) for one in choices):
        raise ValueError(f"the server sent choices that are none: {one_line(repr(choices), 80)}")
    return choices[0] if choices else {}


def text_of(choice: Mapping[str, Any]) -> str:
    """What a chunk adds to the answer, of a chat or of a completion; ValueError if misshapen."""
    delta = choice.get("delta") or {}
    text = delta.get("content") if isinstance(delta, dict) else delta
    text = choice.get("text") if text is None else text
    if not isinstance(text, str | None):
        raise ValueError(f"the server sent a text that is none: {one_line(repr(text), 80)}")
    return text or ""


def model_names(models: Mapping[str, Any]) -> list[str]:
    """The names that /models lists; ValueError where it lists none."""
    entries = models.get("data")
    entries = entries if isinstance(entries, list) else []
    names = [one.get("id") for one in entries if isinstance(one, dict)]
    found = [name for name in names if isinstance(name, str)]
    if not found:
        raise ValueError("the server lists no model at /models; name one with --model")
    return found


def error_message(body: bytes) -> str:
    """The message of an error in any of the forms that servers give it, in one line."""
    text = body.decode(errors="replace")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return one_line(text)
    for name in ("error", "message", "detail"):
        if isinstance(value, dict) and value.get(name):
            value = value[name]
    return one_line(value if isinstance(value, str) else json.dumps(value))


def one_line(text: str, limit: int = SHOWN) -> str:
    """A stranger's text for a terminal: a line without control characters, cut where too long."""
    line = "".join(c if c.isprintable() else "\ufffd" for c in " ".join(text[: 4 * limit].split()))
    return line if len(line) <= limit else f"{line[:limit]}..."
