"""The bytes of a tokenizer.model, written from pieces that another kind of file holds.

It is a message of protobuf's, sentencepiece_model.proto in SentencePiece's sources: pieces, then
what its trainer and its normalizer were told.  Only what encoding and decoding read is there.
"""

import struct
from collections.abc import Mapping, Sequence

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE_PIECE = TYPES = range(1, 7)
_BPE = 2
# The fields of the trainer's settings that name pieces.
_NAMES = {"unk_token": 45, "bos_token": 46, "eos_token": 47, "pad_token": 48}


def sentencepiece_model(
    pieces: Sequence[str],
    scores: Sequence[float],
    types: Sequence[int],
    named: Mapping[str, str],
    *,
    add_dummy_prefix: bool = False,
) -> bytes:
    """A tokenizer.model of BPE that leaves text as it is, with a score and a type for each piece.

    named: the pieces of "bos_token", "eos_token", "unk_token" and "pad_token".
    """
    has_bytes = BYTE_PIECE in types
    trainer = _number(3, _BPE) + _number(4, len(pieces)) + _number(35, has_bytes)
    trainer += b"".join(_field(_NAMES[name], piece.encode()) for name, piece in named.items())
    normalizer = _field(1, b"identity") + _number(3, add_dummy_prefix)
    normalizer += _number(4, False) + _number(5, True)  # spaces stay, as "▁"
    return b"".join(
        [
            *(
                _field(1, _field(1, piece.encode()) + struct.pack("<Bf", 0x15, score) + kind)
                for piece, score, kind in zip(
                    pieces, scores, map(_TYPE_FIELDS.__getitem__, types), strict=True
                )
            ),
            _field(2, trainer),
            _field(3, normalizer),
        ]
    )


def _varint(value: int) -> bytes:
    """A number of protobuf's: seven bits a byte, the lowest first."""
    parts = []
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*parts, value])


def _field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _number(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


_TYPE_FIELDS = {kind: _number(3, kind) for kind in TYPES}
