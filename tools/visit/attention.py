"""Attention at the lengths that a step and a prefill have, with a few tiles each.

Decode attention of one row at 1k, 8k and 32k tokens, through its launcher: by its rule, and with
three lengths of a split where the kernel has that constant.  Prefill of 4k tokens with three tiles,
with the model's softcap and without it, there beside scaled_dot_product_attention.  At 8k and with
the softcap also over a paged cache, whose bits must be those of slots.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from gemcut import kernels
from gemcut.bench.measure.ceilings import Cost, measure_ceilings
from gemcut.bench.measure.timing import Call
from gemcut.bench.ops.cases import Arguments, Case
from gemcut.bench.ops.kernels import Bench, measure_case
from gemcut.bench.ops.prefill_cases import visible_pairs
from gemcut.bench.ops.torch_peers import OpPeer, torch_peers
from gemcut.kernels import decode_attention
from gemcut.kernels.gpu_arch import arch_of
from gemcut.kernels.tiles import Tile
from gemcut.tools.launches import Launch, applied, recorded
from gemcut.tools.tuning.search_space import looked_up
from gemcut.tools.visit.block import Visit
from gemcut.tools.visit.ops import bits, shapes_of
from gemcut.tools.visit.report import CEILINGS, ceilings_of

MODELS, CPU_MODELS = ("gemma-2-2b", "gemma-2-9b"), ("demo",)
CONTEXTS, CPU_CONTEXTS = (1024, 8192, 32768), (24,)
TOKENS, CPU_TOKENS = 4096, 16
SPLITS = (32, 64, 128)
TILES = ((128, 64, 8, 2), (128, 32, 8, 3), (64, 32, 4, 2))
TILE_NAMES = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")
ROUNDS, CPU_ROUNDS = 7, 1
BLOCK_SIZE = 16  # tokens of a block; the common default


def run(visit: Visit) -> None:
    """Keep a record for each tile at each size, checked and then timed in turns."""
    ceilings = ceilings_of(visit.out)
    if not all(name in ceilings for name in CEILINGS):
        ceilings = measure_ceilings(visit.device, torch.bfloat16)
    rounds = ROUNDS if visit.on_gpu else CPU_ROUNDS
    bench = Bench(visit.device, torch.bfloat16, kernels, (), rounds, ceilings)
    for model in MODELS if visit.on_gpu else CPU_MODELS:
        for case in find_cases(visit, model):
            with visit.attempt(case.name):
                measure(visit, case, bench)


def record(visit: Visit, name: str) -> set[Launch]:
    """What the cases launch with each tile: recorded, not made."""
    found: set[Launch] = set()
    for model in MODELS:
        for case in find_cases(visit, model):
            keys = looked_up(case, name)
            if is_paged(visit, case):
                with recorded(name) as launches:
                    getattr(kernels, case.op)(**in_blocks(case.make()))
                    found |= launches
            for tile in ({}, *tiles_of(case)):
                with recorded(name) as launches, applied(name, keys[0], tile):
                    getattr(kernels, case.op)(**case.make())
                    found |= launches
    return found


def find_cases(visit: Visit, model: str) -> Iterator[Case]:
    """The cases of a model's global layers, which hold any length."""
    for context in CONTEXTS if visit.on_gpu else CPU_CONTEXTS:
        yield decode_case(visit, model, context)
    softcap = shapes_of(model, visit.device).config.attn_softcap
    for cap in dict.fromkeys((softcap, None)):
        yield prefill_case(visit, model, TOKENS if visit.on_gpu else CPU_TOKENS, cap)


def decode_case(visit: Visit, model: str, context: int) -> Case:
    """One row at the end of `context` tokens."""
    s = shapes_of(model, visit.device)
    settings = {"scale": s.config.scale, "softcap": s.config.attn_softcap, "sliding_window": None}
    rows, keys = s.HQ * s.K * s.itemsize, 2 * context * s.HK * s.K * s.itemsize

    def make() -> Arguments:
        return {
            "q": s.values(1, 1, s.HQ, s.K),
            "k_cache": s.values(1, s.HK, context, s.K),
            "v_cache": s.values(1, s.HK, context, s.K),
            "slots": s.index(0),
            "positions": s.index(context - 1),
            **settings,
        }

    cost = Cost(rows + keys + 16, rows, 4 * s.HQ * s.K * context, True)
    return Case(
        "attention_decode",
        model,
        "decode",
        {"context": context, "softcap": settings["softcap"]},
        cost,
        make,
    )


def prefill_case(visit: Visit, model: str, tokens: int, softcap: float | None) -> Case:
    """A whole prompt in one call."""
    s = shapes_of(model, visit.device)
    settings = {"scale": s.config.scale, "softcap": softcap, "sliding_window": None}

    def make() -> Arguments:
        return {
            "q": s.values(tokens, s.HQ, s.K),
            "k_cache": s.values(1, s.HK, tokens, s.K),
            "v_cache": s.values(1, s.HK, tokens, s.K),
            "slots": s.index(0),
            "starts": s.index(0),
            "cu_seqlens": s.index(0, tokens),
            **settings,
        }

    rows = tokens * s.HQ * s.K * s.itemsize
    keys = 2 * tokens * s.HK * s.K * s.itemsize
    pairs = visible_pairs(0, tokens, tokens)
    cost = Cost(rows + keys + 32, rows, 4 * s.HQ * s.K * pairs, True)
    cap = "no softcap" if softcap is None else "softcap"
    facts = {"tokens": tokens, "variant": cap, "softcap": softcap}
    return Case("attention_prefill", model, "prefill", facts, cost, make)


def measure(visit: Visit, case: Case, bench: Bench) -> None:
    """Keep records of one case: the rule, its tiles, and torch where it computes the same."""
    by_name = {"gemcut": tiled(visit, case, {})}
    for tile in tiles_of(case) if visit.on_gpu else ():
        name = " ".join(map(str, tile.values()))
        by_name[f"SPLIT={name}" if "SPLIT" in tile else name] = tiled(visit, case, tile)
    if is_paged(visit, case):
        with visit.attempt(f"{case.name} paged"):
            compare_paged(visit, case)
        settings = f"blocks of {BLOCK_SIZE}"
        by_name["paged"] = OpPeer(
            "gemcut", settings, lambda given: _build(case, "", {}, [], in_blocks(given))
        )
    by_name |= {n: p for n, p in torch_peers(case, visit.device).items() if n == "sdpa"}
    for record in measure_case(case, bench, by_name):
        name = f"{case.name} {'rule' if record['contestant'] == 'gemcut' else record['contestant']}"
        line = {}
        if "cold_us" in record:
            cold, rate = record["cold_us"], f"{record['gbps']:.0f} GB/s"
            if record["bound"] == "compute":
                rate = f"{record['tflops']:.0f} TFLOP/s"
            share = f"{record['share']:.2f} of {record['bound']}"
            line["line"] = f"{name}: {cold['median']:.1f} us, {rate}, {share}"
        rest = {k: v for k, v in record.items() if k not in ("case", "contestant", "status")}
        visit.add(name, record["status"], **rest, **line)


def is_paged(visit: Visit, case: Case) -> bool:
    """Whether a case is also run over a paged cache: one context, and the model's own softcap."""
    if case.op == "attention_decode":
        return case.facts["context"] in (CONTEXTS[1], *CPU_CONTEXTS)
    return case.facts["variant"] == "softcap"


def in_blocks(arguments: Arguments) -> Arguments:
    """The same call with its cache in blocks, in random order, as vLLM lays them."""
    slots, HK, C, K = arguments["k_cache"].shape
    N = -(-C // BLOCK_SIZE)
    device = arguments["k_cache"].device
    order = torch.randperm(slots * N, device=device)
    shape = (2, slots * N, BLOCK_SIZE, HK, K)
    both = torch.zeros(shape, dtype=arguments["k_cache"].dtype, device=device)
    for blocks, name in zip(both, ("k_cache", "v_cache"), strict=True):
        tokens = torch.zeros((slots, N * BLOCK_SIZE, HK, K), dtype=blocks.dtype, device=device)
        tokens[:, :C] = arguments[name].transpose(1, 2)
        blocks[order] = tokens.view(-1, BLOCK_SIZE, HK, K)
    k_cache, v_cache = both.unbind(0)
    tables = order.view(slots, N).to(torch.int32)
    return arguments | {"k_cache": k_cache, "v_cache": v_cache, "block_tables": tables}


def compare_paged(visit: Visit, case: Case) -> None:
    """Keep a record of whether blocks give the bits of slots."""
    op: Callable[..., torch.Tensor] = getattr(kernels, case.op)
    arguments = case.make()
    expected, found = op(**arguments), op(**in_blocks(arguments))
    count = int((bits(found) != bits(expected)).sum())
    told = f"{count} of {expected.numel()} numbers differ from those of slots"
    name = f"{case.name} paged"
    visit.check(name, count == 0, told, line=f"{name}: the bits of slots")


def tiles_of(case: Case) -> Iterator[Tile]:
    """The tiles laid over the rule; none where a kernel lacks the constant."""
    if case.op == "attention_prefill":
        for values in TILES:
            yield dict(zip(TILE_NAMES, values, strict=True))
    elif "SPLIT" in decode_attention.attention_decode_kernel.arg_names:
        for split in SPLITS:
            yield {"SPLIT": split}


def tiled(visit: Visit, case: Case, tile: Tile) -> OpPeer:
    """Gemcut's op with a tile laid over its rule."""
    name = arch_of(visit.device)
    build = partial(_build, case, name, tile, looked_up(case, name) if tile else [])
    return OpPeer("gemcut", "kernels", build)


def _build(case: Case, name: str, tile: Tile, keys: list, arguments: Arguments) -> Call:
    op: Callable[..., object] = getattr(kernels, case.op)
    if not tile:
        return partial(op, **arguments)

    def call() -> object:
        with applied(name, keys[0], tile):
            return op(**arguments)

    return call
