"""BatchEncoding: tensors of every kind, and access to its rows."""

import copy
import pickle
import sys

import jax
import numpy as np
import pytest
import torch
from tokenizer_texts import MANY

from gemcut.engine.transformers_api.tokenizers.batch_encoding import BatchEncoding


class TestTensors:
    @pytest.mark.parametrize(
        ("name", "kind", "dtype"),
        [
            ("pt", torch.Tensor, torch.int64),
            ("np", np.ndarray, np.int64),
            ("jax", jax.Array, np.int32),
        ],
    )
    def test_kinds(self, ours, name, kind, dtype):
        lists, tensors = ours(MANY, padding=True), ours(MANY, padding=True, return_tensors=name)
        for key, value in tensors.items():
            assert isinstance(value, kind)
            assert value.dtype == dtype
            assert value.tolist() == lists[key]
        assert ours("a", return_tensors=name).input_ids.shape == (1, 2)
        empty = ours("", add_special_tokens=False, return_tensors=name).input_ids
        assert (empty.shape, empty.dtype) == ((1, 0), dtype)
        assert ours.decode(tensors.input_ids) == ours.decode(lists.input_ids)

    @pytest.mark.parametrize("name", ["pt", "np", "jax"])
    def test_ragged(self, ours, name):
        with pytest.raises(ValueError, match=r"rows of 'input_ids' differ in length.*padding=True"):
            ours(MANY, return_tensors=name)

    def test_without_jax(self, ours, monkeypatch):
        monkeypatch.setitem(sys.modules, "jax.numpy", None)
        with pytest.raises(ImportError, match="pip install jax"):
            ours("a", return_tensors="jax")


class TestBatchEncoding:
    def test_mapping(self, ours):
        encoding = ours(MANY)
        assert {**encoding} == encoding.data == dict(encoding.items())
        assert list(encoding.keys()) == ["input_ids", "attention_mask"]
        assert encoding.input_ids is encoding["input_ids"]
        assert encoding[1:] == {name: value[1:] for name, value in encoding.items()}
        assert encoding.tokens(1) == ["<bos>"]
        for copied in (copy.deepcopy(encoding), pickle.loads(pickle.dumps(encoding))):
            assert copied == encoding
            assert copied.tokens(2) == encoding.tokens(2)
            assert copied.token_to_chars(2, 1) == encoding.token_to_chars(2, 1) == (0, 1)
        assert len(pickle.dumps(encoding)) < 3000  # the vocabulary is not in it

    def test_to(self, ours):
        encoding = ours("a", return_tensors="pt")
        assert encoding.to("meta") is encoding
        assert encoding.input_ids.device.type == "meta"
        encoding["pixels"] = torch.zeros(1)
        encoding.to(torch.bfloat16)
        assert (encoding.pixels.dtype, encoding.input_ids.dtype) == (torch.bfloat16, torch.int64)

    def test_convert_to_tensors(self, ours):
        encoding = ours("a b").convert_to_tensors("pt", prepend_batch_axis=True)
        assert torch.equal(encoding.input_ids, ours("a b", return_tensors="pt").input_ids)

    @pytest.mark.parametrize("name", [None, "np", "jax"])
    def test_to_is_for_torch(self, ours, name):
        with pytest.raises(ValueError, match=r'moves torch tensors.*return_tensors="pt"'):
            ours("a", return_tensors=name).to("cpu")

    def test_refuses(self, ours):
        encoding = ours("a")
        with pytest.raises(AttributeError, match="no 'labels'; it holds"):
            _ = encoding.labels
        with pytest.raises(KeyError, match="no name, slice or row"):
            encoding[None]
        with pytest.raises(KeyError, match="no name, slice or row"):
            BatchEncoding({"input_ids": [1]})[0]
        with pytest.raises(ValueError, match="a tokenizer's call"):
            BatchEncoding({"input_ids": [1]}).tokens()
        with pytest.raises(ValueError, match="a tokenizer's call"):
            BatchEncoding({"input_ids": [1]}).sequence_ids()
