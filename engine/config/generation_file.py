"""generation_config.json: its contents, the ids that end a generation, and settings of sampling.

An Engine takes from it, where a call gives no settings of its own:

    do_sample            false: the likeliest token, whatever the next four say
    temperature, top_k, top_p, min_p, repetition_penalty
                         as they are; of the first four, those that are missing or null filter
                         nothing.  A file without do_sample that has one of them samples, as in vLLM
    max_new_tokens       is max_tokens
    eos_token_id         ends a text, beside the ids of config.json
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gemcut.engine.checks import check_bool, check_int, check_number, shorten, warn_caller
from gemcut.engine.config.config_file import as_token_ids, read_json_object
from gemcut.engine.config.model_config import ModelConfig

FILE = "generation_config.json"
SAMPLING = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}  # names and neutral values
_TAKEN = {*SAMPLING, "do_sample", "repetition_penalty", "max_new_tokens", "eos_token_id"}
# what concerns the outputs, caches and beams of transformers, or tokens that end nothing
_OF_TRANSFORMERS = {
    "bos_token_id",
    "pad_token_id",
    "decoder_start_token_id",
    "transformers_version",
    "cache_implementation",
    "use_cache",
    "disable_compile",
    "max_length",  # the slot's length is the engine's limit
    "output_attentions",
    "output_hidden_states",
    "output_logits",
    "output_scores",
    "return_dict_in_generate",
    "early_stopping",
    "length_penalty",
    "diversity_penalty",
}
# settings that an engine does not have, and the value at which each changes nothing
_NEUTRAL = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "min_length": 0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "renormalize_logits": False,
    "remove_invalid_values": False,
    "token_healing": False,
    "guidance_scale": 1.0,
    "penalty_alpha": 0.0,
}


def read_generation_config(path: str | Path) -> dict[str, Any]:
    """The object in generation_config.json of folder `path`, empty where there is no such file."""
    file = Path(path) / FILE
    return read_json_object(file) if file.exists() else {}


def stop_token_ids(path: str | Path, config: ModelConfig) -> tuple[int, ...]:
    """The ids that end a generation: those of config.json and of generation_config.json."""
    more = as_token_ids(read_generation_config(path).get("eos_token_id"))
    for token_id in more:
        check_int(f"{FILE}: eos_token_id", token_id, 0, config.vocab_size - 1)
    return tuple(dict.fromkeys(config.eos_token_ids + more))


def settings_folder(generation_config: str | Path, model: Path) -> Path:
    """The folder whose generation_config.json an engine reads: the model's, or another one."""
    if generation_config in ("auto", "none"):
        return model
    if not isinstance(generation_config, str | Path):
        raise ValueError(f"generation_config {shorten(generation_config)} is no string and no path")
    folder = Path(generation_config).expanduser()
    if not (folder / FILE).is_file():
        raise ValueError(
            f"generation_config {str(generation_config)!r} is neither 'auto', 'none', "
            f"nor a folder that holds a {FILE}"
        )
    return folder


def published_settings(path: str | Path) -> dict[str, Any]:
    """The settings in generation_config.json of folder `path`, as `settings_of` has them."""
    return settings_of(read_generation_config(path))


def settings_of(
    values: Mapping[str, Any], place: Callable[[str], str] = f"{FILE}: {{}}".format
) -> dict[str, Any]:
    """What a generation_config.json says, by the names of SamplingParams.

    `place` gives the file and the name there of a value, for messages.

    Where it says how to sample, temperature, top_k, top_p and min_p are all there.  ValueError
    names a value out of range, and one warning what is not acted upon.
    """
    values = {k: x for k, x in values.items() if x is not None}
    _warn_of_the_rest(values)
    do_sample = values.get("do_sample")
    if do_sample is not None:
        check_bool(place("do_sample"), do_sample)
    for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
        if name in values:
            low = {"at_least": 0} if name in ("temperature", "min_p") else {"above": 0}
            check_number(place(name), values[name], **low, below=1e30)
            if name in ("top_p", "min_p") and values[name] > 1:
                raise ValueError(f"{place(name)} {shorten(values[name])} must be at most 1")
    if "top_k" in values:
        check_int(place("top_k"), values["top_k"], 0, 2**63 - 1)
    if "max_new_tokens" in values:
        check_int(place("max_new_tokens"), values["max_new_tokens"], 1, 2**63 - 1)

    settings = {}
    if do_sample is not None or SAMPLING.keys() & values.keys():
        settings = {name: values.get(name, neutral) for name, neutral in SAMPLING.items()}
    if do_sample is False:
        settings["temperature"] = 0.0
    if "repetition_penalty" in values:
        settings["repetition_penalty"] = values["repetition_penalty"]
    if "max_new_tokens" in values:
        settings["max_tokens"] = values["max_new_tokens"]
    return settings


def _warn_of_the_rest(values: dict[str, Any]) -> None:
    rest = [
        name
        for name, value in values.items()
        if not (name[:1] == "_" or name in _TAKEN or name in _OF_TRANSFORMERS)
        and not (name in _NEUTRAL and value == _NEUTRAL[name])
    ]
    if rest:
        names = ", ".join(map(shorten, rest))
        warn_caller(f"{FILE}: an engine does not act on {names}")
