"""Facts about a model for `gemcut info`: its shape, its bytes, and what fits on a device."""

import os
import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType

import torch

from gemcut import kernels
from gemcut.engine.checkpoints.hub import CONFIG_FILES, check_holds_model, resolve_checkpoint
from gemcut.engine.checkpoints.load import (
    expected_layouts,
    find_nonfinite,
    load_cache_scales,
    load_checkpoint,
    load_config,
    nonfinite_in,
    open_tokenizer,
)
from gemcut.engine.checkpoints.lora import Adapter
from gemcut.engine.checkpoints.stored_weights import check_quantization
from gemcut.engine.config.generation_file import stop_token_ids
from gemcut.engine.config.model_config import PUBLISHED, ModelConfig
from gemcut.engine.config.rope_parameters import RopeParameters
from gemcut.engine.execution.cache import PREFILL_CHUNK, slot_bytes
from gemcut.engine.execution.weight_layouts import Layouts
from gemcut.engine.execution.weights import QUANTIZATIONS, fused_shapes
from gemcut.engine.memory import (
    DEFAULT_BATCH_SIZE,
    MEMORY_SHARE,
    SHORTEST,
    Build,
    free_bytes,
    is_auto,
    readable,
    tokenizer_bytes,
)
from gemcut.kernels import cpu
from gemcut.tokenizer.chat import check_template
from gemcut.tokenizer.tokenizer_files import JSON_FILE, MODEL_FILE

BATCH_SIZES = (1, 8)
KINDS = {
    "weights": "weights",
    "kv_cache": "KV cache",
    "state": "sampling state",
    "activations": "activations",
    "graphs": "graphs",
}
FAMILIES = {
    "gemma": "Gemma 1",
    "gemma2": "Gemma 2",
    "vaultgemma": "VaultGemma",
    "gemma3_text": "Gemma 3",
}


@dataclass(frozen=True)
class Room:
    """What fits on one device, now, in one dtype or format of the weights."""

    device: str
    dtype: str
    quantization: str | None  # what a plain checkpoint would be quantised to
    free_bytes: int
    weight_bytes: int
    slots: int  # that fit beside weights and activations, each of the model's own limit
    longest_slot: dict[int, int]  # slots -> tokens in each; 0 where there is no room


@dataclass(frozen=True)
class EngineSize:
    """The sizes of the engine that would be made now, and the bytes that it would take."""

    max_batch_size: int
    max_seq_len: int
    prefill_chunk: int
    bytes: dict[str, int]  # by kind; "total" is their sum
    problem: str | None  # the reason that it would not be made


@dataclass(frozen=True)
class ModelInfo:
    """Sizes that follow from a config; the cache's are in bfloat16."""

    parameters: int
    weight_bytes: dict[str, int]  # by dtype and format; "stored" where files are quantised
    stored_formats: list[str]
    kv_bytes_per_token: int  # while the token is within every window
    slot_bytes: int  # of the model's own limit
    full_slot_bytes: int  # the same if local layers kept all tokens
    room: Room
    quantized_rooms: list[Room]  # where a plain checkpoint is quantised on load
    engine: EngineSize
    tokenizer_bytes: int  # of the host's memory, about


def find_config(model: str) -> ModelConfig:
    """The config of "demo", a folder, a Hugging Face id or a published size; no weights fetched."""
    return find_model(model)[0]


def find_model(model: str) -> tuple[ModelConfig, Path | None]:
    """The same, and the folder or the GGUF file (which is fetched whole) that holds it."""
    if _is_published(model):
        return PUBLISHED[model], None
    try:
        path = resolve_checkpoint(model, files=CONFIG_FILES, gguf=True)
        check_holds_model(path)
    except ValueError as error:
        raise ValueError(f"{error}; known without files are {', '.join(PUBLISHED)}") from None
    return load_config(path), path


def _is_published(model: str) -> bool:
    return model in PUBLISHED and not os.path.isdir(model)


def describe(
    config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    max_batch_size: int | str = DEFAULT_BATCH_SIZE,
    max_seq_len: int | str | None = None,
    quantization: str | None = None,
    path: Path | None = None,
    kv_cache_dtype: str = "auto",
    quantized_dtype: torch.dtype | None = None,
) -> ModelInfo:
    """The model's sizes, what fits on `device` in `dtype`, and the engine of the sizes asked for.

    `path` is the model's, where a GGUF file says how it is quantised.  `quantized_dtype` is that of
    engines that would quantise it, by default the same.  ValueError names a size out of range; one
    that does not fit is reported in `engine.problem`.
    """
    table = cpu if device.type == "cpu" else kernels

    def build_of(quantization: str | None, ops: ModuleType = table) -> Build:
        layouts = expected_layouts(config, quantization, path)
        return Build(config, device, dtype, ops, layouts=layouts, kv_cache_dtype=kv_cache_dtype)

    def size_of(quantization: str | None, dtype: torch.dtype = torch.bfloat16) -> int:
        return replace(build_of(quantization, kernels), dtype=dtype).weight_bytes()

    build, stored = build_of(quantization), expected_layouts(config, None, path)
    formats = [] if stored else _formats(config)
    parameters = config.num_parameters()
    limit = config.context_length
    return ModelInfo(
        parameters=parameters,
        weight_bytes={
            "bfloat16": 2 * parameters,
            "float32": 4 * parameters,
            **{name: size_of(name) for name in formats},
            **({"stored": size_of(None, dtype)} if stored else {}),
        },
        stored_formats=_stored_formats(config, stored),
        kv_bytes_per_token=config.kv_bytes_per_token(),
        slot_bytes=slot_bytes(config, limit, PREFILL_CHUNK, torch.bfloat16),
        full_slot_bytes=limit * config.kv_bytes_per_token(),
        room=_room(build, quantization),
        quantized_rooms=[
            _room(replace(build_of(name), dtype=quantized_dtype or dtype), name) for name in formats
        ],
        engine=_engine_size(build, max_batch_size, max_seq_len),
        tokenizer_bytes=tokenizer_bytes(config.vocab_size, _has_json_alone(path)),
    )


def _has_json_alone(path: Path | None) -> bool:
    """Whether the tokenizer at `path` is a tokenizer.json: a tokenizer.model comes first."""
    return path is not None and (path / JSON_FILE).is_file() and not (path / MODEL_FILE).is_file()


def _stored_formats(config: ModelConfig, stored: Layouts) -> list[str]:
    """The formats of the matrices of a quantised checkpoint; some may be plain."""
    matrices = {place for place, shape in fused_shapes(config).items() if len(shape) == 2}
    plain = ["bfloat16"] if matrices - stored.keys() else []
    return sorted({layout.format for layout in stored.values()}) + plain


def _formats(config: ModelConfig) -> list[str]:
    """What the model's matrices can be quantised to on load."""
    found = []
    for name in QUANTIZATIONS:
        with suppress(ValueError):
            check_quantization(name, config)
            found.append(name)
    return found


def _room(build: Build, quantization: str | None) -> Room:
    free = free_bytes(build.device)
    budget = MEMORY_SHARE[build.device.type] * free  # as where the engine chooses
    return Room(
        device=str(build.device),
        dtype=str(build.dtype).removeprefix("torch."),
        quantization=quantization,
        free_bytes=free,
        weight_bytes=build.estimate(1, SHORTEST).weights,
        slots=build.most_slots(build.config.context_length, budget),
        longest_slot={slots: build.longest_slot(slots, budget) for slots in BATCH_SIZES},
    )


def _engine_size(
    build: Build, max_batch_size: int | str, max_seq_len: int | str | None
) -> EngineSize:
    problem = None
    try:
        slots, length = build.choose(max_batch_size, max_seq_len)
    except MemoryError as error:
        problem = str(error)
        slots = 1 if is_auto(max_batch_size) else int(max_batch_size)
        length = SHORTEST if max_seq_len is None or is_auto(max_seq_len) else int(max_seq_len)
    estimate = build.estimate(slots, length)
    sizes = asdict(estimate) | {"total": estimate.total}
    return EngineSize(slots, length, build.prefill_chunk, sizes, problem)


def lines(model: str, config: ModelConfig, info: ModelInfo) -> Iterator[tuple[str, str]]:
    """The label and the value of each line that is printed."""
    limit = config.context_length
    yield "model", model
    yield "family", f"{FAMILIES[config.model_type]} ({config.model_type})"
    yield "parameters", f"{info.parameters:,}"
    sizes = {name: f"{readable(size)} in {name}" for name, size in info.weight_bytes.items()}
    if (stored := sizes.pop("stored", None)) is not None:
        yield "weights", f"{stored.split(' in ')[0]} as stored, {' and '.join(info.stored_formats)}"
    plain = ", ".join(sizes.pop(dtype) for dtype in ("bfloat16", "float32"))
    yield "" if stored else "weights", plain
    if sizes:
        yield "", ", ".join(sizes.values())
    yield "layers", _layers(config)
    yield "hidden size", f"{config.hidden_size}, MLP {config.intermediate_size}"
    heads = f"{config.num_q_heads} query, {config.num_kv_heads} key and value"
    yield "heads", f"{heads}, head_dim {config.head_dim}, scale {config.scale:.6g}"
    tied = "tied" if config.tie_word_embeddings else "not tied"
    yield "vocabulary", f"{config.vocab_size}, embedding and head {tied}"
    caps = (("attention", config.attn_softcap), ("logits", config.final_softcap))
    yield "softcaps", ", ".join(f"{name} {cap:g}" for name, cap in caps if cap) or "none"
    yield "rope", _rope(config)
    yield "longest text", f"{limit} tokens"
    yield "KV cache", f"{info.kv_bytes_per_token / 1024:g} KiB a token in bfloat16, half in fp8"
    slot = f"{readable(info.slot_bytes)} a slot of {limit} tokens"
    if info.slot_bytes < info.full_slot_bytes:
        slot += f"; {readable(info.full_slot_bytes)} if local layers were no rings"
    yield "", slot
    yield from _room_lines(info.room, limit)
    for room in info.quantized_rooms:
        slots = f"room for {room.slots} slots of {limit} tokens"
        fits = slots if room.longest_slot[1] else "does not fit"
        yield f"in {room.quantization}", f"{readable(room.weight_bytes)} for weights, {fits}"
    yield from _engine_lines(info.engine)
    yield "", f"and of the host about {readable(info.tokenizer_bytes)} for its tokenizer"


def _room_lines(room: Room, limit: int) -> Iterator[tuple[str, str]]:
    free, weights = readable(room.free_bytes), readable(room.weight_bytes)
    of = room.quantization or room.dtype
    yield f"on {room.device}", f"{free} free, {weights} for weights in {of}"
    if room.longest_slot[1] == 0:
        yield "", "does not fit"
        return
    yield "", f"room for {room.slots} slots of {limit} tokens"
    longest = ", ".join(f"{length} at batch {n}" for n, length in room.longest_slot.items())
    yield "", f"longest slot, in tokens: {longest}"


def _engine_lines(size: EngineSize) -> Iterator[tuple[str, str]]:
    sizes = f"{size.max_batch_size} x {size.max_seq_len} tokens"
    yield "an engine", size.problem or f"{sizes} take {readable(size.bytes['total'])}"
    kinds = [kind for kind, nbytes in size.bytes.items() if nbytes and kind != "total"]
    shown = (f"{readable(size.bytes[kind])} {KINDS[kind]}" for kind in kinds)
    yield "", ", ".join(shown)


def _layers(config: ModelConfig) -> str:
    num_local = sum(config.is_local(layer) for layer in range(config.num_layers))
    if num_local == 0:
        return f"{config.num_layers}, all global"
    num_global = config.num_layers - num_local
    return (
        f"{config.num_layers}: {num_local} local (window {config.sliding_window}), "
        f"{num_global} global"
    )


def _rope(config: ModelConfig) -> str:
    if config.rope_local == config.rope:
        return _rotation(config.rope)
    return f"{_rotation(config.rope)}; local layers {_rotation(config.rope_local)}"


def _rotation(rope: RopeParameters) -> str:
    scaling = "" if rope.rope_type == "default" else f", {rope.rope_type}"
    factor = "" if rope.factor is None else f" by {rope.factor:g}"
    return f"base {rope.rope_theta:,.0f}{scaling}{factor}"


def find_problems(model: str, config: ModelConfig, adapter: Adapter | None = None) -> list[str]:
    """The problems in the files of `model` and of an adapter, a line each; reads every weight."""
    if _is_published(model):
        raise ValueError(f"{model} is known by its size alone: --check needs a folder or a Hub id")
    folder = resolve_checkpoint(model, gguf=True)
    problems = [*_weight_problems(folder, config), *_token_problems(folder, config)]
    if adapter is not None:
        found = nonfinite_in([adapter.file])
        problems += [f"{adapter.folder}: {name} holds a NaN or an infinity" for name in found]
    return list(dict.fromkeys(problems))  # a damaged file is reported twice


def _weight_problems(folder: Path, config: ModelConfig) -> Iterator[str]:
    try:  # on "meta" all is checked and nothing allocated
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            load_checkpoint(folder, config, device="meta", dtype=torch.bfloat16)
            load_cache_scales(folder, config, torch.device("cpu"))
    except ValueError as error:
        yield str(error)
    try:
        for name in find_nonfinite(folder):
            yield f"{folder}: {name} holds a NaN or an infinity"
    except ValueError as error:
        yield str(error)


def _token_problems(folder: Path, config: ModelConfig) -> Iterator[str]:
    try:
        tokenizer = open_tokenizer(folder)
        check_template(tokenizer)
        try:
            tokenizer.check_embedding(config.vocab_size)
        except ValueError as error:
            yield f"{folder}: {error}"
        stop_token_ids(folder, config)
    except ValueError as error:
        yield str(error)
