"""Ray Serve: replicas of the application that `gemcut serve` runs, and a front before them.

    serve run gemcut.engine.adapters.ray_deployment:app model=demo num_replicas=2

A request goes to the front, which passes it to a replica, and what that answers back to the client
as it comes.  The beginning of its prompt chooses the replica, so that requests that begin alike
find their prefix in a slot; once that replica's slots are taken, the least busy one.  More requests
than slots wait at the front.  Where a replica dies, streams on it end with an error event of
OpenAI's shape, answers that have not begun with status 503, and Ray starts another; all others go
on.  A client that leaves frees its slot.  `x-gemcut-replica` in an answer names the replica.
"""

import asyncio
import hashlib
import json
import os
import random
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ray  # pyright: ignore[reportMissingImports]
from pydantic import BaseModel, Field
from ray import serve  # pyright: ignore[reportMissingImports]
from ray.exceptions import RayActorError  # pyright: ignore[reportMissingImports]
from ray.serve import Application  # pyright: ignore[reportMissingImports]
from ray.serve.config import (  # pyright: ignore[reportMissingImports]
    AutoscalingConfig,
    RequestRouterConfig,
)
from ray.serve.handle import DeploymentHandle  # pyright: ignore[reportMissingImports]
from ray.serve.request_router import (  # pyright: ignore[reportMissingImports]
    PendingRequest,
    RequestRouter,
    RunningReplica,
)
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from gemcut.engine.engine import Engine
from gemcut.engine.openai_api.app import create_app
from gemcut.engine.openai_api.errors import ApiError
from gemcut.engine.openai_api.serve import warm_up
from gemcut.engine.openai_api.settings import ServerSettings

REPLICA = b"x-gemcut-replica"
PREFIX = 512  # characters of a prompt that choose its replica
DIED = "the replica that answered has died; another one takes the next request"
Headers = Sequence[tuple[bytes, bytes]]


class Arguments(BaseModel, extra="forbid"):
    """What `serve run` takes after the application's name; a config file has them under `args`."""

    model: str = "demo"
    num_replicas: int = Field(1, ge=1)
    max_replicas: int | None = None  # up to so many while requests wait; None: always num_replicas
    num_gpus: float | None = None  # of a replica; None: 1 where the cluster has GPUs, else 0
    num_cpus: float = 1  # of a replica: the threads of its steps too
    max_batch_size: int = Field(8, ge=1)  # slots of a replica
    max_seq_len: int | None = None
    dtype: str = "auto"
    quantization: Literal["int8", "int4", "fp8"] | None = None
    kv_cache_dtype: Literal["auto", "fp8"] = "auto"
    lora: str | None = None  # an adapter, merged into the model
    served_model_name: str | None = None  # None: the model's
    api_key: str | None = Field(None, repr=False)  # None: GEMCUT_API_KEY, where that is set
    merge_system: bool = False

    def settings(self) -> ServerSettings:
        """The settings of the server; ValueError names a bad one."""
        name = Path(self.model).name if Path(self.model).exists() else self.model
        key = self.api_key or os.environ.get("GEMCUT_API_KEY")
        return ServerSettings(
            model_names=(self.served_model_name or name,),
            api_keys=(key,) if key else (),
            merge_system=self.merge_system,
        )


@dataclass(frozen=True)
class Passed:
    """A request on its way from the front to a replica."""

    method: str
    path: str
    query: bytes
    headers: Headers
    client: tuple[str, int] | None
    body: bytes
    prompt: str  # its beginning; Ray's routers read it by this name

    def scope(self) -> dict[str, Any]:
        """What an ASGI application is called with."""
        return {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "scheme": "http",
            "method": self.method,
            "path": self.path,
            "raw_path": self.path.encode(),
            "root_path": "",
            "query_string": self.query,
            "headers": list(self.headers),
            "client": self.client,
            "server": None,
        }


class Replica:
    """An engine, and the application that serves it."""

    def __init__(self, arguments: Arguments, settings: ServerSettings) -> None:
        self._engine = Engine.from_pretrained(
            arguments.model,
            max_batch_size=arguments.max_batch_size,
            max_seq_len=arguments.max_seq_len,
            dtype=arguments.dtype,
            quantization=arguments.quantization,
            kv_cache_dtype=arguments.kv_cache_dtype,
            lora=arguments.lora,
        )
        warm_up(self._engine)
        self._app = create_app(self._engine, settings)
        self._name = serve.get_replica_context().replica_id.unique_id.encode()

    async def respond(self, request: Passed) -> AsyncIterator[tuple[int, Headers] | bytes]:
        """The application's status and headers, then its body in pieces, as they come."""
        sent: asyncio.Queue[Any] = asyncio.Queue()  # messages, and None at the end
        asked = [{"type": "http.request", "body": request.body, "more_body": False}]

        async def receive() -> dict[str, Any]:
            if not asked:
                await asyncio.Future()  # a client that leaves cancels all this
            return asked.pop()

        running = asyncio.create_task(self._app(request.scope(), receive, sent.put))
        running.add_done_callback(lambda _: sent.put_nowait(None))
        try:
            while (message := await sent.get()) is not None:
                if message["type"] == "http.response.start":
                    yield message["status"], [*message["headers"], (REPLICA, self._name)]
                elif piece := message.get("body"):
                    yield piece
            await running  # its error, if it has failed
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    async def check_health(self) -> None:
        """Nothing, or an error where the engine takes no requests: Ray starts another replica."""
        if not self._engine.is_healthy:
            raise RuntimeError("the engine takes no requests any more")

    def __del__(self) -> None:
        if hasattr(self, "_engine"):
            self._engine.close()


class PrefixRouter(RequestRouter):
    """Requests that begin alike go to one replica while it has room, then to the least busy.

    Rendezvous hashing: a replica that comes or goes moves only the prompts that are its own.
    """

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """The replicas in ranks; Ray takes the least busy of the first that has room."""
        given = () if pending_request is None else pending_request.args
        # Ray copies this class with its module, so that a request is no instance of this `Passed`
        prompt = next((one.prompt for one in given if hasattr(one, "prompt")), "")
        if not prompt:
            return [random.sample(candidate_replicas, len(candidate_replicas))]

        def weight(replica: RunningReplica) -> bytes:
            return hashlib.sha256(f"{replica.replica_id.unique_id} {prompt}".encode()).digest()

        own, *others = sorted(candidate_replicas, key=weight, reverse=True)
        return [[own], others] if others else [[own]]


class Front:
    """What clients speak to."""

    def __init__(self, replicas: DeploymentHandle, max_body_bytes: int) -> None:
        self._respond = replicas.options(stream=True).respond
        self._max_body_bytes = max_body_bytes

    async def __call__(self, request: Request) -> Response:
        """A replica's answer to a request, from its first byte on."""
        body = b""
        async for piece in request.stream():
            body += piece
            if len(body) > self._max_body_bytes:
                error = f"the body is larger than the {self._max_body_bytes} bytes of this server"
                return ApiError(413, error).response()
        answer = self._respond.remote(
            Passed(
                method=request.method,
                path=request.url.path,
                query=request.scope["query_string"],
                headers=request.headers.raw,
                client=request.scope.get("client"),
                body=body,
                prompt=beginning(body),
            )
        )
        has_begun = False
        try:
            status, headers = await anext(answer)
            has_begun = True
        except RayActorError:
            return ApiError(503, DIED).response()
        finally:
            if not has_begun:  # the client has left
                answer.cancel()
        response = StreamingResponse(self._pieces(answer, request.url.path, headers), status)
        # Ray writes the request's id itself, which is the application's too
        response.raw_headers = [header for header in headers if header[0] != b"x-request-id"]
        return response

    async def _pieces(self, answer: Any, path: str, headers: Headers) -> AsyncIterator[bytes]:
        """The pieces of a body; the last is an error event where its replica has died."""
        events = 0
        try:
            async for piece in answer:
                events += piece.count(b"\n\n")
                yield piece
        except RayActorError:
            if not dict(headers).get(b"content-type", b"").startswith(b"text/event-stream"):
                raise  # the connection ends early, which clients see
            yield error_event(path, events).encode()
        finally:
            answer.cancel()


def beginning(body: bytes) -> str:
    """The first characters of a request's prompt, or of its ids; empty where it has none."""
    try:
        asked = json.loads(body)
    except ValueError:
        return ""
    if not isinstance(asked, dict):
        return ""
    names = ("messages", "prompt", "input")
    return json.dumps(next((asked[name] for name in names if asked.get(name)), ""))[:PREFIX]


def error_event(path: str, number: int) -> str:
    """The end of a stream whose replica has died, after `number` events."""
    error = ApiError(503, DIED).body()
    if path.endswith("/responses"):
        named = {**error["error"], "type": "error", "sequence_number": number}
        return f"event: error\ndata: {json.dumps(named)}\n\n"
    return f"data: {json.dumps(error)}\n\ndata: [DONE]\n\n"


def app(arguments: Arguments) -> Application:
    """The application for `serve run`."""
    settings = arguments.settings()
    gpus = arguments.num_gpus
    if gpus is None:
        gpus = int(ray.is_initialized() and ray.cluster_resources().get("GPU", 0) > 0)
    slots, few = arguments.max_batch_size, arguments.num_replicas
    how_many: dict[str, Any] = {"num_replicas": few}
    if arguments.max_replicas is not None:
        if arguments.max_replicas < few:
            raise ValueError(f"max_replicas {arguments.max_replicas} is below num_replicas {few}")
        scaling = AutoscalingConfig(
            min_replicas=few, max_replicas=arguments.max_replicas, target_ongoing_requests=slots
        )
        how_many = {"autoscaling_config": scaling}
    replicas = serve.deployment(Replica).options(
        **how_many,
        ray_actor_options={"num_gpus": gpus, "num_cpus": arguments.num_cpus},
        max_ongoing_requests=slots,  # more wait at the front, for whichever has room first
        request_router_config=RequestRouterConfig(request_router_class=PrefixRouter),
        health_check_period_s=2,
    )
    front = serve.deployment(Front).options(
        ray_actor_options={"num_cpus": 0}, max_ongoing_requests=settings.max_streams
    )
    return front.bind(replicas.bind(arguments, settings), settings.max_body_bytes)
