"""Rotary (RoPE) frequencies: how fast each pair of a head's dimensions turns with the position.

    angle[p, i] = p * inv_freq[i]        inv_freq[i] = theta ** (-2 i / K),  i < K / 2

Dimension i pairs with i + K/2.  Gemma 3 rotates its local layers with another base than its global
ones.  Every other type stretches these frequencies to reach contexts longer than those trained on:

    linear     all of them divided by `factor` (kaiokendev)
    dynamic    a larger base the longer the sequence is ("NTK-aware", bloc97 and emozilla)
    yarn       slow pairs divided, fast ones kept, a ramp between (Peng et al., arXiv:2309.00071)
    llama3     the same by wavelength, with a ramp in frequency (Llama 3.1)
    longrope   one searched factor for each pair, short or long (Ding et al., arXiv:2402.13753)

All of it is float32: bfloat16 cannot tell position 256 from 257.  `attention_scaling` multiplies
cos and sin, and so scores by its square.
"""

import math
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from gemcut.engine.config.rope_parameters import RopeParameters

T = TypeVar("T")


class Rope:
    """The frequencies of one kind of layer, on `device`."""

    def __init__(
        self,
        parameters: RopeParameters,
        head_dim: int,
        max_position_embeddings: int,
        device: torch.device | str = "cpu",
    ) -> None:
        parameters.check_head_dim(head_dim)
        self.parameters = parameters
        self.head_dim = head_dim
        self.max_position_embeddings = max_position_embeddings
        self.attention_scaling = _attention_scaling(parameters, max_position_embeddings)

        # Computed on the host, so that every device rotates by the same bits.
        exponents = torch.arange(0, head_dim, 2, dtype=torch.int64, device="cpu").float() / head_dim
        self._exponents = exponents.to(device)  # 2 i / K  [K/2]
        pair_base = parameters.rope_theta**exponents  # radians turn by 1 / pair_base  [K/2]
        self._inv_freq: Tensor | None = None
        match parameters.rope_type:
            case "default":
                self._inv_freq = 1.0 / pair_base
            case "linear":
                self._inv_freq = 1.0 / pair_base / _given(parameters.factor)
            case "yarn":
                self._inv_freq = _yarn(parameters, 1.0 / pair_base, max_position_embeddings)
            case "llama3":
                self._inv_freq = _llama3(parameters, 1.0 / pair_base)
            case "longrope":
                self._short = (1.0 / (_on_host(parameters.short_factor) * pair_base)).to(device)
                self._long = (1.0 / (_on_host(parameters.long_factor) * pair_base)).to(device)
        if self._inv_freq is not None:
            self._inv_freq = self._inv_freq.to(device)

    @property
    def depends_on_length(self) -> bool:
        """Whether frequencies change with the sequence's length: dynamic and longrope."""
        return self._inv_freq is None

    def inv_freq(self, lengths: Tensor | None = None) -> Tensor:
        """Radians per position, float32 [K/2]; [M, K/2] where they depend on the length.

        `lengths` [M], integers on the device, holds for every row the length of its sequence when
        the row is computed: the prompt's in prefill, position + 1 in decode.  That is what
        transformers does for one sequence.  Keys stay as they were rotated.  Nothing is read back
        to the host, so a captured graph may hold this.  ValueError where lengths are needed and
        missing.
        """
        if self._inv_freq is not None:
            return self._inv_freq
        kind = self.parameters.rope_type
        if lengths is None:
            raise ValueError(f"rope_type {kind} needs the length of every row's sequence")
        if kind == "longrope":
            is_long = lengths > _given(self.parameters.original_max_position_embeddings)
            return torch.where(is_long[:, None], self._long, self._short)

        # dynamic: the base grows so that the slowest pair turns as far as it did in training
        factor, trained = _given(self.parameters.factor), self.max_position_embeddings
        stretch = factor * lengths.clamp(min=trained) / trained - (factor - 1)  # >= 1  [M]
        base = self.parameters.rope_theta * stretch ** (self.head_dim / (self.head_dim - 2))
        return 1.0 / base[:, None] ** self._exponents


def _yarn(parameters: RopeParameters, inv_freq: Tensor, max_length: int) -> Tensor:
    """NTK by parts: [K/2] -> [K/2].  Pairs that turn beta_fast times in training are kept."""
    head_dim = 2 * inv_freq.numel()
    original = _given(parameters.original_max_position_embeddings)

    def pair_that_turns(times: float) -> float:
        return (
            head_dim
            * math.log(original / (times * 2 * math.pi))
            / (2 * math.log(parameters.rope_theta))
        )

    first = pair_that_turns(parameters.beta_fast or 32.0)
    last = pair_that_turns(parameters.beta_slow or 1.0)
    if parameters.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    if first == last:
        last += 0.001  # a step instead of a ramp; the paper's code does the same
    pairs = torch.arange(inv_freq.numel(), dtype=torch.float32, device="cpu")
    stretched = ((pairs - first) / (last - first)).clamp(0, 1)
    return inv_freq / _factor(parameters, max_length) * stretched + inv_freq * (1 - stretched)


def _llama3(parameters: RopeParameters, inv_freq: Tensor) -> Tensor:
    """[K/2] -> [K/2]; pairs are divided up to low_freq_factor turns, kept from high's on."""
    original = _given(parameters.original_max_position_embeddings)
    low, high = _given(parameters.low_freq_factor), _given(parameters.high_freq_factor)
    wavelength = 2 * math.pi / inv_freq
    kept = ((original / wavelength - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * inv_freq / _given(parameters.factor) + kept * inv_freq


def _attention_scaling(parameters: RopeParameters, max_length: int) -> float:
    if parameters.attention_factor is not None:
        return float(parameters.attention_factor)
    if parameters.rope_type not in ("yarn", "longrope"):
        return 1.0
    factor = _factor(parameters, max_length)
    if factor <= 1:
        return 1.0
    if parameters.rope_type == "longrope":
        original = _given(parameters.original_max_position_embeddings)
        return math.sqrt(1 + math.log(factor) / math.log(original))
    if parameters.mscale is not None and parameters.mscale_all_dim is not None:
        return _yarn_scaling(factor, parameters.mscale) / _yarn_scaling(
            factor, parameters.mscale_all_dim
        )
    return _yarn_scaling(factor, 1.0)


def _yarn_scaling(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0  # equation 22 of the paper


def _factor(parameters: RopeParameters, max_length: int) -> float:
    if parameters.factor is not None:
        return parameters.factor
    return max_length / _given(parameters.original_max_position_embeddings)


def _on_host(factors: Sequence[float] | None) -> Tensor:
    return torch.tensor(_given(factors), dtype=torch.float32, device="cpu")


def _given(value: T | None) -> T:
    """A value that RopeParameters has checked to be there; this tells the type checker."""
    assert value is not None
    return value
