"""Station 9, element-wise functions: enclosures of exp, tanh, erf, ... and of their slopes.

In: intervals of an argument u. Out: intervals that contain s(u), s'(u), and where that is more
than their product u s'(u), which falls for large u where s' falls fast. Must not know expressions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy import special

from jsn import _interval as iv
from jsn._interval import Interval

Enclosure = Callable[[Interval], Interval]
_ANY, _POSITIVE, _SIGNED = (-np.inf, np.inf), (0.0, np.inf), (-1.0, 1.0)


class Unary(NamedTuple):
    """An element-wise function s: enclosures of s, of s', and where known of u s' and u s'/s."""

    value: Enclosure
    slope: Enclosure
    rise: Enclosure | None = None
    power: Enclosure | None = None


# --- the functions and slopes that are not numpy's ------------------------------------------------


def _logistic_slope(u):
    w = np.exp(-np.abs(u))
    return w / (1 + w) ** 2


def _tanh_slope(u):
    return 4 * _logistic_slope(2 * u)


_ERF_SLOPE = 2 / np.sqrt(np.pi)


def _erf_slope(u):
    return _ERF_SLOPE * np.exp(-(u**2))


def _softplus(u):
    return np.maximum(u, 0) + np.log1p(np.exp(-np.abs(u)))


def _dip(f: Callable, at: float, least: float) -> Enclosure:
    """The enclosure of u f(u), if that falls from 0 to `least` near `at`, and then rises."""

    def enclose(u: Interval) -> Interval:
        with np.errstate(all="ignore"):
            ends = [
                np.where(np.isinf(end), np.where(end > 0, np.inf, 0), end * f(end)) for end in u
            ]
        holds = (u.lo <= at + 1e-3) & (u.hi >= at - 1e-3)
        return iv.widened(np.where(holds, least, np.minimum(*ends)), np.maximum(*ends))

    return enclose


_exp_rise = _dip(np.exp, -1.0, -0.3678795)
_softplus_rise = _dip(special.expit, -1.2784645, -0.2784646)


def _softplus_power(u: Interval) -> Interval:
    """U s'(u) / s(u): for u > 0 at most 1, as softplus is at least u."""
    return iv.where(u.lo >= 0, iv.interval(0, 1, u), iv.everything(u))


def _constant(lo: float, hi: float) -> Enclosure:
    return lambda u: iv.interval(lo, hi, u)


def _sin(shift: float) -> Enclosure:
    """Sin(u + shift): the value in the middle, give or take half of the width."""

    def enclose(u: Interval) -> Interval:
        with np.errstate(all="ignore"):
            middle, half = (u.lo + u.hi) / 2, (u.hi - u.lo) / 2
            middle, half = np.where(half < 4, middle, 0), np.where(half < 4, half, 4)
            around = np.sin(middle + shift)
        slack = 1e-12 + 1e-15 * np.abs(middle)
        return iv.widened(around - half - slack, around + half + slack, _SIGNED)

    return enclose


def _shifted_inverse(u: Interval) -> Interval:
    return iv.reciprocal(iv.add(u, iv.interval(1, 1, u)))


def _log1p_rise(u: Interval) -> Interval:
    """U / (1 + u) = 1 - 1 / (1 + u)."""
    return iv.add(iv.interval(1, 1, u), iv.neg(_shifted_inverse(u)))


def _one_plus_square(u: Interval) -> Interval:
    return iv.add(power(2, u), iv.interval(1, 1, u))


def _root_inverse(u: Interval) -> Interval:
    return iv.reciprocal(sqrt(_one_plus_square(u)))


def sqrt(u: Interval) -> Interval:
    """The square root, of what is not negative."""
    u = Interval(np.maximum(u.lo, 0), np.maximum(u.hi, 0))
    return iv.increasing(np.sqrt, u, _POSITIVE, 0.0)


def _log(u: Interval) -> Interval:
    return iv.increasing(np.log, Interval(np.maximum(u.lo, 0), np.maximum(u.hi, 0)))


def power(n: int, u: Interval) -> Interval:
    """A positive integer power, exact where floating point is."""
    if n % 2 == 0:
        u = _moduli(u)
    ends = [iv.interval(1, 1, u)] * 2
    for _ in range(n):
        ends = [iv.mul(x, Interval(end, end)) for x, end in zip(ends, u, strict=True)]
    return Interval(ends[0].lo, ends[1].hi)


def _moduli(u: Interval) -> Interval:
    return Interval(iv.mignitude(u), iv.magnitude(u))


# --- the table ------------------------------------------------------------------------------------


def _rising(f: Callable, within: tuple[float, float] = _ANY, zero: float | None = None):
    return lambda u: iv.increasing(f, u, within, zero)


def _bump(f: Callable, top: float) -> Enclosure:
    return lambda u: iv.bump(f, u, top)


def _wave(f: Callable, peak: float) -> Enclosure:
    return lambda u: iv.odd_wave(lambda v: v * f(v), peak, u)


def _scaled(factor: float, inner: Enclosure) -> Enclosure:
    return lambda u: iv.mul(iv.widened(*iv.interval(factor, factor, u)), inner(u))


def _minus(inner: Enclosure) -> Enclosure:
    return lambda u: iv.neg(inner(u))


_EXP = _rising(np.exp, _POSITIVE, 1.0)
_EXP2 = _rising(np.exp2, _POSITIVE, 1.0)
_ERF_TOP = 1.1283791671
_cosh: Enclosure = lambda u: iv.increasing(np.cosh, _moduli(u), (1.0, np.inf))

UNARY: dict[str, Unary] = {
    "exp": Unary(_EXP, _EXP, _exp_rise),
    "exp2": Unary(_EXP2, _scaled(np.log(2), _EXP2)),
    "expm1": Unary(_rising(np.expm1, (-1.0, np.inf), 0.0), _EXP, _exp_rise),
    "log": Unary(_log, iv.reciprocal, _constant(1, 1)),
    "log1p": Unary(_rising(np.log1p, _ANY, 0.0), _shifted_inverse, _log1p_rise),
    "tanh": Unary(
        _rising(np.tanh, _SIGNED, 0.0),
        _bump(_tanh_slope, 1.0),
        _wave(_tanh_slope, 0.7717),
        _constant(0, 1),
    ),
    "logistic": Unary(
        _rising(special.expit, (0.0, 1.0), 0.5),
        _bump(_logistic_slope, 0.25),
        _wave(_logistic_slope, 1.5434),
    ),
    "softplus": Unary(
        _rising(_softplus, _POSITIVE),
        _rising(special.expit, (0.0, 1.0)),
        _softplus_rise,
        _softplus_power,
    ),
    "erf": Unary(
        _rising(special.erf, _SIGNED, 0.0),
        _bump(_erf_slope, _ERF_TOP),
        _wave(_erf_slope, 0.70711),
        _constant(0, 1),
    ),
    "erfc": Unary(
        lambda u: iv.decreasing(special.erfc, u, (0.0, 2.0)),
        _minus(_bump(_erf_slope, _ERF_TOP)),
        _minus(_wave(_erf_slope, 0.70711)),
    ),
    "sin": Unary(_sin(0.0), _sin(np.pi / 2)),
    "cos": Unary(_sin(np.pi / 2), _minus(_sin(0.0))),
    "atan": Unary(
        _rising(np.arctan, _ANY, 0.0),
        lambda u: iv.reciprocal(_one_plus_square(u)),
        None,
        _constant(0, 1),
    ),
    "asinh": Unary(_rising(np.arcsinh, _ANY, 0.0), _root_inverse, None, _constant(0, 1)),
    "sinh": Unary(_rising(np.sinh, _ANY, 0.0), _cosh),
    "cosh": Unary(_cosh, _rising(np.sinh, _ANY, 0.0)),
    "sqrt": Unary(sqrt, lambda u: iv.reciprocal(_scaled(2.0, sqrt)(u)), None, _constant(0.5, 0.5)),
}
"""By the names of JAX's primitives, and softplus."""
