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
from gemcut.engine.transformers_api.tokenizers.padding import NO_MAXIMUM, check_side
from gemcut.engine.transformers_api.tokenizers.special_tokens import NAMES
from gemcut.engine.transformers_api.tokenizers.text_coder import TextCoder
from gemcut.tokenizer import Tokenizer, chat_templates, render_chat, tokenizer_files
from gemcut.tokenizer.json_vocabulary import JsonVocabulary
from gemcut.tokenizer.sentencepiece_vocabulary import SentencePieceVocabulary
from gemcut.tokenizer.tokenizer_files import TokenizerFiles
from gemcut.tokenizer.vocabularies import Segment

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


class GemmaTokenizer(TextCoder):
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
        tokens = (bos_token, eos_token, unk_token, pad_token, mask_token)
        super().__init__(
            vocabulary,
            dict(zip(NAMES, tokens, strict=True)),
            additional_special_tokens if extra_special_tokens is None else extra_special_tokens,
            add_bos_token=add_bos_token,
            add_eos_token=add_eos_token,
        )
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
        for name, defaults in _HUB_DEFAULTS.items():
            value = overrides.pop(name, defaults[0])
            if value not in defaults:
                raise NotImplementedError(f"{name}={value!r} is not supported")
        source = pretrained_model_name_or_path
        name = source if isinstance(source, str) else Path(source)
        folder = resolve_checkpoint(name, files=tokenizer_files.FILES)
        files = TokenizerFiles.read(folder)
        known = {k: v for k, v in files.settings.items() if k in _SETTINGS}
        dropout = _dropout((known | overrides).get("sp_model_kwargs"))
        codec = Tokenizer.from_files(files, dropout=dropout)
        if isinstance(codec.vocabulary, JsonVocabulary):
            known["add_bos_token"], known["add_eos_token"] = codec.vocabulary.added_around()
        if "additional_special_tokens" in overrides:
            known.pop("extra_special_tokens", None)
        arguments = {"tokenizer_object": codec, "name_or_path": str(source)} | known | overrides
        tokenizer = cls(**arguments)
        tokenizer._carried = {k: v for k, v in files.settings.items() if k not in _SETTINGS}
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
                f"{self._vocabulary.vocabulary.file_name} is what this tokenizer holds"
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
        path = folder / f"{prefix}{self._vocabulary.vocabulary.file_name}"
        before, after = map(self.convert_ids_to_tokens, (self._prefix, self._suffix))
        self._vocabulary.save_vocabulary(path, before, after)
        return (str(path),)

    def get_chat_template(
        self, chat_template: str | None = None, tools: Sequence[Any] | None = None
    ) -> str | None:
        """The jinja template that renders a chat, or None for Gemma's own turns."""
        named = self.chat_template if isinstance(self.chat_template, dict) else {}
        if chat_template is not None:
            return named.get(chat_template, chat_template)
        if not isinstance(self.chat_template, dict):
            return self.chat_template
        name = "tool_use" if tools is not None and "tool_use" in named else "default"
        if name not in named:
            raise ValueError(f"no chat template is the default; give chat_template={sorted(named)}")
        return named[name]

    def apply_chat_template(
        self,
        conversation: Sequence[Any],
        tools: Sequence[Any] | None = None,
        documents: Sequence[Any] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        tokenize: bool = True,
        sanitize_control_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool | str = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        return_dict: bool = True,
        return_assistant_tokens_mask: bool = False,
        tokenizer_kwargs: Mapping[str, Any] | None = None,
        **variables: Any,
    ) -> Any:
        """The encoding of a conversation, or of a list of them, with no BOS except the chat's own.

        Without a template the turns are Gemma's own (gemcut.tokenizer.render_chat, which takes
        `merge_system`), in which contents are encoded apart from markers.  A jinja template yields
        one string, so literals of special tokens are marked in the messages first and stay text
        (chat_templates).  Either way a user who types "<start_of_turn>" opens no turn;
        transformers needs `sanitize_control_tokens` for that.  Two things are not guarded: a
        literal that a template builds from pieces, and the string that `tokenize=False` yields,
        which must not be encoded again.  `variables` are the template's; one that it never reads
        is refused.
        """
        if not sanitize_control_tokens:
            raise ValueError("sanitize_control_tokens=False: messages never write special tokens")
        if return_assistant_tokens_mask:
            raise NotImplementedError("return_assistant_tokens_mask=True is not supported")
        if add_generation_prompt and continue_final_message:
            raise ValueError("continue_final_message and add_generation_prompt exclude each other")
        template = self.get_chat_template(chat_template, tools)
        if isinstance(conversation, str | Mapping) or not isinstance(conversation, Sequence):
            kind = type(conversation).__name__
            raise ValueError(f"conversation must be a list of messages, got {kind}")
        if not conversation:
            raise ValueError("conversation is empty; a chat has at least one message")
        is_batch = isinstance(conversation[0], list | tuple)
        chats = conversation if is_batch else [conversation]
        variables |= {"tools": tools, "documents": documents}
        if template is None:
            rows = [
                self._own_turns(chat, add_generation_prompt, continue_final_message, variables)
                for chat in chats
            ]
            texts = [self.decode(ids) for ids in rows] if not tokenize else []
        else:
            variables = self.special_tokens_map | variables
            variables["add_generation_prompt"] = add_generation_prompt
            parts = [
                self._templated(template, chat, continue_final_message, tokenize, variables)
                for chat in chats
            ]
            texts = ["".join(one) for one in parts]
            encode = self._vocabulary.encode
            rows = [
                [i for part in one for i in encode(part, add_bos=False, parse_special=True)]
                for one in (parts if tokenize else [])
            ]
        if not tokenize:
            return texts if is_batch else texts[0]
        encoding = self.batch(
            [[Segment(ids, [(0, 0)] * len(ids))] for ids in rows],
            is_batch,
            add_special_tokens=False,
            padding=padding,
            truncation=truncation,
            max_length=max_length,
            return_tensors=return_tensors,
            **_without_offsets(tokenizer_kwargs),
        )
        return encoding if return_dict else encoding.input_ids

    def _own_turns(
        self,
        chat: Sequence[Any],
        add_generation_prompt: bool,
        continue_final: bool | str,
        variables: Mapping[str, Any],
    ) -> list[int]:
        given = {name for name, value in variables.items() if value is not None}
        if unread := sorted(given - {"merge_system"}):
            raise ValueError(f"without a chat template there is no use for {unread}")
        if continue_final not in (True, False, "content"):
            raise ValueError(f"continue_final_message={continue_final!r}: a turn has 'content'")
        ids = render_chat(
            self._vocabulary,
            chat,
            add_generation_prompt=add_generation_prompt,
            merge_system=bool(variables.get("merge_system")),
        )
        if continue_final:
            ends = [i for i, token in enumerate(ids) if token == self._vocabulary.end_of_turn_id]
            ids = ids[: ends[-1]]
        first = [] if self.bos_token_id is None else [self.bos_token_id]
        return [*first, *ids[1:]]

    def _templated(
        self,
        template: str,
        chat: Sequence[Any],
        continue_final: bool | str,
        guarded: bool,
        variables: dict[str, Any],
    ) -> list[str]:
        field = continue_final if isinstance(continue_final, str) else "content"
        return chat_templates.render(
            template,
            chat,
            inside_literal=self._vocabulary.inside_marker if guarded else None,
            continue_final=field if continue_final else None,
            **variables,
        )


GemmaTokenizerFast = GemmaTokenizer
_SETTINGS = {
    name
    for name in inspect.signature(GemmaTokenizer.__init__).parameters
    if name not in ("self", "vocab_file", "tokenizer_file", "tokenizer_object", "name_or_path")
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


def _without_offsets(options: Mapping[str, Any] | None) -> dict[str, Any]:
    if options and options.get("return_offsets_mapping"):
        raise NotImplementedError("return_offsets_mapping=True is not supported for a chat")
    return dict(options or {})
