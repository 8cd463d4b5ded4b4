"""GemmaTokenizer's constructor, and BPE dropout by sp_model_kwargs."""

import pickle

import pytest
from tokenizer_texts import PAIR
from vocabulary import EURO

from gemcut.engine.transformers_api.auto import AutoTokenizer
from gemcut.engine.transformers_api.tokenizers.tokenizer import GemmaTokenizer, GemmaTokenizerFast
from gemcut.tokenizer import Tokenizer


class TestConstructor:
    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            pytest.param({"no_such": 1}, TypeError, "no_such", id="unknown"),
            pytest.param({"pad_token": 5}, ValueError, "pad_token 5 is neither", id="pad"),
            pytest.param({"bos_token": None}, ValueError, "bos_token is None", id="no-bos"),
            pytest.param(
                {"use_default_system_prompt": True}, ValueError, "no default system", id="system"
            ),
            pytest.param({"padding_side": "up"}, ValueError, "padding_side is 'up'", id="side"),
            pytest.param({"truncation_side": 1}, ValueError, "truncation_side is 1", id="cut"),
            pytest.param({"model_max_length": 0}, ValueError, "model_max_length 0", id="length"),
            pytest.param({"chat_template": 5}, ValueError, "chat_template 5", id="template"),
            pytest.param({"extra_special_tokens": "<table>"}, ValueError, "is a list", id="extra"),
            pytest.param(
                {"extra_special_tokens": [], "additional_special_tokens": []},
                ValueError,
                "give one",
                id="both-names",
            ),
            pytest.param({"vocab_file": None}, ValueError, "vocab_file or a tok", id="no-file"),
            pytest.param({"vocab_file": "no/such"}, ValueError, "No such file", id="lost-file"),
            pytest.param(
                {"vocab_file": None, "tokenizer_file": "no/such"},
                ValueError,
                "No such file",
                id="lost-json",
            ),
        ],
    )
    def test_refuses(self, tokenizer_file, arguments, error, message):
        with pytest.raises(error, match=message):
            GemmaTokenizer(**({"vocab_file": tokenizer_file} | arguments))

    def test_names(self, tokenizer_file):
        assert GemmaTokenizerFast is GemmaTokenizer
        with pytest.raises(TypeError, match=r"AutoTokenizer\.from_pretrained"):
            AutoTokenizer()
        tokenizer = pickle.loads(pickle.dumps(GemmaTokenizer(tokenizer_file)))
        assert "vocab_size=520" in repr(tokenizer)
        assert tokenizer.encode("a") == GemmaTokenizer(tokenizer_file).encode("a")


class TestSampling:
    @pytest.mark.parametrize("kind", ["vocab_file", "tokenizer_file"])
    def test_segmentations_differ_and_decode_alike(self, tokenizer_file, saved, kind):
        file = tokenizer_file if kind == "vocab_file" else saved / "tokenizer.json"
        options = {"enable_sampling": True, "nbest_size": -1, "alpha": 0.5}
        tokenizer = GemmaTokenizer(**{kind: file}, sp_model_kwargs=options)
        text = f"The children walked to the river {EURO}<unused0>"
        segmentations = {tuple(tokenizer.encode(text)) for _ in range(20)}
        assert len(segmentations) > 5
        assert {tokenizer.decode(ids) for ids in segmentations} == {f"<bos>{text}"}

    @pytest.mark.parametrize("options", [{}, {"alpha": 0.5}, {"enable_sampling": False}])
    def test_not_unless_enabled(self, tokenizer_file, ours, options):
        tokenizer = GemmaTokenizer(tokenizer_file, sp_model_kwargs=options)
        assert {tuple(tokenizer.encode(PAIR[0])) for _ in range(10)} == {
            tuple(ours.encode(PAIR[0]))
        }

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"alpha": 1.5}, "alpha 1.5 is above 1"),
            ({"alpha": -0.1}, "alpha -0.1 must be at least 0"),
            ({"alpha": "a"}, "alpha 'a' is not a number"),
            ({"enable_sampling": True, "nbest_size": 1}, "nbest_size 1 samples nothing"),
            ({"nbest_size": -2}, "nbest_size -2 is outside"),
            ({"reverse": True}, r"\['reverse'\] are not supported"),
        ],
        ids=str,
    )
    def test_refuses(self, tokenizer_file, options, message):
        with pytest.raises(ValueError, match=message):
            GemmaTokenizer(tokenizer_file, sp_model_kwargs=options)

    def test_codec_refuses(self, tokenizer_file):
        with pytest.raises(ValueError, match="dropout 2 is no share"):
            Tokenizer.from_file(tokenizer_file, dropout=2)
