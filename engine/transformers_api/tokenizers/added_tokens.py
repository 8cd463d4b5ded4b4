"""Tokens of a caller, as the vocabularies take them."""

from collections.abc import Mapping
from typing import Any

from gemcut.tokenizer.added_tokens import OPTIONS, AddedToken
from gemcut.tokenizer.tokenizer_files import token_content


def as_added_token(name: str, token: Any, *, special: bool) -> AddedToken:
    """A token given as a string, an AddedToken of any package, or its JSON object.

    `special` makes it special, whatever it was; without, it is what it says itself.
    """
    content = token_content(name, token)
    if isinstance(token, str):
        return AddedToken(content, special=special, normalized=not special)
    given = token if isinstance(token, Mapping) else {n: getattr(token, n, None) for n in OPTIONS}
    options = {n: bool(given[n]) for n in OPTIONS if given.get(n) is not None}
    options["special"] = special or options.get("special", False)
    return AddedToken(content, **{"normalized": not options["special"]} | options)
