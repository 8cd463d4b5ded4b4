"""A tokenizer of its own, without a model: new tokens, named tokens, and what is saved of them."""

import copy
import json
from contextlib import contextmanager

import pytest
from engines import one_line
from real_models import real_tokenizer
from transformers import AddedToken
from transformers import AutoTokenizer as TheirAutoTokenizer
from vocabulary import hugging_face_twin

from gemcut.engine.transformers_api.auto import AutoModelForCausalLM
from gemcut.engine.transformers_api.tokenizers.tokenizer import GemmaTokenizer

TEXTS = (
    "x [NEW] y▁the z the", "x[S]y [PAD] <start_of_turn>[NEW]", "x [L] y [R]  z", "wrd wrdx awrd!",
    "<l> a <l>  b<r>  <r> c", "[NEW][NEWER] [NEW", "<table><img>", "a [Q] b",
)  # fmt: skip
KINDS = ("tokenizer.model", "tokenizer.json")
OPTIONS = ("content", "special", "lstrip", "rstrip", "single_word", "normalized")


@pytest.fixture(scope="module")
def folder(tokenizer_file, tmp_path_factory):
    twin = hugging_face_twin(tokenizer_file)
    twin.add_bos_token = True
    path = tmp_path_factory.mktemp("twin")
    twin.save_pretrained(path)
    return path


@contextmanager
def refused(message: str):
    with pytest.raises(ValueError, match=message) as error:
        yield
    one_line(error)


def tokenizers(folder, tokenizer_file, kind, **options) -> list:
    """Gemcut's and transformers', with the same options."""
    options = {"extra_special_tokens": []} | options
    if kind == "tokenizer.json":
        ours = GemmaTokenizer.from_pretrained(folder, **options)
    else:
        ours = GemmaTokenizer(tokenizer_file, **{"mask_token": None} | options)
    return [ours, TheirAutoTokenizer.from_pretrained(folder, **options)]


def facts(tokenizer) -> dict:
    """What a tokenizer says of its tokens, and makes of texts."""
    names = """added_tokens_encoder all_special_ids all_special_tokens extra_special_tokens
        extra_special_tokens_ids pad_token pad_token_id special_tokens_map vocab_size"""
    told = {name: getattr(tokenizer, name) for name in names.split()}
    told |= {"len": len(tokenizer), "vocab": tokenizer.get_vocab()}
    told["added"] = tokenizer.get_added_vocab()
    decoder = tokenizer.added_tokens_decoder
    told["contents"] = [str(token) for token in decoder.values()]
    told["decoder"] = {i: [getattr(t, n) for n in OPTIONS] for i, t in decoder.items()}
    for text in TEXTS:
        for split in (False, True):
            encoding = tokenizer(text, return_offsets_mapping=True, split_special_tokens=split)
            told[text, split] = (encoding.data, encoding.word_ids())
        ids = tokenizer(text).input_ids
        told[text, "text"] = [tokenizer.decode(ids, skip_special_tokens=s) for s in (False, True)]
        told[text, "pieces"] = tokenizer.convert_ids_to_tokens(ids, skip_special_tokens=True)
    return told


STEPS = {
    "new": lambda t: t.add_tokens(["[NEW]", "▁the", "[NEW]", "", "[NEWER]"]),
    "taking spaces": lambda t: t.add_special_tokens({"sep_token": AddedToken("[Q]", lstrip=True)}),
    "pad": lambda t: t.add_special_tokens({"pad_token": "[PAD]", "cls_token": "[CLS]"}),
    "extra": lambda t: t.add_special_tokens({"extra_special_tokens": ["[S]", "<start_of_turn>"]}),
    "more": lambda t: t.add_special_tokens({"extra_special_tokens": ["[S]", "[S2]"]}, False),
    "options": lambda t: t.add_tokens(
        [
            AddedToken("[L]", lstrip=True),
            AddedToken("[R]", rstrip=True),
            AddedToken("wrd", single_word=True),
            AddedToken("<l>", lstrip=True, special=True),
            AddedToken("<r>", rstrip=True, special=True, normalized=False),
        ]
    ),
    "special": lambda t: t.add_tokens(AddedToken("<table>", special=True)),
    "once more": lambda t: t.add_tokens("<table>", special_tokens=True),
}


@pytest.mark.parametrize("kind", KINDS)
class TestNewTokens:
    def test_have_ids_behind_the_vocabulary(self, folder, tokenizer_file, tmp_path, kind):
        pair = tokenizers(folder, tokenizer_file, kind)
        for name, step in STEPS.items():
            counts = [step(tokenizer) for tokenizer in pair]
            assert counts[0] == counts[1], name
            mine, other = map(facts, pair)
            assert mine == other, name
        assert len(pair[0]) > pair[0].vocab_size

        pair[0].save_pretrained(tmp_path)
        assert facts(GemmaTokenizer.from_pretrained(tmp_path)) == mine
        if kind == "tokenizer.json":  # the other needs protobuf
            assert facts(TheirAutoTokenizer.from_pretrained(tmp_path)) == mine
        copied = copy.deepcopy(pair[0])
        copied.add_tokens("[ANOTHER]")
        assert facts(pair[0]) == mine

    def test_come_with_the_constructor(self, folder, tokenizer_file, kind):
        options = {"pad_token": "[PAD]", "extra_special_tokens": ["[S]", "<table>"]}
        mine, other = map(facts, tokenizers(folder, tokenizer_file, kind, **options))
        assert mine == other
        assert (mine["pad_token_id"], mine["len"]) == (520, 522)

    def test_an_unknown_piece_is_the_unknown_token(self, folder, tokenizer_file, kind):
        mine, other = tokenizers(folder, tokenizer_file, kind)
        for pieces in ("nope", ["nope", "▁the"]):
            found = mine.convert_tokens_to_ids(pieces)
            assert found == other.convert_tokens_to_ids(pieces) != None  # noqa: E711

    def test_a_name_alone_adds_nothing(self, folder, tokenizer_file, kind):
        """Transformers then pads with <unk>."""
        tokenizer, _ = tokenizers(folder, tokenizer_file, kind)
        with refused(r"add_special_tokens\(\{'pad_token': '\[PAD\]'\}\) adds it"):
            tokenizer.pad_token = "[PAD]"

    def test_a_model_has_no_row_for_them(self, folder, tokenizer_file, kind):
        model = AutoModelForCausalLM.from_pretrained("demo")
        ids = [model.config.vocab_size]
        with refused(str(model.config.vocab_size)):
            model([ids])


class TestNamedTokens:
    @pytest.mark.parametrize("kind", KINDS)
    def test_are_attributes(self, folder, tokenizer_file, tmp_path, kind):
        options = {
            "extra_special_tokens": {"image_token": "<img>", "boi_token": "<table>"},
            "audio_token": "<aud>",
        }
        pair = tokenizers(folder, tokenizer_file, kind, **options)
        mine, other = map(facts, pair)
        assert mine == other
        for tokenizer in pair:
            assert (tokenizer.image_token, tokenizer.boi_token_id) == ("<img>", 16)
            tokenizer.image_token = "<unused0>"
            assert tokenizer.image_token_id == 5
            tokenizer.image_token_id = 6
            assert tokenizer.image_token == "<unused1>"
            assert not hasattr(tokenizer, "video_token")
        assert pair[0].SPECIAL_TOKENS_ATTRIBUTES == pair[1].SPECIAL_TOKENS_ATTRIBUTES
        for i, tokenizer in enumerate(pair):
            tokenizer.save_pretrained(tmp_path / str(i))
            again = GemmaTokenizer.from_pretrained(tmp_path / str(i))
            assert again.special_tokens_map == pair[1].special_tokens_map
            assert again.image_token_id == 6

    def test_as_gemma_3_has_them(self):
        folder = real_tokenizer("gemma3")
        mine, other = (t.from_pretrained(folder) for t in (GemmaTokenizer, TheirAutoTokenizer))
        for name in ("boi_token", "eoi_token", "image_token"):
            for attribute in (name, f"{name}_id"):
                assert getattr(mine, attribute) == getattr(other, attribute)
        assert mine.special_tokens_map == other.special_tokens_map
        assert mine.get_added_vocab() == other.get_added_vocab()
        assert mine.all_special_ids == other.all_special_ids
        assert len(mine) == len(other) == mine.vocab_size + 1


class TestSettingsOfOtherTokenizers:
    def test_that_describe_gemmas_too_change_nothing(self, folder, tokenizer_file):
        options = {"do_lower_case": False, "keep_accents": True, "legacy": False}
        options |= {"add_prefix_space": False, "from_slow": None}
        pair = tokenizers(folder, tokenizer_file, "tokenizer.json", **options)
        mine, other = map(facts, pair)
        assert mine == other

    @pytest.mark.parametrize("name", ["do_lower_case", "add_prefix_space", "strip_accents"])
    def test_that_would_change_a_text_are_refused(self, folder, name):
        with refused(f"{name}=True: Gemma's tokenizers do not change a text"):
            GemmaTokenizer.from_pretrained(folder, **{name: True})


class TestFolders:
    def test_where_files_come_from(self, tokenizer_file, tmp_path):
        GemmaTokenizer(tokenizer_file).save_pretrained(tmp_path / "part")
        tokenizer = GemmaTokenizer.from_pretrained(
            tmp_path,
            subfolder="part",
            token=None,
            revision="main",
            cache_dir=str(tmp_path / "cache"),
            local_files_only=True,
            force_download=False,
            trust_remote_code=True,
            use_fast=True,
        )
        assert len(tokenizer) == 520
        with refused("local_files_only asks no network"):
            GemmaTokenizer.from_pretrained(
                "nobody/nothing", local_files_only=True, cache_dir=str(tmp_path / "cache")
            )

    def test_what_a_push_takes_does_nothing_without_one(self, tokenizer_file, tmp_path):
        tokenizer = GemmaTokenizer(tokenizer_file)
        tokenizer.save_pretrained(
            tmp_path, push_to_hub=False, safe_serialization=True, max_shard_size="1GB", token=None
        )
        with refused("is a file"):
            tokenizer.save_pretrained(tmp_path / "tokenizer.model")

    def test_templates_are_files(self, folder, tokenizer_file, tmp_path):
        templates = {"default": "{{ 1 }}", "tool_use": "{{ 2 }}", "r.a-g": "{{ 3 }}"}
        for i, tokenizer in enumerate(tokenizers(folder, tokenizer_file, "tokenizer.json")):
            tokenizer.chat_template = templates
            tokenizer.save_pretrained(tmp_path / str(i))
            names = {path.name for path in (tmp_path / str(i)).rglob("*.jinja")}
            assert names == {"chat_template.jinja", "tool_use.jinja", "r.a-g.jinja"}
            for reader in (GemmaTokenizer, TheirAutoTokenizer):
                assert reader.from_pretrained(tmp_path / str(i)).chat_template == templates
        tokenizer.save_pretrained(tmp_path / "config", save_jinja_files=False)
        GemmaTokenizer.from_pretrained(tmp_path / "config").save_pretrained(
            tmp_path / "again", save_jinja_files=False
        )
        for name in ("config", "again"):
            saved = json.loads((tmp_path / name / "tokenizer_config.json").read_text())
            assert {t["name"]: t["template"] for t in saved["chat_template"]} == templates
            assert not list((tmp_path / name).rglob("*.jinja"))

    @pytest.mark.parametrize("name", ["../x", "a/b", "..", "", "a\\b", "/x", "\0"])
    def test_a_template_stays_in_its_folder(self, tokenizer_file, tmp_path, name):
        tokenizer = GemmaTokenizer(tokenizer_file, chat_template={"default": "a", name: "b"})
        with refused("no name of a file"):
            tokenizer.save_pretrained(tmp_path / "folder")
        assert list(tmp_path.iterdir()) == []
