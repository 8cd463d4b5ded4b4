"""RopeParameters: the rotation of a layer, and its keys in config.json.

New files hold `rope_parameters`, one object (Gemma 3: one for each layer type).  Old ones spread
the same over `rope_theta`, `rope_scaling` and, in Gemma 3, `rope_local_base_freq`.  rope.py turns
the parameters into frequencies.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gemcut.engine.checks import check_int, check_number, shorten

# Type -> the keys it reads, required ones first.
_REQUIRED: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("original_max_position_embeddings",),
    "llama3": (
        "factor",
        "original_max_position_embeddings",
        "low_freq_factor",
        "high_freq_factor",
    ),
    "longrope": ("original_max_position_embeddings", "short_factor", "long_factor"),
}
_OPTIONAL: dict[str, tuple[str, ...]] = {
    "yarn": ("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
    "longrope": ("factor", "attention_factor"),
}
ROPE_TYPES = tuple(_REQUIRED)


@dataclass(frozen=True, kw_only=True)
class RopeParameters:
    """One rotation; keys that `rope_type` does not read are None.  ValueError names a bad value."""

    rope_type: str = "default"
    rope_theta: float = 10_000.0
    factor: float | None = None  # yarn, longrope: None means max_position / original_max_position
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None  # None: the value that the type's paper recommends
    beta_fast: float | None = None  # None: 32
    beta_slow: float | None = None  # None: 1
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.rope_type, str) or self.rope_type not in ROPE_TYPES:
            raise ValueError(
                f"rope_type {shorten(self.rope_type)} is not supported; "
                f"supported are {', '.join(ROPE_TYPES)}"
            )
        # yarn divides by the logarithm of the base, and a base below 1 would turn backwards
        check_number("rope_theta", self.rope_theta, above=1)
        required, optional = _REQUIRED[self.rope_type], _OPTIONAL.get(self.rope_type, ())
        for name in required:
            if getattr(self, name) is None:
                raise ValueError(f"rope_type {self.rope_type} needs {name}")
        for name in _NUMBERS + _LISTS + ("original_max_position_embeddings",):
            if getattr(self, name) is not None and name not in required + optional:
                raise ValueError(f"rope_type {self.rope_type} has no {name}")
        self._check_values()

    def _check_values(self) -> None:
        for name in _NUMBERS:
            if (value := getattr(self, name)) is None:
                continue
            if name == "factor":
                # below 1 it would shrink the context, and dynamic's base would go negative
                check_number("rope factor", value, at_least=1, below=2**24)
            else:
                check_number(f"rope {name}", value, above=0)
        if (original := self.original_max_position_embeddings) is not None:
            # longrope divides by log(original); its threshold is meaningless at 1
            check_int("rope original_max_position_embeddings", original, 2, 2**24)
        if not isinstance(self.truncate, bool):
            raise ValueError(f"rope truncate {shorten(self.truncate)} is not true or false")
        low, high = self.low_freq_factor, self.high_freq_factor
        if low is not None and high is not None and high <= low:
            raise ValueError(f"rope high_freq_factor {high} must be above low_freq_factor {low}")
        for name in _LISTS:
            if (factors := getattr(self, name)) is None:
                continue
            if not isinstance(factors, tuple):
                raise ValueError(f"rope {name} {shorten(factors)} is not a list of numbers")
            for i, factor in enumerate(factors):
                check_number(f"rope {name}[{i}]", factor, above=0)

    def check_head_dim(self, head_dim: int) -> None:
        """Nothing, or ValueError where heads of this size cannot rotate by these parameters."""
        for name in _LISTS:
            factors = getattr(self, name)
            if factors is not None and len(factors) != head_dim // 2:
                raise ValueError(
                    f"rope {name} has {len(factors)} entries; "
                    f"head_dim {head_dim} needs {head_dim // 2}"
                )
        if self.rope_type == "dynamic" and head_dim < 4:
            raise ValueError(f"rope_type dynamic needs head_dim of at least 4, not {head_dim}")

    def to_dict(self) -> dict[str, Any]:
        """The object for `rope_parameters`; keys that are None are left out."""
        values: dict[str, Any] = {"rope_type": self.rope_type, "rope_theta": self.rope_theta}
        for name in _REQUIRED[self.rope_type] + _OPTIONAL.get(self.rope_type, ()):
            if (value := getattr(self, name)) is not None:
                values[name] = list(value) if name in _LISTS else value
        if self.rope_type == "yarn":
            values.setdefault("factor", None)  # transformers requires the key, and accepts null
            values["truncate"] = self.truncate
        return values


_LISTS = ("short_factor", "long_factor")
_NUMBERS = (
    "factor",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "low_freq_factor",
    "high_freq_factor",
)


def pop_rope(values: dict[str, Any], max_length: Any) -> RopeParameters:
    """The one rotation of a Gemma 1, Gemma 2 or VaultGemma file, removed from `values`."""
    theta = values.pop("rope_theta", 10_000.0)
    scaling = _object("rope_scaling", values.pop("rope_scaling", None))
    rope = dict(scaling or _object("rope_parameters", values.pop("rope_parameters", None)))
    values.pop("rope_parameters", None)
    for key in ("full_attention", "sliding_attention"):
        if key in rope:
            raise ValueError(f"rope_parameters has {key}; only gemma3_text rotates by layer type")
    # in transformers the key beside the rope object wins over the one within it
    if (original := values.get("original_max_position_embeddings")) is not None:
        rope["original_max_position_embeddings"] = original
    return _parse(rope, theta, max_length, truncate=rope.get("truncate", True))


def pop_rope_by_layer_type(
    values: dict[str, Any], max_length: Any
) -> tuple[RopeParameters, RopeParameters]:
    """The rotations of a Gemma 3 file's global and local layers, removed from `values`."""
    rope = _object("rope_parameters", values.pop("rope_parameters", None))
    if "rope_type" in rope or "rope_theta" in rope:
        raise ValueError(
            "rope_parameters of gemma3_text must hold full_attention and sliding_attention"
        )
    # transformers reads `truncate` beside the two objects, never within them
    truncate = rope.get("truncate", True)
    both = []
    for key, theta_key, theta in (
        ("full_attention", "rope_theta", 1_000_000.0),
        ("sliding_attention", "rope_local_base_freq", 10_000.0),
    ):
        own = dict(_object(f"rope_parameters.{key}", rope.get(key)))
        if key == "full_attention":  # scaling of old files is for global layers only
            own |= _object("rope_scaling", values.pop("rope_scaling", None))
        both.append(_parse(own, values.pop(theta_key, theta), max_length, truncate))
    return both[0], both[1]


def _parse(rope: dict[str, Any], theta: Any, max_length: Any, truncate: Any) -> RopeParameters:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(kind, str) or kind not in ROPE_TYPES:
        return RopeParameters(rope_type=kind)  # it refuses the type
    if rope.get("partial_rotary_factor") not in (None, 1):
        raise ValueError(
            f"partial_rotary_factor {shorten(rope['partial_rotary_factor'])} is not supported; "
            f"Gemma rotates whole heads"
        )
    # Keys of another type are dropped, as transformers does (it warns).
    names = _REQUIRED[kind] + _OPTIONAL.get(kind, ())
    fields = {name: rope[name] for name in names if rope.get(name) is not None}
    for name in ("beta_fast", "beta_slow", "mscale", "mscale_all_dim"):
        if fields.get(name) == 0:  # in transformers, zero means absent
            del fields[name]
    if "original_max_position_embeddings" in names:
        fields.setdefault("original_max_position_embeddings", max_length)
    for name in _LISTS:
        if isinstance(fields.get(name), list):
            fields[name] = tuple(fields[name])
    if kind == "yarn":
        fields["truncate"] = True if truncate is None else truncate
    return RopeParameters(rope_type=kind, rope_theta=rope.get("rope_theta", theta), **fields)


def _object(name: str, value: Any) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} {shorten(value)} is not an object")
    return value
