"""LoRA adapters as peft saves them, merged into a model's weights while these are read.

    W + scaling * B @ A                         scaling = alpha / r, or alpha / sqrt(r) with rslora
    m / |W + scaling * B @ A| * (the same)      DoRA; |.| and m by row

In float32, and rounded once, where the weight is written or quantised.  An adapter's headers are
held against the model before a weight is read: exactly what its config promises, for modules of
this model, in its shapes.

The embedding of Gemma and its head are one table; an adapter that was trained on one of them alone
makes them two, as in training (peft's own merge would change both).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from gemcut.engine.checkpoints.hub import resolve_checkpoint
from gemcut.engine.checkpoints.huggingface import model_name
from gemcut.engine.checkpoints.lora_config import CONFIG, LoraConfig, read_lora_config
from gemcut.engine.checkpoints.safetensor_headers import FLOATS, TensorHeader, open_headers
from gemcut.engine.checkpoints.stored_tensors import StoredTensor, first_of, row_ranges
from gemcut.engine.checkpoints.stored_weights import PIECE, StoredWeight
from gemcut.engine.checks import printable
from gemcut.engine.config.model_config import ModelConfig
from gemcut.engine.execution.weights import checkpoint_tensors

WEIGHTS, PICKLE = "adapter_model.safetensors", "adapter_model.bin"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_PART = re.compile(r"(.+?)\.(lora_(?:embedding_)?[AB]|lora_magnitude_vector)(\.weight)?")
_WRAPPED = re.compile(r"\.(base_layer|modules_to_save)(?=\.)")

Stored = TypeVar("Stored", StoredWeight, StoredTensor)


@dataclass(frozen=True)
class Change:
    """What an adapter makes of one tensor, by the headers of its own."""

    whole: TensorHeader | None = None  # in its place
    down: TensorHeader | None = None  # A [r, D]; of an embedding [r, V]
    up: TensorHeader | None = None  # B [N, r]; of an embedding [D, r]
    magnitude: TensorHeader | None = None  # [N]
    scaling: float = 1.0
    of_embedding: bool = False  # A and B make the transpose

    def merged(self, load: Any) -> Tensor:
        """The tensor that `load` gives, changed: float32, or the one in its place."""
        weight = load() if self.whole is None else self.whole.load()
        if self.down is None or self.up is None:
            return weight
        low, high = (x.load().to(weight.device).float() for x in (self.down, self.up))
        if self.of_embedding:
            low, high = high.mT, low.mT
        result = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
        magnitude = None
        if self.magnitude is not None:
            magnitude = self.magnitude.load().to(weight.device).float().view(-1, 1)
        for rows in row_ranges(tuple(weight.shape), PIECE):
            made = torch.addmm(weight[rows].float(), high[rows], low, alpha=self.scaling)
            if magnitude is not None:
                made *= magnitude[rows] / torch.linalg.vector_norm(made, dim=1, keepdim=True)
            result[rows] = made
        return result


@dataclass(frozen=True)
class Adapter:
    """An adapter whose headers fit a model."""

    folder: Path
    config: ModelConfig  # of the merged model: perhaps no longer tied
    changes: Mapping[str, Change]  # by the names of checkpoint tensors

    @property
    def file(self) -> Path:
        """The file of its tensors."""
        return self.folder / WEIGHTS

    def merge(self, stored: Mapping[str, Stored]) -> dict[str, Stored]:
        """A model's tensors with the adapter in them; ValueError where one is quantised."""
        merged = dict(stored)
        if not self.config.tie_word_embeddings and HEAD not in merged:
            merged[HEAD] = merged[EMBEDDING]
        for name, change in self.changes.items():
            base = merged[name]
            if isinstance(base, StoredWeight) and base.layout is not None:
                raise ValueError(
                    f"{self.folder}: an adapter is merged into plain weights, and {base.place} is "
                    f"{base.layout.format}; give the plain checkpoint, and quantization="
                )
            merged[name] = replace(
                base,
                place=f"{base.place} with {self.folder}",
                load=partial(change.merged, base.load),
            )
        return merged


def open_adapter(lora: str | Path, config: ModelConfig, **from_hub: Any) -> Adapter:
    """The adapter in a folder or on the Hub, held against a model's config.

    `from_hub` are options of `resolve_checkpoint`.
    """
    try:
        folder = resolve_checkpoint(lora, files=(CONFIG, WEIGHTS), **from_hub)
    except ValueError as error:
        raise ValueError(f"lora: {error}") from None
    if config.quantization is not None and config.quantization.schemes:
        raise ValueError(
            f"{folder}: an adapter is merged into plain weights, and this model is quantised; give "
            f"the plain checkpoint, and quantization="
        )
    settings = read_lora_config(folder)
    if not (folder / WEIGHTS).is_file():
        hint = f"; {PICKLE} is a pickle, save it as safetensors"
        hint = hint if (folder / PICKLE).exists() else ""
        raise ValueError(f"{folder} holds no {WEIGHTS}{hint}")
    changes = _read_changes(open_headers(folder / WEIGHTS), settings, config)
    ties = config.tie_word_embeddings and settings.ensure_weight_tying
    if ties and (head := changes.pop(HEAD, None)) is not None and EMBEDDING not in changes:
        raise ValueError(
            f"{settings.file}: ensure_weight_tying is for changes of the embedding, and "
            f"{head.whole or head.down} is of the head alone"
        )
    if config.tie_word_embeddings and not ties and changes.keys() & {EMBEDDING, HEAD}:
        config = replace(config, tie_word_embeddings=False)
    return Adapter(folder, config, changes)


def _read_changes(
    headers: list[TensorHeader], settings: LoraConfig, config: ModelConfig
) -> dict[str, Change]:
    """What the tensors of an adapter change, checked."""
    shapes = {tensor.name: tensor.shape for tensor in checkpoint_tensors(config)}
    shapes.setdefault(HEAD, shapes[EMBEDDING])
    whole: dict[str, TensorHeader] = {}
    parts: dict[str, dict[str, TensorHeader]] = {}
    modules: dict[str, str] = {}  # by tensor, as the adapted model names them
    for header in headers:
        if header.dtype not in FLOATS:
            raise ValueError(f"{header} is {header.dtype}; supported are {', '.join(FLOATS)}")
        key = header.key.removeprefix("base_model.model.").replace(".default", "")
        part = _PART.fullmatch(key)
        if part is None and "lora_" in key:
            raise ValueError(f"{header} is not supported")
        module = key if part is None else f"{part[1]}.weight"
        if (name := model_name(_WRAPPED.sub("", module), config)) is None:
            continue  # of the vision part
        if name not in shapes:
            raise ValueError(f"{header} is for no tensor of this model")
        into, entry = (whole, name) if part is None else (parts.setdefault(name, {}), part[2])
        if entry in into:
            raise ValueError(f"{into[entry]} and {header} are the same")
        into[entry] = header
        if part is not None:
            modules[name] = part[1]
    for name, header in whole.items():
        _check_shape(header, shapes[name])
    _check_complete(whole, modules, settings, config)
    changes = {name: Change(header) for name, header in whole.items()}
    for name, of_module in parts.items():
        low_rank = _change(name, modules[name], of_module, shapes[name], settings)
        changes[name] = replace(low_rank, whole=whole.get(name))
    return changes


def _change(
    name: str,
    module: str,
    parts: Mapping[str, TensorHeader],
    shape: tuple[int, ...],
    settings: LoraConfig,
) -> Change:
    """What the parts of one module make of its weight, their shapes checked."""
    some = next(iter(parts.values()))
    of_embedding = name == EMBEDDING
    kinds = ("lora_embedding_A", "lora_embedding_B") if of_embedding else ("lora_A", "lora_B")
    for kind in parts:
        if kind not in (*kinds, "lora_magnitude_vector") or len(shape) != 2:
            raise ValueError(f"{parts[kind]} is for no such module of this model")
    for kind in kinds:
        if kind not in parts:
            raise ValueError(f"{some.file}: {module}.{kind} is missing")
    (N, D), r = shape, settings.rank(module)
    if of_embedding:
        N, D = D, N
    down, up = (parts[kind] for kind in kinds)
    _check_shape(down, (r, D))
    _check_shape(up, (N, r))
    magnitude = parts.get("lora_magnitude_vector")
    if (magnitude is not None) != settings.use_dora:
        there = "there, and use_dora is false" if magnitude else "missing, and use_dora is true"
        raise ValueError(f"{some.file}: {module}.lora_magnitude_vector is {there}")
    if magnitude is not None:
        if of_embedding:
            raise ValueError(f"{magnitude}: use_dora on embeddings is not supported")
        _check_shape(magnitude, (N,))
    return Change(None, down, up, magnitude, settings.scaling(module), of_embedding)


def _check_complete(
    whole: Mapping[str, TensorHeader],
    modules: Mapping[str, str],
    settings: LoraConfig,
    config: ModelConfig,
) -> None:
    """Nothing, or ValueError unless the file has what its config promises, and no more."""
    file = settings.file.parent / WEIGHTS
    if not whole and not modules:
        raise ValueError(f"{file} changes nothing of this model")
    prefix = _prefix(modules)
    settings.check_patterns({*modules.values(), *whole, *_targets(prefix, config).values()})
    tied = config.tie_word_embeddings and settings.ensure_weight_tying
    missing = []
    for name, module in _targets(prefix, config).items():
        if tied and name == HEAD:
            continue
        is_target = settings.targets(module)
        if is_target and settings.target_modules is not None and name not in modules:
            missing.append(module)
        if not is_target and name in modules:
            raise ValueError(
                f"{settings.file}: {module} is no target by it, but {WEIGHTS} has a change of it"
            )
    if missing:
        raise ValueError(f"{file}: {first_of(missing)} missing")
    for saved in settings.modules_to_save:
        if not settings.is_saved(saved, whole) and not (tied and saved == "lm_head"):
            raise ValueError(f"{file}: {printable(saved)} is missing, a module to save")


def _targets(prefix: str, config: ModelConfig) -> dict[str, str]:
    """Every module that may be a target, as the adapted model names it, by its tensor."""
    tensors = checkpoint_tensors(replace(config, tie_word_embeddings=False))
    names = (tensor.name for tensor in tensors if len(tensor.shape) == 2)
    return {name: re.sub(r"^model\.", lambda _: prefix, name[: -len(".weight")]) for name in names}


def _prefix(modules: Mapping[str, str]) -> str:
    """What the adapted model's names have where ours have "model."."""
    for tensor, module in modules.items():
        if tensor.startswith("model."):
            return module.removesuffix(tensor.removeprefix("model.").removesuffix(".weight"))
    return "model."


def _check_shape(header: TensorHeader, shape: tuple[int, ...]) -> None:
    if header.shape != shape:
        raise ValueError(f"{header} is {list(header.shape)}, for this model it is {list(shape)}")
