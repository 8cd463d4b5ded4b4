"""The contestants of an engine benchmark: gemcut and its peers, called in the same way.

All run the same model in the same dtype, get the same token ids, and are called as their own
documents call them.  Random weights are shared by all; of a checkpoint transformers loads its own
copy, which nothing of gemcut has touched.  A peer is imported only where it takes part: none is a
dependency.
"""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.metadata import version
from typing import Any, Protocol

import torch
from torch import Tensor

from gemcut.bench.engines.setup import Setup, require_memory
from gemcut.bench.measure.machine import gemcut_version
from gemcut.bench.measure.timing import clock
from gemcut.engine import Engine, SamplingParams
from gemcut.engine.checks import check_int
from gemcut.engine.execution.cache import PREFILL_CHUNK, slot_bytes
from gemcut.engine.execution.weights import checkpoint_tensors

GEMCUT = "gemcut"


@dataclass(frozen=True)
class Workload:
    """What every contestant of a case does in every round."""

    batch: int
    prompt_tokens: int
    new_tokens: int
    quantization: str | None = None  # of gemcut's weights

    def __post_init__(self) -> None:
        check_int("batch", self.batch, 1, 4096)
        check_int("prompt tokens", self.prompt_tokens, 1, 2**20)
        check_int("new tokens", self.new_tokens, 1, 2**20)

    @property
    def length(self) -> int:
        """Tokens of one row, prompt and continuation."""
        return self.prompt_tokens + self.new_tokens


@dataclass(frozen=True)
class Generation:
    """The tokens of one call, with its times in seconds."""

    token_ids: list[list[int]]  # [B][new tokens]
    first_token_seconds: float  # from the call until every row has its first token
    seconds: float  # from the call to its return

    @property
    def tokens_per_second(self) -> float:
        """Tokens after each row's first, over the time that they took."""
        later = sum(len(row) - 1 for row in self.token_ids)
        return later / (self.seconds - self.first_token_seconds)


class LoadedEngine(Protocol):
    """A contestant that is loaded: it generates."""

    @property
    def version(self) -> str: ...

    @property
    def settings(self) -> str:
        """How it is called, in a few words."""
        ...

    def generate(self, prompts: list[list[int]], new_tokens: int) -> Generation:
        """Exactly `new_tokens` greedy tokens for each prompt; an end of sequence ends nothing."""
        ...


class Stage:
    """What the contestants of one case are loaded with."""

    def __init__(self, setup: Setup, workload: Workload) -> None:
        self.setup, self.workload = setup, workload

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values, where every layer keeps all of them."""
        config, rows = self.setup.config, self.workload.batch * self.workload.length
        return rows * config.kv_bytes_per_token(self.setup.dtype.itemsize)

    def kept_weight_bytes(self, peer: "EnginePeer") -> int:
        """Bytes of the model loaded before a contestant that it would need if it were alone."""
        if peer is CONTESTANTS[GEMCUT] and self.workload.quantization is not None:
            return self.setup.quantized_model(self.workload.quantization).weights.nbytes
        if peer.quantization is None:
            return self.setup.weight_bytes
        config = self.setup.config
        return config.vocab_size * config.hidden_size * self.setup.dtype.itemsize  # the embedding

    @cached_property
    def transformers_model(self) -> Any:
        """The model of transformers, which its contestants share."""
        setup = self.setup
        _ = setup.model  # which checks their tokens
        model = _shared_model(setup) if setup.folder is None else _own_model(setup)
        model.generation_config.eos_token_id = None  # as ignore_eos: all generate the same number
        return model


class Gemcut:
    def __init__(self, stage: Stage) -> None:
        setup, workload = stage.setup, stage.workload
        slot = slot_bytes(setup.config, workload.length, PREFILL_CHUNK, setup.dtype)
        needs: dict[str, float] = {"cache": workload.batch * slot}
        if setup.packed_bytes and workload.quantization is None:
            needs["packed weights"] = setup.packed_bytes
        require_memory(setup.device, needs)
        model = setup.packed_model(workload.quantization)
        self.version = gemcut_version()
        self.settings = f"Engine.generate, {model.ops.__name__.rpartition('.')[2]} ops"
        if workload.quantization is not None:
            self.settings += f", {workload.quantization} weights"
        self.engine = Engine(
            model,
            setup.tokenizer,
            max_batch_size=workload.batch,
            max_seq_len=workload.length,
            reuse_prefixes=False,  # every round asks the same, and must compute it
        )
        self.engine.warmup(use_tqdm=False)

    @property
    def after_warmup(self) -> dict[str, int]:
        """Kernels compiled and graphs captured since the engine was warmed up."""
        metrics = self.engine.metrics()
        return {name: metrics[f"{name}_after_warmup"] for name in ("compilations", "captures")}

    def generate(self, prompts: list[list[int]], new_tokens: int) -> Generation:
        params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
        start = clock()
        outputs = self.engine.generate(prompts, params, use_tqdm=False)
        seconds = clock() - start
        # the engine's clock starts after the prompts' checks: they count as decoding, against it
        first = max(output.metrics.time_to_first_token for output in outputs)
        return Generation([output.token_ids for output in outputs], first, seconds)


class Transformers:
    """`generate` of a model that several contestants of a case share."""

    def __init__(self, stage: Stage, *, cache: str, compiled: bool = False) -> None:
        self.model = stage.transformers_model
        require_memory(stage.setup.device, {"cache": stage.cache_bytes})
        self.version = version("transformers")
        self._compiled = compiled
        self._options: dict[str, Any] = {}
        if cache != "dynamic":
            self._options["cache_implementation"] = cache
            # on a GPU a static cache brings torch.compile with it, elsewhere it must be asked for
            if compiled:
                self._options["compile_config"] = _compile_config()
            else:
                self._options["disable_compile"] = True
        attention = self.model.config._attn_implementation
        how = "torch.compile" if compiled else "no compile"
        self.settings = f"generate, {cache} cache, {attention} attention, {how}"

    def generate(self, prompts: list[list[int]], new_tokens: int) -> Generation:
        streamer = _FirstToken()
        start = clock()
        with torch.inference_mode(not self._compiled):  # compilers are used without it
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


class GptFast:
    """A gpt-fast-style Gemma: static cache, one compiled program for each kind of step."""

    def __init__(self, stage: Stage, quantization: str | None = None) -> None:
        from gemcut.bench.engines.compiled_gemma import CompiledGemma

        setup, workload = stage.setup, stage.workload
        weights = setup.model.weights
        needs: dict[str, float] = {"cache": stage.cache_bytes}
        if quantization is not None:
            bits = WEIGHT_BITS[quantization]
            needs[f"{quantization} weights"] = setup.config.num_parameters() * bits / 8
        require_memory(setup.device, needs)
        packages = ["torch"] if quantization is None else ["torch", "torchao"]
        self.version = ", ".join(f"{name} {version(name)}" for name in packages)
        weights_of = "" if quantization is None else f", torchao's {quantization} weights"
        self.settings = f"bench/engines/compiled_gemma.py, torch.compile{weights_of}"
        self._model = CompiledGemma(
            setup.config,
            weights,
            batch=workload.batch,
            max_seq_len=workload.length,
            quantization=quantization,
        )

    def generate(self, prompts: list[list[int]], new_tokens: int) -> Generation:
        first: list[float] = []
        start = clock()
        token_ids = self._model.generate(
            prompts, new_tokens, on_first_token=lambda: first.append(clock())
        )
        return Generation(token_ids, first[0] - start, clock() - start)


# Transformers' model


def _own_model(setup: Setup) -> Any:
    from transformers import AutoModelForCausalLM

    _silence_transformers()
    require_memory(setup.device, {"transformers' own weights": setup.weight_bytes})
    assert setup.folder is not None
    model: Any = AutoModelForCausalLM.from_pretrained(
        setup.folder, dtype=setup.dtype, **_attention(setup)
    )
    return model.to(setup.device).eval()


def _shared_model(setup: Setup) -> Any:
    """Transformers' model over the very tensors that gemcut reads, which are views of fused ones.

    First it is made of zeros that take no memory; that computes what no checkpoint holds, such as
    the frequencies of the rotation.
    """
    import transformers

    _silence_transformers()
    weights = setup.model.weights
    tensors = {tensor.name: tensor.of(weights) for tensor in checkpoint_tensors(setup.config)}
    zero = torch.zeros((), dtype=setup.dtype)
    values = setup.config.to_dict()
    # VaultGemma's code makes a mask of a window even where no layer has one
    values |= {"sliding_window": values.get("sliding_window") or setup.config.context_length}
    config = transformers.AutoConfig.for_model(**values)
    family = getattr(transformers, setup.config.architectures[0])
    model: Any = family.from_pretrained(
        None,
        config=config,
        state_dict={name: zero.expand(tensor.shape) for name, tensor in tensors.items()},
        dtype=setup.dtype,
        **_attention(setup),
    )
    model.load_state_dict({"lm_head.weight": weights.lm_head, **tensors}, assign=True)
    return model.to(setup.device)


def _attention(setup: Setup) -> dict[str, str]:
    """Some releases (5.17 is one) choose sdpa for Gemma 2, which drops its softcap."""
    return {} if setup.config.attn_softcap is None else {"attn_implementation": "eager"}


def _silence_transformers() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _compile_config() -> Any:
    from transformers import CompileConfig

    config: Any = CompileConfig()
    config._compile_all_devices = True  # the switch for CPUs, which has no public name
    return config


# The contestants by name

WEIGHT_BITS = {"int8": 8, "int4": 4}


@dataclass(frozen=True)
class EnginePeer:
    """How a contestant is loaded, and whether it takes part unasked."""

    load: Callable[[Stage], LoadedEngine]
    packages: tuple[str, ...] = ()
    model: Callable[[Stage], Any] = lambda stage: stage.setup.model  # loaded before
    compiles: bool = False  # which takes longer on a CPU than what is measured
    quantization: str | None = None

    @property
    def missing(self) -> list[str]:
        return [package for package in self.packages if not _installed(package)]

    @property
    def weight_bits(self) -> int | None:
        return None if self.quantization is None else WEIGHT_BITS[self.quantization]


TRANSFORMERS = partial(
    EnginePeer, packages=("transformers",), model=lambda stage: stage.transformers_model
)
GPT_FAST = partial(EnginePeer, compiles=True)
CONTESTANTS: dict[str, EnginePeer] = {
    GEMCUT: EnginePeer(
        Gemcut, model=lambda stage: stage.setup.quantized_model(stage.workload.quantization)
    ),
    "transformers": TRANSFORMERS(partial(Transformers, cache="dynamic")),
    "transformers-static": TRANSFORMERS(partial(Transformers, cache="static")),
    "transformers-compiled": TRANSFORMERS(
        partial(Transformers, cache="static", compiled=True), compiles=True
    ),
    "gpt-fast": GPT_FAST(GptFast),
    **{
        f"gpt-fast-{name}": GPT_FAST(
            partial(GptFast, quantization=name), packages=("torchao",), quantization=name
        )
        for name in WEIGHT_BITS
    },
}
PEERS = [name for name in CONTESTANTS if name != GEMCUT]


def choose_peers(names: Sequence[str] | None, device: torch.device) -> list[str]:
    """The peers asked for, each once, or those that take part unasked; ValueError names another."""
    if names is None:
        usual = [n for n in PEERS if device.type == "cuda" or not CONTESTANTS[n].compiles]
        return [name for name in usual if not CONTESTANTS[name].missing]
    for name in names:
        if name not in PEERS:
            raise ValueError(f"peer {name!r} is unknown; there are {', '.join(PEERS)}")
        if missing := CONTESTANTS[name].missing:
            raise ValueError(f"peer {name!r} needs the package {missing[0]}: pip install it")
    return list(dict.fromkeys(names))


def not_installed() -> list[str]:
    """The peers that lack a package, with its name."""
    lacking = {name: CONTESTANTS[name].missing for name in PEERS}
    return [f"{name} ({', '.join(missing)})" for name, missing in lacking.items() if missing]


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
