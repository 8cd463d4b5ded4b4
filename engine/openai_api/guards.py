"""What stands before the application: request ids, keys, limits, and the access log.

Plain ASGI: nothing is put between a stream and its socket.
"""

import asyncio
import hmac
import json
import logging
import re
import secrets
import time
from collections.abc import Mapping
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gemcut.engine.openai_api.errors import ApiError
from gemcut.engine.openai_api.service import ClientLeft, Service

OPEN_PATHS = ("/", "/health", "/favicon.ico")  # asked for without a key
GENERATING = ("/v1/completions", "/v1/chat/completions", "/v1/responses")
WATCHED = ("/health", "/metrics")  # asked for all the time: logged where they fail
CLIENT_LEFT = 499  # as nginx logs it
access_log = logging.getLogger("gemcut.access")


class Guard:
    """Every request passes it, and gets a line of the access log; but not questions by CORS."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service
        # as curl sends them, and as a browser does
        spelt = ((key, code) for key in service.settings.api_keys for code in ("utf-8", "latin-1"))
        self._keys = [key.encode(code, "backslashreplace") for key, code in spelt]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await _Exchange(scope, send, self._service).run(self._answer, receive)
        # a websocket is closed by the server: nothing accepts it

    async def _answer(self, exchange: "_Exchange", receive: Receive) -> None:
        scope, service = exchange.scope, self._service
        path, headers = scope["path"], Headers(scope=scope)
        if scope["method"] != "OPTIONS" and path not in OPEN_PATHS:
            self._check_key(headers)
        limit = service.settings.max_body_bytes
        limited = _Limited(receive, limit, service.settings.max_body_seconds, exchange.line)
        length = headers.get("content-length", "0")
        if not length.isdigit() or len(length) > 18 or int(length) > limit:
            raise ApiError(413, f"the body is larger than the {limit} bytes of this server")
        if path not in GENERATING:
            await self._app(scope, limited, exchange.send)
            return
        if service.is_draining:
            raise ApiError(503, "the server is shutting down")
        if service.open_requests >= service.settings.max_streams:
            most = service.settings.max_streams
            raise ApiError(429, f"{most} requests are open, the most of this server")
        service.open_requests += 1
        service.metrics.open_requests.inc()
        try:
            await self._app(scope, limited, exchange.send)
        finally:
            service.open_requests -= 1
            service.metrics.open_requests.dec()

    def _check_key(self, headers: Headers) -> None:
        """Nothing, or ApiError; how long it takes says nothing about the keys."""
        if not self._keys:
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            given = headers.get("x-api-key", "")
        spelt = given.strip(" \t").encode("latin-1")
        if not any(hmac.compare_digest(spelt, key) for key in self._keys):
            raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key")


class _Limited:
    """`receive` that refuses a body as soon as it is too large or too late; the log has its size.

    A client that sends half a body and stays would hold one of the places for ever.
    """

    def __init__(self, receive: Receive, limit: int, seconds: float, line: dict[str, Any]) -> None:
        self._receive, self._limit, self._line = receive, limit, line
        self._seconds, self._deadline = seconds, time.monotonic() + seconds
        self._is_complete = False
        line["body_bytes"] = 0

    async def __call__(self) -> Message:
        if self._is_complete:  # what comes is the client's leave
            return await self._receive()
        try:
            left = self._deadline - time.monotonic()
            message = await asyncio.wait_for(self._receive(), max(left, 0))
        except asyncio.TimeoutError:  # another one in Python 3.10
            what = f"the body did not arrive within the {self._seconds:g} seconds of this server"
            raise ApiError(408, what) from None
        self._is_complete = not message.get("more_body", False)
        if message["type"] == "http.request":
            self._line["body_bytes"] += len(message.get("body", b""))
            if self._line["body_bytes"] > self._limit:
                raise ApiError(
                    413, f"the body is larger than the {self._limit} bytes of this server"
                )
        return message


class _Exchange:
    """One request and its answer: the id that both have, and their line of the access log."""

    def __init__(self, scope: Scope, send: Send, service: Service) -> None:
        self.scope, self._send, self._service = scope, send, service
        given = Headers(scope=scope).get("x-request-id", "")
        id_ = given if re.fullmatch(r"[\w.-]{1,64}", given, re.ASCII) else secrets.token_hex(12)
        self.line: dict[str, Any] = {"id": id_}
        scope["gemcut.log"] = self.line
        self._status = 0
        self._started = time.perf_counter()

    async def send(self, message: Message) -> None:
        """Pass on a part of the answer, with the request's id."""
        if message["type"] == "http.response.start":
            self._status = message["status"]
            MutableHeaders(raw=message["headers"])["x-request-id"] = self.line["id"]
        await self._send(message)

    async def run(self, answer: Any, receive: Receive) -> None:
        """Answer, with an error of its own where that fails before it has begun."""
        try:
            await answer(self, receive)
        except ClientLeft:
            self._status = CLIENT_LEFT
        except Exception as error:
            told = self._service.explain(error, self.line)
            if self._status:  # half an answer was sent: only the connection's end can tell
                raise
            await told.response()(self.scope, receive, self.send)
        finally:
            self._write()

    def _write(self) -> None:
        seconds = time.perf_counter() - self._started
        route = self.scope.get("route")
        path = getattr(route, "path", "other")  # a label must not grow with what is asked
        self._service.metrics.requests.labels(path, str(self._status)).inc()
        if path in GENERATING:
            self._service.metrics.request_time.observe(seconds)
        if self._status == 200 and path in WATCHED:
            return
        client = self.scope.get("client") or ("", 0)
        facts: Mapping[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "client": client[0],
            "method": self.scope["method"][:20],
            "path": self.scope["path"][:200],
            "status": self._status,
            "ms": round(1e3 * seconds, 1),
        }
        told = {name: value for name, value in self.line.items() if value not in (None, [])}
        access_log.info(json.dumps({**facts, **told}))
