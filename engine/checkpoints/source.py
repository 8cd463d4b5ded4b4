"""The source of a conversion: its files, its config, and its tensors matched with the config.

The config is a config.json, a published size by name, or the one published size that has tensors of
these names and shapes.
"""

import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemcut.engine.checkpoints.formats import FORMATS, SourceFormat
from gemcut.engine.checkpoints.gguf_choice import is_gguf
from gemcut.engine.checkpoints.gguf_header import read_header
from gemcut.engine.checkpoints.gguf_model import gguf_config, gguf_settings
from gemcut.engine.checkpoints.gguf_vocabulary import read_vocabulary
from gemcut.engine.checkpoints.hub import FILES, resolve_checkpoint
from gemcut.engine.checkpoints.lora import open_adapter
from gemcut.engine.checkpoints.stored_tensors import StoredTensor, TensorSpec, read_rows
from gemcut.engine.checkpoints.weight_files import check_file
from gemcut.engine.config.config_file import key_of, read_json_object
from gemcut.engine.config.model_config import PUBLISHED, ModelConfig
from gemcut.engine.execution.weights import CheckpointTensor
from gemcut.tokenizer import Tokenizer

CONFIG, TOKENIZER = "config.json", "tokenizer.model"
COMPANIONS = (
    TOKENIZER,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)
SUFFIXES = (".ckpt", ".pth", ".pt", ".bin", ".msgpack", ".safetensors", ".json")
# Of no influence on what the model computes: a config given and one found may differ in them.
BOOKKEEPING = {
    "attention_dropout", "initializer_range", "use_cache", "dtype", "architectures", "id2label",
    "extra", "quantization",
}  # fmt: skip


@dataclass(frozen=True)
class Source:
    """An open checkpoint whose tensors are exactly those of its config."""

    path: Path
    config: ModelConfig
    inferred: str | None  # the published size that the shapes gave
    stored: dict[str, StoredTensor]  # by the format's names
    # Checkpoint tensor -> the format's tensor that holds it, and its first row there.
    places: dict[str, tuple[TensorSpec, int]]
    left_aside: int  # tensors of the files that the language model does not need

    def holder(self, tensor: CheckpointTensor) -> StoredTensor:
        """The stored tensor that holds the rows of `tensor`."""
        return self.stored[self.places[tensor.name][0].name]

    def read(self, tensor: CheckpointTensor, dtype: torch.dtype) -> Tensor:
        """`tensor` in memory of its own and in `dtype`."""
        spec, start = self.places[tensor.name]
        stop = start + tensor.shape[0]
        return read_rows(self.holder(tensor), start, stop, dtype, transposed=spec.transposed)


def find_source(source: str | Path) -> Path:
    """A file or folder; or what `resolve_checkpoint` finds, which never fetches a pickle."""
    path = Path(source).expanduser()
    if path.is_dir() and not any(form.find_files(path) for form in FORMATS.values()):
        return resolve_checkpoint(path, gguf=True)
    if path.exists() or isinstance(source, Path) or path.suffix in SUFFIXES:
        return path
    return resolve_checkpoint(source, files=[*FILES, *COMPANIONS], gguf=True)


def folder_of(path: Path) -> Path:
    """The folder that a source is, or is in."""
    return path if path.is_dir() else path.parent


def find_companions(path: Path, tokenizer: str | Path | None) -> dict[str, Path | bytes]:
    """The files to copy beside the weights, or what they will hold, by their names there."""
    folder = folder_of(path)
    found: dict[str, Path | bytes] = {}
    if not is_gguf(path):
        found |= {name: folder / name for name in COMPANIONS if (folder / name).is_file()}
    elif tokenizer is None:  # what lies beside a GGUF file may be another model's
        found |= read_vocabulary(read_header(path)).files()
        if settings := gguf_settings(path):
            found["generation_config.json"] = f"{json.dumps(settings, indent=2)}\n".encode()
    if tokenizer is not None:
        given = Path(tokenizer).expanduser()
        check_file(given)
        Tokenizer.from_file(given)
        found[TOKENIZER] = given
    for file in found.values():
        if isinstance(file, Path):
            check_file(file)
    return found


def open_source(path: Path, form: SourceFormat, config: str | Path | None = None) -> Source:
    """The checkpoint at `path`, its headers read and held against its config.

    `config` is the caller's: a config.json, its folder or a published size; it must agree with a
    config.json beside the weights, or with what a GGUF file says.
    """
    opened = form.open_tensors(path)
    found = _choose_config(path, config)
    inferred = None if found is not None else _infer_config(path, form, opened)
    chosen = PUBLISHED[inferred] if inferred is not None else found
    assert chosen is not None
    stored = form.match_tensors(path, opened, chosen)
    places = _places(form.tensor_specs(chosen))
    used = sum(tensor.count + (tensor.scaler is not None) for tensor in stored.values())
    return Source(path, chosen, inferred, stored, places, left_aside=len(opened) - used)


def with_adapter(source: Source, lora: str | Path) -> Source:
    """The same checkpoint, in Hugging Face's format, with a LoRA adapter merged into it."""
    adapter = open_adapter(lora, source.config)
    places = _places(FORMATS["huggingface"].tensor_specs(adapter.config))
    stored = adapter.merge(source.stored)
    return replace(source, config=adapter.config, stored=stored, places=places)


def _places(specs: Iterable[TensorSpec]) -> dict[str, tuple[TensorSpec, int]]:
    places: dict[str, tuple[TensorSpec, int]] = {}
    for spec in specs:
        start = 0
        for tensor in spec.members:
            places[tensor.name] = (spec, start)
            start += tensor.shape[0]
    return places


def _choose_config(path: Path, given: str | Path | None) -> ModelConfig | None:
    """The config beside the weights, or the one given, which must agree; None without either."""
    beside = _config_beside(path)
    if given is None:
        return beside
    config = _config_given(given)
    if beside is None:
        return config
    _check_agreement(path, config, beside)
    return beside  # with its bookkeeping


def _config_beside(path: Path) -> ModelConfig | None:
    if is_gguf(path):
        return gguf_config(path)
    file = folder_of(path) / CONFIG
    # Without a model_type it is another program's.
    if not file.exists() or "model_type" not in read_json_object(file):
        return None
    return ModelConfig.from_file(file)


def _config_given(given: str | Path) -> ModelConfig:
    if given in PUBLISHED:
        return PUBLISHED[str(given)]
    if not Path(given).expanduser().exists():
        raise ValueError(
            f"config {str(given)!r} is neither a file nor a published size: {', '.join(PUBLISHED)}"
        )
    return ModelConfig.from_file(Path(given).expanduser())


def _check_agreement(path: Path, given: ModelConfig, beside: ModelConfig) -> None:
    one, other = asdict(given), asdict(beside)
    if differing := [name for name in one if name not in BOOKKEEPING and one[name] != other[name]]:
        name = differing[0]
        more = f", and {len(differing) - 1} more differ" if differing[1:] else ""
        place = path if is_gguf(path) else folder_of(path) / CONFIG
        raise ValueError(
            f"{place}: {key_of(name)} is {other[name]}, but {one[name]} in the config given{more}"
        )


def _infer_config(path: Path, form: SourceFormat, opened: Any) -> str:
    """The one published size whose tensors these are; ValueError for none or several."""
    fits = []
    for name, config in PUBLISHED.items():
        with suppress(ValueError):
            form.match_tensors(path, opened, config)
            fits.append(name)
    if len(fits) == 1:
        return fits[0]
    raise ValueError(
        f"{path}: no {CONFIG} beside it, and its tensors are those of "
        f"{' and '.join(fits) or 'no published size'}; give --config, a config.json or one of "
        f"{', '.join(PUBLISHED)}"
    )
