"""How fast a CPU computes a model's products, by each way that torch has for them.

    python -P -m gemcut.tools.cpu_products --models gemma-3-270m --rows 1 8 64 512 --threads 1

A line for each matrix of a layer and for a part of the head: microseconds, the least of many calls,
each with the next of several copies of the matrix, so that it is read from memory as in a model.
`kernels/cpu_products.py` chooses by this table (bench/NOTES.md).
"""

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gemcut.engine import PUBLISHED
from gemcut.kernels.cpu_products import BLOCKS, linear, packed

COPIES_BYTES, HEAD_ROWS = 150e6, 65536
Way = Callable[[Any, Any], Any]  # x, weight


def by_onednn(x: Tensor, weight: Tensor) -> Tensor:
    """The product by oneDNN, of a plain weight or a packed one."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def in_blocks(x: Tensor, weight: Tensor) -> Tensor:
    """The product of one row as a batch of products."""
    column = x.mT.expand(BLOCKS, -1, 1)
    return torch.bmm(weight.view(BLOCKS, -1, weight.shape[1]), column).view(1, -1)


def from_the_weight(x: Tensor, weight: Tensor) -> Tensor:
    """The transposed product, transposed."""
    return torch.mm(weight, x.mT).mT.contiguous()


def matrices(model: str) -> Iterator[tuple[str, int, int]]:
    """Name, rows and columns of the matrices of a layer, and of a part of the head."""
    config = PUBLISHED[model]
    D, F_, K = config.hidden_size, config.intermediate_size, config.head_dim
    yield "qkv", (config.num_q_heads + 2 * config.num_kv_heads) * K, D
    yield "o", D, config.num_q_heads * K
    yield "gate_up", 2 * F_, D
    yield "down", D, F_
    yield "head", min(HEAD_ROWS, config.vocab_size), D


def measured(N: int, D: int, M: int, dtype: torch.dtype, seconds: float) -> dict[str, float]:
    """Seconds of a product of M rows with a matrix [N, D], by each way."""
    one = torch.randn(N, D).to(dtype)
    plain = [one.clone() for _ in range(max(1, min(12, int(COPIES_BYTES / one.nbytes))))]
    x = torch.randn(M, D).to(dtype)
    ways: dict[str, tuple[Way, Sequence[Any]]] = {
        "torch": (F.linear, plain),
        "oneDNN": (by_onednn, plain),
        "gemcut": (linear, [packed(weight) for weight in plain]),
    }
    if dtype == torch.float32 and M <= 16:
        ways["transposed"] = from_the_weight, plain
        if M == 1 and N % BLOCKS == 0:
            ways["blocks"] = in_blocks, plain
    least = dict.fromkeys(ways, float("inf"))
    turns = {name: itertools.cycle(weights) for name, (_, weights) in ways.items()}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or float("inf") in least.values():
        for name, (way, _) in ways.items():
            weight = next(turns[name])
            start = time.perf_counter()
            way(x, weight)
            least[name] = min(least[name], time.perf_counter() - start)
    return least


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; see the module's docstring."""
    parser = argparse.ArgumentParser(description="products on this CPU, by each way")
    parser.add_argument("--models", nargs="+", default=["gemma-3-270m"], choices=list(PUBLISHED))
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64, 512], metavar="M")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, metavar="N", help="of torch; default: its own")
    parser.add_argument("--seconds", type=float, default=0.3, help="for a line (%(default)s)")
    given = parser.parse_args(arguments)
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    for model in given.models:
        for dtype in given.dtypes:
            for name, N, D in matrices(model):
                for M in given.rows:
                    found = measured(N, D, M, getattr(torch, dtype), given.seconds)
                    times = "  ".join(f"{way} {1e6 * least:.0f}" for way, least in found.items())
                    print(f"{model} {dtype} {name} {N}x{D} rows {M}: {times}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
