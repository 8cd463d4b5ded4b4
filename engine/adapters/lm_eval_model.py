"""lm-evaluation-harness on the engine: `lm_eval --model gemcut --model_args pretrained=demo`.

The harness' entry point `lm_eval.models` names this class.  Its releases up to 0.4.13 do not read
entry points; there, this module is the harness' command line with the model in it:

    python -m gemcut.engine.adapters.lm_eval_model --model gemcut --model_args pretrained=demo ...

Tokens are those of the harness' `hf` model: the tokenizer's BOS before every text that does not
begin with one, and a second one before a text whose perplexity is wanted.  All requests of a task
are given to the engine at once; `max_batch_size` is how many run together, and what requests have
in common, such as the question of several answers, is computed once.
"""

import logging
import random
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import Any

from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]
from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]
from lm_eval.models.utils import (  # pyright: ignore[reportMissingImports]
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import (  # pyright: ignore[reportMissingImports]
    get_rolling_token_windows,
    make_disjoint_window,
)

from gemcut.engine.checks import check_int, refuse_unknown
from gemcut.engine.engine import Engine
from gemcut.engine.requests.prompts import Prompt
from gemcut.engine.requests.sampling_params import SamplingParams

# the texts, for the harness' cache, or None; the ids of context and continuation
Scored = tuple[tuple[str, str] | None, list[int], list[int]]
_logger = logging.getLogger(__name__)


@register_model("gemcut")
class GemcutLM(TemplateLM):
    """The `gemcut` model of the harness; options are those of `Engine.from_pretrained`.

    max_length: tokens of a text, by default the engine's max_seq_len, which it sets.  max_gen_toks:
    tokens of an answer where the task does not say.  add_bos_token, prefix_token_id: as the
    harness' hf model has them.  batch_size is the harness' own, and of no use here.
    """

    def __init__(
        self,
        pretrained: str = "demo",
        *,
        device: str | None = None,
        batch_size: int | str | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if max_length is not None:
            options["max_seq_len"] = max_length
        if device in (None, "cuda:0"):  # what the harness says where its user says nothing
            device = "auto"
        self.engine = Engine.from_pretrained(pretrained, device=device, **options)
        self.tokenizer = self.engine.get_tokenizer()
        self._name = str(pretrained)
        self.max_length, self.max_gen_toks = self.engine.max_seq_len, max_gen_toks
        self._adds_bos = add_bos_token
        if (eos := self.tokenizer.eos_token_id) is None:
            raise ValueError(f"{pretrained} has a tokenizer without EOS, which the harness needs")
        self._eos = eos
        tokens = (prefix_token_id, self.tokenizer.bos_token_id, eos)
        self._prefix = next(token for token in tokens if token is not None)
        check_int("prefix_token_id", self._prefix, 0, self.engine.config.vocab_size - 1)

    @property
    def eot_token_id(self) -> int:
        return self._eos

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that has no context."""
        return self._prefix

    @property
    def tokenizer_name(self) -> str:
        return self._name.replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """The ids of a text, with a BOS unless the text, such as a chat, has its own."""
        if add_special_tokens is None:
            add_special_tokens = self._adds_bos is not False
            if string.startswith(self.tokenizer.decode(self.prefix_token_id)):
                add_special_tokens = False
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def _loglikelihood_tokens(
        self, requests: Sequence[Scored], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Of each continuation the log-probability, and whether greedy decoding would choose it."""
        if not requests:
            return []
        texts: list[Prompt] = []
        starts = []
        for _texts, context, continuation in requests:
            check_int("tokens of a continuation", len(continuation), 1, self.max_length)
            ids = self._shortened(context + continuation, self.max_length + 1)
            texts.append(ids)
            starts.append(len(ids) - len(continuation))
        scored = self.engine.score(texts, start=starts, use_tqdm=not disable_tqdm)
        answers = [(one.total, all(one.is_greedy)) for one in scored]
        for (key, *_ids), answer in zip(requests, answers, strict=True):
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, answer)
        return answers

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """The log-probability of each whole text, in windows of `max_length` where it is longer."""
        owners, windows = [], []
        for number, request in enumerate(requests):
            (text,) = request.args
            for window in get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            ):
                owners.append(number)
                windows.append((None, *make_disjoint_window(window)))
        scored = zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True)
        of_each = groupby(scored, key=lambda pair: pair[0])
        totals = [sum(logprob for _, (logprob, _) in group) for _, group in of_each]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """An answer to each context, which ends before the first of its stop strings."""
        if not requests:
            return []
        prompts, params, stops = [], [], []
        for request in requests:
            context, gen_kwargs = request.args
            settings = normalize_gen_kwargs(gen_kwargs, self.max_gen_toks)
            limit = settings.pop("max_gen_toks")
            check_int("max_gen_toks", limit, 1, self.max_length - 1)
            eos = self.tokenizer.decode(self.eot_token_id)
            stops.append(handle_stop_sequences(settings.pop("until"), eos=eos))
            prompts.append(self._shortened(self.tok_encode(context), self.max_length - limit))
            stop = [text for text in stops[-1] if text]
            params.append(self._params(settings, max_tokens=limit, stop=stop))
        outputs = self.engine.generate(prompts, params, use_tqdm=not disable_tqdm)
        answers = [
            postprocess_generated_text(output.text, stop, think_end_token=None)
            for output, stop in zip(outputs, stops, strict=True)
        ]
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, answer)
        return answers

    def _params(self, settings: dict[str, Any], **ours: Any) -> SamplingParams:
        """The model's published settings with those of a task; random draws follow `--seed`."""
        if not settings.pop("do_sample"):
            settings["temperature"] = 0.0
        if settings.get("num_beams") == 1:  # what tasks say for greedy decoding
            del settings["num_beams"]
        defaults = self.engine.get_default_sampling_params()
        refuse_unknown("gen_kwargs of gemcut", settings, defaults.__slots__)
        return replace(defaults, **({"seed": random.getrandbits(63)} | settings | ours))

    def _shortened(self, ids: list[int], length: int) -> list[int]:
        """The last `length` ids, with a warning where there are more."""
        if len(ids) > length:
            _logger.warning("a text of %d tokens loses its first %d", len(ids), len(ids) - length)
        return ids[-length:]

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The text of a chat; as in the hf model, a template that refuses it gets no system role.

        Without a template the turns are Gemma's own.
        """
        render = partial(
            self.tokenizer.apply_chat_template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        try:
            return render(chat_history)
        except ValueError as error:
            others = [message for message in chat_history if message["role"] != "system"]
            if len(others) == len(chat_history):
                raise
            _logger.warning("the system message is left out: %s", error)
            return render(others)

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside the results."""
        model = self.engine.model
        return {
            "model_num_parameters": self.engine.config.num_parameters(),
            "model_dtype": str(model.dtype),
            "model_device": str(model.device),
        }


if __name__ == "__main__":
    cli_evaluate()
