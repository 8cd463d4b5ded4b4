"""`pipeline("text-generation")`: text in, text out."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gemcut.engine.checks import shorten
from gemcut.engine.transformers_api.auto import AutoModelForCausalLM, AutoTokenizer
from gemcut.engine.transformers_api.models.generation import GenerativeModel
from gemcut.engine.transformers_api.tokenizers.tokenizer import GemmaTokenizer

# transformers' own settings, where neither the caller nor the checkpoint has others
DEFAULTS = {"max_new_tokens": 256, "do_sample": True, "temperature": 0.7}

Messages = Sequence[Mapping[str, str]]


def pipeline(
    task: str = "text-generation",
    model: str | Path | GenerativeModel = "demo",
    tokenizer: str | Path | GemmaTokenizer | None = None,
    *,
    device: Any = None,
    device_map: Any = None,
    model_kwargs: Mapping[str, Any] | None = None,
    **options: Any,
) -> "TextGenerationPipeline":
    """A callable from prompts to texts: `pipeline("text-generation", model=folder)("It was")`.

    model: "demo", a folder, a Hugging Face id, or a loaded model, with its tokenizer.
    device or device_map: a name, a GPU's number, or "auto"; -1 is the CPU.  Options such as dtype
    go to the model's from_pretrained.
    """
    if task != "text-generation":
        raise NotImplementedError(f"task {task!r} is not there; 'text-generation' is")
    if isinstance(model, GenerativeModel):
        if tokenizer is None:
            raise ValueError("a model that is loaded needs its tokenizer too: tokenizer=")
        if options or model_kwargs or device_map is not None:
            name = next(iter({**options, **(model_kwargs or {})}), "device_map")
            raise ValueError(f"{name} has no meaning for a model that is loaded")
        if device is not None:
            model.to("cpu" if device == -1 else device)
        loaded = model
    else:
        if device is not None and device_map is not None:
            raise ValueError("give device or device_map, not both")
        place = device_map if device is None else "cpu" if device == -1 else device
        tokenizer = model if tokenizer is None else tokenizer
        options = {**options, **(model_kwargs or {})}
        loaded = AutoModelForCausalLM.from_pretrained(model, device_map=place, **options)
    if isinstance(tokenizer, str | Path):
        tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    return TextGenerationPipeline(loaded, tokenizer)


class TextGenerationPipeline:
    """A model and its tokenizer, from text to text."""

    task = "text-generation"

    def __init__(self, model: GenerativeModel, tokenizer: GemmaTokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer

    def __call__(
        self,
        text_inputs: str | Sequence[str] | Messages | Sequence[Messages],
        *,
        return_full_text: bool | None = None,
        return_tensors: bool = False,
        add_special_tokens: bool = True,
        batch_size: int = 1,
        **settings: Any,
    ) -> list[Any]:
        """[{"generated_text": ...}] for a prompt, a list of such for a list of prompts.

        A prompt is a text, or a chat: a list of messages with role and content; then the generated
        text is the chat with the answer.  return_full_text=False leaves the prompt out;
        return_tensors gives "generated_token_ids" instead.  batch_size: prompts computed together.
        Settings are those of `generate`; where the checkpoint has none, 256 new tokens are drawn
        with temperature 0.7.
        """
        prompts, is_list = _prompts(text_inputs)
        is_whole = True if return_full_text is None else return_full_text
        answers = []
        for first in range(0, len(prompts), batch_size):
            some = prompts[first : first + batch_size]
            answers += self._answer(some, is_whole, return_tensors, add_special_tokens, settings)
        return answers if is_list else answers[0]

    def _answer(
        self,
        prompts: list[Any],
        is_whole: bool,
        return_tensors: bool,
        add_special_tokens: bool,
        settings: Mapping[str, Any],
    ) -> list[list[dict[str, Any]]]:
        tokenizer, model = self.tokenizer, self.model
        encoded = [self._encode(prompt, add_special_tokens) for prompt in prompts]
        batch = tokenizer.pad({"input_ids": encoded}, padding_side="left", return_tensors="pt")
        batch = batch.to(model.device)
        sequences = model.generate(
            **batch, tokenizer=tokenizer, **{**self._defaults(settings), **settings}
        )
        width = batch["input_ids"].shape[1]
        times = len(sequences) // len(prompts)
        answers = []
        for i, prompt in enumerate(prompts):
            ids = encoded[i]
            of_prompt = []
            for row in sequences[i * times : (i + 1) * times]:
                new = self._cut(row[width:].tolist())
                if return_tensors:
                    of_prompt.append({"generated_token_ids": ids + new if is_whole else new})
                else:
                    of_prompt.append({"generated_text": self._text(prompt, ids, new, is_whole)})
            answers.append(of_prompt)
        return answers

    def _encode(self, prompt: str | Messages, add_special_tokens: bool) -> list[int]:
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt, add_special_tokens=add_special_tokens)
        return self.tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, return_dict=False
        )

    def _text(self, prompt: str | Messages, ids: list[int], new: list[int], is_whole: bool) -> Any:
        answer = self.tokenizer.decode(new, skip_special_tokens=True)
        if not isinstance(prompt, str):
            said = {"role": "assistant", "content": answer}
            return [*prompt, said] if is_whole else answer
        return prompt + answer if is_whole else answer

    def _cut(self, new: list[int]) -> list[int]:
        """New ids without the padding that fills up a row after its end."""
        pad = self.model.generation_config.pad_token_id
        while new and new[-1] == pad:
            new = new[:-1]
        return new

    def _defaults(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The defaults for settings that neither the call nor the checkpoint's own file has."""
        own = self.model.generation_config
        defaults = dict(DEFAULTS)
        if "max_length" in settings or own.max_length is not None or own.max_new_tokens is not None:
            del defaults["max_new_tokens"]
        if own.do_sample or settings.get("do_sample") is False:
            del defaults["do_sample"], defaults["temperature"]
        return defaults


def _prompts(inputs: Any) -> tuple[list[Any], bool]:
    """The prompts, and whether they came as a list."""
    if isinstance(inputs, str):
        return [inputs], False
    if not isinstance(inputs, Sequence) or not inputs:
        raise ValueError(
            f"the prompt {shorten(inputs)} is neither a text nor a list that holds one"
        )
    if isinstance(inputs[0], Mapping):
        return [inputs], False
    return list(inputs), True
