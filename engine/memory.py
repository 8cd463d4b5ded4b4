"""The memory that an engine takes of a device, and the sizes that fit it.

`Build` says what an engine is made of, except its sizes; its estimates follow from the config
alone: no tensor is made.  `Build.choose` turns "auto" into the number of slots and their length:
first fewer slots, then shorter ones.
"""

import os
import re
from bisect import bisect_right
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from gemcut.engine.activation_memory import CUBLAS_BYTES, decode_bytes, prefill_bytes, states_bytes
from gemcut.engine.checks import check_int, shorten
from gemcut.engine.config.model_config import ModelConfig
from gemcut.engine.execution.cache import PREFILL_CHUNK, cache_bytes, ring_of
from gemcut.engine.execution.cuda_graphs import can_be_captured
from gemcut.engine.execution.prefill_chunks import next_chunk, padded_sizes
from gemcut.engine.execution.weight_layouts import Layouts
from gemcut.engine.execution.weights import fused_shapes
from gemcut.engine.placement import choose_cache_dtype, is_plain_torch
from gemcut.kernels import cpu
from gemcut.kernels.cpu_products import packs
from gemcut.kernels.cpu_quantized import packed_bytes

MEMINFO = Path("/proc/meminfo")
# Of the free memory, for an engine whose size is chosen here.  A CPU's memory is for all processes;
# on a GPU the estimate may be 5 % too low.
MEMORY_SHARE = {"cpu": 0.8, "cuda": 0.95}
DEFAULT_BATCH_SIZE = 8  # the engine's
AUTO_BATCH_SIZES = (16, 8, 4, 2, 1)
MAX_BATCH_SIZE = 4096
SHORTEST = 2  # a prompt and what comes of it


@dataclass(frozen=True)
class Estimate:
    """Bytes of an engine at its peak, by kind."""

    weights: int  # a tied embedding counts once, unless the head is packed
    kv_cache: int
    state: int  # sampling settings and marks, by slot
    activations: int  # of the largest step: a chunk of a prefill, or one token in each slot
    graphs: int  # the activations and outputs that captured steps keep for themselves

    @property
    def total(self) -> int:
        return sum(getattr(self, each.name) for each in fields(self))


@dataclass(frozen=True)
class Build:
    """An engine except its sizes."""

    config: ModelConfig
    device: torch.device
    dtype: torch.dtype
    ops: ModuleType
    prefill_chunk: int = PREFILL_CHUNK
    reuse_prefixes: bool = True
    cuda_graphs: bool = True
    layouts: Layouts = field(default_factory=dict)  # of the weights that are quantised
    kv_cache_dtype: str = "auto"

    @property
    def cache_dtype(self) -> torch.dtype:
        """The dtype of the KV cache; ValueError where it is unknown, or not of this device."""
        return choose_cache_dtype(self.kv_cache_dtype, self.dtype, self.device)

    @property
    def has_long_chunks(self) -> bool:
        """Whether chunks are longer while no sequence decodes (prefill_chunks.py).

        Not where every run must compute the same.  Nor on ops in plain torch, which hold the scores
        of a whole chunk: of 2048 tokens, 4 to 16 times those of 512.
        """
        return self.reuse_prefixes and not is_plain_torch(self.ops)

    def estimate(self, max_batch_size: int, max_seq_len: int) -> Estimate:
        """The bytes of so many slots of so many tokens, with everything beside them."""
        config, dtype = self.config, self.dtype
        chunk = self.prefill_chunk
        ring = ring_of(config, max_seq_len, chunk)
        longest = next_chunk(chunk, ring, 0, max_seq_len, may_be_long=self.has_long_chunks)
        prefill = prefill_bytes(config, dtype, longest, max_seq_len, self.ops, self.cache_dtype)
        decode = decode_bytes(
            config, dtype, max_batch_size, max_seq_len, self.ops, self.cache_dtype
        )
        on_gpu = self.device.type == "cuda"
        return Estimate(
            weights=self.weight_bytes() + self._packing_bytes(),
            kv_cache=cache_bytes(config, max_batch_size, max_seq_len, chunk, self.cache_dtype),
            state=state_bytes(max_batch_size, config.vocab_size),
            activations=max(prefill, decode) + (CUBLAS_BYTES if on_gpu else 0),
            graphs=self._graph_bytes(decode, max_seq_len),
        )

    def weight_bytes(self) -> int:
        """The bytes of all weights as they are loaded; a tied head counts once."""
        return sum(
            layout.nbytes(shape)
            if (layout := self.layouts.get(place)) is not None
            else torch.Size(shape).numel() * self.dtype.itemsize
            for place, shape in fused_shapes(self.config).items()
        )

    def _packing_bytes(self) -> int:
        """What the form that a CPU reads takes beside the stored weights (kernels/cpu.py).

        Matrices of layers are replaced by it, a head keeps both.
        """
        if self.ops is not cpu:
            return 0
        head = (None, "embedding" if self.config.tie_word_embeddings else "lm_head")
        added = 0 if head in self.layouts else self._second_head_bytes()
        shapes = fused_shapes(self.config)
        for place, layout in self.layouts.items() if packs((64, 64), self.dtype) else ():
            N, D = shape = shapes[place]
            size = D // layout.groups(D)
            packed = packed_bytes(layout.format, (N, D), size, layout.has_zero_points)
            if packed and place[0] is not None:
                packed -= layout.nbytes(shape)
            added += packed if place[0] is not None or place == head else 0
        return added

    def _second_head_bytes(self) -> int:
        """What a plain head takes where products read it packed."""
        shape = self.config.vocab_size, self.config.hidden_size
        return packs(shape, self.dtype) * shape[0] * shape[1] * self.dtype.itemsize

    def _graph_bytes(self, decode: int, max_seq_len: int) -> int:
        """What captured steps keep, of which a decode step takes `decode` bytes."""
        if not (self.cuda_graphs and can_be_captured(self.device, self.ops)):
            return 0
        config, dtype = self.config, self.dtype
        sizes = padded_sizes(config, self.prefill_chunk, max_seq_len)
        if not sizes:
            return decode
        prefill = prefill_bytes(config, dtype, sizes[-1], max_seq_len, self.ops)
        # what is freed serves the next graph; the states of each chunk stay, and the captures'
        # stream has cuBLAS's memory a second time
        return max(decode, prefill) + states_bytes(config, dtype, sum(sizes)) + CUBLAS_BYTES

    def longest_slot(self, max_batch_size: int, budget: float) -> int:
        """The most tokens, up to the model's limit, that each slot can hold; 0 if none fits."""
        return bisect_right(
            range(1, self.config.context_length + 1),
            budget,
            key=lambda length: self.estimate(max_batch_size, length).total,
        )

    def most_slots(self, max_seq_len: int, budget: float) -> int:
        """The most slots of so many tokens; 0 if none fits."""
        return bisect_right(
            range(1, MAX_BATCH_SIZE + 1),
            budget,
            key=lambda slots: self.estimate(slots, max_seq_len).total,
        )

    def choose(
        self, max_batch_size: Any, max_seq_len: Any, *, loaded: bool = False
    ) -> tuple[int, int]:
        """The slots of an engine and the tokens that each holds, as asked for or as memory allows.

        `loaded` says that the weights are there already.  ValueError names a size out of range,
        MemoryError what is needed, what is free and what would fit.
        """
        self.check(max_batch_size, max_seq_len)
        free = free_bytes(self.device)
        there = self.estimate(1, SHORTEST).weights if loaded else 0
        share = MEMORY_SHARE[self.device.type]
        budget = there + share * free

        length = self.config.context_length if is_auto(max_seq_len) else int(max_seq_len)
        if is_auto(max_batch_size):
            fitting = self.most_slots(length, budget)
            slots = next((size for size in AUTO_BATCH_SIZES if size <= fitting), 1)
        else:
            slots = int(max_batch_size)
        limit = free  # what was asked for may take all of it; what is chosen here, its share
        if is_auto(max_seq_len):
            length, limit = max(SHORTEST, self.longest_slot(slots, budget)), share * free
        needed = self.estimate(slots, length).total - there
        if needed > limit:
            of_it = "" if limit == free else f", of which {readable(limit)} may be taken"
            raise MemoryError(
                f"{_slots(slots, length)} need {readable(needed)}, but {self.device} has "
                f"{readable(free)} free{of_it}; {self._what_fits(slots, length, budget)}"
            )
        return slots, length

    def check(self, max_batch_size: Any, max_seq_len: Any) -> None:
        """Nothing, or ValueError where a size is neither "auto" nor an integer in its range."""
        limit = self.config.context_length
        for name, size, low, high in (
            ("max_batch_size", max_batch_size, 1, MAX_BATCH_SIZE),
            ("max_seq_len", max_seq_len, SHORTEST, limit),
        ):
            if isinstance(size, str) and size != "auto":
                raise ValueError(f"{name} {shorten(size)} is neither an integer nor 'auto'")
            if not is_auto(size) or (size is None and name == "max_batch_size"):
                check_int(name, size, low, high)
        check_int("prefill_chunk", self.prefill_chunk, 1, 2**20)

    def _what_fits(self, slots: int, length: int, budget: float) -> str:
        """The nearest sizes that fit, as the end of a sentence."""
        would = []
        if fewer := self.most_slots(length, budget):
            would.append(_slots(fewer, length))
        if (shorter := self.longest_slot(slots, budget)) >= SHORTEST:
            would.append(_slots(slots, shorter))
        if not would and (longest := self.longest_slot(1, budget)) >= SHORTEST:
            would.append(_slots(1, longest))
        return f"{' or '.join(would)} would fit" if would else "no size of this model would fit"


def _slots(count: int, length: int) -> str:
    return f"{count} slot{'s' if count > 1 else ''} of {length} tokens"


def readable(num_bytes: float) -> str:
    """A size as people read it."""
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.2f} MB"


def state_bytes(max_batch_size: int, vocab_size: int) -> int:
    """Bytes of slot_state.py's tensors: by slot, and by slot and vocabulary entry."""
    numbers = 6 * 8 + 6 * 4  # int64, float32
    entry = 4 + 1 + 4 + 1  # count, in_prompt, bias, is_end
    return (max_batch_size + 1) * (numbers + entry * vocab_size)  # and a row for padding


def tokenizer_bytes(vocab_size: int, is_json: bool) -> int:
    """About what a tokenizer takes of the host: pieces as strings, by id, and those of its library.

    By piece, measured with Gemma 3's 262144: 394 to 430 bytes of a tokenizer.model or a GGUF file,
    606 of a tokenizer.json.
    """
    return (606 if is_json else 412) * vocab_size


def is_auto(size: Any) -> bool:
    """Whether a size is to be chosen here: None or "auto"."""
    return size is None or (isinstance(size, str) and size == "auto")


def free_bytes(device: torch.device) -> int:
    """Memory that can still be allocated on the device."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if MEMINFO.exists():  # counts what the page cache would give back, a checkpoint just read, say
        (available,) = re.findall(r"^MemAvailable:\s+(\d+) kB$", MEMINFO.read_text(), re.MULTILINE)
        return int(available) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
