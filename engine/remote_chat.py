"""`gemcut chat --url`: a chat with any OpenAI-compatible server, without torch or a model.

By the standard library's HTTP: a chat takes one request at a time, pip install gemcut has no other
client, and the openai package takes longer to import than most servers to answer.  Redirects are
not followed, since they would take the key along.
"""

import argparse
import json
import os
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from http.client import HTTPException, HTTPResponse
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import HTTPRedirectHandler, Request, build_opener

from gemcut.engine.cli_options import SAMPLING, engine_defaults
from gemcut.engine.openai_wire import (
    DONE,
    EventParser,
    error_message,
    find_api_key,
    first_choice,
    headers,
    model_names,
    one_line,
    read_chunk,
    read_object,
    read_url,
    text_of,
)
from gemcut.engine.terminal import Messages, note, prepare_terminal, show, talk, until_ctrl_c

PATIENCE = 600  # seconds without a byte, after which the server counts as lost
MAX_BODY_BYTES = 1 << 22  # of an answer that is no stream


class _NoRedirects(HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **named: Any) -> None:
        return None


_OPENER = build_opener(_NoRedirects)


def chat(args: argparse.Namespace) -> int:
    """Talk until the user leaves; 0, or 1 where a turn from a file or pipe was refused."""
    _refuse_engine_options(args)
    url, key = read_url(args.url), find_api_key(args.api_key, os.environ)
    settings = {name: getattr(args, name) for name in SAMPLING if hasattr(args, name)}
    try:
        json.dumps(settings, allow_nan=False)
    except ValueError:
        raise ValueError("a number of the sampling options is not finite") from None
    prepare_terminal()
    settings["model"] = _choose_model(url, key) if args.model is None else args.model
    return talk(lambda messages: _answer(url, key, settings, messages), args.system)


def _refuse_engine_options(args: argparse.Namespace) -> None:
    for name, default in engine_defaults().items():
        if getattr(args, name) != default:
            option = ("--no-" if default is True else "--") + name.replace("_", "-")
            raise ValueError(f"{option} is for an engine here; the one at --url is its server's")


def _choose_model(url: str, key: str | None) -> str:
    """The server's only model; ValueError where it has several."""
    with _open(f"{url}/models", key) as response, _as_value_error(url):
        names = model_names(read_object(response.read(MAX_BODY_BYTES)))
    if len(names) > 1:
        shown = one_line(", ".join(names))
        raise ValueError(f"the server has {len(names)} models: name one with --model, of {shown}")
    return names[0]


def _answer(url: str, key: str | None, settings: dict[str, Any], messages: Messages) -> Messages:
    """The conversation with the model's answer, which is printed as it comes.

    ValueError where the server refuses, breaks off or sends what is no answer; what came until then
    has been shown.  However it ends, the connection is closed: the server's slot is free again.
    """
    body = {**settings, "messages": messages, "stream": True}
    answer, finish_reason = "", None
    try:
        with until_ctrl_c(), closing(_stream(f"{url}/chat/completions", key, body)) as choices:
            for choice in choices:
                text = text_of(choice)
                answer += text  # before it is shown: Ctrl-C may come between
                show(text)
                finish_reason = choice.get("finish_reason") or finish_reason
            if finish_reason is None:
                raise ValueError("the server ended the answer without a finish_reason: it is cut")
    except ValueError:
        if answer:
            print(flush=True)
        raise
    print(flush=True)
    if finish_reason == "length":
        limit = f"--max-tokens {settings['max_tokens']}" if "max_tokens" in settings else "a limit"
        note(f"the answer was cut at {limit}")
    return [*messages, {"role": "assistant", "content": answer}]


def _stream(
    url: str, key: str | None, body: dict[str, Any]
) -> Generator[dict[str, Any], None, None]:
    """The choices of a streamed answer; ValueError where the server fails or breaks off.

    Some servers end a stream without [DONE]: whether an answer is whole, its finish_reason tells.
    """
    parser = EventParser()
    with _open(url, key, body) as response, _as_value_error(url):
        kind = response.headers.get_content_type()
        if kind != "text/event-stream":
            raise ValueError(f"{url} answers with {one_line(kind)}, not with a stream of events")
        while piece := response.read1(1 << 16):
            for event in parser.feed(piece):
                if event.strip() == DONE:
                    return
                yield first_choice(read_chunk(event))


def _open(url: str, key: str | None, body: dict[str, Any] | None = None) -> HTTPResponse:
    """The response to a GET, or to a POST of `body`; ValueError where it fails or is refused."""
    data = None if body is None else json.dumps(body, allow_nan=False).encode()
    with _as_value_error(url):
        try:
            return _OPENER.open(Request(url, data, headers(key)), timeout=PATIENCE)
        except HTTPError as error:
            with error:
                status = f"{error.code} {one_line(error.reason or '')}".strip()
                message = error_message(error.read(MAX_BODY_BYTES))
            hint = "" if error.code != 404 or "/v1/" in url else "; most servers' --url ends in /v1"
            raise ValueError(f"{url}: {status}{message and f': {message}'}{hint}") from None


@contextmanager
def _as_value_error(url: str) -> Iterator[None]:
    """Failures of the connection as a ValueError of one line: the chat can go on after them."""
    try:
        yield
    except URLError as error:
        raise ValueError(f"{url}: {one_line(str(error.reason))}") from None
    except (OSError, HTTPException) as error:
        reason = one_line(str(error)) or type(error).__name__
        raise ValueError(f"{url}: the connection broke off: {reason}") from None
