"""What the requests of one server share: the engine, its settings, and what runs."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from starlette.requests import Request

from gemcut.engine.engine import Engine
from gemcut.engine.openai_api.errors import ApiError, as_api_error
from gemcut.engine.openai_api.generation import Generation
from gemcut.engine.openai_api.server_metrics import ServerMetrics
from gemcut.engine.openai_api.settings import ServerSettings
from gemcut.engine.openai_api.tool_formats import choose_tool_format
from gemcut.engine.serving.output_queues import AsyncStream
from gemcut.tokenizer import Tokenizer
from gemcut.tokenizer.chat import default_template

T = TypeVar("T")
LARGE = 64 * 1024  # bytes of a body whose text takes tens of milliseconds to encode
server_log = logging.getLogger("gemcut.server")


class ClientLeft(Exception):
    """The client has closed the connection: there is nobody to answer."""


class Service:
    """An engine behind a server."""

    def __init__(self, engine: Engine, settings: ServerSettings) -> None:
        if engine.tokenizer is None:
            raise ValueError("a server needs an engine with a tokenizer")
        self.engine, self.settings = engine, settings
        self.tokenizer: Tokenizer = engine.tokenizer
        self.defaults = engine.get_default_sampling_params()
        self.metrics = ServerMetrics(engine.metrics)
        self.started = int(time.time())
        self.is_draining = False  # new requests are refused while those that run end
        self.open_requests = 0
        # for what takes seconds: small requests go past it, and a token waits for Python's lock
        # behind two threads, not behind six (26 ms, not 320, while six texts of 4 MB are encoded)
        self._heavy = ThreadPoolExecutor(2, "gemcut-heavy")
        self.template = settings.chat_template or default_template(engine.tokenizer)
        # Gemma's own turns, of checkpoints without a template, have no place for a system message
        self.merges_system = settings.merge_system or self.template is None
        self.tool_format = choose_tool_format(engine.tokenizer, self.template)

    def model_name(self, wanted: str | None) -> str:
        """The name in an answer; ApiError for a model that is not served."""
        names = self.settings.model_names
        if wanted is None or wanted in names:
            return wanted or names[0]
        message = f"the model {wanted[:100]!r} is not served here; {names[0]!r} is"
        raise ApiError(404, message, param="model", code="model_not_found")

    async def open(
        self, build: Callable[[], AsyncStream], log: dict[str, Any], *, compiles: bool
    ) -> Generation:
        """Queue what `build` makes: it encodes text, and where it `compiles`, a grammar."""
        return Generation(await self.in_thread(build, log, heavy=compiles), self.metrics, log)

    async def in_thread(
        self, work: Callable[[], T], log: dict[str, Any], *, heavy: bool = False
    ) -> T:
        """What `work` returns; heavy work, and that of a large body, waits its turn."""
        thread = self._heavy if heavy or log["body_bytes"] > LARGE else None
        return await asyncio.get_running_loop().run_in_executor(thread, work)

    def explain(self, error: Exception, line: dict[str, Any]) -> ApiError:
        """What a client is told of an error; the log has what it is not told."""
        told = as_api_error(error)
        line["error"] = told.message
        if told.status_code == 500:
            server_log.error("request %s failed", line["id"], exc_info=error)
        return told


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """What `work` returns; ClientLeft, and the work cancelled, once the client is gone."""
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientLeft
        return working.result()
    finally:
        watching.cancel()
        working.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
