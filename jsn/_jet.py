# pyright: reportCallIssue=false, reportArgumentType=false
"""Station 9, element-wise functions: enclosures of an expression and its slope on cells.

In: an expression in one variable, and cells of that variable, unbounded ones included. Out: for
each cell, intervals that contain value and slope. Must not know arrays, programs or norms.

Names tell nothing: `gelu` reaches a program as erfc, or tanh, and products, and any of them may be
written by hand. So an expression is enclosed as it stands, on ever smaller cells. What is hard is
the line's ends, where products such as t * erfc'(t) are infinity times 0. There an expression g of
t carries, beside its value and slope g', three more enclosures, each of which composes well where
the others do not:

    h = t g',      r = g / t,      e = t g' / g

For instance (u v)' = u' v + r_u h_v, and for v = s(u): h_v = [u s'(u)] e_u, where u s'(u) is known
to fall for large u.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from scipy import special

from jsn import _interval as iv
from jsn._expr import COMPARISONS, LOGIC, Expr, crossing, walk
from jsn._interval import Interval


class Jet(NamedTuple):
    """Enclosures of an expression g on cells of t: g, g', t g', g / t, t g' / g."""

    g: Interval
    d: Interval
    h: Interval
    r: Interval
    e: Interval


def _closed(t: Interval, g: Interval, d: Interval, h=None, r=None, e=None) -> Jet:
    """A jet, each part narrowed by what the others say."""
    free = iv.everything(t)
    h, r, e = h or free, r or free, e or free
    h = iv.meet(h, iv.mul(t, d), iv.mul(e, g))
    r = iv.meet(r, iv.div(g, t))
    d = iv.meet(d, iv.div(h, t), iv.mul(e, r))
    e = iv.meet(e, iv.div(h, g), iv.div(d, r))
    return Jet(g, d, h, r, e)


class Unary(NamedTuple):
    """An element-wise function s: enclosures of s, of s', and where known of u s' and u s'/s."""

    value: Callable[[Interval], Interval]
    slope: Callable[[Interval], Interval]
    rise: Callable[[Interval], Interval] | None = None
    power: tuple[float, float] | None = None


def _logistic_slope(u):
    w = np.exp(-np.abs(u))
    return w / (1 + w) ** 2


def _tanh_slope(u):
    return 4 * _logistic_slope(2 * u)


def _erf_slope(u):
    return 2 / np.sqrt(np.pi) * np.exp(-(u**2))


def _exp_rise(u: Interval) -> Interval:
    """U exp(u): from 0 down to -1 / e at -1, then up."""
    f = lambda v: np.where(np.isinf(v), np.where(v > 0, np.inf, 0), v * np.exp(v))
    with np.errstate(all="ignore"):
        ends = f(u.lo), f(u.hi)
    holds = (u.lo <= -1) & (u.hi >= -1)
    low = np.where(holds, -0.36787944117144240, np.minimum(*ends))
    return iv.widened(low, np.maximum(*ends))


def _sin(shift: float) -> Callable[[Interval], Interval]:
    """Sin(u + shift): the value in the middle, give or take half of the width."""

    def enclose(u: Interval) -> Interval:
        with np.errstate(all="ignore"):
            middle, half = (u.lo + u.hi) / 2, (u.hi - u.lo) / 2
            middle, half = np.where(half < 4, middle, 0), np.where(half < 4, half, 4)
            around = np.sin(middle + shift)
        slack = 1e-12 + 1e-15 * np.abs(middle)
        found = iv.widened(around - half - slack, around + half + slack)
        return iv.meet(found, iv.interval(-1, 1, u))

    return enclose


def _shifted_inverse(u: Interval) -> Interval:
    return iv.reciprocal(iv.add(u, iv.interval(1, 1, u)))


def _one_plus_square(u: Interval) -> Interval:
    return iv.add(_power(2, u), iv.interval(1, 1, u))


def _root_inverse(u: Interval) -> Interval:
    return iv.reciprocal(_sqrt(_one_plus_square(u)))


def _sqrt(u: Interval) -> Interval:
    return iv.increasing(np.sqrt, Interval(np.maximum(u.lo, 0), np.maximum(u.hi, 0)), 0.0)


def _log(u: Interval) -> Interval:
    return iv.increasing(np.log, Interval(np.maximum(u.lo, 0), np.maximum(u.hi, 0)))


def _power(n: int, u: Interval) -> Interval:
    """A positive integer power, exact where floating point is."""
    if n % 2 == 0:
        u = _moduli(u)
    ends = [iv.interval(1, 1, u)] * 2
    for _ in range(n):
        ends = [iv.mul(power, Interval(end, end)) for power, end in zip(ends, u, strict=True)]
    return Interval(ends[0].lo, ends[1].hi)


def _softplus(u):
    return np.maximum(u, 0) + np.log1p(np.exp(-np.abs(u)))


def _of(f: Callable, zero: float | None = None) -> Callable[[Interval], Interval]:
    return lambda u: iv.increasing(f, u, zero)


def _wave(f: Callable, peak: float) -> Callable[[Interval], Interval]:
    return lambda u: iv.odd_wave(lambda v: v * f(v), peak, u)


def _scaled(factor: float, inner: Callable) -> Callable[[Interval], Interval]:
    return lambda u: iv.mul(iv.widened(np.float64(factor), np.float64(factor)), inner(u))


UNARY: dict[str, Unary] = {
    "exp": Unary(_of(np.exp, 1.0), _of(np.exp, 1.0), _exp_rise),
    "exp2": Unary(_of(np.exp2, 1.0), _scaled(np.log(2), _of(np.exp2))),
    "expm1": Unary(_of(np.expm1, 0.0), _of(np.exp, 1.0), _exp_rise),
    "log": Unary(_log, lambda u: iv.reciprocal(u)),
    "log1p": Unary(_of(np.log1p, 0.0), _shifted_inverse),
    "tanh": Unary(
        _of(np.tanh, 0.0), lambda u: iv.bump(_tanh_slope, u), _wave(_tanh_slope, 0.7717), (0, 1)
    ),
    "logistic": Unary(
        _of(special.expit, 0.5),
        lambda u: iv.bump(_logistic_slope, u),
        _wave(_logistic_slope, 1.5434),
    ),
    "softplus": Unary(_of(_softplus), _of(special.expit)),
    "erf": Unary(
        _of(special.erf, 0.0), lambda u: iv.bump(_erf_slope, u), _wave(_erf_slope, 0.70711), (0, 1)
    ),
    "erfc": Unary(
        lambda u: iv.decreasing(special.erfc, u),
        lambda u: iv.neg(iv.bump(_erf_slope, u)),
        lambda u: iv.neg(iv.odd_wave(lambda v: v * _erf_slope(v), 0.70711, u)),
    ),
    "sin": Unary(_sin(0.0), _sin(np.pi / 2)),
    "cos": Unary(_sin(np.pi / 2), lambda u: iv.neg(_sin(0.0)(u))),
    "atan": Unary(_of(np.arctan, 0.0), lambda u: iv.reciprocal(_one_plus_square(u)), None, (0, 1)),
    "asinh": Unary(_of(np.arcsinh, 0.0), _root_inverse, None, (0, 1)),
    "sinh": Unary(_of(np.sinh, 0.0), lambda u: iv.increasing(np.cosh, _moduli(u))),
    "cosh": Unary(lambda u: iv.increasing(np.cosh, _moduli(u)), _of(np.sinh, 0.0)),
    "sqrt": Unary(_sqrt, lambda u: iv.reciprocal(_scaled(2.0, _sqrt)(u)), None, (0.5, 0.5)),
}


def _moduli(u: Interval) -> Interval:
    return Interval(iv.mignitude(u), iv.magnitude(u))


def _unary(function: Unary, t: Interval, u: Jet) -> Jet:
    slope = function.slope(u.g)
    d, h, e = iv.mul(slope, u.d), iv.mul(slope, u.h), None
    if function.rise is not None:
        h = iv.meet(h, iv.mul(function.rise(u.g), u.e))
    if function.power is not None:
        e = iv.mul(iv.interval(*function.power, t), u.e)
    return _closed(t, function.value(u.g), d, h, None, e)


# --- one node ---------------------------------------------------------------------------------


def _const(t: Interval, lo: float, hi: float) -> Jet:
    zero = iv.interval(0, 0, t)
    return _closed(t, iv.interval(lo, hi, t), zero, zero, None, zero)


def _add(t: Interval, x: Jet, y: Jet) -> Jet:
    same = ((x.g.lo >= 0) & (y.g.lo >= 0)) | ((x.g.hi <= 0) & (y.g.hi <= 0))
    e = iv.where(same, iv.hull(x.e, y.e), iv.everything(t))
    return _closed(t, *(iv.add(getattr(x, part), getattr(y, part)) for part in "gdhr"), e)


def _neg(t: Interval, x: Jet) -> Jet:
    return Jet(*(iv.neg(part) for part in x[:4]), x.e)


def _mul(t: Interval, x: Jet, y: Jet) -> Jet:
    first = iv.meet(iv.mul(x.d, y.g), iv.mul(x.h, y.r))
    second = iv.meet(iv.mul(x.g, y.d), iv.mul(x.r, y.h))
    h = iv.add(iv.mul(x.h, y.g), iv.mul(x.g, y.h))
    r = iv.meet(iv.mul(x.r, y.g), iv.mul(x.g, y.r))
    return _closed(t, iv.mul(x.g, y.g), iv.add(first, second), h, r, iv.add(x.e, y.e))


def _reciprocal(t: Interval, x: Jet) -> Jet:
    g = iv.reciprocal(x.g)
    square = iv.neg(iv.mul(g, g))
    return _closed(t, g, iv.mul(square, x.d), iv.mul(square, x.h), None, iv.neg(x.e))


def _integer_pow(t: Interval, x: Jet, n: int) -> Jet:
    if n < 0:
        return _reciprocal(t, _integer_pow(t, x, -n))
    if n == 0:
        return _const(t, 1.0, 1.0)
    slope = iv.mul(iv.interval(n, n, t), _power(n - 1, x.g) if n > 1 else iv.interval(1, 1, t))
    e = iv.mul(iv.interval(n, n, t), x.e)
    return _closed(t, _power(n, x.g), iv.mul(slope, x.d), iv.mul(slope, x.h), None, e)


def _root(t: Interval, x: Jet, lo: float, hi: float) -> Jet:
    """The square root of x^2 + c, c > 0: of slope x / root, and of power x^2 / root^2."""
    c = iv.interval(lo, hi, t)
    g = _sqrt(iv.add(_power(2, x.g), c))
    with np.errstate(all="ignore"):
        slope = [end / np.sqrt(end**2 + hi) for end in x.g]
    slope = [np.where(np.isinf(end), np.sign(end), s) for end, s in zip(x.g, slope, strict=True)]
    with np.errstate(all="ignore"):
        steeper = [end / np.sqrt(end**2 + lo) for end in x.g]
    steeper = [
        np.where(np.isinf(end), np.sign(end), s) for end, s in zip(x.g, steeper, strict=True)
    ]
    slope = iv.meet(
        iv.widened(np.minimum(slope[0], steeper[0]), np.maximum(slope[1], steeper[1])),
        iv.interval(-1, 1, t),
    )
    e = iv.mul(iv.interval(0, 1, t), x.e)
    return _closed(t, g, iv.mul(slope, x.d), iv.mul(slope, x.h), None, e)


def _either(
    t: Interval, first: Jet, second: Jet, is_first: np.ndarray, is_second: np.ndarray
) -> Jet:
    """One of two jets where that is certain, else what contains both."""
    return Jet(
        *(
            iv.where(is_first, x, iv.where(is_second, y, iv.hull(x, y)))
            for x, y in zip(first, second, strict=True)
        )
    )


def _max(t: Interval, x: Jet, y: Jet) -> Jet:
    return _either(t, x, y, x.g.lo >= y.g.hi, y.g.lo >= x.g.hi)


def _min(t: Interval, x: Jet, y: Jet) -> Jet:
    return _either(t, x, y, x.g.hi <= y.g.lo, y.g.hi <= x.g.lo)


def _abs(t: Interval, x: Jet) -> Jet:
    return _either(t, x, _neg(t, x), x.g.lo >= 0, x.g.hi <= 0)


def _jump(t: Interval, x: Jet, value: Callable) -> Jet:
    """A step function: flat where the operand stays within one step, else anything."""
    flat = value(x.g.lo) == value(x.g.hi)
    flat &= ~((x.g.lo <= 0) & (x.g.hi >= 0)) if value is np.sign else x.g.lo != value(x.g.lo)
    zero, g = iv.interval(0, 0, t), Interval(value(x.g.lo), value(x.g.hi))
    slope = iv.where(flat, zero, iv.everything(t))
    return _closed(t, g, slope, slope)


_STEPS = {"sign": np.sign, "floor": np.floor, "ceil": np.ceil, "round": np.round}
_NODES: dict[str, Callable[..., Jet]] = {
    "add": _add, "neg": _neg, "mul": _mul, "reciprocal": _reciprocal, "max": _max, "min": _min,
    "abs": _abs, "integer_pow": _integer_pow, "root": _root, "const": _const,
    "square": lambda t, x: _integer_pow(t, x, 2),
}  # fmt: skip
ELEMENTWISE = frozenset(
    {"add", "sub", "neg", "mul", "div", "max", "min", "abs", "integer_pow", "square", "rsqrt",
     "clamp", *UNARY, *_STEPS} - {"softplus"}
)  # fmt: skip
"""Primitives that an expression can be made of."""


def _truth(node: Expr, jets: Callable[[Expr], Jet], strict: bool) -> tuple[np.ndarray, np.ndarray]:
    """On which cells a condition surely holds, and on which it surely does not.

    Unless `strict`, single points of a cell may be otherwise, such as an end of it.

    Raises:
        KeyError: If the condition is none of the known ones.
    """
    if node.op in LOGIC:
        parts = [_truth(arg, jets, strict) for arg in node.args]
        if node.op == "not":
            return parts[0][1], parts[0][0]
        (yes, no), (yes2, no2) = parts
        return (yes & yes2, no | no2) if node.op == "and" else (yes | yes2, no & no2)
    if node.op == "is_finite":
        finite = np.ones(jets(node.args[0]).g.lo.shape, bool)
        return finite, ~finite
    x, y = (jets(arg).g for arg in node.args)
    if node.args[0] is node.args[1]:
        x = y = iv.interval(0, 0, x)
    above, below = (x.lo > y.hi, x.hi < y.lo) if strict else (x.lo >= y.hi, x.hi <= y.lo)
    same = (x.lo == y.hi) & (x.hi == y.lo)  # both are one and the same number
    more, less = above & ~same, below & ~same
    return {
        "gt": (more, less | same),
        "ge": (more | same, less),
        "lt": (less, more | same),
        "le": (less | same, more),
        "eq": (same, more | less),
        "ne": (more | less, same),
    }[node.op]


def enclose(node: Expr, t: Interval) -> Jet:
    """The jet of an expression on cells of its variable.

    Raises:
        KeyError: If an operation is none of the known ones.
    """
    known: dict[int, Jet] = {}

    def jets(node: Expr) -> Jet:
        if id(node) not in known:
            known[id(node)] = one(node)
        return known[id(node)]

    def one(node: Expr) -> Jet:
        if node.op == "leaf":
            unit = iv.interval(1, 1, t)
            return Jet(t, unit, t, unit, unit)
        if node.op == "select":
            whole = _continuous(node)
            yes, no = _truth(node.args[0], jets, strict=not whole)
            jet = _either(t, jets(node.args[2]), jets(node.args[1]), yes, no)
            if whole:
                return jet
            free, sure = iv.everything(t), yes | no
            return Jet(jet.g, *(iv.where(sure, part, free) for part in jet[1:]))
        args = [jets(arg) for arg in node.args]
        if node.op in UNARY:
            return _unary(UNARY[node.op], t, *args)
        if node.op in _STEPS:
            return _jump(t, *args, _STEPS[node.op])
        return _NODES[node.op](t, *args, *node.params)

    return jets(node)


def _continuous(node: Expr) -> bool:
    """Whether both branches of a selection are equal, exactly, wherever its condition changes."""
    conditions = [part for part in walk(node.args[0]) if part.op in COMPARISONS]
    for condition in conditions:
        x, y = condition.args
        if x is y or not (x.leaves or y.leaves):
            continue
        at = crossing(x, y)
        if at is None or Fraction(float(at)) != at:
            return False
        point = iv.interval(np.array([float(at)]), np.array([float(at)]))
        off, on = (enclose(branch, point).g for branch in node.args[1:])
        if not (off.lo == off.hi == on.lo == on.hi).all():
            return False
    return True
