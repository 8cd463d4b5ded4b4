"""Random answers that a grammar of llguidance allows, in the demo's vocabulary with tool tokens."""

import json
from random import Random
from typing import Any

import llguidance
from llguidance import LLMatcher, LLTokenizer

from gemcut.engine.checkpoints import hub
from gemcut.tokenizer import Tokenizer
from gemcut.tokenizer.added_tokens import AddedToken

FUNCTION_GEMMA = (
    "<start_function_call>", "<end_function_call>", "<escape>", "<start_function_response>",
)  # fmt: skip
GEMMA4 = ("<|tool_call>", "<tool_call|>", '<|"|>', "<|tool_response>")
# what an answer is likelier to go on with the longer it is, so that it ends
_ENDINGS = ("}", "]", ",", ":", '"', *FUNCTION_GEMMA, *GEMMA4)


def tool_tokenizer(*, special: bool) -> Tokenizer:
    """The demo's vocabulary with FunctionGemma's and Gemma 4's tokens, special or not."""
    tokenizer = Tokenizer.from_file(hub.DEMO / "tokenizer.model")
    tokenizer.add_tokens([AddedToken(one, special=special) for one in (*FUNCTION_GEMMA, *GEMMA4)])
    return tokenizer


class GrammarWalks:
    """Answers that a grammar allows, token by token."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.eos_token_id, self.bos_token_id = tokenizer.eos_id, tokenizer.bos_id
        self.special_token_ids = sorted(tokenizer.special_ids)
        self.tokens = [tokenizer.token_bytes(i) for i in range(len(tokenizer))]
        self._tokenizer = tokenizer
        self._matcher_of = LLTokenizer(
            llguidance.TokenizerWrapper(self), n_vocab=len(self.tokens), eos_token=tokenizer.eos_id
        )
        endings = {one.encode() for one in _ENDINGS}
        self._endings = {i for i, token in enumerate(self.tokens) if token in endings}

    def __call__(self, text: str | bytes) -> list[int]:
        text = text if isinstance(text, str) else text.decode("utf-8", "replace")
        return self._tokenizer.encode(text, add_bos=False, add_eos=False)

    def walk(self, params: Any, random: Random, most: int = 3000) -> str:
        """The text of one random answer under a StructuredOutputsParams."""
        if params.grammar is None:
            schema = params.json if isinstance(params.json, str) else json.dumps(params.json)
            spaces: Any = {"whitespace_flexible": not params.disable_any_whitespace}
            grammar = LLMatcher.grammar_from_json_schema(schema, overrides=spaces)
        else:
            grammar = LLMatcher.grammar_from_lark(params.grammar)
        matcher = LLMatcher(self._matcher_of, grammar)
        assert not matcher.is_error(), matcher.get_error()
        ids: list[int] = []
        while not matcher.is_stopped():
            assert len(ids) < most, self._tokenizer.decode(ids[-100:])
            allowed = self._allowed(matcher)
            hurried = [i for i in allowed if i in self._endings or i == self.eos_token_id]
            chosen = random.choice(hurried if hurried and random.random() < 0.5 else allowed)
            if chosen == self.eos_token_id:
                break
            assert matcher.consume_token(chosen), matcher.get_error()
            ids.append(chosen)
        assert matcher.is_accepting() or matcher.is_stopped()
        assert not matcher.is_error(), matcher.get_error()
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def _allowed(self, matcher: LLMatcher) -> list[int]:
        mask = matcher.compute_bitmask()
        allowed = [i for i in range(len(self.tokens)) if mask[i // 8] >> (i % 8) & 1]
        assert allowed, matcher.get_error()
        return allowed
