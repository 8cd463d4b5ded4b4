"""Token choice on the device: which tokens are kept, which is drawn, and on what that depends."""

import pytest
import torch
import triton
import triton.language as tl
from accuracy import DEVICE, random
from sampling_cases import (
    assert_draws_are_exact,
    assert_top_k_is_exact,
    assert_top_p_is_exact,
    batch,
    chosen,
    edges,
    exact_top_p,
    rounding_of_shares,
    uniform_numbers,
)
from torch.utils._python_dispatch import TorchDispatchMode

from gemcut.kernels import reference, sampling
from gemcut.kernels.sampling import sample
from gemcut.kernels.top_k_top_p import BUCKETS, _bucket, _first_key

pytestmark = pytest.mark.usefixtures("poisoned")
by_size = pytest.mark.parametrize(
    ("V", "chunk", "tile"),
    [
        pytest.param(97, 2048, 1024, id="one-chunk"),
        pytest.param(700, 512, 64, id="ragged-chunks"),
        pytest.param(5000, 2048, 1024, id="large"),
        pytest.param(300, 64, 64, id="more-chunks-than-k"),
    ],
)


@pytest.fixture(autouse=True)
def sizes(monkeypatch, request):
    """Chunks and tiles of the sizes that a test is parametrised with."""
    callspec = getattr(request.node, "callspec", None)
    for name in ("chunk", "tile"):
        if callspec and name in callspec.params:
            monkeypatch.setattr(sampling, name.upper(), callspec.params[name])


@by_size
def test_top_k_keeps_what_the_oracle_keeps(V, chunk, tile):
    assert_top_k_is_exact(sampling, batch(V, 2))


@by_size
@pytest.mark.parametrize("with_top_k", [False, True], ids=["alone", "after-top-k"])
def test_top_p_keeps_what_float64_keeps(with_top_k, V, chunk, tile):
    arguments = batch(V, 1)
    if not with_top_k:
        del arguments["top_k"]
    assert_top_p_is_exact(sampling, arguments)


@pytest.mark.parametrize("chunk", [64])
@pytest.mark.parametrize("tile", [16])
@pytest.mark.parametrize("seed", range(1, 4))
def test_small_rows(seed, chunk, tile):
    """A row's kinds and settings meet otherwise with each seed."""
    arguments = batch(60 + 11 * seed, 1, seed)
    assert_top_k_is_exact(sampling, arguments)
    assert_top_p_is_exact(sampling, arguments)
    assert_draws_are_exact(sampling, arguments)


def test_rows_in_which_mistakes_show():
    """In one chunk and one tile; test_kernel_mutations.py has them in several, with mistakes."""
    arguments = edges()
    assert_top_k_is_exact(sampling, arguments)
    assert_top_p_is_exact(sampling, arguments)
    assert_draws_are_exact(sampling, arguments)


def test_the_largest_vocabulary(monkeypatch):
    V = 2**20
    monkeypatch.setattr(sampling, "CHUNK", 2**17)
    monkeypatch.setattr(sampling, "TILE", 2**14)
    arguments = {name: x[:2].contiguous() for name, x in batch(7, 1, seed=3).items()}
    arguments["logits"] = torch.stack([3 * torch.randn(V), torch.full((V,), 1.5)]).to(DEVICE)
    arguments["temperature"].fill_(1.0)
    arguments["top_k"].copy_(torch.tensor([300, 0]))
    arguments["top_p"].fill_(0.9)
    assert_top_k_is_exact(sampling, arguments)
    assert_top_p_is_exact(sampling, arguments)


def test_the_hash_is_the_oracles():
    extremes = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), 77], device=DEVICE)
    seeds = extremes.repeat_interleave(3)
    positions = torch.tensor([0, 1, 131071], device=DEVICE).repeat(6)
    uniform = uniform_numbers(seeds, positions, 300)
    noise = reference.gumbel_noise(seeds, positions, 300)
    # the same rounded function of the same bits: equal numbers of 23 bits give equal noise
    assert noise.equal(-torch.log(-torch.log(uniform.float())))
    assert uniform.unique().numel() > 0.99 * uniform.numel()


@by_size
@pytest.mark.parametrize("filters", ["none", "min-p", "all"])
def test_draws_are_the_oracles(filters, V, chunk, tile):
    arguments = batch(V, 1)
    if filters != "all":
        arguments["top_k"].zero_()
        arguments["top_p"].fill_(1.0)
    if filters == "none":
        arguments["min_p"].zero_()
    assert_draws_are_exact(sampling, arguments)
    unused = {"none": ("top_k", "top_p", "min_p"), "min-p": ("top_k", "top_p"), "all": ()}
    less = {name: x for name, x in arguments.items() if name not in unused[filters]}
    assert sample(**less).equal(sample(**arguments))


@by_size
def test_greedy(V, chunk, tile):
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
    ids, kept = chosen(sampling, arguments)
    for row in range(len(ids)):
        alone = {name: x[row : row + 1] for name, x in arguments.items()}
        id_alone, kept_alone = chosen(sampling, alone)
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
        assert chosen(sampling, arguments)[1].equal(most)


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
    """A filter that is None costs no launch; with filters, nothing is filled."""
    launched = []

    class Counted:
        def __init__(self, kernel, name):
            self.kernel, self.name = kernel, name

        def __getitem__(self, grid):
            launched.append(self.name)
            return self.kernel[grid]

    class Noted(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "zero" in str(func):
                launched.append("zeros")
            return func(*args, **(kwargs or {}))

    for name in ("maxima", "narrow", "draw"):
        kernel = getattr(sampling, f"{name}_kernel")
        monkeypatch.setattr(sampling, f"{name}_kernel", Counted(kernel, name))
    arguments = batch(97, 1)
    all_three = ["maxima", "narrow", "draw"]
    for names, expected in (
        ((), ["zeros", "draw"]),
        (("temperature",), ["zeros", "draw"]),
        (("temperature", "min_p"), ["maxima", "draw"]),
        (("temperature", "top_k"), all_three),
        (("temperature", "top_p"), all_three),
        (("temperature", "top_k", "top_p", "min_p"), all_three),
    ):
        used = {k: arguments[k] for k in ("logits", "seeds", "positions", *names)}
        launched.clear()
        with Noted():
            sample(**used)
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
