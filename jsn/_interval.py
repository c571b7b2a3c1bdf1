"""Station 9, its ground: interval arithmetic on many intervals at once, rounded outward.

In: arrays of lower and upper ends, infinite ones included. Out: intervals that contain every
result for every choice of real (finite) numbers within the operands. Must not know expressions.

An operation that floating point gives exactly is not widened, so that 0 stays 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Array = np.ndarray
_LIBRARY = 1e-14
"""Relative error of a function of the C library, of numpy or of scipy: far more than they have."""


class Interval(NamedTuple):
    """Numbers from `lo` to `hi`, for each entry of the two arrays."""

    lo: Array
    hi: Array


def interval(lo: float | Array, hi: float | Array, like: Interval | None = None) -> Interval:
    """Intervals with these ends, as many as `like` has."""
    shape = () if like is None else like.lo.shape
    ends = np.broadcast_arrays(np.float64(lo), np.float64(hi), np.empty(shape))[:2]
    return Interval(ends[0].copy(), ends[1].copy())


def everything(like: Interval) -> Interval:
    """All real numbers."""
    return interval(-np.inf, np.inf, like)


def hull(*xs: Interval) -> Interval:
    """The smallest intervals that contain all of these."""
    return Interval(np.minimum.reduce([x.lo for x in xs]), np.maximum.reduce([x.hi for x in xs]))


def meet(x: Interval, *others: Interval) -> Interval:
    """What several enclosures of the same number have in common."""
    return Interval(
        np.maximum.reduce([x.lo, *(y.lo for y in others)]),
        np.minimum.reduce([x.hi, *(y.hi for y in others)]),
    )


def where(condition: Array, x: Interval, y: Interval) -> Interval:
    """Entries of x where a condition holds, else those of y."""
    return Interval(np.where(condition, x.lo, y.lo), np.where(condition, x.hi, y.hi))


def magnitude(x: Interval) -> Array:
    """The largest modulus in each interval."""
    return np.maximum(np.abs(x.lo), np.abs(x.hi))


def mignitude(x: Interval) -> Array:
    """The smallest modulus in each interval."""
    return np.where((x.lo <= 0) & (x.hi >= 0), 0, np.minimum(np.abs(x.lo), np.abs(x.hi)))


# --- the four operations --------------------------------------------------------------------------


def add(x: Interval, y: Interval) -> Interval:
    """The sum."""
    return Interval(_sum(x.lo, y.lo, -np.inf), _sum(x.hi, y.hi, np.inf))


def _sum(a: Array, b: Array, toward: float) -> Array:
    with np.errstate(all="ignore"):
        s = a + b
        part = s - a
        exact = ((a - (s - part)) + (b - part) == 0) | np.isinf(a) | np.isinf(b)
    s = np.where(np.isnan(s), toward, s)  # of infinite ends of opposite signs: anything
    with np.errstate(over="ignore", under="ignore"):
        return np.where(exact & ~_overflows(s, a, b), s, np.nextafter(s, toward))


def _overflows(s: Array, a: Array, b: Array) -> Array:
    return np.isinf(s) & ~np.isinf(a) & ~np.isinf(b)


def neg(x: Interval) -> Interval:
    """The negative."""
    return Interval(-x.hi, -x.lo)


def mul(x: Interval, y: Interval) -> Interval:
    """The product; a factor 0 gives 0, whatever the other may be."""
    pairs = [(a, b) for a in x for b in y]
    return Interval(
        np.minimum.reduce([_product(a, b, -np.inf) for a, b in pairs]),
        np.maximum.reduce([_product(a, b, np.inf) for a, b in pairs]),
    )


def _product(a: Array, b: Array, toward: float) -> Array:
    with np.errstate(all="ignore"):
        p = np.where((a == 0) | (b == 0), 0, a * b)
        exact = _exact(p, a, b) | (a == 0) | (b == 0) | np.isinf(a) | np.isinf(b)
        return np.where(exact, p, np.nextafter(p, toward))


def _exact(p: Array, a: Array, b: Array) -> Array:
    """Whether p is the product without rounding (Dekker's splitting, away from both ends)."""
    (a1, a2), (b1, b2) = ((x1 := (c := 134217729.0 * x) - (c - x), x - x1) for x in (a, b))
    rest = ((a1 * b1 - p) + a1 * b2 + a2 * b1) + a2 * b2
    middle = [(np.abs(x) > 1e-140) & (np.abs(x) < 1e140) for x in (a, b)]
    return (rest == 0) & middle[0] & middle[1]


def reciprocal(x: Interval) -> Interval:
    """The inverse; everything where x contains 0."""
    with np.errstate(all="ignore"):
        lo, hi = 1 / x.hi, 1 / x.lo
        one = np.ones(())
        inverse = Interval(
            np.where(_exact(one, x.hi, lo), lo, np.nextafter(lo, -np.inf)),
            np.where(_exact(one, x.lo, hi), hi, np.nextafter(hi, np.inf)),
        )
    positive = Interval(np.maximum(inverse.lo, 0), np.where(x.lo == 0, np.inf, inverse.hi))
    negative = Interval(np.where(x.hi == 0, -np.inf, inverse.lo), np.minimum(inverse.hi, 0))
    one_sided = where(x.lo >= 0, positive, negative)
    return where((x.lo >= 0) | (x.hi <= 0), one_sided, everything(x))


def div(x: Interval, y: Interval) -> Interval:
    """The quotient; everything where y contains 0 inside."""
    return mul(x, reciprocal(y))


# --- functions ------------------------------------------------------------------------------------


def widened(lo: Array, hi: Array, shift: float = 0.0) -> Interval:
    """Intervals that also contain what a library function was off by, and `shift` beyond."""
    lo, hi = np.where(np.isnan(lo), -np.inf, lo), np.where(np.isnan(hi), np.inf, hi)
    with np.errstate(all="ignore"):
        lo = np.where(np.isinf(lo), np.nextafter(lo, -np.inf), lo - np.abs(lo) * _LIBRARY - shift)
        hi = np.where(np.isinf(hi), np.nextafter(hi, np.inf), hi + np.abs(hi) * _LIBRARY + shift)
    return Interval(lo, hi)


def increasing(f: Callable, x: Interval, at_zero: float | None = None) -> Interval:
    """A function of intervals, for an increasing function of the library."""
    with np.errstate(all="ignore"):
        y = widened(f(x.lo), f(x.hi))
    if at_zero is not None:
        y = Interval(np.where(x.lo == 0, at_zero, y.lo), np.where(x.hi == 0, at_zero, y.hi))
    return y


def decreasing(f: Callable, x: Interval) -> Interval:
    """A function of intervals, for a decreasing function of the library."""
    with np.errstate(all="ignore"):
        return widened(f(x.hi), f(x.lo))


def bump(f: Callable, x: Interval) -> Interval:
    """A function of intervals, for an even function that falls on both sides of 0."""
    with np.errstate(all="ignore"):
        return widened(f(magnitude(x)), f(mignitude(x)))


def odd_wave(f: Callable, peak: float, x: Interval) -> Interval:
    """A function of intervals: odd, rising from 0 to `peak`, and then falling back to 0.

    Args:
        f: The function.
        peak: Where its maximum lies, to 3 digits.
        x: The intervals.
    """
    near = np.linspace(peak * 0.99, peak * 1.01, 201)
    top = float(f(near).max()) * (1 + 1e-7)

    def above_zero(lo: Array, hi: Array) -> Interval:
        with np.errstate(all="ignore"):
            ends = [
                np.where(np.isinf(end), 0, f(np.where(np.isinf(end), 0, end))) for end in (lo, hi)
            ]
        holds = (lo <= peak * 1.01) & (hi >= peak * 0.99)
        return widened(np.minimum(*ends), np.where(holds, top, np.maximum(*ends)))

    up = above_zero(np.maximum(x.lo, 0), np.maximum(x.hi, 0))
    down = neg(above_zero(np.maximum(-x.hi, 0), np.maximum(-x.lo, 0)))
    return where(x.lo >= 0, up, where(x.hi <= 0, down, hull(up, down)))
