"""Contestants: gemcut, and the stacks that it is compared with, behind one call.

All load the same checkpoint with the same dtype, get the same token ids, and are called as their
own documents call them.  A peer is imported only when it takes part: none is a dependency.
"""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from gemcut.bench.timing import clock
from gemcut.engine import Engine, SamplingParams

# the package that each peer comes from
PEERS = {"transformers": "transformers", "transformers-static": "transformers"}


@dataclass(frozen=True)
class Setup:
    """What every contestant is loaded with."""

    model: str  # as reports name it
    folder: Path
    device: torch.device
    dtype: torch.dtype
    batch: int
    max_seq_len: int


@dataclass(frozen=True)
class Generation:
    """What one call yielded, with its times in seconds."""

    token_ids: list[list[int]]  # [B][new tokens]
    first_token_seconds: float  # from the call until every row has its first token
    seconds: float  # from the call to its return

    @property
    def tokens_per_second(self) -> float:
        """Tokens after each row's first, over the time that they took."""
        later = sum(len(row) - 1 for row in self.token_ids)
        return later / (self.seconds - self.first_token_seconds)


class Contestant(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def version(self) -> str: ...

    @property
    def settings(self) -> str:
        """How it is called, in a few words."""
        ...

    def generate(self, prompts: list[list[int]], new_tokens: int) -> Generation:
        """Exactly `new_tokens` greedy tokens for each prompt; an end of sequence ends nothing."""
        ...


class Gemcut:
    name = "gemcut"
    settings = "Engine.generate"

    def __init__(self, setup: Setup) -> None:
        self.version = version("gemcut")
        self.engine = Engine.from_pretrained(
            setup.folder,
            device=setup.device,
            dtype=setup.dtype,
            max_batch_size=setup.batch,
            max_seq_len=setup.max_seq_len,
        )
        self.engine.warmup()

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that one decode step reads; of an untied embedding it reads rows."""
        weights = self.engine.model.weights
        parts = [part for layer in weights.layers for part in vars(layer).values()]
        parts += [weights.norm, weights.lm_head]
        return sum(part.nbytes for part in parts if part is not None)

    def generate(self, prompts: list[list[int]], new_tokens: int) -> Generation:
        params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
        start = clock()
        outputs = self.engine.generate(prompts, params, use_tqdm=False)
        seconds = clock() - start
        # the engine's clock starts after the prompts' checks: they count as decoding, against it
        first = max(output.metrics.time_to_first_token for output in outputs)
        return Generation([output.token_ids for output in outputs], first, seconds)


class Transformers:
    """`generate` of a model that several contestants may share."""

    def __init__(self, name: str, model: Any, cache_implementation: str | None) -> None:
        self.name = name
        self.version = version("transformers")
        self.model = model
        self._options: dict[str, Any] = {}
        cache = "dynamic"
        if cache_implementation is not None:
            cache = cache_implementation
            # on a GPU a static cache would bring torch.compile with it: that is another contest
            self._options = {"cache_implementation": cache, "disable_compile": True}
        attention = model.config._attn_implementation
        self.settings = f"generate, {cache} cache, {attention} attention, no compile"

    def generate(self, prompts: list[list[int]], new_tokens: int) -> Generation:
        streamer = _FirstToken()
        start = clock()
        with torch.inference_mode():
            ids = torch.tensor(prompts, device=self.model.device)
            sequences = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                do_sample=False,
                use_cache=True,
                streamer=streamer,
                **self._options,
            )
            token_ids = sequences[:, ids.shape[1] :].tolist()
        seconds = clock() - start
        return Generation(token_ids, streamer.first_token_at - start, seconds)

    @torch.inference_mode()
    def next_logits(self, token_ids: list[int]) -> Tensor:
        """Logits of the token that follows, without a cache: [V] float32 on the host."""
        ids = torch.tensor([token_ids], device=self.model.device)
        return self.model(ids, use_cache=False).logits[0, -1].float().cpu()


class _FirstToken:
    """A streamer for `generate` that notes when the first new tokens came."""

    def __init__(self) -> None:
        self.first_token_at = 0.0
        self._puts = 0

    def put(self, value: Tensor) -> None:
        self._puts += 1
        if self._puts == 2:  # the prompt is put first
            self.first_token_at = clock()

    def end(self) -> None: ...


def choose_peers(names: Sequence[str] | None) -> list[str]:
    """The peers asked for, each once, or all that are installed; ValueError names another."""
    if names is None:
        return [name for name, package in PEERS.items() if _installed(package)]
    for name in names:
        if name not in PEERS:
            raise ValueError(f"peer {name!r} is unknown; there are {', '.join(PEERS)}")
        if not _installed(PEERS[name]):
            raise ValueError(f"peer {name!r} needs the package {PEERS[name]}: pip install it")
    return list(dict.fromkeys(names))


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def load_peers(names: Sequence[str], setup: Setup) -> list[Contestant]:
    """The contestants of these names, in their order; transformers' share one model."""
    if not names:
        return []
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model: Any = AutoModelForCausalLM.from_pretrained(setup.folder, dtype=setup.dtype)
    model.to(setup.device).eval()
    model.generation_config.eos_token_id = None  # as ignore_eos: all generate the same number
    caches = {"transformers": None, "transformers-static": "static"}
    return [Transformers(name, model, caches[name]) for name in names]
