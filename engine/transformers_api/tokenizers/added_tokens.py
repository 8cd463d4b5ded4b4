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
    given = token if isinstance(token, Mapping) else _options(token, special)
    options = {n: bool(given[n]) for n in OPTIONS if given.get(n) is not None}
    options["special"] = special or options.get("special", False)
    return AddedToken(content, **{"normalized": not options["special"]} | options)


def _options(token: Any, special: bool) -> Mapping[str, Any]:
    """The options of an AddedToken, as they are where it is made special."""
    if isinstance(token, AddedToken) or not special or getattr(token, "special", None) is not False:
        return {name: getattr(token, name, None) for name in OPTIONS}
    # tokenizers' own, where it was not told whether it is normalized, answers by what it is now;
    # a copy of it has been told
    token.special = True
    try:
        return {name: getattr(token, name, None) for name in OPTIONS}
    finally:
        token.special = False
