"""Keywords that nobody knows: an error that says what there is, never silence."""

from collections.abc import Iterable
from difflib import get_close_matches


def refuse_unknown(taker: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Nothing, or TypeError that names the first of `given` that is not known to `taker`."""
    known = sorted(known)
    for name in given:
        if name not in known:
            close = get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"it takes {', '.join(known)}"
            raise TypeError(f"{taker} takes no {name!r}; {hint}")
