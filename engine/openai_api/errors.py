"""Errors as OpenAI's clients expect them: a status, and {"error": {message, type, param, code}}."""

import re
from collections.abc import Sequence
from typing import Any

from fastapi import HTTPException
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException as RouteError
from starlette.responses import JSONResponse

from gemcut.engine.requests.request_builder import PromptTooLongError
from gemcut.engine.serving.step_loop import EngineClosedError, EngineFault
from gemcut.engine.serving.worker import QueueFullError, QueueTooSmallError

MAX_MESSAGE = 300  # characters
TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}
INTERNAL = "the server failed; its log has the request's id and the reason"


class ApiError(HTTPException):
    """An error for the client."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        self.message = _one_line(message)
        super().__init__(status, self.message)
        self.param, self.code = param and _one_line(param), code

    def body(self) -> dict[str, Any]:
        """The JSON object that OpenAI's clients read."""
        kind = TYPES.get(self.status_code, "invalid_request_error")
        named = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": named}

    def response(self) -> JSONResponse:
        headers = {"Retry-After": "1"} if self.status_code in (429, 503) else {}
        if self.status_code == 401:
            headers = {"WWW-Authenticate": "Bearer"}
        return JSONResponse(self.body(), self.status_code, headers)


def as_api_error(error: Exception) -> ApiError:
    """What a client is told of an error; of one that is no fault of its own, not the reason."""
    match error:
        case ApiError():
            return error
        case PromptTooLongError():
            return ApiError(400, str(error), code="context_length_exceeded")
        case RequestValidationError():
            return of_validation(error.errors())
        case ValidationError():  # of an answer: a ValueError too, and no fault of the client's
            return ApiError(500, INTERNAL)
        case ValueError():
            return ApiError(400, str(error))
        case QueueTooSmallError():  # no later try would help
            return ApiError(400, str(error))
        case QueueFullError():
            return ApiError(429, str(error), code="queue_full")
        case EngineFault():
            return ApiError(500, "the device has failed; the server must be started again")
        case EngineClosedError():
            return ApiError(503, "the server is shutting down")
        case RouteError():  # no such path, or not by this method
            return ApiError(error.status_code, str(error.detail))
        case _:
            return ApiError(500, INTERNAL)


def of_validation(problems: Sequence[Any]) -> ApiError:
    """The first thing that pydantic found in a body."""
    first = problems[0]
    where = [str(part) for part in first["loc"] if part != "body"]
    if first["type"].startswith("json_invalid"):
        return ApiError(400, f"the body is not JSON: {first.get('ctx', {}).get('error', '')}")
    if first["type"] == "model_attributes_type" and not where:
        return ApiError(400, "the body is no JSON object, or its Content-Type is not that of JSON")
    param = ".".join(where) or None
    what = re.sub(r"^Value error, ", "", first["msg"])
    return ApiError(400, f"{param}: {what}" if param else f"the body: {what}", param=param)


def _one_line(message: str) -> str:
    text = "".join(c if c.isprintable() else " " for c in " ".join(message.split()))
    return text if len(text) <= MAX_MESSAGE else f"{text[: MAX_MESSAGE - 3]}..."
