"""StructuredOutputsParams and grammars: what is wrong with one is said in one line, and soon."""

import builtins
import json
import re
import sys
import threading
import time

import pytest
from engines import assert_serves, one_line

from gemcut.engine import Engine, SamplingParams, StructuredOutputsParams
from gemcut.engine.requests.grammars import GrammarCompiler

BAD_PARAMS = {
    "nothing": ({}, "takes one of json, regex, choice, grammar, json_object; none is given"),
    "two": ({"regex": "a", "choice": ["b"]}, "not regex and choice"),
    "no object": ({"json_object": False}, "none is given"),
    "a number": ({"json_object": 1}, "json_object 1 is neither True nor False"),
    "no text": ({"regex": 5}, "regex 5 is not a string"),
    "empty regex": ({"regex": ""}, "regex '' is not a string of at least one character"),
    "half a pair": ({"grammar": "start: \ud800"}, "half a surrogate pair"),
    "no list": ({"choice": "yes"}, "choice 'yes' is not a list"),
    "no choice": ({"choice": []}, "choice is empty"),
    "no texts": ({"choice": [1]}, "choice 1 is not a string"),
    "broken JSON": ({"json": '{"type": '}, "is no JSON schema"),
    "a list": ({"json": "[1]"}, "neither object nor boolean"),
    "another list": ({"json": [1]}, "json [1] is not a string"),
    "NaN": ({"json": '{"const": NaN}'}, "NaN is not JSON"),
    "NaN within": ({"json": {"const": float("nan")}}, "is no JSON schema"),
    "a set": ({"json": {"enum": {1}}}, "is no JSON schema"),
    "deep JSON": ({"json": '{"items":' * 100_000}, "json is nested too deeply"),
    "large": ({"regex": "a" * 100_001}, "regex has 100001 characters, above 100000"),
    "large choice": ({"choice": ["abc"] * 40_000}, "choice has 120000 characters"),
    "large schema": ({"json": {"const": "a" * 100_000}}, "json has 100013 characters"),
    "whitespace": ({"regex": "a", "whitespace_pattern": ""}, "whitespace_pattern ''"),
    "both": (
        {"json": {}, "whitespace_pattern": " ", "disable_any_whitespace": True},
        "whitespace_pattern has no place with disable_any_whitespace=True",
    ),
}


@pytest.mark.parametrize("name", BAD_PARAMS)
def test_bad_params(name):
    arguments, message = BAD_PARAMS[name]
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        StructuredOutputsParams(**arguments)
    one_line(error)


def test_a_request_takes_no_other_form():
    with pytest.raises(ValueError, match="is no StructuredOutputsParams") as error:
        SamplingParams(structured_outputs={"regex": "a"})
    one_line(error)
    params = SamplingParams(structured_outputs=StructuredOutputsParams(regex="a"))
    params.structured_outputs.choice = ["b"]  # an attribute is checked when it is used
    with pytest.raises(ValueError, match="not regex and choice"):
        params.clone()
    with pytest.raises(ValueError, match="prompt_lookup_num_tokens 3 cannot be combined") as error:
        SamplingParams(
            structured_outputs=StructuredOutputsParams(regex="a"), prompt_lookup_num_tokens=3
        )
    one_line(error)


def test_the_form_is_that_of_construction():
    choices = ["a"]
    params = SamplingParams(structured_outputs=StructuredOutputsParams(choice=choices))
    choices.append("b")
    assert params.structured_outputs.choice == ["a"]
    assert params.clone().structured_outputs is not params.structured_outputs


@pytest.fixture(scope="module")
def engine():
    pytest.importorskip("llguidance")
    with Engine.from_pretrained("demo", device="cpu", max_batch_size=2, max_seq_len=64) as engine:
        yield engine


def nested(depth: int) -> str:
    return '{"type":"array","items":' * depth + "{}" + "}" * depth


def chain(length: int) -> str:
    links = {f"d{i}": {"items": {"$ref": f"#/$defs/d{i + 1}"}} for i in range(length)}
    return json.dumps({"$ref": "#/$defs/d0", "$defs": links | {f"d{length}": {}}})


def tower(width: int, height: int) -> str:
    """Terminals of `width` others each: width ** height at the end, in 150 characters."""
    rows = [f"T{i}: " + " ".join([f"T{i + 1}"] * width) for i in range(height)]
    return "\n".join(["start: T0", *rows, f"T{height}: /.?/"])


def both(*schemas) -> dict:
    return {"allOf": list(schemas)}


EITHER = [{"anyOf": [{"properties": {f"{x}{i}": {}}} for x in "ab"]} for i in range(14)]
NEVER = "no text satisfies it"
REFUSED = {
    "open regex": ({"regex": "(a"}, "regex '(a' cannot be used: unclosed group"),
    "look-ahead": ({"regex": "(?=a)b"}, "look-around"),
    "deep regex": ({"regex": "(" * 9000 + ")" * 9000}, "cannot be used"),
    "empty regex": ({"regex": r"[^\x00-\U0010ffff]"}, NEVER),
    "long regex": ({"regex": ".?" * 5000}, "too much time or memory"),
    "broken grammar": ({"grammar": "start: (a"}, "grammar 'start: (a' cannot be used"),
    "unknown rule": ({"grammar": "start: foo"}, "unknown name"),
    "no start": ({"grammar": 'a: "b"'}, "cannot be used"),
    "no end": ({"grammar": 'start: start "a"'}, NEVER),
    "regex in a grammar": ({"grammar": 'start: "a"\n  | /(/'}, "unclosed group"),
    "contradiction": ({"grammar": "start: T\nT: /a/ & /b/"}, NEVER),
    "tower": ({"grammar": tower(20, 3)}, "too much time or memory"),
    "chain": (
        {"grammar": "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(5000))},
        "too much time or memory",
    ),
    "deep grammar": ({"grammar": "start: " + "(" * 40_000}, "cannot be used"),
    "deep GBNF": ({"grammar": "root ::= " + "(" * 40_000}, "cannot be used"),
    "false": ({"json": "false"}, "Unsatisfiable"),
    "no such type": ({"json": {"type": "text"}}, "Invalid type: text"),
    "no such reference": ({"json": {"$ref": "#/nowhere"}}, "nowhere"),
    "a reference elsewhere": ({"json": {"$ref": "http://127.0.0.1/a.json"}}, "cannot be used"),
    "itself": ({"json": {"$ref": "#"}}, NEVER),
    "unknown keyword": ({"json": {"not": {"type": "null"}}}, "not"),
    "two types": ({"json": both({"type": "string"}, {"type": "null"})}, "incompatible types"),
    "no number": ({"json": {"type": "integer", "minimum": 5, "maximum": 3}}, "greater than"),
    "no value": ({"json": {"enum": []}}, "Unsatisfiable"),
    "broken pattern": ({"json": {"type": "string", "pattern": "("}}, "unclosed group"),
    "deep schema": ({"json": nested(900)}, "recursion limit"),
    "chain of references": ({"json": chain(1900)}, "too much time or memory"),
    "2 ** 14": ({"json": both(*EITHER)}, "too large"),
    "regex of many": ({"regex": ".?" * 2000}, "too much time or memory"),
    "patterns at once": (
        {"json": both(*({"type": "string", "pattern": f"(.*a{i}.*)"} for i in range(60)))},
        "too much time or memory",
    ),
    "broken whitespace": ({"json": {}, "whitespace_pattern": "("}, "cannot be used"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_used_is_refused_in_one_line(engine, name):
    """Before anything runs.  What takes long does so in a process that ends after a second."""
    arguments, message = REFUSED[name]
    params = SamplingParams(structured_outputs=StructuredOutputsParams(**arguments), max_tokens=4)
    started = time.thread_time()
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        engine.stream("Once", params)
    assert time.thread_time() - started < 0.5
    one_line(error)
    assert_serves(engine)


def test_a_limit_of_a_step_ends_the_text_with_one_line(engine):
    form = StructuredOutputsParams(regex="(a?){5000}a{5000}")
    with pytest.raises(ValueError, match="cannot go on in its grammar: lexer error") as error:
        engine.generate("Once", SamplingParams(structured_outputs=form))
    one_line(error)
    assert_serves(engine)


def test_true_is_a_schema(engine):
    form = StructuredOutputsParams(json="true", disable_any_whitespace=True)
    params = SamplingParams(structured_outputs=form, max_tokens=20, temperature=0)
    assert engine.generate("Once", params).text[0] in '{["-0123456789tfn'


def test_an_engine_without_a_tokenizer_takes_no_grammar(folder):
    pytest.importorskip("llguidance")
    with Engine.from_pretrained(folder, device="cpu", skip_tokenizer_init=True) as engine:
        params = SamplingParams(structured_outputs=StructuredOutputsParams(regex="a"))
        with pytest.raises(ValueError, match="needs the engine's tokenizer") as error:
            engine.generate([2, 5], params)
        one_line(error)


def test_without_llguidance_its_name_is_told(tokenizer, monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.split(".")[0] == "llguidance":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "llguidance", raising=False)
    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ValueError, match="pip install llguidance") as error:
        GrammarCompiler(tokenizer, 520, [1]).compile(StructuredOutputsParams(regex="a"))
    one_line(error)


def test_many_threads_read_the_vocabulary_once(tokenizer, monkeypatch):
    llguidance = pytest.importorskip("llguidance")
    made, make = [], llguidance.LLTokenizer

    def slow(*args, **kwargs):
        made.append(time.sleep(0.05))
        return make(*args, **kwargs)

    monkeypatch.setattr(llguidance, "LLTokenizer", slow)
    compiler = GrammarCompiler(tokenizer, len(tokenizer) + 40, [1])
    grammars = []

    def compile_one(i: int) -> None:
        for j in range(40):  # more than are kept
            form = StructuredOutputsParams(regex=f"a{{{1 + (i + j) % 50}}}")
            grammars.append((1 + (i + j) % 50, compiler.compile(form).copy()))

    threads = [threading.Thread(target=compile_one, args=[i]) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert len(grammars) == 320
    a = tokenizer.id_of("a")
    for length, grammar in grammars:
        assert [grammar.take(a) for _ in range(length)] == [False] * (length - 1) + [True]
