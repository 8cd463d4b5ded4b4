"""Ids to text."""

from collections.abc import Mapping, Sequence
from typing import Any

from gemcut.engine.transformers_api.tokenizers.special_tokens import SpecialTokens
from gemcut.tokenizer.vocabularies import text_of

_UNTIDY = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")


class TextDecoder(SpecialTokens):
    """The part of a tokenizer that decodes, by the settings below."""

    clean_up_tokenization_spaces: bool
    spaces_between_special_tokens: bool

    def decode(
        self,
        token_ids: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        spaces_between_special_tokens: bool | None = None,
    ) -> Any:
        """The text of ids, or the list of texts of a list or of a matrix; tensors are taken too."""
        ids = plain(token_ids["input_ids"] if isinstance(token_ids, Mapping) else token_ids)
        options = (skip_special_tokens, clean_up_tokenization_spaces, spaces_between_special_tokens)
        if isinstance(ids, list) and ids and isinstance(ids[0], list):
            return [self._text(row, *options) for row in ids]
        return self._text(ids if isinstance(ids, list) else [ids], *options)

    def batch_decode(
        self,
        sequences: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        spaces_between_special_tokens: bool | None = None,
    ) -> list[str]:
        """The texts that `decode` yields, as a list even of one; of an empty batch, none.

        transformers has done so since 5.24, while its `decode` still reads an empty batch as one
        empty text.
        """
        if hasattr(sequences, "__len__") and len(sequences) == 0:
            return []
        texts = self.decode(
            sequences,
            skip_special_tokens,
            clean_up_tokenization_spaces,
            spaces_between_special_tokens,
        )
        return [texts] if isinstance(texts, str) else texts

    def _text(
        self, ids: Sequence[Any], skip_special: bool, clean_up: bool | None, spaces: bool | None
    ) -> str:
        if not all(type(i) is int for i in ids):
            ids = [self.checked_id(i) for i in ids]
        codec = self._vocabulary
        if self.spaces_between_special_tokens if spaces is None else spaces:
            kept = [i for i in ids if i not in codec.special_ids] if skip_special else ids
            runs = self._runs(kept)
            text = " ".join(codec.decode(run, skip_special_tokens=False) for run in runs)
        else:
            text = codec.decode(ids, skip_special_tokens=skip_special)
        wanted = self.clean_up_tokenization_spaces if clean_up is None else clean_up
        return self.clean_up_tokenization(text) if wanted else text

    def _runs(self, ids: Sequence[int]) -> list[list[int]]:
        """Each special token by itself, and the ids between two of them together."""
        special = self._vocabulary.special_ids
        runs: list[list[int]] = []
        for i, token_id in enumerate(ids):
            if i == 0 or token_id in special or ids[i - 1] in special:
                runs.append([])
            runs[-1].append(token_id)
        return runs

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        """The text that pieces spell together."""
        return text_of(tokens)

    @staticmethod
    def clean_up_tokenization(text: str) -> str:
        """The text without spaces before punctuation and English contractions."""
        for untidy in _UNTIDY:
            text = text.replace(untidy, untidy.strip())
        return text


def plain(values: Any) -> Any:
    """`values` with each tensor in it as a list of numbers."""
    if isinstance(values, list | tuple):
        return [plain(value) for value in values]
    return values.tolist() if hasattr(values, "tolist") else values
