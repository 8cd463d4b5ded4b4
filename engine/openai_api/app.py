"""The FastAPI application: paths, and what stands behind each."""

from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import (
    HTMLResponse,
    JSONResponse,
    PlainTextResponse,
    Response,
    StreamingResponse,
)
from openai.types import Model
from starlette.exceptions import HTTPException as RouteError
from starlette.middleware.cors import CORSMiddleware
from starlette.types import Receive, Scope, Send

from gemcut.engine.engine import Engine
from gemcut.engine.openai_api.answer import Answer
from gemcut.engine.openai_api.chat import ChatAnswer, ChatRequest
from gemcut.engine.openai_api.completions import CompletionAnswer, CompletionRequest
from gemcut.engine.openai_api.described import ErrorBody
from gemcut.engine.openai_api.errors import ApiError
from gemcut.engine.openai_api.guards import Guard
from gemcut.engine.openai_api.response_input import ResponseRequest
from gemcut.engine.openai_api.responses import ResponseAnswer
from gemcut.engine.openai_api.service import Service, unless_gone
from gemcut.engine.openai_api.settings import ServerSettings
from gemcut.engine.openai_api.tokens import (
    DetokenizeRequest,
    TokenizeRequest,
    detokenize,
    tokenize,
)

EVENTS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # proxies pass events on at once

# the page loads nothing from elsewhere, and asks nobody else
OF_PAGE = (
    "default-src 'none'; connect-src 'self'; img-src data:; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def create_app(engine: Engine, settings: ServerSettings | None = None) -> FastAPI:
    """An ASGI application that serves an engine, whose owner closes it."""
    service = Service(engine, ServerSettings() if settings is None else settings)
    refused: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorBody, "description": "Refused"} for status in ("4XX", "5XX")
    }
    app = FastAPI(title="gemcut", docs_url=None, redoc_url=None, responses=refused)
    app.state.service = service
    _add_answers(app, service)
    _add_others(app, service)
    for kind in (RequestValidationError, RouteError, ValueError, RuntimeError):
        app.add_exception_handler(kind, _refuse)
    app.add_middleware(Guard, service=service)
    if settings is not None and settings.allowed_origins:
        app.add_middleware(  # outermost: a page may read the guard's errors too
            CORSMiddleware,
            allow_origins=settings.allowed_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    return app


def _add_answers(app: FastAPI, service: Service) -> None:
    """The paths that generate text."""
    streams: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}

    @app.post("/v1/completions", responses=streams)
    async def completions(request: Request, body: CompletionRequest) -> Response:
        """Text that goes on from a prompt."""
        return await _answered(request, CompletionAnswer(service, body, _log(request)), body.stream)

    @app.post("/v1/chat/completions", responses=streams)
    async def chat_completions(request: Request, body: ChatRequest) -> Response:
        """The answer to a conversation."""
        return await _answered(request, ChatAnswer(service, body, _log(request)), body.stream)

    @app.post("/v1/responses", responses=streams)
    async def responses(request: Request, body: ResponseRequest) -> Response:
        """The answer to a conversation, as output items."""
        return await _answered(request, ResponseAnswer(service, body, _log(request)), body.stream)


def _add_others(app: FastAPI, service: Service) -> None:
    """The paths that tell something."""

    @app.get("/v1/models")
    async def models() -> JSONResponse:
        """The names of the model."""
        names = service.settings.model_names
        return JSONResponse({"object": "list", "data": [_model(service, name) for name in names]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> JSONResponse:
        """One of them."""
        return JSONResponse(_model(service, service.model_name(name)))

    @app.post("/tokenize")
    async def tokenized(request: Request, body: TokenizeRequest) -> JSONResponse:
        """The ids of a text or a conversation."""
        return JSONResponse(await service.in_thread(lambda: tokenize(service, body), _log(request)))

    @app.post("/detokenize")
    async def detokenized(request: Request, body: DetokenizeRequest) -> JSONResponse:
        """The text of ids."""
        return JSONResponse(
            await service.in_thread(lambda: detokenize(service, body), _log(request))
        )

    @app.head("/health", include_in_schema=False)
    @app.get("/health")
    async def health() -> JSONResponse:
        """200 while requests are taken."""
        if service.is_draining:
            raise ApiError(503, "the server is shutting down")
        if not service.engine.is_healthy:
            raise ApiError(503, "the device has failed; the server must be started again")
        return JSONResponse({"status": "ok"})

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Counts and times for Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    page = files("gemcut.engine.openai_api").joinpath("page.html").read_text()

    @app.head("/", include_in_schema=False)
    @app.get("/", include_in_schema=False)
    async def chat_page() -> HTMLResponse:
        """A page to chat on."""
        return HTMLResponse(page, headers={"Content-Security-Policy": OF_PAGE})


async def _answered(request: Request, answer: Answer, stream: bool | None) -> Response:
    """The answer's response, begun or whole; ClientLeft once nobody waits for it."""
    if not stream:
        whole = await unless_gone(request, answer.whole())
        return Response(whole, media_type="application/json")
    await unless_gone(request, answer.begin())
    return EventStream(answer)


class EventStream(StreamingResponse):
    """The events of an answer; once it ends, however it does, its slots are free."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer.stream(), media_type="text/event-stream", headers=EVENTS)
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:  # a client may leave between two events, while nothing waits for the engine
            await self._answer.generation.close()


async def _refuse(request: Request, error: Exception) -> Response:
    return request.app.state.service.explain(error, _log(request)).response()


def _log(request: Request) -> dict[str, Any]:
    return request.scope["gemcut.log"]


def _model(service: Service, name: str) -> dict[str, Any]:
    model = Model(id=name, object="model", created=service.started, owned_by="gemcut")
    return {**model.model_dump(), "max_model_len": service.engine.max_seq_len}
