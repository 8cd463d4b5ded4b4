"""Token choice on the device: which tokens are kept, which is drawn, and on what that depends.

What is kept and what is drawn are compared exactly.  Where rounding may decide, float64 says so, by
bounds on the errors of exp and log that are derived below.
"""

import pytest
import torch
import triton
import triton.language as tl
from accuracy import DEVICE, random

from gemcut.kernels import reference, sampling
from gemcut.kernels.gumbel import noise_bits
from gemcut.kernels.sampling import sample
from gemcut.kernels.top_k_top_p import BUCKETS, THRESHOLD, _bucket, _first_key

pytestmark = pytest.mark.usefixtures("poisoned")
LOGITS = {
    "spread": lambda V: 3 * torch.randn(V),
    "peaked": lambda V: 20 * torch.randn(V),
    "beyond-the-fine-buckets": lambda V: 200 * torch.randn(V),
    "nearly-flat": lambda V: 1e-9 * torch.rand(V),
    "flat": lambda V: torch.full((V,), 2.5),
    "tied": lambda V: (2 * torch.randn(V)).round(),
    "banned": lambda V: torch.randn(V).masked_fill(torch.rand(V) < 0.7, -torch.inf),
    "one-possible": lambda V: torch.full((V,), -torch.inf).index_fill(0, torch.tensor(V - 3), 1.0),
}
by_size = pytest.mark.parametrize(
    ("V", "chunk"),
    [
        pytest.param(97, 2048, id="one-chunk"),
        pytest.param(700, 512, id="ragged-chunks"),
        pytest.param(5000, 2048, id="large"),
    ],
)


def batch(V: int, rows_each: int) -> dict[str, torch.Tensor]:
    """Every kind of logits under settings of every kind: ordinary ones, none, and the extremes."""
    torch.manual_seed(V)
    logits = torch.stack([draw(V) for draw in LOGITS.values() for _ in range(rows_each)])
    B = len(logits)

    def cycle(*values, dtype=torch.float32):
        # the lengths of the cycles have no common factor, so that settings meet in many ways
        return torch.tensor(values, dtype=dtype).repeat(B)[:B]

    settings = {
        "temperature": cycle(1.0, 0.6, 1.3, 0.7, 0.0),
        "top_k": cycle(3, 0, 40, 1, V, V + 9, 2, dtype=torch.int64),
        "top_p": cycle(
            0.9013, 0.3171, 1.0, 0.0, 0.9907, 1.5, 0.5071, 0.9993, 0.7019, 0.9511, 0.0517
        ),
        "min_p": cycle(0.0, 0.1, 1.0),
        "seeds": torch.randint(-(2**63), 2**63 - 1, (B,)),
        "positions": torch.randint(0, 131072, (B,)),
    }
    return {name: x.to(DEVICE) for name, x in {"logits": logits, **settings}.items()}


def scaled(logits, temperature, **_):
    """Scaled logits with the oracle's roundings: float32 [B, V]."""
    shifted = logits - logits.amax(-1, keepdim=True)
    return shifted / temperature.masked_fill(temperature == 0, 1.0).unsqueeze(-1)


def chosen(arguments) -> tuple[torch.Tensor, torch.Tensor]:
    """The ids [B], and what the kernels' threshold keeps: [B, V] bool."""
    ids = torch.empty(len(arguments["logits"]), dtype=torch.int64, device=DEVICE)
    names = "logits", "temperature", "top_k", "top_p", "min_p", "seeds", "positions"
    state = sampling._choose_(ids, *(arguments.get(name) for name in names))
    keys = scaled(**arguments).view(torch.int32) & 0x7FFFFFFF
    return ids, keys <= state[:, THRESHOLD.value].unsqueeze(-1)


def exact_top_p(x, top_p, margin):
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


def rounding_of_shares(x):
    """By how much rounding can move a cumulative share of scaled logits [B, V]: [B].

    exp errs by two units in the last place, and by half a unit of its argument: 2**-23 (2 + |x|),
    relative.  It stands in the numerator and in the denominator; masses are cut to 2**-42.
    """
    mass = x.double().exp()
    error = (mass * (2 + x.double().abs()).masked_fill(mass == 0, 0.0)).sum(-1) * 2.0**-23
    return 2 * error / mass.sum(-1) + x.shape[-1] * 2.0**-41


@pytest.fixture(autouse=True)
def restored_chunk(monkeypatch, request):
    chunk = getattr(request.node, "callspec", None) and request.node.callspec.params.get("chunk")
    if chunk:
        monkeypatch.setattr(sampling, "CHUNK", chunk)


@by_size
def test_top_k_keeps_what_the_oracle_keeps(V, chunk):
    arguments = batch(V, 2)
    arguments = {name: x for name, x in arguments.items() if name not in ("top_p", "min_p")}
    expected = reference.filter_logits(scaled(**arguments), arguments["top_k"], None, None)
    is_random = arguments["temperature"] != 0
    assert chosen(arguments)[1][is_random].equal(expected.isfinite()[is_random])


@by_size
@pytest.mark.parametrize("with_top_k", [False, True], ids=["alone", "after-top-k"])
def test_top_p_keeps_what_float64_keeps(with_top_k, V, chunk):
    arguments = batch(V, 2)
    if not with_top_k:
        del arguments["top_k"]
    x = reference.filter_logits(scaled(**arguments), arguments.get("top_k"), None, None)
    margin = rounding_of_shares(x)
    least = exact_top_p(x, arguments["top_p"], -margin)
    most = exact_top_p(x, arguments["top_p"], margin)
    _, actual = chosen(arguments)
    is_random = arguments["temperature"] != 0
    assert ((least <= actual) & (actual <= most))[is_random].all()
    # rounding cannot decide in nearly all rows, so the test is sharp
    assert (least == most).all(-1)[is_random].double().mean() > 0.9


@triton.jit
def noise_bits_kernel(seeds_ptr, positions_ptr, y_ptr, V: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    bits = noise_bits(tl.load(seeds_ptr + row), tl.load(positions_ptr + row), offs)
    tl.store(y_ptr + row * V + offs, bits, mask=offs < V)


def kernel_noise(seeds, positions, V):
    """The kernel's hash, and its Gumbel noise in float64: [B, V]."""
    bits = torch.empty(len(seeds), V, dtype=torch.int32, device=DEVICE)
    noise_bits_kernel[(len(seeds),)](
        seeds_ptr=seeds, positions_ptr=positions, y_ptr=bits,
        V=V, BLOCK=triton.next_power_of_2(V),
    )  # fmt: skip
    uniform = (bits.double() + 0.5) * 2.0**-23
    return uniform, -torch.log(-torch.log(uniform))


def test_the_hash_is_the_oracles():
    extremes = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), 77], device=DEVICE)
    seeds = extremes.repeat_interleave(3)
    positions = torch.tensor([0, 1, 131071], device=DEVICE).repeat(6)
    uniform, _ = kernel_noise(seeds, positions, 300)
    noise = reference.gumbel_noise(seeds, positions, 300)
    # the same rounded function of the same bits: equal numbers of 23 bits give equal noise
    assert noise.equal(-torch.log(-torch.log(uniform.float())))
    assert uniform.unique().numel() > 0.99 * uniform.numel()


@by_size
@pytest.mark.parametrize("with_filters", [False, True], ids=["plain", "filtered"])
def test_draws_are_the_oracles(with_filters, V, chunk):
    """Every row whose two greatest noisy logits lie further apart than rounding can move them."""
    arguments = batch(V, 2)
    if not with_filters:
        arguments |= dict.fromkeys(("top_k", "top_p", "min_p"))
    x = scaled(**arguments)
    filters = [arguments[name] for name in ("top_k", "top_p", "min_p")]
    is_kept = reference.filter_logits(x, *filters).isfinite()
    _, noise = kernel_noise(arguments["seeds"], arguments["positions"], V)
    temperature = arguments["temperature"].double().unsqueeze(-1)
    noisy = (arguments["logits"] + temperature * noise).masked_fill(~is_kept, -torch.inf)
    # each log errs by two units in the last place: the inner one shifts the noise by 2**-22, the
    # outer by 2**-22 of it; the product is rounded, by the oracle, and the sum
    error = 2.0**-22 * temperature * (1 + 1.25 * noise.abs()) + 2.0**-24 * noisy.abs()
    greatest, expected = noisy.max(-1)
    error_of_best = error.gather(-1, expected.unsqueeze(-1))
    others = (noisy + error.nan_to_num(posinf=0.0)).scatter(-1, expected.unsqueeze(-1), -torch.inf)
    is_decided = greatest - error_of_best.squeeze(-1) > others.amax(-1)
    is_greedy = arguments["temperature"] == 0
    expected = torch.where(is_greedy, arguments["logits"].argmax(-1), expected)
    is_decided |= is_greedy
    assert is_decided.double().mean() > 0.95

    actual = sample(**arguments)
    assert actual[is_decided].equal(expected[is_decided])
    assert actual[is_decided].equal(reference.sample(**arguments)[is_decided])


@by_size
def test_greedy(V, chunk):
    logits = batch(V, 1)["logits"]
    best = logits.argmax(-1)
    assert sample(logits).equal(best)
    zeros = torch.zeros(len(logits), dtype=torch.int64, device=DEVICE)
    assert sample(logits, zeros.float(), zeros, seeds=zeros, positions=zeros).equal(best)
    assert sample(logits, zeros.float(), seeds=zeros, positions=zeros).equal(best)
    assert sample(torch.full_like(logits, -3.0)).eq(0).all()
    zeros_of_both_signs = torch.tensor([[-1.0, -0.0, 0.0]], device=DEVICE)
    assert sample(zeros_of_both_signs).tolist() == [1]


def test_rows_that_lie_apart_and_indices_of_32_bits(monkeypatch):
    """The head may have more rows than the vocabulary has pieces."""
    monkeypatch.setattr(sampling, "CHUNK", 128)
    arguments = {name: x[::2].contiguous() for name, x in batch(150, 1).items()}
    wide = torch.full((len(arguments["logits"]), 171), torch.nan, device=DEVICE)
    wide[:, :150] = arguments["logits"]
    expected = sample(**arguments)
    for name in ("top_k", "positions"):
        arguments[name] = arguments[name].int()
    assert sample(**arguments | {"logits": wide[:, :150]}).equal(expected)
    assert sample(wide[:, :150]).equal(sample(arguments["logits"]))


def test_a_row_does_not_depend_on_the_batch(monkeypatch):
    monkeypatch.setattr(sampling, "CHUNK", 512)
    arguments = batch(700, 1)
    ids, kept = chosen(arguments)
    for row in range(len(ids)):
        alone = {name: x[row : row + 1] for name, x in arguments.items()}
        id_alone, kept_alone = chosen(alone)
        assert id_alone.equal(ids[row : row + 1])
        assert kept_alone.equal(kept[row : row + 1])


def test_filters_that_keep_all_change_nothing():
    arguments = batch(300, 2)
    B = len(arguments["logits"])
    unfiltered = {k: x for k, x in arguments.items() if k not in ("top_k", "top_p", "min_p")}
    zeros, ones = torch.zeros(B, device=DEVICE), torch.ones(B, device=DEVICE)
    filtered = unfiltered | {"top_k": zeros.long(), "top_p": ones, "min_p": zeros}
    assert sample(**filtered).equal(sample(**unfiltered))


def test_the_last_token_of_top_p_is_found_where_mass_is_in_the_tail():
    """Where p is near 1, leaving out the mass of the tail from the total would keep too few."""
    V = 2000
    logits = torch.cat([torch.zeros(1), torch.linspace(-9, -12, V - 1)])[None].to(DEVICE)
    one = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    arguments = {"logits": logits, "temperature": torch.ones(1, device=DEVICE)}
    arguments |= {"seeds": one, "positions": one}
    for p in (0.95, 0.975, 0.985):
        arguments["top_p"] = torch.tensor([p], device=DEVICE)
        margin = rounding_of_shares(logits)
        most = exact_top_p(logits, arguments["top_p"], margin)
        assert exact_top_p(logits, arguments["top_p"], -margin).equal(most)
        assert chosen(arguments)[1].equal(most)


def test_nothing_to_choose_stays_in_range():
    """NaN counts as the greatest, as in torch, so that the engine sees it at the chosen id."""
    nan, inf = torch.nan, torch.inf
    logits = torch.tensor(
        [[nan, nan, nan], [1.0, nan, 2.0], [-inf, -inf, -inf], [0.0, inf, 1.0]], device=DEVICE
    )
    assert sample(logits).tolist() == [0, 1, 0, 1]
    zeros = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    ones = torch.ones(4, device=DEVICE)
    for top_k in (zeros, zeros + 2):
        ids = sample(logits, ones, top_k, 0.5 * ones, 0.1 * ones, zeros, zeros)
        assert ids.tolist() == [0, 1, 0, 1]


def test_a_temperature_so_low_that_logits_overflow():
    logits = random(2, 50)
    zeros = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    low = torch.full((2,), 1e-42, device=DEVICE)
    ids = sample(logits, low, zeros + 5, low + 0.9, seeds=zeros, positions=zeros)
    assert ids.equal(logits.argmax(-1))


def test_launches(monkeypatch):
    """A filter that is None costs no launch, and the state no buckets."""
    launched = []

    class Counted:
        def __init__(self, kernel, name):
            self.kernel, self.name = kernel, name

        def __getitem__(self, grid):
            launched.append(self.name)
            return self.kernel[grid]

    for name in ("maxima", "narrow", "draw"):
        kernel = getattr(sampling, f"{name}_kernel")
        monkeypatch.setattr(sampling, f"{name}_kernel", Counted(kernel, name))
    arguments = batch(97, 1)
    for names, expected in (
        ((), ["draw"]),
        (("temperature",), ["draw"]),
        (("temperature", "min_p"), ["maxima", "draw"]),
        (("temperature", "top_k"), ["maxima", "narrow", "draw"]),
        (("temperature", "top_p"), ["maxima", "narrow", "draw"]),
        (("temperature", "top_k", "top_p", "min_p"), ["maxima", "narrow", "draw"]),
    ):
        launched.clear()
        sample(**{k: arguments[k] for k in ("logits", "seeds", "positions", *names)})
        assert launched == expected


@triton.jit
def buckets_kernel(first_ptr, back_ptr, BUCKETS: tl.constexpr):
    buckets = tl.arange(0, BUCKETS)
    first = _first_key(buckets)
    tl.store(first_ptr + buckets, first)
    tl.store(back_ptr + buckets, _bucket(first))


def test_the_buckets_of_the_first_pass_cover_all_keys():
    """Each bucket's first key is its own, and the last finite key has a bucket."""
    from_kernel = torch.empty(BUCKETS, dtype=torch.int32, device=DEVICE)
    from_kernel_back = torch.empty_like(from_kernel)
    buckets_kernel[(1,)](first_ptr=from_kernel, back_ptr=from_kernel_back, BUCKETS=BUCKETS)
    is_used = from_kernel >= 0  # past the last key they wrap
    used = torch.arange(BUCKETS, device=DEVICE, dtype=torch.int32)[is_used]
    assert from_kernel_back[is_used].equal(used)
    assert from_kernel[is_used].diff().gt(0).all()
    assert from_kernel[is_used][-1] > 0x7F7FFFFF - 2**22
    assert from_kernel[is_used].diff().max() == 2**22


def test_no_rows():
    logits = random(0, 9)
    none = torch.empty(0, device=DEVICE)
    ids = sample(logits, none, none.long(), none, none, none.long(), none.long())
    assert ids.shape == sample(logits).shape == (0,)
    assert ids.dtype == torch.int64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": random(3, 8).half()}, "logits are torch.float16, must be torch.float32"),
        ({"logits": random(3, 8).long()}, "dtype torch.int64 is not supported"),
        ({"logits": random(3, 2, 8)}, r"logits are \[3, 2, 8\], must be \[B, V\]"),
        ({"logits": random(3, 16)[:, ::2]}, r"strides \[16, 2\], the last must be 1"),
        ({"logits": random(3, 0)}, "vocabulary of 0 is not in 1 to 1048576"),
        ({"logits": torch.zeros(1, 1).expand(3, 2**20 + 1)}, "vocabulary of 1048577"),
        ({"logits": torch.empty(3, 8, device="meta")}, "not meta"),
        ({"temperature": torch.ones(2)}, r"temperature is \[2\], must be \[3\]"),
        ({"temperature": torch.ones(3).half()}, "temperature is torch.float16"),
        ({"temperature": torch.ones(3).int()}, "temperature is torch.int32, must be float32"),
        ({"temperature": torch.ones(6, device=DEVICE)[::2]}, "must be contiguous"),
        ({"top_k": torch.ones(3)}, "top_k is torch.float32, "),
        ({"top_p": torch.ones(3, 1)}, r"top_p is \[3, 1\], must be \[3\]"),
        ({"min_p": torch.ones(4)}, r"min_p is \[4\], must be \[3\]"),
        ({"min_p": torch.ones(3, device="meta")}, "min_p is on meta"),
        ({"seeds": None}, "temperature needs seeds and positions"),
        ({"positions": None}, "temperature needs seeds and positions"),
        ({"seeds": torch.ones(4).long()}, r"seeds is \[4\], must be \[3\]"),
        ({"positions": torch.ones(3).bool()}, "positions is torch.bool, must be int64 or int32"),
    ],
)
def test_bad_input(change, message):
    zeros = torch.zeros(3, dtype=torch.int64)
    arguments = {"logits": random(3, 8), "temperature": torch.ones(3)}
    arguments |= {"seeds": zeros, "positions": zeros} | change
    with pytest.raises(ValueError, match=message):
        sample(
            **{
                k: x.to(DEVICE) if x is not None and not x.is_meta else x
                for k, x in arguments.items()
            }
        )
