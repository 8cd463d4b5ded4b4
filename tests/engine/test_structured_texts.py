"""Structured outputs: every text has the form that was asked for, and no other text changes."""

import asyncio
import json
import os
import re
import select
import signal
import threading
from dataclasses import replace

import pytest
import torch
from engines import dictate, one_line, run_as_on_a_gpu

from gemcut.engine import Engine, SamplingParams, StructuredOutputsParams
from gemcut.engine.requests import grammars
from gemcut.engine.requests.grammars import MaskFiller
from gemcut.tokenizer import Tokenizer

pytest.importorskip("llguidance")
jsonschema = pytest.importorskip("jsonschema")


def an_object(**properties):
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


STREET = an_object(
    street={"type": "string", "maxLength": 10},
    number={"type": "integer", "minimum": 1, "maximum": 999},
)
BRANCHES = {"type": "array", "items": {"$ref": "#"}, "minItems": 1, "maxItems": 3}
SCHEMAS = {
    "nested": an_object(
        person=an_object(name={"type": "string", "pattern": "^[A-Z][a-z]{1,9}$"}, home=STREET),
        is_new={"type": "boolean"},
    ),
    "arrays": {
        "type": "array",
        "items": {"type": "array", "items": {"type": "integer", "minimum": -99, "maximum": 99},
                  "maxItems": 3},
        "minItems": 2,
        "maxItems": 3,
    },
    "enums": an_object(
        color={"enum": ["red", "green", "dark green", None, 3]},
        size={"anyOf": [{"const": "XL"}, {"type": "null"}]},
    ),
    "unicode": an_object(
        größe={"enum": ["ä", "ß", "日本", "🙂", 'e\u0301 "\\']},
        名前={"type": "string", "minLength": 1, "maxLength": 8},
    ),
    "recursion": {"anyOf": [{"enum": ["leaf", "twig"]}, BRANCHES]},
}  # fmt: skip
WORDS = ["It", "The", "There", "Once", "A", "was", "is", "and", "dark"]
PROMPTS = [f"{a} {b}" for a in WORDS[:5] for b in WORDS[5:9]]
# the more brackets, the less likely is the next: a tree has an end
SAMPLED = SamplingParams(temperature=1.0, frequency_penalty=2.0, max_tokens=150)
GREEDY = replace(SAMPLED, temperature=0)
WORD = StructuredOutputsParams(regex="[a-z]{3,9}")


def structured(params=SAMPLED, **form):
    return replace(params, structured_outputs=StructuredOutputsParams(**form))


def spellings(tokenizer) -> list[bytes]:
    return [tokenizer.token_bytes(i) for i in range(len(tokenizer))]


@pytest.fixture(scope="module")
def engine():
    with Engine.from_pretrained("demo", device="cpu", dtype="float32", max_seq_len=256) as engine:
        yield engine


@pytest.fixture(scope="module")
def late():
    """The same, with steps as on a GPU: replayed, and read when the next one is under way."""
    with Engine.from_pretrained("demo", device="cpu", dtype="float32", max_seq_len=256) as engine:
        run_as_on_a_gpu(engine)
        yield engine


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_document_is_of_its_schema(engine, name):
    """Of five schemas 40 documents each: 20 greedy ones, and 20 that are drawn."""
    schema = SCHEMAS[name]
    texts = []
    for seed, params in ((None, GREEDY), (5, SAMPLED)):
        params = structured(replace(params, seed=seed), json=schema, disable_any_whitespace=True)
        for output in engine.generate(PROMPTS, params):
            assert output.outputs[0].finish_reason == "stop"
            jsonschema.Draft202012Validator(schema).validate(json.loads(output.text))
            texts.append(output.text)
    assert len(texts) == 40
    assert len(set(texts)) >= 3, "the model has no choice"


def test_whitespace_is_as_it_was_asked_for(engine):
    schema = json.dumps(SCHEMAS["arrays"])
    for form, whitespace in (
        ({"disable_any_whitespace": True}, r""),
        ({"whitespace_pattern": r" {1,2}"}, r"( {1,2})?"),
    ):
        output = engine.generate("Once", structured(GREEDY, json=schema, **form))
        parts = re.split(r"-?\d+|[\[\],]", output.text)
        assert json.loads(output.text)
        assert all(re.fullmatch(whitespace, part) for part in parts), output.text


def test_whitespace_of_json_ends_where_a_model_would_never_end_it(engine):
    blanks = {i: 99.0 for i, text in enumerate(spellings(engine.tokenizer)) if text.isspace()}
    params = replace(GREEDY, logit_bias=blanks, max_tokens=240)
    output = engine.generate("Once", structured(params, json=an_object(a={"const": 1})))
    assert json.loads(output.text) == {"a": 1}
    parts = re.findall(r"\s+", output.text)
    assert len(parts) == 4  # beside braces, name and colon
    assert all(re.fullmatch(r" |\n[ \t]{0,16}", part) for part in parts), output.text


def test_json_object(engine):
    ends = {i: 9.0 for i, text in enumerate(spellings(engine.tokenizer)) if text in b'"}]'}
    params = structured(replace(SAMPLED, seed=1, logit_bias=ends), json_object=True)
    outputs = engine.generate(PROMPTS[:8], replace(params, max_tokens=60))
    ended = [output.text for output in outputs if output.outputs[0].finish_reason == "stop"]
    assert ended
    assert all(isinstance(json.loads(text), dict) for text in ended)
    assert all(output.text.startswith("{") for output in outputs)


def test_regex(engine):
    form = {"regex": r"(\d{3}-)?[A-Z][a-zé]{2,6} ([α-ω]|🙂){2}"}
    texts = [o.text for o in engine.generate(PROMPTS, structured(replace(SAMPLED, seed=1), **form))]
    assert len(set(texts)) > 5
    for text in texts:
        assert re.fullmatch(r"(\d{3}-)?[A-Z][a-zé]{2,6} ([α-ω]|🙂){2}", text), text


def test_choice(engine):
    choices = ["yes", "yes sir", 'n"o\\', "日本\n", "perhaps"]
    params = structured(replace(SAMPLED, seed=3, frequency_penalty=0), choice=choices)
    texts = {o.text for o in engine.generate(PROMPTS * 4, params)}
    assert texts <= set(choices)
    assert len(texts) > 2


@pytest.mark.parametrize(
    "grammar",
    ['start: "a" b\nb: /[0-9]{1,3}/ | "(" b ")"', 'root ::= "a" b\nb ::= [0-9]{1,3} | "(" b ")"'],
    ids=["lark", "gbnf"],
)
def test_grammar(engine, grammar):
    texts = [o.text for o in engine.generate(PROMPTS, structured(grammar=grammar))]
    for text in texts:
        assert re.fullmatch(r"a\(*\d{1,3}\)*", text), text
        assert text.count("(") == text.count(")")


def test_a_grammar_may_name_special_tokens(engine):
    grammar = 'start: "a" <start_of_turn> "model" <end_of_turn>'
    params = structured(replace(GREEDY, skip_special_tokens=False), grammar=grammar)
    output = engine.generate("It was", params)
    assert (output.text, output.finish_reason) == ("a<start_of_turn>model", "stop")
    assert output.token_ids[-1] == engine.tokenizer.end_of_turn_id  # it ends each text


def test_no_marker_is_text(engine):
    """A special token spelled like text would vanish from it."""
    params = structured(regex="<(start|end)_of_turn>")
    markers = engine.tokenizer.marker_ids
    for output in engine.generate(PROMPTS, params):
        assert output.text in ("<start_of_turn>", "<end_of_turn>")
        assert not markers & set(output.token_ids)


def test_completions_of_one_prompt_go_their_own_ways(engine):
    params = structured(replace(SAMPLED, n=3, seed=7), regex="[a-z]{4,12}")
    output = engine.generate("Once", params)
    assert len({one.text for one in output.outputs}) == 3
    for index, one in enumerate(output.outputs):
        assert re.fullmatch("[a-z]{4,12}", one.text)
        again = engine.generate("Once", replace(params, n=1, seed=7 + index))
        assert again.text == one.text


def test_streams(engine):
    form = {"json": SCHEMAS["unicode"], "disable_any_whitespace": True}
    params = structured(replace(SAMPLED, seed=2), **form)
    whole = engine.generate("Once", params)
    deltas = list(engine.stream("Once", params))
    assert "".join(delta.text for delta in deltas) == whole.text
    assert [delta.finish_reason for delta in deltas] == [None] * (len(deltas) - 1) + ["stop"]

    async def texts():
        return [delta.text async for delta in engine.astream("Once", params)]

    assert "".join(asyncio.run(texts())) == whole.text


def test_a_chat_ends_with_its_turn_or_its_grammar(engine):
    params = structured(replace(GREEDY, max_tokens=12), regex="[a-z ]*")
    output = engine.chat([{"role": "user", "content": "Hello"}], params)
    assert re.fullmatch("[a-z ]*", output.text)


def test_an_end_is_allowed_where_the_grammar_may_end_and_nowhere_else(engine):
    end = engine.tokenizer.eos_id
    eager = replace(GREEDY, logit_bias={end: 1e4})
    output = engine.generate("Once", structured(eager, regex="[a-z]{3}[0-9]*"))
    assert re.fullmatch("[a-z]{3}", output.text)  # a token of more letters is none of its ways
    assert (output.token_ids[-1], output.finish_reason, output.outputs[0].stop_reason) == (
        end, "stop", None)  # fmt: skip
    # what may end does, in spite of ignore_eos; what is complete ends without an end token
    stubborn = replace(eager, ignore_eos=True)
    assert engine.generate("Once", structured(stubborn, regex="[a-z]{3}[0-9]*")).text == output.text
    output = engine.generate("Once", structured(replace(GREEDY, ignore_eos=True), choice=["abc"]))
    assert (output.text, output.finish_reason) == ("abc", "stop")
    assert output.token_ids[-1] != end


def test_min_tokens_hold_as_long_as_the_grammar_lets_them(engine):
    end = engine.tokenizer.eos_id
    eager = replace(GREEDY, logit_bias={end: 1e4}, min_tokens=6, frequency_penalty=0)
    output = engine.generate("Once", structured(eager, regex="[0-9]*"))
    assert len(output.token_ids) == 7
    output = engine.generate("Once", structured(eager, regex="[0-9]{2}"))
    assert (len(output.text), output.finish_reason) == (2, "stop")


def test_a_stop_string_ends_a_text_within_its_grammar(engine):
    params = structured(GREEDY, grammar='start: "ab" /[0-9]{3}/ "STOP" /[a-z]{5}/')
    output = engine.generate("Once", replace(params, stop=["ST"]))
    assert re.fullmatch(r"ab\d{3}", output.text)
    assert (output.finish_reason, output.outputs[0].stop_reason) == ("stop", "ST")
    output = engine.generate("Once", replace(params, max_tokens=2))
    assert output.finish_reason == "length"


def test_other_settings_choose_within_the_grammar(engine):
    a = {i: -torch.inf for i, text in enumerate(spellings(engine.tokenizer)) if b"a" in text}
    b, c = engine.tokenizer.id_of("b"), engine.tokenizer.id_of("c")
    params = structured(replace(GREEDY, frequency_penalty=0), regex="[abc]{5}")
    assert re.fullmatch("[bc]{5}", engine.generate("Once", replace(params, logit_bias=a)).text)
    only = replace(params, allowed_token_ids=[b, 99])
    assert engine.generate("Once", only).text == "bbbbb"
    assert engine.generate("Once", replace(params, bad_words=["b"])).token_ids.count(b) == 0
    # what a processor wants and the grammar forbids is not chosen
    forced = replace(params, logits_processors=dictate([c] * 5))
    assert engine.generate("Once", forced).text == "ccccc"
    with pytest.raises(ValueError, match="no token is left"):
        engine.generate("Once", replace(params, logits_processors=dictate([99] * 5)))


def test_logprobs_are_those_before_the_mask(engine):
    free = engine.generate("Once", replace(GREEDY, max_tokens=1, logprobs=5)).outputs[0]
    params = structured(replace(GREEDY, logprobs=5), choice=["zebra"])
    first = engine.generate("Once", params).outputs[0].logprobs[0]
    likeliest = list(free.logprobs[0])
    assert list(first)[1:] == likeliest
    assert [first[i].logprob for i in likeliest] == [free.logprobs[0][i].logprob for i in likeliest]
    assert next(iter(first)) not in likeliest  # the chosen one


def test_what_cannot_go_on_ends_alone_with_one_line(engine):
    """After its first letter no text of this grammar exists, which shows only then."""
    dead = structured(grammar='start: "x" T\nT: /a/ & /b/')
    fine = structured(replace(GREEDY, frequency_penalty=0), regex="[a-z]{9}")
    alone = engine.generate("Once", fine).text
    failed: list[pytest.ExceptionInfo] = []

    def fails():
        with pytest.raises(ValueError, match="cannot go on in its grammar") as error:
            engine.generate("It was", dead)
        failed.append(error)

    thread = threading.Thread(target=fails)
    thread.start()
    texts = [o.text for o in engine.generate(["Once"] * 4, fine)]
    thread.join()
    one_line(failed[0])
    assert texts == [alone] * 4
    assert engine._scheduler.free_slots == engine._scheduler.num_slots


@pytest.mark.parametrize("name", ["engine", "late"])
def test_a_text_beside_grammars_is_what_it_is_alone(request, name):
    """Rows with and without a grammar, more of them than slots."""
    engine = request.getfixturevalue(name)
    forms = [None, WORD, WORD, StructuredOutputsParams(json=SCHEMAS["enums"]), None, WORD]
    jobs = [
        (prompt, replace(SAMPLED, structured_outputs=form, seed=i, max_tokens=12))
        for i, (prompt, form) in enumerate(zip(PROMPTS, forms * 4, strict=False))
    ]
    alone = [engine.generate(*job).token_ids for job in jobs]
    together = engine.generate([p for p, _ in jobs], [params for _, params in jobs])
    assert [o.token_ids for o in together] == alone


@pytest.mark.parametrize("soon", [-1, 9], ids=["in-threads", "one-by-one"])
def test_masks_are_the_same_in_threads(engine, monkeypatch, soon):
    params = replace(GREEDY, structured_outputs=WORD, max_tokens=4)
    alone = [engine.generate(prompt, params).text for prompt in PROMPTS[:6]]
    monkeypatch.setattr(grammars, "SOON", soon)
    assert [output.text for output in engine.generate(PROMPTS[:6], params)] == alone


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA does not survive a fork")
def test_a_fork_fills_masks_with_threads_of_its_own(monkeypatch):
    monkeypatch.setattr(grammars, "SOON", -1)  # in threads, all of them
    with Engine.from_pretrained("demo", device="cpu", max_seq_len=64) as engine:
        params = replace(GREEDY, structured_outputs=WORD, max_tokens=4)
        texts = [output.text for output in engine.generate(PROMPTS[:6], params)]
        reading, writing = os.pipe()
        if (child := os.fork()) == 0:
            again = [output.text for output in engine.generate(PROMPTS[:6], params)]
            os.write(writing, b"same" if again == texts else b"others")
            os._exit(0)
        os.close(writing)
        is_answered, _, _ = select.select([reading], [], [], 60)
        if not is_answered:
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with open(reading, "rb") as answer:
            assert answer.read() == b"same"


def test_ctrl_c_while_llguidance_asks_for_ids_is_not_lost(engine, monkeypatch):
    compiler = engine._builder._grammars
    encode, pressed = Tokenizer.encode, []

    def interrupted(self, text, **kwargs):
        if not pressed:
            pressed.append(text)
            raise KeyboardInterrupt
        return encode(self, text, **kwargs)

    form = StructuredOutputsParams(regex="(forced text of some words){3}")
    params = SamplingParams(structured_outputs=form, temperature=0)
    whole = engine.generate([2, 300], params).text
    grammar = compiler.compile(form).copy()
    monkeypatch.setattr(Tokenizer, "encode", interrupted)
    bits = torch.zeros(-(-engine.config.vocab_size // 32), dtype=torch.int32)
    with pytest.raises(KeyboardInterrupt):
        MaskFiller().fill([grammar], bits.data_ptr(), 4 * len(bits))
    assert pressed
    MaskFiller().fill([grammar], bits.data_ptr(), 4 * len(bits))
    assert engine.generate([2, 300], params).text == whole
