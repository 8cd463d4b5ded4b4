"""A small OpenAI-compatible server that answers, or fails, as a test says."""

import json
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

CUT = object()  # in a reply: the connection breaks off here
MODEL = "fake-1b"


@dataclass
class Asked:
    """A request that the server got."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    left: threading.Event = field(default_factory=threading.Event)  # its client has gone away


@dataclass
class Reply:
    """Parts are bytes to send, seconds to wait, or CUT."""

    parts: Iterable[Any]
    status: int = 200
    kind: str = "text/event-stream"
    headers: dict[str, str] = field(default_factory=dict)


def event(value: Any) -> bytes:
    return f"data: {value if isinstance(value, str) else json.dumps(value)}\n\n".encode()


def chunk(asked: Asked, text: str | None, finish_reason: str | None = None) -> bytes:
    """An event of a streamed chat or completion."""
    delta = {"delta": {} if text is None else {"content": text}}
    own = delta if "chat" in asked.path else {"text": text or ""}
    choice = {"index": 0, "finish_reason": finish_reason, **own}
    return event({"id": "x", "model": MODEL, "choices": [choice]})


def usage(tokens: int, prompt_tokens: int = 0) -> bytes:
    counted = {"completion_tokens": tokens, "prompt_tokens": prompt_tokens}
    return event({"id": "x", "choices": [], "usage": counted})


def error(status: int, message: Any, **headers: str) -> Reply:
    body = json.dumps({"error": {"message": message, "type": "x"}}).encode()
    return Reply([body], status, "application/json", headers)


def prompt_of(asked: Asked) -> str:
    messages = asked.body.get("messages")
    return messages[-1]["content"] if messages else asked.body["prompt"]


def tokens_of(asked: Asked) -> list[str]:
    """The pieces of the answer: the prompt's words for a chat, or as many as are asked for."""
    if (wanted := asked.body.get("max_tokens")) is not None:
        return [f" w{i}" for i in range(wanted)]
    return [*(f"{word} " for word in prompt_of(asked).split()), "ž☃!"]


def well(asked: Asked, pause: float = 0.0) -> Reply:
    """A whole stream: a role, pieces, a finish_reason, usage where asked for, [DONE]."""
    pieces = tokens_of(asked)
    parts: list[Any] = [b": a comment\n\n", chunk(asked, None)]
    for piece in pieces:
        parts += [pause, chunk(asked, piece)]
    parts.append(chunk(asked, None, "length" if "max_tokens" in asked.body else "stop"))
    if asked.body.get("stream_options", {}).get("include_usage"):
        parts.append(usage(len(pieces), 5 + len(prompt_of(asked).split())))
    return Reply([*parts, event("[DONE]")])


def models(*names: str, **facts: Any) -> Reply:
    body = json.dumps({"object": "list", "data": [{"id": name, **facts} for name in names]})
    return Reply([body.encode()], kind="application/json")


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 512  # of connections at once


class FakeServer:
    """Serves on a port of 127.0.0.1 until the end of the `with`; `respond` may be replaced."""

    def __init__(self, respond: Callable[[Asked], Reply] = well, **facts: Any) -> None:
        self.respond = respond
        self.models: Callable[[], Reply] = lambda: models(MODEL, **facts)
        self.asked: list[Asked] = []
        self._server = _Server(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> "FakeServer":
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def answered(self) -> list[Asked]:
        """The requests for answers, without those for the list of models."""
        return [one for one in self.asked if not one.path.endswith("/models")]


def _handler(server: FakeServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            asked = self._asked({})
            self._send(asked, server.models())

        def do_POST(self) -> None:
            asked = self._asked(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self._send(asked, server.respond(asked))

        def _asked(self, body: dict[str, Any]) -> Asked:
            server.asked.append(Asked(self.path, dict(self.headers), body))
            return server.asked[-1]

        def _send(self, asked: Asked, reply: Reply) -> None:
            self.close_connection = True
            self.send_response(reply.status)
            named = {"Content-Type": reply.kind, "Transfer-Encoding": "chunked"}
            named |= {"Connection": "close", **reply.headers}
            for name, value in named.items():
                self.send_header(name, value)
            self.end_headers()
            try:
                for part in reply.parts:
                    if part is CUT:
                        return
                    if isinstance(part, float):
                        time.sleep(part)
                    else:
                        self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
                self.wfile.write(b"0\r\n\r\n")
            except OSError:
                asked.left.set()

    return Handler
