"""One request of a client under way: its deltas by choice, its times and its numbers of tokens."""

import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

from openai.types import CompletionUsage
from openai.types.completion_usage import PromptTokensDetails

from gemcut.engine.openai_api.server_metrics import ServerMetrics
from gemcut.engine.requests.outputs import CompletionOutput, Delta
from gemcut.engine.requests.sequence import Request
from gemcut.engine.serving.output_queues import AsyncStream


class Generation:
    """The completions of one or several prompts; choice i of OpenAI is prompt i // n's i % n."""

    def __init__(self, stream: AsyncStream, metrics: ServerMetrics, log: dict[str, Any]) -> None:
        """Queue it; QueueFullError where too many wait.  `log` is the line of the access log."""
        self._stream, self._metrics, self._log = stream, metrics, log
        self._n = len(stream.requests[0].sequences)
        self._places = {one.request_id: place for place, one in enumerate(stream.requests)}
        self._started = time.perf_counter()
        self._last: dict[int, float] = {}  # when a choice got its last token
        self._told = 0  # tokens of the deltas so far; the engine may be further
        self._first: list[Delta] = []  # a delta that `begin` has taken
        stream.start()

    async def begin(self) -> None:
        """Wait for the first delta, so that an error before it is still an answer of its own."""
        async for delta in self._stream:
            self._first = [delta]
            return

    def prompt_of(self, choice: int) -> Request:
        """The request that a choice belongs to."""
        return self._stream.requests[choice // self._n]

    def outputs(self) -> Iterator[tuple[int, CompletionOutput]]:
        """Each choice, and what it has become."""
        for place, request in enumerate(self._stream.requests):
            for sequence in request.sequences:
                yield place * self._n + sequence.index, sequence.output()

    async def deltas(self) -> AsyncIterator[tuple[int, Delta]]:
        """Each choice's deltas, as they come."""
        try:
            async for delta in self._all():
                choice = self._places[delta.request_id] * self._n + delta.index
                if delta.token_ids:
                    self._told += len(delta.token_ids)
                    self._observe(choice)
                yield choice, delta
        finally:
            await self.close()

    async def close(self) -> None:
        """End the choices that run; their slots are free before the next step."""
        await self._stream.aclose()
        self._write_log()

    async def finish(self) -> None:
        """Wait for the end of all choices."""
        async for _ in self.deltas():
            pass

    async def _all(self) -> AsyncIterator[Delta]:
        while self._first:
            yield self._first.pop()
        async for delta in self._stream:
            yield delta

    def usage(self) -> CompletionUsage:
        """Numbers of tokens so far; a prompt counts once, whatever its choices."""
        prompt, cached, completion = self._counts()
        return CompletionUsage(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=cached),
        )

    def _counts(self) -> tuple[int, int, int]:
        firsts = [request.sequences[0] for request in self._stream.requests]
        asked = sum(len(first.prompt_ids) for first in firsts)
        return asked, sum(first.reused for first in firsts), self._told

    def _observe(self, choice: int) -> None:
        now = time.perf_counter()
        if (before := self._last.get(choice)) is not None:
            self._metrics.time_between_tokens.observe(now - before)
        else:
            if not self._last:
                self._log["first_token_ms"] = round(1e3 * (now - self._started), 1)
            self._metrics.time_to_first_token.observe(now - self._started)
        self._last[choice] = now

    def _write_log(self) -> None:
        prompt, cached, completion = self._counts()
        self._log |= {"prompt_tokens": prompt, "cached_tokens": cached}
        self._log["completion_tokens"] = completion
