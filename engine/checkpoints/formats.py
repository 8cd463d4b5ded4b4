"""The table of checkpoint formats, and the detection of the one that a file or folder holds."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from gemcut.engine.checkpoints import flax, gemma_pytorch, gguf_format, huggingface
from gemcut.engine.checkpoints.stored_tensors import StoredTensor, TensorSpec
from gemcut.engine.config.model_config import ModelConfig


class SourceFormat(Protocol):
    """A module that reads one format of checkpoints."""

    def find_files(self, path: Path) -> list[Path]:
        """The weight files or the index that `path` is or holds; perhaps none."""
        ...

    def open_tensors(self, path: Path) -> Any:
        """The headers of all tensors in file or folder `path`, as `match_tensors` takes them."""
        ...

    def match_tensors(
        self, path: Path, opened: Any, config: ModelConfig
    ) -> dict[str, StoredTensor]:
        """The tensors of `config` by the format's names: exactly those, or ValueError."""
        ...

    def tensor_specs(self, config: ModelConfig) -> Iterator[TensorSpec]:
        """Every tensor that the format holds of such a model; ValueError where it cannot."""
        ...


class Format(SourceFormat, Protocol):
    """A module that reads and writes one."""

    @property
    def SINGLE(self) -> str:
        """The name of a weight file that holds all tensors."""
        ...

    @property
    def SHARD(self) -> str:
        """The name of one of several, with places for its number and their count."""
        ...

    @property
    def INDEX(self) -> str:
        """The name of the file that says which tensor is in which of several."""
        ...

    def write_file(self, file: Path, tensors: Mapping[str, Callable[[], Tensor]]) -> None:
        """Write one weight file of the tensors that the functions make."""
        ...


FORMATS: dict[str, Format] = {
    "huggingface": huggingface,
    "original": gemma_pytorch,
    "flax": flax,
}


SOURCES: dict[str, SourceFormat] = {**FORMATS, "gguf": gguf_format}


def detect_format(source: Path, asked: str | None = None) -> str:
    """The name of the format at `source`; ValueError where there is none, or several."""
    if not source.exists():
        raise ValueError(f"{source}: no such file or folder")
    if source.suffix == ".safetensors" and not source.is_dir():
        raise ValueError(f"{source}: give the folder that holds it, with its config.json")
    if asked is not None:
        return asked  # its reader says what it misses
    found = {name: form.find_files(source) for name, form in SOURCES.items()}
    names = [name for name, files in found.items() if files]
    if len(names) > 1:
        listed = ", ".join(f"{found[name][0].name} ({name})" for name in names)
        raise ValueError(f"{source}: holds {listed}; say with --from which to convert")
    if not names:
        wanted = [each for form in FORMATS.values() for each in (form.SINGLE, form.INDEX)]
        raise ValueError(
            f"{source}: holds no weights that are known here: "
            f"{', '.join(wanted)}, or another .ckpt or .gguf file"
        )
    return names[0]
