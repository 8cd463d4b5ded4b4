"""The launches of a model, recorded without a GPU: the real model runs on fake tensors.

A `Launch` is a kernel as the compiler sees it, so that equal ones are compiled once; a `Made` one
has its grid and sizes as well.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction

from gemcut import kernels
from gemcut.engine.config.model_config import ModelConfig
from gemcut.engine.execution.borrowed_cache import PagedKVCache
from gemcut.engine.execution.cache import PREFILL_CHUNK, KVCache
from gemcut.engine.execution.cuda_graphs import ROWS
from gemcut.engine.execution.model import Gemma
from gemcut.engine.execution.sampler import FULL, GREEDY, RANDOM, Features
from gemcut.engine.execution.slot_state import SlotState
from gemcut.engine.execution.steps import Steps
from gemcut.engine.execution.weights import Weights, empty_weights, made_layouts
from gemcut.engine.placement import choose_cache_dtype
from gemcut.engine.requests.sampling_params import MAX_DRAFT
from gemcut.kernels import gpu_arch, tiles
from gemcut.kernels.tiles import Key, Tile

CAPABILITY = {"sm_80": (8, 0), "sm_89": (8, 9), "sm_90": (9, 0)}
CAPABILITY |= {"sm_100": (10, 0), "sm_120": (12, 0)}
OPTIONS = ("num_warps", "num_stages", "maxnreg", "launch_pdl")
BATCHES = (1, 2, 4, 8, 16)  # those of 8 and less verify drafts too
MAX_SEQ_LEN = 8192
FREE = ("detach", "lift_fresh", "_unsafe_view")  # of torch's ops beside views: launch nothing
TYPE_NAMES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.bool: "*u1",  # as Triton's launcher has it
    torch.int8: "*i8",
    torch.uint8: "*u8",
}


@dataclass(frozen=True)
class Launch:
    """A kernel as the compiler sees it: types, constants, and what 16 divides."""

    module: str
    kernel: str
    arch: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[int, Any], ...]
    divisible: tuple[int, ...]
    options: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Made:
    """A launch with its grid and sizes; of torch's own ops the name alone."""

    name: str
    launch: Launch | None = None
    grid: tuple[int, ...] = ()
    numbers: tuple[tuple[str, int], ...] = ()  # by argument, those of constants included
    shapes: tuple[tuple[str, tuple[int, ...]], ...] = ()  # of tensors, by argument
    item_bytes: tuple[tuple[str, int], ...] = ()  # of their elements
    is_dependent: bool = False  # it begins while the launch before it still runs
    before: int = 0  # programs of the product before it, if that may still run


def launches(
    config: ModelConfig,
    name: str,
    batches: Sequence[int] = BATCHES,
    max_seq_len: int = MAX_SEQ_LEN,
    quantization: str | None = None,
    kv_cache_dtype: str = "auto",
    block_size: int | None = None,
) -> set[Launch]:
    """What a model launches on an arch: a prefill chunk, decode steps, every choice of tokens.

    The last of `batches` is the greatest, and so many slots there are.  block_size: of a paged
    cache, in place of slots.
    """
    with recorded(name) as found:
        _run(config, batches, max_seq_len, quantization, kv_cache_dtype, block_size)
    return found


def fake_weights(
    config: ModelConfig, device: torch.device, dtype: torch.dtype, quantization: str | None = None
) -> Weights:
    """Weights without data, quantised as the engine does it."""
    layouts = None if quantization is None else made_layouts(config, quantization)
    return empty_weights(config, device=device, dtype=dtype, layouts=layouts)


@contextmanager
def recorded(name: str, made: list[Made] | None = None) -> Iterator[set[Launch]]:
    """Fake tensors on an arch, and what is launched on them: recorded instead of made.

    `made` takes every launch in order, with its grid, and torch's own ops among them.
    """
    found: set[Launch] = set()

    def record(kernel: JITFunction, *, grid: Any, warmup: bool, **arguments: Any) -> None:
        launch = _launch(kernel, name, arguments)
        found.add(launch)
        if made is not None:
            made.append(_made(launch, grid, arguments))

    caches = (gpu_arch._generation, gpu_arch.converts_fp8)
    for cache in caches:
        cache.cache_clear()
    capability = mock.Mock(return_value=CAPABILITY[name])
    with (
        FakeTensorMode(),
        mock.patch.object(torch.cuda, "get_device_capability", capability),
        mock.patch.object(torch.cuda, "current_device", return_value=0),
        mock.patch.object(JITFunction, "run", record),
        _Ops([] if made is None else made),
    ):
        yield found
    for cache in caches:
        cache.cache_clear()


def applied(arch: str, key: Key, tile: Tile) -> AbstractContextManager[Any]:
    """A context in which launchers find this tile, and no other."""
    return mock.patch.dict(tiles.TUNED, {arch: {key: tile}}, clear=True)


class _Ops(TorchDispatchMode):
    """Notes what torch launches itself: all but views and allocations."""

    def __init__(self, made: list[Made]) -> None:
        super().__init__()
        self.made = made

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        space, _, name = func._schema.name.partition("::")
        returns = [r.alias_info for r in func._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in returns)
        if space == "aten" and not (is_view or "empty" in name or name in FREE):
            self.made.append(Made(name))
        return func(*args, **(kwargs or {}))


def _made(launch: Launch, grid: tuple[int, ...], arguments: dict[str, Any]) -> Made:
    tensors = {k: v for k, v in arguments.items() if isinstance(v, torch.Tensor)}
    return Made(
        launch.kernel,
        launch,
        tuple(grid),
        tuple((k, int(v)) for k, v in arguments.items() if isinstance(v, int)),
        tuple((k, tuple(v.shape)) for k, v in tensors.items()),
        tuple((k, v.itemsize) for k, v in tensors.items()),
    )


def step_launches(
    config: ModelConfig,
    arch: str,
    *,
    batch: int,
    context: int,
    features: Features = GREEDY,
    quantization: str | None = None,
    kv_cache_dtype: str = "auto",
) -> list[Made]:
    """What a decode step launches, in order: `batch` rows in a cache of `context` tokens.

    Tokens are the greatest logits, or what these features of sampling choose.
    """
    device, dtype = torch.device("cuda", 0), torch.bfloat16
    made: list[Made] = []
    with recorded(arch, made):
        model = Gemma(config, fake_weights(config, device, dtype, quantization), kernels)
        cache = _cache(config, batch, context, device, dtype, kv_cache_dtype)
        slots = torch.empty(batch, dtype=torch.int64, device=device)
        steps = Steps(model, cache, SlotState(batch, config.vocab_size, device))
        made.clear()  # what filled the cache
        steps.decode(slots, features)
    return made


def kernels_of_company(config: ModelConfig, arch: str) -> dict[tuple[int, int], set[Launch]]:
    """What a decode step launches up to the choice of tokens, by rows and by tokens of a row.

    A token's bits are the same in any company because all of these are the same.
    """
    found = {}
    with recorded(arch) as launched:
        steps = _steps_of_six_layers(config, max(BATCHES), MAX_SEQ_LEN)
        model, cache = steps.model, steps.cache
        for batch, tokens in ((1, 1), (3, 1), (16, 1), (1, 8), (2, 8), (5, 3)):
            slots = torch.empty(batch, dtype=torch.int64, device=model.device)
            token_ids, positions = steps.state.newest.index_select(1, slots).unbind()
            if tokens > 1:
                token_ids = token_ids.unsqueeze(1).expand(batch, tokens)
            launched.clear()
            model.logits(model.decode(token_ids, cache, slots, positions))
            found[batch, tokens] = set(launched)
    return found


def _steps_of_six_layers(
    config: ModelConfig,
    num_slots: int,
    max_seq_len: int,
    quantization: str | None = None,
    kv_cache_dtype: str = "auto",
    block_size: int | None = None,
) -> Steps:
    """Six layers show every kind: Gemma 3 has a global one in six."""
    device, dtype = torch.device("cuda", 0), torch.bfloat16
    config = replace(config, num_layers=6, layer_types=config.layer_types[:6])
    model = Gemma(config, fake_weights(config, device, dtype, quantization), kernels)
    max_seq_len = min(max_seq_len, config.context_length)
    sizes = config, num_slots, max_seq_len, device, dtype
    cache = _cache(*sizes, kv_cache_dtype, block_size)
    return Steps(model, cache, SlotState(num_slots, config.vocab_size, device))


def _cache(
    config: ModelConfig,
    num_slots: int,
    max_seq_len: int,
    device: torch.device,
    dtype: torch.dtype,
    kv_cache_dtype: str,
    block_size: int | None = None,
) -> KVCache | PagedKVCache:
    """A cache without data, as an engine makes it, or in blocks."""
    scale = torch.empty(config.num_kv_heads, dtype=torch.float32, device=device)
    scales = [(scale, torch.empty_like(scale))] * config.num_layers
    sizes = {"num_slots": num_slots, "max_seq_len": max_seq_len, "prefill_chunk": PREFILL_CHUNK}
    held = {
        "device": device,
        "dtype": choose_cache_dtype(kv_cache_dtype, dtype, device),
        "scales": None if kv_cache_dtype == "auto" else scales,
    }
    if block_size is None:
        return KVCache(config, **sizes, **held)
    num_blocks = num_slots * -(-max_seq_len // block_size)
    return PagedKVCache(config, num_blocks=num_blocks, block_size=block_size, **sizes, **held)


def _run(
    config: ModelConfig,
    batches: Sequence[int],
    max_seq_len: int,
    quantization: str | None,
    kv_cache_dtype: str,
    block_size: int | None,
) -> None:
    sizes = batches[-1], max_seq_len
    steps = _steps_of_six_layers(config, *sizes, quantization, kv_cache_dtype, block_size)
    device = steps.model.device
    token_ids = torch.empty(PREFILL_CHUNK, dtype=torch.int64, device=device)
    steps.model.prefill_chunk(token_ids, steps.cache, 0, 0, PREFILL_CHUNK)
    for batch in batches:
        slots = torch.empty(batch, dtype=torch.int64, device=device)
        steps.logits(slots)
        for features in (GREEDY, RANDOM, FULL):
            steps.decode(slots, features)
            if (drafts := min(MAX_DRAFT, ROWS // batch - 1)) > 0:
                steps.verify(slots, torch.empty_like(slots).expand(drafts, -1).mT, features)


def _launch(kernel: JITFunction, name: str, arguments: dict[str, Any]) -> Launch:
    """Specialised as Triton's own launcher does: None and 1 are constants, 16 is a divisor."""
    signature, constants, divisible = [], [], []
    for index, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        plain = parameter.do_not_specialize
        is_one = type(value) is int and value == 1 and not plain
        if parameter.is_constexpr or value is None or is_one:
            kind = "constexpr"
            constants.append((index, value))
        elif isinstance(value, torch.Tensor):
            kind = TYPE_NAMES[value.dtype]
            # torch allocates at multiples of 512 bytes; a view may begin elsewhere
            is_aligned = value.storage_offset() * value.itemsize % 16 == 0
            if is_aligned and not parameter.do_not_specialize_on_alignment:
                divisible.append(index)
        else:
            kind = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not plain:
                divisible.append(index)
        signature.append((parameter.name, kind))
    options = {k: arguments[k] for k in OPTIONS if k in arguments}
    return Launch(
        kernel.fn.__module__,
        kernel.fn.__name__,
        name,
        tuple(signature),
        tuple(constants),
        tuple(divisible),
        tuple(options.items()),
    )
