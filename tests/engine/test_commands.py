"""`gemcut generate` and `gemcut chat`: their texts on standard output, their notes on error."""

import io
import json
import re
import sys

import pytest
from processes import GREEDY, error_line

from gemcut.engine import Delta, Engine, SamplingParams
from gemcut.engine.cli import main
from gemcut.tokenizer import render_chat


@pytest.fixture(scope="module")
def demo():
    with Engine.from_pretrained("demo", max_batch_size=1) as engine:
        yield engine


@pytest.mark.parametrize("more", [[], ["--no-stream"]], ids=["stream", "no-stream"])
def test_generate_prints_the_text_a_newline_and_nothing_else(run, demo, more):
    expected = demo.generate("It was", SamplingParams(temperature=0, max_tokens=20)).text
    result = run("generate", "It was", "--max-tokens", "20", *GREEDY, *more)
    assert expected
    assert result == (0, expected + "\n", "")


def test_several_completions_stand_apart(run):
    arguments = ["generate", "It was", "--n", "3", "--seed", "7", "--max-tokens", "8"]
    _, out, _ = run(*arguments)
    completions = json.loads(run(*arguments, "--json")[1])["outputs"]
    assert len({completion["text"] for completion in completions}) > 1
    assert out == "\n---\n".join(completion["text"] for completion in completions) + "\n"


def test_json_is_one_object_with_everything(run, demo):
    params = SamplingParams(
        temperature=0.8, top_p=0.95, seed=3, n=2, max_tokens=12, logprobs=2, ignore_eos=True
    )
    expected = demo.generate("It was", params)
    arguments = ["--seed", "3", "--n", "2", "--max-tokens", "12", "--logprobs", "2", "--json"]
    code, out, err = run("generate", "It was", "--ignore-eos", *arguments)
    assert (code, err, out.count("\n")) == (0, "", 1)
    answer = json.loads(out)
    assert answer["model"] == "demo"
    assert answer["prompt"] == "It was"
    assert answer["prompt_token_ids"] == expected.prompt_token_ids
    for shown, completion in zip([answer, answer["outputs"][1]], expected.outputs, strict=True):
        assert shown["text"] == completion.text
        assert shown["token_ids"] == completion.token_ids
        assert shown["finish_reason"] == completion.finish_reason
    assert answer["metrics"]["generated_tokens"] == 24
    first = answer["outputs"][0]
    assert len(first["logprobs"]) == 12
    assert str(first["token_ids"][0]) in first["logprobs"][0]


def test_json_tells_the_stop_string(run):
    arguments = ["generate", "It was", "--json", "--max-tokens", "30", *GREEDY]
    text = json.loads(run(*arguments)[1])["text"]
    stop = text[10:14]
    answer = json.loads(run(*arguments, "--stop", "never", "--stop", stop)[1])
    assert (answer["finish_reason"], answer["stop_reason"]) == ("stop", stop)
    assert answer["text"] == text[: text.index(stop)]


@pytest.mark.parametrize(
    ("stdin", "prompt"),
    [
        pytest.param(b"It was", "It was", id="no-newline"),
        pytest.param(b"It was\n", "It was", id="newline-of-echo"),
        pytest.param(b"It was\r\n", "It was", id="newline-of-windows"),
        pytest.param(b"It was\n\n", "It was\n", id="only-one-newline-goes"),
        pytest.param(b" \r\n a \n", " \r\n a ", id="nothing-else-is-altered"),
        pytest.param("Žižkov ☃\n".encode(), "Žižkov ☃", id="multi-byte"),
    ],
)
@pytest.mark.parametrize("dash", [[], ["-"]], ids=["absent", "dash"])
def test_the_prompt_comes_from_standard_input(run, stdin, prompt, dash):
    arguments = ["generate", *dash, "--json", "--max-tokens", "1"]
    code, out, _ = run(*arguments, stdin=stdin)
    assert code == 0
    assert json.loads(out)["prompt"] == prompt


def test_bytes_that_are_no_text_are_refused(run):
    message = error_line(run("generate", stdin=b"It \xff was"))
    assert "standard input is not utf-8: byte 0xff at position 3" in message


def test_an_output_that_lacks_a_character_gets_its_number(run, monkeypatch):
    monkeypatch.setattr(Engine, "stream", lambda *args: iter([Delta("café ☃", [1])]))
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding="ascii"))
    assert run("generate", "a")[0] == 0
    assert printed.getvalue() == b"caf\\xe9 \\u2603\n"


@pytest.mark.parametrize("name", ["stdin", "stdout", "stderr"])
def test_a_stream_that_the_caller_closed_is_an_empty_one(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, name, None)
    code = main(["generate", "--max-tokens", "1", *([] if name == "stdin" else ["a"])])
    out, err = capsys.readouterr()
    assert code == (1 if name == "stdin" else 0)
    assert ("the prompt is empty" in err) == (name == "stdin")
    assert bool(out) == (name == "stderr")


def chat_of(engine: Engine, *contents: str, system: str | None = None) -> list[str]:
    """The greedy answers to some turns of the user."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    answers = []
    for content in contents:
        messages.append({"role": "user", "content": content})
        params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
        answers.append(engine.chat(messages, params, merge_system=True).text)
        messages.append({"role": "model", "content": answers[-1]})
    return answers


BRIEF = [*GREEDY, "--max-tokens", "20", "--ignore-eos"]


def test_chat_answers_each_line_and_remembers(run, demo):
    code, out, _ = run("chat", *BRIEF, stdin="Who is it?\n\nŽižkov?\n".encode())
    answers = chat_of(demo, "Who is it?", "Žižkov?")
    assert answers[1] != chat_of(demo, "Žižkov?")[0]
    assert (code, out) == (0, "".join(f"{answer}\n" for answer in answers))


def test_chat_with_a_system_text(run, demo):
    answers = chat_of(demo, "Who is it?", "Why?", system="You are Watson.")
    assert answers != chat_of(demo, "Who is it?", "Why?")
    out = run("chat", *BRIEF, "--system", "You are Watson.", stdin=b"Who is it?\nWhy?")[1]
    assert out == "".join(f"{answer}\n" for answer in answers)


def test_chat_forgets_and_leaves_when_told(run, demo):
    _, out, _ = run("chat", *BRIEF, stdin=b"Who is it?\n/reset\nWhy?\n/exit\nWhat?\n")
    answers = chat_of(demo, "Who is it?") + chat_of(demo, "Why?")
    assert out == "".join(f"{answer}\n" for answer in answers)


def test_a_turn_of_broken_bytes_is_refused_and_the_chat_goes_on(run, demo):
    code, out, err = run("chat", *BRIEF, stdin=b"Who is it?\n\xff\nWhy?\n")
    assert out == "".join(f"{answer}\n" for answer in chat_of(demo, "Who is it?", "Why?"))
    assert [line for line in err.splitlines() if "error" in line] == [
        "gemcut: error: standard input is not utf-8: byte 0xff at position 0 (invalid start byte)"
    ]
    assert code == 1


def test_an_answer_that_is_cut_says_so(run):
    _, _, err = run("chat", *GREEDY, "--ignore-eos", "--max-tokens", "2", stdin=b"Who is it?\n")
    assert err == "gemcut: the answer was cut at --max-tokens 2\n"


def test_a_conversation_that_outgrows_its_slot_says_so_and_what_to_do(run):
    arguments = ["chat", *GREEDY, "--ignore-eos", "--max-seq-len", "40"]
    code, out, err = run(*arguments, stdin=b"Who is it?\nAnd then?\n/reset\nWho is it?\n")
    filled, refused, reset, again = err.splitlines()
    hint = "; /reset begins a new one"
    assert filled == again == "gemcut: the conversation fills its slot of 40 tokens" + hint
    assert re.match(r"gemcut: error: with this turn the conversation has \d+ tokens", refused)
    assert refused.endswith("but a slot holds 40" + hint)
    assert "forgotten" in reset
    assert out[: len(out) // 2] == out[len(out) // 2 :]  # after /reset as at the beginning
    assert code == 1


def test_a_conversation_may_fill_its_slot_but_for_one_token(run, demo):
    length = len(render_chat(demo.tokenizer, [{"role": "user", "content": "Who is it?"}]))
    refused, answered = (
        run("chat", *GREEDY, "--max-seq-len", str(room), stdin=b"Who is it?\n")
        for room in (length, length + 1)
    )
    assert error_line(refused).endswith("/reset begins a new one\n")
    assert (answered[0], answered[2].count("fills its slot")) == (0, 1)


def test_generate_with_a_slot_of_the_length_that_fits(run):
    plain = run("generate", "Once", "--max-tokens", "3", *GREEDY)
    assert run("generate", "Once", "--max-tokens", "3", *GREEDY, "--max-seq-len", "auto") == plain
    assert plain[0] == 0


@pytest.mark.parametrize("command", ["generate", "chat"])
@pytest.mark.parametrize("choice", ["cuda_graphs", "dependent_launches"])
def test_graphs_and_dependent_launches_can_be_left_out(run, monkeypatch, command, choice):
    asked = []

    def refuse(*args, **options):
        asked.append(options[choice])
        raise ValueError("enough")

    monkeypatch.setattr(Engine, "from_pretrained", refuse)
    for options in ([], [f"--no-{choice.replace('_', '-')}"]):
        assert run(command, *options)[0] == 1
    assert asked == [True, False]


SCHEMA = '{"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 1, "maxItems": 2}'


@pytest.mark.parametrize("kind", ["text", "file", "regex"])
def test_generate_writes_the_form_that_was_asked_for(run, tmp_path, kind):
    pytest.importorskip("llguidance")
    file = tmp_path / "schema.json"
    file.write_text(SCHEMA)
    options = {
        "text": ["--json-schema", SCHEMA],
        "file": ["--json-schema", str(file)],
        "regex": ["--regex", r"\[[0-9]{2}\]"],
    }
    code, out, err = run("generate", "It was", "--max-tokens", "60", *GREEDY, *options[kind])
    assert (code, err) == (0, "")
    assert json.loads(out)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param(["--regex", "("], "unclosed group", id="regex"),
        pytest.param(["--json-schema", "nowhere.json"], "nowhere.json", id="no file"),
        pytest.param(["--json-schema", '{"type": '], "is no JSON schema", id="JSON"),
        pytest.param(["--json-schema", "{}", "--regex", "a"], "not json and regex", id="both"),
    ],
)
def test_a_form_that_cannot_be_used_is_one_line(run, options, message):
    pytest.importorskip("llguidance")
    assert message in error_line(run("generate", "It was", *options))
