"""The settings of one `generate`: what call, config object, file and defaults give, checked."""

from collections.abc import Iterable, Mapping
from typing import Any

from gemcut.engine.checks import (
    check_bool,
    check_int,
    check_number,
    refuse_unknown,
    shorten,
    warn_caller,
)
from gemcut.engine.transformers_api.models.generation_config import (
    DEFAULTS,
    NAMES,
    NEUTRAL,
    OF_BEAMS,
    GenerationConfig,
    token_ids_of,
)

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
OF_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p")
OF_SAMPLING += ("epsilon_cutoff", "eta_cutoff")
OF_OUTPUT = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
# None in a call switches a setting off: to the default, except for this one
OFF = {**DEFAULTS, "top_k": 0}
DEFAULT_NEW_TOKENS = 20  # where no length is given

LARGEST = 2**31 - 1
INTEGERS = {  # the least value of each
    "max_length": 1,
    "max_new_tokens": 1,
    "min_length": 0,
    "min_new_tokens": 0,
    "top_k": 0,
    "no_repeat_ngram_size": 0,
    "prompt_lookup_num_tokens": 1,
}
BOOLS = ("do_sample", "remove_invalid_values", "renormalize_logits", "use_cache")
BOOLS += (*OF_OUTPUT, "return_dict_in_generate")
SHARES = ("top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")  # 0 to 1


def settle(
    call: Mapping[str, Any], given: GenerationConfig | None, own: GenerationConfig
) -> GenerationConfig:
    """All settings of a call, none of them unset where there is a default.

    Those of the call come before those of `given`, which come before those of the model's own; the
    lengths are an exception: max_new_tokens decides, wherever it is from.  An error names a setting
    that is unknown, out of range, or not supported; a warning one of the caller's without effect.
    """
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
    _warn_of_no_effect({**theirs, **call}, result)
    return result


def check(config: GenerationConfig) -> None:
    """Nothing, or ValueError that names a setting out of range."""
    for name, least in INTEGERS.items():
        if (value := getattr(config, name)) is not None:
            check_int(name, value, least, LARGEST)
    for name in BOOLS:
        check_bool(name, getattr(config, name))
    for name in SHARES:
        if (value := getattr(config, name)) is not None:
            check_number(name, value, at_least=0)
            if value > 1:
                raise ValueError(f"{name} {value} must be at most 1")
    check_number("repetition_penalty", config.repetition_penalty, above=0)
    for name in ("max_time", "top_h"):
        if (value := getattr(config, name)) is not None:
            check_number(name, value, above=0)
    check_int("num_return_sequences", config.num_return_sequences, 1, 1024)
    check_number("temperature", config.temperature, at_least=0)
    if config.do_sample and not config.temperature > 0:
        raise ValueError(
            f"temperature {config.temperature} must be above 0; do_sample=False is greedy"
        )
    if config.num_return_sequences > 1 and not config.do_sample:
        raise ValueError(
            f"num_return_sequences {config.num_return_sequences} needs do_sample=True: "
            f"greedy sequences are all the same"
        )
    for ids in config.bad_words_ids or ():
        if not isinstance(ids, list | tuple) or not ids:
            raise ValueError(f"bad_words_ids: {shorten(ids)} is no list of token ids")
    if (decay := config.exponential_decay_length_penalty) is not None:
        if not isinstance(decay, list | tuple) or len(decay) != 2:
            raise ValueError(
                f"exponential_decay_length_penalty {shorten(decay)} is no pair of a start and a "
                f"factor"
            )
        check_int("exponential_decay_length_penalty: start", decay[0], 0, LARGEST)
        check_number("exponential_decay_length_penalty: factor", decay[1], above=0)
    for name in ("forced_bos_token_id", "forced_eos_token_id"):
        forced = set(token_ids_of(getattr(config, name)))
        if forced and forced <= set(token_ids_of(config.suppress_tokens)):
            raise ValueError(f"{name} {shorten(getattr(config, name))} is in suppress_tokens too")
    _check_stop_strings(config.stop_strings)


def check_token_ids(config: GenerationConfig, vocab_size: int) -> None:
    """Nothing, or ValueError where an id is past the vocabulary."""
    names = ("bos_token_id", "forced_bos_token_id", "forced_eos_token_id")
    for name in (*names, "suppress_tokens", "begin_suppress_tokens"):
        for token_id in token_ids_of(getattr(config, name)):
            check_int(name, token_id, 0, vocab_size - 1)
    for name in ("eos_token_id", "pad_token_id"):
        for token_id in token_ids_of(getattr(config, name)):
            if not (isinstance(token_id, int) and token_id < 0):  # the idiom for "none"
                check_int(name, token_id, 0, vocab_size - 1)
    for name, lists in (
        ("bad_words_ids", config.bad_words_ids or ()),
        ("sequence_bias", [ids for ids, _ in bias_pairs(config.sequence_bias)]),
    ):
        for ids in lists:
            for token_id in ids:
                check_int(f"{name}: id", token_id, 0, vocab_size - 1)


def bias_pairs(value: Any) -> list[tuple[tuple[int, ...], float]]:
    """sequence_bias, a mapping from ids or a list of [ids, bias], as pairs of these."""
    pairs = value.items() if isinstance(value, Mapping) else value or ()
    try:
        return list({tuple(ids): float(bias) for ids, bias in pairs}.items())
    except (TypeError, ValueError):
        raise ValueError(
            f"sequence_bias {shorten(value)} is no list of [ids, bias], such as [[[10, 45], -2.0]]"
        ) from None


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


def _check_stop_strings(value: Any) -> None:
    strings = [value] if isinstance(value, str) else value or ()
    if not isinstance(strings, Iterable):
        raise ValueError(f"stop_strings {shorten(value)} is neither a string nor a list of them")
    for stop in strings:
        if not isinstance(stop, str) or not stop:
            raise ValueError(
                f"stop_strings: {shorten(stop)} is not a string of at least one character"
            )


def _is_one_of(value: Any, allowed: Iterable[Any]) -> bool:
    """Whether a setting, which may be an array, is one of these values."""
    return any(type(value) in (bool, int, float, str) and value == x for x in allowed)


def _warn_of_no_effect(of_caller: Mapping[str, Any], config: GenerationConfig) -> None:
    """Warn of settings of this call that change nothing; those of a file are defaults."""
    said = []
    if not config.do_sample:
        said += [(name, "do_sample=True") for name in OF_SAMPLING]
    if not config.return_dict_in_generate:
        said += [(name, "return_dict_in_generate=True") for name in OF_OUTPUT]
    said += [(name, "beams") for name in OF_BEAMS]
    usual = {**DEFAULTS, **OF_BEAMS}
    for name, needed in said:
        if (value := of_caller.get(name)) is not None and value != usual[name]:
            warn_caller(f"{name}={shorten(value)} has no effect without {needed}")
    for more, less in (("max_new_tokens", "max_length"), ("min_new_tokens", "min_length")):
        value = of_caller.get(less)
        if value is not None and (decides := getattr(config, more)) is not None:
            warn_caller(f"{less}={value} has no effect beside {more}={decides}, which decides")
    if (most := config.max_new_tokens) is not None and (config.min_new_tokens or 0) > most:
        warn_caller(f"min_new_tokens={config.min_new_tokens} is above max_new_tokens={most}")
    if any(token_id < 0 for token_id in token_ids_of(of_caller.get("eos_token_id"))):
        warn_caller(f"eos_token_id={shorten(of_caller['eos_token_id'])}: no token is below 0")
