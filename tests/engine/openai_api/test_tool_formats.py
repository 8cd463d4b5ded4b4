"""Tool formats: which a checkpoint has, what its template gets, and grammars that force calls."""

import json
from random import Random

import pytest

from gemcut.engine.openai_api.tool_calls import ToolCall
from gemcut.engine.openai_api.tool_formats import choose_tool_format
from gemcut.tokenizer import chat_templates

pytest.importorskip("llguidance")
jsonschema = pytest.importorskip("jsonschema")

from tool_grammars import GrammarWalks, tool_tokenizer  # noqa: E402  (it needs llguidance)

# of each template, what `choose_tool_format` looks for
TEMPLATES = {
    "functiongemma": "{% if tools %}..{% endif %}{{ '<start_function_call>call:' + name + '{' }}",
    "gemma4": "{% if tools %}..{% endif %}{{ '<|tool_call>call:' + name + '{' }}",
    "json": "{{ messages[0]['content'] }}",
}
# Gemma 3's, for text
ALTERNATING = """
{%- set first = messages[0]['content'] + '\n\n' if messages[0]['role'] == 'system' else '' -%}
{%- for message in (messages[1:] if first else messages) -%}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}{{ raise_exception('roles') }}
{%- endif -%}[{{ message['role'] }}] {{ first if loop.first }}{{ message['content'] | trim }}
{% endfor -%}"""

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "unit": {"type": "string", "enum": ["c", "f", ""]},
        "days": {"type": "integer", "minimum": -3, "maximum": 17},
        "share": {"type": "number"},
    },
    "required": ["city", "days"],
}
NODE = {
    "type": "object",
    "properties": {
        "value": {
            "anyOf": [{"type": "integer"}, {"type": "string", "minLength": 2, "maxLength": 5}]
        },
        "kids": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2},
    },
    "required": ["value"],
}
SCHEMAS = {
    "flat": WEATHER,
    "nested": {
        "type": "object",
        "properties": {
            "list": {
                "type": "array",
                "items": {
                    "type": "object",
                    "properties": {"name": {"type": ["string", "null"]}, "on": {"type": "boolean"}},
                    "required": ["name"],
                },
                "minItems": 1,
                "maxItems": 3,
            },
            "counts": {"type": "object", "additionalProperties": {"type": "integer"}},
            "first name": {"const": {"a": [1, "x:}", None, True, 2.5]}},
            "maybe": {"type": ["null", "string"], "maxLength": 0},
        },
        "required": ["list", "first name"],
        "additionalProperties": False,
    },
    "recursive": {
        "type": "object",
        "properties": {"tree": {"$ref": "#/$defs/node"}},
        "required": ["tree"],
        "$defs": {"node": NODE},
    },
    "optional": {
        "type": "object",
        "properties": {letter: {"type": "integer"} for letter in "abcDEf"},
        "required": ["c"],
        "additionalProperties": {"type": "boolean"},
    },
    "odd": {
        "type": "object",
        "properties": {
            "a/b.*[": {"enum": ["\0\n\t\x7f\"\\/", "é🙂\u2028", {"<escape>": [], "k": {}}]},
            '"<|\"|>\\\n<escape>': {"allOf": [{"type": "null"}]},
        },
        "required": ["a/b.*[", '"<|\"|>\\\n<escape>'],
        "additionalProperties": True,
    },
    "anything": {"type": "object", "properties": {"v": {}, "w": {"items": {}}}, "required": ["v"]},
    "free": {"type": "object"},
    "empty": {"type": "object", "properties": {}},
    "no-schema": None,
}  # fmt: skip


def tools_of(**schemas) -> list[dict]:
    return [
        {"type": "function", "function": {"name": name, "description": f"does {name}", **given}}
        for name, schema in schemas.items()
        for given in [{} if schema is None else {"parameters": schema}]
    ]


@pytest.fixture(scope="module", params=[True, False], ids=["special", "ordinary"])
def walks(request):
    tokenizer = tool_tokenizer(special=request.param)
    return tokenizer, GrammarWalks(tokenizer)


@pytest.fixture(scope="module")
def tokenizer():
    return tool_tokenizer(special=True)


def test_the_template_and_the_vocabulary_choose(tokenizer, walks):
    for name, template in TEMPLATES.items():
        assert choose_tool_format(walks[0], template).name == name
        assert choose_tool_format(tokenizer, template).shows_special_tokens == (name != "json")
    assert choose_tool_format(tokenizer, None).name == "json"
    stops = [choose_tool_format(tokenizer, TEMPLATES[n]).stop_token_ids for n in TEMPLATES]
    responses = ("<start_function_response>", "<|tool_response>")
    assert stops == [*((tokenizer.id_of(one),) for one in responses), ()]


@pytest.mark.parametrize("name", SCHEMAS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_a_forced_call_satisfies_its_tool(walks, template, name):
    """Any way through the grammar is read as calls whose arguments jsonschema takes."""
    pytest.importorskip("gemcut.engine.requests.structured_outputs")
    tokenizer, grammar_walks = walks
    form, random = choose_tool_format(tokenizer, TEMPLATES[template]), Random(name)
    schemas = {"other-one": WEATHER, name: SCHEMAS[name]}
    tools = tools_of(**schemas)
    counts = set()
    for choice, parallel in (("required", True), ("required", False), (name, True)):
        params = form.constraint(tools, choice, parallel)
        for _ in range(6):
            text = grammar_walks.walk(params, random)
            parser = form.parser(tools)
            pieces = parser.push(text) + parser.end()
            assert pieces, text
            for piece in pieces:
                assert isinstance(piece, ToolCall), (text, pieces)
                assert piece.name == name or choice == "required"
                schema = schemas[piece.name] or {"maxProperties": 0}
                jsonschema.validate(json.loads(piece.arguments), schema)
            assert len(pieces) == 1 or (choice == "required" and parallel)
            counts.add(len(pieces))
    if name == "flat":
        assert len(counts) > 1


def test_a_choice_that_forces_nothing_has_no_grammar(tokenizer):
    form = choose_tool_format(tokenizer, None)
    assert form.constraint(tools_of(f=None), "auto", True) is None
    assert form.constraint(tools_of(f=None), "none", True) is None


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize(
    ("tools", "choice", "says"),
    [
        (tools_of(f=None), {"type": "function", "function": {"name": "g"}}, "'g'"),
        (tools_of(f=None), {"type": "function"}, "names no function"),
        ([], "required", "needs tools"),
    ],
    ids=["unknown", "unnamed", "no-tools"],
)
def test_a_bad_choice_is_one_line(tokenizer, template, tools, choice, says):
    with pytest.raises(ValueError, match=says) as caught:
        choose_tool_format(tokenizer, TEMPLATES[template]).constraint(tools, choice, True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("template", ["functiongemma", "gemma4"])
@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"properties": {"a": {"enum": []}}, "required": ["a"]}, "no arguments satisfy"),
        ({"properties": {"a": False}, "required": ["a"]}, "no arguments satisfy"),
        ({"properties": {"a": {"type": "string", "minLength": 3, "maxLength": 2}},
          "required": ["a"]}, "no arguments satisfy"),
        ({"properties": {"a": {"enum": ["<escape>", '<|"|>']}}, "required": ["a"],
          "additionalProperties": {"$ref": "#/nowhere"}}, "nothing at '#/nowhere'"),
        ({"properties": {"a": {"type": "array", "maxItems": -1}}}, "-1 for a size"),
    ],
    ids=["no-choice", "false", "sizes", "no-reference", "negative"],
)  # fmt: skip
def test_a_schema_that_cannot_be_met_is_one_line(tokenizer, template, schema, says):
    with pytest.raises(ValueError, match=says) as caught:
        choose_tool_format(tokenizer, TEMPLATES[template]).constraint(tools_of(f=schema), "f", True)
    assert str(caught.value).startswith("tool 'f': ")


def test_a_schema_that_nests_without_end_is_one_line(tokenizer):
    schema: dict = {"type": "string"}
    for _ in range(5000):
        schema = {"type": "array", "items": schema}
    for template in TEMPLATES.values():
        with pytest.raises(ValueError, match="nest"):
            choose_tool_format(tokenizer, template).constraint(
                tools_of(f={"properties": {"a": schema}}), "f", True
            )


TOOLS = tools_of(add={"type": "object", "properties": {"a": {"type": "integer"}}})
CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
MESSAGES = [
    {"role": "user", "content": "What is a?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL, {**CALL, "id": "2"}]},
    {"role": "tool", "tool_call_id": "1", "content": '{"sum": 1}'},
    {"role": "tool", "tool_call_id": "2", "content": [{"type": "text", "text": "one"}]},
    {"role": "user", "content": "And?"},
]
RESULTS = [
    {"name": "add", "response": {"sum": 1}},
    {"name": "add", "response": {"value": "one"}},
]


def test_function_gemma_gets_objects_and_the_line_that_turns_calls_on(tokenizer):
    form = choose_tool_format(tokenizer, TEMPLATES["functiongemma"])
    told, user, assistant, results, last = form.prepare(MESSAGES, TOOLS, "auto")
    assert told["role"] == "developer"
    assert "function calling" in told["content"]
    assert (user, last) == (MESSAGES[0], MESSAGES[4])
    assert [one["function"]["arguments"] for one in assistant["tool_calls"]] == [{"a": 1}] * 2
    assert results == {"role": "tool", "name": "add", "content": RESULTS}
    assert form.prepare(MESSAGES, TOOLS, "none")[0] == user
    system = {"role": "system", "content": "Be brief."}
    assert form.prepare([system, *MESSAGES], TOOLS, "auto")[:2] == [system, user]
    assert form.prepare(MESSAGES[:3], TOOLS, "none")[2]["content"] == RESULTS[0]


def test_gemma_4_gets_results_in_the_message_that_asked(tokenizer):
    form = choose_tool_format(tokenizer, TEMPLATES["gemma4"])
    user, assistant, last = form.prepare(MESSAGES, TOOLS, "auto")
    assert (user, last) == (MESSAGES[0], MESSAGES[4])
    assert assistant["tool_responses"] == RESULTS
    assert assistant["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 1}}


def test_other_templates_get_turns_that_alternate(tokenizer):
    """The model's own calls are written as it is told to write them, and as they are read back."""
    form = choose_tool_format(tokenizer, ALTERNATING)
    turns = form.prepare(MESSAGES, TOOLS, "auto")
    assert [turn["role"] for turn in turns] == ["user", "assistant", "user"]
    assert turns[0]["content"].endswith("\n\nWhat is a?")
    assert '"name": "add"' in turns[0]["content"]
    parser = form.parser(TOOLS)
    calls = parser.push(turns[1]["content"]) + parser.end()
    assert calls == [ToolCall("add", '{"a": 1}')] * 2
    assert '"sum": 1' in turns[2]["content"]
    assert turns[2]["content"].endswith("\n\nAnd?")
    chat_templates.render(ALTERNATING, turns)
    assert form.prepare(MESSAGES, TOOLS, "none")[0] == MESSAGES[0]


def test_instructions_stand_where_gemma_3_has_its_system_message(tokenizer):
    form = choose_tool_format(tokenizer, ALTERNATING)
    alone = form.prepare(MESSAGES[:1], TOOLS, "required")
    assert "MUST call at least one" in alone[0]["content"]
    system = {"role": "system", "content": "Be brief."}
    both = form.prepare([system, *MESSAGES[:1]], TOOLS, "add")
    assert both[0]["content"].startswith("Be brief.\n\nYou have access to functions")
    assert "MUST call the function add" in both[0]["content"]
    told = [{"role": "system", "content": alone[0]["content"].removesuffix("\n\nWhat is a?")}]
    texts = [chat_templates.render(ALTERNATING, m) for m in (alone, [*told, *MESSAGES[:1]])]
    assert texts[0] == texts[1]


def test_instructions_join_the_text_among_parts(tokenizer):
    """In the same part: templates strip each, and the blank line would be lost."""
    form = choose_tool_format(tokenizer, ALTERNATING)
    parts = [{"type": "text", "text": "What is a?"}, {"type": "text", "text": "Say."}]
    [turn] = form.prepare([{"role": "user", "content": parts}], TOOLS, "auto")
    assert turn["content"][0]["text"].endswith("]\n\nWhat is a?")
    assert turn["content"][1:] == parts[1:]


def test_a_template_that_declares_tools_gets_no_instructions(tokenizer):
    form = choose_tool_format(tokenizer, "{% for tool in tools %}{{ tool }}{% endfor %}")
    prepared = form.prepare(MESSAGES, TOOLS, "auto")
    assert [one["role"] for one in prepared] == [one["role"] for one in MESSAGES]
    assert prepared[1]["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    assert prepared[2] == {"role": "tool", "name": "add", "content": '{"sum": 1}'}


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "tool", "tool_call_id": "9", "content": "1"}],
        [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
        [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}],
        [{"role": "assistant", "tool_calls": [{"function": "f"}]}],
        [{"role": "assistant", "tool_calls": [3]}],
        [{"role": "assistant", "tool_calls": 3}],
    ],
    ids=["no-call", "no-json", "no-object", "no-function", "a-number", "no-list"],
)
@pytest.mark.parametrize("template", TEMPLATES)
def test_messages_that_are_none_are_one_line(tokenizer, template, messages):
    with pytest.raises(ValueError, match="message 0") as caught:
        choose_tool_format(tokenizer, TEMPLATES[template]).prepare(messages, TOOLS, "auto")
    assert "\n" not in str(caught.value)
