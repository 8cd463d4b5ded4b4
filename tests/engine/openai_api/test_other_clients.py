"""Clients of other people, unchanged: LangChain's, the `llm` command line, pydantic classes."""

import json
import os
import subprocess
import sys
from typing import Literal

import openai
import pytest
from pydantic import BaseModel, ConfigDict, Field

pytest.importorskip("llguidance")

MESSAGES = [{"role": "user", "content": "Who is she?"}]


class Person(BaseModel):
    """A person, in few words."""

    model_config = ConfigDict(extra="forbid")
    name: str = Field(max_length=8)
    age: int = Field(ge=0, le=150)
    trade: Literal["smith", "baker"]
    friends: list[Literal["Ann", "Bob"]] = Field(max_length=2)


class Meet(BaseModel):
    """Call it."""

    model_config = ConfigDict(extra="forbid")
    who: Literal["Ann", "Bob"]
    times: int = Field(ge=0, le=9)


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
        yield client


def test_a_chat_is_parsed_into_a_class(client):
    answer = client.chat.completions.parse(model="demo", messages=MESSAGES, response_format=Person)
    parsed = answer.choices[0].message.parsed
    assert isinstance(parsed, Person)
    assert Person.model_validate_json(answer.choices[0].message.content) == parsed
    with client.chat.completions.stream(
        model="demo", messages=MESSAGES, response_format=Person, seed=3
    ) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert isinstance(final.choices[0].message.parsed, Person)


def test_a_response_is_parsed_into_a_class(client):
    answer = client.responses.parse(model="demo", input="Who is she?", text_format=Person)
    assert isinstance(answer.output_parsed, Person)
    assert answer.text.format.name == "Person"
    with client.responses.stream(model="demo", input="Who?", text_format=Person) as stream:
        final = stream.get_final_response()
    assert isinstance(final.output_parsed, Person)


def test_a_call_is_parsed_into_a_class(client):
    tool = openai.pydantic_function_tool(Meet, name="meet")
    choice = {"type": "function", "function": {"name": "meet"}}
    answer = client.chat.completions.parse(
        model="demo", messages=MESSAGES, tools=[tool], tool_choice=choice
    )
    (call,) = answer.choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, Meet)
    tool = {"type": "function", "name": "meet", **tool["function"]}
    answer = client.responses.parse(
        model="demo", input="Who?", tools=[tool], tool_choice="required", parallel_tool_calls=False
    )
    assert Meet.model_validate_json(answer.output[0].arguments)


class TestLangChain:
    """ChatOpenAI of langchain-openai, by both of OpenAI's APIs."""

    @pytest.fixture(params=[False, True], ids=["chats", "responses"])
    def model(self, server, request):
        langchain_openai = pytest.importorskip("langchain_openai")
        return langchain_openai.ChatOpenAI(
            model="demo",
            base_url=f"{server.url}/v1",
            api_key="any",
            temperature=0,
            max_tokens=300,
            max_retries=0,
            stream_usage=True,
            use_responses_api=request.param,
        )

    def test_invoke_and_stream(self, model):
        asked = [("system", "Be short."), ("human", "Who are you?")]
        whole = model.invoke(asked)
        assert whole.text
        assert whole.usage_metadata["output_tokens"] > 0
        chunks = list(model.stream(asked))
        assert len(chunks) > 2
        assert "".join(chunk.text for chunk in chunks) == whole.text
        assert (
            sum((c.usage_metadata or {}).get("output_tokens", 0) for c in chunks)
            == (whole.usage_metadata["output_tokens"])
        )
        assert [one.text for one in model.batch(["Who?", "Why?"])] == [
            model.invoke("Who?").text,
            model.invoke("Why?").text,
        ]

    @pytest.mark.parametrize(
        ("kind", "method"), [(Person, "json_schema"), (Meet, "function_calling")]
    )
    def test_structured_output(self, model, kind, method):
        bound = model.with_structured_output(kind, method=method, include_raw=True)
        found = bound.invoke("Who is she?")
        assert found["parsing_error"] is None
        assert isinstance(found["parsed"], kind)

    def test_tools(self, model):
        from langchain_core.messages import HumanMessage, ToolMessage

        bound = model.bind_tools([Meet], tool_choice="Meet")
        asked = HumanMessage("Who is she?")
        answer = bound.invoke([asked])
        (call,) = answer.tool_calls
        assert Meet.model_validate(call["args"])
        pieces = list(bound.stream([asked]))
        joined = pieces[0]
        for piece in pieces[1:]:
            joined += piece
        assert [one["args"] for one in joined.tool_calls] == [call["args"]]
        result = ToolMessage("She is known.", tool_call_id=call["id"])
        assert model.invoke([asked, answer, result]).text


def test_the_llm_command_line(server, tmp_path):
    pytest.importorskip("llm")
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: gemcut\n  model_name: demo\n  api_base: {server.url}/v1\n"
        f"  api_key_name: gemcut\n  supports_tools: true\n  supports_schema: true\n"
    )
    environment = {**os.environ, "LLM_USER_PATH": str(tmp_path), "LLM_LOAD_PLUGINS": ""}

    def ask(*arguments: str) -> str:
        command = [sys.executable, "-m", "llm", "-m", "gemcut", "--key", "any", *arguments]
        brief = ["-o", "max_tokens", "300", "-o", "temperature", "0"]
        done = subprocess.run(
            [*command, *brief], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    streamed, whole = ask("hello"), ask("hello", "--no-stream")
    assert streamed == whole != "\n"
    schema = json.dumps(Person.model_json_schema())
    assert Person.model_validate_json(ask("hello", "--schema", schema))
