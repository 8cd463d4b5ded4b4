"""GenerationConfig: how `generate` chooses tokens and when it ends, by the documented names."""

import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from gemcut.engine.checks import check_int, refuse_unknown, shorten
from gemcut.engine.config.config_file import as_token_ids
from gemcut.engine.config.generation_file import read_generation_config
from gemcut.engine.transformers_api.models.configs import PreTrainedConfig

# Other settings of transformers, and the values at which they change nothing: others are refused.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "use_cache": (True,),
    "cache_implementation": ("static", "dynamic", "hybrid"),  # always a static one
    "early_stopping": (False, True, "never"),  # of beam search, which gemcut does not have
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "length_penalty": (1.0,),
    "diversity_penalty": (0.0,),
    "encoder_repetition_penalty": (1.0,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "remove_invalid_values": (False,),
    "renormalize_logits": (False,),
    "low_memory": (False,),
    "output_scores": (False,),
    "output_attentions": (False,),
    "output_hidden_states": (False,),
    "guidance_scale": (1, 1.0),
    "token_healing": (False,),
    "penalty_alpha": (0, 0.0),
    "synced_gpus": (False,),
    "trust_remote_code": (True, False),
}
NEUTRAL |= dict.fromkeys(
    (
        "bad_words_ids",
        "force_words_ids",
        "constraints",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "exponential_decay_length_penalty",
        "suppress_tokens",
        "begin_suppress_tokens",
        "sequence_bias",
        "watermarking_config",
        "assistant_model",
        "prompt_lookup_num_tokens",
        "cache_config",
        "max_time",
        "prefix_allowed_tokens_fn",
        "negative_prompt_ids",
        "custom_generate",
    ),
    (),
)
DEFAULT_MAX_LENGTH = 20  # new tokens, where no length is given


@dataclass
class GenerationConfig:
    """The settings of `generate`; None leaves the value to the file, or else to the default."""

    max_length: int | None = None  # tokens with the prompt's columns
    max_new_tokens: int | None = None  # the same without; decides where both are set
    min_length: int = 0
    min_new_tokens: int | None = None
    do_sample: bool = False  # False takes the likeliest token
    temperature: float = 1.0
    top_k: int | None = 50  # 0 or None: among all
    top_p: float | None = 1.0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    num_return_sequences: int = 1
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    stop_strings: str | list[str] | None = None  # generate needs a tokenizer to find them
    output_logits: bool = False
    return_dict_in_generate: bool = False
    extra: dict[str, Any] = field(default_factory=dict)  # other keys of the file

    @classmethod
    def of_model(cls, config: PreTrainedConfig, folder: str | Path | None) -> "GenerationConfig":
        """The settings of a checkpoint: generation_config.json, and config.json for missing ids."""
        values = {} if folder is None else read_generation_config(folder)
        result = cls.from_dict(values)
        ids = as_token_ids(config.eos_token_id) + as_token_ids(result.eos_token_id)
        result.eos_token_id = list(dict.fromkeys(ids)) or None
        return result.with_ids_of(config)

    def with_ids_of(self, other: "GenerationConfig | PreTrainedConfig") -> "GenerationConfig":
        """These settings, with another's special tokens where they name none."""
        names = ("eos_token_id", "pad_token_id", "bos_token_id")
        lacking = [name for name in names if getattr(self, name) is None]
        return replace(self, **{name: getattr(other, name) for name in lacking})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "GenerationConfig":
        """The settings in a parsed generation_config.json."""
        names = {f.name for f in fields(cls)} - {"extra"}
        known = {key: x for key, x in values.items() if key in names and x is not None}
        return cls(**known, extra={key: x for key, x in values.items() if key not in names})

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "GenerationConfig":
        """The settings in generation_config.json of a folder."""
        return cls.from_dict(read_generation_config(folder))

    def to_dict(self) -> dict[str, Any]:
        """The object of generation_config.json."""
        values = asdict(self)
        return {k: x for k, x in (values.pop("extra") | values).items() if x is not None}

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write generation_config.json to a folder."""
        text = json.dumps(self.to_dict(), indent=2, sort_keys=True, allow_nan=False)
        (Path(save_directory) / "generation_config.json").write_text(text + "\n")

    def updated(self, values: Mapping[str, Any]) -> "GenerationConfig":
        """These settings, some replaced by `values`; an error names one that is unknown."""
        names = {f.name for f in fields(self)} - {"extra"}
        refuse_unknown("generate", values, {*names, *NEUTRAL})
        for name, value in {**self.extra, **values}.items():
            if name in NEUTRAL and value is not None and value not in NEUTRAL[name]:
                raise NotImplementedError(f"{name}={shorten(value)} is not supported; leave it out")
        own = {key: x for key, x in values.items() if key in names}
        # a length of this call comes before those of a file or a config object
        if "max_length" in own and "max_new_tokens" not in own:
            own["max_new_tokens"] = None
        result = replace(self, **own)
        result.check()
        if not result.do_sample:
            for name in ("temperature", "top_k", "top_p", "min_p"):
                if own.get(name) not in (None, getattr(GenerationConfig, name)):
                    warnings.warn(
                        f"{name}={own[name]} has no effect without do_sample=True", stacklevel=4
                    )
        return result

    def check(self) -> None:
        """Nothing, or ValueError that names a setting out of range (SamplingParams checks more)."""
        for name in ("max_length", "max_new_tokens"):
            if (value := getattr(self, name)) is not None:
                check_int(name, value, 1, 2**31 - 1)
        check_int("min_length", self.min_length, 0, 2**31 - 1)
        check_int("num_return_sequences", self.num_return_sequences, 1, 1024)
        if self.do_sample and not self.temperature > 0:
            raise ValueError(
                f"temperature {self.temperature} must be above 0; do_sample=False is greedy"
            )
        if self.num_return_sequences > 1 and not self.do_sample:
            raise ValueError(
                f"num_return_sequences {self.num_return_sequences} needs do_sample=True: "
                f"greedy sequences are all the same"
            )

    def check_token_ids(self, vocab_size: int) -> None:
        """Nothing, or ValueError where an id is past the vocabulary."""
        pad = () if self.pad_token_id is None else (self.pad_token_id,)
        for name, ids in (("eos_token_id", as_token_ids(self.eos_token_id)), ("pad_token_id", pad)):
            for token_id in ids:
                check_int(name, token_id, 0, vocab_size - 1)

    def new_tokens(self, columns: int, most: int) -> int:
        """How many tokens may follow a prompt of `columns` columns, with `most` in all."""
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        if self.max_length is None:
            return max(1, min(DEFAULT_MAX_LENGTH, most - columns))
        if self.max_length <= columns:
            raise ValueError(
                f"max_length {self.max_length} leaves no room behind a prompt of {columns} tokens; "
                f"raise it, or give max_new_tokens"
            )
        return self.max_length - columns
