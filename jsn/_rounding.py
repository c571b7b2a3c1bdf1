"""Station 8, its ground: what floating point arithmetic may do to a bound, in exact numbers.

In: floats and counts of operations. Out: error bounds as fractions, floats rounded up, and arrays
scaled exactly. Must not know about operators, factorizations or devices.

The proofs of station 8 rest on one model (Higham 2002, sections 2.2 and 3.1): a basic operation
gives (x op y)(1 + delta) with |delta| <= u, to nearest, fused multiply-add or not, so that an
inner product of n terms, summed in any order, is off by at most gamma(n) sum |x_i y_i| with
gamma(n) = n u / (1 - n u). Scalars are combined as fractions, without any error at all, and
rounded once, up. All constants of the proofs stand in `TERMS`.

References:
    Higham 2002, Accuracy and Stability of Numerical Algorithms, second edition, SIAM.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np

from jsn import _errors

TERMS: dict[str, Fraction | int] = {
    "unit": Fraction(1, 2**53),  # u of float64
    "tiny": Fraction(1, 2**1022),  # the most one operation loses below the normal numbers
    # Entries below this share of the largest are dropped, and what they add is bounded: then no
    # product of two entries, and no rounding of a sum of them, leaves the normal numbers.
    "small": Fraction(1, 2**450),
    "dropped": 1,  # those entries
    "product": 1,  # products and sums of the Gram matrix: gamma(depth) |H|^T |H|
    "trace": 1,  # |H|_F^2 read off the computed Gram matrix
    "diagonal": 1,  # the subtraction d - G_jj
    "factor": 1,  # the factorization: gamma(n + 3) / (1 - gamma(n + 3)) trace
    "underflow": 1,  # the same, where intermediate results leave the normal numbers
    "complex": 8,  # a complex operation rounds like at most so many real ones
    "coefficients": 1,  # products and sums of the coefficients of the Gram symbol
    "waves": 64,  # error of a tabulated cos or sin, in u, for each spatial axis
    "series": 1,  # products and sums of the Gram symbol at one frequency
    "riesz": 1,  # what the symbol can do between two frequencies
    "padding": 1,  # the norm of circular and reflected padding
    "overlap": 1,  # taps that share inputs, where a kernel is bounded as a matrix
    "assembly": 1,  # kernel entries added up where padding makes taps meet
    "device_unit": 1,  # u of the device, in half of its machine epsilon
    "device_product": 1,  # the Gram products of the device
    "device_sums": 1,  # sums of squares and of absolute values there
    "device_flush": 1,  # results below the normal numbers, which it may set to zero
    "device_scalars": 1,  # scalar operations there
}
"""Every constant of the proofs. Tests weaken them one by one, and each time a bound fails."""


def gamma(n: int | Fraction, unit: Fraction | None = None) -> Fraction:
    """The relative error of n operations, `n u / (1 - n u)` (Higham 2002, lemma 3.1).

    Raises:
        ValueError: If it is not below 1: that many operations prove nothing.
    """
    unit = Fraction(TERMS["unit"]) if unit is None else unit
    if 2 * n * unit >= 1:
        raise ValueError(_errors.too_long(int(n), float(unit)))
    return n * unit / (1 - n * unit)


def sqrt_up(x: Fraction) -> Fraction:
    """A fraction at or above the square root, by at most 2^-64 of it."""
    if x <= 0:
        return Fraction(0)
    shift = 66 - (x.numerator.bit_length() - x.denominator.bit_length()) // 2
    scaled = x * Fraction(4) ** shift
    root = math.isqrt(scaled.numerator // scaled.denominator)
    return (root + 1) / Fraction(2) ** shift


def float_up(x: Fraction) -> float:
    """The smallest float64 at or above a fraction; infinity where there is none."""
    try:
        rounded = float(x)  # correctly rounded, to nearest
    except OverflowError:
        return math.inf
    return rounded if Fraction(rounded) >= x else math.nextafter(rounded, math.inf)


def power_of_two(exponent: int) -> Fraction:
    """`2**exponent` for any integer."""
    return Fraction(2) ** exponent


def scaled(x: np.ndarray, exponent: int) -> np.ndarray:
    """`x * 2**-exponent` in float64, exact but for small entries, which become 0.

    Args:
        x: Entries of any floating point dtype that float64 contains, below `2**exponent`.
        exponent: Any integer.

    Returns:
        The scaled entries, below 1.
    """
    wide = x.dtype.itemsize == 8  # narrower entries lie within 2^-150 and 2^128: none is small
    x = x.astype(np.float64)
    half = -exponent // 2  # two steps: 2**-exponent itself may be no float64
    x *= math.ldexp(1.0, half)
    x *= math.ldexp(1.0, -exponent - half)
    if wide:
        x[np.abs(x) < float(TERMS["small"])] = 0
    return x


def dropped(entries: int) -> Fraction:
    """At most the norm of what `scaled` has dropped: its Frobenius norm."""
    return TERMS["dropped"] * sqrt_up(Fraction(entries)) * TERMS["small"]


def check_arithmetic() -> None:
    """Raises where float64 does not round to nearest, or flushes subnormal numbers.

    Both are modes of the processor that a library can have set, for the whole thread.

    Raises:
        FloatingPointError: If so.
    """
    one, tiny, half = np.ones(1), np.full(1, 5e-324), np.full(1, 2.0**-53)
    if (tiny * one == 0).any() or not (tiny > 0).all():
        raise FloatingPointError(_errors.bad_arithmetic("subnormal numbers are flushed to zero"))
    if (one + half != 1).any() or (one - half / 2 != 1).any():
        raise FloatingPointError(_errors.bad_arithmetic("results are not rounded to nearest"))
