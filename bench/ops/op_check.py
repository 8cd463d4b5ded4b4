"""The accuracy check of an op: what a contestant computes, against the oracle in float64.

The exact result is the oracle's in float64.  gemcut may err twice as much as the oracle does in the
dtype of the case, plus two units in the last place: the rule of its tests.  A peer may err twice as
much as the op as a model writes it (torch_peers.py) too, one with quantised weights twice as much
as rounding the weights to so many bits costs.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gemcut.bench.measure.timing import Call
from gemcut.bench.ops.cases import Arguments, Case
from gemcut.bench.ops.library_peers import GROUP, quantize_int4, quantize_int8
from gemcut.bench.ops.torch_peers import OpPeer, as_in_a_model
from gemcut.kernels import reference

Build = Callable[[Arguments], Call]

CHECKED_QUERIES = 128  # at each end of a prefill: float64 scores are large
# arguments that an op writes into
WRITTEN = {
    "add_rmsnorm_": ("residual",),
    "rope_and_store_": ("k_cache", "v_cache"),
    "linear_rope_and_store_": ("k_cache", "v_cache"),
}


@dataclass(frozen=True)
class Accuracy:
    """The greatest error of an output and its budget; of several outputs, the worst."""

    error: float
    budget: float

    @property
    def passed(self) -> bool:
        return self.error <= self.budget  # NaN does not


class Check:
    """The exact results for one set of arguments, and what errors they allow."""

    def __init__(self, case: Case, arguments: Arguments) -> None:
        self.case, self.arguments = case, arguments

    def gemcut(self, build: Build) -> Accuracy:
        """The accuracy of gemcut's own implementation."""
        own = Check(self.case, self.case.own(self.arguments))
        return own._accuracy(build, {}, None, strict=True)

    def peer(self, peer: OpPeer) -> Accuracy:
        """The accuracy of a peer, which may compute as if some arguments were others."""
        return self._accuracy(peer.build, peer.computes or {}, peer.weight_bits, strict=False)

    def _accuracy(
        self, build: Build, computes: Arguments, weight_bits: int | None, *, strict: bool
    ) -> Accuracy:
        actual = self._outputs(lambda **a: build(a)(), self.arguments)
        changed = thinned(self.arguments | computes)
        oracle = getattr(reference, self.case.op)
        exact = self._outputs(oracle, _double(changed), whole=False)
        allowed = [self._outputs(oracle, changed, whole=False)]
        if not strict:
            allowed.append(self._outputs(as_in_a_model(self.case.op), changed, whole=False))
        if weight_bits is not None:
            rounded = changed | {"weight": rounded_weight(changed["weight"], weight_bits)}
            allowed.append(self._outputs(oracle, rounded, whole=False))

        found = []
        for i, value in enumerate(actual):
            ulp = torch.finfo(value.dtype).eps * _greatest(exact[i])
            own = max(_distance(outputs[i], exact[i]) for outputs in allowed)
            found.append(Accuracy(_distance(value, exact[i]), 2 * own + 2 * ulp))
        return max(found, key=lambda v: math.inf if math.isnan(v.error) else v.error - v.budget)

    def _outputs(
        self, compute: Callable[..., Any], arguments: Arguments, whole: bool = True
    ) -> list[Tensor]:
        """The tensors that a call returns and writes, in a form that is compared by value.

        `whole` arguments are not yet thinned, so their output is.
        """
        copies = {name: arguments[name].clone() for name in WRITTEN.get(self.case.op, ())}
        returned = compute(**{**arguments, **copies})
        results = list(returned) if isinstance(returned, tuple) else [returned]
        results += copies.values()
        if self.case.op == "skinny_linear" and results[0].dim() == 3:
            results = [results[0].sum(0)]  # of a kernel's partial sums
        if whole and self.case.op == "attention_prefill":
            results = [results[0][checked_rows(results[0].shape[0])]]
        if self.case.op == "begin_step":
            results = results[1:]  # the first are positions
        if self.case.op == "lm_head_argmax":
            scores, ids = results
            ids, scores = reference.best_of_ranges(ids.long(), scores)
            logits = reference.lm_head(*(_double(self.arguments)[k] for k in LM_HEAD))
            results = [scores, logits.gather(-1, ids.unsqueeze(-1)).squeeze(-1)]
        if self.case.op == "sample":
            results = [_weight_of_choice(self.arguments, results[0])]
        return results


LM_HEAD = ("x", "weight", "softcap")


def checked_rows(T: int) -> slice | list[int]:
    """The queries of a prefill that are checked."""
    if T <= 2 * CHECKED_QUERIES:
        return slice(None)
    return [*range(CHECKED_QUERIES), *range(T - CHECKED_QUERIES, T)]


def thinned(arguments: Arguments) -> Arguments:
    """A prefill's arguments for its checked queries alone; another op's as given."""
    T = arguments["q"].shape[0] if "cu_seqlens" in arguments else 0
    if T <= 2 * CHECKED_QUERIES:
        return dict(arguments)
    start, cu_seqlens = arguments["starts"], arguments["cu_seqlens"]
    return arguments | {
        "q": arguments["q"][checked_rows(T)],
        "slots": arguments["slots"].repeat(2),
        "starts": torch.cat([start, start + T - CHECKED_QUERIES]),
        "cu_seqlens": CHECKED_QUERIES * torch.arange(3, device=cu_seqlens.device),
    }


def rounded_weight(weight: Tensor, bits: int) -> Tensor:
    """A weight rounded to int8, a scale per row, or int4, a scale and zero per group."""
    if bits == 8:
        levels, scales = quantize_int8(weight)
        return (levels.float() * scales.unsqueeze(1)).to(weight.dtype)
    levels, scales, zeros = quantize_int4(weight)
    groups = levels.float().unflatten(1, (-1, GROUP)) - zeros.unsqueeze(-1)
    return (groups * scales.unsqueeze(-1)).flatten(1).to(weight.dtype)


def _weight_of_choice(arguments: Arguments, chosen: Tensor) -> Tensor:
    """The logit of a greedy choice; of a random one, 1 where the filters keep it."""
    logits, index = arguments["logits"].double(), chosen.long().unsqueeze(-1)
    if arguments.get("temperature") is None:
        return logits.gather(-1, index).squeeze(-1)
    scaled = logits / arguments["temperature"].double().unsqueeze(-1)
    # a sum of V terms in float32 is off by V units at most
    top_p = arguments["top_p"].double() + logits.shape[-1] * torch.finfo(torch.float32).eps
    kept = reference.filter_logits(scaled, arguments["top_k"], top_p, arguments["min_p"])
    return kept.gather(-1, index).squeeze(-1).isfinite().double()


def _double(arguments: Mapping[str, Any]) -> Arguments:
    return {
        k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in arguments.items()
    }


def _greatest(x: Tensor) -> float:
    return x.double().abs().max().item() if x.numel() else 0.0


def _distance(a: Tensor, b: Tensor) -> float:
    return _greatest(a.double() - b.double())
