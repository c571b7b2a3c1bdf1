"""Station 8, on the device: a bound of the norm by repeated squaring, which can be differentiated.

In: a weight and the axes of its matrices; it may be traced. Out: a proven bound in the precision
of the device. Must not know operators or hosts.

The norm of X is the square root of that of X^T X, and the Frobenius norm of the k-th such square
is the Schatten norm of order 2^(k+1) of X, at most rank^(2^-(k+1)) above the largest singular
value. Each product rounds: |fl(X^T X) - X^T X| <= gamma(m) |X|^T |X|, so, going back,

    |X|^2 <= |fl(X^T X)| + gamma(m) |X|_F^2 .

Proven for devices whose float32 products round like IEEE arithmetic, in any order of summation:
CPU and GPU at `Precision.HIGHEST`, not TPU.

References:
    Delattre et al. 2023, Efficient Bound of Lipschitz Constant for Convolutional Layers by Gram
    Iteration, https://arxiv.org/abs/2305.16173.
    Higham 2002, Accuracy and Stability of Numerical Algorithms, section 3.5.
"""

from __future__ import annotations

import functools
import math
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from jsn import _errors
from jsn._operator import explicit_spec, size
from jsn._rounding import TERMS, float_up, gamma, sqrt_up

_LEVELS = 8
"""Squarings: the bound of an orthogonal matrix of rank 1024 is then exact to 1.4 %, or, by row
sums, to rounding."""

Axes = tuple[int, ...]


def bound(W: Array, ins: Axes, outs: Axes, batch: Axes, factor: Fraction = Fraction(1)) -> Array:
    """An upper bound of the norm of each matrix of a weight, times a factor.

    Args:
        W: A float32, float64 or narrower weight.
        ins: Its input axes.
        outs: Its output axes.
        batch: Its batch axes: one matrix for each of their entries.
        factor: Any number of at least 0.

    Returns:
        Bounds of shape `(*batch)`, in float32, or float64 for a float64 weight. NaN where an
        entry is not finite, infinity where the bound leaves the dtype.

    Raises:
        ValueError: On a TPU.
    """
    if jax.default_backend() == "tpu":
        raise ValueError(_errors.gram_on_tpu())
    mantissa, exponent = parts(W, ins, outs, batch)
    mantissa = _up(mantissa * _constant(factor, mantissa.dtype))
    unscaled = _ldexp(mantissa, exponent)
    return jnp.where(mantissa > 0, jnp.maximum(unscaled, jnp.finfo(mantissa.dtype).tiny), mantissa)


def parts(W: Array, ins: Axes, outs: Axes, batch: Axes) -> tuple[Array, Array]:
    """The same bounds as `mantissa * 2**exponent`, which no scale of `W` overflows."""
    if not jnp.issubdtype(W.dtype, jnp.float64):
        W = widened(W)
    contracted = max((ins, outs), key=lambda axes: size([W.shape[a] for a in axes]))
    return _bound(contracted, batch, W)


def widened(W: Array) -> Array:
    """A bfloat16, float16 or narrower weight in float32, subnormal numbers included."""
    if W.dtype == jnp.bfloat16:  # a shift: no arithmetic that could flush
        bits = lax.bitcast_convert_type(W, jnp.uint16).astype(jnp.uint32) << 16
        return lax.bitcast_convert_type(bits, jnp.float32)
    return W.astype(jnp.float32)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _bound(contracted: Axes, batch: Axes, W: Array) -> tuple[Array, Array]:
    X, exponent, finite = exactly_scaled(W, batch)
    rows = size([W.shape[axis] for axis in contracted])
    columns = size([n for axis, n in enumerate(W.shape) if axis not in batch]) // rows
    unit = TERMS["device_unit"] * Fraction(float(jnp.finfo(W.dtype).eps)) / 2
    least = Fraction(float(jnp.finfo(W.dtype).tiny))
    tiny = TERMS["device_flush"] * least
    number = functools.partial(_constant, dtype=W.dtype)

    def level(G: Array, terms: int) -> tuple[Array, tuple[Array, Array]]:
        """The next X, a multiple of G, and what leads back: |last X|^2 <= scale |X| + slack."""
        sums = TERMS["device_sums"] * gamma(terms + columns, unit)
        squares = _up(_sum(jnp.diagonal(G, axis1=-2, axis2=-1)) * number(1 / (1 - sums)))
        slack = number(TERMS["device_product"] * gamma(terms, unit)) * squares
        scale, inverse = _power_of_two(jnp.max(jnp.abs(G), axis=(-2, -1)))
        # Flushed: in at most 2 operations for each term of an entry, and in the entry itself.
        slack = _up(slack + number(2 * terms * columns * tiny))
        return G * inverse[..., None, None], (scale, slack)

    X, first = level(square(X, contracted, batch), rows)
    every, last = tuple(range(len(batch))), (len(batch),)
    X, back = lax.scan(
        lambda X, _: level(square(X, last, every), columns), X, None, length=_LEVELS - 1
    )
    sums = number(1 / (1 - TERMS["device_sums"] * gamma(2 * columns + 2, unit)))
    flushed = number(2 * columns * tiny)
    norm = _up(_root(_sum(_sum(X * X)) * sums) + flushed)
    by_rows, by_columns = (jnp.max(_sum(jnp.abs(x)), axis=-1) for x in (X, jnp.swapaxes(X, -1, -2)))
    norm = jnp.minimum(norm, _up(_root(by_rows * by_columns) * sums + flushed))

    def rise(norm: Array, step: tuple[Array, Array]) -> tuple[Array, None]:
        scale, slack = step
        return _up(_root(scale * _up(norm + flushed) + slack)), None

    norm, _ = lax.scan(rise, norm, back, reverse=True)
    norm, _ = rise(norm, first)
    dropped = sqrt_up(Fraction(rows * columns)) * 2 ** (jnp.finfo(W.dtype).nmant + 1) * least
    norm = _up(norm + number(TERMS["dropped"] * dropped))
    return jnp.where(finite, jnp.where(exponent > _ZERO, norm, 0), jnp.nan), exponent


@_bound.defjvp
def _(contracted, batch, primals, tangents):
    mantissa, exponent = _bound(contracted, batch, *primals)
    smooth = functools.partial(_schatten, exponent, contracted, batch)
    tangent = jax.jvp(smooth, primals, tangents)[1]
    return (mantissa, exponent), (tangent, np.zeros(exponent.shape, jax.dtypes.float0))


def _schatten(exponent: Array, contracted: Axes, batch: Axes, W: Array) -> Array:
    """What `_bound` computes, without its slack, as a differentiable function."""
    peak = jnp.ones((), W.dtype)
    X = _scale(W, -exponent, batch)
    value, root = peak, 1.0
    for _ in range(_LEVELS):
        X, root = square(X, contracted, batch), root / 2
        batch = tuple(range(len(batch)))
        contracted = (len(batch),)
        peak = lax.stop_gradient(jnp.max(jnp.abs(X), axis=(-2, -1)))
        peak = jnp.where(peak > 0, peak, 1)
        X, value = X / peak[..., None, None], value * peak**root
    squares = jnp.sum(X * X, axis=(-2, -1))
    return value * jnp.where(squares > 0, squares, 1) ** (root / 2)


def square(X: Array, contracted: Axes, batch: Axes) -> Array:
    """`X^T X` over these axes, as `(*batch, n, n)`, in full precision.

    On a mesh with explicit axes each matrix, which is small, lives everywhere.
    """
    out, spec = None, explicit_spec(X)
    if spec is not None:
        mesh = jax.typeof(X).sharding.mesh
        out = NamedSharding(mesh, PartitionSpec(*(spec[axis] for axis in batch)))
    G = lax.dot_general(
        X,
        X,
        ((contracted, contracted), (batch, batch)),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=X.dtype,
        out_sharding=out,
    )
    shape = G.shape[: len(batch)]
    n = math.isqrt(size(G.shape[len(batch) :]))
    return G.reshape(*shape, n, n)


# --- scales and rounding -------------------------------------------------------------------------

_ZERO = -(2**20)
"""The exponent of a matrix of zeros."""


def _layout(dtype: np.dtype) -> tuple[np.dtype, int, int]:
    """The unsigned integer of this size, bits of the fraction, and bias of the exponent."""
    info = jnp.finfo(dtype)
    return np.dtype(f"uint{info.bits}"), info.nmant, -int(info.minexp) + 1 + info.nmant


def exactly_scaled(W: Array, batch: Axes) -> tuple[Array, Array, Array]:
    """`W * 2**-exponent` with a largest entry in [1, 2), by integers: no subnormal is flushed.

    Entries so small that the result would leave the normal numbers become 0.

    Returns:
        The scaled weight; the exponents `(*batch)`; and whether all entries are finite.
    """
    unsigned, fraction, bias = _layout(W.dtype)
    bits = lax.bitcast_convert_type(W, unsigned)
    magnitude = bits & (unsigned.type(-1 & (2 ** (unsigned.itemsize * 8 - 1) - 1)))
    exponents = magnitude >> fraction
    hidden = jnp.minimum(exponents, 1) << fraction
    digits = (magnitude & unsigned.type(2**fraction - 1)) | hidden
    exponents = jnp.maximum(exponents, 1).astype(jnp.int32)
    rest = tuple(axis for axis in range(W.ndim) if axis not in batch)
    length = unsigned.itemsize * 8 - 1 - lax.clz(digits).astype(jnp.int32)  # -1 for 0
    tops = jnp.where(digits > 0, exponents - bias + length, _ZERO)
    top = jnp.max(tops, axis=rest)
    shift = exponents - bias - _over(top, W.ndim, batch)
    least = int(jnp.finfo(W.dtype).minexp)
    factor = _two_to_the(jnp.clip(shift, least, 0), W.dtype)
    X = jnp.where(shift >= least, digits.astype(W.dtype) * factor, 0)
    X = jnp.where(bits == magnitude, X, -X)
    finite = jnp.all(jnp.isfinite(W), axis=rest)
    return jnp.where(_over(finite & (top > _ZERO), W.ndim, batch), X, 0), top, finite


def _over(values: Array, ndim: int, batch: Axes) -> Array:
    """One value for each batch entry, on the batch axes of a weight of this rank."""
    sizes = iter(values.shape)
    return values.reshape([next(sizes) if axis in batch else 1 for axis in range(ndim)])


def _two_to_the(exponent: Array, dtype: np.dtype) -> Array:
    """`2.0**exponent` for exponents of normal numbers, by its bits."""
    unsigned, fraction, bias = _layout(dtype)
    biased = (exponent + (bias - fraction)).astype(unsigned)
    return lax.bitcast_convert_type(biased << fraction, dtype)


def _power_of_two(x: Array) -> tuple[Array, Array]:
    """The power of two below each normal number, and its inverse; 1 for 0."""
    unsigned, fraction, bias = _layout(x.dtype)
    exponent = (lax.bitcast_convert_type(x, unsigned) >> fraction).astype(jnp.int32)
    exponent = jnp.where(exponent > 0, exponent - (bias - fraction), 0)
    return _two_to_the(exponent, x.dtype), _two_to_the(-exponent, x.dtype)


def _scale(x: Array, exponent: Array, batch: Axes) -> Array:
    """`x * 2**exponent`, in steps that do not overflow on the way."""
    limit = int(jnp.finfo(x.dtype).maxexp) - 2
    exponent = jnp.where(exponent == -_ZERO, 0, exponent)
    for _ in range(3):
        step = jnp.clip(exponent, -limit, limit)
        x = x * _over(_two_to_the(step, x.dtype), x.ndim, batch)
        exponent = exponent - step
    return x


def _ldexp(x: Array, exponent: Array) -> Array:
    """`x * 2**exponent`; what leaves the normal numbers below is up to the caller."""
    return _scale(x, exponent, tuple(range(x.ndim)))


def _sum(x: Array) -> Array:
    """A sum over the last axis that the compiler does not merge with the next one."""
    return lax.optimization_barrier(jnp.sum(x, axis=-1))


def _root(x: Array) -> Array:
    return jnp.sqrt(x)


def _constant(x: Fraction | int, dtype: Any) -> Any:
    """A number of the dtype, at or above a fraction."""
    value = float_up(Fraction(x))
    rounded = np.asarray(value, dtype)
    return rounded if float(rounded) >= value else np.nextafter(rounded, np.inf, dtype=dtype)


def _up(x: Array) -> Array:
    """A value above x by more than a few scalar operations can have rounded it down."""
    return x * (1 + 16 * float(TERMS["device_scalars"]) * float(jnp.finfo(x.dtype).eps))
