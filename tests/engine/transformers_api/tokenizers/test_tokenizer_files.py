"""Saved tokenizers: files that gemcut and transformers read from each other."""

import copy
import os
import sys

import pytest
from tokenizer_texts import TEMPLATE, turns
from transformers import AutoTokenizer as TheirAutoTokenizer

from gemcut.engine.transformers_api.auto import AutoTokenizer
from gemcut.engine.transformers_api.tokenizers.tokenizer import GemmaTokenizer


class TestFiles:
    def test_round_trip(self, tokenizer_file, tmp_path):
        options = {
            "add_eos_token": True, "padding_side": "right", "truncation_side": "left",
            "model_max_length": 99, "pad_token": "<unused0>", "chat_template": TEMPLATE,
            "sp_model_kwargs": {"alpha": 0.3}, "extra_special_tokens": ["<table>"],
            "clean_up_tokenization_spaces": True, "spaces_between_special_tokens": True,
            "split_special_tokens": True, "mask_token": None, "unk_token": "<unused1>",
        }  # fmt: skip
        paths = GemmaTokenizer(tokenizer_file, **options).save_pretrained(tmp_path)
        assert all(os.path.isfile(path) for path in paths)
        assert (tmp_path / "tokenizer.model").read_bytes() == tokenizer_file.read_bytes()
        loaded = AutoTokenizer.from_pretrained(str(tmp_path))
        for name, value in options.items():
            assert getattr(loaded, name) == value, name
        assert loaded.name_or_path == str(tmp_path)
        assert AutoTokenizer.from_pretrained(tmp_path, model_max_length=5).model_max_length == 5

    def test_what_is_not_known_is_carried(self, tokenizer_file, tmp_path):
        (tmp_path / "tokenizer.model").write_bytes(tokenizer_file.read_bytes())
        config = '{"legacy": null, "image_token": "<table>", "add_eos_token": true,'
        config += '"bos_token": {"__type": "AddedToken", "content": "<eos>"}}'
        (tmp_path / "tokenizer_config.json").write_text(config)
        tokenizer = GemmaTokenizer.from_pretrained(tmp_path)
        assert (tokenizer.bos_token, tokenizer.add_eos_token) == ("<eos>", True)
        assert (tokenizer.image_token, tokenizer.image_token_id) == ("<table>", 16)
        tokenizer.save_pretrained(tmp_path / "new")
        saved = (tmp_path / "new" / "tokenizer_config.json").read_text()
        assert '"image_token": "<table>"' in saved
        assert '"legacy": null' in saved
        with pytest.raises(TypeError, match="no argument 'image'"):
            GemmaTokenizer.from_pretrained(tmp_path, image="x")

    def test_tokenizer_json_from_transformers(self, saved, from_json, theirs):
        assert sorted(path.name for path in saved.iterdir()) == [
            "chat_template.jinja", "tokenizer.json", "tokenizer_config.json",
        ]  # fmt: skip
        assert from_json.encode("The <bos>") == theirs.encode("The <bos>")
        assert from_json.chat_template == TEMPLATE
        assert from_json.all_special_tokens == theirs.all_special_tokens
        assert from_json.get_vocab() == theirs.get_vocab()

    def test_what_a_tokenizer_json_adds_around_counts(self, theirs, tmp_path):
        theirs = copy.deepcopy(theirs)
        theirs.add_bos_token, theirs.add_eos_token = False, True
        theirs.save_pretrained(tmp_path)
        tokenizer = GemmaTokenizer.from_pretrained(tmp_path)
        assert tokenizer.encode("a") == theirs.encode("a")
        assert GemmaTokenizer.from_pretrained(tmp_path, add_bos_token=True).encode("a")[0] == 2

    def test_transformers_reads_a_saved_tokenizer_json(self, from_json, tmp_path):
        from_json.save_pretrained(tmp_path)
        theirs = TheirAutoTokenizer.from_pretrained(tmp_path)
        assert theirs.encode("The children<eos>") == from_json.encode("The children<eos>")
        assert theirs.chat_template == TEMPLATE
        again = GemmaTokenizer.from_pretrained(tmp_path)
        assert again.encode("The children<eos>") == from_json.encode("The children<eos>")

    @pytest.mark.parametrize(("bos", "eos"), [(True, True), (False, True), (False, False)])
    def test_what_is_added_around_is_saved_in_the_json(self, saved, tmp_path, bos, eos):
        tokenizer = GemmaTokenizer.from_pretrained(saved, add_bos_token=bos, add_eos_token=eos)
        tokenizer.save_pretrained(tmp_path)
        for reader in (GemmaTokenizer, TheirAutoTokenizer):
            loaded = reader.from_pretrained(tmp_path)
            assert loaded("a", "b c", return_token_type_ids=True).data == (
                tokenizer("a", "b c", return_token_type_ids=True).data
            )
            assert loaded.encode("a") == tokenizer.encode("a")

    def test_the_former_name_overrides(self, tokenizer_file, tmp_path):
        GemmaTokenizer(tokenizer_file).save_pretrained(tmp_path)
        options = {"additional_special_tokens": ["<table>"]}
        tokenizer = GemmaTokenizer.from_pretrained(tmp_path, **options)
        assert tokenizer.extra_special_tokens == ["<table>"]

    def test_added_tokens_choose_the_json(self, saved, tokenizer_file, tmp_path, theirs):
        """A fine-tune's tokenizer.model may lack the tokens that were added to it."""
        theirs = copy.deepcopy(theirs)
        theirs.add_tokens(["<tool>"], special_tokens=True)
        theirs.save_pretrained(tmp_path)
        (tmp_path / "added_tokens.json").write_text('{"<tool>": 520}')
        (tmp_path / "tokenizer.model").write_bytes(tokenizer_file.read_bytes())
        tokenizer = GemmaTokenizer.from_pretrained(tmp_path)
        assert tokenizer.encode("a<tool>") == theirs.encode("a<tool>")
        assert (tokenizer.vocab_size, len(tokenizer)) == (theirs.vocab_size, len(theirs))
        (tmp_path / "tokenizer.json").unlink()
        tokenizer = GemmaTokenizer.from_pretrained(tmp_path)
        assert tokenizer.encode("a<tool>") == theirs.encode("a<tool>")

    def test_several_templates(self, tokenizer_file, tmp_path):
        templates = {"default": "{{ messages[0].content }}", "tool_use": "b"}
        GemmaTokenizer(tokenizer_file, chat_template=templates).save_pretrained(tmp_path)
        tokenizer = GemmaTokenizer.from_pretrained(tmp_path)
        assert tokenizer.chat_template == templates
        assert tokenizer.apply_chat_template(turns("a"), tokenize=False) == "a"
        assert tokenizer.get_chat_template("tool_use") == "b"
        assert tokenizer.get_chat_template(tools=[]) == "b"
        tokenizer.chat_template = {"x": "a"}
        with pytest.raises(ValueError, match=r"give chat_template=\['x'\]"):
            tokenizer.apply_chat_template(turns("a"))

    def test_demo_and_prefixes(self, tmp_path):
        tokenizer = AutoTokenizer.from_pretrained("demo", use_fast=True)
        assert tokenizer.decode(tokenizer.encode("Hello")) == "<bos>Hello"
        (path,) = tokenizer.save_vocabulary(tmp_path, filename_prefix="x")
        assert GemmaTokenizer(path).encode("Hello") == tokenizer.encode("Hello")
        paths = tokenizer.save_pretrained(tmp_path, filename_prefix="y")
        assert all(os.path.basename(path).startswith("y-") for path in paths)

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"use_fast": 3}, ValueError, "use_fast=3"),
            ({"proxies": {"http": "x"}}, NotImplementedError, "set HTTPS_PROXY"),
            ({"subfolder": "../x"}, ValueError, "no folder within"),
            ({"no_such": 1}, TypeError, "no_such"),
        ],
    )
    def test_refuses(self, arguments, error, message):
        with pytest.raises(error, match=message):
            GemmaTokenizer.from_pretrained("demo", **arguments)

    def test_refuses_folders(self, ours, tmp_path, saved):
        with pytest.raises(ValueError, match=r"neither tokenizer.model nor tokenizer.json"):
            GemmaTokenizer.from_pretrained(tmp_path)
        with pytest.raises(ValueError, match="is no folder"):
            ours.save_vocabulary(tmp_path / "lost")
        with pytest.raises(NotImplementedError, match="push_to_hub"):
            ours.save_pretrained(tmp_path, push_to_hub=True)
        with pytest.raises(NotImplementedError, match="legacy_format=False"):
            ours.save_pretrained(tmp_path, legacy_format=False)
        with pytest.raises(TypeError, match="no_such"):
            ours.save_pretrained(tmp_path, no_such=1)
        (tmp_path / "tokenizer.json").write_text("{}")
        with pytest.raises(ValueError, match=r"is not a tokenizer\.json"):
            GemmaTokenizer.from_pretrained(tmp_path)
        (tmp_path / "tokenizer_config.json").write_text("{")
        with pytest.raises(ValueError, match="cannot be read as JSON"):
            GemmaTokenizer.from_pretrained(tmp_path)
        (tmp_path / "tokenizer_config.json").write_text("[]")
        with pytest.raises(ValueError, match="holds a list"):
            GemmaTokenizer.from_pretrained(tmp_path)

    def test_another_kind_of_json(self, tmp_path):
        tokenizers = pytest.importorskip("tokenizers")
        path = str(tmp_path / "tokenizer.json")
        backend = tokenizers.Tokenizer(tokenizers.models.BPE())
        backend.save(path)
        with pytest.raises(ValueError, match="alters text"):
            GemmaTokenizer(tokenizer_file=path)

    def test_without_tokenizers(self, saved, monkeypatch):
        monkeypatch.setitem(sys.modules, "tokenizers", None)
        with pytest.raises(ImportError, match="pip install tokenizers"):
            GemmaTokenizer.from_pretrained(saved)
