"""Products that were timed one by one, which `--fit` takes beside profiles.

A file holds a JSON list of products, each of one row of x and an N x D weight in bf16:

    {"kernel": "skinny_linear", "N": 2304, "D": 9216, "us": 13.6,
     "tile": {"BLOCK_N": 64, "BLOCK_D": 128, "SPLITS": 4, "num_warps": 4, "num_stages": 4}}

`us` is the time from one call to the next in a CUDA graph of many, over weights that no cache
holds, the gap between launches included.  `tile` is laid over the kernel's rule; {} is the rule
itself.  Kernels are those of tools/tune.py that take a weight and nothing else.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemcut import kernels
from gemcut.kernels.tiles import Tile
from gemcut.tools.launches import Made, applied, recorded
from gemcut.tools.machine import Machine
from gemcut.tools.prediction.fit_machine import PRODUCTS, Pair, Profile
from gemcut.tools.prediction.predicted_step import PredictedStep, compile_all

OPS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "skinny_linear": kernels.skinny_linear,
    "linear_geglu": kernels.linear_geglu,
    "lm_head": partial(kernels.lm_head, softcap=None),
}


@dataclass(frozen=True)
class TimedProduct:
    """A product that was timed."""

    kernel: str
    N: int
    D: int
    tile: Tile
    us: float

    @property
    def name(self) -> str:
        tile = " ".join(f"{name}={value}" for name, value in self.tile.items()) or "the rule"
        return f"{self.kernel} {self.N} x {self.D} {tile}"

    def made(self, arch: str) -> Made:
        """What it launched, under the product's name."""
        made: list[Made] = []
        of_geglu = self.kernel == "linear_geglu"
        key = (self.kernel, (self.N // 2 if of_geglu else self.N, self.D))
        with recorded(arch, made), applied(arch, key, self.tile):
            x = torch.empty(1, self.D, dtype=torch.bfloat16, device="cuda")
            OPS[self.kernel](x, x.new_empty(self.N, self.D))
        (launch,) = [one for one in made if one.launch is not None]
        return replace(launch, name=self.name)


def is_list(file: Path) -> bool:
    """Whether a file of `--fit` holds products, and not a profile."""
    try:
        return isinstance(json.loads(file.read_text()), list)
    except (OSError, ValueError):
        return False


def read_products(file: Path) -> list[TimedProduct]:
    """The products of a file; ValueError where one is malformed."""
    products = []
    for number, found in enumerate(json.loads(file.read_text())):
        try:
            tile = {str(name): int(value) for name, value in found["tile"].items()}
            product = TimedProduct(
                str(found["kernel"]), int(found["N"]), int(found["D"]), tile, float(found["us"])
            )
            if product.kernel not in OPS:
                raise ValueError(f"{product.kernel!r} is not {', '.join(OPS)}")
            if not product.us > 0:
                raise ValueError("us must be above 0")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{file}: row {number}: {type(error).__name__}: {error}") from None
        products.append(product)
    if not products:
        raise ValueError(f"{file} holds no rows")
    return products


def pair(products: Sequence[TimedProduct], arch: str, jobs: int, machine: Machine) -> Pair:
    """The input of `fit`: times without the gap between launches, and the launches' code."""
    made = [product.made(arch) for product in products]
    times = {product.name: (1.0, product.us - machine.launch_gap_us) for product in products}
    step = PredictedStep(PRODUCTS, 1, 1, dict.fromkeys(made, 1), compile_all(made, jobs))
    return Profile(PRODUCTS, 1, 1, times, 0.0), step
