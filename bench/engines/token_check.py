"""The check of generated tokens: every token of every contestant against exact logits.

Exact logits come from gemcut's model on the oracles' ops in higher precision, one weight at a time:
bfloat16 becomes float32, float32 float64.  It reads a prompt followed by a contestant's own tokens,
and has the exact logits at each of them.  A greedy token is right where its logit is below the
greatest by no more than

    2 * error + 2 units in the last place

where the error is the greatest in the logits of that text by the same ops in the contestants' own
dtype: the rule that kernels are held to, and near ties pass it.  With quantised weights another
function is computed; its error is that of the same ops on such weights.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from gemcut.bench.measure.report_file import OK, WRONG
from gemcut.bench.ops.op_check import rounded_weight
from gemcut.engine.execution.cache import PREFILL_CHUNK, KVCache
from gemcut.engine.execution.model import Gemma
from gemcut.engine.execution.weights import LayerWeights
from gemcut.kernels import reference

HIGHER = {torch.bfloat16: torch.float32, torch.float32: torch.float64}
HEAD_ROWS = 1 << 15  # of the head at a time: in higher precision the whole may not fit
Rows = list[list[int]]  # new tokens of each prompt
Text = tuple[int, ...]
Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Answer:
    """The tokens of a contestant, and its weights where they are quantised: a model, or bits."""

    rows: Rows
    quantized: Gemma | int | None = None


@dataclass(frozen=True)
class Finding:
    """What the check found of a contestant; `status` is one of report_file.py's."""

    status: str
    detail: str

    @property
    def passed(self) -> bool:
        return self.status == OK


@dataclass(frozen=True)
class LogitGaps:
    """How far each token of a text is below the greatest logit at its place, and may be."""

    gaps: list[float]
    budget: float

    @property
    def first_wrong(self) -> int | None:
        # written so that NaN is within no budget
        return next((i for i, gap in enumerate(self.gaps) if not gap <= self.budget), None)


class TokenCheck:
    """The check of several contestants' continuations of the same prompts.

    The gaps of a text are kept: each text is read once.
    """

    def __init__(self, model: Gemma, prompts: Rows, new_tokens: int) -> None:
        self.model, self.prompts, self.new_tokens = model, prompts, new_tokens
        self._found: dict[tuple[int, Text, Gemma | int | None], LogitGaps] = {}

    @torch.inference_mode()
    def findings(self, answers: Mapping[str, Answer], own: Rows | None) -> dict[str, Finding]:
        """The finding on each answer; `own` are gemcut's tokens, which others are compared with."""
        findings = {
            name: Finding(WRONG, problem)
            for name, answer in answers.items()
            if (problem := self._malformed(answer.rows)) is not None
        }
        sound = {name: answer for name, answer in answers.items() if name not in findings}
        for row in range(len(self.prompts)):
            self._read_new(row, sound.values())
        return findings | {name: self._finding(one, own) for name, one in sound.items()}

    def _malformed(self, rows: Rows) -> str | None:
        """Why an answer cannot be read; None where it can."""
        counts = [len(row) for row in rows]
        if counts != [self.new_tokens] * len(self.prompts):
            return (
                f"{len(rows)} rows of {sorted(set(counts))} tokens; "
                f"asked for were {len(self.prompts)} of {self.new_tokens}"
            )
        limit = self.model.config.vocab_size
        strange = [token for row in rows for token in row if not 0 <= token < limit]
        return f"token id {strange[0]} is outside 0..{limit - 1}" if strange else None

    def _read_new(self, row: int, answers: Iterable[Answer]) -> None:
        """Read the texts of one prompt that are new, and keep their gaps."""
        keys = dict.fromkeys((row, tuple(a.rows[row]), a.quantized) for a in answers)
        new = [key for key in keys if key not in self._found]
        if not new:
            return
        read = partial(Reading, prompt=self.prompts[row], new_tokens=self.new_tokens)
        exact = read(exact_model(self.model))
        plain = {key[2]: read(plain_model(self.model, key[2])) for key in new}
        for key in new:
            _, text, quantized = key
            states = exact.states(text), plain[quantized].states(text)
            self._found[key] = self._compare(*states, text, quantized)

    def _compare(
        self, exact: Tensor, plain: Tensor, text: Text, quantized: Gemma | int | None
    ) -> LogitGaps:
        """The gaps of a text, from both models' states before each of its tokens: [T, D]."""
        config, head = self.model.config, self.model.weights.head_table
        tokens = torch.tensor(text, device=exact.device)
        best = exact.new_full((len(text),), -torch.inf)
        chosen = torch.full_like(best, torch.nan)
        error = greatest = exact.new_zeros(())
        for start in range(0, config.vocab_size, HEAD_ROWS):
            block = slice(start, start + HEAD_ROWS)
            rows = head[block]
            if isinstance(quantized, Gemma):
                their_rows = quantized.weights.head_table[block]
            else:
                their_rows = _rounded(rows, quantized)
            logits = reference.lm_head(exact, rows.to(exact.dtype), config.final_softcap)
            rounded = reference.lm_head(plain, their_rows, config.final_softcap)
            # torch's maximum keeps NaN
            best = torch.maximum(best, logits.amax(-1))
            error = torch.maximum(error, (rounded - logits).abs().max())
            greatest = torch.maximum(greatest, logits.abs().max())
            here = ((tokens >= start) & (tokens < start + len(rows))).nonzero().squeeze(-1)
            chosen[here] = logits[here, tokens[here] - start]
        ulp = torch.finfo(self.model.dtype).eps * greatest
        return LogitGaps((best - chosen).tolist(), (2 * error + 2 * ulp).item())

    def _finding(self, answer: Answer, own: Rows | None) -> Finding:
        gaps_of_rows = [
            self._found[row, tuple(tokens), answer.quantized]
            for row, tokens in enumerate(answer.rows)
        ]
        for row, found in enumerate(gaps_of_rows):
            if (token := found.first_wrong) is not None:
                return Finding(
                    WRONG,
                    f"row {row}, token {token}: {answer.rows[row][token]} lies "
                    f"{found.gaps[token]:.2e} below the best logit, {found.budget:.2e} allowed",
                )
        worst = max(gaps_of_rows, key=lambda one: max(one.gaps) / one.budget)
        detail = f"no token more than {max(worst.gaps):.1e} below the best logit, "
        detail += f"{worst.budget:.1e} allowed"
        if isinstance(answer.quantized, int):
            detail += f" for {answer.quantized}-bit weights"
        elif answer.quantized is not None:
            detail += " for its weights"
        return Finding(OK, detail + _agreement(answer.rows, own))


def _agreement(rows: Rows, own: Rows | None) -> str:
    if own is None or rows is own:
        return ""
    pairs = [list(zip(a, b, strict=True)) for a, b in zip(rows, own, strict=True)]
    for row, tokens in enumerate(pairs):
        for i, (a, b) in enumerate(tokens):
            if a != b:
                same = sum(a == b for row in pairs for a, b in row)
                total = sum(map(len, pairs))
                first = f"first differs at row {row}, token {i}"
                return f"; {same} of {total} same as gemcut, {first}"
    return "; all same as gemcut"


class Reading:
    """A model's states over a prompt and any text after it: the prompt is read once."""

    def __init__(self, model: Gemma, prompt: list[int], new_tokens: int) -> None:
        self.model, self.prompt = model, prompt
        self.cache = KVCache(
            model.config,
            num_slots=1,
            max_seq_len=len(prompt) + new_tokens,
            # rings keep what the prompt's last token sees, whichever text was read before
            prefill_chunk=max(PREFILL_CHUNK, new_tokens),
            device=model.device,
            dtype=model.dtype,
        )
        if len(prompt) > 1:
            self._read(prompt[:-1], 0)

    def states(self, text: Sequence[int]) -> Tensor:
        """The states that each token of a text is chosen from: [T, D]."""
        return self._read([self.prompt[-1], *text[:-1]], len(self.prompt) - 1)

    def _read(self, tokens: list[int], start: int) -> Tensor:
        ids = torch.tensor(tokens, device=self.model.device)
        return self.model.prefill(ids, self.cache, slot=0, start=start)


# The models that read the texts


def exact_model(model: Gemma) -> Gemma:
    """The model without roundings except that of the embedding's scale, which is part of it."""
    dtype = HIGHER[model.dtype]

    def embed(token_ids: Tensor, table: Tensor, scale: float) -> Tensor:
        return F.embedding(token_ids, table).to(dtype) * scale

    ops = {name: getattr(reference, name) for name in reference.__all__} | {"embed": embed}
    exact = _changed(model, lambda weight: weight.to(dtype), SimpleNamespace(**ops))
    exact.dtype = dtype  # of cache, cos and sin
    return exact


def plain_model(model: Gemma, quantized: Gemma | int | None) -> Gemma:
    """The model on the oracles' ops in its own dtype, or another; matrices rounded to bits."""
    if isinstance(quantized, Gemma):
        return Gemma(quantized.config, quantized.weights, reference)
    return _changed(model, partial(_rounded, bits=quantized), reference)


def _rounded(weight: Tensor, bits: int | None) -> Tensor:
    return weight if bits is None or weight.ndim == 1 else rounded_weight(weight, bits)


def _changed(model: Gemma, change: Change, ops: ModuleType | SimpleNamespace) -> Gemma:
    layers = [cast(LayerWeights, ChangedWeights(one, change)) for one in model.weights.layers]
    weights = replace(model.weights, layers=layers)
    return Gemma(model.config, weights, cast(ModuleType, ops))


class ChangedWeights:
    """A layer's weights, each changed as it is read, so that one at a time is held."""

    def __init__(self, layer: LayerWeights, change: Change) -> None:
        self._layer, self._change = layer, change

    def __getattr__(self, name: str) -> Any:
        weight = getattr(self._layer, name)
        return None if weight is None else self._change(weight)
