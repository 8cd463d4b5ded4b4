"""An answer to a client: whole, or as a stream of events."""

import json
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from typing import Any

from pydantic import BaseModel

from gemcut.engine.openai_api.errors import ApiError
from gemcut.engine.openai_api.events import wire
from gemcut.engine.openai_api.generation import Generation
from gemcut.engine.openai_api.service import Service
from gemcut.engine.serving.output_queues import AsyncStream

DONE = "data: [DONE]\n\n"


class Answer(ABC):
    """One request; `log` is its line of the access log."""

    generation: Generation
    end = DONE  # what follows the last event
    compiles: bool  # whether a grammar is compiled for it

    def __init__(self, service: Service, log: dict[str, Any]) -> None:
        self.service, self.log = service, log

    @abstractmethod
    def build(self) -> AsyncStream:
        """The request for the engine, made in a thread; ValueError says what is wrong with it."""

    @abstractmethod
    def body(self) -> BaseModel:
        """The whole answer, once the generation has ended."""

    @abstractmethod
    def events(self) -> AsyncIterator[str]:
        """The answer as events, while it is generated."""

    async def begin(self) -> None:
        """Queue it, and wait for the first token: what fails before has a status of its own."""
        self.generation = await self.service.open(self.build, self.log, compiles=self.compiles)
        await self.generation.begin()

    async def whole(self) -> str:
        """The JSON of the whole answer."""
        await self.begin()
        await self.generation.finish()
        return wire(self.body())

    async def stream(self) -> AsyncIterator[str]:
        """The events, the last of them an error where one came between."""
        try:
            async for one in self.events():
                yield one
        except Exception as error:
            yield self.error_event(self.service.explain(error, self.log))
        yield self.end

    def error_event(self, error: ApiError) -> str:
        """An error as the last event."""
        return f"data: {json.dumps(error.body())}\n\n"
