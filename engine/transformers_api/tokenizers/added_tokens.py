"""Tokens of a caller, as the vocabularies take them."""

from collections.abc import Mapping
from typing import Any

from gemcut.tokenizer.added_tokens import AddedToken
from gemcut.tokenizer.tokenizer_files import token_content

_OPTIONS = ("lstrip", "rstrip", "single_word", "normalized")
_ALL = (*_OPTIONS, "special")


def as_added_token(name: str, token: Any, *, special: bool) -> AddedToken:
    """A token given as a string, an AddedToken of any package, or its JSON object.

    `special` makes it special, whatever it was; without, it is what it says itself.
    """
    content = token_content(name, token)
    if isinstance(token, str):
        return AddedToken(content, special=special, normalized=not special)
    given = token if isinstance(token, Mapping) else {n: getattr(token, n, None) for n in _ALL}
    options = {n: bool(given[n]) for n in _OPTIONS if given.get(n) is not None}
    special = special or bool(given.get("special"))
    return AddedToken(content, special=special, **{"normalized": not special} | options)



