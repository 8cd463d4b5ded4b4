"""adapter_config.json of peft's LoRA: which modules an adapter changes, and by how much.

Rules and defaults are those of peft (0.21).  A field that changes what the adapter means and is not
supported is refused by name, and so is one that is not known here, unless it asks for nothing.
"""

import json
import math
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemcut.engine.checks import check_bool, check_int, check_number, printable, shorten
from gemcut.engine.config.config_file import read_json_object

CONFIG = "adapter_config.json"
# Without influence on the merged weights: bookkeeping, training, and how A and B began.
_NEUTRAL = {
    "task_type", "auto_mapping", "base_model_name_or_path", "revision", "peft_version",
    "inference_mode", "lora_dropout", "runtime_config", "megatron_core", "qalora_group_size",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "fan_in_fan_out",  # peft sets it to False for Gemma's linear layers
    "bias",  # trained biases are in the file by their names
}  # fmt: skip
# Beginnings of A and B that leave the model's own weights as they were.
_BEGINNINGS = (True, False, None, "gaussian", "orthogonal", "eva")
# How peft matches what is no whole pattern of its own.
_SAVED, _LAYER, _END = r"(^|.*\.){}($|\..*)", r"(?:^|.*?\.){}\.(\d+)\.", r"(.*\.)?({})$"
_TENSOR = r"(^|\.){}\."  # of a module to save
_CHOICES = re.compile(r"[*+?{|[]")  # a pattern without one is soon compiled and matched
# Reads [[[method of re, pattern], ...], names].  It runs alone, without gemcut.
_PROBE = """
import json, re, sys
patterns, names = json.load(sys.stdin)
for method, pattern in patterns:
    for name in names:
        getattr(re, method)(pattern, name)
"""
_PATIENCE = 5  # seconds; an honest pattern takes milliseconds
MOST = 1e30  # an alpha; a number in float32


@dataclass(frozen=True)
class LoraConfig:
    """What of an adapter_config.json counts for merging."""

    file: Path
    r: int
    lora_alpha: float
    use_rslora: bool
    use_dora: bool
    ensure_weight_tying: bool
    target_modules: str | tuple[str, ...] | None  # a pattern, names, or what the file has
    exclude_modules: str | tuple[str, ...]
    modules_to_save: tuple[str, ...]
    layers_to_transform: tuple[int, ...]  # none: all
    layers_pattern: tuple[str, ...]
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]

    def rank(self, module: str) -> int:
        """The columns of A and rows of B of a module, by its name in the adapted model."""
        return _by_pattern(self.rank_pattern, module, self.r)

    def scaling(self, module: str) -> float:
        """The factor on B @ A of a module."""
        rank = self.rank(module)
        alpha = _by_pattern(self.alpha_pattern, module, self.lora_alpha)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def targets(self, module: str) -> bool:
        """Whether a module, by its name in the adapted model, has an A and a B."""
        if _is_named(self.exclude_modules, module):
            return False
        if any(re.match(_SAVED.format(name), module) for name in self.modules_to_save):
            return False
        if self.target_modules is None:
            return True
        if not isinstance(self.target_modules, str) and self.layers_to_transform:
            patterns = self.layers_pattern or (r"[^.]*",)
            found = (re.match(_LAYER.format(name), module) for name in patterns)
            layer = next((int(match[1]) for match in found if match), None)
            if layer not in self.layers_to_transform:
                return False
        if isinstance(self.target_modules, str) and self.target_modules.lower() == "all-linear":
            return not re.search(r"(^|\.)(embed_tokens|lm_head)$", module)
        return _is_named(self.target_modules, module)

    def is_saved(self, module: str, tensors: Iterable[str]) -> bool:
        """Whether there is a tensor of a module to save among the names of tensors."""
        return any(re.search(_TENSOR.format(module), name) for name in tensors)

    def check_patterns(self, names: Iterable[str]) -> None:
        """Nothing, or ValueError where a pattern is broken, or takes too long for these names.

        Some take years, and nothing stops them in this process: what could be one of them is tried
        in another first.
        """
        tried = [each for each in self._patterns() if _CHOICES.search(each[1])]
        if tried and not _ends_soon([each[2:] for each in tried], sorted(names)):
            fields = " or ".join(dict.fromkeys(each[0] for each in tried))
            raise ValueError(
                f"{self.file}: a pattern of {fields} takes too much time or memory to match"
            )
        for field, own, _, pattern in self._patterns():
            try:
                re.compile(pattern)
            except (re.error, OverflowError, RecursionError) as error:
                raise ValueError(
                    f"{self.file}: {field} {shorten(own)} is no pattern ({error})"
                ) from None

    def _patterns(self) -> Iterator[tuple[str, str, str, str]]:
        """The field of each pattern, itself, and the method of re and pattern that are used."""
        for field in ("target_modules", "exclude_modules"):
            if isinstance(own := getattr(self, field), str):
                yield field, own, "fullmatch", own
        for own in self.modules_to_save:
            yield "modules_to_save", own, "match", _SAVED.format(own)
            yield "modules_to_save", own, "search", _TENSOR.format(own)
        for own in self.layers_pattern:
            yield "layers_pattern", own, "match", _LAYER.format(own)
        for field in ("rank_pattern", "alpha_pattern"):
            for own in getattr(self, field):
                yield field, own, "match", _END.format(own)


def _ends_soon(patterns: list[tuple[str, str]], names: list[str]) -> bool:
    """Whether methods of re with their patterns, tried on names elsewhere, end or raise in time."""
    program = [sys.executable, "-I", "-S", "-c", _PROBE]
    task = json.dumps([patterns, names]).encode()
    try:
        probe = subprocess.run(program, input=task, capture_output=True, timeout=_PATIENCE)
    except subprocess.TimeoutExpired:
        return False
    return probe.returncode in (0, 1)


def read_lora_config(folder: Path) -> LoraConfig:
    """The config of the adapter in a folder; ValueError names what is not supported."""
    file = folder / CONFIG
    values = read_json_object(file)
    try:
        return _read(file, dict(values))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def _read(file: Path, values: dict[str, Any]) -> LoraConfig:
    if (kind := values.pop("peft_type", None)) != "LORA":
        raise ValueError(f"peft_type {shorten(kind)} is not supported; LORA is")
    beginning = values.pop("init_lora_weights", True)
    if beginning not in _BEGINNINGS:
        raise ValueError(
            f"init_lora_weights {shorten(beginning)} is not supported: it changes the model's own "
            f"weights too; save the adapter with path_initial_model_for_weight_conversion"
        )
    r, alpha = values.pop("r", 8), values.pop("lora_alpha", 8)
    ranks, alphas = values.pop("rank_pattern", None), values.pop("alpha_pattern", None)
    check_int("r", r, 1, 2**20)
    check_number("lora_alpha", alpha, at_least=-MOST, below=MOST)
    for name, pattern in (("rank_pattern", ranks), ("alpha_pattern", alphas)):
        if not isinstance(pattern, Mapping | None):
            raise ValueError(f"{name} {shorten(pattern)} is not an object")
    for key, rank in (ranks or {}).items():
        check_int(f"rank_pattern {shorten(key)}", rank, 1, 2**20)
    for key, value in (alphas or {}).items():
        check_number(f"alpha_pattern {shorten(key)}", value, at_least=-MOST, below=MOST)
    flags = {name: values.pop(name, False) for name in ("use_rslora", "use_dora")}
    flags["ensure_weight_tying"] = values.pop("ensure_weight_tying", None) or False
    for name, value in flags.items():
        check_bool(name, value)
    layers = values.pop("layers_to_transform", None)
    layers = [layers] if isinstance(layers, int) else layers or []
    if not isinstance(layers, list) or not all(isinstance(layer, int) for layer in layers):
        raise ValueError(f"layers_to_transform {shorten(layers)} is not a list of numbers")
    config = LoraConfig(
        file=file,
        r=r,
        lora_alpha=alpha,
        target_modules=_names("target_modules", values) or None,
        exclude_modules=_names("exclude_modules", values),
        modules_to_save=_as_tuple(_names("modules_to_save", values)),
        layers_to_transform=tuple(layers),
        layers_pattern=_as_tuple(_names("layers_pattern", values)),
        rank_pattern=ranks or {},
        alpha_pattern=alphas or {},
        **flags,
    )
    for name, value in values.items():
        if value and name not in _NEUTRAL:
            raise ValueError(f"{printable(name)} {shorten(value)} is not supported")
    return config


def _names(name: str, values: dict[str, Any]) -> str | tuple[str, ...]:
    """One of the fields that are a pattern or names."""
    found = values.pop(name, None)
    if found is None or isinstance(found, str):
        return found or ()
    if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
        raise ValueError(f"{name} {shorten(found)} is neither a pattern nor a list of names")
    return tuple(found)


def _as_tuple(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


def _is_named(names: str | tuple[str, ...], module: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _by_pattern(patterns: Mapping[str, Any], module: str, otherwise: Any) -> Any:
    """The value of the first pattern that the end of a module's name matches."""
    for pattern, value in patterns.items():
        if re.match(_END.format(pattern), module):
            return value
    return otherwise
