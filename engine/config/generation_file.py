"""generation_config.json: its contents, and the token ids that end a generation."""

from pathlib import Path
from typing import Any

from gemcut.engine.checks import check_int
from gemcut.engine.config.config_file import as_token_ids, read_json_object
from gemcut.engine.config.model_config import ModelConfig


def read_generation_config(path: str | Path) -> dict[str, Any]:
    """The object in generation_config.json of folder `path`, empty where there is no such file."""
    file = Path(path) / "generation_config.json"
    return read_json_object(file) if file.exists() else {}


def stop_token_ids(path: str | Path, config: ModelConfig) -> tuple[int, ...]:
    """The ids that end a generation: those of config.json and of generation_config.json."""
    more = as_token_ids(read_generation_config(path).get("eos_token_id"))
    for token_id in more:
        check_int("generation_config.json: eos_token_id", token_id, 0, config.vocab_size - 1)
    return tuple(dict.fromkeys(config.eos_token_ids + more))
