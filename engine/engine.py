"""Engine: a model, its cache and what runs it, made and kept.

loading.py makes one of a checkpoint or of tensors in memory, and calls.py has its calls.

Any number of threads and asyncio tasks may call one engine.  Their requests share the decode batch;
worker.py says which thread makes the steps.
"""

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

from tqdm import tqdm

from gemcut.engine.calls import Calls, shows
from gemcut.engine.checkpoints.gguf_choice import is_gguf
from gemcut.engine.checkpoints.gguf_model import write_tokenizer
from gemcut.engine.checkpoints.state_dict import Tensors
from gemcut.engine.checks import check_bool, check_int
from gemcut.engine.execution.cache import PREFILL_CHUNK, KVCache
from gemcut.engine.execution.cache_scales import Scales, chosen_scales
from gemcut.engine.execution.graphed_steps import choose_steps
from gemcut.engine.execution.model import Gemma
from gemcut.engine.execution.runner import Runner
from gemcut.engine.execution.slot_state import SlotState
from gemcut.engine.execution.steps import Steps
from gemcut.engine.loading import Loading
from gemcut.engine.memory import Build
from gemcut.engine.placement import release_freed_memory
from gemcut.engine.requests.outputs import Delta
from gemcut.engine.requests.prompts import Prompt
from gemcut.engine.requests.request_builder import RequestBuilder
from gemcut.engine.requests.sampling_params import INT64_MAX, SamplingParams
from gemcut.engine.serving import output_queues
from gemcut.engine.serving.metrics import costs, prometheus_text, snapshot
from gemcut.engine.serving.scheduler import Scheduler
from gemcut.engine.serving.step_loop import StepLoop
from gemcut.engine.serving.worker import Worker
from gemcut.engine.weight_updates import WeightUpdate, check_running
from gemcut.tokenizer import Tokenizer

if TYPE_CHECKING:
    from gemcut.engine.transformers_api.tokenizers.tokenizer import GemmaTokenizer

MakeSteps = Callable[[Gemma, KVCache, SlotState], Steps]


class Engine(Calls, Loading):
    """A model with its tokenizer and cache, ready for requests.  `from_pretrained` makes one."""

    def __init__(
        self,
        model: Gemma,
        tokenizer: Tokenizer | None,
        *,
        eos_ids: Sequence[int] | None = None,
        default_params: SamplingParams | None = None,
        max_batch_size: int | Literal["auto"] = 8,
        max_seq_len: int | Literal["auto"] | None = None,
        prefill_chunk: int = PREFILL_CHUNK,
        reuse_prefixes: bool = True,
        max_waiting: int | None = None,
        cuda_graphs: bool = True,
        dependent_launches: bool = True,
        kv_cache_dtype: Literal["auto", "fp8"] = "auto",
        kv_scales: Scales | None = None,
        make_steps: MakeSteps | None = None,
    ) -> None:
        """Allocate the cache: `max_batch_size` slots of `max_seq_len` tokens.

        tokenizer: without one, prompts are token ids and outputs have no text.  eos_ids: tokens
        that end a text, by default those of the config.  default_params: settings of a call that
        gives none.
        prefill_chunk: tokens of a prompt that are computed at once while others decode.
        reuse_prefixes: a prompt takes over the prefix that a slot already holds, and on a GPU its
        chunks are longer while no request decodes (prefill_chunks.py); without, every run computes
        the same products.  max_waiting: completions that may wait beyond the free slots; more are
        refused.  cuda_graphs: a GPU replays captured steps; without, it runs them kernel by kernel,
        as tools such as compute-sanitizer need it.  dependent_launches: on GPUs that can, a kernel
        begins while the one before it still runs; the same bits without.  kv_cache_dtype: "fp8"
        halves the cache's bytes, rounding keys and values to e4m3; "auto" keeps the model's dtype.
        kv_scales: those of a cache in fp8, of keys and values [HK] in each layer; without, they
        follow from the weights (cache_scales.py).  make_steps: builds the
        steps from model, cache and state, in place of those that suit the device.  ValueError names
        a value out of range, MemoryError what is needed, what is free and what would fit.
        """
        super().__init__()
        self._folder: Path | None = None
        config = model.config
        if tokenizer is not None:
            tokenizer.check_embedding(config.vocab_size)
        if max_waiting is not None:
            check_int("max_waiting", max_waiting, 0, INT64_MAX)
        check_bool("cuda_graphs", cuda_graphs)
        check_bool("dependent_launches", dependent_launches)
        self.model, self.config, self.tokenizer = model, config, tokenizer
        build = Build(
            config,
            model.device,
            model.dtype,
            model.ops,
            prefill_chunk,
            reuse_prefixes,
            cuda_graphs,
            kv_cache_dtype=kv_cache_dtype,
        )
        is_fp8 = build.cache_dtype != model.dtype
        max_batch_size, self.max_seq_len = build.choose(max_batch_size, max_seq_len, loaded=True)
        self.cache = KVCache(
            config,
            num_slots=max_batch_size,
            max_seq_len=self.max_seq_len,
            prefill_chunk=prefill_chunk,
            device=model.device,
            dtype=build.cache_dtype,
            scales=chosen_scales(model, kv_scales, is_fp8),
        )
        state = SlotState(max_batch_size, config.vocab_size, model.device)
        eos_ids = config.eos_token_ids if eos_ids is None else eos_ids
        defaults = SamplingParams() if default_params is None else default_params.clone()
        self._builder = RequestBuilder(
            tokenizer, config.vocab_size, eos_ids, self.max_seq_len, defaults
        )
        self._scheduler = Scheduler(
            max_batch_size,
            prefill_chunk,
            ring=self.cache.ring,
            # where frequencies change with the length, keys of another length are of no use
            reuse_prefixes=reuse_prefixes and not model.rope_depends_on_length,
            long_chunks=build.has_long_chunks,
        )
        make = make_steps or partial(choose_steps, cuda_graphs=cuda_graphs)
        runner = Runner(make(model, self.cache, state), tokenizer)
        self._loop = StepLoop(runner, self._scheduler, self.cache)
        self._worker = Worker(self._loop, max_waiting, dependent_launches=dependent_launches)
        self._stop = weakref.finalize(self, self._worker.stop)
        self._step_interface = output_queues.StepInterface(self._worker)
        self._scales_follow_weights = is_fp8 and kv_scales is None

    # The step interface, for a caller that makes the steps itself

    def add(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
    ) -> str:
        """Queue a prompt for `step`, and return its id, by which deltas and `cancel` name it.

        ValueError for bad input, and for an id that is in use.
        """
        request = self._requests.one(prompt, params, request_id=request_id)
        self._step_interface.add(request)
        return request.request_id

    def step(self) -> list[Delta]:
        """Make a step for all requests: the deltas of those of `add` since the last step, in order.

        A completion's last delta has a finish_reason: "stop", "length", "abort" after `cancel`, or
        "error" with the exception in `error`.  Without work the list is empty at once.
        """
        return self._step_interface.step()

    def cancel(self, request_id: str) -> None:
        """End a request of `add` now; one that has already ended stays as it is."""
        self._step_interface.cancel(request_id)

    @property
    def has_work(self) -> bool:
        """Whether a request of `add` has not ended, or `step` has yet to return its last delta."""
        return self._step_interface.has_work

    # Weights

    def update_weights(
        self,
        tensors: Tensors,
        *,
        partial: bool = False,
        running: Literal["refuse", "abort", "keep"] = "refuse",
    ) -> None:
        """Take new weights in place of the model's, between two steps; no graph is lost.

        tensors: as in `from_state_dict`, in any float dtype and on any device, all of the model's
        or, with `partial`, some.  They are copied in the engine's stream, after what the caller's
        stream holds.  Pairs of an iterable are all held until they have been checked: send what
        does not fit in several calls with `partial`.  What is quantised is quantised anew, scales
        of an fp8 cache that follow from the weights are computed anew, and no prefix that a slot
        holds is reused.

        running: what becomes of requests that have begun: "refuse" raises RuntimeError, "abort"
        ends them and those that wait (a score by an error), "keep" lets them go on with the new
        weights, over the keys and values that the old ones made.  ValueError names what is wrong
        with the tensors.  With either nothing is changed; after any other error, in the midst of
        writing, the engine is dead.  What Ctrl-C interrupts is finished before the next step.
        """
        check_bool("partial", partial)
        check_running(running, scales_change=(scales_change := self._scales_follow_weights))
        update = WeightUpdate(
            self.model, tensors, partial=partial, cache=self.cache if scales_change else None
        )
        self._worker.call(lambda: self._loop.change_weights(update.check, update.write, running))
        if self.model.device.type == "cpu":
            release_freed_memory()

    # State

    def get_default_sampling_params(self) -> SamplingParams:
        """A copy of the settings that a call without any has."""
        return self._builder.defaults.clone()

    def get_tokenizer(self) -> "GemmaTokenizer":
        """The documented tokenizer, with the methods of transformers', of the model's folder."""
        if self._folder is None:
            raise ValueError("an engine that is not from_pretrained has `tokenizer` alone")
        # not at the top: most engines are never asked for one
        from gemcut.engine.transformers_api.tokenizers.tokenizer import GemmaTokenizer

        if not is_gguf(self._folder):
            return GemmaTokenizer.from_pretrained(self._folder)
        with TemporaryDirectory() as folder:
            write_tokenizer(self._folder, Path(folder))
            return GemmaTokenizer.from_pretrained(folder)

    def warmup(self, *, use_tqdm: bool | None = None) -> None:
        """Compile every kernel and, on a GPU, capture every graph, with a progress bar.

        After it nothing is compiled, captured or allocated any more: see `metrics`.
        """
        shown = (lambda steps: tqdm(list(steps), unit="step")) if shows(use_tqdm) else iter
        self._worker.call(lambda: self._loop.warm_up(shown))
        self._loop.metrics.at_warmup = self._costs()

    def metrics(self) -> dict[str, Any]:
        """Counts since the engine was made, and its state now; see `metrics.DESCRIPTIONS`."""
        slots, scheduler = self._scheduler.num_slots, self._scheduler
        return snapshot(
            self._loop.metrics,
            self._costs(),
            slots=slots,
            running=slots - scheduler.free_slots,
            waiting=self._worker.waiting,
            cache_use=scheduler.held_tokens / (slots * self.max_seq_len),
        )

    def prometheus(self) -> str:
        """`metrics` in the text format that Prometheus scrapes."""
        return prometheus_text(self.metrics())

    @property
    def is_healthy(self) -> bool:
        """Whether it takes requests: it is not closed, and its device has not failed."""
        return not self._worker.stopped and self._loop.fault is None

    def close(self) -> None:
        """End every request; later calls are refused."""
        self._stop()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _costs(self) -> dict[str, int]:
        return costs(self.model.device, self._loop.runner.steps.captures)
