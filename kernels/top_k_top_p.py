"""Top-k and top-p without a sort: the threshold of each row, by three passes over its logits.

    scaled[v] = (logits[v] - max logits) / temperature          never above 0
    top_k     the least threshold with  #{v: scaled[v] > threshold} < k
    top_p     the least with  mass(scaled > threshold) < p * mass(what top_k left)

A token is kept where scaled >= threshold, so ties with the last kept token are kept.  The bits of
-scaled are a 31-bit key that grows as the logit falls.  Each pass counts keys (or adds masses
exp(scaled)) in up to 2048 buckets, then the last program of the row finds the bucket that holds the
boundary, which the next pass divides: buckets of 2**16 or 2**22 keys, of 2**5 or 2**11, of one.
The first are narrow where logits crowd, 1/8 to 128 below the maximum.

All sums are integers: masses in units of 2**-42 (256 000 of them err by 6e-8 in all; exp itself by
about 1e-7).  So the order of the atomic additions cannot be seen in the result, and the sums of a
bucket's parts are the bucket's.  Scaled logits are rounded as the oracle's: top-k is exact.

Cost: B V 4 bytes a pass, from L2, and about 30 operations for each logit.  One atomic addition for
a logit of the interval alone; few are, since the first pass leaves out what cannot matter: for
top-k what lies below the k-th greatest maximum of a chunk (where k is at most the number of
chunks), for top-p what lies so low that all V tokens together would weigh under (1 - p) / 2.  Bound
by latency: at batch 1 a pass moves 1 MB, the time of a launch and of the last program's scan.
"""

import triton
import triton.language as tl
from torch import Tensor

from gemcut.kernels.dependent_launch import dependent_launch, wait_for_predecessor

MAX_VOCAB_SIZE = 2**20  # the masses of a row, 2**42 each at most, add up in 63 bits
BUCKETS, GROUP = 2048, 64

# A row of the state, int64, zero at first: these fields, then the buckets.
BEST = tl.constexpr(0)  # the greatest logit and its id, packed
DRAWN = tl.constexpr(1)  # the greatest noisy logit and its id, packed
ARRIVED = tl.constexpr(2)  # programs that have finished; zero between launches
TOTAL = tl.constexpr(3)  # mass of all that top-k left
TARGET = tl.constexpr(4)  # count or mass to reach from LOW on
LOW = tl.constexpr(5)  # first key of the interval that holds the boundary
SHIFT = tl.constexpr(6)  # log2 of the width of the next pass's buckets; -1: all are kept
THRESHOLD = tl.constexpr(7)  # the greatest key that is kept
FIELDS = tl.constexpr(8)

LAST_KEY = tl.constexpr(0x7F7FFFFF)  # of the lowest finite number: -inf and NaN are never drawn
MASS_UNIT = tl.constexpr(2.0**42)
# Buckets of the first pass: COARSE keys each below FINE_FROM and from FINE_TO on, FINE between.
COARSE = tl.constexpr(22)
FINE = tl.constexpr(16)
FINE_FROM = tl.constexpr(124 << 23)  # 1/8
FINE_TO = tl.constexpr(134 << 23)  # 128
FIRST_FINE = tl.constexpr(124 << 1)
FIRST_HIGH = tl.constexpr((124 << 1) + (10 << 7))
NEXT = tl.constexpr(11)  # bits that the second pass resolves


@triton.jit
def packed(x, token_ids):
    """Numbers above 0 that order as x does (NaN greatest), then as the lower id: [N] int64."""
    x = tl.where(x == 0.0, 0.0, x)  # -0 ties with 0
    bits = x.to(tl.uint32, bitcast=True)
    # not ~bits: the interpreter of Triton 3.6 has no complement of unsigned numbers
    order = tl.where((bits >> 31) != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    order = tl.where(x != x, 0xFFFFFFFF, order).to(tl.int64)
    return (order << 31) | (0x7FFFFFFF - token_ids).to(tl.int64)


@triton.jit
def packed_id(number):
    return 0x7FFFFFFF - (number & 0x7FFFFFFF)


@triton.jit
def packed_value(number):
    order = (number >> 31).to(tl.uint32)
    bits = tl.where((order >> 31) != 0, order & 0x7FFFFFFF, order ^ 0xFFFFFFFF)
    return bits.to(tl.float32, bitcast=True)


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
    """(x - greatest) / temperature with the oracle's roundings: plain `/` is not exact on a GPU."""
    x = x - greatest
    return tl.div_rn(x, tl.zeros_like(x) + temperature)


@triton.jit
def descending_keys(scaled):
    """Keys [N] int32, 0 to 2**31 - 1, of numbers up to 0: the lower the number, the greater."""
    return scaled.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _first_bucket(key):
    fine = FIRST_FINE + ((key - FINE_FROM) >> FINE)
    high = FIRST_HIGH + ((key - FINE_TO) >> COARSE)
    return tl.where(key < FINE_FROM, key >> COARSE, tl.where(key < FINE_TO, fine, high))


@triton.jit
def _first_key(bucket):
    """First key of a bucket of the first pass."""
    fine = FINE_FROM + ((bucket - FIRST_FINE) << FINE)
    high = FINE_TO + ((bucket - FIRST_HIGH) << COARSE)
    low = bucket << COARSE
    return tl.where(bucket < FIRST_FINE, low, tl.where(bucket < FIRST_HIGH, fine, high))


@triton.jit
def _reach(sums, offs, target):
    """The index at which the sums, added up, reach the target, and what is left of it there."""
    index = tl.sum((tl.cumsum(sums, axis=0) < target).to(tl.int32), axis=0)
    return index, target - tl.sum(tl.where(offs < index, sums, 0), axis=0)


@triton.jit(do_not_specialize_on_alignment=["temperature_ptr", "setting_ptr"])
def narrow_kernel(
    logits_ptr, temperature_ptr, setting_ptr, state_ptr,  # [B, V], [B], [B], [B, FIELDS + BUCKETS]
    stride_logits_b, stride_state_b,
    V,
    IS_MASS: tl.constexpr,  # top-p, else top-k
    LEVEL: tl.constexpr,
    BUCKETS: tl.constexpr,
    GROUP: tl.constexpr,  # buckets that are scanned together
    DEPENDENT: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    wait_for_predecessor(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    state_ptr += row * stride_state_b
    temperature = tl.load(temperature_ptr + row)
    setting = tl.load(setting_ptr + row)
    is_used = setting < 1.0 if IS_MASS else setting > 0
    is_active = is_used & (temperature != 0.0)
    low = tl.load(state_ptr + LOW).to(tl.int32)
    shift = tl.load(state_ptr + SHIFT).to(tl.int32)
    if LEVEL > 0:
        is_active = is_active & (shift >= 0)
    if not is_active:
        return

    offs_v = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(logits_ptr + row * stride_logits_b + offs_v, mask=offs_v < V, other=-float("inf"))
    scaled = scaled_logits(x, packed_value(tl.load(state_ptr + BEST)), temperature)
    key = descending_keys(scaled)
    mask = (offs_v < V) & (key <= tl.load(state_ptr + THRESHOLD).to(tl.int32))
    value = tl.full([CHUNK], 1, tl.int64)
    if IS_MASS:
        value = tl.where(mask, tl.exp(scaled) * MASS_UNIT, 0.0).to(tl.int64)

    if LEVEL == 0:
        if IS_MASS:
            tl.atomic_add(state_ptr + TOTAL, tl.sum(value, axis=0), sem="relaxed")
            mask = mask & (-scaled <= tl.log(2.0 * V / (1.0 - setting)))
        bucket = _first_bucket(key)
    else:
        bucket = (key - low) >> shift
        mask = mask & (key >= low) & (bucket < BUCKETS)
    tl.atomic_add(state_ptr + FIELDS + bucket, value, mask=mask, sem="relaxed")

    if is_last_program(state_ptr):
        offs_g = tl.arange(0, BUCKETS // GROUP)
        offs_b = tl.arange(0, GROUP)
        bucket_ptrs = state_ptr + FIELDS + offs_g[:, None] * GROUP + offs_b[None, :]
        sums = tl.load(bucket_ptrs, cache_modifier=".cg")  # .cg: not what this core's L1 may hold
        tl.store(bucket_ptrs, tl.zeros_like(sums))  # for the next pass
        if LEVEL > 0:
            target = tl.load(state_ptr + TARGET)
        elif IS_MASS:
            total = tl.load(state_ptr + TOTAL, cache_modifier=".cg")
            # 0 for p = 0: reached by the first key, that of the most probable token
            target = tl.ceil(setting.to(tl.float64) * total.to(tl.float64)).to(tl.int64)
        else:
            target = setting.to(tl.int64)

        group, target = _reach(tl.sum(sums, axis=1), offs_g, target)
        sums = tl.sum(tl.where(offs_g[:, None] == group, sums, 0), axis=0)
        place, target = _reach(sums, offs_b, target)
        boundary = group * GROUP + place
        tl.store(state_ptr + TARGET, target)
        if LEVEL == 0:
            low = _first_key(boundary)
            is_fine = (boundary >= FIRST_FINE) & (boundary < FIRST_HIGH)
            shift = tl.where(is_fine, FINE - NEXT, COARSE - NEXT)
            shift = tl.where(boundary < BUCKETS, shift, -1)  # fewer than k are finite
        else:
            low += boundary << shift
            shift = shift * 0
        tl.store(state_ptr + LOW, low.to(tl.int64))
        tl.store(state_ptr + SHIFT, shift.to(tl.int64))
        if LEVEL == 2:
            tl.store(state_ptr + THRESHOLD, low.to(tl.int64))


def narrow_(
    state: Tensor,  # [B, FIELDS + BUCKETS], its BEST and THRESHOLD set
    logits: Tensor,
    temperature: Tensor,
    setting: Tensor,
    is_mass: bool,
    chunk: int,
) -> None:
    """Lower each row's THRESHOLD to that of top-k, or of top-p: three launches."""
    B, V = logits.shape
    for level in range(3):
        narrow_kernel[(B, triton.cdiv(V, chunk))](
            logits_ptr=logits, temperature_ptr=temperature, setting_ptr=setting, state_ptr=state,
            stride_logits_b=logits.stride(0), stride_state_b=state.stride(0),
            V=V,
            IS_MASS=is_mass, LEVEL=level, BUCKETS=BUCKETS, GROUP=GROUP, CHUNK=chunk, num_warps=8,
            **dependent_launch(logits.device),
        )  # fmt: skip
