"""Checks of the settings of `generate`: each error names the setting, its value and the limit."""

from collections.abc import Iterable, Mapping
from typing import Any

from gemcut.engine.checks import check_bool, check_int, check_number, shorten
from gemcut.engine.config.config_file import as_token_ids

OF_OUTPUT = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
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


def check(config: Any) -> None:
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
    if not isinstance(words := config.bad_words_ids or (), list | tuple):
        raise ValueError(f"bad_words_ids {shorten(words)} is no list of lists of token ids")
    for ids in words:
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


def check_token_ids(config: Any, vocab_size: int) -> None:
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


def token_ids_of(value: Any) -> tuple[int, ...]:
    """The ids in an id, a list, an array of them, or None."""
    return as_token_ids(value.tolist() if hasattr(value, "tolist") else value)


def _check_stop_strings(value: Any) -> None:
    strings = [value] if isinstance(value, str) else value or ()
    if not isinstance(strings, Iterable):
        raise ValueError(f"stop_strings {shorten(value)} is neither a string nor a list of them")
    for stop in strings:
        if not isinstance(stop, str) or not stop:
            raise ValueError(
                f"stop_strings: {shorten(stop)} is not a string of at least one character"
            )
