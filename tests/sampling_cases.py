"""Rows for the choice of tokens, what their filters keep, and which draws rounding cannot move.

What is kept and what is drawn are compared exactly.  Where rounding may decide, float64 says so, by
bounds on the errors of exp and log that are derived here.
"""

from collections.abc import Callable
from types import ModuleType

import torch
import triton
import triton.language as tl
from accuracy import DEVICE
from torch import Tensor

from gemcut.kernels import reference
from gemcut.kernels.gumbel import noise_bits
from gemcut.kernels.top_k_top_p import THRESHOLD

Arguments = dict[str, Tensor]
LOGITS: dict[str, Callable[[int], Tensor]] = {
    "spread": lambda V: 3 * torch.randn(V),
    "peaked": lambda V: 20 * torch.randn(V),
    "beyond-the-fine-buckets": lambda V: 200 * torch.randn(V),
    "nearly-flat": lambda V: 1e-9 * torch.rand(V),
    "flat": lambda V: torch.full((V,), 2.5),
    "tied": lambda V: (2 * torch.randn(V)).round(),
    "in-two-buckets": lambda V: 2.5 - 0.01 * torch.rand(V) - 8.0 * (torch.rand(V) < 0.5),
    "banned": lambda V: torch.randn(V).masked_fill(torch.rand(V) < 0.7, -torch.inf),
    "one-possible": lambda V: torch.full((V,), -torch.inf).index_fill(0, torch.tensor(V - 3), 1.0),
}


def batch(V: int, rows_each: int, seed: int = 0) -> Arguments:
    """Every kind of logits under settings of every kind: ordinary ones, none, and the extremes."""
    torch.manual_seed(V + seed)
    logits = torch.stack([draw(V) for draw in LOGITS.values() for _ in range(rows_each)])
    B = len(logits)

    def cycle(*values: float, dtype: torch.dtype = torch.float32) -> Tensor:
        # the lengths of the cycles have no common factor, so that settings meet in many ways
        return torch.tensor(values, dtype=dtype).roll(seed).repeat(B)[:B]

    shares = (0.9013, 0.3171, 1.0, 0.0, 0.9907, 1.5, 0.5071, 0.9993, 0.7019, 0.9511, 0.0517)
    settings = {
        "temperature": cycle(1.0, 0.6, 1.3, 0.7, 0.0),
        "top_k": cycle(3, 0, 40, 1, V, V + 9, 2, dtype=torch.int64),
        "top_p": cycle(*shares),
        "min_p": cycle(0.0, 0.1, 1.0),
        "seeds": torch.randint(-(2**63), 2**63 - 1, (B,)),
        "positions": torch.randint(0, 131072, (B,)),
    }
    return {name: x.to(DEVICE) for name, x in {"logits": logits, **settings}.items()}


# rows in which an easy mistake shows: logits, top_k, top_p
EDGES = [
    ("spread", 3, 1.0),
    ("spread", 40, 1.0),
    ("spread", 40, 0.9013),
    ("spread", 0, 0.9013),
    ("spread", 0, 1.0),
    ("peaked", 5, 0.9511),
    ("tied", 3, 1.0),
    ("tied", 7, 0.6019),
    ("nearly-flat", 40, 1.0),
    ("nearly-flat", 40, 0.6019),
    ("nearly-flat", 0, 0.3171),
    ("in-two-buckets", 40, 0.9013),
    ("in-two-buckets", 90, 0.9907),
    ("with-a-tail", 0, 0.9),
    ("peak-in-each-third", 3, 1.0),
    ("flat", 2, 0.5071),
    ("flat", 0, 1.0),  # greedy
]


def edges(V: int = 192) -> Arguments:
    """The rows of EDGES, at a temperature of 1, the last at 0."""
    torch.manual_seed(1)
    third = V // 3
    # of the last two thirds no token matters but in the total; 1 and 0.018 and 0.0003
    parts = torch.zeros(1), -4 - 0.01 * torch.rand(third - 1), torch.full((V - third,), -8.1)
    peaks = torch.randn(V) - 50
    peaks[third // 2 :: third] = torch.arange(3.0)
    drawn = LOGITS | {"with-a-tail": lambda _: torch.cat(parts)}
    drawn |= {"peak-in-each-third": lambda _: peaks}
    B = len(EDGES)
    rows = {
        "logits": torch.stack([drawn[name](V) for name, _, _ in EDGES]),
        "temperature": torch.ones(B).index_fill(0, torch.tensor(B - 1), 0.0),
        "top_k": torch.tensor([k for _, k, _ in EDGES]),
        "top_p": torch.tensor([p for _, _, p in EDGES]),
        "min_p": torch.zeros(B),
        "seeds": torch.arange(B),
        "positions": 100 + torch.arange(B),
    }
    return {name: x.to(DEVICE) for name, x in rows.items()}


def scaled(logits: Tensor, temperature: Tensor, **_: Tensor) -> Tensor:
    """Scaled logits with the oracle's roundings: float32 [B, V]."""
    shifted = logits - logits.amax(-1, keepdim=True)
    return shifted / temperature.masked_fill(temperature == 0, 1.0).unsqueeze(-1)


def chosen(sampling: ModuleType, arguments: Arguments) -> tuple[Tensor, Tensor]:
    """The ids [B], and what the threshold of the kernels of `sampling` keeps: [B, V] bool."""
    ids = torch.empty(len(arguments["logits"]), dtype=torch.int64, device=DEVICE)
    names = "logits", "temperature", "top_k", "top_p", "min_p", "seeds", "positions"
    state = sampling._choose_(ids, *(arguments.get(name) for name in names))
    keys = scaled(**arguments).view(torch.int32) & 0x7FFFFFFF
    return ids, keys <= state[:, THRESHOLD.value].unsqueeze(-1)


def assert_top_k_is_exact(sampling: ModuleType, arguments: Arguments) -> None:
    """Without top-p, a random row keeps the oracle's tokens."""
    arguments = {name: x for name, x in arguments.items() if name not in ("top_p", "min_p")}
    expected = reference.filter_logits(scaled(**arguments), arguments["top_k"], None, None)
    is_random = arguments["temperature"] != 0
    assert chosen(sampling, arguments)[1][is_random].equal(expected.isfinite()[is_random])


def assert_top_p_is_exact(sampling: ModuleType, arguments: Arguments) -> None:
    """A random row keeps what float64 keeps, unless rounding decides, as it does in few rows."""
    x = reference.filter_logits(scaled(**arguments), arguments.get("top_k"), None, None)
    margin = rounding_of_shares(x)
    least = exact_top_p(x, arguments["top_p"], -margin)
    most = exact_top_p(x, arguments["top_p"], margin)
    _, actual = chosen(sampling, arguments)
    is_random = arguments["temperature"] != 0
    assert ((least <= actual) & (actual <= most))[is_random].all()
    # rounding cannot decide in nearly all rows, so the test is sharp
    assert (least == most).all(-1)[is_random].double().mean() > 0.9


def assert_draws_are_exact(sampling: ModuleType, arguments: Arguments) -> None:
    """The oracle's token, where the greatest noisy logits lie further apart than rounding goes."""
    expected, is_decided = decided_draws(arguments)
    assert is_decided.double().mean() > 0.95
    actual = sampling.sample(**arguments)
    assert actual[is_decided].equal(expected[is_decided])
    assert actual[is_decided].equal(reference.sample(**arguments)[is_decided])


def decided_draws(arguments: Arguments) -> tuple[Tensor, Tensor]:
    """The ids [B] by float64, and where rounding cannot change them: [B] bool."""
    logits, temperature = arguments["logits"], arguments["temperature"].unsqueeze(-1).double()
    filters = [arguments.get(name) for name in ("top_k", "top_p", "min_p")]
    is_kept = reference.filter_logits(scaled(**arguments), *filters).isfinite()
    uniform = uniform_numbers(arguments["seeds"], arguments["positions"], logits.shape[1])
    noise = -torch.log(-torch.log(uniform))
    noisy = (logits + temperature * noise).masked_fill(~is_kept, -torch.inf)
    # each log errs by two units in the last place: the inner one shifts the noise by 2**-22, the
    # outer by 2**-22 of it; the product is rounded, by the oracle, and the sum
    error = 2.0**-22 * temperature * (1 + 1.25 * noise.abs()) + 2.0**-24 * noisy.abs()
    greatest, expected = noisy.max(-1)
    error_of_best = error.gather(-1, expected.unsqueeze(-1))
    others = (noisy + error.nan_to_num(posinf=0.0)).scatter(-1, expected.unsqueeze(-1), -torch.inf)
    is_decided = greatest - error_of_best.squeeze(-1) > others.amax(-1)
    is_greedy = arguments["temperature"] == 0
    expected = torch.where(is_greedy, logits.argmax(-1), expected)
    return expected, is_decided | is_greedy


@triton.jit
def noise_bits_kernel(seeds_ptr, positions_ptr, y_ptr, V: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    bits = noise_bits(tl.load(seeds_ptr + row), tl.load(positions_ptr + row), offs)
    tl.store(y_ptr + row * V + offs, bits, mask=offs < V)


def uniform_numbers(seeds: Tensor, positions: Tensor, V: int) -> Tensor:
    """The kernels' hash as numbers between 0 and 1: float64 [B, V]."""
    bits = torch.empty(len(seeds), V, dtype=torch.int32, device=DEVICE)
    noise_bits_kernel[(len(seeds),)](
        seeds_ptr=seeds, positions_ptr=positions, y_ptr=bits,
        V=V, BLOCK=triton.next_power_of_2(V),
    )  # fmt: skip
    return (bits.double() + 0.5) * 2.0**-23


def exact_top_p(x: Tensor, top_p: Tensor, margin: Tensor) -> Tensor:
    """What top-p keeps of float64 logits [B, V] in float64, if p were `margin` [B] greater."""
    ordered, order = x.double().sort(-1, descending=True)
    share = ordered.softmax(-1).cumsum(-1)
    # a token is kept where all that is more probable than it, ties apart, falls short of p
    above = torch.cat([torch.zeros_like(share[:, :1]), share[:, :-1]], -1)
    is_first = torch.ones_like(above, dtype=torch.bool)
    is_first[:, 1:] = ordered[:, 1:] < ordered[:, :-1]
    above = above.masked_fill(~is_first, -1.0).cummax(-1).values
    p = (top_p.double() + margin).unsqueeze(-1)
    is_kept = (above < p) | (above <= 0) | (top_p >= 1).unsqueeze(-1)
    return torch.zeros_like(is_kept).scatter_(-1, order, is_kept) & (x > -torch.inf)


def rounding_of_shares(x: Tensor) -> Tensor:
    """By how much rounding can move a cumulative share of scaled logits [B, V]: [B].

    exp errs by two units in the last place, and by half a unit of its argument: 2**-23 (2 + |x|),
    relative.  It stands in the numerator and in the denominator; masses are cut to 2**-42.
    """
    mass = x.double().exp()
    error = (mass * (2 + x.double().abs()).masked_fill(mass == 0, 0.0)).sum(-1) * 2.0**-23
    return 2 * error / mass.sum(-1) + x.shape[-1] * 2.0**-41
