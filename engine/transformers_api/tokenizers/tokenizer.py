"""GemmaTokenizer, the class of the Hugging Face documents, on gemcut's own codec.

Code written against transformers runs with the import line changed.  Two rules differ: no message
of a chat can write a special token (apply_chat_template); ids that the vocabulary lacks are errors.
"""

import inspect
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gemcut.engine.checkpoints.hub import resolve_checkpoint, take_hub_options
from gemcut.engine.checks import check_int, check_number
from gemcut.engine.transformers_api.tokenizers.chat_coder import ChatCoder
from gemcut.engine.transformers_api.tokenizers.padding import NO_MAXIMUM, check_side
from gemcut.engine.transformers_api.tokenizers.special_tokens import NAMES
from gemcut.tokenizer import Tokenizer, chat_templates, tokenizer_files
from gemcut.tokenizer.added_tokens import AddedToken
from gemcut.tokenizer.json_vocabulary import JsonVocabulary
from gemcut.tokenizer.sentencepiece_vocabulary import SentencePieceVocabulary
from gemcut.tokenizer.tokenizer_files import TokenizerFiles

MASK = "<mask>"
# keywords of save_pretrained that are about a push to the Hub, or about weights
_OF_A_PUSH = {"repo_id", "commit_message", "commit_description", "private", "token", "revision"}
_OF_A_PUSH |= {"create_pr", "tags", "max_shard_size", "safe_serialization"}
# settings of other tokenizers, with the values at which they describe Gemma's too
_NEUTRAL = {
    "add_prefix_space": (None, False),
    "do_lower_case": (None, False),
    "from_slow": (None, False),
    "keep_accents": (None, True),
    "legacy": (None, False, True),  # about a space that SentencePiece puts before a text
    "remove_space": (None, False),
    "strip_accents": (None, False),
}


class GemmaTokenizer(ChatCoder):
    """Text to ids and back, with the arguments, attributes and results of transformers' class.

    `vocab_file` is a tokenizer.model, `tokenizer_file` a tokenizer.json (read by the tokenizers
    package), `tokenizer_object` a Tokenizer, such as an `Engine`'s.  `sp_model_kwargs` may hold
    enable_sampling, nbest_size (-1, or more than 1, which means the same for BPE) and alpha, the
    share of merges skipped at random.
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
        tokenizer_object: Tokenizer | None = None,
        *,
        unk_token: Any = "<unk>",
        bos_token: Any = "<bos>",
        eos_token: Any = "<eos>",
        pad_token: Any = "<pad>",
        mask_token: Any = MASK,
        sep_token: Any = None,
        cls_token: Any = None,
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
        model_input_names: Sequence[str] = ("input_ids", "attention_mask"),
        name_or_path: str = "",
        **own_tokens: Any,
    ):
        dropout = _dropout(sp_model_kwargs)
        if tokenizer_object is not None:
            vocabulary = tokenizer_object
        elif vocab_file is not None:
            vocabulary = Tokenizer(SentencePieceVocabulary.from_file(vocab_file, dropout=dropout))
        elif tokenizer_file is not None:
            vocabulary = Tokenizer(JsonVocabulary.from_file(tokenizer_file, dropout=dropout))
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
        for name in own_tokens.keys() & _NEUTRAL:
            if (value := own_tokens.pop(name)) not in _NEUTRAL[name]:
                raise ValueError(f"{name}={value!r}: Gemma's tokenizers do not change a text")
        for name in own_tokens:
            if not name.endswith("_token"):
                raise TypeError(f"GemmaTokenizer has no argument {name!r}")
        tokens = (bos_token, eos_token, unk_token, sep_token, pad_token, cls_token, mask_token)
        super().__init__(
            vocabulary,
            dict(zip(NAMES, tokens, strict=True)) | own_tokens,
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
        self.model_input_names = list(model_input_names)
        self.padding_side = padding_side
        self.truncation_side = truncation_side
        self.model_max_length = NO_MAXIMUM if model_max_length is None else model_max_length
        check_number("model_max_length", self.model_max_length, at_least=1)
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
    def codec(self) -> Tokenizer:
        """The gemcut.tokenizer.Tokenizer, as in `Engine`."""
        return self._vocabulary

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **overrides: Any
    ) -> "GemmaTokenizer":
        """The tokenizer of "demo", of a folder, or of a model on the Hugging Face Hub.

        tokenizer.model is preferred to tokenizer.json, unless the checkpoint adds tokens that it
        lacks.  Settings come from tokenizer_config.json unless `overrides` sets them; keys of that
        file that this class does not know are kept, and written by `save_pretrained`.
        """
        hub = take_hub_options(overrides)
        use_fast = overrides.pop("use_fast", None)
        if use_fast not in (None, True, False):  # all mean this class
            raise ValueError(f"use_fast={use_fast!r} is neither True nor False")
        source = pretrained_model_name_or_path
        name = source if isinstance(source, str) else Path(source)
        folder = resolve_checkpoint(name, files=tokenizer_files.FILES, **hub)
        files = TokenizerFiles.read(folder)
        known = {k: v for k, v in files.settings.items() if k in _SETTINGS or _is_token(k, v)}
        carried = {k: v for k, v in files.settings.items() if k not in known}
        # transformers writes these twice: here as they were, by their names as they are
        known = (carried.pop("model_specific_special_tokens", None) or {}) | known
        dropout = _dropout((known | overrides).get("sp_model_kwargs"))
        codec = Tokenizer.from_files(files, dropout=dropout)
        if isinstance(codec.vocabulary, JsonVocabulary):
            known["add_bos_token"], known["add_eos_token"] = codec.vocabulary.added_around()
        if "additional_special_tokens" in overrides:
            known.pop("extra_special_tokens", None)
        arguments = {"tokenizer_object": codec, "name_or_path": str(source)} | known | overrides
        tokenizer = cls(**arguments)
        tokenizer._carried = carried
        return tokenizer

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        legacy_format: bool | None = None,
        filename_prefix: str | None = None,
        push_to_hub: bool = False,
        save_jinja_files: bool = True,
        **of_a_push: Any,
    ) -> tuple[str, ...]:
        """The paths of the files written, from which `from_pretrained` makes this tokenizer.

        Chat templates go into files of their own; without `save_jinja_files`, into
        tokenizer_config.json.  What else transformers takes here is about a push to the Hub.
        """
        if push_to_hub:
            raise NotImplementedError("push_to_hub=True is not supported")
        if unknown := sorted(set(of_a_push) - _OF_A_PUSH):
            raise TypeError(f"save_pretrained has no arguments {unknown}")
        held = self._vocabulary.vocabulary.file_name
        wanted = {True: tokenizer_files.MODEL_FILE, False: tokenizer_files.JSON_FILE}
        if legacy_format is not None and wanted[legacy_format] != held:
            raise NotImplementedError(
                f"legacy_format={legacy_format!r} is not supported: {held} is what this tokenizer "
                "holds"
            )
        folder = Path(save_directory)
        if folder.is_file():
            raise ValueError(f"save_directory {str(folder)!r} is a file")
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        settings = self._carried | {name: getattr(self, name) for name in _SAVED}
        settings |= self.named | {"tokenizer_class": "GemmaTokenizer"}
        if held == tokenizer_files.MODEL_FILE:  # a tokenizer.json has them itself
            settings["added_tokens_decoder"] = {
                str(i): _options(token) for i, token in self.added_tokens_decoder.items()
            }
        templates = chat_templates.files(self.chat_template, prefix) if save_jinja_files else {}
        if self.chat_template is not None and not save_jinja_files:
            settings["chat_template"] = chat_templates.as_setting(self.chat_template)

        config = folder / f"{prefix}{tokenizer_files.CONFIG_FILE}"
        tokens = folder / f"{prefix}{tokenizer_files.MAP_FILE}"
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer_files.write_json(config, settings)
        tokenizer_files.write_json(tokens, self.special_tokens_map)
        paths = [config, tokens, *(folder / name for name in templates)]
        for path, template in zip(paths[2:], templates.values(), strict=True):
            path.parent.mkdir(exist_ok=True)
            path.write_text(template, encoding="utf-8")
        return (*map(str, paths), *self.save_vocabulary(folder, filename_prefix))

    def save_vocabulary(
        self, save_directory: str | os.PathLike[str], filename_prefix: str | None = None
    ) -> tuple[str]:
        """The path of the tokenizer.model or tokenizer.json written into an existing folder."""
        folder = Path(save_directory)
        if not folder.is_dir():
            raise ValueError(f"save_directory {str(folder)!r} is no folder")
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        path = folder / f"{prefix}{self._vocabulary.vocabulary.file_name}"
        before, after = map(self.convert_ids_to_tokens, (self._prefix, self._suffix))
        self._vocabulary.save_vocabulary(path, before, after)
        return (str(path),)


GemmaTokenizerFast = GemmaTokenizer
_SETTINGS = {
    name
    for name in inspect.signature(GemmaTokenizer.__init__).parameters
    if name
    not in (
        "self",
        "vocab_file",
        "tokenizer_file",
        "tokenizer_object",
        "name_or_path",
        "own_tokens",
    )
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


def _is_token(name: str, value: Any) -> bool:
    """Whether a setting names one of the checkpoint's own tokens, such as image_token."""
    return name.endswith("_token") and isinstance(value, str)


def _options(token: AddedToken) -> dict[str, Any]:
    return {name: value for name, value in asdict(token).items() if name != "id"}
