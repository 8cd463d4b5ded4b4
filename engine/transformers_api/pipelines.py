"""`pipeline("text-generation")`: text in, text out."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemcut.engine.checks import check_int, shorten, warn_caller
from gemcut.engine.transformers_api.auto import AutoModelForCausalLM, AutoTokenizer
from gemcut.engine.transformers_api.models.generation import GenerativeModel
from gemcut.engine.transformers_api.models.generation_config import (
    NAMES,
    GenerationConfig,
)
from gemcut.engine.transformers_api.models.setting_checks import token_ids_of
from gemcut.engine.transformers_api.tokenizers.tokenizer import GemmaTokenizer

# transformers' own settings, where neither the caller nor the checkpoint has others
DEFAULTS = {"max_new_tokens": 256, "do_sample": True, "temperature": 0.7}

# what a call takes beside the arguments of `generate`, and what it is by default
OPTIONS: dict[str, Any] = {
    "return_full_text": None,  # False leaves the prompt out
    "return_text": None,  # the opposite of return_tensors
    "return_tensors": None,  # True gives ids in place of text
    "clean_up_tokenization_spaces": None,
    "skip_special_tokens": True,
    "prefix": "",  # before each text; not shown
    "add_special_tokens": None,
    "truncation": None,
    "padding": None,
    "tokenizer_encode_kwargs": None,
    "tools": None,
    "documents": None,
    "continue_final_message": None,  # None: where the last message is the assistant's
    "stop_sequence": None,
    "handle_long_generation": None,
    "num_workers": None,
}
KINDS = ("return_text", "return_full_text", "return_tensors")  # a call has one of them at most
# the arguments of `generate` that a pipeline hands on
HANDED_ON = ("streamer", "logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn")
TAKEN = frozenset({*OPTIONS, *HANDED_ON, *NAMES, "generation_config", "batch_size"})

# options of transformers' that change nothing here, and their accepted values
NEUTRAL = {
    "use_fast": (True, False),
    "framework": ("pt",),
    "feature_extractor": (),
    "processor": (),
}
NEUTRAL |= {"trust_remote_code": (True, False)}

Messages = Sequence[Mapping[str, Any]]


def pipeline(
    task: str | None = None,
    model: str | Path | GenerativeModel = "demo",
    tokenizer: str | Path | GemmaTokenizer | None = None,
    *,
    device: Any = None,
    device_map: Any = None,
    model_kwargs: Mapping[str, Any] | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    **options: Any,
) -> "TextGenerationPipeline":
    """A callable from prompts to texts: `pipeline("text-generation", model=folder)("It was")`.

    model: "demo", a folder, a Hugging Face id, or a loaded model, with its tokenizer.
    device or device_map: a name, a GPU's number, or "auto"; -1 is the CPU.  Options of a call are
    defaults of all calls; others, such as dtype, go to the model's from_pretrained.
    """
    if task not in (None, "text-generation"):
        raise NotImplementedError(f"task {task!r} is not there; 'text-generation' is")
    for name, allowed in NEUTRAL.items():
        if (value := options.pop(name, None)) not in (None, *allowed):
            raise NotImplementedError(f"{name}={shorten(value)} is not supported; leave it out")
    of_calls = {name: options.pop(name) for name in list(options) if name in TAKEN}
    source = {"token": token, "revision": revision}
    source = {name: value for name, value in source.items() if value is not None}
    loading = {**source, **options, **(model_kwargs or {})}
    if isinstance(model, GenerativeModel):
        if tokenizer is None:
            raise ValueError("a model that is loaded needs its tokenizer too: tokenizer=")
        for name, value in {**loading, "device_map": device_map}.items():
            if value is not None:
                warn_caller(f"{name}={shorten(value)} has no effect: the model is loaded")
        if device is not None:
            model.to("cpu" if device == -1 else device)
        loaded = model
    else:
        if device is not None and device_map is not None:
            raise ValueError("give device or device_map, not both")
        place = device_map if device is None else "cpu" if device == -1 else device
        loaded = AutoModelForCausalLM.from_pretrained(model, device_map=place, **loading)
        tokenizer = model if tokenizer is None else tokenizer
    if isinstance(tokenizer, str | Path):
        tokenizer = AutoTokenizer.from_pretrained(tokenizer, **source)
    return TextGenerationPipeline(loaded, tokenizer, **of_calls)


class TextGenerationPipeline:
    """A model and its tokenizer, from text to text; `defaults` are options of every call."""

    task = "text-generation"

    def __init__(self, model: GenerativeModel, tokenizer: GemmaTokenizer, **defaults: Any) -> None:
        self.model, self.tokenizer, self._defaults = model, tokenizer, defaults

    @property
    def device(self) -> torch.device:
        """The model's."""
        return self.model.device

    def __call__(
        self,
        text_inputs: str | Messages | Iterable[str | Messages],
        *,
        batch_size: int | None = None,
        **options: Any,
    ) -> Any:
        """[{"generated_text": ...}] for a prompt, a list of such for a list of prompts.

        A prompt is a text, or a chat: a list of messages with role and content; then the generated
        text is the chat with the answer, or with its last message continued where that is the
        assistant's.  Another iterable, such as a generator, gives an iterator.
        return_full_text=False leaves the prompt out; return_tensors=True gives
        "generated_token_ids" instead, without padding.  batch_size (1): prompts computed together.
        Other options are those of OPTIONS and the settings of `generate`; where neither these nor
        the checkpoint have one, 256 new tokens are drawn with temperature 0.7.
        """
        call = _Call(self.model, self.tokenizer, self._defaults, options)
        size = self._defaults.get("batch_size", 1) if batch_size is None else batch_size
        check_int("batch_size", size, 1, 2**31 - 1)
        prompts, kind = _prompts(text_inputs)
        answers = _in_batches(prompts, size, call)
        if kind == "iterable":
            return answers
        return list(answers) if kind == "list" else next(answers)


class _Call:
    """The options of one call, and the answers that they give."""

    def __init__(
        self,
        model: GenerativeModel,
        tokenizer: GemmaTokenizer,
        defaults: Mapping[str, Any],
        given: Mapping[str, Any],
    ) -> None:
        self._model, self._tokenizer = model, tokenizer
        for options in (defaults, given):
            if len(asked := [name for name in KINDS if options.get(name) is not None]) > 1:
                raise ValueError(f"{asked[0]} and {asked[1]} exclude each other")
        if any(given.get(name) is not None for name in KINDS[1:]):
            defaults = {name: x for name, x in defaults.items() if name not in KINDS}
        merged = {**defaults, **given}
        merged.pop("batch_size", None)
        self._options = {name: merged.pop(name, usual) for name, usual in OPTIONS.items()}
        if given.get("generation_config") is not None:  # in place of the settings of all calls
            merged = {k: x for k, x in merged.items() if k in given or k not in NAMES}
        if (stop := self._options["stop_sequence"]) is not None:
            merged["stop_strings"] = stop
        self._settings = self._with_defaults(merged)
        if (how := self._options["handle_long_generation"]) not in (None, "hole"):
            raise ValueError(f"handle_long_generation {shorten(how)} is neither None nor 'hole'")

    def _with_defaults(self, given: dict[str, Any]) -> dict[str, Any]:
        """The arguments of `generate`: defaults where neither caller nor checkpoint has others."""
        known = GenerationConfig.like(self._model.generation_config).settings()
        if (config := given.get("generation_config")) is not None:
            known |= GenerationConfig.like(config).settings()
        known |= given
        defaults = {**DEFAULTS, "pad_token_id": self._tokenizer.pad_token_id}
        defaults = {k: x for k, x in defaults.items() if k not in known and x is not None}
        if "max_length" in known:
            defaults.pop("max_new_tokens", None)
        if not {**known, **defaults}["do_sample"]:
            defaults.pop("temperature", None)
        longer = self._lengths_after_prefix({**known, **defaults})
        self._known = {**known, **defaults, **longer}
        return {**given, **defaults, **longer}

    def _lengths_after_prefix(self, known: Mapping[str, Any]) -> dict[str, int]:
        """The lengths that count the prompt, as much longer as the prefix is."""
        if not (prefix := self._options["prefix"]):
            return {}
        special = bool(self._options["add_special_tokens"])
        count = len(self._tokenizer(prefix, add_special_tokens=special)["input_ids"])
        pairs = (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens"))
        return {
            name: known[name] + count
            for name, new in pairs
            if known.get(name) is not None and known.get(new) is None
        }

    def answer(self, prompts: list[Any]) -> list[list[dict[str, Any]]]:
        """The records of each of these prompts, which are computed together."""
        encoded = [self._encode(prompt) for prompt in prompts]
        width = max(map(len, encoded))
        pad = self._known.get("pad_token_id") or 0
        ids = [[pad] * (width - len(row)) + row for row in encoded]
        mask = [[0] * (width - len(row)) + [1] * len(row) for row in encoded]
        output = self._model.generate(
            torch.tensor(ids, device=self._model.device),
            attention_mask=torch.tensor(mask, device=self._model.device),
            tokenizer=self._tokenizer,
            **self._settings,
        )
        sequences = output if isinstance(output, Tensor) else output["sequences"]
        times = len(sequences) // len(prompts)
        records = []
        for row, sequence in enumerate(sequences):
            new = self._cut(sequence[width:].tolist())
            record = self._record(prompts[row // times], encoded[row // times], new)
            if not isinstance(output, Tensor):
                for name in [name for name in ("scores", "logits") if name in output]:
                    record[name] = torch.stack(output[name])[:, row].tolist()
            records.append(record)
        return [records[i : i + times] for i in range(0, len(records), times)]

    def _encode(self, prompt: str | Messages) -> list[int]:
        options = self._options
        how = {name: options[name] for name in ("add_special_tokens", "truncation", "padding")}
        how = {name: value for name, value in how.items() if value is not None}
        if options["truncation"] and "max_length" in self._settings:
            how["max_length"] = self._settings["max_length"]
        how |= options["tokenizer_encode_kwargs"] or {}
        if isinstance(prompt, str):
            ids = self._tokenizer(options["prefix"] + prompt, **how)["input_ids"]
        else:
            how.pop("add_special_tokens", None)
            goes_on = self._goes_on(prompt)
            ids = self._tokenizer.apply_chat_template(
                prompt,
                add_generation_prompt=not goes_on,
                continue_final_message=goes_on,
                tools=options["tools"],
                documents=options["documents"],
                return_dict=False,
                **how,
            )
        if options["handle_long_generation"] == "hole":
            ids = self._cut_left(ids)
        return ids or [self._model.generation_config.bos_token_id]

    def _cut_left(self, ids: list[int]) -> list[int]:
        """The newest ids that leave room, in the model's length, for what is to follow."""
        new = self._known.get("max_new_tokens") or self._known["max_length"] - len(ids)
        most = self._tokenizer.model_max_length
        if not 0 <= new < most:
            raise ValueError(f"{new} new tokens leave no room for a prompt within {most}")
        return ids[max(0, len(ids) + new - most) :]

    def _goes_on(self, chat: Messages) -> bool:
        """Whether the last message is to be continued."""
        asked = self._options["continue_final_message"]
        return chat[-1]["role"] == "assistant" if asked is None else asked

    def _record(self, prompt: str | Messages, ids: list[int], new: list[int]) -> dict[str, Any]:
        options = self._options
        is_whole = options["return_full_text"] is not False
        if options["return_tensors"]:
            return {"generated_token_ids": ids + new if is_whole else new}
        answer: Any = self._tokenizer.decode(
            new,
            skip_special_tokens=options["skip_special_tokens"],
            clean_up_tokenization_spaces=options["clean_up_tokenization_spaces"],
        )
        if is_whole:
            answer = prompt + answer if isinstance(prompt, str) else self._said(prompt, answer)
        return {"generated_text": answer}

    def _said(self, chat: Messages, answer: str) -> list[Mapping[str, Any]]:
        """The chat with the answer, which may be the end of its last message."""
        if not self._goes_on(chat):
            return [*chat, {"role": "assistant", "content": answer}]
        *before, last = chat
        return [*before, {"role": last["role"], "content": last["content"] + answer}]

    def _cut(self, new: list[int]) -> list[int]:
        """New ids without the padding that fills up a row after its end."""
        ends = token_ids_of(self._known.get("eos_token_id"))
        pad = self._known.get("pad_token_id", ends[0] if ends else None)
        while new and new[-1] == pad and (pad not in ends or new[-2:-1] == [pad]):
            new = new[:-1]
        return new


def _in_batches(prompts: Iterator[Any], size: int, call: _Call) -> Iterator[Any]:
    """The answer to each prompt, of which `size` are computed together."""
    while batch := list(islice(prompts, size)):
        yield from call.answer(batch)


def _prompts(inputs: Any) -> tuple[Iterator[Any], str]:
    """The prompts, and how they came: "one", a "list", or another "iterable"."""
    if isinstance(inputs, str):
        return iter([inputs]), "one"
    is_list = isinstance(inputs, Sequence)
    if (is_list and not inputs) or isinstance(inputs, Mapping) or not hasattr(inputs, "__iter__"):
        is_dataset = hasattr(inputs, "__getitem__") and not isinstance(inputs, Mapping)
        if is_list or not is_dataset:
            raise ValueError(
                f"the prompt {shorten(inputs)} is neither a text nor a list that holds one"
            )
    if hasattr(inputs, "__iter__") or not hasattr(inputs, "__len__"):
        items = iter(inputs)
    else:  # a dataset, which need not say by an IndexError where it ends
        items = (inputs[i] for i in range(len(inputs)))
    first = list(islice(items, 1))
    items = chain(first, items)
    if first and isinstance(first[0], Mapping):
        return iter([list(items)]), "one"
    return items, "list" if is_list else "iterable"
