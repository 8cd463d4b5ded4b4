"""The published vocabularies: all that `tokenizers` yields, in many languages and at length."""

import random
import time

import pytest
import tokenizers
from languages import LANGUAGES, LITERALS, OTHERS, TEXTS
from real_models import real_folder, real_tokenizer
from transformers import AutoTokenizer as TheirTokenizer

from gemcut.engine import AutoTokenizer, Engine, SamplingParams
from gemcut.tokenizer import StreamDecoder, Tokenizer, encode_chat


@pytest.fixture(scope="module", params=["gemma3", "gemini"])
def pair(request):
    folder = real_tokenizer(request.param)
    start = time.perf_counter()
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    middle = time.perf_counter()
    ours = AutoTokenizer.from_pretrained(folder)
    print(f"load: {time.perf_counter() - middle:.2f} s; tokenizers {middle - start:.2f} s")
    return ours, theirs


def megabyte() -> str:
    chosen = random.Random(0).choices((*LANGUAGES, *OTHERS), k=40_000)
    return " ".join(chosen)[:1_000_000]


def timed(call, *arguments, **options):
    start = time.perf_counter()
    result = call(*arguments, **options)
    return result, time.perf_counter() - start


def test_documented_ids():
    tokenizer = AutoTokenizer.from_pretrained(real_tokenizer("gemini"))
    assert tokenizer.encode("Hello this is a test") == [2, 4521, 736, 603, 476, 2121]
    assert tokenizer.codec.encode("Hello this is a test") == [2, 4521, 736, 603, 476, 2121]


@pytest.mark.parametrize("text", TEXTS)
def test_ids_offsets_and_text(pair, text):
    ours, theirs = pair
    expected = theirs.encode(text)
    encoding = ours(text, return_offsets_mapping=True)
    assert encoding.input_ids == expected.ids
    assert encoding.offset_mapping == expected.offsets
    assert encoding.tokens() == expected.tokens
    for skip in (True, False):
        text = theirs.decode(expected.ids, skip_special_tokens=skip)
        # transformers hides <mask> too, which its class names
        assert ours.decode(expected.ids, skip_special_tokens=skip) == (
            text.replace("<mask>", "") if skip else text
        )
        stream = StreamDecoder(ours.codec, skip_special_tokens=skip)
        shown = "".join(map(stream.push, expected.ids)) + stream.flush()
        assert shown == ours.codec.decode(expected.ids, skip_special_tokens=skip)


def test_padding(pair):
    ours, theirs = pair
    theirs.enable_padding(direction="left", pad_id=0, pad_token="<pad>")
    expected = theirs.encode_batch(list(TEXTS))
    theirs.no_padding()
    batch = ours(list(TEXTS), padding=True)
    assert batch.input_ids == [one.ids for one in expected]
    assert batch.attention_mask == [one.attention_mask for one in expected]


def test_no_text_yields_a_marker(pair):
    ours, _ = pair
    for text in TEXTS:
        ids = ours.codec.encode(text, add_bos=False)
        assert ours.codec.marker_ids.isdisjoint(ids)
        assert ours.codec.decode(ids) == text.replace("▁", " ")


def test_a_megabyte(pair):
    ours, theirs = pair
    text = megabyte()
    expected, their_time = timed(lambda: theirs.encode(text, add_special_tokens=False).ids)
    ids, our_time = timed(ours.encode, text, add_special_tokens=False, verbose=False)
    plain, plain_time = timed(ours.codec.encode, text, add_bos=False)
    assert ids == plain == expected
    print(f"encode: {our_time:.2f} s, as a chat {plain_time:.2f}, tokenizers {their_time:.2f}")
    many = (ids * 3)[:420_000]
    expected, their_time = timed(theirs.decode, many)
    shown, our_time = timed(ours.decode, many)
    assert shown == expected
    print(f"decode of {len(many)}: {our_time:.2f} s, tokenizers {their_time:.2f}")


def test_tokenizer_model_is_tokenizer_json():
    model = Tokenizer.from_file(real_folder("gemma-3-270m"))
    other = Tokenizer.from_file(real_folder("gemma-3-270m-json"))
    for text in (*LANGUAGES, *OTHERS, *LITERALS):
        assert model.encode(text) == other.encode(text), text
        ids = model.encode(text, parse_special=True, add_bos=False)
        assert ids == other.encode(text, parse_special=True, add_bos=False), text
        assert model.decode(ids, skip_special_tokens=False) == text
    many = other.encode(megabyte(), add_bos=False)[:420_000]
    for tokenizer in (model, other):
        print(f"decode of {len(many)}: {timed(tokenizer.decode, many)[1]:.2f} s")


@pytest.mark.parametrize("name", ["gemma3", "gemini"])
def test_chat(name):
    """The published templates are Gemma's own turns; no content writes a marker."""
    folder = real_tokenizer(name)
    ours, theirs = Tokenizer.from_file(folder), TheirTokenizer.from_pretrained(folder)
    chat = [
        {"role": "user", "content": " Hello\n\n\nthere <table> "},
        {"role": "assistant", "content": LANGUAGES[18]},
        {"role": "user", "content": LANGUAGES[5]},
    ]
    expected = theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert encode_chat(ours, chat) == expected
    for marker in ("<start_of_image>", "<unused7>", "<eos>", "[multimodal]", "<end_of_turn>"):
        ids = encode_chat(ours, [{"role": "user", "content": f"a {marker}"}])
        assert ours.id_of(marker) not in ids[:-6], marker
        assert f"a {marker}" in ours.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("name", ["gemma-3-270m", "gemma-3-270m-json"])
def test_engine(name):
    """<image_soft_token> has no row; all else works, stop strings too."""
    folder = real_folder(name)
    params = SamplingParams(temperature=0, max_tokens=24, stop=["country"])
    with Engine.from_pretrained(
        folder, max_batch_size=1, max_seq_len=64, dtype="float32"
    ) as engine:
        output = engine.generate("The capital of France is", params).outputs[0]
        assert output.stop_reason == "country"
        if name == "gemma-3-270m-json":
            with pytest.raises(ValueError, match=r"<image_soft_token>.*no row"):
                engine.generate("a <image_soft_token>")
