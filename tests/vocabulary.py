"""A small vocabulary like Gemma's, its Hugging Face twin, and the texts to try on them."""

from pathlib import Path

import sentencepiece
from hypothesis import strategies as st
from transformers import AddedToken, GemmaTokenizer
from transformers.tokenization_utils_base import generate_merges

SENTENCES = (
    "It was a bright cold morning, and the market opened at seven.",
    "The children walked to the river and sang of the summer.",
    "The children were reading and singing, walking and talking.",
    "She asked the user for a model, and the model asked the user.",
    "def add(a, b):\n    return a + b\n\n\nprint(add(1, 2))",
    "In 1984 there were 365 days, 12 months and 52 weeks.",
    "Héllo wörld, façade naïve café; über straße.",
    "Москва и Санкт-Петербург.",
    "東京は日本の首都です。",
)
TURN_MARKERS = ("<start_of_turn>", "<end_of_turn>")
MARKERS = ("<mask>", "<unused0>", "<unused1>", *TURN_MARKERS)
USER_DEFINED = (
    *MARKERS,
    "\n", "\n\n", "\n\n\n", "▁▁", "▁▁▁", "▁▁▁▁", "\t\t", "<table>", "</table>",
)  # fmt: skip

CONTROL = ("<pad>", "<eos>", "<bos>", "<unk>")
EURO = "€"  # three bytes in UTF-8, and in none of SENTENCES
FRAGMENTS = (
    "The children", " walked", "user", "model", "Москва", "東京", "1984", "3.14", "٣",
    " ", "  ", "   ", "\t", "\t\t", "\n", "\n\n", "\r\n",
    "e\u0301", "\u0301", "é", EURO, "🙂", "👩\u200d👩\u200d👧", "🇩🇪", "👍🏽",
    "\0", "\ufffd", "\ufeff", "\u00a0", "\u2028", "\U0010ffff", "▁", "▁▁", "<", ">",
    "<table>", "<0x41>",
)  # fmt: skip

_any_texts = st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.text(max_size=8))).map("".join)
# hypothesis also draws the string constants of gemcut's own files, and "<eos>" is one
plain_texts = _any_texts.filter(
    lambda text: not any(literal in text for literal in (*CONTROL, *MARKERS))
)
SPECIAL = (*CONTROL, *MARKERS, "<start_of", "_turn>")
texts = st.lists(st.one_of(plain_texts, st.sampled_from(SPECIAL)), max_size=6).map("".join)


def train_vocabulary(path: Path, vocab_size: int = 520, **options) -> None:
    """A SentencePiece model with the settings of Gemma's, written to path; always the same one."""
    settings = {
        "model_type": "bpe", "byte_fallback": True, "split_digits": True,
        "add_dummy_prefix": False, "remove_extra_whitespaces": False,
        "normalization_rule_name": "identity", "character_coverage": 1.0,
        "pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3,
        "pad_piece": "<pad>", "eos_piece": "<eos>", "bos_piece": "<bos>", "unk_piece": "<unk>",
        "user_defined_symbols": list(USER_DEFINED), "num_threads": 1, "minloglevel": 2,
    }  # fmt: skip
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(SENTENCES),
            model_writer=file,
            vocab_size=vocab_size,
            **(settings | options),
        )


def hugging_face_twin(path: Path) -> GemmaTokenizer:
    """Transformers' tokenizer over the same pieces, converted as the published ones were.

    `GemmaTokenizer.from_pretrained` would read tokenizer.model itself, but needs protobuf.
    """
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    vocab = {processor.id_to_piece(i): i for i in range(len(processor))}
    twin = GemmaTokenizer(vocab, generate_merges(vocab), mask_token=None)
    for piece in USER_DEFINED:
        twin.add_tokens(AddedToken(piece, normalized=False, special=piece in TURN_MARKERS))
    assert len(twin) == len(vocab)
    return twin
