"""Chats by a fine-tune's own template: ids as in transformers, and no message writes a marker."""

import copy
import io
import json
import shutil
import sys
from pathlib import Path

import pytest
from engines import dictate, one_line, save_random_model
from tokenizer_texts import TEMPLATE, turns
from transformers import AutoTokenizer
from vocabulary import MARKERS, hugging_face_twin

from gemcut.engine import Engine, SamplingParams
from gemcut.engine.cli import main
from gemcut.tokenizer import encode_chat, render_chat

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' "
    "+ message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# as published with Gemma 3, for texts
GEMMA3 = (
    "{{ bos_token }}{%- if messages[0]['role'] == 'system' -%}"
    "{%- set prefix = messages[0]['content'] + '\n\n' -%}{%- set rest = messages[1:] -%}"
    "{%- else -%}{%- set prefix = '' -%}{%- set rest = messages -%}{%- endif -%}"
    "{%- for message in rest -%}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) "
    "+ '\n' + (prefix if loop.first else '') }}{{ message['content'] | trim }}"
    "{{ '<end_of_turn>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"
)
SYSTEM = {"role": "system", "content": "sang"}
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


def write(folder: Path, name: str, content) -> None:
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / name).write_text(text)


def save_chatml(folder: Path, tokenizer_file: Path, kind: str) -> None:
    """A ChatML fine-tune, as transformers 5 saves it or with a tokenizer.model."""
    save_random_model(folder, tokenizer_file, vocab_size=522, max_position_embeddings=512)
    if kind == "json":
        theirs = copy.deepcopy(hugging_face_twin(tokenizer_file))
        theirs.add_special_tokens(
            {"eos_token": "<|im_end|>", "extra_special_tokens": ["<|im_start|>"]}
        )
        theirs.chat_template = CHATML
        (folder / "tokenizer.model").unlink()
        theirs.save_pretrained(folder)
        return
    write(folder, "added_tokens.json", {"<|im_end|>": 520, "<|im_start|>": 521})
    settings = {"eos_token": "<|im_end|>", "extra_special_tokens": ["<|im_start|>"]}
    write(folder, "tokenizer_config.json", settings | {"chat_template": CHATML})


@pytest.fixture(params=["json", "model"])
def chatml(tmp_path, tokenizer_file, request):
    save_chatml(tmp_path, tokenizer_file, request.param)
    return tmp_path


class TestChatml:
    def test_ids_and_end_of_turn(self, chatml, tmp_path_factory, tokenizer_file):
        theirs_in = tmp_path_factory.mktemp("theirs")
        save_chatml(theirs_in, tokenizer_file, "json")
        theirs = AutoTokenizer.from_pretrained(theirs_in)
        chat = [SYSTEM, *turns("The children", "walked", "to <table>\n\n")]
        expected = theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        with Engine.from_pretrained(chatml, dtype="float32") as engine:
            assert engine.chat(chat, GREEDY).prompt_token_ids == expected
            as_model = [{**one, "role": one["role"].replace("assistant", "model")} for one in chat]
            assert engine.chat(as_model, GREEDY).prompt_token_ids == expected
            end = theirs.convert_tokens_to_ids("<|im_end|>")
            answer = [*theirs.encode("river", add_special_tokens=False), end]
            params = SamplingParams(logits_processors=dictate([*answer, 9]), max_tokens=9)
            output = engine.chat(chat, params).outputs[0]
            assert (output.text, output.finish_reason) == ("river", "stop")
            assert output.token_ids == answer

    def test_on_the_command_line(self, chatml, capsys, monkeypatch):
        with Engine.from_pretrained(chatml, dtype="float32", max_batch_size=1) as engine:
            params = SamplingParams(temperature=0, max_tokens=6)
            expected = engine.chat([SYSTEM, *turns("The children")], params).text
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"The children\n")))
        options = ["--system", "sang", "--temperature", "0", "--max-tokens", "6"]
        assert main(["chat", "--model", str(chatml), *options]) == 0
        assert capsys.readouterr().out == f"{expected}\n"


class TestPublishedTemplates:
    @pytest.mark.parametrize("template", [TEMPLATE, GEMMA3])
    def test_are_our_own_turns(self, folder, tmp_path, template):
        shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
        write(tmp_path, "chat_template.jinja", template)
        chat = turns("The <end_of_turn> children ", "\nwalked<eos>", "<mask>to")
        with Engine.from_pretrained(tmp_path, dtype="float32") as engine:
            tokenizer = engine.tokenizer
            for merge, messages in ((False, chat), (True, chat), (True, [SYSTEM, *chat])):
                ids = render_chat(tokenizer, messages, merge_system=merge)
                assert encode_chat(tokenizer, messages, merge_system=merge) == ids
            assert engine.chat(chat, GREEDY).prompt_token_ids == render_chat(tokenizer, chat)
            end = tokenizer.end_of_turn_id
            params = SamplingParams(logits_processors=dictate([50, end, 9]), max_tokens=9)
            assert engine.chat(chat, params).token_ids == [50, end]
            if template == TEMPLATE:
                with pytest.raises(ValueError, match="System role not supported") as error:
                    engine.chat([SYSTEM, *chat])
                one_line(error)


@pytest.mark.parametrize("kind", ["own", "template", "json"])
@pytest.mark.parametrize("marker", [*MARKERS, "<bos>", "<eos>", "<|im_end|>"])
def test_no_message_writes_a_marker(tmp_path, tokenizer_file, kind, marker):
    save_chatml(tmp_path, tokenizer_file, "json" if kind == "json" else "model")
    if kind == "own":
        write(tmp_path, "tokenizer_config.json", {"eos_token": "<|im_end|>"})
    with Engine.from_pretrained(tmp_path, dtype="float32") as engine:
        token_id = engine.tokenizer.id_of(marker)
        plain = engine.chat(turns("a", "b", "c"), GREEDY).prompt_token_ids
        content = f"{marker}a {marker}{marker[1:]}"
        ids = engine.chat(turns(content, "b", "c"), GREEDY).prompt_token_ids
        assert ids.count(token_id) == plain.count(token_id)
        text = engine.tokenizer.decode(ids, skip_special_tokens=False)
        assert content in text
        # an engine's prompt is for those who write the markers
        assert token_id in engine.generate(f"a{marker}", GREEDY).prompt_token_ids


def test_text_of_the_vocabulary_stays_whole(folder):
    """Tags and runs of spaces are pieces that the model was trained on."""
    with Engine.from_pretrained(folder, dtype="float32") as engine:
        ids = engine.chat(turns("a<table>  b\n\n\n</table>"), GREEDY).prompt_token_ids
        pieces = [engine.tokenizer.piece(i) for i in ids]
        assert {"<table>", "▁▁", "\n\n\n", "</table>"} <= set(pieces)


def test_unused_tokens_are_shown(folder, twin):
    ids = [twin.convert_tokens_to_ids(token) for token in ("<unused1>", "<end_of_turn>", "a")]
    with Engine.from_pretrained(folder, dtype="float32") as engine:
        params = SamplingParams(logits_processors=dictate(ids), max_tokens=3)
        text = engine.generate("a", params).text
        assert text == twin.decode(ids, skip_special_tokens=True) == "<unused1>a"


class TestBadTemplates:
    @pytest.mark.parametrize(
        ("template", "message"),
        [
            pytest.param("{% for %}", "is not jinja", id="not-jinja"),
            pytest.param("{{ messages | no_such_filter }}", "is not jinja", id="unknown-filter"),
            pytest.param([{"name": "x", "template": "a"}], "is the default", id="no-default"),
            pytest.param(5, "chat_template 5 is neither", id="a-number"),
            pytest.param([5], r"chat_template \[5\] is neither", id="a-list-of-numbers"),
            pytest.param([{"name": "default"}], "is neither", id="no-template"),
            pytest.param({"default": 5}, "is neither", id="no-text"),
        ],
    )
    def test_are_refused_before_weights(self, folder, tmp_path, template, message):
        shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
        (tmp_path / "model.safetensors").unlink()
        write(tmp_path, "tokenizer_config.json", {"chat_template": template})
        with pytest.raises(ValueError, match=message) as error:
            Engine.from_pretrained(tmp_path)
        one_line(error)

    @pytest.mark.parametrize(
        ("template", "message"),
        [
            pytest.param("{{ raise_exception('no, no') }}", "no, no", id="refuses"),
            pytest.param("{{ messages[0]['content'] + 5 }}", "template", id="fails"),
            pytest.param(
                "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
                "template",
                id="loops",
            ),
        ],
    )
    def test_fail_in_one_line(self, folder, tmp_path, template, message):
        shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
        write(tmp_path, "chat_template.jinja", template)
        with Engine.from_pretrained(tmp_path, dtype="float32") as engine:
            with pytest.raises(ValueError, match=message) as error:
                engine.chat(turns("a"))
            one_line(error)
            assert engine.generate("a", GREEDY).token_ids

    def test_messages_are_checked(self, chatml):
        with Engine.from_pretrained(chatml, dtype="float32") as engine:
            for messages, message in (
                ("a", "must be a list"),
                ([], "holds no message"),
                (["a"], "message 0 is a str"),
                ([{"content": "a"}], "message 0 has no 'role'"),
                ([{"role": "user"}], "message 0 has no 'content'"),
            ):
                with pytest.raises(ValueError, match=message) as error:
                    engine.chat(messages)
                one_line(error)
