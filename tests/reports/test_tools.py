"""Functions as tools of a chat: what a template is told of them."""

from typing import Any, Literal, Optional, Union

import pytest
from engines import one_line
from transformers.utils.chat_template_utils import get_json_schema
from vocabulary import hugging_face_twin

from gemcut.engine.transformers_api.tokenizers.tokenizer import GemmaTokenizer
from gemcut.engine.transformers_api.tokenizers.tool_schemas import as_schemas

CHAT = [{"role": "user", "content": "The children"}]
TEMPLATE = "{{ bos_token }}{{ tools | tojson }}{{ messages[0].content }}"
HINTS = (
    int, bool, None, Any, list, tuple, dict, list[int], list[list[Any]], dict[str, list[int]],
    tuple[int, str], int | None, str | int, str | int | None, list[int] | str | None,
    Optional[int], Union[str, int],  # noqa: UP007, UP045
    Literal["a", "b"], Literal["a", 1, None], list[str | int],
)  # fmt: skip


def weather(city: str, unit: str = "C", *, days: list[int] | None = None) -> dict[str, float]:
    """
    The weather of a city,

    as it will be.

    Args:
        city: Its name: as written
          there.
        unit (str): A unit (choices: ["C", "F"])

        days (list of int, optional):
            Days from today.

    Returns:
        Degrees of each day
            of those asked for.

    Raises:
        KeyError: the city is unknown.
    """
    raise NotImplementedError


def silent() -> None:
    """Does nothing."""


class Home:
    def light(self, on: bool):
        """Switch the light.

        Args:
            on: whether it is on
        """


def hinted(hint):
    def tool(x):
        """A tool.

        Args:
            x: a value
        """

    tool.__annotations__ = {"x": hint}
    return tool


def test_a_function_is_the_schema_that_transformers_makes():
    tools = [weather, silent, Home().light]
    assert repr(as_schemas(tools)) == repr([get_json_schema(tool) for tool in tools])


@pytest.mark.parametrize("hint", HINTS, ids=str)
def test_each_type_hint(hint):
    tool = hinted(hint)
    assert repr(as_schemas([tool])) == repr([get_json_schema(tool)])


def test_a_template_reads_them(tokenizer_file):
    theirs = hugging_face_twin(tokenizer_file)
    schema = {"type": "function", "function": {"name": "f", "parameters": {}}}
    for tools in ([weather], [schema, weather], [schema], [], None):
        mine, other = (
            tokenizer.apply_chat_template(
                CHAT, tools=tools, chat_template=TEMPLATE, return_dict=False
            )
            for tokenizer in (GemmaTokenizer(tokenizer_file), theirs)
        )
        assert mine == other


def bare(x: int): ...


def unnamed(x: int):
    """A tool."""


def untyped(x):
    """A tool.

    Args:
        x: a value
    """


def unclear(x: int):
    """A tool.

    Args:
        x: a value (choices: [1, two])
    """


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ([bare], "tool bare has no docstring"),
        ([unnamed], "argument 'x' has no description under 'Args:'"),
        ([untyped], "argument 'x' has no type hint"),
        ([unclear], r"choices '\[1, two\]' are no JSON list"),
        ([hinted(set[int])], "has no JSON schema"),
        ([hinted(tuple[int, ...])], "has no JSON schema"),
        ([hinted(Literal[b"a"])], "has no JSON schema"),
        ([hinted("Missing")], "a type hint cannot be read: name 'Missing'"),
        (weather, "tools is a list of functions and JSON schemas"),
    ],
)
def test_one_line_says_what_is_missing(tools, message):
    with pytest.raises(ValueError, match=message) as error:
        as_schemas(tools)
    one_line(error)
