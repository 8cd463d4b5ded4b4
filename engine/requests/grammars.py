"""Grammars: the form that a text must have, followed token by token (llguidance does the work).

    StructuredOutputsParams --compile--> Grammar --copy--> one for each sequence
    fill: which tokens may come next      take: the one that came

A grammar knows the bytes of each token, so that text which several tokens can spell is allowed in
all its spellings.  Special tokens and other markers are no text: a grammar in Lark's syntax names
them, `<end_of_turn>`, and nothing else allows them.
"""

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemcut.engine.checks import shorten
from gemcut.engine.requests import grammar_probe
from gemcut.engine.requests.structured_outputs import StructuredOutputsParams
from gemcut.tokenizer import Tokenizer, end_of_turn_ids

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher, LLTokenizer
    from llguidance._lib import JsonCompileOptions

CACHED = 32  # compiled grammars that are kept
HARMLESS = 4096  # characters of a schema, regex or choice that compile in a second in any case
MULTIPLY = ("pattern", "allOf")  # keywords of a schema whose regexes meet one another
TOO_MUCH = "it takes too much time or memory to compile"
PROBE_SECONDS = 1  # of a processor, for any other grammar
PATIENCE = 5  # seconds, where other programs use the processors too
SOON = 0.001  # seconds; masks that are not filled by then are filled in threads
# between the tokens of JSON: without a bound a weak model finds no end of it
WHITESPACE = r"( |\n[ \t]{0,16})?"
MOST = 180  # characters of a reason
PLACE = re.compile(r"(at )?\d+\(\d+\): ")  # in a Lark grammar
STUCK = "the text cannot go on in its grammar"


class Grammar:
    """Where a text stands in its grammar."""

    def __init__(self, matcher: "LLMatcher", tokens: "_Tokens", end_ids: frozenset[int]) -> None:
        self.matcher, self._tokens = matcher, tokens
        self.end_ids = end_ids  # tokens that end a text where the grammar lets it end

    def copy(self) -> "Grammar":
        """The same grammar for another text, from here on."""
        return Grammar(self.matcher.deep_copy(), self._tokens, self.end_ids)

    def raise_interrupt(self) -> None:
        """Nothing, or the KeyboardInterrupt that came while llguidance asked for ids."""
        if self._tokens.interrupts:
            raise self._tokens.interrupts.pop()

    def take(self, token_id: int) -> bool:
        """Go on after a token -> whether the text is complete, and nothing more may come."""
        matcher = self.matcher
        matcher.consume_token(token_id)
        return matcher.is_stopped() and not matcher.is_error()

    @property
    def error(self) -> ValueError | None:
        """Why no token may come next, after `MaskFiller.fill`; None where one may."""
        reason = _problem(self.matcher, "no token may follow")
        return None if reason is None else ValueError(f"{STUCK}: {reason}")


class MaskFiller:
    """Writes the tokens that may come next in several texts, a bit for each."""

    def __init__(self) -> None:
        self._executor: LLExecutor | None = None
        self._process: int | None = None  # that has the executor's threads: a fork has not

    def fill(
        self, grammars: Sequence[Grammar], address: int, nbytes: int
    ) -> list[ValueError | None]:
        """Fill masks of `nbytes` each, one after the other from an address -> what is wrong.

        Most take microseconds, which waking a thread does not repay.
        """
        matchers = [(grammar.matcher, place) for place, grammar in enumerate(grammars)]
        began = time.perf_counter()
        for matcher, place in matchers:
            if time.perf_counter() - began > SOON and place + 1 < len(matchers):
                self._threads().unsafe_compute_mask_ptr(
                    matchers[place:], address, nbytes, len(matchers)
                )
                break
            matcher.unsafe_compute_mask_ptr(address + place * nbytes, nbytes)
        for grammar in grammars:
            grammar.raise_interrupt()
        return [grammar.error for grammar in grammars]

    def _threads(self) -> "LLExecutor":
        if self._executor is None or self._process != os.getpid():
            self._executor, self._process = _llguidance().LLExecutor(), os.getpid()
        return self._executor


class GrammarCompiler:
    """Makes grammars over the tokens of one model; any number of threads may call it.

    The first call reads the vocabulary: 1.5 s for 262144 tokens.
    """

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int, eos_ids: Iterable[int]):
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._eos_ids = frozenset(eos_ids)
        self._lock = threading.Lock()
        self._vocabulary: tuple[LLTokenizer, _Tokens] | None = None
        self._compiled: OrderedDict[str, Grammar] = OrderedDict()  # the latest used last

    def compile(self, params: StructuredOutputsParams) -> Grammar:
        """The grammar at the beginning of a text; ValueError where it cannot be met."""
        text = _grammar_text(params)
        vocabulary = self._read_vocabulary()
        with self._lock:
            if text in self._compiled:
                self._compiled.move_to_end(text)
                return self._compiled[text]
        grammar = self._compile(params, text, vocabulary)
        with self._lock:
            self._compiled[text] = grammar
            if len(self._compiled) > CACHED:
                self._compiled.popitem(last=False)
        return grammar

    def _compile(
        self,
        params: StructuredOutputsParams,
        text: str,
        vocabulary: "tuple[LLTokenizer, _Tokens]",
    ) -> Grammar:
        llguidance = _llguidance()
        tokenizer, tokens = vocabulary
        if not _is_harmless(params, text):
            _probe(params, text)
        limits = llguidance.LLParserLimits(verbose_errors=False)
        matcher = llguidance.LLMatcher(tokenizer, text, log_level=0, limits=limits)
        if not matcher.is_error():
            matcher.compute_bitmask()  # each text begins with it: all of them find it done
        if (reason := _problem(matcher, "no text satisfies it")) is not None:
            raise ValueError(_refusal(params, reason))
        grammar = Grammar(matcher, tokens, frozenset(tokenizer.eos_tokens))
        grammar.raise_interrupt()
        return grammar

    def _read_vocabulary(self) -> "tuple[LLTokenizer, _Tokens]":
        if (tokenizer := self._tokenizer) is None:
            raise ValueError("structured_outputs needs the engine's tokenizer, and there is none")
        llguidance = _llguidance()
        with self._lock:
            if self._vocabulary is None:
                ends = self._eos_ids | end_of_turn_ids(tokenizer) | {tokenizer.eos_id}
                tokens = _Tokens(tokenizer, self._vocab_size)
                read = llguidance.LLTokenizer(
                    llguidance.TokenizerWrapper(tokens),
                    n_vocab=self._vocab_size,
                    eos_token=sorted(ends),
                )
                self._vocabulary = read, tokens
        return self._vocabulary


class _Tokens:
    """A tokenizer as llguidance wants it: the bytes of each token, and ids of a text."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id, self.bos_token_id = tokenizer.eos_id, tokenizer.bos_id
        self.interrupts: list[KeyboardInterrupt] = []  # that llguidance would drop
        self.special_token_ids = sorted(tokenizer.special_ids | tokenizer.marker_ids)
        size = len(tokenizer)
        # rows of the embedding past the vocabulary are no tokens
        self.tokens = [tokenizer.token_bytes(i) if i < size else b"" for i in range(vocab_size)]

    def __call__(self, text: str) -> Sequence[int]:
        """Ids of a text; a Ctrl-C that comes meanwhile is kept, as llguidance would drop it."""
        if isinstance(text, bytes):
            raise TypeError("a str is wanted")  # so that llguidance gives one
        try:
            return self._tokenizer.encode(text, add_bos=False)
        except KeyboardInterrupt as error:
            self.interrupts.append(error)
            return self._tokenizer.encode(text, add_bos=False)


def _llguidance():
    try:
        import llguidance
    except ImportError:
        raise ValueError(
            "structured_outputs needs the package llguidance: pip install llguidance"
        ) from None
    return llguidance


def _grammar_text(params: StructuredOutputsParams) -> str:
    """What llguidance compiles."""
    llguidance = _llguidance()
    matcher = llguidance.LLMatcher
    if params.grammar is not None:
        try:
            return llguidance.grammar_from("grammar", params.grammar)
        except (ValueError, RecursionError) as error:
            raise ValueError(_refusal(params, _reason(str(error)))) from None
    if params.regex is not None:
        return matcher.grammar_from_regex(params.regex)
    if params.choice is not None:  # as a terminal: any number of them is one symbol
        texts = " | ".join(map(json.dumps, dict.fromkeys(params.choice)))
        return matcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {texts}")
    options: JsonCompileOptions = {"whitespace_flexible": False}
    if not params.disable_any_whitespace:
        pattern = params.whitespace_pattern
        options = {"whitespace_pattern": WHITESPACE if pattern is None else pattern}
    schema: Any = params.json if params.json is not None else '{"type": "object"}'
    try:
        return matcher.grammar_from_json_schema(schema, overrides=options)
    except ValueError as error:
        raise ValueError(_refusal(params, _reason(str(error)))) from None


def _is_harmless(params: StructuredOutputsParams, text: str) -> bool:
    """Whether it is compiled within a second or so, or refused.

    Rules of a grammar, and patterns that a text must match all at once, multiply.
    """
    schema = params.json if isinstance(params.json, str) else ""
    multiplies = params.whitespace_pattern is not None or any(name in schema for name in MULTIPLY)
    return params.grammar is None and len(text) <= HARMLESS and not multiplies


def _probe(params: StructuredOutputsParams, text: str) -> None:
    """Nothing, or ValueError where a grammar takes too much to compile (grammar_probe.py)."""
    task = {"path": sys.path, "grammar": text, "seconds": PROBE_SECONDS}
    program = [sys.executable, "-I", "-S", str(Path(grammar_probe.__file__))]
    try:
        probe = subprocess.run(
            program, input=json.dumps(task).encode(), capture_output=True, timeout=PATIENCE
        )
        is_fine = probe.returncode == 0
    except subprocess.TimeoutExpired:
        is_fine = False
    if not is_fine:
        raise ValueError(_refusal(params, TOO_MUCH))


def _problem(matcher: "LLMatcher", dead_end: str) -> str | None:
    """Why a text cannot go on; None where it can, or is complete."""
    if not matcher.is_error():
        return None
    message = matcher.get_error()
    return dead_end if message.startswith("NoExtension") else _reason(message)


def _refusal(params: StructuredOutputsParams, reason: str) -> str:
    value = "" if params.kind == "json_object" else f" {shorten(getattr(params, params.kind))}"
    if params.grammar is None:  # a line and column of what was made of it
        reason = PLACE.sub("", reason)
    return f"structured_outputs: {params.kind}{value} cannot be used: {reason}"


def _reason(message: str) -> str:
    """A message of llguidance in one line, without excerpts of the grammar and of its state."""
    if "limits." in message:  # advice for a caller of llguidance
        return TOO_MUCH
    lines = [line.strip() for line in message.split("\n<", 1)[0].splitlines() if line.strip()]
    if not lines:
        return "llguidance gives no reason"
    place = PLACE.match(lines[0])
    detail = next((line.removeprefix("error: ") for line in lines if line[:7] == "error: "), None)
    text = lines[0] if detail is None else f"{place[0] if place else ''}{detail}"
    return text if len(text) <= MOST else text[:MOST] + "..."
