"""A tokenizer's calls: texts to batches of ids, and ids to text."""

from collections.abc import Mapping, Sequence
from typing import Any

from gemcut.engine.transformers_api.tokenizers.batch_encoding import (
    BatchEncoding,
    check_tensor_type,
)
from gemcut.engine.transformers_api.tokenizers.padding import (
    Row,
    joined,
    padded,
    padded_width,
    padding_rule,
    truncated,
)
from gemcut.engine.transformers_api.tokenizers.special_tokens import SpecialTokens
from gemcut.tokenizer.vocabularies import Segment, text_of

_UNTIDY = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")


class TextCoder(SpecialTokens):
    """The part of a tokenizer that encodes and decodes, by the settings below."""

    model_input_names = ("input_ids", "attention_mask")
    pad_token_type_id = 0

    padding_side: str
    truncation_side: str
    model_max_length: int
    split_special_tokens: bool
    clean_up_tokenization_spaces: bool
    spaces_between_special_tokens: bool

    def __call__(
        self,
        text: Any = None,
        text_pair: Any = None,
        text_target: Any = None,
        text_pair_target: Any = None,
        *,
        add_special_tokens: bool = True,
        stride: int = 0,
        is_split_into_words: bool = False,
        return_overflowing_tokens: bool = False,
        split_special_tokens: bool | None = None,
        tokenizer_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> BatchEncoding:
        """The encoding of a text, of a pair, or of lists of them.

        A literal "<bos>" in a text is the token, unless `split_special_tokens`; BOS is still added
        before it, as transformers does.  `options` are those of `batch`.
        """
        options = dict(tokenizer_kwargs or {}) | options
        for name, value in (
            ("text_target", text_target),
            ("text_pair_target", text_pair_target),
            ("stride", stride),
            ("is_split_into_words", is_split_into_words),
            ("return_overflowing_tokens", return_overflowing_tokens),
        ):
            if value:
                raise NotImplementedError(f"{name}={value!r} is not supported")
        as_text = (
            self.split_special_tokens if split_special_tokens is None else split_special_tokens
        )
        offsets = bool(options.get("return_offsets_mapping"))
        samples, is_batch = _samples(text, text_pair)
        encoded = [[self._segment(t, not as_text, offsets) for t in sample] for sample in samples]
        return self.batch(encoded, is_batch, add_special_tokens=add_special_tokens, **options)

    def _segment(self, text: str, parse_special: bool, offsets: bool) -> Segment:
        if offsets:
            return self._vocabulary.encode_with_offsets(text, parse_special=parse_special)
        ids = self._vocabulary.encode(text, add_bos=False, parse_special=parse_special)
        return Segment(ids, [(0, 0)] * len(ids))

    def batch(
        self,
        samples: Sequence[Sequence[Segment]],
        is_batch: bool,
        *,
        add_special_tokens: bool,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_tensors: str | None = None,
        return_token_type_ids: bool | None = None,
        return_attention_mask: bool | None = None,
        return_special_tokens_mask: bool = False,
        return_offsets_mapping: bool = False,
        return_length: bool = False,
        verbose: bool = True,  # ignored: nothing is printed
    ) -> BatchEncoding:
        """The encoding of texts whose ids are known, each sample of one or two segments.

        `padding` is True or "longest", "max_length", or False; `truncation` is True or
        "longest_first", "only_first", "only_second", or False.  Without `max_length` they use
        `model_max_length`; a tokenizer that has none neither pads nor truncates to it.
        """
        if return_tensors is not None:
            check_tensor_type(return_tensors)
        rule = padding_rule(
            padding,
            truncation,
            max_length,
            pad_to_multiple_of=pad_to_multiple_of,
            model_max_length=self.model_max_length,
        )
        around = (self._prefix, self._suffix) if add_special_tokens else ([], [])
        rows: list[Row] = []
        for segments in samples:
            if rule.truncation != "do_not_truncate" and rule.max_length is not None:
                taken = len(segments) * (len(around[0]) + len(around[1]))
                room = rule.max_length - taken
                segments = truncated(segments, room, rule.truncation, self.truncation_side)
            rows.append(joined(segments, *around))

        width = padded_width([len(row.ids) for row in rows], rule, pad_to_multiple_of)
        pad_id = self._pad_id() if width else 0
        side = self.padding_side if padding_side is None else padding_side

        def aligned(lists: Sequence[Sequence[Any]], filler: Any) -> list[list[Any]]:
            return [padded(values, width, side, filler) for values in lists]

        data: dict[str, Any] = {"input_ids": aligned([row.ids for row in rows], pad_id)}
        if return_token_type_ids:
            data["token_type_ids"] = aligned([r.type_ids for r in rows], self.pad_token_type_id)
        if return_attention_mask is None or return_attention_mask:
            data["attention_mask"] = aligned([row.mask for row in rows], 0)
        if return_special_tokens_mask:
            data["special_tokens_mask"] = aligned([row.special_tokens_mask for row in rows], 1)
        if return_offsets_mapping:
            data["offset_mapping"] = aligned([row.offsets for row in rows], (0, 0))
        if return_length:
            data["length"] = [len(ids) for ids in data["input_ids"]]
        pieces = [[self._vocabulary.pieces[i] for i in ids] for ids in data["input_ids"]]
        sequences = aligned([row.sequences for row in rows], None)
        if not is_batch and return_tensors is None:
            data = {k: v if k == "length" else v[0] for k, v in data.items()}
        return BatchEncoding(
            data, tensor_type=return_tensors, tokens=pieces, sequence_ids=sequences
        )

    def _pad_id(self) -> int:
        if self.pad_token_id is None:
            raise ValueError("padding needs a pad_token: set tokenizer.pad_token")
        return self.pad_token_id

    def encode(
        self, text: Any, text_pair: Any = None, add_special_tokens: bool = True, **options: Any
    ) -> Any:
        """The input_ids alone, with the options of a call."""
        return self(text, text_pair, add_special_tokens=add_special_tokens, **options).input_ids

    def encode_plus(self, text: Any, text_pair: Any = None, **options: Any) -> BatchEncoding:
        """A call, under its former name."""
        return self(text, text_pair, **options)

    def batch_encode_plus(self, batch: Sequence[Any], **options: Any) -> BatchEncoding:
        """A call with a list of texts or of pairs, under its former name."""
        return self(batch, **options)

    def tokenize(
        self,
        text: str,
        pair: str | None = None,
        add_special_tokens: bool = False,
        **options: Any,
    ) -> list[str]:
        """The pieces of a text as the vocabulary spells them, with "▁" for a space."""
        return self(text, pair, add_special_tokens=add_special_tokens, **options).tokens()

    def pad(
        self,
        encoded_inputs: Any,
        padding: bool | str = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: str | None = None,
        verbose: bool = True,  # ignored: nothing is printed
    ) -> BatchEncoding:
        """One encoding, or a list or mapping of several, with rows of one length.

        input_ids, attention_mask, token_type_ids and special_tokens_mask are padded; other entries
        (labels) stay as they are.  Tensors are returned for tensors.
        """
        if isinstance(encoded_inputs, Sequence) and encoded_inputs:
            encoded_inputs = {k: [one[k] for one in encoded_inputs] for k in encoded_inputs[0]}
        if not isinstance(encoded_inputs, Mapping) or "input_ids" not in encoded_inputs:
            raise ValueError("pad takes an encoding, or a list of encodings, that has input_ids")
        if return_tensors is None:
            return_tensors = _tensor_type(encoded_inputs["input_ids"])
        data = {name: plain(value) for name, value in encoded_inputs.items()}
        is_batch = bool(data["input_ids"]) and isinstance(data["input_ids"][0], list)
        if not is_batch:
            data = {name: [value] for name, value in data.items()}
        counts = {name: len(value) for name, value in data.items()}
        if len(set(counts.values())) > 1:
            raise ValueError(f"the entries differ in their number of rows: {counts}")

        lengths = [len(ids) for ids in data["input_ids"]]
        # max_length alone would truncate, which pad does not do
        rule = padding_rule(
            padding,
            False,
            max_length if padding == "max_length" else None,
            pad_to_multiple_of=pad_to_multiple_of,
            model_max_length=self.model_max_length,
        )
        width = padded_width(lengths, rule, pad_to_multiple_of)
        if return_attention_mask is None or return_attention_mask:
            data.setdefault("attention_mask", [[1] * length for length in lengths])
        side = self.padding_side if padding_side is None else padding_side
        pad_id = self._pad_id() if width else 0
        for name, filler in (
            ("input_ids", pad_id),
            ("attention_mask", 0),
            ("token_type_ids", self.pad_token_type_id),
            ("special_tokens_mask", 1),
        ):
            if name in data:
                data[name] = [padded(values, width, side, filler) for values in data[name]]
        if not is_batch:
            data = {name: value[0] for name, value in data.items()}
        return BatchEncoding(data, tensor_type=return_tensors)

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
        pieces = self.convert_ids_to_tokens(ids, skip_special_tokens=skip_special)
        if self.spaces_between_special_tokens if spaces is None else spaces:
            text = " ".join(map(text_of, self._runs(pieces)))
        else:
            text = text_of(pieces)
        wanted = self.clean_up_tokenization_spaces if clean_up is None else clean_up
        return self.clean_up_tokenization(text) if wanted else text

    def _runs(self, pieces: Sequence[str]) -> list[list[str]]:
        """Each special token by itself, and the pieces between two of them together."""
        special = {self._vocabulary.pieces[i] for i in self._skipped()}
        runs: list[list[str]] = []
        for i, piece in enumerate(pieces):
            if i == 0 or piece in special or pieces[i - 1] in special:
                runs.append([])
            runs[-1].append(piece)
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


def _tensor_type(values: Any) -> str | None:
    """The kind of tensor that rows are or hold; None for lists."""
    while isinstance(values, list | tuple) and values:
        values = values[0]
    return {"torch": "pt", "numpy": "np", "jaxlib": "jax"}.get(
        type(values).__module__.split(".")[0]
    )


def _samples(text: Any, pair: Any) -> tuple[list[tuple[str, ...]], bool]:
    """One or two texts for each row, and whether the caller gave a list."""
    if isinstance(text, str) and (pair is None or isinstance(pair, str)):
        return [(text, pair) if pair else (text,)], False
    if not isinstance(text, list | tuple) or isinstance(pair, str):
        raise ValueError(
            f"text must be a string or a list of strings, and text_pair alike, got "
            f"{type(text).__name__} and {type(pair).__name__}"
        )
    if not text:
        raise ValueError("text is an empty list; a batch has at least one row")
    if pair is None:
        samples = [(one,) if isinstance(one, str) else one for one in text]
    elif len(pair) != len(text):
        raise ValueError(f"text has {len(text)} rows and text_pair has {len(pair)}")
    else:
        samples = list(zip(text, pair, strict=True))
    for sample in samples:
        is_row = isinstance(sample, list | tuple) and 1 <= len(sample) <= 2
        if not is_row or not all(isinstance(one, str) for one in sample):
            raise ValueError(f"a row of text is a string or a pair of strings, got {sample!r}")
    return [tuple(sample) for sample in samples], True
