"""From logits to what they stand for, z = softcap(logit_scale * x), and functions that lose nothing near 0."""

import triton
import triton.language as tl

from maskops.ops.triton_language import LOG2E


@triton.jit
def tanh(x):
    """tanh with a small relative error: a polynomial near 0, where (1 - e^-2x) / (1 + e^-2x) would cancel."""
    square = x * x
    p = square * -5.704979412257671e-3 + 2.0639080554246902e-2
    p = p * square - 5.373971164226532e-2
    p = p * square + 1.3331441581249237e-1
    p = p * square - 3.333328068256378e-1
    near = x + x * (square * p)
    e = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    far = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(x) < 0.625, near, tl.where(x < 0.0, -far, far))


@triton.jit
def capped(x, inside, softcap, SOFTCAP: tl.constexpr):
    """The value of a logit, before the factor that makes it z: -inf, a banned column or padding, stays what it is."""
    if SOFTCAP:
        x = tl.where(x == float("-inf"), x, tanh(tl.where(x == float("-inf"), 0.0, x) * inside) * softcap)
    return x


@triton.jit
def slope(x, inside):
    """The derivative of tanh at ``inside * x``: 1 - tanh^2 would cancel. 1 in a banned column, which is not capped."""
    e = tl.exp2(tl.abs(x * inside) * (-2.0 * LOG2E))
    half = 2.0 / (1.0 + e)
    return tl.where(x == float("-inf"), 1.0, e * (half * half))


@triton.jit
def number(high, low, like):
    """A number in double precision from the two float32 that kernels are given, in the shape of ``like``."""
    return tl.zeros_like(like).to(tl.float64) + high + low


@triton.jit
def log1p(x):
    """Of float64 x >= 0."""
    u = 1.0 + x
    is_one = u == 1.0
    return tl.where(is_one, x, tl.log(u) * (x / tl.where(is_one, 1.0, u - 1.0)))


@triton.jit
def expm1(x):
    """Of float64 x <= 0."""
    u = tl.exp(x)
    is_near = (x > -0.5) & (u != 1.0)
    near = (u - 1.0) * (x / tl.log(tl.where(is_near, u, 0.5)))
    return tl.where(is_near, near, tl.where(u == 1.0, x, u - 1.0))


@triton.jit
def exact_z(x, scale, softcap, SOFTCAP: tl.constexpr):
    """z of a logit, all in float64."""
    z = x * scale
    if SOFTCAP:
        e = tl.exp(-2.0 * tl.abs(z / softcap))
        magnitude = softcap * ((1.0 - e) / (1.0 + e))
        z = tl.where(z == float("-inf"), z, tl.where(z < 0.0, -magnitude, magnitude))
    return z


@triton.jit
def exact_slope(x, scale, softcap, SOFTCAP: tl.constexpr):
    """dz/dx there, all in float64."""
    result = tl.zeros_like(x) + scale
    if SOFTCAP:
        e = tl.exp(-2.0 * tl.abs(x * scale / softcap))
        half = 2.0 / (1.0 + e)
        result = scale * tl.where(x == float("-inf"), 1.0, e * (half * half))
    return result
