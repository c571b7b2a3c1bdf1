"""Station 9, its ground: interval arithmetic on many intervals at once, rounded outward.

In: arrays of lower and upper ends, infinite ones included. Out: intervals that contain every
result for every choice of real (finite) numbers within the operands. Must not know expressions.

A sum that floating point gives exactly is not widened, nor a product with 0 or a power of two:
constants of piecewise linear functions come out as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Array = np.ndarray
_LIBRARY = 1e-12
"""Relative error of a function of the C library, of numpy or of scipy, its argument's rounding
included: far more than they have."""
_TINY = 1e-300


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
    a, b = np.stack([x.lo, x.lo, x.hi, x.hi]), np.stack([y.lo, y.hi, y.lo, y.hi])
    zero = (a == 0) | (b == 0)
    with np.errstate(all="ignore"):
        p = np.where(zero, 0, a * b)
        shifted = (np.abs(np.frexp(a)[0]) == 0.5) | (np.abs(np.frexp(b)[0]) == 0.5)
        exact = zero | (shifted & (np.abs(p) > _TINY) & np.isfinite(p))
        exact |= np.isinf(a) | np.isinf(b)
        lo, hi = np.nextafter(p, -np.inf), np.nextafter(p, np.inf)
    return Interval(np.where(exact, p, lo).min(0), np.where(exact, p, hi).max(0))


def reciprocal(x: Interval) -> Interval:
    """The inverse; everything where x contains 0."""
    with np.errstate(all="ignore"):
        lo, hi = 1 / x.hi, 1 / x.lo
        inverse = Interval(
            np.where(np.abs(lo) == 1, lo, np.nextafter(lo, -np.inf)),
            np.where(np.abs(hi) == 1, hi, np.nextafter(hi, np.inf)),
        )
    positive = Interval(np.maximum(inverse.lo, 0), np.where(x.lo == 0, np.inf, inverse.hi))
    negative = Interval(np.where(x.hi == 0, -np.inf, inverse.lo), np.minimum(inverse.hi, 0))
    one_sided = where(x.lo >= 0, positive, negative)
    return where((x.lo >= 0) | (x.hi <= 0), one_sided, everything(x))


def div(x: Interval, y: Interval) -> Interval:
    """The quotient; everything where y contains 0 inside."""
    return mul(x, reciprocal(y))


# --- functions ------------------------------------------------------------------------------------


def widened(lo: Array, hi: Array, within: tuple[float, float] = (-np.inf, np.inf)) -> Interval:
    """Intervals that also contain what a library function was off by, but nothing outside `within`.

    Results so small that they lose digits, or become 0, are off by less than `_TINY`.
    """
    lo, hi = np.where(np.isnan(lo), -np.inf, lo), np.where(np.isnan(hi), np.inf, hi)
    with np.errstate(all="ignore"):
        lo = np.where(np.isinf(lo), np.nextafter(lo, -np.inf), lo - np.abs(lo) * _LIBRARY - _TINY)
        hi = np.where(np.isinf(hi), np.nextafter(hi, np.inf), hi + np.abs(hi) * _LIBRARY + _TINY)
    return Interval(np.maximum(lo, within[0]), np.minimum(hi, within[1]))


def increasing(
    f: Callable,
    x: Interval,
    within: tuple[float, float] = (-np.inf, np.inf),
    at_zero: float | None = None,
) -> Interval:
    """A function of intervals, for an increasing function of the library."""
    with np.errstate(all="ignore"):
        y = widened(f(x.lo), f(x.hi), within)
    if at_zero is not None:
        y = Interval(np.where(x.lo == 0, at_zero, y.lo), np.where(x.hi == 0, at_zero, y.hi))
    return y


def decreasing(f: Callable, x: Interval, within: tuple[float, float]) -> Interval:
    """A function of intervals, for a decreasing function of the library."""
    with np.errstate(all="ignore"):
        return widened(f(x.hi), f(x.lo), within)


def bump(f: Callable, x: Interval, top: float) -> Interval:
    """A function of intervals, for an even function that falls from `top` on both sides of 0."""
    with np.errstate(all="ignore"):
        return widened(f(magnitude(x)), f(mignitude(x)), (0.0, top))


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
        low, high = np.minimum(*ends), np.where(holds, top, np.maximum(*ends))
        return widened(low, high, (0.0, np.inf))

    up = above_zero(np.maximum(x.lo, 0), np.maximum(x.hi, 0))
    down = neg(above_zero(np.maximum(-x.hi, 0), np.maximum(-x.lo, 0)))
    return where(x.lo >= 0, up, where(x.hi <= 0, down, hull(up, down)))
