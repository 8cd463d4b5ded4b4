"""A tokenizer's calls: texts to batches of ids."""

import warnings
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from gemcut.engine.checks import check_int
from gemcut.engine.transformers_api.tokenizers.batch_encoding import (
    BatchEncoding,
    check_tensor_type,
)
from gemcut.engine.transformers_api.tokenizers.padding import (
    PaddingRule,
    check_side,
    kept_lengths,
    of_targets,
    padded,
    padded_width,
    padding_rule,
    windows,
)
from gemcut.engine.transformers_api.tokenizers.passages import PassageCoder, samples
from gemcut.engine.transformers_api.tokenizers.rows import (
    Encoding,
    Passage,
    combined,
)
from gemcut.engine.transformers_api.tokenizers.text_decoder import plain


class TextCoder(PassageCoder):
    """The part of a tokenizer that encodes, by the settings below."""

    model_input_names: Sequence[str]
    pad_token_type_id = 0

    padding_side: str
    truncation_side: str
    model_max_length: int
    split_special_tokens: bool
    _warned = False  # of a text beyond model_max_length

    def __call__(
        self,
        text: Any = None,
        text_pair: Any = None,
        text_target: Any = None,
        text_pair_target: Any = None,
        *,
        add_special_tokens: bool = True,
        is_split_into_words: bool = False,
        split_special_tokens: bool | None = None,
        max_length: int | None = None,
        max_target_length: int | None = None,
        tokenizer_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> BatchEncoding:
        """The encoding of a text, of a pair, or of lists of them.

        A literal "<bos>" in a text is the token, unless `split_special_tokens`; BOS is still added
        before it, as transformers does.  With `is_split_into_words` a text is a list of words, each
        encoded by itself.  The ids of `text_target` become `labels`.  `options` are those of
        `batch`.
        """
        if tokenizer_kwargs:  # they come before the arguments, as in transformers
            arguments = {
                "add_special_tokens": add_special_tokens,
                "is_split_into_words": is_split_into_words,
                "split_special_tokens": split_special_tokens,
                "max_length": max_length,
                "max_target_length": max_target_length,
            }
            arguments |= options | dict(tokenizer_kwargs)
            return self(text, text_pair, text_target, text_pair_target, **arguments)
        as_text = (
            self.split_special_tokens if split_special_tokens is None else split_special_tokens
        )

        def encoding(text: Any, pair: Any, **lengths: Any) -> BatchEncoding:
            rows, is_batch = samples(text, pair, is_split_into_words)
            passages = [
                [
                    self.passage(
                        words,
                        is_split=is_split_into_words,
                        as_text=as_text,
                        located=bool(options.get("return_offsets_mapping")),
                    )
                    for words in row
                ]
                for row in rows
            ]
            return self.batch(
                passages,
                is_batch,
                add_special_tokens=add_special_tokens,
                max_length=max_length,
                **lengths,
                **options,
            )

        if text_target is None:
            return encoding(text, text_pair)
        target = encoding(text_target, text_pair_target, max_target_length=max_target_length)
        if text is None:
            return target
        result = encoding(text, text_pair)
        result["labels"] = target.input_ids
        return result

    def batch(
        self,
        samples: Sequence[Sequence[Passage]],
        is_batch: bool,
        *,
        add_special_tokens: bool,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        max_target_length: int | None = None,
        stride: int = 0,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_tensors: str | None = None,
        return_token_type_ids: bool | None = None,
        return_attention_mask: bool | None = None,
        return_overflowing_tokens: bool = False,
        return_special_tokens_mask: bool = False,
        return_offsets_mapping: bool = False,
        return_length: bool = False,
        verbose: bool = True,
    ) -> BatchEncoding:
        """The encoding of texts whose ids are known, each sample of one or two passages.

        `padding` is True or "longest", "max_length", or False; `truncation` is True or
        "longest_first", "only_first", "only_second", or False.  Without `max_length` they use
        `model_max_length`; a tokenizer that has none neither pads nor truncates to it.
        `max_target_length` comes in the place of the number that these have found.

        With `return_overflowing_tokens` what is cut off follows as further rows, each repeating
        `stride` tokens of the one before, and `overflow_to_sample_mapping` has each row's sample.
        `verbose` warns of a row longer than `model_max_length`, once.
        """
        if return_tensors is not None:
            check_tensor_type(return_tensors)
        check_int("stride", stride, 0, 2**31 - 1)
        side = self.padding_side if padding_side is None else padding_side
        check_side("padding_side", side)
        rule = padding_rule(
            padding,
            truncation,
            max_length,
            pad_to_multiple_of=pad_to_multiple_of,
            model_max_length=self.model_max_length,
        )
        if max_target_length is not None:
            rule = of_targets(rule, max_target_length)
        firsts = [self._rows(passages, rule, stride, add_special_tokens) for passages in samples]
        longest = max((len(row) for row in firsts), default=0)
        width = padded_width(longest, rule, pad_to_multiple_of)
        if width:
            for row in chain.from_iterable([first, *first.overflowing] for first in firsts):
                row.pad(width, side, self._pad_id(), self.pad_token_type_id)
        if verbose and rule.max_length is None:
            self._warn_of(longest)

        rows, mapping = firsts, []
        if return_overflowing_tokens:
            by_sample = [[first, *first.overflowing] for first in firsts]
            rows = [row for rows in by_sample for row in rows]
            mapping = [i for i, rows in enumerate(by_sample) for _ in rows]
        data: dict[str, Any] = {"input_ids": [row.ids for row in rows]}
        names = self.model_input_names
        if "token_type_ids" in names if return_token_type_ids is None else return_token_type_ids:
            data["token_type_ids"] = [row.type_ids for row in rows]
        if "attention_mask" in names if return_attention_mask is None else return_attention_mask:
            data["attention_mask"] = [row.attention_mask for row in rows]
        if return_special_tokens_mask:
            data["special_tokens_mask"] = [row.special_tokens_mask for row in rows]
        if return_offsets_mapping:
            data["offset_mapping"] = [row.offsets for row in rows]
        if return_length:
            data["length"] = [len(row) for row in rows]
        if not is_batch and return_tensors is None and not return_overflowing_tokens:
            data = {k: v if k == "length" else v[0] for k, v in data.items()}
        if return_overflowing_tokens:
            data["overflow_to_sample_mapping"] = mapping
        return BatchEncoding(data, rows, return_tensors)

    def _rows(
        self,
        passages: Sequence[Passage],
        rule: PaddingRule,
        stride: int,
        add_special_tokens: bool,
    ) -> Encoding:
        """The row of a sample, what is cut off in its `overflowing`."""
        around = (self._prefix, self._suffix) if add_special_tokens else ([], [])
        if rule.truncation == "do_not_truncate" or rule.max_length is None:
            return Encoding(passages, self._vocabulary.pieces, *around)
        lengths = [len(passage.ids) for passage in passages]
        room = rule.max_length - len(passages) * (len(around[0]) + len(around[1]))
        if stride and 0 <= room <= stride:
            raise ValueError(
                f"stride {stride} does not fit: max_length {rule.max_length} leaves {room} tokens"
            )
        kept = kept_lengths(lengths, room, rule.truncation)
        parts = [
            [passage.part(*window) for window in windows(n, k, stride, self.truncation_side)]
            for passage, n, k in zip(passages, lengths, kept, strict=True)
        ]
        first, *others = [
            Encoding(combination, self._vocabulary.pieces, *around)
            for combination in combined(parts)
        ]
        first.overflowing = others
        return first

    def _warn_of(self, length: int) -> None:
        if length > self.model_max_length and not self._warned:
            warnings.warn(
                f"a text has {length} tokens, more than the model_max_length "
                f"{self.model_max_length}; truncation=True cuts it",
                stacklevel=5,
            )
            self._warned = True

    def _pad_id(self) -> int:
        if self.pad_token_id is None:
            raise ValueError("padding needs a pad_token: set tokenizer.pad_token")
        return self.pad_token_id

    @property
    def max_len_single_sentence(self) -> int:
        """How many tokens of one text fit into `model_max_length`."""
        return self.model_max_length - self.num_special_tokens_to_add()

    @property
    def max_len_sentences_pair(self) -> int:
        """How many tokens of a pair fit into `model_max_length`."""
        return self.model_max_length - self.num_special_tokens_to_add(pair=True)

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

        input_ids, or what `model_input_names` has first, attention_mask, token_type_ids and
        special_tokens_mask are padded; other entries (labels) stay as they are.  Tensors are
        returned for tensors.
        """
        main = self.model_input_names[0]
        if isinstance(encoded_inputs, Sequence) and encoded_inputs:
            encoded_inputs = {k: [one[k] for one in encoded_inputs] for k in encoded_inputs[0]}
        if not isinstance(encoded_inputs, Mapping) or main not in encoded_inputs:
            raise ValueError(f"pad takes an encoding, or a list of encodings, that has {main}")
        if return_tensors is None:
            return_tensors = _tensor_type(encoded_inputs[main])
        data = {name: plain(value) for name, value in encoded_inputs.items()}
        is_batch = bool(data[main]) and isinstance(data[main][0], list)
        if not is_batch:
            data = {name: [value] for name, value in data.items()}
        counts = {name: len(value) for name, value in data.items()}
        if len(set(counts.values())) > 1:
            raise ValueError(f"the entries differ in their number of rows: {counts}")

        lengths = [len(ids) for ids in data[main]]
        # max_length alone would truncate, which pad does not do
        rule = padding_rule(
            padding,
            False,
            max_length if padding == "max_length" else None,
            pad_to_multiple_of=pad_to_multiple_of,
            model_max_length=self.model_max_length,
        )
        width = padded_width(max(lengths, default=0), rule, pad_to_multiple_of)
        wanted = "attention_mask" in self.model_input_names
        if wanted if return_attention_mask is None else return_attention_mask:
            data.setdefault("attention_mask", [[1] * length for length in lengths])
        side = self.padding_side if padding_side is None else padding_side
        pad_id = self._pad_id() if width else 0
        for name, filler in (
            (main, pad_id),
            ("attention_mask", 0),
            ("token_type_ids", self.pad_token_type_id),
            ("special_tokens_mask", 1),
        ):
            if name in data:
                data[name] = [padded(values, width, side, filler) for values in data[name]]
        if not is_batch:
            data = {name: value[0] for name, value in data.items()}
        return BatchEncoding(data, tensor_type=return_tensors)


def _tensor_type(values: Any) -> str | None:
    """The kind of tensor that rows are or hold; None for lists."""
    while isinstance(values, list | tuple) and values:
        values = values[0]
    return {"torch": "pt", "numpy": "np", "jaxlib": "jax"}.get(
        type(values).__module__.split(".")[0]
    )
