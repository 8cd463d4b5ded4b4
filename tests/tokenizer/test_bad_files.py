"""Broken and contradicting files of a tokenizer: one line, before any weight is read."""

import copy
import json
import shutil

import pytest
from engines import one_line
from vocabulary import hugging_face_twin

from gemcut.engine import AutoTokenizer, Engine

LFS = "version https://git-lfs.github.com/spec/v1\n"
X = {"content": "<x>"}


@pytest.fixture
def bare(folder, tmp_path):
    """A checkpoint without weights."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").unlink()
    return tmp_path


@pytest.fixture(scope="module")
def backend(tokenizer_file):
    """The object in a tokenizer.json, with one token added after the others."""
    theirs = copy.deepcopy(hugging_face_twin(tokenizer_file))
    theirs.add_tokens(["<x>"])
    return json.loads(theirs.backend_tokenizer.to_str())


def refused(folder, message: str) -> None:
    for load in (Engine.from_pretrained, AutoTokenizer.from_pretrained):
        with pytest.raises(ValueError, match=message) as error:
            load(folder)
        one_line(error)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        pytest.param("added_tokens.json", "{", "cannot be read as JSON", id="no-json"),
        pytest.param("added_tokens.json", LFS, "cannot be read as JSON", id="lfs"),
        pytest.param("added_tokens.json", "[" * 9999, "cannot be read as JSON", id="nested"),
        pytest.param("added_tokens.json", "[]", "holds a list", id="a-list"),
        pytest.param("added_tokens.json", '{"<x>": "520"}', "'520', which is no id", id="text"),
        pytest.param("added_tokens.json", '{"<x>": true}', "True, which is no id", id="boolean"),
        pytest.param("added_tokens.json", '{"<x>": -1}', "-1, which is no id", id="negative"),
        pytest.param("added_tokens.json", '{"": 520}', "520 is empty", id="empty"),
        pytest.param("added_tokens.json", '{"<x>": 520, "<y>": 520}', "so has '<x>'", id="twins"),
        pytest.param("added_tokens.json", '{"<x>": 520, "<x>": 521}', "there twice", id="twice"),
        pytest.param("added_tokens.json", '{"<x>": 7}', "where .* has '<start_", id="taken"),
        pytest.param("added_tokens.json", '{"<mask>": 520}', "has it at 4", id="two-ids"),
        pytest.param("added_tokens.json", '{"<x>": 525}', "leaves a gap after 519", id="gap"),
        pytest.param("added_tokens.json", '{"<x>": 520}', "none for '<x>'", id="no-row"),
        pytest.param(
            "tokenizer_config.json", {"added_tokens_decoder": [X]}, "is a list", id="decoder-a-list"
        ),
        pytest.param(
            "tokenizer_config.json",
            {"added_tokens_decoder": {"x": X}},
            "'x', which is no id",
            id="decoder-no-number",
        ),
        pytest.param(
            "tokenizer_config.json",
            {"added_tokens_decoder": {"520": X, "521": X}},
            "id 521, and elsewhere 520",
            id="decoder-two-ids",
        ),
        pytest.param(
            "tokenizer_config.json",
            {"added_tokens_decoder": {"520": 5}},
            "neither a string nor an AddedToken",
            id="decoder-no-token",
        ),
        pytest.param("tokenizer_config.json", {"eos_token": 5}, "eos_token 5", id="eos-a-number"),
        pytest.param(
            "tokenizer_config.json", {"add_bos_token": "no"}, "'no', not true", id="add-bos-a-word"
        ),
        pytest.param("special_tokens_map.json", "null", "holds a NoneType", id="map-null"),
        pytest.param(
            "tokenizer_config.json",
            {"extra_special_tokens": [5]},
            "extra_special_tokens 5",
            id="extra-a-number",
        ),
        pytest.param(
            "tokenizer_config.json",
            {"extra_special_tokens": "<x>"},
            "is neither a list nor an object",
            id="extra-a-string",
        ),
        pytest.param("tokenizer_config.json", {"eos_token": "g"}, "one letter", id="one-letter"),
        pytest.param(
            "tokenizer_config.json", {"pad_token": "[PAD]"}, r"none for '\[PAD\]'", id="new-pad"
        ),
    ],
)
def test_beside_a_tokenizer_model(bare, name, content, message):
    content = content if isinstance(content, str) else json.dumps(content)
    (bare / name).write_text(content)
    if "none for" in message:  # a tokenizer by itself has no embedding
        with pytest.raises(ValueError, match=message) as error:
            Engine.from_pretrained(bare)
        one_line(error)
        assert len(AutoTokenizer.from_pretrained(bare)) == 521
    else:
        refused(bare, message)


def change(**changes):
    return lambda content: content | changes


def change_model(**changes):
    return lambda content: content | {"model": content["model"] | changes}


def moved(piece, token_id):
    def apply(content):
        vocab = content["model"]["vocab"] | {piece: token_id}
        return change_model(vocab=vocab)(content)

    return apply


def named(content):
    def apply(tokenizer):
        *others, last = tokenizer["added_tokens"]
        return tokenizer | {"added_tokens": [*others, last | {"content": content}]}

    return apply


def placed(token_id):
    def apply(content):
        *others, last = content["added_tokens"]
        return content | {"added_tokens": [*others, last | {"id": token_id}]}

    return apply


WORDS = {"type": "WordPiece", "unk_token": "<unk>", "continuing_subword_prefix": "##"}
UNIGRAM = {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.0]]}


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        pytest.param(lambda _: "{", "is not a tokenizer.json", id="no-json"),
        pytest.param(lambda _: [], "is not a tokenizer.json", id="a-list"),
        pytest.param(lambda _: "", "is empty", id="empty"),
        pytest.param(lambda _: LFS, "git-lfs pointer", id="lfs"),
        pytest.param(change_model(merges=[["a", "qqq"]]), "qqq", id="merge-without-a-piece"),
        pytest.param(moved("e", 300), "has id 300 twice", id="one-id-for-two"),
        pytest.param(moved("new", 900), "has no token of id 5", id="gap"),
        pytest.param(placed(17), "adds '<x>' at id 17", id="added-at-a-taken-id"),
        pytest.param(named(""), "added token of id .* is empty", id="added-without-a-name"),
        pytest.param(placed(600), "adds '<x>' at id 600", id="added-after-a-gap"),
        pytest.param(
            change(model=WORDS | {"max_input_chars_per_word": 9, "vocab": {"<unk>": 0}}),
            "as WordPiece models do",
            id="wordpiece",
        ),
        pytest.param(change(model=UNIGRAM, added_tokens=[]), "holds a Unigram model", id="unigram"),
        pytest.param(
            change_model(continuing_subword_prefix="##"),
            "has a continuing_subword_prefix",
            id="prefix",
        ),
        pytest.param(
            change(normalizer={"type": "Lowercase"}), "alters text before", id="lower-case"
        ),
        pytest.param(
            change(normalizer=None, pre_tokenizer={"type": "Whitespace"}),
            "alters text before",
            id="words",
        ),
    ],
)
def test_tokenizer_json(bare, backend, break_it, message):
    (bare / "tokenizer.model").unlink()
    broken = break_it(copy.deepcopy(backend))
    content = broken if isinstance(broken, str) else json.dumps(broken)
    (bare / "tokenizer.json").write_text(content)
    refused(bare, message)


def test_a_message_does_not_grow_with_the_value(bare):
    for name, content in (
        ("added_tokens.json", {"<x>": "5" * 9999}),
        ("tokenizer_config.json", {"add_bos_token": "5" * 9999}),
        ("added_tokens.json", {"x" * 9999: 5}),
        ("tokenizer_config.json", {"eos_token": [5] * 9999}),
        ("tokenizer_config.json", {"eos_token": "x" * 9999}),
        ("tokenizer_config.json", {"extra_special_tokens": "5" * 9999}),
        ("tokenizer_config.json", {"chat_template": [5] * 9999}),
    ):
        (bare / name).write_text(json.dumps(content))
        with pytest.raises(ValueError) as error:  # noqa: PT011  another test has the messages
            Engine.from_pretrained(bare)
        assert len(one_line(error)) < 400
        (bare / name).unlink()


@pytest.mark.parametrize("length", [{}, [5], "512", True, 0, float("inf"), float("nan")], ids=str)
def test_a_length_that_is_none(bare, length):
    (bare / "tokenizer_config.json").write_text(json.dumps({"model_max_length": length}))
    with pytest.raises(ValueError, match="model_max_length") as error:
        AutoTokenizer.from_pretrained(bare)
    one_line(error)


def test_unknown_keys_are_fine(bare):
    (bare / "tokenizer_config.json").write_text('{"made_up": {"by": "a program"}}')
    assert len(AutoTokenizer.from_pretrained(bare)) == 520
