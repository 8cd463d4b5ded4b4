"""The search space of tools/tune.py: kernels at the shapes of models, and candidate tiles.

Which kernel looks up a tile at which shape is not listed here: each benchmark case is run once on
fake tensors, and what it asks of kernels/tiles.py is recorded.  A candidate is laid over the rule
where the kernels look, so that their own launchers run with it.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from random import Random
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.runtime.interpreter import InterpretedFunction

from gemcut import kernels
from gemcut.bench.ops.cases import Case, Grid, Shapes
from gemcut.bench.ops.decode_cases import decode_cases
from gemcut.bench.ops.prefill_cases import prefill_cases
from gemcut.engine.execution.cache import PREFILL_CHUNK
from gemcut.engine.info import find_config
from gemcut.kernels import tiles
from gemcut.kernels.interpreter import INTERPRETED
from gemcut.kernels.tiles import Key, Tile
from gemcut.tools.launches import Launch, applied, recorded

# rows of a decode step and tokens in the cache; tokens of a prompt, alone and as its last chunk
DECODE = Grid((1, 16), (1024, 8192), (), 1, PREFILL_CHUNK)
PREFILL = Grid((), (4096,), (4096,), 1, PREFILL_CHUNK)
# what became of a candidate, beside the words of bench/measure/report_file.py
UNTRIED, COMPILED, DROPPED, THE_RULE = "untried", "compiled", "dropped", "same as the rule"

Times = dict[str, list[float]]  # microseconds by name, a value for each round


@dataclass
class Candidate:
    """A tile that is tried, laid over the rule; without constants it is the rule itself."""

    tile: Tile
    status: str = UNTRIED
    detail: str = ""
    registers: int = 0  # the most of its launches, and so on
    spill_bytes: int = 0
    shared_bytes: int = 0
    predicted_us: list[float] = field(default_factory=list)  # of each decode case
    predicted_ratio: float = 1.0  # to the rule's
    us: Times = field(default_factory=dict)
    ratios: list[float] = field(default_factory=list)  # of its time to the rule's, by round

    @property
    def name(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.tile.items()) or "the rule"


@dataclass
class Subject:
    """A kernel at one shape, with the cases that its tiles are timed at."""

    key: Key
    cases: list[Case]
    candidates: list[Candidate]
    rule: Candidate = field(default_factory=lambda: Candidate({}))
    winner: Candidate | None = None  # the rule itself, where it stays; None: undecided

    @property
    def name(self) -> str:
        kernel, shape = self.key
        return f"{kernel} {' x '.join(map(str, shape))}"

    @property
    def models(self) -> list[str]:
        return list(dict.fromkeys(case.model for case in self.cases))

    def decode_cases(self) -> list[Case]:
        """The cases whose time can be predicted."""
        return [case for case in self.cases if case.phase == "decode"]

    def left(self) -> list[Candidate]:
        """The candidates that may still be tried."""
        return [c for c in self.candidates if c.status in (UNTRIED, COMPILED)]


def find_subjects(
    models: Sequence[str],
    names: Sequence[str],
    arch: str,
    device: torch.device,
    dtype: torch.dtype,
) -> list[Subject]:
    """The kernels of these names at all shapes of these models, in the order of the names.

    ValueError for an unknown model, or where no case asks for one of these kernels.
    """
    cases: dict[Key, list[Case]] = {}
    for model in models:
        shapes = Shapes(model, find_config(model), device, dtype)
        for case in (*decode_cases(shapes, DECODE), *prefill_cases(shapes, PREFILL)):
            if case.facts.get("variant") != "no softcap":  # which the model does not launch
                for key in looked_up(case, arch):
                    cases.setdefault(key, []).append(case)
    subjects = [
        Subject(key, cases[key], [Candidate(tile) for tile in candidate_tiles(key, arch)])
        for name in names
        for key in cases
        if key[0] == name
    ]
    if not subjects:
        raise ValueError(f"{', '.join(models)} launch none of {', '.join(names)}")
    return subjects


def looked_up(case: Case, arch: str) -> list[Key]:
    """The keys by which a case asks for tuned constants."""
    asked = _Asked()
    with dry_run(arch), mock.patch.dict(tiles.TUNED, {arch: asked}, clear=True):
        getattr(kernels, case.op)(**case.make())
    return list(asked)


class _Asked(dict[Key, Tile]):
    """A table without tiles that notes what it is asked for."""

    def get(self, key: Key, default: Any = None) -> Any:
        self[key] = {}
        return default


def dry_run(arch: str) -> AbstractContextManager[set[Launch]]:
    """Fake tensors, whose launches are recorded where they would be compiled, and are not made."""
    return _uninterpreted() if INTERPRETED else recorded(arch)


@contextmanager
def _uninterpreted() -> Iterator[set[Launch]]:
    with FakeTensorMode(), mock.patch.object(InterpretedFunction, "run"):
        yield set()


def find_launches(subject: Subject, tried: Sequence[Tile], arch: str) -> list[set[Launch]]:
    """What the cases of a subject launch with each of these tiles."""
    found: list[set[Launch]] = [set() for _ in tried]
    for case in subject.cases:
        with dry_run(arch) as launches:
            arguments = case.make()
            for tile, wanted in zip(tried, found, strict=True):
                launches.clear()
                with applied(arch, subject.key, tile):
                    getattr(kernels, case.op)(**arguments)
                wanted |= launches
    return found


def candidate_tiles(key: Key, arch: str) -> list[Tile]:
    """What is tried at a shape: first the tile in use, where one was measured, then the others.

    These in an order that spreads over all of them: the time may be up after any.
    """
    name, shape = key
    found = list(CANDIDATES[name](shape))
    Random(0).shuffle(found)
    in_use = tiles.TUNED.get(arch, {}).get(key, {})
    return ([in_use] if in_use else []) + [tile for tile in found if tile != in_use]


# Bytes of weights that a program keeps on their way, and least of all programs of a processor: at a
# latency of 0.7 us that is 4.8 TB/s over 132 of them.
IN_FLIGHT = range(16 << 10, (128 << 10) + 1)
LEAST_IN_FLIGHT = 32 << 10
# what bounds the programs of a processor before anything is compiled, on archs that have most
PROCESSOR_SHARED, MOST_AT_ONCE = 228 << 10, 8
BLOCK_M = 16
THREAD_BYTES = range(32, 256 + 1)  # that a thread loads in a step


def _products(
    block: str, rows: int, splits: Sequence[int], shape: tuple[int, ...]
) -> Iterator[Tile]:
    """Tiles of a product of few rows, in which a program streams `rows` rows for each of its block.

    64 rows are a warpgroup's; a sum over columns may be cut into `splits` parts.  Of many cuts only
    those tiles are tried that were among an H200's best: no 32 rows, four warps.
    """
    is_cut = len(splits) > 1
    sizes, warps = ((64, 128), (4,)) if is_cut else ((32, 64, 128), (4, 8))
    stages = (3, 4, 6) if is_cut else (3, 4, 5, 6)
    for size, block_d, num_warps, num_stages, parts in product(
        sizes, (64, 128, 256), warps, stages, splits
    ):
        step = 2 * size * block_d
        in_flight = step * (num_stages - 1)
        shared = 2 * (size + BLOCK_M) * block_d * num_stages + 1024
        at_once = min(PROCESSOR_SHARED // shared, MOST_AT_ONCE)
        if step // (32 * num_warps) not in THREAD_BYTES or in_flight not in IN_FLIGHT:
            continue
        if at_once * in_flight >= LEAST_IN_FLIGHT and parts * block_d <= shape[1]:
            tile = {block: size // rows, "BLOCK_D": block_d, **_options(num_warps, num_stages)}
            yield tile | ({"SPLITS": parts} if is_cut else {})


def _decode_attention(shape: tuple[int, ...]) -> Iterator[Tile]:
    """A split holds whole tiles of keys: the kernel masks the ends of a row alone."""
    head_dim = shape[2]
    for split, block_n, (num_warps, maxnreg), num_stages in product(
        (32, 64, 128), (16, 32, 64, 128), ((2, 255), (4, 168), (4, 255), (8, 255)), (2, 3, 4)
    ):
        step = 4 * block_n * head_dim  # of keys and values; at most 256 bytes a thread
        in_flight = step * (num_stages - 1)  # three programs share a processor
        if block_n <= split and 32 << 10 <= in_flight <= 64 << 10 and num_warps * 8192 >= step:
            options = _options(num_warps, num_stages)
            yield {"SPLIT": split, "BLOCK_N": block_n, **options, "maxnreg": maxnreg}


def _prefill_attention(_: tuple[int, ...]) -> Iterator[Tile]:
    for block_m, block_n, num_warps, num_stages in product(
        (64, 128), (32, 64, 128), (4, 8), (1, 2, 3)
    ):
        yield {"BLOCK_M": block_m, "BLOCK_N": block_n, **_options(num_warps, num_stages)}


def _options(num_warps: int, num_stages: int) -> Tile:
    return {"num_warps": num_warps, "num_stages": num_stages}


# in the order of the bytes that a decode step reads for them
CANDIDATES = {
    "linear_geglu": partial(_products, "BLOCK_F", 2, (1,)),
    "skinny_linear": partial(_products, "BLOCK_N", 1, (1, 2, 4, 8, 16)),
    "lm_head": partial(_products, "BLOCK_V", 1, (1,)),
    "linear_rope_and_store": partial(_products, "BLOCK_I", 2, (1,)),
    "attention_decode": _decode_attention,
    "attention_prefill": _prefill_attention,
}
