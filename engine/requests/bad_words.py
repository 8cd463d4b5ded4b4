"""Bad words: token sequences whose last token is not chosen after the tokens before it.

A word is banned as it is tokenized at the beginning of a text and after a space:

    bad_words=["bad", "very bad"]   "bad", "▁bad": never chosen
                                    "▁bad" after "very" or "▁very": not chosen there

A word of one token needs no history, and is a bias of -inf on the device.  The others are looked
for by the host in the tokens generated so far; those of the prompt do not count.
"""

import math
from collections.abc import Sequence

from torch import Tensor

from gemcut.engine.checks import shorten
from gemcut.tokenizer import Tokenizer


def bad_word_ids(word: str, tokenizer: Tokenizer) -> list[list[int]]:
    """The token ids of a word, without and with a space before it.

    The second form is left out where it ends like the first, which bans it too.  vLLM leaves it out
    wherever the two differ in length: there " user" stays free though "user" is banned.
    """
    text = word.lstrip()
    plain, spaced = (
        tokenizer.encode(prefix + text, add_bos=False, parse_special=True) for prefix in ("", " ")
    )
    if not plain:
        raise ValueError(f"bad_words {shorten(word)} holds no token")
    return [plain] if spaced[-len(plain) :] == plain else [plain, spaced]


class BadWords:
    """A logits processor that bans the last token of a word where the tokens before it stand."""

    def __init__(self, words: Sequence[list[int]]) -> None:
        self._words = words

    def __call__(self, output_ids: list[int], logits: Tensor) -> Tensor:
        """The logits [V] with -inf where a token would complete a word."""
        for *start, last in self._words:
            if output_ids[len(output_ids) - len(start) :] == start:
                logits[last] = -math.inf
        return logits
