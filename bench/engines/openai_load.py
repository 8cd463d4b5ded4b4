"""A trace of requests against one OpenAI-compatible server, by aiohttp in one asyncio loop.

aiohttp, since the client must not be what is measured: it spends about a quarter of httpx's CPU
time on a piece of a stream.
"""

import asyncio
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import aiohttp

from gemcut.bench.engines.serve_sim import Arrival
from gemcut.bench.engines.served import ERROR, LOST, REFUSED, Reply, check_reply
from gemcut.bench.measure.timing import clock
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
    text_of,
)

CONNECT_SECONDS = 10
PROBES = (8, 40)  # words of the two prompts that tell how many tokens a word is


@dataclass(frozen=True)
class Load:
    """How requests are made, of every server alike."""

    chat: bool  # /chat/completions, else /completions
    to_the_end: bool  # past an end of text, so that every server makes the same number of tokens
    settings: dict[str, Any]
    patience: float  # seconds without a byte, after which a stream counts as lost


@dataclass(frozen=True)
class Server:
    """A server, its model there, and its tokens of a prompt: `overhead` and those of each word."""

    name: str
    url: str
    model: str
    software: str  # as its responses say
    max_tokens: int | None  # of prompt and answer together, where it says
    overhead: float = 0.0
    tokens_per_word: float = 1.0
    counts_tokens: bool = False  # its usage does


class Client:
    """The connections of a run; use as an asynchronous context manager."""

    def __init__(self, load: Load, api_key: str | None) -> None:
        self.load = load
        timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=CONNECT_SECONDS, sock_read=load.patience
        )
        self._session = aiohttp.ClientSession(
            # as many at once as the trace wants; each its own, as users have them, and since one
            # that the server closes while it is taken again would look like a lost stream
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
            headers=headers(find_api_key(api_key, os.environ)),
            timeout=timeout,
            trust_env=True,
        )

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def find_server(self, name: str, url: str, model: str | None) -> Server:
        """The server at `url`, with its only model where none is named; ValueError if it fails."""
        try:
            async with self._session.get(f"{url}/models", allow_redirects=False) as response:
                body, status = await response.read(), response.status
                software = response.headers.get("Server", "")
        except (aiohttp.ClientError, OSError) as error:
            raise ValueError(f"{url}: {_reason(error)}") from None
        listed: list[dict[str, Any]] = []
        if status == 200:
            answer = read_object(body)
            names = model_names(answer)
            listed = [one for one in answer["data"] if isinstance(one, dict)]
            if model is None and len(names) > 1:
                shown = one_line(", ".join(names))
                raise ValueError(f"{url} has several models: name one with --model, of {shown}")
            model = names[0] if model is None else model
        elif model is None:
            raise ValueError(f"{url}/models: {status} {error_message(body)}".rstrip())
        own = next((one for one in listed if one.get("id") == model), {})
        longest = own.get("max_model_len")
        longest = longest if isinstance(longest, int) and longest > 1 else None
        return Server(name, url, model, one_line(software, 40), longest)

    async def measure_words(self, server: Server, words: Sequence[str]) -> Server:
        """The server with its tokens a word, as its usage tells; ValueError if it does not answer.

        These requests have log-probabilities, where the server gives them: each is a token that
        its usage must have counted.
        """
        found = []
        listed = {"logprobs": True} if self.load.chat else {"logprobs": 1}
        for count in PROBES:
            prompt = " ".join(words[:count])
            reply = await self.ask(server, prompt, Arrival(0.0, count, 4), listed)
            if reply.kind == REFUSED:
                reply = await self.ask(server, prompt, Arrival(0.0, count, 4))
            if reply.kind is not None:
                raise ValueError(f"{server.url}: {reply.detail}")
            found.append((reply.usage or {}).get("prompt_tokens"))
        if not all(isinstance(tokens, int) for tokens in found):
            return server
        few, many = found
        per_word = max(0.1, (many - few) / (PROBES[1] - PROBES[0]))
        overhead = max(0.0, few - per_word * PROBES[0])
        return replace(server, overhead=overhead, tokens_per_word=per_word, counts_tokens=True)

    async def replay(
        self,
        server: Server,
        trace: Sequence[Arrival],
        prompts: Sequence[str],
        concurrency: int | None,
    ) -> list[Reply]:
        """The replies to a trace, in its order.

        Requests arrive when the trace says, or, with `concurrency`, each as soon as one before it
        has ended.
        """
        replies = [Reply(arrival) for arrival in trace]
        waiting = iter(zip(replies, prompts, strict=True))
        started = clock()
        if concurrency is None:
            work = [
                self._serve(server, reply, prompt, started + reply.arrival.at)
                for reply, prompt in waiting
            ]
        else:
            work = [self._serve_all(server, waiting) for _ in range(min(concurrency, len(trace)))]
        await asyncio.gather(*work)
        return replies

    async def ask(
        self, server: Server, prompt: str, arrival: Arrival, more: dict[str, Any] | None = None
    ) -> Reply:
        """The reply to one request, made now."""
        reply = Reply(arrival)
        await self._serve(server, reply, prompt, None, more)
        return reply

    async def _serve_all(self, server: Server, waiting: Iterator[tuple[Reply, str]]) -> None:
        for reply, prompt in waiting:
            await self._serve(server, reply, prompt, None)

    async def _serve(
        self,
        server: Server,
        reply: Reply,
        prompt: str,
        due_at: float | None,
        more: dict[str, Any] | None = None,
    ) -> None:
        """Make one request when it is due, or now; its failure is noted, and nobody else's."""
        if due_at is not None:
            await asyncio.sleep(max(0.0, due_at - clock()))
        reply.sent_at = clock()
        reply.due_at = reply.sent_at if due_at is None else due_at
        path = "chat/completions" if self.load.chat else "completions"
        body = self._body(server, reply.arrival, prompt) | (more or {})
        try:
            async with self._session.post(
                f"{server.url}/{path}", json=body, allow_redirects=False
            ) as response:
                if response.status != 200:
                    message = error_message(await response.read())
                    reply.fail(REFUSED, f"{response.status} {message}".strip())
                elif response.content_type != "text/event-stream":
                    reply.fail(REFUSED, f"no stream of events: {one_line(response.content_type)}")
                else:
                    await _read(response.content, reply)
        except ValueError as error:  # an error event, or what is no event at all
            reply.fail(ERROR, str(error))
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            reply.fail(LOST, f"the connection broke off: {_reason(error)}")
        reply.ended_at = clock()
        if reply.kind is None:
            check_reply(reply, self.load.to_the_end)

    def _body(self, server: Server, arrival: Arrival, prompt: str) -> dict[str, Any]:
        asked = (
            {"messages": [{"role": "user", "content": prompt}]}
            if self.load.chat
            else {"prompt": prompt}
        )
        return {
            "model": server.model,
            **asked,
            "max_tokens": arrival.new_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
            **({"ignore_eos": True} if self.load.to_the_end else {}),
            **self.load.settings,
        }


async def _read(content: aiohttp.StreamReader, reply: Reply) -> None:
    """Note the events of a stream as they come; ValueError for an error event."""
    parser = EventParser()
    async for piece in content.iter_any():
        now = clock()
        for event in parser.feed(piece):
            if event.strip() == DONE:
                reply.done = True
                return
            chunk = read_chunk(event)
            if isinstance(chunk.get("usage"), dict):
                reply.usage = chunk["usage"]
            choice = first_choice(chunk)
            reply.counted += _tokens_listed(choice)
            if text_of(choice):
                reply.piece_times.append(now)
                reply.finished_at = now
            if choice.get("finish_reason"):
                reply.finish_reason, reply.finished_at = choice["finish_reason"], now


def _tokens_listed(choice: dict[str, Any]) -> int:
    """Tokens that a choice lists: by their ids, or with log-probabilities of either endpoint."""
    given = choice.get("logprobs")
    given = given if isinstance(given, dict) else {}
    lists = (choice.get("token_ids"), given.get("content"), given.get("tokens"))
    return next((len(one) for one in lists if isinstance(one, list)), 0)


def _reason(error: BaseException) -> str:
    return one_line(str(error)) or type(error).__name__
