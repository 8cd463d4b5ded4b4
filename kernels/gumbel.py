"""The draw as a maximum: Gumbel noise by a hash, and numbers packed with their token's id.

    noisy = logit + temperature * noise,    noise = -log(-log(u))
    u = (top 23 bits of hash(seed, position, token id) + 1/2) / 2**23

The token of the greatest noisy logit is a draw from softmax(logits / temperature) (Gumbel, 1954).
Neither the row's maximum nor its sum is needed, so whatever makes a logit can add its noise.  At
temperature 0 the noise vanishes, and the greatest logit wins.

noise lies between -2.9 and 16.6, so temperatures up to 1e30 overflow nothing.  The product and the
sum are one fma, rounded once, in every kernel: the same bits wherever a token is drawn.  The hash
is SplitMix64 in 64-bit integers, bit for bit the oracle's; the oracle's logarithms and its two
roundings may differ in the last place.
"""

import triton
import triton.language as tl

# SplitMix64 (Steele, Lea, Flood, 2014, "Fast splittable pseudorandom number generators")
GOLDEN_GAMMA = tl.constexpr(0x9E3779B97F4A7C15)
MIX_1 = tl.constexpr(0xBF58476D1CE4E5B9)
MIX_2 = tl.constexpr(0x94D049BB133111EB)


@triton.jit
def noisy_logits(logits, temperature, seed, position, token_ids):
    """Logits with noise: all five broadcast, float32, float32 and integers."""
    noise = _gumbel(noise_bits(seed, position, token_ids))
    return tl.fma(tl.zeros_like(logits) + temperature, noise, logits)


@triton.jit
def noise_bits(seed, position, token_ids):
    """The hash of reference.gumbel_noise, its top 23 bits: int32."""
    gamma = tl.full([], GOLDEN_GAMMA, tl.uint64)
    stream = _mix64(seed.to(tl.uint64) + (position.to(tl.int64) + 1).to(tl.uint64) * gamma)
    return (_mix64(stream + (token_ids + 1).to(tl.uint64) * gamma) >> 41).to(tl.int32)


@triton.jit
def _mix64(x):
    x = (x ^ (x >> 30)) * MIX_1
    x = (x ^ (x >> 27)) * MIX_2
    return x ^ (x >> 31)


@triton.jit
def _gumbel(bits):
    uniform = (bits.to(tl.float32) + 0.5) * (2.0**-23)
    return -tl.log(-tl.log(uniform))


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
