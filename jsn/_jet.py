# pyright: reportCallIssue=false, reportArgumentType=false
"""Station 9, element-wise functions: enclosures of an expression and its slope on cells.

In: an expression in one variable, and cells of that variable, unbounded ones included. Out: for
each cell, intervals that contain value and slope. Must not know arrays, programs or norms.

Names tell nothing: `gelu` reaches a program as erfc, or tanh, and products, and any of them may be
written by hand. So an expression is enclosed as it stands, on ever smaller cells. What is hard is
the line's ends, where products such as t * erfc'(t) are infinity times 0. There an expression g of
t carries, beside its value and slope g', three more enclosures, each of which composes well where
the others do not (a meaningless one, such as t g' / g where g is 0, only ever closes too early the
search for a slope that is attained, never for a bound):

    h = t g',      r = g / t,      e = t g' / g

For instance (u v)' = u' v + r_u h_v, and for v = s(u): h_v = [u s'(u)] e_u, where u s'(u) is known
to fall for large u.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from jsn import _interval as iv
from jsn._expr import COMPARISONS, CONDITIONS, GROUP, LOGIC, Expr, crossings, exact, walk
from jsn._interval import Interval
from jsn._unary import UNARY, Unary, power, sqrt


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


def _unary(function: Unary, t: Interval, u: Jet) -> Jet:
    slope = function.slope(u.g)
    d, h, e = iv.mul(slope, u.d), iv.mul(slope, u.h), None
    if function.rise is not None:
        h = iv.meet(h, iv.mul(function.rise(u.g), u.e))
    if function.power is not None:
        e = iv.mul(function.power(u.g), u.e)
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
    slope = iv.mul(iv.interval(n, n, t), power(n - 1, x.g) if n > 1 else iv.interval(1, 1, t))
    e = iv.mul(iv.interval(n, n, t), x.e)
    return _closed(t, power(n, x.g), iv.mul(slope, x.d), iv.mul(slope, x.h), None, e)


def _root(t: Interval, x: Jet, c: Jet) -> Jet:
    """The square root of x^2 + c, c > 0: of slope x / root, and of power x^2 / root^2."""
    g = sqrt(iv.add(power(2, x.g), c.g))
    with np.errstate(all="ignore"):
        slopes = [end / np.sqrt(end**2 + shift) for end in x.g for shift in c.g]
    ends = [end for end in x.g for _ in c.g]
    slopes = [np.where(np.isfinite(s), s, np.sign(e)) for s, e in zip(slopes, ends, strict=True)]
    slope = iv.widened(np.minimum.reduce(slopes), np.maximum.reduce(slopes), (-1.0, 1.0))
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
    "abs": _abs, "integer_pow": _integer_pow, "root": _root,
    "square": lambda t, x: _integer_pow(t, x, 2),
}  # fmt: skip
ELEMENTWISE = frozenset(
    {"add", "sub", "neg", "mul", "div", "max", "min", "abs", "integer_pow", "square", "rsqrt",
     "clamp", "select_n", *CONDITIONS, *UNARY, *_STEPS} - {"softplus"}
)  # fmt: skip
"""Primitives that an expression can be made of."""


def _truth(node: Expr, jets: Callable[[Expr], Jet], strict: bool) -> tuple[np.ndarray, np.ndarray]:
    """On which cells a condition surely holds, and on which it surely does not.

    Unless `strict`, single points of a cell may be otherwise, such as an end of it.
    """
    if node.op in LOGIC:
        parts = [_truth(arg, jets, strict) for arg in node.args]
        if node.op == "not":
            return parts[0][1], parts[0][0]
        (yes, no), (yes2, no2) = parts
        return (yes & yes2, no | no2) if node.op == "and" else (yes | yes2, no & no2)
    if node.op not in COMPARISONS:
        g = jets(node).g
        return (g.lo == 1) & (g.hi == 1), (g.lo == 0) & (g.hi == 0)
    x, y = (jets(arg).g for arg in node.args)
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


def _group(node: Expr, t: Interval, jets: Callable[[Expr], Jet]) -> Jet:
    """A sum or maximum over a group whose elements may lie in any of the cells."""
    x = jets(node.args[0])
    g = iv.interval(x.g.lo.min(), x.g.hi.max(), t)
    if node.op == "group_sum":
        g = iv.mul(g, iv.interval(node.params[1], node.params[1], t))
    return Jet(g, *[iv.everything(t)] * 4)


def _number(node: Expr, t: Interval, jets: Callable[[Expr], Jet]) -> Jet:
    """A condition as a number: 1 where it surely holds, 0 where it surely does not."""
    yes, no = _truth(node, jets, strict=True)
    zero, one = (_const(t, x, x) for x in (0.0, 1.0))
    free = Jet(iv.interval(0, 1, t), *[iv.everything(t)] * 4)
    return _either(t, one, _either(t, zero, free, no, ~no), yes, ~yes)


def _select(node: Expr, t: Interval, jets: Callable[[Expr], Jet]) -> Jet:
    """One of two branches. Where they do not meet, a change of the condition is a jump."""
    whole = _continuous(node)
    yes, no = _truth(node.args[0], jets, strict=not whole)
    jet = _either(t, jets(node.args[2]), jets(node.args[1]), yes, no)
    if whole:
        return jet
    free, sure = iv.everything(t), yes | no
    return Jet(jet.g, *(iv.where(sure, part, free) for part in jet[1:]))


def _leaf(node: Expr, t: Interval, jets: Callable[[Expr], Jet]) -> Jet:
    unit = iv.interval(1, 1, t)
    return Jet(t, unit, t, unit, unit)


_WHOLE: dict[str, Callable[[Expr, Interval, Callable[[Expr], Jet]], Jet]] = {
    "leaf": _leaf,
    "const": lambda node, t, jets: _const(t, *node.params[:2]),
    "select": _select,
    **dict.fromkeys(CONDITIONS, _number),
    **dict.fromkeys(GROUP, _group),
}


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
        if node.op in _WHOLE:
            return _WHOLE[node.op](node, t, jets)
        args = [jets(arg) for arg in node.args]
        if node.op in UNARY:
            return _unary(UNARY[node.op], t, *args)
        if node.op in _STEPS:
            return _jump(t, *args, _STEPS[node.op])
        return _NODES[node.op](t, *args, *node.params)

    return jets(node)


def _continuous(node: Expr) -> bool:
    """Whether both branches of a selection are equal, exactly, wherever its condition changes."""
    for condition in walk(node.args[0]):
        if condition.op in COMPARISONS and condition.depends:
            points = crossings(*condition.args)
            if points is None or not all(_meet(*node.args[1:], at) for at in points):
                return False
    return True


def _meet(off: Expr, on: Expr, at: Fraction) -> bool:
    """Whether two expressions are equal at a point: by rational arithmetic, else by enclosures."""
    values = exact(off, at), exact(on, at)
    if None not in values:
        return values[0] == values[1]
    point = iv.interval(np.array([float(at)]), np.array([float(at)]))
    x, y = enclose(off, point).g, enclose(on, point).g
    return bool(Fraction(float(at)) == at and x.lo[0] == x.hi[0] == y.lo[0] == y.hi[0])
