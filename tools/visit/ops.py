"""Checks of every op at the shapes of three models: against its oracle, and rows in any company.

The rule is that of the tests (bench/ops/op_check.py): against the oracle in float64, an op may err
twice as much as the oracle does in bfloat16, plus two units in the last place.  Outputs begin as
NaN.  A row must have the same bits alone, among 3 and among 16 rows; and a token among drafts the
bits that it has in a step of its own.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from gemcut import kernels
from gemcut.bench.ops.cases import Arguments, Case, Grid, Shapes
from gemcut.bench.ops.decode_cases import decode_cases
from gemcut.bench.ops.op_check import WRITTEN, Check
from gemcut.bench.ops.prefill_cases import prefill_cases
from gemcut.engine.execution.cache import PREFILL_CHUNK
from gemcut.engine.info import find_config
from gemcut.kernels import reference
from gemcut.tools.launches import Launch, recorded
from gemcut.tools.visit.block import Visit

MODELS = ("vaultgemma-1b", "gemma-2-2b", "gemma-2-9b")
CPU_MODELS = ("demo",)
GRID = Grid((1, 3, 16), (1024,), (512,), 8 << 20, PREFILL_CHUNK)
CPU_GRID = Grid((1, 3), (24,), (16,), 1 << 14, 16)
MOST_DRAFTED = 8  # tokens of a row in one step
# arguments of which row b belongs to row b of the result
BY_ROW = {"token_ids", "positions", "residual", "x", "branch", "q", "slots", "cos", "sin", "logits"}
BY_ROW |= {"output_counts", "in_prompt", "repetition", "presence", "frequency", "temperature"}
BY_ROW |= {"top_k", "top_p", "min_p", "seeds", "chosen", "scores"}
# results with parts, or kinds of layer, on the first axis, and rows on the second
ROWS_AFTER_PARTS = {"skinny_linear": (0,), "lm_head_argmax": (0, 1), "begin_step": (3, 4)}


def run(visit: Visit) -> None:
    """Keep a record for each op at each size, and for each op of each model its rows in company."""
    models = MODELS if visit.on_gpu else CPU_MODELS
    worst = Worst()
    for model in models:
        for case in find_cases(model, visit.device, grid_of(visit)):
            with visit.attempt(case.name):
                check(visit, case, worst)
        with visit.attempt(f"advance_/{model}"):
            check_advance(visit, model)
        with visit.attempt(f"draws/{model}"):
            compare_draws(visit, model)
        compare_rows(visit, model)
        with visit.attempt(f"drafts/{model}"):
            compare_drafts(visit, model)
    visit.add(
        "worst",
        line=f"{worst.checked} cases held to the oracle in float64; the worst took "
        f"{worst.share:.0%} of its budget: {worst.case}",
    )


@dataclass
class Worst:
    """How many cases were checked, and which came nearest to its budget."""

    checked: int = 0
    share: float = 0.0
    case: str = "none"


def grid_of(visit: Visit) -> Grid:
    """The sizes of a visit."""
    return GRID if visit.on_gpu else CPU_GRID


def find_cases(model: str, device: torch.device, grid: Grid) -> Iterator[Case]:
    """What a model launches, at these sizes."""
    shapes = Shapes(model, find_config(model), device, torch.bfloat16)
    for case in (*decode_cases(shapes, grid), *prefill_cases(shapes, grid)):
        if case.facts.get("variant") != "no softcap":  # which the model does not launch
            yield case


def record_cases(visit: Visit, arch: str) -> set[Launch]:
    """What the checks launch, at the sizes of this visit: recorded, not made."""
    found: set[Launch] = set()
    models, device = MODELS if visit.on_gpu else CPU_MODELS, torch.device("cuda", 0)
    with recorded(arch) as launches:
        for model in models:
            for case in find_cases(model, device, grid_of(visit)):
                getattr(kernels, case.op)(**case.make())
            s = shapes_of(model, device)
            most = max(grid_of(visit).batches)
            for case in company_cases(visit, s):
                for rows in companies(most):
                    getattr(kernels, case.op)(**take_rows(case.make(), *rows))
            draws(s, most)
            for q_len in draft_lengths(s):
                kernels.attention_decode(**draft_arguments(s, q_len, rows=2, context=256))
        found |= launches
    return found


@contextmanager
def poisoned() -> Iterator[None]:
    """Fresh buffers hold NaN, and integers that are no index: an unwritten element shows."""

    def poisoning(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocated(*args: Any, **kwargs: Any) -> Tensor:
            buffer = allocate(*args, **kwargs)
            return buffer.fill_(torch.nan if buffer.is_floating_point() else -77)

        return allocated

    with (
        mock.patch.object(torch, "empty", poisoning(torch.empty)),
        mock.patch.object(torch, "empty_like", poisoning(torch.empty_like)),
    ):
        yield


def call_poisoned(name: str, arguments: Arguments) -> Any:
    """The result of an op whose fresh buffers begin as NaN."""
    with poisoned():
        return getattr(kernels, name)(**arguments)


def check(visit: Visit, case: Case, worst: Worst) -> None:
    """Keep a record of one op at one size."""
    torch.manual_seed(0)
    accuracy = Check(case, case.make()).gemcut(lambda a: partial(call_poisoned, case.op, a))
    worst.checked += 1
    share = accuracy.error / accuracy.budget if accuracy.budget else 0.0
    if share > worst.share:
        worst.share, worst.case = share, case.name
    told = f"error {accuracy.error:.2e}, where {accuracy.budget:.2e} is allowed"
    visit.check(case.name, accuracy.passed, told, error=accuracy.error, budget=accuracy.budget)


def check_advance(visit: Visit, model: str) -> None:
    """Keep a record of the end of a step, which yields integers and must be exact."""
    V, B, device = find_config(model).vocab_size, 16, visit.device
    slots = torch.randperm(B, device=device)
    is_end = torch.zeros(B + 1, V, dtype=torch.bool, device=device)
    is_end[:, 7] = True
    parts = 250
    chosen = torch.randint(V, (parts, B), device=device)
    scores = torch.randn(parts, B, device=device)
    chosen[:, 3], scores[-1, 5], scores[0, 6] = 7, torch.nan, torch.inf
    state = {
        "tokens": torch.randint(V, (B + 1,), device=device),
        "positions": torch.arange(-2, B - 1, device=device),
        "limits": torch.full((B + 1,), 9, device=device),
    }
    found = []
    for ops in (reference, kernels):
        own = {name: x.clone() for name, x in state.items()}
        ids = ops.advance_(chosen, scores, slots, **own, is_end=is_end)
        found.append([ids, *own.values()])
    same = all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    visit.check(f"advance_/{model}", same, "differs from its oracle")


def compare_draws(visit: Visit, model: str) -> None:
    """Keep a record: whether the head draws the tokens that are drawn from its logits."""
    drawn, from_logits = draws(shapes_of(model, visit.device), 16 if visit.on_gpu else 3)
    told = f"{int((drawn != from_logits).sum())} of {drawn.numel()} tokens differ"
    visit.check(f"draws/{model}", torch.equal(drawn, from_logits), told)


def draws(s: Shapes, rows: int) -> tuple[Tensor, Tensor]:
    """Tokens that the head draws, a third of them greedy, and `sample` from its logits."""
    x, weight, softcap = s.values(rows, s.D), s.weight(s.V, s.D), s.config.final_softcap
    seeds = torch.arange(rows, device=s.device)
    temperature = torch.full((rows,), 0.7, device=s.device).masked_fill(seeds % 3 == 0, 0.0)
    scores, ids = kernels.lm_head_argmax(x, weight, softcap, temperature, seeds, seeds)
    drawn, _ = reference.best_of_ranges(ids, scores)
    logits = kernels.lm_head(x, weight, softcap)
    return drawn, kernels.sample(logits, temperature, seeds=seeds, positions=seeds)


# Bits


def compare_rows(visit: Visit, model: str) -> None:
    """Keep a record for each op of decode: whether its rows have the same bits in any company."""
    most = max(grid_of(visit).batches)
    right, wrong = [], 0
    for case in company_cases(visit, shapes_of(model, visit.device)):
        name = f"rows of {case.name}"
        with visit.attempt(name):
            differing = [rows for rows in companies(most) if not same_bits(case, *rows)]
            told = "; ".join(f"rows {a} to {b - 1} differ" for a, b in differing)
            visit.check(name, not differing, told)
            right.append(case.op)
            wrong += bool(differing)
    visit.add(
        f"rows of {model}",
        line=f"{model}: {len(right) - wrong} of {len(right)} ops give rows of {most} the same bits "
        f"alone and in company",
    )


def company_cases(visit: Visit, shapes: Shapes) -> Iterator[Case]:
    """The ops of decode at the most rows that are checked."""
    grid = grid_of(visit)
    most = Grid(grid.batches[-1:], grid.contexts, (), 1, PREFILL_CHUNK)
    for case in decode_cases(shapes, most):
        if case.facts.get("variant") != "no softcap":
            yield case


def companies(most: int) -> list[tuple[int, int]]:
    """Rows alone and a few of them: begin and end of each slice."""
    return [(0, 1), (most - 1, most), (0, 3), (most - 3, most)][: 4 if most > 3 else 2]


def same_bits(case: Case, begin: int, end: int) -> bool:
    """Whether these rows of a call are what the call of these rows alone gives."""
    torch.manual_seed(0)
    arguments = case.own(case.make())
    alone = take_rows(arguments, begin, end)
    whole = results(case, arguments, begin, end, slice(begin, end))
    return all(
        torch.equal(bits(a), bits(b))
        for a, b in zip(results(case, alone, begin, end, slice(None)), whole, strict=True)
    )


def take_rows(arguments: Arguments, begin: int, end: int) -> Arguments:
    """The same arguments of these rows alone."""
    return {
        name: x.narrow(0, begin, end - begin).contiguous()
        if name in BY_ROW and isinstance(x, Tensor)
        else x
        for name, x in arguments.items()
    }


def results(case: Case, arguments: Arguments, begin: int, end: int, rows: slice) -> list[Tensor]:
    """What a call returns and writes for `rows` of it, which are slots `begin` to `end` - 1."""
    written = WRITTEN.get(case.op, ())
    copies = {name: arguments[name].clone() for name in written}
    returned = call_poisoned(case.op, {**arguments, **copies})
    results = returned if isinstance(returned, tuple) else (returned,)
    after_parts = ROWS_AFTER_PARTS.get(case.op, ())
    found = [(x.transpose(0, 1) if i in after_parts else x)[rows] for i, x in enumerate(results)]
    for name, x in copies.items():
        found.append(x[rows] if name in BY_ROW else x[begin:end])
    return found


def bits(x: Tensor) -> Tensor:
    """A tensor's bits, in which NaN equals itself."""
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32}
    return x.contiguous().view(whole[x.itemsize]) if x.is_floating_point() else x


def shapes_of(model: str, device: torch.device) -> Shapes:
    """A model's shapes in bfloat16."""
    return Shapes(model, find_config(model), device, torch.bfloat16)


def draft_lengths(s: Shapes) -> tuple[int, int]:
    """One token, and as many as a step with drafts has."""
    return 1, min(MOST_DRAFTED, 64 // (s.HQ // s.HK))


def draft_arguments(
    s: Shapes, q_len: int, rows: int, context: int, window: int | None = None
) -> Arguments:
    """Decode attention of `q_len` tokens, the first of which is at context - q_len."""
    return {
        "q": s.values(rows, q_len, s.HQ, s.K),
        **{name: s.values(rows, s.HK, context, s.K) for name in ("k_cache", "v_cache")},
        "slots": torch.arange(rows, device=s.device),
        "positions": torch.full((rows,), context - q_len, device=s.device),
        "scale": s.config.scale,
        "softcap": s.config.attn_softcap,
        "sliding_window": window,
    }


def compare_drafts(visit: Visit, model: str) -> None:
    """Keep a record: whether a token has the same bits among drafts as in a step of its own."""
    s = shapes_of(model, visit.device)
    _, drafted = draft_lengths(s)
    rows, differing = 2, []
    sizes = (256, 1024, 5000) if visit.on_gpu else (24,)
    for context, window in product(sizes, (None, 300 if visit.on_gpu else 9)):
        torch.manual_seed(0)
        together = draft_arguments(s, drafted, rows, context, window)
        whole = call_poisoned("attention_decode", together)
        for t in range(drafted):
            alone = together | {"q": together["q"][:, t : t + 1].contiguous()}
            alone["positions"] = together["positions"] + t
            found = call_poisoned("attention_decode", alone)
            if not torch.equal(bits(found[:, 0]), bits(whole[:, t])):
                differing.append(f"token {t} at {context}, window {window}")
    told = f"{len(differing)} tokens differ, the first: {', '.join(differing[:3])}"
    visit.check(f"drafts/{model}", not differing, told)
