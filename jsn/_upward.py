"""Station 9, its ground: constants from 0 to infinity, combined without ever rounding down.

In and out: floats. Each result is the exact one, rounded up once. Must not know what they bound.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from fractions import Fraction

from jsn._rounding import float_up, sqrt_up


def times(*factors: float) -> float:
    """The product; 0 times anything is 0."""
    if 0 in factors:
        return 0.0
    if math.inf in factors:
        return math.inf
    return float_up(math.prod(map(Fraction, factors), start=Fraction(1)))


def plus(*terms: float) -> float:
    """The sum."""
    if math.inf in terms:
        return math.inf
    return float_up(sum(map(Fraction, terms), start=Fraction(0)))


def root(x: Fraction | int) -> float:
    """The square root; exact where that is a float."""
    x = Fraction(x)
    top, bottom = math.isqrt(x.numerator), math.isqrt(x.denominator)
    if top**2 == x.numerator and bottom**2 == x.denominator:
        return float_up(Fraction(top, bottom))
    return float_up(sqrt_up(x))


def norm(terms: Iterable[tuple[float, int]]) -> float:
    """The square root of the sum of `count * x**2`."""
    total = Fraction(0)
    for x, count in terms:
        if x and count:
            if math.isinf(x):
                return math.inf
            total += Fraction(x) ** 2 * count
    return root(total)
