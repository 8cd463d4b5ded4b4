"""GemmaTokenizer, the class of the Hugging Face documents, on gemcut's own codec.

Code written against transformers runs with the import line changed.  Three rules differ: no
message of a chat can write a special token (apply_chat_template); a special token must be a piece
of the vocabulary (special_tokens); ids that the vocabulary lacks are errors.
"""

import inspect
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gemcut.engine.checkpoints.hub import resolve_checkpoint
from gemcut.engine.checks import check_int, check_number
from gemcut.engine.transformers_api.tokenizers import tokenizer_files
from gemcut.engine.transformers_api.tokenizers.chat_coder import ChatCoder
from gemcut.engine.transformers_api.tokenizers.padding import NO_MAXIMUM, check_side
from gemcut.engine.transformers_api.tokenizers.special_tokens import NAMES
from gemcut.engine.transformers_api.tokenizers.vocabularies import (
    JsonVocabulary,
    SentencePieceVocabulary,
)
from gemcut.tokenizer import Tokenizer, chat_templates

MASK = "<mask>"
# the arguments of from_pretrained that choose another file or another process, and their defaults
_HUB_DEFAULTS = {
    "cache_dir": (None,),
    "force_download": (False,),
    "local_files_only": (False,),
    "token": (None,),
    "revision": (None, "main"),
    "subfolder": (None, ""),
    "proxies": (None,),
    "trust_remote_code": (None, False),
    "use_fast": (None, True, False),  # both are this class
}


class GemmaTokenizer(ChatCoder):
    """Text to ids and back, with the arguments, attributes and results of transformers' class.

    `vocab_file` is a tokenizer.model, `tokenizer_file` a tokenizer.json (read by the tokenizers
    package); the first is preferred.  `sp_model_kwargs` may hold enable_sampling, nbest_size (-1,
    or more than 1, which means the same for BPE) and alpha, the share of merges skipped at random.
    `mask_token`'s default is None where the vocabulary has no "<mask>".  With
    `spaces_between_special_tokens` decoded special tokens are set apart by spaces, and with
    `clean_up_tokenization_spaces` decoded text loses the spaces before its punctuation (in
    transformers 5 this must be asked for twice).
    """

    is_fast = True  # offsets can be had

    def __init__(
        self,
        vocab_file: str | os.PathLike[str] | None = None,
        tokenizer_file: str | os.PathLike[str] | None = None,
        *,
        unk_token: Any = "<unk>",
        bos_token: Any = "<bos>",
        eos_token: Any = "<eos>",
        pad_token: Any = "<pad>",
        mask_token: Any = MASK,
        add_bos_token: bool = True,
        add_eos_token: bool = False,
        clean_up_tokenization_spaces: bool = False,
        use_default_system_prompt: bool = False,
        spaces_between_special_tokens: bool = False,
        sp_model_kwargs: Mapping[str, Any] | None = None,
        padding_side: str = "left",
        truncation_side: str = "right",
        model_max_length: int | None = None,
        chat_template: str | Mapping[str, str] | Sequence[Mapping[str, str]] | None = None,
        additional_special_tokens: Sequence[Any] | None = None,
        extra_special_tokens: Sequence[Any] | Mapping[str, Any] | None = None,
        split_special_tokens: bool = False,
        name_or_path: str = "",
    ):
        dropout = _dropout(sp_model_kwargs)
        if vocab_file is not None:
            vocabulary = SentencePieceVocabulary(vocab_file, dropout)
        elif tokenizer_file is not None:
            vocabulary = JsonVocabulary(tokenizer_file, dropout)
        else:
            raise ValueError("GemmaTokenizer needs a vocab_file or a tokenizer_file")
        if use_default_system_prompt:
            raise ValueError("use_default_system_prompt=True: Gemma has no default system prompt")
        if additional_special_tokens is not None and extra_special_tokens is not None:
            raise ValueError(
                "additional_special_tokens is the former name of extra_special_tokens: give one"
            )
        check_side("padding_side", padding_side)
        check_side("truncation_side", truncation_side)
        if mask_token == MASK and vocabulary.id_of(MASK) is None:
            mask_token = None
        tokens = (bos_token, eos_token, unk_token, pad_token, mask_token)
        super().__init__(
            vocabulary,
            dict(zip(NAMES, tokens, strict=True)),
            additional_special_tokens if extra_special_tokens is None else extra_special_tokens,
            add_bos_token=add_bos_token,
            add_eos_token=add_eos_token,
        )
        self._is_random = dropout > 0
        self.sp_model_kwargs = dict(sp_model_kwargs or {})
        self.clean_up_tokenization_spaces = clean_up_tokenization_spaces
        self.use_default_system_prompt = use_default_system_prompt
        self.spaces_between_special_tokens = spaces_between_special_tokens
        self.split_special_tokens = split_special_tokens
        self.padding_side = padding_side
        self.truncation_side = truncation_side
        self.model_max_length = NO_MAXIMUM if model_max_length is None else model_max_length
        check_int("model_max_length", int(self.model_max_length), 1, 10 * NO_MAXIMUM)
        self.chat_template = chat_templates.by_name(chat_template)
        self.name_or_path = name_or_path
        self._carried: dict[str, Any] = {}

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(name_or_path={self.name_or_path!r}, "
            f"vocab_size={self.vocab_size}, padding_side={self.padding_side!r}, "
            f"special_tokens={self.special_tokens_map})"
        )

    @property
    def codec(self) -> Tokenizer | None:
        """The gemcut.tokenizer.Tokenizer, as in `Engine`; None for a tokenizer.json."""
        return getattr(self._vocabulary, "codec", None)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **overrides: Any
    ) -> "GemmaTokenizer":
        """The tokenizer of "demo", of a folder, or of a model on the Hugging Face Hub.

        tokenizer.model is preferred to tokenizer.json, unless the checkpoint adds tokens that it
        lacks.  Settings come from tokenizer_config.json unless `overrides` sets them; keys of that
        file that this class does not know are kept, and written by `save_pretrained`.
        """
        for name, defaults in _HUB_DEFAULTS.items():
            value = overrides.pop(name, defaults[0])
            if value not in defaults:
                raise NotImplementedError(f"{name}={value!r} is not supported")
        source = pretrained_model_name_or_path
        name = source if isinstance(source, str) else Path(source)
        folder = resolve_checkpoint(name, files=tokenizer_files.FILES)
        settings = tokenizer_files.read_settings(folder)
        known = {k: v for k, v in settings.items() if k in _SETTINGS}
        model, other = (
            folder / name for name in (tokenizer_files.MODEL_FILE, tokenizer_files.JSON_FILE)
        )
        files = [file for file in (model, other) if file.is_file()]
        if not files:
            raise ValueError(f"{folder} holds neither tokenizer.model nor tokenizer.json")
        if model in files and other in files and not _holds(model, folder):
            files.remove(model)
        if files[0] == other:
            known["add_bos_token"], known["add_eos_token"] = JsonVocabulary(other).added_around()
        if "additional_special_tokens" in overrides:
            known.pop("extra_special_tokens", None)
        file_name = "vocab_file" if files[0] == model else "tokenizer_file"
        arguments = {file_name: files[0], "name_or_path": str(source)} | known | overrides
        tokenizer = cls(**arguments)
        missing = _missing(tokenizer.get_vocab(), folder)
        if missing:
            raise NotImplementedError(
                f"{folder} adds the tokens {missing}, which {files[0].name} does not hold"
            )
        tokenizer._carried = {k: v for k, v in settings.items() if k not in _SETTINGS}
        return tokenizer

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        legacy_format: bool | None = None,
        filename_prefix: str | None = None,
        push_to_hub: bool = False,
    ) -> tuple[str, ...]:
        """The paths of the files written, from which `from_pretrained` makes this tokenizer."""
        if push_to_hub:
            raise NotImplementedError("push_to_hub=True is not supported")
        if legacy_format is not None:
            raise NotImplementedError(
                f"legacy_format={legacy_format!r} is not supported: "
                f"{self._vocabulary.file_name} is what this tokenizer holds"
            )
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        settings = self._carried | {name: getattr(self, name) for name in _SAVED}
        settings |= self.named | {"tokenizer_class": "GemmaTokenizer"}
        config, tokens = folder / f"{prefix}tokenizer_config.json", self.special_tokens_map
        paths = [config, folder / f"{prefix}special_tokens_map.json"]
        if isinstance(self.chat_template, str):
            paths.append(folder / f"{prefix}{tokenizer_files.TEMPLATE_FILE}")
            paths[-1].write_text(self.chat_template, encoding="utf-8")
        elif self.chat_template is not None:
            named = self.chat_template.items()
            settings["chat_template"] = [{"name": k, "template": v} for k, v in named]
        tokenizer_files.write_json(config, settings)
        tokenizer_files.write_json(paths[1], tokens)
        return (*map(str, paths), *self.save_vocabulary(folder, filename_prefix))

    def save_vocabulary(
        self, save_directory: str | os.PathLike[str], filename_prefix: str | None = None
    ) -> tuple[str]:
        """The path of the tokenizer.model or tokenizer.json written into an existing folder."""
        folder = Path(save_directory)
        if not folder.is_dir():
            raise ValueError(f"save_directory {str(folder)!r} is no folder")
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        path = folder / f"{prefix}{self._vocabulary.file_name}"
        before, after = map(self.convert_ids_to_tokens, (self._prefix, self._suffix))
        self._vocabulary.save(path, before, after)
        return (str(path),)


GemmaTokenizerFast = GemmaTokenizer
_SETTINGS = {
    name
    for name in inspect.signature(GemmaTokenizer.__init__).parameters
    if name not in ("self", "vocab_file", "tokenizer_file", "name_or_path")
}
_SAVED = sorted(_SETTINGS - {*NAMES, "chat_template", "additional_special_tokens"})


def _dropout(options: Mapping[str, Any] | None) -> float:
    """The share of merges to skip, from SentencePiece's arguments."""
    options = dict(options or {})
    if unknown := sorted(set(options) - {"enable_sampling", "nbest_size", "alpha"}):
        raise ValueError(
            f"sp_model_kwargs {unknown} are not supported; enable_sampling, nbest_size, alpha are"
        )
    nbest_size, alpha = options.get("nbest_size", -1), options.get("alpha", 0.1)
    check_int("sp_model_kwargs nbest_size", nbest_size, -1, 2**31 - 1)
    check_number("sp_model_kwargs alpha", alpha, at_least=0)
    if alpha > 1:
        raise ValueError(f"sp_model_kwargs alpha {alpha} is above 1: it is a share of the merges")
    if not options.get("enable_sampling", False):
        return 0.0
    if nbest_size in (0, 1):
        raise ValueError(
            f"sp_model_kwargs nbest_size {nbest_size} samples nothing; -1 takes all segmentations"
        )
    return float(alpha)


def _missing(vocab: Mapping[str, int], folder: Path) -> list[str]:
    added = tokenizer_files.read_added_tokens(folder)
    return [piece for i, piece in sorted(added.items()) if vocab.get(piece) != i]


def _holds(model: Path, folder: Path) -> bool:
    """Whether tokenizer.model has all tokens that the checkpoint's other files add."""
    pieces = SentencePieceVocabulary(model).pieces
    return not _missing({piece: i for i, piece in enumerate(pieces)}, folder)
