"""Chats of the documented tokenizer by templates of all kinds: messages, masks, and failures."""

import enum
import warnings
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
from engines import one_line
from tokenizer_texts import TEMPLATE, turns
from transformers import AutoTokenizer
from vocabulary import hugging_face_twin

from gemcut.engine.transformers_api.tokenizers.tokenizer import GemmaTokenizer

GENERATION = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<end_of_turn>\n{% endgeneration %}"
    "{% else %}{{ '<start_of_turn>' + m.role + ' ' + m.content | trim + '<end_of_turn>\n' }}"
    "{% endif %}{% endfor %}"
)
CHAT = turns("The children", "walked to the river", "and", "sang €")


@dataclass
class Message:
    role: str
    content: object


class Dumped(SimpleNamespace):
    def model_dump(self) -> dict:
        return vars(self)


class Role(enum.StrEnum):
    USER = "user"


@pytest.fixture(scope="module")
def pair(tokenizer_file, tmp_path_factory) -> list:
    folder = tmp_path_factory.mktemp("twin")
    hugging_face_twin(tokenizer_file).save_pretrained(folder)
    theirs = AutoTokenizer.from_pretrained(folder, extra_special_tokens=[])
    return [GemmaTokenizer(tokenizer_file, mask_token=None, extra_special_tokens=[]), theirs]


def texts(pair, chat, template, **options) -> list[str]:
    return [
        t.apply_chat_template(chat, chat_template=template, tokenize=False, **options) for t in pair
    ]


class TestMessages:
    @pytest.mark.parametrize(
        "chat",
        [
            [Message("user", "a"), Message("assistant", "b")],
            [Dumped(role="user", content="a", tool_calls=None)],
            SimpleNamespace(messages=CHAT),
            [SimpleNamespace(messages=CHAT), SimpleNamespace(messages=CHAT[:1])],
            [{"role": Role.USER, "content": "a", "n": np.int64(3), "x": (1, [True])}],
            [Message("user", [Dumped(type="text", text="a")])],
            [{"role": "user", "content": "a", "thinking": "b"}],
            [{"role": "user", "content": "a", "reasoning": "b", "reasoning_content": None}],
        ],
        ids=["dataclass", "dump", "chat", "chats", "plain", "nested", "thinking", "reasoning"],
    )
    def test_are_objects_too(self, pair, chat):
        template = "{% for m in messages %}{{ m | tojson }}{{ m.role }}{% endfor %}"
        mine, theirs = texts(pair, chat, template)
        assert mine == theirs
        for tokenizer in pair[:1]:
            is_batch = isinstance(mine, list)
            ids = tokenizer.apply_chat_template(chat, chat_template=template).input_ids
            assert isinstance(ids[0], list) == is_batch

    def test_gemmas_own_turns_take_objects(self, pair):
        chat = [Message("user", "a"), Dumped(role="assistant", content="b", name=None)]
        assert pair[0].apply_chat_template(chat) == pair[0].apply_chat_template(turns("a", "b"))

    @pytest.mark.parametrize("template", [None, TEMPLATE], ids=["own", "jinja"])
    def test_have_no_end_but_their_own(self, pair, tokenizer_file, tmp_path, template):
        """A checkpoint that puts EOS after a text puts none into a chat, nor into its turns."""
        GemmaTokenizer(tokenizer_file, add_eos_token=True).save_pretrained(tmp_path)
        tokenizer = GemmaTokenizer.from_pretrained(tmp_path, chat_template=template)
        assert tokenizer.encode("a")[-1] == tokenizer.eos_token_id
        expected = pair[1].apply_chat_template(CHAT, chat_template=TEMPLATE)
        assert tokenizer.apply_chat_template(CHAT).data == expected.data

    @pytest.mark.parametrize("options", [{"tools": [{}]}, {"documents": [{}]}, {"thinking": 3}])
    def test_what_a_template_never_reads_does_nothing(self, pair, options):
        mine, theirs = texts(pair, CHAT, TEMPLATE, **options)
        assert mine == theirs == texts(pair, CHAT, TEMPLATE)[0]

    @pytest.mark.parametrize(
        ("chat", "template", "field"),
        [
            (turns("a", "b  "), TEMPLATE, True),
            (turns("a", "b  "), "{% for m in messages %}{{ m.content }}|{% endfor %}", True),
            (
                [Message("user", [{"text": "a"}, {"text": "b "}, {"type": "image"}])],
                "{% for b in messages[0].content %}{{ b.text }}{% endfor %}|",
                "content",
            ),
            ([{"role": "a", "reasoning": "b "}], "{{ messages[0].thinking }}|", "reasoning"),
            (turns("a", ""), TEMPLATE, True),
        ],
        ids=["trimmed", "kept", "blocks", "reasoning", "empty"],
    )
    def test_the_last_goes_on(self, pair, chat, template, field):
        mine, theirs = texts(pair, chat, template, continue_final_message=field)
        assert mine == theirs

    @pytest.mark.parametrize("template", ["{{ messages[0].content | upper }}", "x"])
    def test_a_last_message_that_is_altered(self, pair, template):
        with pytest.raises(ValueError, match="leaves out the last message's 'content'") as error:
            texts(pair[:1], turns("a"), template, continue_final_message=True)
        one_line(error)


class TestAssistantMask:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"return_tensors": "pt"},
            {"return_tensors": "np", "padding": "max_length", "max_length": 60},
            {"truncation": True, "max_length": 14},
        ],
        ids=str,
    )
    @pytest.mark.parametrize("batch", [False, True])
    def test_marks_what_the_model_wrote(self, pair, options, batch):
        chat = [CHAT, CHAT[:2]] if batch else CHAT
        padding = {"padding": True} if batch and "return_tensors" in options else {}
        mine, theirs = (
            tokenizer.apply_chat_template(
                chat,
                chat_template=GENERATION,
                return_assistant_tokens_mask=True,
                **padding | options,
            )
            for tokenizer in pair
        )
        assert list(mine) == list(theirs)
        for name, value in theirs.items():
            assert type(mine[name]) is type(value)
            assert np.array_equal(np.array(mine[name], object), np.array(value, object))
        start = texts(pair, CHAT, GENERATION)[0].index("walked")
        assert mine.char_to_token(0, start) == theirs.char_to_token(0, start)

    def test_a_template_that_marks_nothing_is_said(self, pair):
        with pytest.warns(UserWarning, match="no {% generation %} block"):
            encoding = pair[0].apply_chat_template(
                CHAT, chat_template=TEMPLATE, return_assistant_tokens_mask=True
            )
        assert set(encoding.assistant_masks) == {0}

    def test_characters_of_a_chat(self, pair):
        options = {
            "chat_template": GENERATION,
            "tokenizer_kwargs": {"return_offsets_mapping": True},
        }
        mine, theirs = (t.apply_chat_template(CHAT, **options) for t in pair)
        assert mine.data == theirs.data
        assert mine.word_ids() == theirs.word_ids()

    def test_one_message_at_a_time(self, pair):
        for chat in (turns("a"), turns("a", "b")):
            ids = [
                t.encode_message_with_chat_template(chat[-1], chat[:-1], chat_template=TEMPLATE)
                for t in pair
            ]
            assert ids[0] == ids[1]


class TestFailures:
    @pytest.mark.parametrize(
        ("template", "message"),
        [
            ("\n{{ 1 / 0 }}", "in line 2 with ZeroDivisionError: division by zero"),
            ("{{ 'a' + 1 }}", "in line 1 with TypeError: can only concatenate"),
            ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "with RecursionError"),
            ("{% include 'x' %}", "with TypeError: no loader"),
            ("{{ messages[0].x.y }}", "refuses the messages: 'dict object' has no attribute 'x'"),
            ("{{ strftime_now(3) }}", "with TypeError"),
        ],
        ids=["zero", "type", "recursion", "include", "undefined", "call"],
    )
    def test_are_one_line(self, pair, template, message):
        with pytest.raises(ValueError, match=f"the chat template.*{message}") as error:
            texts(pair[:1], CHAT, template)
        one_line(error)

    def test_name_the_template(self, tokenizer_file):
        templates = {"default": "{{ 1 }}", "tool_use": "{{ 1 / 0 }}"}
        tokenizer = GemmaTokenizer(tokenizer_file, chat_template=templates)
        with pytest.raises(ValueError, match="the chat template 'tool_use' fails in line 1"):
            tokenizer.apply_chat_template(CHAT, tools=[{}])

    def test_templates_that_never_end_are_stopped(self, pair):
        for template in (
            "{% for i in range(99999) %}{% for i in range(99999) %}{% endfor %}{% endfor %}",
            "{% for i in range(99999) %}{{ 'a' * 9999 }}{% endfor %}",
        ):
            with pytest.raises(ValueError, match=r"is stopped( in line 1)?: ") as error:
                texts(pair[:1], CHAT, template)
            one_line(error)

    def test_a_long_chat_is_none_of_them(self, pair):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            mine, theirs = texts(pair, turns("a" * 1000, "b") * 1000, TEMPLATE)
        assert mine == theirs
