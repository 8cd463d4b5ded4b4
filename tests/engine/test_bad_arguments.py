"""Bad arguments of Engine.from_pretrained, and bad files: one clear line for each."""

import json
import math
import re
import shutil

import pytest
import torch
from engines import one_line, save_random_model
from safetensors.torch import load_file, save_file
from vocabulary import train_vocabulary

from gemcut.engine import Engine, SamplingParams


@pytest.fixture
def damaged(folder, tmp_path):
    """A copy of the checkpoint, to be damaged."""
    return shutil.copytree(folder, tmp_path / "damaged")


BAD_ARGUMENTS = {
    "float16": ({"dtype": "float16"}, "Gemma's activations overflow it"),
    "torch.float16": ({"dtype": torch.float16}, "Gemma's activations overflow it"),
    "unknown dtype": ({"dtype": "int8"}, "dtype 'int8' is not supported"),
    "dtype that is no dtype": ({"dtype": "nn"}, "dtype 'nn' is not supported"),
    "unknown device": ({"device": "gpu"}, "device 'gpu' is unknown"),
    "device without support": ({"device": "meta"}, "device 'meta' is not supported"),
    "unknown ops": ({"ops": "fast"}, "ops 'fast' is unknown"),
    "no slot": ({"max_batch_size": 0}, "max_batch_size 0 is outside 1..4096"),
    "less than no slot": ({"max_batch_size": -1}, "max_batch_size -1 is outside 1..4096"),
    "slots by halves": ({"max_batch_size": 2.0}, "max_batch_size 2.0 is not an integer"),
    "slots that are true": ({"max_batch_size": True}, "max_batch_size True is not an integer"),
    "no tokens": ({"max_seq_len": 0}, "max_seq_len 0 is outside 2..128"),
    "less than no tokens": ({"max_seq_len": -5}, "max_seq_len -5 is outside 2..128"),
    "more tokens than the model has positions": ({"max_seq_len": 129}, "outside 2..128"),
    "tokens by halves": ({"max_seq_len": 64.0}, "max_seq_len 64.0 is not an integer"),
    "tokens that are true": ({"max_seq_len": True}, "max_seq_len True is not an integer"),
    "tokens in words": ({"max_seq_len": "many"}, "'many' is neither an integer nor 'auto'"),
    "no chunk": ({"prefill_chunk": 0}, "prefill_chunk 0 is outside"),
    "graphs by a number": ({"cuda_graphs": 1}, "cuda_graphs 1 is neither True nor False"),
    "launches by a number": (
        {"dependent_launches": 0},
        "dependent_launches 0 is neither True nor False",
    ),
    "graphs by a word": ({"cuda_graphs": "no"}, "cuda_graphs 'no' is neither True nor False"),
    "unknown quantization": ({"quantization": "int3"}, "quantization 'int3'"),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_argument(folder, name):
    arguments, message = BAD_ARGUMENTS[name]
    with pytest.raises((ValueError, NotImplementedError), match=re.escape(message)) as error:
        Engine.from_pretrained(folder, **arguments)
    one_line(error)


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU where there is none")
def test_cuda_where_there_is_none(folder):
    with pytest.raises(ValueError, match="torch sees 0 CUDA devices"):
        Engine.from_pretrained(folder, device="cuda", dtype="float32")


def test_a_cache_that_does_not_fit_names_its_size(folder, damaged):
    """4096 slots of a context that no machine has the memory for: 9 TB."""
    config = json.loads((folder / "config.json").read_text())
    (damaged / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2**24}))
    with pytest.raises(MemoryError, match=r"4096 slots of 16777216 tokens need .* GB") as error:
        Engine.from_pretrained(damaged, max_batch_size=4096, max_seq_len=2**24)
    one_line(error)


def test_no_memory_for_a_cache_is_said(folder, monkeypatch):
    monkeypatch.setattr("gemcut.engine.memory.free_bytes", lambda device: 1000)
    with pytest.raises(MemoryError, match="no size of this model would fit") as error:
        Engine.from_pretrained(folder, dtype="float32")
    one_line(error)


@pytest.mark.parametrize("model", [None, 5])
def test_a_model_that_is_no_name(model):
    with pytest.raises(ValueError, match="must be a name or a path"):
        Engine.from_pretrained(model)


def test_unknown_model_while_offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="'nobody/no-such-model' is no existing folder") as error:
        Engine.from_pretrained("nobody/no-such-model")
    one_line(error)


def test_folder_without_a_config(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json"):
        Engine.from_pretrained(tmp_path, dtype="float32")


def test_missing_tokenizer(damaged):
    (damaged / "tokenizer.model").unlink()
    with pytest.raises(ValueError, match=r"tokenizer\.model"):
        Engine.from_pretrained(damaged)


def test_broken_tokenizer(damaged):
    (damaged / "tokenizer.model").write_bytes(b"\x00garbage")
    with pytest.raises(ValueError, match=r"tokenizer\.model") as error:
        Engine.from_pretrained(damaged)
    one_line(error)


def test_vocabulary_larger_than_the_embedding(damaged):
    train_vocabulary(damaged / "tokenizer.model", vocab_size=540)
    with pytest.raises(ValueError, match="540 pieces, but the embedding only 520 rows"):
        Engine.from_pretrained(damaged)


def test_rows_without_a_piece_are_sampled_and_have_no_text(tmp_path, tokenizer_file):
    """As in transformers: the distribution is over all rows of the embedding."""
    save_random_model(tmp_path, tokenizer_file, vocab_size=600)
    with Engine.from_pretrained(tmp_path, dtype="float32") as engine:
        params = SamplingParams(
            temperature=50.0, max_tokens=100, seed=0, ignore_eos=True, logprobs=600
        )
        output = engine.generate("x", params)
        assert max(output.token_ids) >= 520
        known = [i for i in output.token_ids if i < 520]
        assert output.text == engine.tokenizer.decode(known)
        assert sum(
            math.exp(of.logprob) for of in output.outputs[0].logprobs[0].values()
        ) == pytest.approx(1)
        stopped = engine.generate(
            "x", SamplingParams(stop_token_ids=[*range(520, 600)], min_tokens=5)
        )
        assert len(stopped.token_ids) >= 5
        with pytest.raises(ValueError, match="stop_token_ids"):
            engine.generate("x", SamplingParams(stop_token_ids=[600]))


def test_missing_tensor(damaged):
    weights = load_file(damaged / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, damaged / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight") as error:
        Engine.from_pretrained(damaged)
    one_line(error)


def test_truncated_weights(damaged):
    file = damaged / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        Engine.from_pretrained(damaged)
