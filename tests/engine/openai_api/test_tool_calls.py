"""Tool calls in an answer that streams: the same in pieces of any cut, and nothing is lost."""

import json
import sys
import time
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemcut.engine.openai_api.tool_calls import (
    MarkedCallParser,
    PlainCallParser,
    ToolCall,
    ToolCallParser,
)

FUNCTION_GEMMA = ("<start_function_call>", "<end_function_call>", "<escape>")
GEMMA4 = ("<|tool_call>", "<tool_call|>", '<|"|>')
TOOLS = {"add": ["a", "b"], "get_weather": ["city", "unit"], "my.tool-2": []}
FUNCTION_GEMMA_PIECES = (
    *FUNCTION_GEMMA, "call:", "call:f{", "}", "{", "[", "]", ",", ":", "a", "k:1", "true", '"',
    " ", "\n", "<", "<start_function", "<end_of_turn>", "<eos>", "é🙂",
)  # fmt: skip
PLAIN_PIECES = (
    '{"name": "add", "parameters": {"a": 1}}', "add(a=1)", "[add(1, 2)]", "add", "(", ")", "a=1",
    "{", "}", "[", "]", '"', "'", '"""', "\\", ",", ":", "```json\n", "```", "```tool_code\n", "`",
    " ", "\n", ";", "x", '{"name"', ': "add"', "get_weather(", "é🙂",
)  # fmt: skip


def parser_of(kind: str) -> ToolCallParser:
    if kind == "plain":
        return PlainCallParser(TOOLS)
    marks = FUNCTION_GEMMA if kind == "functiongemma" else GEMMA4
    return MarkedCallParser(*marks, hidden=["<end_of_turn>", "<eos>"])


def pieces_of(kind: str, parts: list[str]) -> list[str | ToolCall]:
    """What a parser gives for an answer in parts, with neighbouring content joined."""
    parser = parser_of(kind)
    pieces = [piece for part in parts for piece in parser.push(part)] + parser.end()
    joined: list[str | ToolCall] = []
    content: list[str] = []
    for piece in pieces:
        if isinstance(piece, str):
            assert piece
            content.append(piece)
            continue
        joined += ["".join(content)] * bool(content) + [piece]
        content = []
    return joined + ["".join(content)] * bool(content)


def calls_of(kind: str, text: str) -> list[tuple[str, object]]:
    """The calls of an answer that holds nothing else."""
    pieces = pieces_of(kind, [text])
    assert all(isinstance(piece, ToolCall) for piece in pieces), pieces
    return [
        (piece.name, json.loads(piece.arguments)) for piece in pieces if isinstance(piece, ToolCall)
    ]


def marked(kind: str, text: str) -> str:
    """A text with FunctionGemma's markers in the markers of another kind."""
    if kind == "gemma4":
        for ours, theirs in zip(FUNCTION_GEMMA, GEMMA4, strict=True):
            text = text.replace(ours, theirs)
    return text


@settings(max_examples=150, deadline=None)
@pytest.mark.parametrize("kind", ["functiongemma", "gemma4", "plain"])
@given(data=st.data())
def test_any_cut_gives_what_the_whole_text_gives(kind, data):
    vocabulary = PLAIN_PIECES if kind == "plain" else FUNCTION_GEMMA_PIECES
    text = marked(kind, "".join(data.draw(st.lists(st.sampled_from(vocabulary), max_size=14))))
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=8))
    ends = sorted({0, len(text), *cuts})
    whole = pieces_of(kind, [text])
    assert pieces_of(kind, [text[a:b] for a, b in pairwise(ends)]) == whole
    assert pieces_of(kind, list(text)) == whole
    if not any(isinstance(piece, ToolCall) for piece in whole):
        for hidden in () if kind == "plain" else ("<end_of_turn>", "<eos>"):
            text = text.replace(hidden, "")
        assert "".join(map(str, whole)) == text


@settings(max_examples=60, deadline=None)
@given(value=st.text(max_size=20), cut=st.integers(0, 60))
@pytest.mark.parametrize("kind", ["functiongemma", "gemma4", "plain"])
def test_any_text_passes_as_a_string(kind, value, cut):
    """Closing markers, braces, quotes, newlines and what looks like an escape included."""
    value = f"{value}}}<end_function_call>\n\\n\"'```{{[("
    if kind == "plain":
        text = json.dumps({"name": "add", "parameters": {"a": value}}, ensure_ascii=False)
    else:
        value = marked(kind, value)
        quote = GEMMA4[2] if kind == "gemma4" else FUNCTION_GEMMA[2]
        text = f"{marked(kind, '<start_function_call>')}call:add{{a:{quote}{value}{quote}}}"
        text += marked(kind, "<end_function_call>")
    [call] = pieces_of(kind, [text[:cut], text[cut:]])
    assert isinstance(call, ToolCall)
    assert json.loads(call.arguments) == {"a": value}
    call.arguments.encode()


@pytest.mark.parametrize("kind", ["functiongemma", "gemma4"])
def test_calls_with_text_before_between_and_after(kind):
    text = marked(
        kind,
        "One moment. <start_function_call>call:f{a:<escape>x<escape>,n:-3,r:2.5e3}"
        "<end_function_call>\n <start_function_call>call:g{}<end_function_call> and "
        "<start_function_call>call:no-tool.at_all{l:[1,[true,null]],o:{k:{}}}"
        "<end_function_call> done.<end_of_turn>",
    )
    assert pieces_of(kind, [text]) == [
        "One moment. ",
        ToolCall("f", '{"a": "x", "n": -3, "r": 2500.0}'),
        ToolCall("g", "{}"),
        " and ",
        ToolCall("no-tool.at_all", '{"l": [1, [true, null]], "o": {"k": {}}}'),
        " done.",
    ]


PLAIN = {
    "object": '{"name": "add", "parameters": {"a": 1}}',
    "arguments": '{"name": "add", "arguments": {"a": 1}}',
    "as-a-string": '{"name": "add", "arguments": "{\\"a\\": 1}"}',
    "as-a-message": '{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}',
    "list": '[{"name": "add", "parameters": {"a": 1}}]',
    "fence": '```json\n{"name": "add",\n "parameters": {"a": 1}}\n```',
    "tool_code": "```tool_code\nadd(a=1)\n```\n",
    "python": "add(a=1)",
    "python-list": "[add(a=1)]",
    "by-position": " add( 1 )",
    "python-dict": "{'name': 'add', 'parameters': {'a': 1}}",
}


@pytest.mark.parametrize("text", PLAIN.values(), ids=PLAIN)
def test_a_plain_call(text):
    assert calls_of("plain", text) == [("add", {"a": 1})]
    before, call, after = pieces_of("plain", [f"Wait:\n{text}\nso it is"])
    assert (before, call) == ("Wait:\n", ToolCall("add", '{"a": 1}'))
    assert str(after).strip() == "so it is"


def test_several_plain_calls():
    two = [("add", {"a": 1, "b": -2}), ("get_weather", {"city": 'Par"is', "unit": None})]
    for text in (
        "[add(a=1, b=-2), get_weather(city='Par\"is', unit=None)]",
        "```tool_code\nadd(1, -2)\nget_weather('Par\"is', unit=null)\n```",
        '{"name": "add", "parameters": {"a": 1, "b": -2}},\n'
        '{"name": "get_weather", "parameters": {"city": "Par\\"is", "unit": null}}',
        '```json\n[{"name": "add", "parameters": {"a": 1, "b": -2}}, {"name": "get_weather", '
        '"arguments": {"city": "Par\\u0022is", "unit": null}}]\n```',
    ):
        assert calls_of("plain", text) == two, text


CONTENT = {
    "functiongemma": [
        "plain <b>text</b> < 3",
        "<start_function_call>call:f{a:<escape>half built",
        "<start_function_call>call:f{a:1}",
        "<start_function_call>f(a=1)<end_function_call>",
        "<start_function_call>call:f{a}<end_function_call>",
        "<start_function_call>call:f{a:1}}<end_function_call>",
        "<start_function_call>call:f{a:[1}<end_function_call>",
        "<start_function_call>call:{a:1}<end_function_call>",
        f"<start_function_call>call:f{{a:{'[' * 70}{']' * 70}}}<end_function_call>",
        f"<start_function_call>call:f{{a:{'9' * 400}}}<end_function_call>",
        "<end_function_call> \n",
        " \n ",
    ],
    "plain": [
        '{"name": "nobody", "parameters": {}}',
        '{"name": "add", "description": "a declaration", "parameters": {"type": "object"}}',
        '{"name": "add", "parameters": {"a": NaN}}',
        '{"name": "add", "parameters": [1]}',
        'The call is {"name": "add", "parameters": {}}',
        '{"name": "add", "parameters": {"a": ',
        "add(a=open('x'))",
        "add(1, 2, 3)",
        "add(**{})",
        "add of two",
        "[1] first\n[2] second",
        "```python\nprint(1)\n```",
        "[add(a=1), 3]",
        "```json\n",
        "add('\\",
        "add(a=1e999)",
        f'{{"name": "add", "parameters": {{"a": {"[" * 70}{"]" * 70}}}}}',
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "text"), [(kind, text) for kind, texts in CONTENT.items() for text in texts]
)
def test_what_is_no_call_is_content(kind, text):
    assert pieces_of(kind, [text]) == [text]


CUT = {
    "plain": [
        'add(a="""b")c""") and\n add(\'\'\'(\'"\\\'\'\'\', "") .',
        '```json\n{"name": "add"} ,\n\n {"name": "add"}\n```\n ',
    ],
    "functiongemma": [
        " <start_function_call>call:f{a:<escape>}<end_function_call><escape>}<end_function_call>\n "
        "<start_function_call>call:g{}<end_function_call> <start_function_call",
    ],
}


@pytest.mark.parametrize(
    ("kind", "text"), [(kind, text) for kind, texts in CUT.items() for text in texts]
)
def test_every_cut_in_three(kind, text):
    """In three quotes, markers, and the spaces between two calls."""
    whole = pieces_of(kind, [text])
    assert sum(isinstance(piece, ToolCall) for piece in whole) == 2
    for first in range(len(text)):
        for second in range(first, min(first + 12, len(text))):
            assert pieces_of(kind, [text[:first], text[first:second], text[second:]]) == whole


def test_content_is_not_held_back_without_need():
    assert parser_of("functiongemma").push("a <b> c <end") == ["a <b> c "]
    assert parser_of("plain").push("Once upon a time, add(") == ["Once upon a time, add("]
    assert parser_of("plain").push("adding") == ["adding"]
    assert parser_of("plain").push("[1") == ["[1"]
    parser = parser_of("plain")
    assert parser.push("add") == []
    assert parser.push("(a=1) and") == [ToolCall("add", '{"a": 1}'), " and"]


def test_a_call_begun_anew_is_found():
    broken = "<start_function_call>call:f{a:1 "
    good = "<start_function_call>call:f{a:2}<end_function_call>"
    pieces = pieces_of("functiongemma", [broken + good])
    assert pieces == [broken, ToolCall("f", '{"a": 2}')]


def test_a_number_beyond_floats_ends_where_they_do():
    [(_, arguments)] = calls_of("plain", '{"name": "add", "parameters": {"a": -1e999}}')
    assert arguments == {"a": -sys.float_info.max}


def test_no_half_of_a_surrogate_pair_goes_out():
    [(_, arguments)] = calls_of("plain", '{"name": "add", "parameters": {"a": "\\ud800é"}}')
    assert arguments == {"a": "\ud800é"}
    [call] = pieces_of("plain", ['{"name": "add", "parameters": {"a": "\\ud800é"}}'])
    assert isinstance(call, ToolCall)
    call.arguments.encode()


N = 6_000
HOSTILE = {
    "braces": "{" * N,
    "objects": '{"":\n' * N,
    "lists": "[\n" * N,
    "calls": "add(" * N,
    "lines-of-calls": "add(\n" * N,
    "fences": "```\n" * N,
    "spaces": " \n" * N,
    "quotes": "add('" + "'" * N,
    "backslashes": "add('" + "\\" * N,
    "signs": f"add(a={'-' * N}1)",
    "sums": f"add(a={'1+' * N}1)",
    "number": f"add(a={'9' * N})",
    "markers": "<start_function_call>" * N,
    "heads": "<start_function_call>call:f{" * N,
    "angles": "<" * N,
    "nested": f"<start_function_call>call:f{{a:{'[' * N}<end_function_call>",
    "strings": f"<start_function_call>call:f{{{'<escape>' * N}<end_function_call>",
    "digits": f"<start_function_call>call:f{{a:{'9' * N}}}<end_function_call>",
    "keys": f"<start_function_call>call:f{{a{' ' * N}}}<end_function_call>",
    "commas": f"<start_function_call>call:f{{a:[{',' * N}]}}<end_function_call>",
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("kind", ["functiongemma", "plain"])
def test_hostile_text_costs_linear_time(kind, name):
    """A text eight times as long takes less than 32 times as long: a square would take 64."""
    text = HOSTILE[name]
    assert pieces_of(kind, [text]) == [text]

    def seconds(times: int) -> float:
        parser, begun = parser_of(kind), time.process_time()
        for _ in range(times):
            for at in range(0, len(text), 4):
                parser.push(text[at : at + 4])
        parser.end()
        return time.process_time() - begun

    assert min(seconds(8) for _ in range(2)) < 32 * max(min(seconds(1) for _ in range(3)), 1e-3)
