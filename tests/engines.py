"""Engines on small random models, run as on a GPU or made to generate given tokens."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from random_models import random_model
from torch import Tensor
from transformers import PreTrainedModel

from gemcut.engine import Engine, SamplingParams
from gemcut.engine.execution.cache import KVCache
from gemcut.engine.execution.cuda_graphs import Captured, Graphs, Step
from gemcut.engine.execution.graphed_steps import GraphedSteps
from gemcut.engine.execution.model import Gemma
from gemcut.engine.execution.prefill_chunks import padded_sizes
from gemcut.engine.execution.slot_state import SlotState
from gemcut.tokenizer import Tokenizer


def save_random_model(
    folder: Path, tokenizer_file: Path, model_type: str = "gemma2", **overrides
) -> PreTrainedModel:
    """A random model and a tokenizer, in `folder` as a published checkpoint has them."""
    vocab_size = len(Tokenizer.from_file(tokenizer_file))
    sizes = {"vocab_size": vocab_size, "max_position_embeddings": 128}
    model = random_model(model_type, **(sizes | overrides))
    model.save_pretrained(folder)
    shutil.copy(tokenizer_file, folder / "tokenizer.model")
    return model


class PlainGraphs(Graphs):
    """Graphs whose replay is the step itself: fixed tensors and padding without a GPU."""

    def run(self, *args, **kwargs) -> Tensor:
        return super().run(*args, **kwargs).clone()  # as the copy to the host does

    def capture(self, step: Step, inputs: Sequence[Tensor]) -> Captured:
        output = step(*inputs)  # with blank rows: it must change nothing
        return Captured(inputs, output, lambda: output.copy_(step(*inputs)))


def replayed_steps(model: Gemma, cache: KVCache, state: SlotState) -> GraphedSteps:
    """The steps of a GPU, chunks of prompts padded to their sizes, without a GPU."""
    sizes = padded_sizes(model.config, cache.prefill_chunk, cache.max_seq_len)
    steps = GraphedSteps(model, cache, state, sizes)
    steps._graphs = PlainGraphs()
    return steps


def run_as_on_a_gpu(engine: Engine) -> None:
    """Replayed steps, each read when the next one is under way, in a thread of their own.

    Chunks of prompts are padded, and longer while no request decodes.
    """
    if engine.model.device.type == "cpu":
        replay(engine)
        engine._scheduler._long_chunks = engine._scheduler._reuse_prefixes
        engine._loop.depth = 1
        engine._worker.inline = False


def replay(engine: Engine) -> GraphedSteps:
    """Replay the engine's steps as on a GPU, chunks of prompts too; return these steps."""
    runner = engine._loop.runner
    runner.steps = replayed_steps(runner.model, runner.cache, runner.state)
    return runner.steps


def dictate(token_ids: Sequence[int]):
    """A logits processor that makes the engine generate these tokens."""

    def processor(generated: list[int], logits: Tensor) -> Tensor:
        forced = torch.full_like(logits, -torch.inf)
        forced[token_ids[len(generated)]] = 0.0
        return forced

    return [processor]


class Dictation:
    """A logits processor, of an engine's default_params, that makes it write a text set later."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []

    def set(self, tokenizer: Tokenizer, text: str) -> None:
        """The next answers are this text, special tokens included, and EOS."""
        ids = tokenizer.encode(text, add_bos=False, parse_special=True)
        self.token_ids = [*ids, tokenizer.eos_id]

    def __call__(self, generated: list[int], logits: Tensor) -> Tensor:
        return dictate(self.token_ids)[0](generated, logits)


def logits_of(engine: Engine, prompt: Sequence[int], count: int = 4) -> Tensor:
    """The logits [count, V] of greedy tokens after a prompt, through prefill and decode."""
    seen = []

    def keep(generated: list[int], logits: Tensor) -> Tensor:
        seen.append(logits.clone())
        return logits

    settings = {"max_tokens": count, "ignore_eos": True, "logits_processors": [keep]}
    engine.generate(list(prompt), SamplingParams(temperature=0.0, **settings))
    return torch.stack(seen)


def assert_serves(engine: Engine) -> None:
    """The engine answers, and every slot is free."""
    assert len(engine.generate("Once").token_ids) > 0
    assert engine._scheduler.all() == []


def one_line(error: pytest.ExceptionInfo) -> str:
    """The message of an error, which is one line of at most 300 characters."""
    message = str(error.value)
    assert message.strip()
    assert "\n" not in message
    assert len(message) < 300
    return message
