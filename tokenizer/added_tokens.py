"""Tokens that are found in a text as wholes, before anything is merged; and those kept out of it.

A *marker* is a token that no untrusted text may write: the special ones, and other literals in
brackets ("<unused12>", "[multimodal]", "<|fim_prefix|>").  A tag that the vocabulary has opening
and closing ("<table>", "</table>") is text, which the model was trained on.
"""

import re
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

_IN_BRACKETS = re.compile(r"<[^\s<>]+>|\[[^\s\[\]]+\]")
OPTIONS = ("special", "lstrip", "rstrip", "single_word", "normalized")
_TAG = re.compile(r"</?([^\s<>/]+)>")
# Letters, marks, digits and what joins them: Unicode's \w, as `tokenizers` has it.  Python's lacks
# marks and joiners, and has every number.
_WORD = {"Lu", "Ll", "Lt", "Lm", "Lo", "Mn", "Mc", "Me", "Nd", "Nl", "Pc"}
_MORE_OF_WORDS = re.compile(
    "[\u200c\u200d\u24b6-\u24e9\U0001f130-\U0001f149\U0001f150-\U0001f169\U0001f170-\U0001f189]"
)


@dataclass(frozen=True)
class AddedToken:
    """A token of a vocabulary that its text spells as a whole, with transformers' options.

    id: None is the next free one, or that of the piece.  special: `skip_special_tokens` hides it.
    lstrip, rstrip: it takes the whitespace before, after it.  single_word: only where no letter,
    mark or digit touches it.  normalized: its spaces may be spelled "▁" too.
    """

    content: str
    id: int | None = None
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = True

    def __str__(self) -> str:
        return self.content

    @property
    def is_plain(self) -> bool:
        """Whether it has none of the options that look at the text beside it."""
        return not (self.lstrip or self.rstrip or self.single_word)

    def takes(self, letter: str) -> bool:
        """Whether lstrip and rstrip take a letter; a space is "▁" where the token is normalized."""
        return letter.isspace() and not (self.normalized and letter == " ")

    def is_spelled(self, text: str) -> bool:
        """Whether the characters of a token in a text are its literal, and no merged pieces."""
        literal = self.content
        if self.lstrip:
            text, literal = text.lstrip(), literal.lstrip()
        if self.rstrip:
            text, literal = text.rstrip(), literal.rstrip()
        return text == literal or (
            self.normalized and text.replace(" ", "▁") == literal.replace(" ", "▁")
        )


class Literals:
    """Finds the tokens of a text: of those that begin first, the longest.

    Normalised ones are sought in what lies between the others, each part by itself: whether a word
    ends is seen from the part alone.
    """

    def __init__(self, tokens: Mapping[int, AddedToken]) -> None:
        exact: dict[str, tuple[int, AddedToken]] = {}
        normalized: dict[str, tuple[int, AddedToken]] = {}
        for token_id, token in tokens.items():
            found = normalized if token.normalized else exact
            found[token.content] = (token_id, token)
            if token.normalized:
                found.setdefault(token.content.replace(" ", "▁"), (token_id, token))
                found.setdefault(token.content.replace("▁", " "), (token_id, token))
        self._exact, self._normalized = _Finder(exact), _Finder(normalized)

    def find(self, text: str) -> Iterator[tuple[int, int, int]]:
        """Start, end and id of each token in a text, whitespace that it takes included."""
        begin = 0
        for found in self._exact.find(text, 0):
            yield from self._normalized.find(text[begin : found[0]], begin)
            yield found
            begin = found[1]
        yield from self._normalized.find(text[begin:], begin)


class _Finder:
    """Finds tokens by their literals."""

    def __init__(self, tokens: Mapping[str, tuple[int, AddedToken]]) -> None:
        self._tokens = tokens
        self._pattern = re.compile(any_of(tokens))

    def find(self, text: str, offset: int) -> Iterator[tuple[int, int, int]]:
        """Start, end and id of each token in a part that begins at `offset` of a text."""
        begin = 0
        for match in self._pattern.finditer(text):
            token_id, token = self._tokens[match.group()]
            start, end = match.span()
            if token.single_word and (
                _is_word(text[start - 1 : start]) or _is_word(text[end : end + 1])
            ):
                continue
            while token.lstrip and start > begin and token.takes(text[start - 1]):
                start -= 1
            while token.rstrip and end < len(text) and token.takes(text[end]):
                end += 1
            # which may begin in the whitespace that the last one took
            yield offset + start, offset + end, token_id
            begin = end


def _is_word(letter: str) -> bool:
    """Whether a character, or none, belongs to a word."""
    return letter != "" and (
        unicodedata.category(letter) in _WORD or _MORE_OF_WORDS.match(letter) is not None
    )


def any_of(literals: Iterable[str]) -> str:
    """A pattern of the longest of some literals, as a tree: its time is not that of their number.

    Of no literals it matches nowhere.
    """
    return _tree(sorted(set(literals))) or "(?!)"


def _tree(words: Sequence[str]) -> str:
    if not words:
        return ""
    first, last = words[0], words[-1]
    common = next(
        (i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first)
    )
    prefix = first[:common]
    rests = [word[len(prefix) :] for word in words]
    more = [rest for rest in rests if rest]
    if not more:
        return re.escape(prefix)
    branches = "|".join(_tree(list(group)) for _, group in groupby(more, key=lambda rest: rest[0]))
    return f"{re.escape(prefix)}(?:{branches}){'?' if len(more) < len(rests) else ''}"


def inside(literals: Iterable[str]) -> re.Pattern[str]:
    """A pattern of the empty place after a literal's first letter, where a text is cut in two."""
    by_letter = groupby(sorted(set(literals)), key=lambda literal: literal[0])
    return re.compile(
        "|".join(
            f"(?<={re.escape(letter)})(?={_tree([literal[1:] for literal in group])})"
            for letter, group in by_letter
        )
        or "(?!)"
    )


def markers(literals: Mapping[str, int], special_ids: Collection[int]) -> dict[str, int]:
    """Those of a vocabulary's literals that no untrusted text may write."""
    return {
        literal: token_id
        for literal, token_id in literals.items()
        if token_id in special_ids or (is_in_brackets(literal) and not _is_tag(literal, literals))
    }


def is_in_brackets(literal: str) -> bool:
    """Whether a literal has the form of a control token: "<...>" or "[...]"."""
    return literal[:1] in "<[" and _IN_BRACKETS.fullmatch(literal) is not None


def _is_tag(literal: str, literals: Collection[str]) -> bool:
    tag = _TAG.fullmatch(literal)
    return tag is not None and f"<{tag[1]}>" in literals and f"</{tag[1]}>" in literals
