"""Special tokens: their names, their ids, and those put around a text."""

import copy

import pytest
from vocabulary import CONTROL, train_vocabulary

from gemcut.engine.transformers_api.tokenizers.tokenizer import GemmaTokenizer


class TestSpecialTokens:
    def test_named_and_extra(self, ours, theirs):
        assert ours.all_special_tokens == theirs.all_special_tokens
        assert ours.all_special_ids == theirs.all_special_ids
        assert ours.special_tokens_map == theirs.special_tokens_map
        assert ours.get_vocab() == ours.vocab == theirs.get_vocab()
        assert len(ours) == len(theirs) == ours.vocab_size
        for name in ("bos", "eos", "pad", "unk", "mask"):
            for attribute in (f"{name}_token", f"{name}_token_id"):
                assert getattr(ours, attribute) == getattr(theirs, attribute)
        assert set(CONTROL) == set(ours.special_tokens_map.values())

    def test_mask_token(self, tokenizer_file, tmp_path):
        assert GemmaTokenizer(tokenizer_file).mask_token == "<mask>"
        train_vocabulary(tmp_path / "tokenizer.model", user_defined_symbols=["\n"])
        assert GemmaTokenizer(tmp_path / "tokenizer.model").mask_token is None

    def test_update_post_processor(self, ours, theirs):
        """As documented for the fast tokenizer: the first token changes only then."""
        theirs = copy.deepcopy(theirs)
        for tokenizer in (ours, theirs):
            tokenizer.bos_token = "<unused0>"
            assert tokenizer.encode("a")[0] == 2
            tokenizer.update_post_processor()
            assert tokenizer.encode("a")[0] == tokenizer.bos_token_id != 2
            tokenizer.add_eos_token = True
            tokenizer.eos_token_id = tokenizer.convert_tokens_to_ids("<end_of_turn>")
            tokenizer.update_post_processor()
            assert tokenizer.eos_token == "<end_of_turn>"
        assert ours.encode("a", "b") == theirs.encode("a", "b")
        ours.add_bos_token = theirs.add_bos_token = False
        assert ours.encode("a") == theirs.encode("a")
        assert (ours.add_bos_token, ours.add_eos_token) == (False, True)

    def test_added(self, ours):
        assert ours.add_special_tokens({"pad_token": "<eos>"}) == 0
        assert ours.pad_token_id == ours.eos_token_id
        assert ours.add_special_tokens({"extra_special_tokens": ["<table>"]}) == 1
        assert ours.extra_special_tokens == ours.additional_special_tokens == ["<table>"]
        assert ours.add_tokens("<unused1>", special_tokens=True) == 1
        assert len(ours) == 520
        assert ours.decode(ours.encode("<table>a<unused1>"), skip_special_tokens=True) == "a"

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            pytest.param(lambda t: setattr(t, "pad_token", "[PAD]"), r"'\[PAD\]' is no", id="set"),
            pytest.param(lambda t: setattr(t, "pad_token", 5), "neither a string", id="number"),
            pytest.param(lambda t: setattr(t, "pad_token_id", 520), "token id 520", id="id"),
            pytest.param(lambda t: t.add_tokens([5]), "5 is neither a string", id="add"),
            pytest.param(
                lambda t: t.add_special_tokens({"image_token": "a"}), "'image_token'", id="name"
            ),
            pytest.param(
                lambda t: t.add_special_tokens({"extra_special_tokens": "a"}), "a list", id="extra"
            ),
            pytest.param(
                lambda t: (setattr(t, "bos_token", None), t.update_post_processor()),
                "add_bos_token is True, but bos_token is None",
                id="no-bos",
            ),
            pytest.param(
                lambda t: t.get_special_tokens_mask([1], [2], True), "token_ids_1", id="mask"
            ),
        ],
    )
    def test_refuses(self, ours, change, message):
        with pytest.raises(ValueError, match=message):
            change(ours)
