"""config.json's quantization_config: how compressed-tensors says what of a checkpoint is quantised.

Groups of modules, by name, pattern or class, have a scheme each; those in `ignore` are plain.
What is not read here is refused by name, and the message says what to do instead.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gemcut.engine.checks import check_int, shorten

FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
METHOD = "compressed-tensors"
# What else checkpoints are quantised by, as quant_method spells it
_OTHERS = {
    "gptq": "GPTQ",
    "awq": "AWQ",
    "bitsandbytes": "bitsandbytes",
    "torchao": "torchao",
    "quanto": "Quanto",
    "hqq": "HQQ",
    "aqlm": "AQLM",
    "eetq": "EETQ",
    "higgs": "HIGGS",
    "spqr": "SpQR",
    "vptq": "VPTQ",
    "bitnet": "BitNet",
    "auto-round": "AutoRound",
    "quark": "Quark",
    "modelopt": "ModelOpt (NVFP4 among others)",
    "mxfp4": "MXFP4",
    "fp8": "fine-grained FP8",
    "fbgemm_fp8": "FBGEMM FP8",
}
_OTHER_FORMATS = {
    "nvfp4-pack-quantized": "NVFP4",
    "mxfp4-pack-quantized": "MXFP4",
    "mxfp6-pack-quantized": "MXFP6",
    "mxfp8-quantized": "MXFP8",
    "marlin-24": "2:4 sparsity",
    "sparse-24-bitmask": "2:4 sparsity",
    "sparse-bitmask": "sparsity",
    "dense": "weights that are not compressed",
}
INSTEAD = (
    "take the plain checkpoint with quantization='int4' (`gemcut convert --quantization` saves it "
    "so), or a GGUF file"
)
# A pattern is matched with every name: one that goes back and forth takes longer than anyone waits
_REPEATED_GROUP, _REPEATED = re.compile(r"\)[*+{]"), re.compile(r"(?<!\\)[*+]|\{\d*,")
MOST_REPEATED, LONGEST_PATTERN = 4, 1000
CACHE_NOTE = "the scales of its KV cache are left aside"
# Names that a module of the language model has in checkpoints of several kinds
_PREFIXES = ("", "model.", "language_model.", "model.language_model.", "language_model.model.")


@dataclass(frozen=True)
class Scheme:
    """How the weights of some modules are stored."""

    targets: tuple[str, ...]  # names, classes, or patterns after "re:"
    num_bits: int  # 4 or 8
    is_float: bool  # e4m3, or whole numbers
    symmetric: bool  # else there are zero points
    strategy: str  # tensor, channel, group or block: what shares a scale
    block: tuple[int, int]  # rows and columns of a group or block; 0: all
    is_packed: bool  # in words of 32 bits

    @property
    def format(self) -> str:
        """The format of a QuantizedWeight."""
        return "fp8" if self.is_float else f"int{self.num_bits}"


@dataclass(frozen=True)
class QuantizationConfig:
    """The schemes of a checkpoint and the modules that they are for."""

    schemes: tuple[Scheme, ...]
    ignore: tuple[str, ...]
    notes: tuple[str, ...]  # what is left aside, in words
    cache_strategy: str | None  # tensor or attn_head, which share a scale of a KV cache in fp8
    values: Mapping[str, Any] = field(hash=False)  # as config.json has it

    def scheme_of(self, name: str) -> Scheme | None:
        """The scheme of a checkpoint tensor, such as model.layers.0.mlp.up_proj.weight."""
        module = name.removesuffix(".weight").removeprefix("model.")
        names = [prefix + module for prefix in _PREFIXES]
        kind = "Embedding" if module == "embed_tokens" else "Linear"
        if any(_rank(target, names, kind) for target in self.ignore):
            return None
        found = [
            (rank, scheme)
            for scheme in self.schemes
            if (rank := max((_rank(target, names, kind) for target in scheme.targets), default=0))
        ]
        return max(found, key=lambda each: each[0])[1] if found else None


def _rank(target: str, names: list[str], kind: str) -> int:
    """How closely a target means a module: 3 its name, 2 a pattern, 1 its class, 0 not at all."""
    if target in names:
        return 3
    if target.startswith("re:"):
        return 2 * any(re.match(target[3:], name) for name in names)
    return int(target == kind or (target.endswith("WordEmbedding") and kind == "Embedding"))


def read_quantization(values: Any) -> QuantizationConfig | None:
    """The object quantization_config of a config.json; None where nothing is quantised."""
    if not values:
        return None
    if not isinstance(values, Mapping):
        raise ValueError(f"quantization_config {shorten(values)} is not an object")
    _check_method(values)
    groups = values.get("config_groups")
    of_cache = values.get("kv_cache_scheme")
    if not isinstance(groups, Mapping) or not (groups or of_cache):
        raise ValueError(f"config_groups {shorten(groups)} is not an object with entries")
    notes: list[str] = []
    schemes = []
    for name, group in groups.items():
        if not isinstance(group, Mapping):
            raise ValueError(f"config_groups: {name} {shorten(group)} is not an object")
        if group.get("weights") is not None:
            schemes.append(_read_scheme(str(name), group, values.get("format")))
        if group.get("input_activations") or group.get("output_activations"):
            notes.append("activations are not quantised here")
    if of_cache:
        notes.append(CACHE_NOTE)
    ignore = _read_names("ignore", values.get("ignore") or ())
    noted, strategy = tuple(dict.fromkeys(notes)), _read_cache_strategy(of_cache)
    return QuantizationConfig(tuple(schemes), ignore, noted, strategy, dict(values))


def _check_method(values: Mapping[str, Any]) -> None:
    method = values.get("quant_method")
    if method != METHOD:
        name = "of no method" if method is None else _OTHERS.get(str(method), shorten(method))
        raise ValueError(
            f"quantization_config is {name}, which is not read; {METHOD} is; {INSTEAD}"
        )
    sparsity = values.get("sparsity_config")
    if isinstance(sparsity, Mapping) and sparsity.get("format", "dense") != "dense":
        raise ValueError(
            f"quantization_config: sparsity ({shorten(sparsity['format'])}) is not read; {INSTEAD}"
        )
    if values.get("transform_config"):
        raise ValueError(f"quantization_config: transforms are not read; {INSTEAD}")
    if values.get("quantization_status", "compressed") not in ("compressed", "Compressed"):
        status = shorten(values["quantization_status"])
        raise ValueError(f"quantization_status {status} is not read, compressed is; {INSTEAD}")


def _read_scheme(name: str, group: Mapping[str, Any], of_all: Any) -> Scheme:
    weights = group["weights"]
    if not isinstance(weights, Mapping):
        raise ValueError(f"config_groups: weights of {name} {shorten(weights)} is not an object")
    stored = group.get("format") or of_all
    if stored not in FORMATS:
        known = _OTHER_FORMATS.get(str(stored))
        raise ValueError(
            f"config_groups: {name} has format {shorten(stored)}{f' ({known})' if known else ''}, "
            f"but {', '.join(FORMATS)} are read; {INSTEAD}"
        )
    bits, kind = weights.get("num_bits", 8), weights.get("type", "int")
    is_float = kind == "float"
    if (bits, kind) not in ((4, "int"), (8, "int"), (8, "float")):
        raise ValueError(
            f"config_groups: {name} has {shorten(kind)} of {shorten(bits)} bits, but int of 4 and "
            f"8 and float of 8 are read; {INSTEAD}"
        )
    symmetric = weights.get("symmetric", True)
    if symmetric not in (True, False) or (is_float and not symmetric):
        raise ValueError(f"config_groups: symmetric {shorten(symmetric)} of {name} is not read")
    if weights.get("dynamic"):
        raise ValueError(f"config_groups: dynamic weights of {name} are not read; {INSTEAD}")
    if weights.get("actorder") not in (None, False, "static", "weight"):
        raise ValueError(
            f"config_groups: {name} has its columns in the order of activations (actorder), which "
            f"is not read; {INSTEAD}"
        )
    strategy, block = _read_strategy(name, weights)
    return Scheme(
        targets=_read_names(f"targets of {name}", group.get("targets")),
        num_bits=int(bits),
        is_float=is_float,
        symmetric=bool(symmetric),
        strategy=strategy,
        block=block,
        is_packed=stored == "pack-quantized",
    )


def _read_strategy(name: str, weights: Mapping[str, Any]) -> tuple[str, tuple[int, int]]:
    """What shares a scale, and its rows and columns (0: all)."""
    size = weights.get("group_size")
    by_size = "tensor" if size is None else "channel" if size == -1 else "group"
    strategy = weights.get("strategy") or by_size
    if strategy == "tensor":
        return strategy, (0, 0)
    if strategy == "channel":
        return strategy, (1, 0)
    if strategy == "group":
        check_int(f"config_groups: group_size of {name}", size, 1, 2**20)
        assert size is not None
        return strategy, (1, int(size))
    if strategy == "block":
        block = weights.get("block_structure")
        sizes = block.split("x") if isinstance(block, str) else block
        if not isinstance(sizes, list | tuple) or len(sizes) != 2:
            raise ValueError(f"config_groups: block_structure {shorten(block)} of {name}")
        for each in sizes:
            as_int = int(each) if isinstance(each, str) and each.isdecimal() else each
            check_int(f"config_groups: block_structure of {name}", as_int, 1, 2**20)
        return strategy, (int(sizes[0]), int(sizes[1]))
    raise ValueError(
        f"config_groups: strategy {shorten(strategy)} of {name} is not read; tensor, channel, "
        f"group and block are; {INSTEAD}"
    )


def _read_cache_strategy(scheme: Any) -> str | None:
    """What shares a scale of keys and of values; None where they are no scales of e4m3."""
    if not scheme:
        return None
    if not isinstance(scheme, Mapping):
        raise ValueError(f"kv_cache_scheme {shorten(scheme)} is not an object")
    is_fp8 = (scheme.get("num_bits", 8), scheme.get("type", "int")) == (8, "float")
    strategy = scheme.get("strategy") or "tensor"
    if not is_fp8 or scheme.get("dynamic") or scheme.get("symmetric") is False:
        return None
    return strategy if strategy in ("tensor", "attn_head") else None


def _read_names(what: str, names: Any) -> tuple[str, ...]:
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"quantization_config: {what} {shorten(names)} is not a list of names")
    for name in names:
        if name.startswith("re:"):
            try:
                re.compile(name[3:])
            except re.error as error:
                raise ValueError(
                    f"quantization_config: {shorten(name)} is no pattern ({error})"
                ) from None
            is_long = len(name) > LONGEST_PATTERN or len(_REPEATED.findall(name)) > MOST_REPEATED
            if is_long or _REPEATED_GROUP.search(name):
                raise ValueError(
                    f"quantization_config: {shorten(name)} may take forever: it repeats a group, "
                    f"or more than {MOST_REPEATED} parts, or is longer than {LONGEST_PATTERN}"
                )
    return tuple(names)
