"""The fields of a request that completions and chats share, and the SamplingParams that they make.

Names are OpenAI's and, beyond them, vLLM's.  A field that is not known is accepted, as clients send
fields of their own, and named in the access log; one that would change the answer and cannot is
refused.
"""

from collections.abc import Mapping, Sized
from dataclasses import fields, replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from gemcut.engine.openai_api.described import ArrayOf, MapOf, StructuredOutputs, within
from gemcut.engine.openai_api.errors import ApiError
from gemcut.engine.requests.sampling_params import (
    INT64_MAX,
    LIMIT,
    MAX_DRAFT,
    MAX_MIN_TOKENS,
    MAX_N,
    SamplingParams,
)
from gemcut.engine.requests.structured_outputs import StructuredOutputsParams

# fields that would change the answer: what to do instead
REFUSED = {
    "suffix": "text is generated after a prompt alone",
    "functions": "use tools",
    "function_call": "use tool_choice",
    "audio": "the model answers in text",
    "web_search_options": "there is no search",
    "use_beam_search": "there is no beam search",
    "truncate_prompt_tokens": "a prompt is never cut",
    "logits_processors": "a server runs no code of its clients",
    "chat_template": "the server is started with one: --chat-template",
    "documents": "put them into a message",
    "prompt_embeds": "a prompt is text or token ids",
    "prompt_logprobs": "completions with echo and logprobs have them",
    "logprob_token_ids": "only the likeliest tokens are named",
    "return_token_ids": "/tokenize tells them",
    "return_tokens_as_token_ids": "tokens are named by their text",
    "return_prompt_text": "/tokenize tells the prompt's tokens",
    "cache_salt": "prefixes are shared by all clients",
    "repetition_detection": "use the penalties",
    **{
        f"guided_{kind}": f"use structured_outputs, with {kind}"
        for kind in ("json", "regex", "choice", "grammar")
    },
}
# entries of what is looked at again for each token
LONGEST = {"stop": 64, "stop_token_ids": 1024, "bad_words": 1024}
MOST_NAMED = 32  # fields of a request in the access log
SHARED = frozenset(field.name for field in fields(SamplingParams))


class StreamOptions(BaseModel):
    """What a stream says beside its text."""

    model_config = ConfigDict(extra="allow")
    include_usage: bool | None = False  # a last event with the numbers of tokens
    continuous_usage_stats: bool | None = False  # the numbers so far in each event


class JsonSchemaFormat(BaseModel):
    """A schema with a name, which nothing depends on."""

    model_config = ConfigDict(extra="allow")
    name: str | None = None
    json_schema: dict[str, Any] | bool | None = Field(None, alias="schema")


class ResponseFormat(BaseModel):
    """The form of an answer."""

    model_config = ConfigDict(extra="allow")
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class SamplingFields(BaseModel):
    """What completions and chats have in common; None is the model's own setting."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())
    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int | None, within(1, MAX_N)] = None
    temperature: Annotated[float | None, within(0, LIMIT)] = None
    top_p: Annotated[float | None, within(0, 1)] = None
    top_k: Annotated[int | None, within(-1, INT64_MAX)] = None
    min_p: Annotated[float | None, within(0, 1)] = None
    seed: Annotated[int | None, within(-INT64_MAX - 1, INT64_MAX)] = None
    stop: str | ArrayOf[str] | None = None
    stop_token_ids: ArrayOf[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int | None, within(0, MAX_MIN_TOKENS)] = None
    presence_penalty: Annotated[float | None, within(-LIMIT, LIMIT)] = None
    frequency_penalty: Annotated[float | None, within(-LIMIT, LIMIT)] = None
    repetition_penalty: Annotated[float | None, within(0, LIMIT)] = None
    logit_bias: MapOf[float] | None = None
    bad_words: ArrayOf[str] | None = None
    allowed_token_ids: ArrayOf[int] | None = None
    skip_special_tokens: bool | None = None
    prompt_lookup_num_tokens: Annotated[int | None, within(0, MAX_DRAFT)] = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None

    def check(self, max_n: int) -> list[str]:
        """The names of fields that are not known; ApiError for one that is refused."""
        unknown = dict(self.model_extra or {})
        for name, most in LONGEST.items():
            value = getattr(self, name)
            if isinstance(value, Sized) and not isinstance(value, str) and len(value) > most:
                raise ApiError(400, f"{name} has {len(value)} entries, above {most}", param=name)
        for name, value in unknown.items():
            if name in REFUSED and value not in (None, False, [], {}):
                raise ApiError(400, f"{name} is not supported: {REFUSED[name]}", param=name)
        if (best_of := unknown.get("best_of")) is not None and best_of != (self.n or 1):
            raise ApiError(400, "best_of is not supported: use n", param="best_of")
        if self.n is not None and self.n > max_n:
            raise ApiError(400, f"n {self.n} is more than the {max_n} of this server", param="n")
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options needs stream", param="stream_options")
        return _shown(sorted(unknown))

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def wants_running_usage(self) -> bool:
        """Whether each event of a stream has them."""
        return self.wants_usage and bool(self.stream_options.continuous_usage_stats)  # type: ignore

    def sampling_params(self, defaults: SamplingParams, **others: Any) -> SamplingParams:
        """The settings that are given, and these defaults for the others; ValueError names one."""
        given = {name: getattr(self, name) for name in SHARED & type(self).model_fields.keys()}
        given["structured_outputs"] = self.constraint()
        given = {name: value for name, value in (given | others).items() if value is not None}
        return replace(defaults, **given)

    @property
    def has_form(self) -> bool:
        """Whether the answer's text must be of a form."""
        form = self.response_format
        return self.structured_outputs is not None or (form is not None and form.type != "text")

    def constraint(self) -> StructuredOutputsParams | None:
        """What the answer's text must be, of the two ways to say it."""
        kind = "text" if self.response_format is None else self.response_format.type
        if self.structured_outputs is not None and kind != "text":
            raise ApiError(400, "response_format and structured_outputs are two forms of an answer")
        if self.structured_outputs is not None:
            return read_structured_outputs(self.structured_outputs)
        if kind == "json_object":
            return StructuredOutputsParams(json_object=True)
        if kind == "json_schema":
            stated = self.response_format.json_schema  # type: ignore[union-attr]
            if stated is None or stated.json_schema is None:
                where = "response_format.json_schema.schema"
                raise ApiError(400, f"{where} is missing", param=where)
            return schema_constraint(stated.json_schema)
        return None


def _shown(names: list[str]) -> list[str]:
    """Names for a line of the log, however many a client sends and however long they are."""
    shown = [name if len(name) <= 64 else f"{name[:61]}..." for name in names[:MOST_NAMED]]
    more = len(names) - len(shown)
    return [*shown, f"and {more} more"] if more else shown


def schema_constraint(schema: Mapping[str, Any] | bool) -> StructuredOutputsParams:
    """Text that is JSON by this schema; `true` is any."""
    if isinstance(schema, bool):
        if not schema:
            raise ApiError(400, "the schema false allows no text")
        schema = {}
    return StructuredOutputsParams(json=dict(schema))


def read_structured_outputs(given: Mapping[str, Any]) -> StructuredOutputsParams:
    """The constraint of vLLM's mapping."""
    known = {field.name for field in fields(StructuredOutputsParams)}
    for name in given:
        if name not in known:
            raise ApiError(
                400,
                f"structured_outputs has no {name[:40]!r}; it has {', '.join(sorted(known))}",
                param="structured_outputs",
            )
    return StructuredOutputsParams(**given)
