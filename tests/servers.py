"""Servers over small engines, in a thread of the test's process, and plain clients of them."""

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import uvicorn

from gemcut.engine import Engine
from gemcut.engine.openai_api.app import create_app
from gemcut.engine.openai_api.serve import bind, server_config
from gemcut.engine.openai_api.service import Service
from gemcut.engine.openai_api.settings import ServerSettings


class RunningServer:
    """A server that answers at `url`."""

    def __init__(self, url: str, service: Service) -> None:
        self.url, self.service, self.engine = url, service, service.engine

    def client(self, **headers: str) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers=headers, timeout=60)

    def post(self, path: str, body: Any, **headers: str) -> httpx.Response:
        """The answer to a JSON object, or to bytes that may be none."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        with self.client(**{"content-type": "application/json"} | headers) as client:
            return client.post(path, content=content)

    def events(self, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        """The events of a stream, which must end as one does."""
        response = self.post(path, body | {"stream": True})
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.text.split("\n\n") if line]
        assert lines[-1] == "data: [DONE]"
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


@contextmanager
def serving(engine: Engine, **settings: Any) -> Iterator[RunningServer]:
    """Serve an engine while the block runs."""
    app = create_app(engine, ServerSettings(**settings))
    bound = bind("127.0.0.1", 0)
    server = uvicorn.Server(server_config(app))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([bound])))
    thread.start()
    wait_until(lambda: server.started)
    try:
        url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        yield RunningServer(url, app.state.service)
    finally:
        server.should_exit = True
        thread.join()
        bound.close()


def wait_until(holds: Callable[[], bool], seconds: float = 30) -> None:
    """Return once `holds`; AssertionError where that takes too long."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.01)
