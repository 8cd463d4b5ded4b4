"""The files of a tokenizer in a checkpoint's folder, as transformers writes and reads them."""

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from reprlib import repr as shorten  # a hostile value must not fill the message
from typing import Any

from gemcut.tokenizer.added_tokens import OPTIONS, AddedToken, is_in_brackets
from gemcut.tokenizer.chat_templates import TEMPLATE_FILE, TEMPLATE_FOLDER

MODEL_FILE, JSON_FILE = "tokenizer.model", "tokenizer.json"
CONFIG_FILE, MAP_FILE = "tokenizer_config.json", "special_tokens_map.json"
ADDED_FILE = "added_tokens.json"
FILES = (
    MODEL_FILE,
    JSON_FILE,
    CONFIG_FILE,
    MAP_FILE,
    ADDED_FILE,
    TEMPLATE_FILE,
    f"{TEMPLATE_FOLDER}/*.jinja",
    "chat_template.json",
)
NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "mask_token")
# keys of tokenizer_config.json that are written anew, or that the vocabulary itself holds
_NOT_CARRIED = {"tokenizer_class", "added_tokens_decoder", "name_or_path", "tokenizer_file"}
_NOT_CARRIED |= {"vocab_file", "special_tokens_map_file", "init_inputs", "auto_map"}
_OTHER_MODALITY = re.compile(r"image|audio|video|\b[be]o[iav]_token")


@dataclass(frozen=True)
class TokenizerFiles:
    """What a folder says of its tokenizer, beside the vocabulary."""

    folder: Path
    settings: dict[str, Any]  # of tokenizer_config.json and special_tokens_map.json; tokens as text
    added: dict[int, AddedToken]
    bare: frozenset[str]  # those of which added_tokens.json gives the id alone

    @classmethod
    def read(cls, folder: Path) -> "TokenizerFiles":
        """Read the small files; ValueError where one is no JSON, or they clash."""
        settings = read_settings(folder)
        entries = list(_added_entries(folder))
        config = {token.content for path, _, token in entries if path.name == CONFIG_FILE}
        bare = frozenset(token.content for _, _, token in entries) - config
        return cls(folder, settings, _read_added(entries), bare)

    @property
    def named(self) -> dict[str, str]:
        """The pieces of bos_token and the like."""
        return {name: self.settings[name] for name in NAMES if self.settings.get(name) is not None}

    @property
    def around(self) -> dict[str, bool]:
        """Whether BOS and EOS are put around a text, by add_bos and add_eos, where it is said."""
        said: dict[str, bool] = {}
        for name in ("add_bos", "add_eos"):
            value = self.settings.get(f"{name}_token")
            if not isinstance(value, bool | None):
                place = self.folder / CONFIG_FILE
                raise ValueError(f"{place}: {name}_token is {shorten(value)}, not true or false")
            if value is not None:
                said[name] = value
        return said

    def tokens(self, known: Iterable[AddedToken]) -> Iterator[AddedToken]:
        """The tokens to add to a vocabulary, then those that the settings name: special ones.

        known: the vocabulary's own, whose options count where these files give none.
        """
        described = {token.content: token for token in known}
        for token_id, token in sorted(self.added.items()):
            if token.content not in self.bare or token.content not in described:
                described[token.content] = token
            yield replace(described[token.content], id=token_id)
        extra = self.settings.get("extra_special_tokens") or []
        extra = extra.values() if isinstance(extra, Mapping) else extra
        mask = ["<mask>"] if "<mask>" in described and "mask_token" not in self.settings else []
        for content in dict.fromkeys([*self.named.values(), *extra, *mask]):
            token = described.get(content, AddedToken(content, normalized=False))
            yield replace(token, special=True)

    def placeholders(self, literals: Collection[str]) -> set[str]:
        """Tokens that stand for images, sounds or videos, by their name in the settings or literal.

        A language model computes none of them, and its embedding may have no row for them.
        """
        extra = self.settings.get("extra_special_tokens")
        names = {**self.settings, **(extra if isinstance(extra, Mapping) else {})}
        named = {v for k, v in names.items() if isinstance(v, str) and _OTHER_MODALITY.search(k)}
        return {
            literal
            for literal in literals
            if literal in named or (is_in_brackets(literal) and _OTHER_MODALITY.search(literal))
        }


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings in tokenizer_config.json, special_tokens_map.json and the template files."""
    settings = _read_json(folder / MAP_FILE) | _read_json(folder / CONFIG_FILE)
    settings = {key: _token(value) for key, value in settings.items() if key not in _NOT_CARRIED}
    named = settings.pop("additional_special_tokens", None)
    if named and not settings.get("extra_special_tokens"):
        settings["extra_special_tokens"] = named
    place = f"{folder / CONFIG_FILE}: "
    for name in NAMES:
        if settings.get(name) is not None:
            settings[name] = token_content(f"{place}{name}", settings[name])
    extra = settings.get("extra_special_tokens") or []
    if not isinstance(extra, list | dict):
        raise ValueError(
            f"{place}extra_special_tokens {shorten(extra)} is neither a list nor an object"
        )
    named = extra.items() if isinstance(extra, dict) else enumerate(extra)
    contents = {key: token_content(f"{place}extra_special_tokens", one) for key, one in named}
    if extra:
        settings["extra_special_tokens"] = (
            contents if isinstance(extra, dict) else [*contents.values()]
        )
    template = _read_json(folder / "chat_template.json").get("chat_template")
    others = sorted((folder / TEMPLATE_FOLDER).glob("*.jinja"))
    templates = {path.stem: _read_text(path) for path in others}
    if (folder / TEMPLATE_FILE).is_file():
        template = _read_text(folder / TEMPLATE_FILE)
        templates["default"] = template
    if others:
        template = templates
    if template is not None:
        settings["chat_template"] = template
    return settings


def _read_added(entries: Iterable[tuple[Path, Any, AddedToken]]) -> dict[int, AddedToken]:
    """The tokens of these entries by their ids, which are checked."""
    added: dict[int, AddedToken] = {}
    ids: dict[str, int] = {}
    for path, token_id, token in entries:
        place = f"{path}: {shorten(token.content)}"
        if not isinstance(token_id, int) or isinstance(token_id, bool) or token_id < 0:
            raise ValueError(f"{place} has the id {shorten(token_id)}, which is no id")
        if not token.content:
            raise ValueError(f"{path}: the added token of id {token_id} is empty")
        if ids.setdefault(token.content, token_id) != token_id:
            raise ValueError(f"{place} has the id {token_id}, and elsewhere {ids[token.content]}")
        if token_id in added and added[token_id].content != token.content:
            other = added[token_id].content
            raise ValueError(f"{place} has the id {token_id}, and so has {shorten(other)}")
        added[token_id] = replace(token, id=token_id)
    return added


def _added_entries(folder: Path) -> Iterator[tuple[Path, Any, AddedToken]]:
    """File, id and token of each that added_tokens.json and tokenizer_config.json place."""
    for content, token_id in _read_json(folder / ADDED_FILE).items():
        yield folder / ADDED_FILE, token_id, AddedToken(content)
    path = folder / CONFIG_FILE
    decoder = _read_json(path).get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise ValueError(f"{path}: added_tokens_decoder is a {type(decoder).__name__}")
    for key, value in decoder.items():
        flags = (
            {k: bool(value[k]) for k in OPTIONS if k in value} if isinstance(value, dict) else {}
        )
        content = token_content(f"{path}: added token {key}", value)
        yield path, int(key) if key.isdecimal() else key, AddedToken(content, **flags)


def token_content(name: str, token: Any) -> str:
    """The piece of a special token: a string, an AddedToken, or its JSON object."""
    if isinstance(token, Mapping):
        token = token.get("content")
    content = token if isinstance(token, str) else getattr(token, "content", None)
    if not isinstance(content, str) or not content:
        raise ValueError(f"{name} {shorten(token)} is neither a string nor an AddedToken")
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
        content = json.loads(_read_text(path), object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not an object")
    return content


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise ValueError(f"{twice!r} is there twice")
    return values
