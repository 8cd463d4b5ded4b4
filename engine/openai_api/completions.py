"""/v1/completions: text that goes on from a prompt, or from each of a batch."""

import time
from collections.abc import AsyncIterator
from typing import Annotated, Any

from openai.types import Completion, CompletionChoice
from openai.types.completion_choice import Logprobs

from gemcut.engine.openai_api.answer import Answer
from gemcut.engine.openai_api.described import ArrayOf, within
from gemcut.engine.openai_api.errors import ApiError
from gemcut.engine.openai_api.events import TextEvents, event
from gemcut.engine.openai_api.fields import SamplingFields
from gemcut.engine.openai_api.logprobs import (
    MAX_TOP_LOGPROBS,
    check_top_logprobs,
    completion_logprobs,
)
from gemcut.engine.openai_api.service import Service
from gemcut.engine.requests.outputs import TokenLogprobs
from gemcut.engine.requests.prompts import split_prompts
from gemcut.engine.requests.sampling_params import INT64_MAX
from gemcut.engine.serving.output_queues import AsyncStream

MAX_TOKENS = 16  # OpenAI's default


class CompletionRequest(SamplingFields):
    """The body of a request; a prompt is text or token ids."""

    prompt: str | ArrayOf[int] | ArrayOf[str] | ArrayOf[ArrayOf[int]]
    max_tokens: Annotated[int | None, within(0, INT64_MAX)] = None
    echo: bool | None = None  # the prompt goes before the text, and with logprobs its tokens too
    logprobs: Annotated[int | None, within(0, MAX_TOP_LOGPROBS)] = None  # likeliest in each place


class CompletionAnswer(Answer):
    """One request for completions."""

    def __init__(self, service: Service, request: CompletionRequest, log: dict[str, Any]) -> None:
        super().__init__(service, log)
        self._request = request
        self._id, self._created = f"cmpl-{log['id']}", int(time.time())
        self._model = service.model_name(request.model)
        self._ends: dict[int, int] = {}  # characters of each choice's tokens so far
        self.compiles = request.has_form
        log["ignored"] = request.check(service.settings.max_n)
        check_top_logprobs(request.logprobs, "logprobs")
        if (request.model_extra or {}).get("add_special_tokens") is False:
            what = "a text begins with BOS: send token ids for a prompt without"
            raise ApiError(400, f"add_special_tokens: {what}", param="add_special_tokens")
        if request.max_tokens == 0 and not request.echo:
            raise ApiError(400, "max_tokens 0 needs echo", param="max_tokens")

    def build(self) -> AsyncStream:
        request, service = self._request, self.service
        prompts, is_batch = split_prompts(request.prompt)
        if is_batch and len(prompts) > service.settings.max_prompts:
            most = service.settings.max_prompts
            raise ApiError(
                400,
                f"{len(prompts)} prompts are more than the {most} of this server",
                param="prompt",
            )
        most = MAX_TOKENS if request.max_tokens is None else request.max_tokens
        params = request.sampling_params(
            service.defaults,
            max_tokens=most or 1,  # 0: the prompt alone is looked at
            logprobs=request.logprobs,
            prompt_logprobs=request.logprobs if request.echo else None,
        )
        return service.engine.astream(request.prompt, params)

    def body(self) -> Completion:
        choices = [
            self._choice(index, one.text, one.token_ids, one.logprobs, one.finish_reason)
            for index, one in self.generation.outputs()
        ]
        return self._completion(choices, usage=self.generation.usage())

    async def events(self) -> AsyncIterator[str]:
        request = self._request
        is_plain = request.logprobs is None and not request.echo
        is_plain = is_plain and not request.wants_running_usage
        write = TextEvents(lambda index, text: event(self._completion([_piece(index, text)])))
        async for index, one in self.generation.deltas():
            if is_plain and one.finish_reason is None:
                if one.text:
                    yield write(index, one.text)
                continue
            choice = self._choice(index, one.text, one.token_ids, one.logprobs, one.finish_reason)
            if choice.text or choice.finish_reason or choice.logprobs:
                running = {"usage": self.generation.usage()} if request.wants_running_usage else {}
                yield event(self._completion([choice], **running))
        if request.wants_usage:
            yield event(self._completion([], usage=self.generation.usage()))

    def _completion(self, choices: list[CompletionChoice], **usage: Any) -> Completion:
        return Completion(
            id=self._id,
            object="text_completion",
            created=self._created,
            model=self._model,
            choices=choices,
            **usage,
        )

    def _choice(
        self,
        index: int,
        text: str,
        token_ids: list[int],
        logprobs: list[TokenLogprobs] | None,
        finish_reason: str | None,
    ) -> CompletionChoice:
        """The next piece of a choice; the prompt is before the first where that is asked for."""
        request, tokenizer = self._request, self.service.tokenizer
        is_first = index not in self._ends
        start = self._ends.setdefault(index, 0)
        entries: list[TokenLogprobs | None] = [*(logprobs or [])]
        if request.max_tokens == 0:
            text, token_ids, entries = "", [], []
            finish_reason = finish_reason and "length"
        if request.echo and is_first:
            prompt = self.generation.prompt_of(index)
            asked = prompt.sequences[0]
            text = (prompt.prompt or tokenizer.decode(asked.prompt_ids)) + text
            token_ids = asked.prompt_ids + token_ids
            entries = [*(asked.prompt_logprobs or []), *entries]
        named: Logprobs | None = None
        if request.logprobs is not None and token_ids:
            named, self._ends[index] = completion_logprobs(
                tokenizer, token_ids, entries, request.logprobs, start
            )
        return _piece(index, text, named, finish_reason)


def _piece(
    index: int, text: str, logprobs: Logprobs | None = None, finish_reason: str | None = None
) -> CompletionChoice:
    # `construct`: the type has no None for the reason of a piece that is not the last
    return CompletionChoice.construct(
        index=index, text=text, logprobs=logprobs, finish_reason=finish_reason
    )
