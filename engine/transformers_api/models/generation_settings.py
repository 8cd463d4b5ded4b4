"""The settings of one `generate`: what call, config object, file and defaults give, checked."""

from collections.abc import Iterable, Mapping
from typing import Any

from gemcut.engine.checks import refuse_unknown, shorten, warn_caller
from gemcut.engine.transformers_api.models.generation_config import (
    DEFAULTS,
    NAMES,
    NEUTRAL,
    GenerationConfig,
    is_metadata,
    without_effect,
)
from gemcut.engine.transformers_api.models.setting_checks import check, token_ids_of

# Keywords of transformers' `generate` that are no settings, and what may be given.
CALL_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "synced_gpus": (False,),
    "trust_remote_code": (True, False),
    "assistant_model": (),
    "assistant_tokenizer": (),
    "negative_prompt_ids": (),
    "negative_prompt_attention_mask": (),
    "custom_generate": (),
}
# None in a call switches a setting off: to the default, except for this one
OFF = {**DEFAULTS, "top_k": 0}
DEFAULT_NEW_TOKENS = 20  # where no length is given


def settle(
    call: Mapping[str, Any], given: GenerationConfig | None, own: GenerationConfig
) -> GenerationConfig:
    """All settings of a call, none of them unset where there is a default.

    Those of the call come before those of `given`, which come before those of the model's own; the
    lengths are an exception: max_new_tokens decides, wherever it is from.  An error names a setting
    that is unknown, out of range, or not supported; a warning one of the caller's without effect.
    """
    call = {name: x for name, x in call.items() if not is_metadata(name)}  # of a to_dict()
    refuse_unknown("generate", call, {*NAMES, *CALL_NEUTRAL})
    theirs = {} if given is None else given.settings()
    values = {**DEFAULTS, **own.settings(), **theirs, **call}
    for name, allowed in {**NEUTRAL, **CALL_NEUTRAL}.items():
        value = values.pop(name, None)
        if value is not None and not _is_one_of(value, allowed):
            raise NotImplementedError(f"{name}={shorten(value)} is not supported; leave it out")
    result = GenerationConfig()
    for name in DEFAULTS:
        value = values[name]
        setattr(result, name, OFF[name] if value is None else value)
    check(result)
    for name in ("eos_token_id", "suppress_tokens", "begin_suppress_tokens"):
        setattr(result, name, token_ids_of(getattr(result, name)))
    for line in without_effect({**theirs, **call}, result):
        warn_caller(line)
    return result


def new_tokens(config: GenerationConfig, columns: int, most: int) -> int:
    """How many tokens may follow a prompt of `columns` columns; `most`: the model's positions."""
    if config.max_new_tokens is not None:
        return config.max_new_tokens
    if config.max_length is None:
        count = max(1, min(DEFAULT_NEW_TOKENS, most - columns))
        warn_caller(f"no length is set: at most {count} new tokens; give max_new_tokens")
        return count
    if config.max_length <= columns:
        raise ValueError(
            f"max_length {config.max_length} leaves no room behind a prompt of {columns} tokens; "
            f"raise it, or give max_new_tokens"
        )
    return config.max_length - columns


def fewest_tokens(config: GenerationConfig, columns: int) -> int:
    """How many tokens must follow a prompt of `columns` columns before a row may end."""
    if config.min_new_tokens is not None:
        return config.min_new_tokens
    return max(0, config.min_length - columns)


def _is_one_of(value: Any, allowed: Iterable[Any]) -> bool:
    """Whether a setting, which may be an array, is one of these values."""
    return any(type(value) in (bool, int, float, str) and value == x for x in allowed)
