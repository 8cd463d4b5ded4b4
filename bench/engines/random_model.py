"""Models of published sizes with random weights and a made-up vocabulary, without a download.

Weights keep the variance of what they multiply.  Two things are not left to chance, or the text
would be one token over and over:

  - A tied head sees the newest token's own row of the table in the residual stream, and would
    choose that token again.  So the table is small: the layers' branches outweigh its rows.
  - The final norm then brings the logits back to the spread that trained models have.

The vocabulary is the demo's and more pieces, so that ids become text at the usual cost.
"""

import struct
from dataclasses import replace

import torch
from torch import Tensor

from gemcut.engine.checkpoints.hub import DEMO
from gemcut.engine.checks import check_int
from gemcut.engine.config.model_config import PUBLISHED, ModelConfig
from gemcut.engine.execution.weights import Weights, empty_weights, plain
from gemcut.tokenizer import Tokenizer
from gemcut.tokenizer.sentencepiece_vocabulary import SentencePieceVocabulary

SEED = 0
NORM_STD = 0.1  # of norm weights, which are offsets from one
EMBEDDED = 1 / 64  # root mean square of a scaled row of the table; a branch's is about 1
LOGIT_STD = 3.0
TOKENIZER = "tokenizer.model"


def published_config(name: str, num_layers: int | None = None) -> ModelConfig:
    """The config of a published size, cut to its first layers; ValueError for another name."""
    if name not in PUBLISHED:
        raise ValueError(f"--random {name!r} is unknown; there are {', '.join(PUBLISHED)}")
    config = PUBLISHED[name]
    if num_layers is None:
        return config
    check_int("layers", num_layers, 1, config.num_layers)
    return replace(config, num_layers=num_layers, layer_types=config.layer_types[:num_layers])


def random_weights(
    config: ModelConfig, *, device: torch.device, dtype: torch.dtype, seed: int = SEED
) -> Weights:
    """Weights made where they are used, the same for the same seed, device and dtype."""
    generator = torch.Generator(device).manual_seed(seed)
    weights = empty_weights(config, device=device, dtype=dtype)

    def fill(tensor: Tensor, std: float, mean: float = 0.0) -> None:
        tensor.normal_(mean, std, generator=generator)

    table_std = EMBEDDED / config.embedding_scale
    fill(plain(weights.embedding), table_std)
    if weights.lm_head is not weights.embedding:
        fill(plain(weights.head_table), table_std)
    for layer in weights.layers:
        for tensor in vars(layer).values():
            if tensor is not None:
                fill(tensor, NORM_STD if tensor.ndim == 1 else tensor.shape[1] ** -0.5)
    # normed states have a root mean square of 1: a logit's deviation is sqrt(hidden_size) of a row
    gain = LOGIT_STD / (table_std * config.hidden_size**0.5)
    fill(weights.norm, NORM_STD * gain, gain - 1)
    return weights


def random_tokenizer(vocab_size: int) -> Tokenizer:
    """The demo's vocabulary followed by made-up pieces, `vocab_size` in all."""
    model = (DEMO / TOKENIZER).read_bytes()
    first = len(SentencePieceVocabulary(model).pieces)
    # repeated fields of a serialised message may be appended to it
    more = b"".join(_piece(f"▁w{i}", -float(i)) for i in range(first, vocab_size))
    return Tokenizer(SentencePieceVocabulary(model + more, "the made-up vocabulary"))


def _piece(text: str, score: float) -> bytes:
    """An entry of SentencePiece's ModelProto.pieces: field 1 is the text, field 2 the score."""
    body = _delimited(1, text.encode()) + bytes([2 << 3 | 5]) + struct.pack("<f", score)
    return _delimited(1, body)


def _delimited(field: int, content: bytes) -> bytes:
    """A field of protobuf's wire type 2: its tag, its length as a varint, its content."""
    assert len(content) < 128  # one byte
    return bytes([field << 3 | 2, len(content)]) + content
