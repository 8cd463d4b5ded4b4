"""Engine: prompts in, text out; the loop from one decode step to the next.

A call turns its prompts into sequences and hands them to the scheduler.  A step gives waiting
sequences a free slot and prefills them, then decodes one token for all that run.  Whoever waits for
text makes the steps, one caller at a time, and every step serves all: so any number of threads may
call one engine, their requests share the batch, and a paused consumer delays nobody.
"""

import itertools
import secrets
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, overload

import torch
from torch import Tensor
from tqdm import tqdm

from gemcut.engine import prompts
from gemcut.engine.cache import PREFILL_CHUNK, KVCache
from gemcut.engine.checkpoint import load_checkpoint, stop_token_ids
from gemcut.engine.config import GemmaConfig
from gemcut.engine.hub import resolve_checkpoint
from gemcut.engine.loading import choose_device, choose_dtype, choose_ops
from gemcut.engine.logprobs import describe_tokens, prompt_logprobs, prompt_scores
from gemcut.engine.memory import Build
from gemcut.engine.model import Gemma
from gemcut.engine.outputs import Delta, RequestOutput, ScoreOutput
from gemcut.engine.prompts import Prompt
from gemcut.engine.sampler import Sampler
from gemcut.engine.sampling_params import INT64_MAX, SamplingParams
from gemcut.engine.scheduler import Scheduler
from gemcut.engine.sequence import Request, TokenSequence
from gemcut.tokenizer import Tokenizer, render_chat


class Engine:
    """A model with its tokenizer and cache, ready for requests.  `from_pretrained` makes one."""

    def __init__(
        self,
        model: Gemma,
        tokenizer: Tokenizer,
        *,
        eos_ids: Sequence[int] | None = None,
        max_batch_size: int | Literal["auto"] = 8,
        max_seq_len: int | Literal["auto"] | None = None,
        prefill_chunk: int = PREFILL_CHUNK,
    ) -> None:
        """Allocate the cache: `max_batch_size` slots of `max_seq_len` tokens.

        ValueError names a value out of range, MemoryError what is needed, is free and would fit.
        """
        config = model.config
        if len(tokenizer) > config.vocab_size:
            raise ValueError(
                f"the vocabulary has {len(tokenizer)} pieces, "
                f"but the embedding only {config.vocab_size} rows"
            )
        self.model, self.config, self.tokenizer = model, config, tokenizer
        build = Build(config, model.device, model.dtype, model.ops, prefill_chunk)
        max_batch_size, self.max_seq_len = build.choose(max_batch_size, max_seq_len, loaded=True)
        self.cache = KVCache(
            config,
            num_slots=max_batch_size,
            max_seq_len=self.max_seq_len,
            prefill_chunk=prefill_chunk,
            device=model.device,
            dtype=model.dtype,
        )
        self._eos_ids = frozenset(config.eos_token_ids if eos_ids is None else eos_ids)
        self._sampler = Sampler(max_batch_size, len(tokenizer), model.device, model.ops)
        self._scheduler = Scheduler(max_batch_size)
        # Held for one step at a time.  Reentrant: a step may free an abandoned stream, which then
        # cancels its request in the midst of it.
        self._lock = threading.RLock()
        self._request_numbers = itertools.count()
        self._stepping = self._closed = False

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path = "demo",
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        max_batch_size: int | Literal["auto"] = 8,
        max_seq_len: int | Literal["auto"] | None = None,
        prefill_chunk: int = PREFILL_CHUNK,
        quantization: str | None = None,
        ops: str = "auto",
    ) -> "Engine":
        """An engine for "demo", a local folder or a Hugging Face id.

        device "auto" is cuda where there is one; dtype "auto" is bfloat16 on cuda and float32 on a
        CPU; max_batch_size "auto" is the most of 16, 8, 4, 2, 1 slots that free memory holds;
        max_seq_len None or "auto" is the model's own limit, capped by it.  ValueError names what is
        wrong with an argument or the checkpoint, in one line.
        """
        if quantization is not None:
            raise NotImplementedError(f"quantization {quantization!r} is not there yet; None is")
        target = choose_device(device)
        op_table = choose_ops(ops, target)
        weights_dtype = choose_dtype(dtype, target)
        folder = resolve_checkpoint(model)
        config = GemmaConfig.from_file(folder)
        tokenizer = Tokenizer.from_file(folder)
        eos_ids = stop_token_ids(folder, config)
        build = Build(config, target, weights_dtype, op_table, prefill_chunk)
        slots, length = build.choose(max_batch_size, max_seq_len)  # before anything is loaded
        weights = load_checkpoint(folder, config, device=target, dtype=weights_dtype)
        return cls(
            Gemma(config, weights, op_table),
            tokenizer,
            eos_ids=eos_ids,
            max_batch_size=slots,
            max_seq_len=length,
            prefill_chunk=prefill_chunk,
        )

    # Callers

    @overload
    def generate(  # pyright: ignore[reportOverlappingOverload]  # a str is a Sequence[str]
        self, prompt: Prompt, params: SamplingParams | None = None, *, use_tqdm: bool | None = None
    ) -> RequestOutput: ...

    @overload
    def generate(
        self,
        prompt: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool | None = None,
    ) -> list[RequestOutput]: ...

    def generate(self, prompt, params=None, *, use_tqdm=None):
        """The completions of a prompt, or of a list of prompts in their order.

        A prompt is a string or a list of token ids.  A string gets the BOS that Gemma needs, and
        literals such as "<start_of_turn>" in it are special tokens, as they are for Hugging Face's
        tokenizer: encode untrusted text as a chat, or with `tokenizer.encode`.  Lists take one
        SamplingParams for all or one for each, and show a progress bar on a terminal (`use_tqdm`).
        Bad input raises ValueError before anything runs.
        """
        if not prompts.is_batch(prompt):
            return self._run([self._request(prompt, params)], show=False)[0]
        requests = [
            self._request(one, its_params)
            for one, its_params in zip(prompt, prompts.spread(params, len(prompt)), strict=True)
        ]
        show = sys.stderr.isatty() if use_tqdm is None else use_tqdm
        return self._run(requests, show)

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Delta]:
        """A prompt's completions token by token; joined, the texts are `generate`'s text.

        Bad input raises ValueError at the call.  An abandoned stream frees its slot.
        """
        return self._deltas(self._request(prompt, params))

    @overload
    def chat(
        self,
        messages: Sequence[Mapping[str, str]],
        params: SamplingParams | None = None,
        *,
        stream: Literal[False] = False,
        merge_system: bool = False,
    ) -> RequestOutput: ...

    @overload
    def chat(
        self,
        messages: Sequence[Mapping[str, str]],
        params: SamplingParams | None = None,
        *,
        stream: Literal[True],
        merge_system: bool = False,
    ) -> Iterator[Delta]: ...

    def chat(self, messages, params=None, *, stream=False, merge_system=False):
        """The model's answer to a conversation, as an output or, with `stream`, as deltas.

        messages: mappings with "role" ("user" or "model", also called "assistant", in turn) and
        "content".  Gemma has no system role: it is refused, or with `merge_system` put before the
        first user content.  The answer ends at the end of the turn.
        """
        ids = render_chat(self.tokenizer, messages, merge_system=merge_system)
        end_of_turn = self.tokenizer.end_of_turn_id
        assert end_of_turn is not None  # render_chat refuses such a vocabulary
        request = self._request(ids, params, eos_ids=self._eos_ids | {end_of_turn})
        return self._deltas(request) if stream else self._run([request], show=False)[0]

    @overload
    def score(  # pyright: ignore[reportOverlappingOverload]  # a str is a Sequence[str]
        self, texts: Prompt, *, use_tqdm: bool | None = None
    ) -> ScoreOutput: ...

    @overload
    def score(
        self, texts: Sequence[Prompt], *, use_tqdm: bool | None = None
    ) -> list[ScoreOutput]: ...

    def score(self, texts, *, use_tqdm=None):
        """Log-probabilities of a text's tokens, each given those before it; a list for a list.

        A string gets a BOS, whose own probability is not asked.  A text must fit a slot.
        """
        batch = prompts.is_batch(texts)
        requests = [self._request(one, None, score=True) for one in (texts if batch else [texts])]
        show = batch and (sys.stderr.isatty() if use_tqdm is None else use_tqdm)
        self._run(requests, show)
        scored = [
            ScoreOutput(r.prompt, r.sequences[0].prompt_ids, r.sequences[0].scores)
            for r in requests
        ]
        return scored if batch else scored[0]

    def warmup(self) -> None:
        """Run each kind of step once, so that the first request is as fast as the others."""
        self.generate([self.tokenizer.bos_id], SamplingParams(max_tokens=2, temperature=0))

    def close(self) -> None:
        """End every request; later calls are refused."""
        with self._lock:
            self._closed = True
            for sequence in self._scheduler.all():
                sequence.fail(RuntimeError("the engine was closed"))
                self._scheduler.remove(sequence)

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    # From a request to its end

    def _request(
        self,
        prompt: Prompt,
        params: SamplingParams | None,
        *,
        eos_ids: frozenset[int] | None = None,
        score: bool = False,
    ) -> Request:
        if self._closed:
            raise RuntimeError("the engine is closed")
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):
            raise ValueError(f"params must be a SamplingParams, got {type(params).__name__}")
        params.check_token_ids(len(self.tokenizer))
        text, ids = prompts.encode(prompt, self.tokenizer, self.config.vocab_size)
        prompts.check_length(len(ids), params.min_tokens, self.max_seq_len, score=score)
        seed = secrets.randbits(63) if params.seed is None else params.seed
        sequences = [
            TokenSequence(
                prompt_ids=ids,
                params=params,
                tokenizer=self.tokenizer,
                eos_ids=self._eos_ids if eos_ids is None else eos_ids,
                max_seq_len=self.max_seq_len,
                seed=(int(seed) + index) & INT64_MAX,
                index=index,
                score_only=score,
            )
            for index in range(params.n)
        ]
        return Request(f"request-{next(self._request_numbers)}", text, sequences)

    def _add(self, request: Request) -> None:
        with self._lock:
            if self._closed:
                raise RuntimeError("the engine is closed")
            request.start()
            for sequence in request.sequences:
                self._scheduler.add(sequence)

    def _cancel(self, request: Request) -> None:
        with self._lock:
            for sequence in request.sequences:
                sequence.abort()
                self._scheduler.remove(sequence)

    def _run(self, requests: list[Request], show: bool) -> list[RequestOutput]:
        """The outputs of requests that are run to their ends together."""
        waiting = list(requests)
        try:
            for request in requests:
                self._add(request)
            with tqdm(total=len(requests), disable=not show, unit="prompt") as progress:
                while waiting:
                    with self._lock:
                        if not all(request.finished for request in waiting):
                            self._step()
                    if failed := [request.error for request in waiting if request.error]:
                        raise failed[0]
                    still = [request for request in waiting if not request.finished]
                    progress.update(len(waiting) - len(still))
                    waiting = still
        finally:
            for request in waiting:
                self._cancel(request)
        return [request.output() for request in requests]

    def _deltas(self, request: Request) -> Iterator[Delta]:
        """The deltas of a request as they come; closing the iterator cancels it."""
        try:
            self._add(request)
            while True:
                for sequence in request.sequences:
                    while sequence.deltas:
                        yield sequence.deltas.popleft()
                if request.error is not None:
                    raise request.error
                with self._lock:
                    if request.finished and not any(s.deltas for s in request.sequences):
                        return
                    if not any(s.deltas for s in request.sequences):
                        self._step()
        finally:
            self._cancel(request)

    # Steps; the caller holds the lock

    @torch.inference_mode()
    def _step(self) -> None:
        """Prefill one sequence that has a slot and no token yet, then one token for all that have.

        A step that Ctrl-C interrupts is made again: until a sequence has its token, nothing that
        it did counts.
        """
        if self._stepping:
            raise RuntimeError("a logits processor must not call its own engine")
        self._stepping = True
        try:
            with torch.accelerator.device_index(self.model.device.index):  # where Triton launches
                self._scheduler.admit()
                if fresh := [s for s in self._scheduler.running if not s.output_ids]:
                    self._guarded(self._prefill, fresh[:1])
                if begun := [s for s in self._scheduler.running if s.output_ids]:
                    self._guarded(self._decode, begun)
        finally:
            self._stepping = False

    def _guarded(self, work: Callable, sequences: list[TokenSequence]) -> None:
        """Do `work`; where it fails, the sequences concerned end with the reason, and no others."""
        try:
            work(sequences)
        except Exception as error:
            for sequence in sequences:
                sequence.fail(error)
        finally:
            for sequence in sequences:
                if sequence.finished:
                    self._scheduler.remove(sequence)

    def _prefill(self, sequences: list[TokenSequence]) -> None:
        (sequence,) = sequences
        assert sequence.slot is not None
        ids = torch.tensor(sequence.prompt_ids, device=self.model.device)
        hidden = self.model.prefill(ids, self.cache, sequence.slot)  # [T, D]
        if sequence.score_only:
            sequence.finish_scored(prompt_scores(self.model, hidden, ids))
            return
        if (top := sequence.params.prompt_logprobs) is not None:
            sequence.prompt_logprobs = prompt_logprobs(self.model, hidden, ids, top, self.tokenizer)
        self._sampler.admit(sequence.slot, sequence)
        self._choose(self.model.logits(hidden[-1:]), sequences)

    def _decode(self, sequences: list[TokenSequence]) -> None:
        device = self.model.device
        slots = torch.tensor([s.slot for s in sequences], device=device)
        tokens = torch.tensor([s.output_ids[-1] for s in sequences], device=device)
        positions = torch.tensor([s.length - 1 for s in sequences], device=device)
        self._choose(self.model.decode(tokens, self.cache, slots, positions), sequences)

    def _choose(self, logits: Tensor, sequences: list[TokenSequence]) -> None:
        """Give each sequence its next token: logits [B, V] of B sequences."""
        positions = torch.tensor([s.length for s in sequences], device=logits.device)
        chosen, possible = self._sampler.choose(logits, sequences, positions)
        for row, (sequence, token_id) in enumerate(zip(sequences, chosen.tolist(), strict=True)):
            if sequence.finished:  # a logits processor failed
                continue
            if not possible[row]:
                sequence.fail(ValueError("no token is left: logits are NaN, or all are banned"))
                continue
            entry = None
            if (top := sequence.params.logprobs) is not None:
                one = slice(row, row + 1)
                entry = describe_tokens(logits[one], chosen[one], top, self.tokenizer)[0]
            try:
                self._sampler.count(sequence, token_id)
                sequence.append(token_id, entry)
            except BaseException:  # Ctrl-C: with half a token taken, it cannot go on
                sequence.fail(RuntimeError("interrupted in the midst of a token"))
                raise
