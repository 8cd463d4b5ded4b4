"""Top-k and top-p without a sort, in one pass before the draw and a small choice after it.

    scaled[v] = (logits[v] - max logits) / temperature          never above 0
    top_k     the least threshold with  #{v: scaled[v] > threshold} < k
    top_p     the least with  mass(scaled > threshold) < p * mass(what top_k left)

A token is kept where scaled >= threshold, so ties with the last kept token are kept.  The bits of
-scaled are a 31-bit key that grows as the logit falls: the kept tokens are those with keys up to
some greatest one.

1. narrow_kernel counts the keys of a row in some 2000 buckets, and adds up masses exp(scaled).  The
   last program of the row finds the bucket in which top-k ends: tokens of lower ones are kept, of
   higher ones dropped.  Top-k then keeps the mass of the lower buckets and some part of this one,
   so p times its mass is reached in one bucket or in few: there top-p ends.
2. draw_kernel takes the greatest noisy logit of what is surely kept, and lists the undecided tokens
   of these buckets.  Where top-k leaves few, it lists them all: then only the last program needs
   noise.
3. Its last program finds among the listed the key at which top-k's count is reached, adds up what
   top-k keeps, finds the key at which p times that is reached, and takes the greatest noisy logit
   up to there.  It halves an interval of keys and cuts what remains to keys that exist: few tokens
   take few steps, many no more than a key has bits.

Any number of tokens may be undecided, all V of a flat row too: the list has room for them, and the
last program takes them in tiles.

All sums are integers: masses in units of 2**-42 (256 000 of them err by 6e-8 in all; exp itself by
about 1e-7).  So the order of the atomic additions, and that of the list, cannot be seen in the
result.  Scaled logits are rounded as the oracle's: top-k is exact.

Cost of narrow_kernel: 4 B V bytes, from L2, and about 30 operations for each logit.  Atomic
additions of a count and a mass for a token that may matter; few do.  With top-k, those down to a
key that as many chunks reach with their maximum (where k is at most the number of chunks).  For
top-p alone, those above what is so low that all V tokens together would weigh under (1 - p) / 2.
Bound by latency: at batch 1 it moves 1 MB, the time of a launch and of the last program's two
scans.  The choice among n listed tokens reads them n / 1024 times for each step, the first 1024
from registers.
"""

import triton
import triton.language as tl

from gemcut.kernels.dependent_launch import wait_for_predecessor
from gemcut.kernels.gumbel import noisy_logits, packed, packed_value

MAX_VOCAB_SIZE = 2**20  # the masses of a row, 2**42 each at most, add up in 63 bits
BUCKETS = 2048
TILE = 1024  # listed tokens that the last program holds at once

# A row of the state, int64, zero at first: these fields, then buckets of counts, then of masses.
DRAWN = tl.constexpr(0)  # the greatest noisy logit and its id, packed
ARRIVED = tl.constexpr(1)  # programs that have finished; zero between launches
DECIDED = tl.constexpr(2)  # keys below are surely kept, and none of them is listed
LIST_END = tl.constexpr(3)  # keys from DECIDED to before this are listed
K_FIRST = tl.constexpr(4)  # first key of the bucket in which top-k ends: they are listed too
K_END = tl.constexpr(5)  # and the first after it; 0 where top-k drops nothing
K_LEFT = tl.constexpr(6)  # how many tokens top-k keeps from K_FIRST on, ties apart
K_MASS = tl.constexpr(7)  # mass of what top-k keeps before K_FIRST
P_FIRST = tl.constexpr(8)  # first key of the buckets in which top-p may end
P_END = tl.constexpr(9)  # and the first after them; 0 where top-p drops nothing
P_MASS = tl.constexpr(10)  # mass before P_FIRST
TOTAL = tl.constexpr(11)  # mass of all tokens, where top-k drops nothing
LISTED = tl.constexpr(12)  # length of the list
THRESHOLD = tl.constexpr(13)  # in the end, the greatest key that is kept
FIELDS = tl.constexpr(16)

LAST_KEY = tl.constexpr(0x7F7FFFFF)  # of the lowest finite number: -inf and NaN are never drawn
MASS_UNIT = tl.constexpr(2.0**42)
# Buckets have COARSE keys each below FINE_FROM and from FINE_TO on, FINE between: narrow where
# logits crowd.
COARSE = tl.constexpr(22)
FINE = tl.constexpr(16)
FINE_FROM = tl.constexpr(122 << 23)  # 1/32
FINE_TO = tl.constexpr(134 << 23)  # 128
FIRST_FINE = tl.constexpr(122 << 1)
FIRST_HIGH = tl.constexpr((122 << 1) + (12 << 7))


@triton.jit
def is_last_program(state_ptr):
    """Whether all other programs of the row have written what they had to."""
    tl.debug_barrier()  # the writes of all threads come before the count
    arrived = tl.atomic_add(state_ptr + ARRIVED, 1, sem="acq_rel")
    is_last = arrived == tl.num_programs(1) - 1
    tl.store(state_ptr + ARRIVED, 0, mask=is_last)
    return is_last


@triton.jit
def scaled_logits(x, greatest, temperature):
    """(x - greatest) / temperature with the oracle's roundings: plain `/` is not exact on a GPU.

    Temperature 0, which needs no filter, divides by 1.
    """
    x = x - greatest
    return tl.div_rn(x, tl.zeros_like(x) + tl.where(temperature == 0.0, 1.0, temperature))


@triton.jit
def descending_keys(scaled):
    """Keys [N] int32, 0 to 2**31 - 1, of numbers up to 0: the lower the number, the greater."""
    return scaled.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _scaled_of(key):
    return -key.to(tl.float32, bitcast=True)


@triton.jit
def _masses(key):
    """exp(scaled) in units: int64.  Of a key alone, so it is the same in every pass."""
    return (tl.exp(_scaled_of(key)) * MASS_UNIT).to(tl.int64)


@triton.jit
def _bucket(key):
    fine = FIRST_FINE + ((key - FINE_FROM) >> FINE)
    high = FIRST_HIGH + ((key - FINE_TO) >> COARSE)
    return tl.where(key < FINE_FROM, key >> COARSE, tl.where(key < FINE_TO, fine, high))


@triton.jit
def _first_key(bucket):
    fine = FINE_FROM + ((bucket - FIRST_FINE) << FINE)
    high = FINE_TO + ((bucket - FIRST_HIGH) << COARSE)
    low = bucket << COARSE
    return tl.where(bucket < FIRST_FINE, low, tl.where(bucket < FIRST_HIGH, fine, high))


@triton.jit
def _reach(so_far, target):
    """The bucket at which running sums reach the target, and the sum before it."""
    is_below = so_far < target
    return tl.sum(is_below.to(tl.int32), axis=0), tl.max(tl.where(is_below, so_far, 0), axis=0)


@triton.jit
def chunk_maxima(maxima_ptr, BLOCK_C: tl.constexpr):
    """The greatest logit of each chunk of a row and its id, packed: [BLOCK_C], 0 past the last."""
    offs_c = tl.arange(0, BLOCK_C)
    return tl.load(maxima_ptr + offs_c, mask=offs_c < tl.num_programs(1), other=0)


@triton.jit
def _first_threshold(maxima, greatest, temperature, k):
    """A key up to which k tokens lie, for as many chunks have their maximum there: 4 % too far.

    It lies between 1/32 and 1024 below the row's maximum, or is the last of all.
    """
    values = tl.where(maxima > 0, packed_value(maxima), -float("inf"))
    key = descending_keys(scaled_logits(values, greatest, temperature))
    low, high, found = FINE_FROM, 137 << 23, LAST_KEY
    for _ in range(8):
        middle = (low + high) >> 1
        is_enough = tl.sum((key <= middle).to(tl.int32), axis=0) >= k
        found = tl.where(is_enough, middle, found)
        low, high = tl.where(is_enough, low, middle), tl.where(is_enough, middle, high)
    return found


@triton.jit
def _share(p, mass):
    """The mass to be reached.  0 for p = 0: by the first key, that of the most probable token."""
    return tl.ceil(p.to(tl.float64) * mass.to(tl.float64)).to(tl.int64)


@triton.jit(do_not_specialize_on_alignment=["temperature_ptr", "top_k_ptr", "top_p_ptr"])
def narrow_kernel(
    logits_ptr, temperature_ptr, top_k_ptr, top_p_ptr,  # [B, V], [B], [B], [B]
    maxima_ptr, state_ptr,  # [B, chunks], [B, FIELDS and BUCKETS for each setting in use]
    stride_logits_b, stride_state_b,
    V,
    HAS_TOP_K: tl.constexpr,
    HAS_TOP_P: tl.constexpr,
    BUCKETS: tl.constexpr,
    DEPENDENT: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """The keys that are surely kept, and those that the draw must list."""
    wait_for_predecessor(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    state_ptr += row * stride_state_b
    offs_v = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(logits_ptr + row * stride_logits_b + offs_v, mask=offs_v < V, other=-float("inf"))
    maxima = chunk_maxima(maxima_ptr + row * tl.num_programs(1), BLOCK_C)
    temperature = tl.load(temperature_ptr + row)
    k = tl.load(top_k_ptr + row).to(tl.int64) if HAS_TOP_K else tl.full([], 0, tl.int64)
    k = tl.minimum(k, 0x7FFFFFFF).to(tl.int32)
    p = tl.load(top_p_ptr + row) if HAS_TOP_P else tl.full([], 1.0, tl.float32)
    is_random = temperature != 0.0
    uses_k, uses_p = is_random & (k > 0), is_random & (p < 1.0)

    greatest = packed_value(tl.max(maxima, axis=0))
    scaled = scaled_logits(x, greatest, temperature)
    key = descending_keys(scaled)
    bucket = _bucket(key)
    counts_ptr = state_ptr + FIELDS
    masses_ptr = counts_ptr + (BUCKETS if HAS_TOP_K else 0)
    threshold = tl.full([], LAST_KEY, tl.int32)
    if HAS_TOP_K:
        if uses_k & (k <= tl.num_programs(1)):
            threshold = _first_threshold(maxima, greatest, temperature, k)
        one = tl.full([CHUNK], 1, tl.int64)
        is_counted = key <= tl.where(uses_k, threshold, -1)
        tl.atomic_add(counts_ptr + bucket, one, mask=is_counted, sem="relaxed")
    if HAS_TOP_P:
        mass = tl.where(key <= tl.where(uses_p, threshold, -1), _masses(key), 0)
        if ~uses_k:
            tl.atomic_add(state_ptr + TOTAL, tl.sum(mass, axis=0), sem="relaxed")
        lowest = tl.where(uses_k, float("inf"), tl.log(2.0 * V / (1.0 - p)))
        may_matter = (mass > 0) & (-scaled <= lowest)
        tl.atomic_add(masses_ptr + bucket, mass, mask=may_matter, sem="relaxed")

    if is_last_program(state_ptr):
        buckets = tl.arange(0, BUCKETS)  # .cg: L2, where the other programs' sums are
        if HAS_TOP_K:
            counts = tl.load(counts_ptr + buckets, cache_modifier=".cg").to(tl.int32)
        if HAS_TOP_P:
            masses = tl.load(masses_ptr + buckets, cache_modifier=".cg")
            total = tl.load(state_ptr + TOTAL, cache_modifier=".cg")

        k_bucket = tl.full([], BUCKETS, tl.int32)  # none: top-k drops nothing
        if HAS_TOP_K:
            k_bucket, before = _reach(tl.cumsum(counts, axis=0), k)
            k_bucket = tl.where(uses_k, k_bucket, BUCKETS)
            tl.store(state_ptr + K_LEFT, (k - before).to(tl.int64))
        drops = k_bucket < BUCKETS
        k_first = tl.where(drops, _first_key(k_bucket), 0)
        k_end = tl.where(drops, tl.minimum(_first_key(k_bucket + 1), threshold + 1), 0)
        decided = tl.where(drops, k_first, LAST_KEY + 1)
        list_end = tl.zeros_like(k_end)
        if HAS_TOP_P:
            so_far = tl.cumsum(masses, axis=0)
            k_mass = tl.max(tl.where(buckets < k_bucket, so_far, 0), axis=0)
            k_mass = tl.where(uses_k, k_mass, total)
            most = tl.max(tl.where(buckets <= k_bucket, so_far, 0), axis=0)
            p_bucket, before = _reach(so_far, _share(p, k_mass))
            last_bucket, _ = _reach(so_far, _share(p, tl.maximum(k_mass, most)))
            p_first = tl.where(uses_p, _first_key(p_bucket), 0)
            p_end = tl.where(uses_p, _first_key(last_bucket + 1), 0)
            decided = tl.where(uses_p, p_first, decided)
            list_end = p_end
            tl.store(state_ptr + K_MASS, k_mass)
            tl.store(state_ptr + P_FIRST, p_first.to(tl.int64))
            tl.store(state_ptr + P_END, p_end.to(tl.int64))
            tl.store(state_ptr + P_MASS, before)
        if HAS_TOP_K:
            # few enough for the last program alone: the others then need no noise
            few = drops & (tl.sum(tl.where(buckets <= k_bucket, counts, 0), axis=0) <= TILE)
            decided = tl.where(few, 0, decided)
            list_end = tl.where(few, k_end, list_end)
            tl.store(state_ptr + K_FIRST, k_first.to(tl.int64))
            tl.store(state_ptr + K_END, k_end.to(tl.int64))
        tl.store(state_ptr + DECIDED, decided.to(tl.int64))
        tl.store(state_ptr + LIST_END, list_end.to(tl.int64))


@triton.jit
def list_tokens(is_listed, token_ids, list_ptr, state_ptr):
    """Append tokens [N] to the row's list: a program's in order, programs in any."""
    is_listed = is_listed.to(tl.int32)
    count = tl.sum(is_listed, axis=0)
    if count > 0:
        begin = tl.atomic_add(state_ptr + LISTED, count.to(tl.int64), sem="relaxed")
        list_ptr += begin - 1
        tl.store(list_ptr + tl.cumsum(is_listed, axis=0), token_ids, mask=is_listed != 0)


@triton.jit
def _tile(row, begin, TILE: tl.constexpr):
    """A tile of the list: token ids, logits, and keys, which are beyond all others past its end."""
    logits_ptr, list_ptr, count, greatest, temperature = row
    offs = begin + tl.arange(0, TILE)
    mask = offs < count
    token_ids = tl.load(list_ptr + offs, mask=mask, other=0, cache_modifier=".cg")
    x = tl.load(logits_ptr + token_ids, mask=mask, other=-float("inf"))
    return token_ids, x, descending_keys(scaled_logits(x, greatest, temperature))


@triton.jit
def _amount(key, first, last, end, IS_MASS: tl.constexpr):
    """Tokens or mass at keys from first to last; the last of these keys, the next before end."""
    is_in = (key >= first) & (key <= last)
    amount = tl.where(is_in, _masses(key) if IS_MASS else 1, 0)
    at = tl.where(is_in, key, first)
    after = tl.where((key > last) & (key < end), key, end - 1)
    return tl.sum(amount, axis=0), tl.max(at, axis=0), tl.min(after, axis=0)


@triton.jit
def _listed_amount(row, key, first, last, end, IS_MASS: tl.constexpr, TILE: tl.constexpr):
    """_amount of the whole list, whose first tile is key."""
    amount, at, after = _amount(key, first, last, end, IS_MASS)
    for begin in tl.range(TILE, row[2], TILE, num_stages=1):
        _, _, more = _tile(row, begin, TILE)
        more_amount, more_at, more_after = _amount(more, first, last, end, IS_MASS)
        amount += more_amount
        at, after = tl.maximum(at, more_at), tl.minimum(after, more_after)
    return amount, at, after


@triton.jit
def _least_key(row, key, first, end, target, IS_MASS: tl.constexpr, TILE: tl.constexpr):
    """The least listed key up to which so many tokens, or so much mass, lie from first on."""
    low, high = first, end - 1
    while low < high:
        middle = low + ((high - low) >> 1)
        amount, at, after = _listed_amount(row, key, first, middle, end, IS_MASS, TILE)
        low, high = tl.where(amount >= target, low, after), tl.where(amount >= target, at, high)
    return high


@triton.jit
def _greatest(token_ids, x, key, threshold, temperature, seed, position):
    """The greatest noisy logit of the tokens with keys up to a threshold, packed; 0 for none."""
    noisy = noisy_logits(x, temperature, seed, position, token_ids)
    return tl.max(tl.where(key <= threshold, packed(noisy, token_ids), 0), axis=0)


@triton.jit
def greatest_listed(
    logits_ptr, list_ptr, state_ptr,  # of one row
    greatest, temperature, p, last_key, seed, position,
    HAS_TOP_K: tl.constexpr, HAS_TOP_P: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The greatest noisy logit, packed, of the listed tokens that are kept; 0 where there is none.

    Keys beyond last_key are not drawn, but count.  Writes the row's final THRESHOLD.
    """
    count = tl.load(state_ptr + LISTED, cache_modifier=".cg").to(tl.int32)
    if HAS_TOP_K:
        k_first = tl.load(state_ptr + K_FIRST).to(tl.int32)
        k_end = tl.load(state_ptr + K_END).to(tl.int32)
        k_left = tl.load(state_ptr + K_LEFT).to(tl.int32)
    if HAS_TOP_P:
        p_first = tl.load(state_ptr + P_FIRST).to(tl.int32)
        p_end = tl.load(state_ptr + P_END).to(tl.int32)
        p_mass = tl.load(state_ptr + P_MASS)
        mass = tl.load(state_ptr + K_MASS)
    row = (logits_ptr, list_ptr, count, greatest, temperature)
    token_ids, x, key = _tile(row, 0, TILE)
    threshold = tl.full([], LAST_KEY, tl.int32)
    if HAS_TOP_K:
        kth = _least_key(row, key, k_first, k_end, k_left, False, TILE)
        threshold = tl.where(k_end > 0, kth, threshold)
    if HAS_TOP_P:
        if HAS_TOP_K:
            k_last = tl.minimum(threshold, k_end - 1)
            more, _, _ = _listed_amount(row, key, k_first, k_last, k_end, True, TILE)
            mass += more
        pth = _least_key(row, key, p_first, p_end, _share(p, mass) - p_mass, True, TILE)
        threshold = tl.where(p_end > 0, tl.minimum(threshold, pth), threshold)
    tl.store(state_ptr + THRESHOLD, threshold.to(tl.int64))

    last_key = tl.minimum(last_key, threshold)
    drawn = _greatest(token_ids, x, key, last_key, temperature, seed, position)
    for begin in tl.range(TILE, count, TILE, num_stages=1):
        token_ids, x, key = _tile(row, begin, TILE)
        more = _greatest(token_ids, x, key, last_key, temperature, seed, position)
        drawn = tl.maximum(drawn, more)
    return drawn
