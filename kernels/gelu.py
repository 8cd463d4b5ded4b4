"""Device functions shared by the kernels: tanh, by the hardware's instruction or not, and GELU."""

import triton
import triton.language as tl


@triton.jit
def tanh(x, APPROXIMATE: tl.constexpr):
    """Tanh of a float32 tile; APPROXIMATE takes the hardware's instruction (relative error 2**-11).

    The portable form errs by a few units in the last place.  Near zero it would cancel, hence the
    series there: x - x^3/3 + 2x^5/15 - 17x^7/315.
    """
    if APPROXIMATE:
        return tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    e = tl.exp2(-2.885390081777927 * tl.abs(x))  # exp(-2 |x|), never overflows
    t = tl.div_rn(1.0 - e, 1.0 + e)  # the plain quotient may err by two units
    t = tl.where(x < 0.0, -t, t)
    x2 = x * x
    series = x * (1.0 + x2 * (-1.0 / 3.0 + x2 * (2.0 / 15.0 - x2 * (17.0 / 315.0))))
    return tl.where(tl.abs(x) < 0.125, series, t)


@triton.jit
def gelu(x):
    """GELU of a float32 tile, by its tanh approximation (Hendrycks and Gimpel, 2016).

    (1 + tanh(u)) / 2 is the logistic function of 2 u, which does not cancel for negative x.
    """
    u = 0.7978845608028654 * x * (1.0 + 0.044715 * x * x)  # sqrt(2 / pi)
    return x / (1.0 + tl.exp2(-2.885390081777927 * u))  # exp(-2 u)
