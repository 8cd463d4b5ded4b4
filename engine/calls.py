"""The calls of an Engine: prompts and conversations in, outputs or deltas out.

A call checks its prompts, makes a request of each and waits for its tokens (README.md has more):

    prompt -> request_builder -> worker -> step_loop -> scheduler -> runner -> steps
           -> pending_tokens -> sequence -> output_queues -> caller

Names are those of vLLM too: `prompts` is `prompt`, and `sampling_params` is `params`.
"""

import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

from gemcut.engine.requests.outputs import Delta, RequestOutput, ScoreOutput
from gemcut.engine.requests.prompts import ChatTemplate, Messages, Prompt
from gemcut.engine.requests.request_builder import RequestBuilder
from gemcut.engine.requests.sampling_params import SamplingParams
from gemcut.engine.requests.sequence import Request
from gemcut.engine.serving import output_queues
from gemcut.engine.serving.worker import Worker

if TYPE_CHECKING:
    from typing_extensions import Unpack

Params = SamplingParams | Sequence[SamplingParams] | None


class Calls:
    """The calls of an engine that has a worker and a request builder."""

    _builder: RequestBuilder
    _worker: Worker

    def __init__(self) -> None:
        self._sender = output_queues.AsyncioSender()

    @overload
    def generate(  # pyright: ignore[reportOverlappingOverload]  # a str is a Sequence[str]
        self,
        prompt: Prompt,
        params: Params = None,
        *,
        sampling_params: Params = None,
        use_tqdm: bool | None = None,
    ) -> RequestOutput: ...

    @overload
    def generate(
        self,
        prompt: Sequence[Prompt],
        params: Params = None,
        *,
        sampling_params: Params = None,
        use_tqdm: bool | None = None,
    ) -> list[RequestOutput]: ...

    @overload
    def generate(  # pyright: ignore[reportOverlappingOverload]
        self,
        *,
        prompts: Prompt,
        params: Params = None,
        sampling_params: Params = None,
        use_tqdm: bool | None = None,
    ) -> RequestOutput: ...

    @overload
    def generate(
        self,
        *,
        prompts: Sequence[Prompt],
        params: Params = None,
        sampling_params: Params = None,
        use_tqdm: bool | None = None,
    ) -> list[RequestOutput]: ...

    def generate(
        self, prompt=None, params=None, *, prompts=None, sampling_params=None, use_tqdm=None
    ):
        """The completions of a prompt, or of a list of prompts in their order.

        A prompt is a string or a list of token ids, or one of vLLM's mappings of these (prompts.py
        has all forms).  A string gets the BOS that Gemma needs, and literals such as
        "<start_of_turn>" in it are special tokens, as they are for Hugging Face's tokenizer: encode
        untrusted text as a chat, or with `tokenizer.encode`.  Lists take one SamplingParams for all
        or one for each, and show a progress bar on a terminal (`use_tqdm`).  A SamplingParams is
        taken as it is; without one the model's published settings hold.  Bad input raises
        ValueError before anything runs.
        """
        prompt = _either("prompt", prompt, "prompts", prompts)
        params = _either("params", params, "sampling_params", sampling_params)
        requests, is_batch = self._requests.batch(prompt, params)
        return self._outputs(requests, is_batch, use_tqdm)

    @overload
    async def agenerate(  # pyright: ignore[reportOverlappingOverload]
        self, prompt: Prompt, params: Params = None, *, sampling_params: Params = None
    ) -> RequestOutput: ...

    @overload
    async def agenerate(
        self, prompt: Sequence[Prompt], params: Params = None, *, sampling_params: Params = None
    ) -> list[RequestOutput]: ...

    async def agenerate(self, prompt=None, params=None, *, prompts=None, sampling_params=None):
        """`generate` in an event loop, which it does not block."""
        prompt = _either("prompt", prompt, "prompts", prompts)
        params = _either("params", params, "sampling_params", sampling_params)
        return await self._aoutputs(*self._requests.batch(prompt, params))

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        sampling_params: SamplingParams | None = None,
    ) -> Iterator[Delta]:
        """A prompt's completions token by token; joined, the texts are `generate`'s text.

        Bad input raises ValueError at the call.  An abandoned stream frees its slot.
        """
        params = _either("params", params, "sampling_params", sampling_params)
        return output_queues.stream(self._worker, self._requests.one(prompt, params))

    def astream(
        self,
        prompt: Prompt | Sequence[Prompt],
        params: Params = None,
        *,
        sampling_params: Params = None,
    ) -> output_queues.AsyncStream:
        """`stream` for `async for`, of one prompt or of a list of them.

        A delta's `request_id` is that of one of the stream's `requests`, which have the prompts'
        order.
        """
        params = _either("params", params, "sampling_params", sampling_params)
        return self._astream(self._requests.batch(prompt, params)[0])

    @overload
    def chat(
        self,
        messages: Messages,
        params: Params = None,
        *,
        stream: Literal[False] = False,
        sampling_params: Params = None,
        use_tqdm: bool | None = None,
        **template: "Unpack[ChatTemplate]",
    ) -> RequestOutput: ...

    @overload
    def chat(
        self,
        messages: Sequence[Messages],
        params: Params = None,
        *,
        stream: Literal[False] = False,
        sampling_params: Params = None,
        use_tqdm: bool | None = None,
        **template: "Unpack[ChatTemplate]",
    ) -> list[RequestOutput]: ...

    @overload
    def chat(
        self,
        messages: Messages,
        params: SamplingParams | None = None,
        *,
        stream: Literal[True],
        sampling_params: SamplingParams | None = None,
        **template: "Unpack[ChatTemplate]",
    ) -> Iterator[Delta]: ...

    def chat(
        self,
        messages,
        params=None,
        *,
        stream=False,
        sampling_params=None,
        use_tqdm=None,
        **template,
    ):
        """The model's answer to a conversation, as an output or, with `stream`, as deltas.

        messages: mappings with "role" ("user" or "model", also called "assistant", in turn) and
        "content", a string or parts of text.  A list of conversations gets a list of outputs.
        Gemma has no system role: it is refused, or with `merge_system` put before the first user
        content.  The answer ends at the end of the turn.  `ChatTemplate` lists the other options.
        """
        params = _either("params", params, "sampling_params", sampling_params)
        requests, is_batch = self._requests.chats(messages, params, **template)
        if not stream:
            return self._outputs(requests, is_batch, use_tqdm)
        return output_queues.stream(self._worker, _only(requests, is_batch))

    @overload
    async def achat(
        self,
        messages: Messages,
        params: Params = None,
        *,
        sampling_params: Params = None,
        **template: "Unpack[ChatTemplate]",
    ) -> RequestOutput: ...

    @overload
    async def achat(
        self,
        messages: Sequence[Messages],
        params: Params = None,
        *,
        sampling_params: Params = None,
        **template: "Unpack[ChatTemplate]",
    ) -> list[RequestOutput]: ...

    async def achat(self, messages, params=None, *, sampling_params=None, **template):
        """`chat` in an event loop, which it does not block."""
        params = _either("params", params, "sampling_params", sampling_params)
        return await self._aoutputs(*self._requests.chats(messages, params, **template))

    def achat_stream(
        self,
        messages: Messages,
        params: SamplingParams | None = None,
        *,
        sampling_params: SamplingParams | None = None,
        **template: "Unpack[ChatTemplate]",
    ) -> output_queues.AsyncStream:
        """`chat` with `stream`, for `async for`."""
        params = _either("params", params, "sampling_params", sampling_params)
        return self._astream([_only(*self._requests.chats(messages, params, **template))])

    @overload
    def score(  # pyright: ignore[reportOverlappingOverload]  # a str is a Sequence[str]
        self, texts: Prompt, *, start: int | Sequence[int] = 1, use_tqdm: bool | None = None
    ) -> ScoreOutput: ...

    @overload
    def score(
        self,
        texts: Sequence[Prompt],
        *,
        start: int | Sequence[int] = 1,
        use_tqdm: bool | None = None,
    ) -> list[ScoreOutput]: ...

    def score(self, texts, *, start: int | Sequence[int] = 1, use_tqdm=None):
        """Log-probabilities of a text's tokens, each given those before it; a list for a list.

        A string gets a BOS, which has no log-probability itself.  A text may have one token more
        than a slot holds.  start: the first token that is scored, or one for each text; those
        before it are context, which is reused where a slot holds it.
        """
        requests, is_batch = self._requests.scores(texts, start)
        output_queues.submit_and_wait(self._worker, requests, shows(use_tqdm, is_batch))
        return _unpacked([request.score() for request in requests], is_batch)

    async def ascore(
        self, texts: Prompt | Sequence[Prompt], *, start: int | Sequence[int] = 1
    ) -> ScoreOutput | list[ScoreOutput]:
        """`score` in an event loop, which it does not block."""
        requests, is_batch = self._requests.scores(texts, start)
        await output_queues.asubmit_and_wait(self._worker, self._sender, requests)
        return _unpacked([request.score() for request in requests], is_batch)

    @property
    def _requests(self) -> RequestBuilder:
        """The request builder; RuntimeError once the engine is closed."""
        self._worker.check_open()
        return self._builder

    def _astream(self, requests: list[Request]) -> output_queues.AsyncStream:
        return output_queues.AsyncStream(self._worker, self._sender, requests)

    def _outputs(self, requests: list[Request], is_batch: bool, use_tqdm: bool | None) -> Any:
        output_queues.submit_and_wait(self._worker, requests, shows(use_tqdm, is_batch))
        return _unpacked([request.output() for request in requests], is_batch)

    async def _aoutputs(self, requests: list[Request], is_batch: bool) -> Any:
        await output_queues.asubmit_and_wait(self._worker, self._sender, requests)
        return _unpacked([request.output() for request in requests], is_batch)


def _either(name: str, value: Any, other: str, theirs: Any) -> Any:
    """The one that is given of an argument's two names."""
    if value is not None and theirs is not None:
        raise ValueError(f"{name} and {other} are names of one argument: give one of them")
    return theirs if value is None else value


def _only(requests: list[Request], is_batch: bool) -> Request:
    """The request of a call that streams its answer."""
    if is_batch:
        raise ValueError("a stream takes one conversation, not a list of them")
    return requests[0]


def shows(use_tqdm: bool | None, is_batch: bool = True) -> bool:
    """Whether a call shows its progress; by default on a terminal, where there is more than one."""
    return is_batch and sys.stderr.isatty() if use_tqdm is None else use_tqdm


def _unpacked(outputs: list[Any], is_batch: bool) -> Any:
    return outputs if is_batch else outputs[0]
