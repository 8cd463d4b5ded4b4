"""The tokenizer in GGUF metadata: the one of the tokenizer.model that it was made from."""

import json
from pathlib import Path

import numpy as np
import pytest
from gguf_files import vocabulary_of
from hypothesis import given
from languages import TEXTS
from real_models import real_file, real_folder
from sentencepiece import SentencePieceProcessor
from vocabulary import texts

from gemcut.engine.checkpoints.gguf_header import GgufHeader
from gemcut.engine.checkpoints.gguf_model import gguf_tokenizer
from gemcut.engine.checkpoints.gguf_vocabulary import KEY, read_vocabulary, token_keys
from gemcut.tokenizer import Tokenizer, encode_chat

ARRAYS = ("scores", "token_type")


def header(path: Path, **changes) -> GgufHeader:
    """The metadata of a tokenizer.model; keys of `changes` are without their prefix."""
    values = vocabulary_of(path) | {f"{KEY}{name}": x for name, x in changes.items()}
    values = {key: x for key, x in values.items() if x is not None}
    for name in ARRAYS:
        if isinstance(values.get(f"{KEY}{name}"), list):
            values[f"{KEY}{name}"] = np.array(values[f"{KEY}{name}"])
    return GgufHeader(Path("model.gguf"), values, {})


@pytest.fixture(scope="module")
def ours(tokenizer_file) -> Tokenizer:
    return read_vocabulary(header(tokenizer_file)).tokenizer()


@given(text=texts)
def test_ids_and_text(ours, tokenizer, text):
    for parse_special in (False, True):
        ids = ours.encode(text, parse_special=parse_special)
        assert ids == tokenizer.encode(text, parse_special=parse_special)
    for skip in (False, True):
        expected = tokenizer.decode(ids, skip_special_tokens=skip)
        # with a config a mask is special, as in transformers
        expected = expected.replace("<mask>", "") if skip else expected
        assert ours.decode(ids, skip_special_tokens=skip) == expected


def test_the_same_vocabulary(ours, tokenizer, tokenizer_file):
    assert ours.pieces == tokenizer.pieces
    assert ours.named_tokens == tokenizer.named_tokens
    assert ours.special_ids - {ours.id_of("<mask>")} == tokenizer.special_ids
    assert ours.marker_ids == tokenizer.marker_ids
    assert (ours.add_bos, ours.add_eos) == (tokenizer.add_bos, tokenizer.add_eos)
    made = read_vocabulary(header(tokenizer_file)).model()
    both = [SentencePieceProcessor(model_proto=x) for x in (made, tokenizer_file.read_bytes())]
    ids = list(range(len(tokenizer)))
    for name in ("is_control", "is_unknown", "is_byte", "is_unused"):
        assert getattr(both[0], name)(ids) == getattr(both[1], name)(ids), name
    chat = [{"role": "user", "content": "a <end_of_turn>"}]
    assert encode_chat(ours, chat) == encode_chat(tokenizer, chat)


def test_settings(tokenizer_file):
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    found = header(tokenizer_file, add_bos_token=False, add_eos_token=True)
    found.values["tokenizer.chat_template"] = template
    tokenizer = read_vocabulary(found).tokenizer()
    assert tokenizer.encode("The")[-1] == tokenizer.eos_id
    assert tokenizer.encode("The")[0] != tokenizer.bos_id
    ids = encode_chat(tokenizer, [{"role": "user", "content": "The"}])
    assert ids == tokenizer.encode("The", add_bos=True)


def test_tokens_of_no_text_are_left_out(tokenizer_file, tokenizer):
    values = vocabulary_of(tokenizer_file)
    tokens = [*values[f"{KEY}tokens"], "[PAD520]", "[PAD521]"]
    scores = np.array([*values[f"{KEY}scores"], -1e4, -1e4])
    types = np.array([*values[f"{KEY}token_type"], 5, 5])
    found = header(tokenizer_file, tokens=tokens, scores=scores, token_type=types)
    assert read_vocabulary(found).pieces == tokenizer.pieces


def test_ends_of_a_text(tokenizer_file, tokenizer):
    turn = tokenizer.end_of_turn_id
    assert token_keys(header(tokenizer_file))["eos_token_id"] == [1, turn]
    assert token_keys(header(tokenizer_file, eos_token_id=turn))["eos_token_id"] == [turn, 1]
    assert token_keys(header(tokenizer_file, eot_token_id=9))["eos_token_id"] == [1, 9, turn]
    keys = ("bos_token_id", "eos_token_id", "padding_token_id", "unknown_token_id")
    assert token_keys(header(tokenizer_file, **dict.fromkeys(keys))) == {
        "bos_token_id": 2,
        "pad_token_id": 0,
        "eos_token_id": [1, turn],
    }
    assert token_keys(header(tokenizer_file, tokens=None)) == {}


def test_files_for_a_folder(tmp_path, tokenizer_file, ours):
    for name, content in read_vocabulary(header(tokenizer_file)).files().items():
        (tmp_path / name).write_bytes(content)
    saved = Tokenizer.from_file(tmp_path)
    assert (saved.pieces, saved.special_ids) == (ours.pieces, ours.special_ids)
    assert saved.encode("a<end_of_turn>  b", parse_special=True) == ours.encode(
        "a<end_of_turn>  b", parse_special=True
    )
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["add_bos_token"] is True


def changed(path: Path, name: str, place: int, value) -> dict:
    items = list(vocabulary_of(path)[f"{KEY}{name}"])
    items[place] = value
    return {name: items}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "gpt2"}, "model is 'gpt2', but Gemma's is 'llama'"),
        ({"model": None}, "model is None, but"),
        ({"tokens": None}, "tokens is missing"),
        ({"tokens": []}, "tokens is missing"),
        ({"tokens": 3}, "tokens is 3, a int"),
        ({"scores": None}, "scores is missing"),
        ({"scores": [0.0]}, "scores has 1 entries for 520 tokens"),
        ({"scores": ["a"]}, r"scores is \['a'\], a list|scores has 1 entries"),
        ({"token_type": None}, "token_type is missing"),
        ({"token_type": [1] * 521}, "token_type has 521 entries for 520 tokens"),
        (("tokens", 400, ""), r"tokens\[400\] is empty"),
        (("tokens", 400, "▁the"), r"tokens\[400\] '▁the' is there twice, at \d+ too"),
        (("tokens", 20, "<0xZZ>"), "'<0xZZ>' is a byte by its type, but not by its name"),
        (("scores", 400, float("nan")), r"tokens\[400\] .* has the score nan"),
        (("scores", 400, 1e300), r"tokens\[400\] .* has the score 1e\+300"),
        (("token_type", 400, 7), r"tokens\[400\] .* is of type 7, which is unknown"),
        (("token_type", 400, 2), "token_type has 2 unknown tokens, not one"),
        (("token_type", 20, 1), "token_type has 255 bytes, not 256"),
        ({"bos_token_id": 520}, "bos_token_id is 520, but there are 520 tokens"),
        ({"eos_token_id": "a"}, "eos_token_id is 'a', a str"),
        ({"add_space_prefix": True}, "alters text before encoding it"),
        ({"add_space_prefix": 1}, "add_space_prefix is 1, a int"),
    ],
)
def test_damage(tokenizer_file, change, message):
    if isinstance(change, tuple):
        name, place, value = change
        change = changed(tokenizer_file, name, place, value)
    with pytest.raises(ValueError, match=message) as error:
        read_vocabulary(header(tokenizer_file, **change)).tokenizer()
    assert "model.gguf" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_real_vocabulary():
    """Gemma 3's: every piece, and ids of texts in many languages."""
    ours = gguf_tokenizer(real_file("gemma-3-270m-q4_k_m.gguf"))
    theirs = Tokenizer.from_file(real_folder("gemma3") / "package" / "models")
    assert ours.pieces == theirs.pieces[:262144]
    assert theirs.marker_ids - ours.marker_ids == {262144}  # <image_soft_token>
    for text in TEXTS:
        for parse_special in (False, True):
            ids = ours.encode(text, parse_special=parse_special)
            assert ids == theirs.encode(text, parse_special=parse_special)
            assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(
                ids, skip_special_tokens=False
            )
