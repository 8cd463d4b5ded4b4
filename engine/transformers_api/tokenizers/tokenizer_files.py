"""The files of a tokenizer in a checkpoint's folder, as transformers writes and reads them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MODEL_FILE, JSON_FILE = "tokenizer.model", "tokenizer.json"
CONFIG_FILE, MAP_FILE = "tokenizer_config.json", "special_tokens_map.json"
TEMPLATE_FILE = "chat_template.jinja"
FILES = (
    MODEL_FILE,
    JSON_FILE,
    CONFIG_FILE,
    MAP_FILE,
    "added_tokens.json",
    TEMPLATE_FILE,
    "chat_template.json",
)
# keys of tokenizer_config.json that are written anew, or that the vocabulary itself holds
_NOT_CARRIED = {"tokenizer_class", "added_tokens_decoder", "name_or_path", "tokenizer_file"}
_NOT_CARRIED |= {"vocab_file", "special_tokens_map_file", "init_inputs", "auto_map"}


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings in tokenizer_config.json, special_tokens_map.json and the template files."""
    settings = _read_json(folder / MAP_FILE) | _read_json(folder / CONFIG_FILE)
    settings = {key: _token(value) for key, value in settings.items() if key not in _NOT_CARRIED}
    named = settings.pop("additional_special_tokens", None)
    if named and not settings.get("extra_special_tokens"):
        settings["extra_special_tokens"] = named
    template = _read_json(folder / "chat_template.json").get("chat_template")
    if (folder / TEMPLATE_FILE).is_file():
        template = (folder / TEMPLATE_FILE).read_text(encoding="utf-8")
    if template is not None:
        settings["chat_template"] = template
    return settings


def read_added_tokens(folder: Path) -> dict[int, str]:
    """The pieces that added_tokens.json and tokenizer_config.json place at ids."""
    added = {i: piece for piece, i in _read_json(folder / "added_tokens.json").items()}
    decoder = _read_json(folder / CONFIG_FILE).get("added_tokens_decoder") or {}
    return added | {int(i): token_content("added token", token) for i, token in decoder.items()}


def token_content(name: str, token: Any) -> str:
    """The piece of a special token: a string, an AddedToken, or its JSON object."""
    if isinstance(token, Mapping):
        token = token.get("content")
    content = token if isinstance(token, str) else getattr(token, "content", None)
    if not isinstance(content, str) or not content:
        raise ValueError(f"{name} {token!r} is neither a string nor an AddedToken")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a mapping as transformers formats it: sorted, two spaces, no escapes."""
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False)
    path.write_text(f"{text}\n", encoding="utf-8")


def _token(value: Any) -> Any:
    """A value of the config, with special tokens in it as strings."""
    if isinstance(value, dict) and "content" in value:
        return token_content("special token", value)
    return [_token(item) for item in value] if isinstance(value, list) else value


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not an object")
    return content
