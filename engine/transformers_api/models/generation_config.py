"""GenerationConfig: the settings of `generate` by their documented names, and their file."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gemcut.engine.checkpoints.hub import resolve_checkpoint, take_hub_options
from gemcut.engine.checks import refuse_unknown, shorten, warn_caller
from gemcut.engine.config.config_file import read_json_object
from gemcut.engine.config.generation_file import read_generation_config
from gemcut.engine.transformers_api.models.configs import PreTrainedConfig
from gemcut.engine.transformers_api.models.setting_checks import OF_OUTPUT, check, token_ids_of

FILE = "generation_config.json"

# Each setting that acts, and its value where neither the call nor a config has one.
DEFAULTS: dict[str, Any] = {
    "max_length": None,  # tokens with the prompt's columns
    "max_new_tokens": None,  # the same without; decides where both are set
    "min_length": 0,
    "min_new_tokens": None,  # decides where both are set
    "max_time": None,  # seconds, after which each row ends with its next token
    "stop_strings": None,  # generate needs a tokenizer to find them
    "do_sample": False,  # False takes the likeliest token
    "temperature": 1.0,
    "top_k": 50,  # None or 0 in a call: among all
    "top_p": 1.0,
    "min_p": None,
    "top_h": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "sequence_bias": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "remove_invalid_values": False,
    "renormalize_logits": False,
    "num_return_sequences": 1,
    "prompt_lookup_num_tokens": None,  # guess so many from the text, verify them in one step
    "use_cache": True,
    "eos_token_id": None,
    "pad_token_id": None,
    "bos_token_id": None,
    "output_scores": False,
    "output_logits": False,
    "output_attentions": False,
    "output_hidden_states": False,
    "return_dict_in_generate": False,
}
# Settings of what gemcut does not have, and the values at which they change nothing: others are
# refused when `generate` is called.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "encoder_repetition_penalty": (1.0,),
    "encoder_no_repeat_ngram_size": (0,),
    "guidance_scale": (1, 1.0),
    "token_healing": (False,),
    "penalty_alpha": (0, 0.0),
    "use_mtp": (False,),
    "is_assistant": (False,),
    # the cache is gemcut's own, whatever these ask for
    "cache_implementation": (
        *("static", "dynamic", "dynamic_full", "offloaded", "offloaded_static"),
        *("sliding_window", "hybrid", "hybrid_chunked"),
    ),
    "low_memory": (False, True),
    "disable_compile": (False, True),
}
NEUTRAL |= dict.fromkeys(
    (
        "cache_config",
        "max_cache_len",
        "compile_config",
        "continuous_batching_config",
        "dola_layers",
        "constraints",
        "force_words_ids",
        "watermarking_config",
        "decoder_start_token_id",
        "assistant_early_exit",
        "assistant_ensemble_weight",
        "speculation_type",
    ),
    (),
)
# Settings of beams: without beams they change nothing, at any value.
OF_BEAMS: dict[str, Any] = {
    "early_stopping": False,
    "length_penalty": 1.0,
    "diversity_penalty": 0.0,
}
# Settings that change the time or the memory of transformers alone, or those of a second model.
ANY_VALUE = (
    "prefill_chunk_size",
    "max_matching_ngram_size",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "assistant_confidence_threshold",
    "assistant_lookbehind",
    "target_lookbehind",
)
OF_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p")
OF_SAMPLING += ("epsilon_cutoff", "eta_cutoff")
NAMES = frozenset({*DEFAULTS, *NEUTRAL, *OF_BEAMS, *ANY_VALUE})


class GenerationConfig:
    """The settings of `generate`; None leaves one to the checkpoint's file, or else to the default.

    Every setting of transformers may be assigned; one that gemcut does not have is refused when
    `generate` is called, and a name that nobody has at once.
    """

    def __init__(self, **settings: Any) -> None:
        vars(self)["extra"] = {}  # other keys of a file
        for name, value in settings.items():
            setattr(self, name, value)

    def __getattr__(self, name: str) -> Any:
        if name in NAMES:
            return None
        raise AttributeError(f"GenerationConfig has no {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        refuse_unknown("GenerationConfig", [name], NAMES)
        vars(self)[name] = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GenerationConfig) and self.to_diff_dict() == other.to_diff_dict()

    __hash__ = None  # pyright: ignore[reportAssignmentType]  # it can change

    def __repr__(self) -> str:
        return (
            f"GenerationConfig({', '.join(f'{k}={v!r}' for k, v in self.to_diff_dict().items())})"
        )

    def settings(self) -> dict[str, Any]:
        """The settings that are not None."""
        return {k: x for k, x in vars(self).items() if k in NAMES and x is not None}

    def update(self, **settings: Any) -> dict[str, Any]:
        """Assign these settings, and return those of unknown names."""
        for name in settings.keys() & NAMES:
            setattr(self, name, settings[name])
        return {name: x for name, x in settings.items() if name not in NAMES}

    def validate(self, strict: bool = False) -> None:
        """Nothing; ValueError where a setting is out of range, a warning where it has no effect.

        With `strict` the latter is a ValueError too.  What gemcut does not have is refused when
        `generate` is called.
        """
        filled = GenerationConfig(**{**DEFAULTS, **self.settings()})
        check(filled)
        for line in without_effect(self.settings(), filled):
            if strict:
                raise ValueError(line)
            warn_caller(line)

    def get_generation_mode(self, assistant_model: None = None) -> str:
        """What `generate` does by these settings, by the name that transformers has for it."""
        if self.num_beams not in (None, 1) or assistant_model is not None:
            raise NotImplementedError("beams and assistant models are not supported")
        if self.prompt_lookup_num_tokens is not None:
            return "assisted_generation"
        return "sample" if self.do_sample else "greedy_search"

    @classmethod
    def of_model(cls, config: PreTrainedConfig, folder: str | Path | None) -> "GenerationConfig":
        """The settings of a checkpoint: generation_config.json, or else config.json's tokens.

        A file that names no EOS has that of config.json: without one no text would end.
        """
        values = {} if folder is None else read_generation_config(folder)
        result = cls.from_dict(values)
        for name in (
            ("eos_token_id",) if values else ("eos_token_id", "pad_token_id", "bos_token_id")
        ):
            if getattr(result, name) is None and getattr(config, name) is not None:
                setattr(result, name, getattr(config, name))
        return result

    @classmethod
    def from_model_config(cls, model_config: PreTrainedConfig) -> "GenerationConfig":
        """The special tokens of a model's config."""
        return cls.of_model(model_config, None)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], **settings: Any) -> "GenerationConfig":
        """The settings in a parsed generation_config.json, and `settings` in place of some.

        A warning names keys that are unknown; they are kept for `save_pretrained`.
        """
        result = cls(**{key: x for key, x in values.items() if key in NAMES and x is not None})
        result.extra.update({key: x for key, x in values.items() if key not in NAMES})
        if unknown := [key for key in result.extra if not is_metadata(key)]:
            names = ", ".join(map(shorten, unknown))
            warn_caller(f"{FILE}: nothing here reads {names}")
        for name, value in settings.items():
            setattr(result, name, value)
        return result

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name: str | Path,
        config_file_name: str | Path | None = None,
        **settings: Any,
    ) -> "GenerationConfig":
        """The settings in generation_config.json of "demo", a folder or a Hugging Face id.

        config_file_name: another name of the file.  Among `settings` may be the options of the Hub
        (`token`, `revision`, ...).  ValueError where there is no such file.
        """
        name = FILE if config_file_name is None else str(config_file_name)
        hub = take_hub_options(settings)
        folder = resolve_checkpoint(pretrained_model_name, files=[name], **hub)
        if not (folder / name).is_file():
            raise ValueError(f"{pretrained_model_name} has no {name}")
        return cls.from_dict(read_json_object(folder / name), **settings)

    @classmethod
    def like(cls, other: Any) -> "GenerationConfig":
        """The same settings as those of an object of this class, or of transformers'."""
        if isinstance(other, cls):
            return other
        if not (type(other).__name__ == "GenerationConfig" and hasattr(other, "to_dict")):
            raise ValueError(f"generation_config {shorten(other)} is no GenerationConfig")
        return cls.from_dict({key: x for key, x in other.to_dict().items() if x is not None})

    def to_dict(self) -> dict[str, Any]:
        """Every setting by its name, None where it is not set, and other keys of the file."""
        return {**dict.fromkeys(sorted(NAMES)), **self.to_diff_dict()}

    def to_diff_dict(self) -> dict[str, Any]:
        """The settings that are set, and other keys of the file."""
        return {**self.extra, **self.settings()}

    def to_json_string(self) -> str:
        """The text of generation_config.json."""
        values = {key: x for key, x in self.to_diff_dict().items() if x is not None}
        for name in ("eos_token_id", "pad_token_id", "bos_token_id"):
            if hasattr(values.get(name), "tolist"):
                values[name] = values[name].tolist()
        if isinstance(bias := values.get("sequence_bias"), Mapping):  # JSON's keys are no lists
            values["sequence_bias"] = [[list(ids), value] for ids, value in bias.items()]
        return json.dumps(values, indent=2, sort_keys=True, allow_nan=False) + "\n"

    def save_pretrained(
        self, save_directory: str | Path, config_file_name: str | Path | None = None
    ) -> None:
        """Write generation_config.json to a folder, which is made where it is missing."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        (Path(save_directory) / (config_file_name or FILE)).write_text(self.to_json_string())


def is_metadata(key: str) -> bool:
    """Whether a key of a file is no setting, but says where the file is from."""
    return key.startswith("_") or key == "transformers_version"


def without_effect(of_caller: Mapping[str, Any], config: GenerationConfig) -> Iterator[str]:
    """A line for each setting of a caller that changes nothing; those of a file are defaults."""
    said = []
    if not config.do_sample:
        said += [(name, "do_sample=True") for name in OF_SAMPLING]
    if not config.return_dict_in_generate:
        said += [(name, "return_dict_in_generate=True") for name in OF_OUTPUT]
    said += [(name, "beams") for name in OF_BEAMS]
    usual = {**DEFAULTS, **OF_BEAMS}
    for name, needed in said:
        if (value := of_caller.get(name)) is not None and value != usual[name]:
            yield f"{name}={shorten(value)} has no effect without {needed}"
    for more, less in (("max_new_tokens", "max_length"), ("min_new_tokens", "min_length")):
        value = of_caller.get(less)
        if value is not None and (decides := getattr(config, more)) is not None:
            yield f"{less}={value} has no effect beside {more}={decides}, which decides"
    if (most := config.max_new_tokens) is not None and (config.min_new_tokens or 0) > most:
        yield f"min_new_tokens={config.min_new_tokens} is above max_new_tokens={most}"
    ends = token_ids_of(of_caller.get("eos_token_id"))
    if any(isinstance(token_id, int) and token_id < 0 for token_id in ends):
        yield f"eos_token_id={shorten(of_caller['eos_token_id'])}: no token is below 0"
