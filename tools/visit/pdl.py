"""Chains of the products o and down, plain and by dependent launch, with operands as is or swapped.

A chain is one product of each layer of gemma-2-2b, o or down, each reading what the one before it
wrote, in one CUDA graph; the weights of all layers exceed L2.  Every form is held
to the oracle first.  A chain by dependent launch must end in the same bits as the plain one.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from gemcut import kernels
from gemcut.bench.measure.timing import Spread, capture, time_replays
from gemcut.tools.launches import Launch, recorded
from gemcut.tools.visit.block import Visit
from gemcut.tools.visit.dependent_launch import SKINNY, chained, partials, swapped
from gemcut.tools.visit.ops import bits

# rows and columns of the weight, slices of D in the swapped form
SHAPES = {"o": (2304, 2048, 512), "down": (2304, 9216, 1536)}
CPU_SHAPES = {"o": (48, 64, 32), "down": (48, 96, 48)}
LAYERS, CPU_LAYERS = 26, 2
REPLAYS, ROUNDS = 10, 12
PREFETCHES = (0, 4, 8)  # pieces of 512 bytes of each row; 8 pieces are 2048 columns

Product = Callable[[Tensor, Tensor, Tensor], object]  # x, w, y


def run(visit: Visit) -> None:
    """Keep records of each form's error and, on a GPU, of its time."""
    for name, (N, D, split_d) in (SHAPES if visit.on_gpu else CPU_SHAPES).items():
        torch.manual_seed(0)
        layers = LAYERS if visit.on_gpu else CPU_LAYERS
        weights = [
            torch.randn(N, D, device=visit.device, dtype=torch.bfloat16).mul_(D**-0.5)
            for _ in range(layers)
        ]
        chain = Chain(visit, name, weights)
        for form, product in forms(visit, weights[0], split_d).items():
            case = f"{name} {form}"
            with visit.attempt(case):
                chain.check(case, product)
                chain.time(case, product)


def forms(visit: Visit, weight: Tensor, split_d: int) -> dict[str, Product]:
    """The forms of a product by name: each writes x @ w.T into y."""

    def skinny(x: Tensor, w: Tensor, y: Tensor) -> None:
        kernels.skinny_linear(x, w)  # returns a new tensor: its chain is only one of order

    found: dict[str, Product] = {"skinny_linear": skinny}
    x = torch.empty(1, weight.shape[1], device=weight.device, dtype=weight.dtype)
    room = partials(x, weight, split_d)
    for tile_name, tile in SKINNY.items() if visit.on_gpu else [("16x16", CPU_TILE)]:
        found[f"{tile_name} plain"] = partial(chained, tile=tile, dependent=False, prefetch=0)
        for prefetch in PREFETCHES if visit.on_gpu else ():
            found[f"{tile_name} dependent, prefetch {prefetch}"] = partial(
                chained, tile=tile, dependent=True, prefetch=prefetch
            )
    by_splits = partial(swapped, partial=room, split_d=split_d)
    found["swapped plain"] = partial(by_splits, dependent=False, prefetch=0)
    for prefetch in (0, 2) if visit.on_gpu else ():
        name = f"swapped dependent, prefetch {prefetch}"
        found[name] = partial(by_splits, dependent=True, prefetch=prefetch)
    return found


def record(visit: Visit, arch: str) -> set[Launch]:
    """What the forms launch: recorded, not made."""
    with recorded(arch) as found:
        for N, D, split_d in SHAPES.values():
            weight = torch.empty(N, D, device=visit.device, dtype=torch.bfloat16)
            x, y = weight.narrow(0, 0, 1), torch.empty(1, N, device=visit.device).bfloat16()
            for product in forms(visit, weight, split_d).values():
                product(x, weight, y)
    return found


CPU_TILE = {"BLOCK_N": 16, "BLOCK_D": 32, "num_warps": 4, "num_stages": 2}


class Chain:
    """One product of each layer, each of what the one before it wrote."""

    def __init__(self, visit: Visit, name: str, weights: Sequence[Tensor]) -> None:
        self.visit, self.name, self.weights = visit, name, weights
        N, D = weights[0].shape
        self.width = max(N, D)
        self.begin = torch.randn(1, self.width, device=visit.device, dtype=torch.bfloat16)
        self.ends: dict[str, Tensor] = {}  # of plain forms, by tile

    def calls(self, product: Product, a: Tensor, b: Tensor) -> list[Callable[[], object]]:
        """The chain's launches, to and fro between two buffers [1, width]."""
        N, D = self.weights[0].shape
        buffers, found = (a, b), []
        for i, weight in enumerate(self.weights):
            x, y = buffers[i % 2], buffers[(i + 1) % 2]
            found.append(partial(product, x[:, :D], weight, y[:, :N]))
        return found

    def check(self, case: str, product: Product) -> None:
        """Check the first product against the oracle, and the chain's end against the plain one."""
        if case.endswith("skinny_linear"):  # the block before has checked it
            return
        weight = self.weights[0]
        N, D = weight.shape
        x = self.begin[:, :D]
        y = torch.full((1, N), torch.nan, device=x.device, dtype=x.dtype)
        product(x, weight, y)
        exact = x.double() @ weight.double().T
        ulp = torch.finfo(x.dtype).eps * exact.abs().max().item()
        eager = (F.linear(x, weight).double() - exact).abs().max().item()
        budget = 2 * eager + 2 * ulp
        error = (y.double() - exact).abs().max().item()
        told = f"error {error:.2e}, where {budget:.2e} is allowed"
        facts = {"error": error, "budget": budget}
        self.visit.check(f"{case}, checked", error <= budget, told, **facts)
        self.compare_ends(case, product)

    def compare_ends(self, case: str, product: Product) -> None:
        """Check that dependent launch changes no bit of the chain's end, in several replays."""
        a, b = self.begin.clone(), self.begin.clone()
        calls = self.calls(product, a, b)

        def chain() -> None:
            a.copy_(self.begin)
            b.copy_(self.begin)
            for call in calls:
                call()

        replay: Callable[[], object] = chain
        if self.visit.on_gpu:
            replay = capture([chain]).replay
        ends = []
        for _ in range(REPLAYS):
            replay()
            ends.append(bits((a, b)[len(calls) % 2]).clone())
        tile = case.rpartition(" dependent")[0] or case.removesuffix(" plain")
        plain = self.ends.setdefault(tile, ends[0])
        differing = sum(not torch.equal(end, plain) for end in ends)
        told = f"{differing} of {len(ends)} replays end in other bits than the plain chain"
        self.visit.check(f"{case}, the chain's end", differing == 0, told)

    def time(self, case: str, product: Product) -> None:
        """Keep a record of a product's time in the chain, on a GPU only."""
        if not self.visit.on_gpu:
            return
        a, b = self.begin.clone(), self.begin.clone()
        replay = capture(self.calls(product, a, b)).replay
        count = len(self.weights)
        times = time_replays(replay, REPLAYS, ROUNDS, self.visit.device)
        us = Spread.of([each / count for each in times])
        gbps = self.weights[0].nbytes / us.median / 1e3
        read = self.visit.read_gbps
        share = "" if read is None else f" ({gbps / read:.2f} of reading)"
        line = f"{case}: {us.median:.2f} us ({us.low:.2f} - {us.high:.2f}), {gbps:.0f} GB/s{share}"
        self.visit.add(case, product_us=us.median, gbps=gbps, line=line)
