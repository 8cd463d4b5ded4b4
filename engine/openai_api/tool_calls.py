"""Tool calls in a model's answer, found while it comes: content in pieces, calls as wholes.

A parser is pushed the answer's text in pieces of any size, and gives content and calls in their
order, the same whatever the cuts.  Text that may belong to a call is held back until that is
decided; what turns out to be none, a call half built at the end included, is content.  Nothing is
lost except whitespace right before, between and after calls, and the fence around them.

Each character is looked at a bounded number of times, whatever the model writes.
"""

import re
from collections.abc import Collection, Mapping, Sequence

from gemcut.engine.openai_api.tool_call_syntax import (
    MAX_DEPTH,
    ToolCall,
    marked_call,
    plain_calls,
)

__all__ = ["MarkedCallParser", "PlainCallParser", "ToolCall", "ToolCallParser"]

MAX_HEAD = 256  # characters by which a call must have shown itself as one
_SPACES, _SEPARATORS = re.compile(r"\s*"), re.compile(r"[\s,;]*")
_SPECIAL = re.compile(rf"<[^<>\s]{{0,{MAX_HEAD}}}")
_WHOLE_SPECIAL = re.compile(r"(<[^<>\s]+>)")
_FENCE = re.compile(r"```(?:json|tool_code|tool_calls?|python|py)?[^\S\n]*\n")
_PART_OF_FENCE = re.compile(r"`{1,2}|```[a-z_]{0,10}[^\S\n]*")
_OUTSIDE = re.compile(r"\"{1,3}|'{1,3}|[()\[\]{}]")
_INSIDE = {
    "'": re.compile(r"(?s:\\.)|'|\n"),
    '"': re.compile(r'(?s:\\.)|"'),
    "'''": re.compile(r"(?s:\\.)|'''"),
    '"""': re.compile(r'(?s:\\.)|"""'),
}


class ToolCallParser:
    """An answer's pieces of content and its calls: `push` each piece of text, then `end`.

    A subclass reads on from `_at` in its state's method, which returns False where it needs more
    text than there is; with `final` no more will come.
    """

    def __init__(self) -> None:
        self._window, self._at = "", 0  # what is not read, behind `_at` of what was
        self._held: list[str] = []  # what was read and may belong to a call
        self._call_at = 0  # the first of `_held` that is the call's own
        self._found: list[str | ToolCall] = []
        self._follows_call = False  # nothing except whitespace came since the last call
        self._state = self._between

    def push(self, text: str) -> list[str | ToolCall]:
        """What is certain now, in order."""
        self._window, self._at = self._window[self._at :] + text, 0
        while self._state(False):
            pass
        return self._taken()

    def end(self) -> list[str | ToolCall]:
        """What was held back, now that the answer has ended."""
        while self._state(True):
            pass
        rest, held = self._window[self._at :], "".join(self._held)
        if rest or not self._follows_call or _SEPARATORS.fullmatch(held) is None:
            self._give_held()
        self._give(rest)
        self._window, self._at, self._held = "", 0, []
        return self._taken()

    def _between(self, final: bool) -> bool:
        """Where a call may begin: at the start, after a call, at a line's start."""
        spaces = _SEPARATORS if self._follows_call else _SPACES
        match = spaces.match(self._window, self._at)
        assert match is not None
        if match.end() > self._at:
            self._hold(match.end())
        return self._at < len(self._window) and self._begin(final)

    def _begin(self, final: bool) -> bool:
        raise NotImplementedError

    def _text(self, final: bool) -> bool:
        raise NotImplementedError

    def _read_to(self, end: int) -> str:
        text, self._at = self._window[self._at : end], end
        return text

    def _hold(self, end: int) -> None:
        self._held.append(self._read_to(end))

    def _give(self, text: str) -> None:
        if text:
            self._found.append(text)
            self._follows_call = False

    def _give_held(self) -> None:
        self._give("".join(self._held))
        self._held.clear()

    def _refuse(self) -> bool:
        """Go on after what is held, which is content."""
        self._give_held()
        self._state = self._text
        return True

    def _close(self, calls: Sequence[ToolCall] | None) -> bool:
        """Go on after the end of a call, which is content where there are no `calls` in it."""
        if calls is None:
            return self._refuse()
        self._found += calls
        self._held.clear()
        self._follows_call, self._state = True, self._between
        return True

    def _call_text(self) -> str:
        return "".join(self._held[self._call_at :])

    def _taken(self) -> list[str | ToolCall]:
        """What was found, with neighbouring content joined."""
        taken: list[str | ToolCall] = []
        content: list[str] = []
        for piece in [*self._found, None]:
            if isinstance(piece, str):
                content.append(piece)
                continue
            if content:
                taken.append("".join(content))
                content = []
            if piece is not None:
                taken.append(piece)
        self._found = []
        return taken


class MarkedCallParser(ToolCallParser):
    """Calls between two markers, with a third around each string: `{open}call:name{...}{close}`.

    A name that is no tool's is a call too, since the markers leave no doubt; the client tells the
    model.  A second opening marker outside a string shows that the first call was broken off.
    `hidden` are literals of special tokens that content does not show.
    """

    def __init__(
        self, opening: str, closing: str, quote: str, hidden: Collection[str] = ()
    ) -> None:
        super().__init__()
        self._opening, self._closing, self._quote = opening, closing, quote
        self._hidden = frozenset(hidden) - {opening, closing, quote}
        marks = "|".join(map(re.escape, (quote, closing, opening)))
        self._marks, self._overlap = re.compile(marks), max(map(len, (quote, closing, opening))) - 1

    def _give_held(self) -> None:
        if self._hidden:
            held = _WHOLE_SPECIAL.split("".join(self._held))
            self._held = [part for part in held if part not in self._hidden]
        super()._give_held()

    def _begin(self, final: bool) -> bool:
        rest = self._window[self._at : self._at + len(self._opening)]
        if rest == self._opening:
            self._open()
            return True
        if not final and self._opening.startswith(rest):
            return False
        return self._refuse()

    def _text(self, final: bool) -> bool:
        match = _SPECIAL.search(self._window, self._at)
        if match is None:
            self._give(self._read_to(len(self._window)))
            return False
        self._give(self._read_to(match.start()))
        end = match.end()
        if end == len(self._window) and not final:
            known = (self._opening, *self._hidden)
            if any(literal.startswith(match.group()) for literal in known):
                return False
        literal = self._window[self._at : end + 1]
        if literal == self._opening:
            self._open()
        elif literal in self._hidden:
            self._at = end + 1
        else:
            self._give(self._read_to(end))
        return True

    def _open(self) -> None:
        self._hold(self._at + len(self._opening))
        self._call_at, self._in_string, self._state = len(self._held), False, self._head

    def _head(self, final: bool) -> bool:
        """`call:name{`, without which it is no call."""
        head = self._window[self._at : self._at + MAX_HEAD]
        brace = re.search(r"[{<]", head)
        if brace is None:
            return (final or len(head) == MAX_HEAD) and self._refuse()
        if re.fullmatch(r"\s*call:\s*[^\s{}<>:]+\s*\{", head[: brace.end()]) is None:
            return self._refuse()
        self._hold(self._at + brace.end())
        self._state = self._body
        return True

    def _body(self, final: bool) -> bool:
        if self._in_string:
            start = self._window.find(self._quote, self._at)
            end = start + len(self._quote) if start >= 0 else -1
        else:
            match = self._marks.search(self._window, self._at)
            start, end = (-1, -1) if match is None else match.span()
        if end < 0:
            # a marker may be cut in two
            self._hold(max(self._at, len(self._window) - (0 if final else self._overlap)))
            return False
        mark = self._window[start:end]
        if mark == self._opening:
            self._hold(start)
            self._give_held()
            self._open()
        elif mark == self._quote:
            self._hold(end)
            self._in_string = not self._in_string
        else:
            self._hold(start)
            call = marked_call(self._call_text(), self._quote)
            self._hold(end)
            return self._close(None if call is None else [call])
        return True


class PlainCallParser(ToolCallParser):
    """Calls that no token marks: JSON or Python, at the start of a line or after another call.

    {"name": "f", "parameters": {"a": 1}}, a list of such, f(a=1), or [f(a=1), g()]; with or without
    a fence around (```json, ```tool_code).  Anything else is content, and so is JSON whose name is
    no tool's: it may well be the answer that was asked for.

    parameters: the names of each tool's parameters, in the order of Python's arguments.
    """

    def __init__(self, parameters: Mapping[str, Sequence[str]]) -> None:
        super().__init__()
        self._parameters = parameters
        self._in_fence = False

    def _text(self, final: bool) -> bool:
        newline = self._window.find("\n", self._at)
        if newline < 0:
            self._give(self._read_to(len(self._window)))
            return False
        self._give(self._read_to(newline + 1))
        self._state = self._between
        return True

    def _begin(self, final: bool) -> bool:
        head = self._window[self._at : self._at + MAX_HEAD]
        may_grow = len(head) < MAX_HEAD and not final
        if head.startswith("`"):
            return self._fence(head, may_grow)
        begins = self._begins_call(head)
        if begins is None and may_grow:
            return False
        if not begins:
            return self._refuse()
        self._call_at, self._depth, self._string = len(self._held), 0, ""
        self._state = self._body
        return True

    def _fence(self, head: str, may_grow: bool) -> bool:
        if self._in_fence and re.match(r"```(?:\s|$)", head) and (head != "```" or not may_grow):
            self._held.clear()
            self._at += 3
            self._in_fence, self._follows_call = False, True
            return True
        opening = _FENCE.match(head)
        if opening is not None:
            self._hold(self._at + opening.end())
            return True
        return not (may_grow and _PART_OF_FENCE.fullmatch(head)) and self._refuse()

    def _begins_call(self, head: str) -> bool | None:
        """Whether text can be a call's first characters; None: more is needed to say."""
        after = re.match(r"\{\s*", head)
        if after is not None:
            return None if after.end() == len(head) else head[after.end()] in "\"'"
        after = re.match(r"\[\s*", head)
        if after is not None:
            head = head[after.end() :]
            return None if not head else head[0] != "[" and self._begins_call(head)
        word = re.match(r"[\w.]*", head)
        name = "" if word is None else word.group()
        if len(name) == len(head):
            return None if any(tool.startswith(name) for tool in self._parameters) else False
        after = re.match(r"\s*", head[len(name) :])
        end = len(name) + (0 if after is None else after.end())
        if name not in self._parameters:
            return False
        return None if end == len(head) else head[end] == "("

    def _body(self, final: bool) -> bool:
        """On to the bracket that closes the first one."""
        pattern = _INSIDE[self._string] if self._string else _OUTSIDE
        match = pattern.search(self._window, self._at)
        if match is None or (match.end() == len(self._window) and self._is_cut(match.group())):
            end = len(self._window) - 2 if self._string else len(self._window)
            self._hold(max(self._at, end if match is None else match.start()))
            return False
        found, end = match.group(), match.end()
        if self._string:
            if found == "\n":
                return self._refuse()
            if found == self._string:
                self._string = ""
        elif found[0] in "\"'":
            # two are an empty string
            self._string = found if len(found) != 2 else ""
        else:
            self._depth += 1 if found in "([{" else -1
            if self._depth > MAX_DEPTH:
                return self._refuse()
        self._hold(end)
        if self._depth or self._string or found not in ")]}":
            return True
        calls = plain_calls(self._call_text(), self._parameters)
        self._in_fence |= calls is not None and "```" in "".join(self._held[: self._call_at])
        return self._close(calls)

    def _is_cut(self, found: str) -> bool:
        """Whether quotes at the end of what has come may be the beginning of three."""
        return not self._string and found[0] in "\"'" and len(found) < 3
