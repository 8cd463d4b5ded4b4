"""ModelConfig: the shape and the constants of one Gemma model, validated.

The names are gemcut's; config_file.py translates from and to config.json.  The dataclass's
`__post_init__` is the only validation, so no config out of range exists.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from gemcut.engine.checks import check_int, check_number, shorten
from gemcut.engine.config.config_file import (
    ARCHITECTURES,
    DEFAULTS,
    GLOBAL,
    LOCAL,
    MAX_LAYERS,
    TANH_GELUS,
    check_model_type,
    key_of,
    read_fields,
    read_json_object,
    write_fields,
)
from gemcut.engine.config.quantization_config import QuantizationConfig
from gemcut.engine.config.rope_parameters import RopeParameters

__all__ = ["PUBLISHED", "ModelConfig", "RopeParameters"]

# Far above every published model, far below the memory that a corrupt file could ask for.
MAX_SIZES = {
    "vocab_size": 2**24,
    "hidden_size": 2**20,
    "intermediate_size": 2**22,
    "num_layers": MAX_LAYERS,
    "num_q_heads": 4096,
    "num_kv_heads": 4096,
    "head_dim": 2**14,
    "max_position_embeddings": 2**24,  # float32 counts that far exactly
}
DTYPES = ("bfloat16", "float32", "float16", "float64")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One Gemma model's shape and constants; ValueError names a value out of range."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    attention_bias: bool
    attn_softcap: float | None
    final_softcap: float | None
    query_pre_attn_scalar: float  # in Gemma 1, which has no such key, head_dim
    sliding_window: int | None
    layer_types: tuple[str, ...]  # "sliding_attention" (local) or "full_attention" (global)
    rope: RopeParameters  # of global layers
    rope_local: RopeParameters  # of local layers; differs from `rope` in Gemma 3 only
    tie_word_embeddings: bool
    hidden_activation: str
    pad_token_id: int | None
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    quantization: QuantizationConfig | None = None  # of the stored weights

    # Without influence on inference; kept for training and for writing the model back.
    attention_dropout: float = 0.0
    initializer_range: float = 0.02
    use_cache: bool = True
    dtype: str | None = None  # of the stored weights
    architectures: tuple[str, ...] = ()  # default: the family's causal language model
    id2label: Mapping[int, str] | None = field(default=None, hash=False)
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)  # other keys, unchanged

    def __post_init__(self) -> None:
        check_model_type(self.model_type)
        if not self.architectures:
            object.__setattr__(self, "architectures", (ARCHITECTURES[self.model_type],))
        self._check_sizes()
        self._check_constants()
        self._check_layers()
        self._check_rope()
        self._check_tokens()
        self._check_bookkeeping()

    def _check_sizes(self) -> None:
        for name, limit in MAX_SIZES.items():
            check_int(key_of(name), getattr(self, name), 1, limit)
        if self.num_q_heads % self.num_kv_heads:
            raise ValueError(
                f"num_attention_heads {self.num_q_heads} is not a multiple of "
                f"num_key_value_heads {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; rotation pairs its dimensions")

    def _check_constants(self) -> None:
        check_number("rms_norm_eps", self.rms_norm_eps, above=0)
        check_number("query_pre_attn_scalar", self.query_pre_attn_scalar, above=0)
        if self.model_type == "gemma" and self.query_pre_attn_scalar != self.head_dim:
            raise ValueError(
                f"query_pre_attn_scalar {self.query_pre_attn_scalar} differs from head_dim "
                f"{self.head_dim}; Gemma 1 scales scores by head_dim**-0.5"
            )
        for name in ("attn_softcap", "final_softcap"):
            if (softcap := getattr(self, name)) is None:
                continue
            check_number(key_of(name), softcap, above=0)
            if name not in DEFAULTS[self.model_type]:
                raise ValueError(f"{key_of(name)} is {softcap}, but {self.model_type} applies none")
        if self.hidden_activation not in TANH_GELUS:
            raise ValueError(
                f"hidden_activation {shorten(self.hidden_activation)} is not supported; "
                f"Gemma's is gelu_pytorch_tanh"
            )

    def _check_layers(self) -> None:
        if not isinstance(self.layer_types, tuple):
            raise ValueError(f"layer_types {shorten(self.layer_types)} is not a list")
        if len(self.layer_types) != self.num_layers:
            raise ValueError(
                f"layer_types has {len(self.layer_types)} entries; "
                f"num_hidden_layers is {self.num_layers}"
            )
        for layer, layer_type in enumerate(self.layer_types):
            if layer_type not in (LOCAL, GLOBAL):
                raise ValueError(
                    f"layer_types[{layer}] {shorten(layer_type)} is not supported; "
                    f"supported are {LOCAL} and {GLOBAL}"
                )
        if self.sliding_window is not None:
            check_int("sliding_window", self.sliding_window, 1, 2**31 - 1)
        elif LOCAL in self.layer_types:
            raise ValueError(f"sliding_window is null, but layer_types has {LOCAL}")
        if self.model_type == "gemma" and self.sliding_window is not None:
            raise ValueError(f"sliding_window is {self.sliding_window}, but gemma has none")

    def _check_rope(self) -> None:
        for rope in (self.rope, self.rope_local):
            if not isinstance(rope, RopeParameters):
                raise ValueError(f"rope_parameters {shorten(rope)} is not a RopeParameters")
            rope.check_head_dim(self.head_dim)
        if self.model_type != "gemma3_text" and self.rope_local != self.rope:
            raise ValueError(
                f"rope_local differs from rope, but {self.model_type} has one rotation"
            )

    def _check_tokens(self) -> None:
        for name in ("pad_token_id", "bos_token_id"):
            if (token_id := getattr(self, name)) is not None:
                check_int(name, token_id, 0, self.vocab_size - 1)
        if not isinstance(self.eos_token_ids, tuple):
            raise ValueError(f"eos_token_id {shorten(self.eos_token_ids)} is not a tuple of ids")
        for token_id in self.eos_token_ids:
            check_int("eos_token_id", token_id, 0, self.vocab_size - 1)

    def _check_bookkeeping(self) -> None:
        check_number("attention_dropout", self.attention_dropout, at_least=0, below=1)
        check_number("initializer_range", self.initializer_range, at_least=0)
        for name in ("attention_bias", "tie_word_embeddings", "use_cache"):
            if not isinstance(value := getattr(self, name), bool):
                raise ValueError(f"{name} {shorten(value)} is neither true nor false")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(
                f"dtype {shorten(self.dtype)} is not supported; supported are {', '.join(DTYPES)}"
            )
        names = self.architectures
        if not isinstance(names, tuple) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"architectures {shorten(names)} is not a list of names")
        labels = self.id2label
        if labels is not None and (
            not isinstance(labels, Mapping) or set(labels) != set(range(len(labels)))
        ):
            raise ValueError(f"id2label {shorten(labels)} must have the keys 0, 1, 2, ...")

    @property
    def scale(self) -> float:
        """The factor on q.k before the softcap and softmax."""
        return self.query_pre_attn_scalar**-0.5

    @property
    def embedding_scale(self) -> float:
        """sqrt(hidden_size); the model rounds it to the table's dtype before it multiplies."""
        return math.sqrt(self.hidden_size)

    @property
    def context_length(self) -> int:
        """The longest sequence; dynamic RoPE stretches the trained positions by its factor."""
        if self.rope.rope_type == "dynamic" and self.rope.factor is not None:
            return int(self.max_position_embeddings * self.rope.factor)
        return self.max_position_embeddings

    @property
    def group_size(self) -> int:
        """Query heads on each KV head."""
        return self.num_q_heads // self.num_kv_heads

    @property
    def has_post_norms(self) -> bool:
        """Whether attention's and MLP's outputs are normalised before they join the residual."""
        return self.model_type in ("gemma2", "gemma3_text")

    @property
    def has_qk_norm(self) -> bool:
        """Whether q and k are normalised over head_dim before they are rotated."""
        return self.model_type == "gemma3_text"

    @property
    def classifier(self) -> str | None:
        """The kind of classifier in place of the head: "sequence", "token", or None."""
        for kind in ("sequence", "token"):
            if self.architectures[0].endswith(f"For{kind.title()}Classification"):
                return kind
        return None

    @property
    def num_labels(self) -> int:
        """Classes of a classifier; two where the config names none."""
        return 2 if self.id2label is None else len(self.id2label)

    def is_local(self, layer: int) -> bool:
        """Whether `layer` attends within sliding_window and rotates by `rope_local`."""
        return self.layer_types[layer] == LOCAL

    def num_parameters(self) -> int:
        """Elements of the checkpoint; tied tables count once."""
        D, F, K = self.hidden_size, self.intermediate_size, self.head_dim
        q_size, kv_size = self.num_q_heads * K, self.num_kv_heads * K
        attention = D * (q_size + 2 * kv_size) + q_size * D
        if self.attention_bias:
            attention += q_size + 2 * kv_size + D
        norms = (4 if self.has_post_norms else 2) * D + (2 * K if self.has_qk_norm else 0)
        one_table = self.tie_word_embeddings or self.classifier is not None
        tables = (1 if one_table else 2) * self.vocab_size * D
        scores = {None: 0, "sequence": D, "token": D + 1}[self.classifier] * self.num_labels
        return tables + self.num_layers * (attention + 3 * D * F + norms) + D + scores

    def kv_bytes_per_token(self, itemsize: int = 2) -> int:
        """Bytes of keys and values that a token adds while it is within every window."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * itemsize

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ModelConfig":
        """The config that a parsed config.json of either generation describes."""
        return cls(**read_fields(values))

    @classmethod
    def from_file(cls, path: str | Path) -> "ModelConfig":
        """The config in `path`: a config.json, or the folder that holds one."""
        path = Path(path)
        if path.is_dir():
            path = path / "config.json"
        values = read_json_object(path)
        try:
            return cls.from_dict(values)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """A config.json in the new spelling; from_dict and transformers read this model from it."""
        return write_fields({f.name: getattr(self, f.name) for f in fields(self)})


def _gemma3(**values: Any) -> ModelConfig:
    return ModelConfig.from_dict(
        {
            "model_type": "gemma3_text",
            "vocab_size": 262144,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "sliding_window": 512,
            "max_position_embeddings": 32768,
            "eos_token_id": [1, 106],
            **values,
        }
    )


# The published sizes; keys that are left out have the defaults of the family's class.
PUBLISHED: dict[str, ModelConfig] = {
    "gemma-2b": ModelConfig.from_dict(
        {
            "model_type": "gemma",
            "hidden_size": 2048,
            "intermediate_size": 16384,
            "num_hidden_layers": 18,
            "num_attention_heads": 8,
            "num_key_value_heads": 1,
        }
    ),
    "gemma-7b": ModelConfig.from_dict({"model_type": "gemma"}),
    "gemma-2-2b": ModelConfig.from_dict({"model_type": "gemma2"}),
    "gemma-2-9b": ModelConfig.from_dict(
        {
            "model_type": "gemma2",
            "hidden_size": 3584,
            "intermediate_size": 14336,
            "num_hidden_layers": 42,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
        }
    ),
    "gemma-2-27b": ModelConfig.from_dict(
        {
            "model_type": "gemma2",
            "hidden_size": 4608,
            "intermediate_size": 36864,
            "num_hidden_layers": 46,
            "num_attention_heads": 32,
            "num_key_value_heads": 16,
            "head_dim": 128,
            "query_pre_attn_scalar": 144,
        }
    ),
    # From public notes; the class's defaults (windows, softcaps, width 2304) are not this model's.
    "vaultgemma-1b": ModelConfig.from_dict(
        {
            "model_type": "vaultgemma",
            "hidden_size": 1152,
            "intermediate_size": 6912,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 1024,
            "sliding_window": None,
            "layer_types": [GLOBAL] * 26,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
        }
    ),
    "gemma-3-270m": _gemma3(hidden_size=640, intermediate_size=2048, num_hidden_layers=18),
    "gemma-3-1b": _gemma3(hidden_size=1152, intermediate_size=6912, num_hidden_layers=26),
}
