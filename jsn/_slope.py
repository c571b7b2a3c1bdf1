"""Station 9, element-wise functions: the largest slope of one.

In: an expression in one variable, and an interval. Out: a proven bound of its slope there, and of
its values. Must not know how an expression is enclosed, arrays, programs or norms.
"""

from __future__ import annotations

import numpy as np

from jsn import _interval as iv
from jsn._expr import COMPARISONS, LOGIC, Expr, breakpoints, depth, key, walk
from jsn._interval import Interval
from jsn._jet import enclose

_TOLERANCE = 1e-6
_MOST_CELLS = 2**15
_MOST_LEVELS = 80


def _cells(node: Expr, low: float, high: float) -> Interval:
    ends = {
        low,
        high,
        *breakpoints(node),
        *(s * 4.0**k for s in (-1, 1) for k in range(-1, 4)),
        0.0,
    }
    edges = np.array(sorted(end for end in ends if low <= end <= high))
    return Interval(edges[:-1], edges[1:]) if len(edges) > 1 else Interval(edges, edges)


def _split(t: Interval) -> Interval:
    with np.errstate(all="ignore"):
        middle = (t.lo + t.hi) / 2
    middle = np.where(np.isinf(t.hi), np.maximum(2 * np.abs(t.lo), 1), middle)
    middle = np.where(np.isinf(t.lo), np.minimum(-2 * np.abs(t.hi), -1), middle)
    middle = np.where(np.isinf(t.lo) & np.isinf(t.hi), 0, middle)
    return Interval(np.concatenate([t.lo, middle]), np.concatenate([middle, t.hi]))


_known: dict[tuple, float] = {}


def largest_slope(node: Expr, low: float = -np.inf, high: float = np.inf) -> float:
    """A bound of the slope of an expression over an interval, by dividing it into cells.

    Returns:
        The bound: some 1e-6 above the largest slope where that is attained; infinity where no
        bound is found.
    """
    name = (key(node), low, high)
    if name not in _known:
        _known[name] = _largest_slope(node, low, high)
    return _known[name]


def _largest_slope(node: Expr, low: float, high: float) -> float:
    t, bound, attained = _cells(node, low, high), 0.0, 0.0
    last = np.zeros(1)
    for _ in range(_MOST_LEVELS):
        slopes = iv.magnitude(enclose(node, t).d)
        middle = _split(t).lo[len(t.lo) :]
        middle = middle[np.isfinite(middle)]
        if len(middle):
            at = enclose(node, Interval(middle, middle)).d
            attained = max(attained, float(np.nan_to_num(iv.mignitude(at), posinf=0).max()))
        open_ = slopes > attained * (1 + _TOLERANCE)
        bound = max(bound, float(slopes[~open_].max(initial=0.0)))
        t = Interval(t.lo[open_], t.hi[open_])
        if not open_.any():
            return bound
        if len(t.lo) > _MOST_CELLS:
            break
        last, t = slopes[open_], _split(t)
    return max(bound, float(last.max()))


def range_of(node: Expr, low: float = -np.inf, high: float = np.inf) -> tuple[float, float]:
    """An interval that contains all values of an expression, not necessarily a small one."""
    t = _cells(node, low, high)
    for _ in range(5):
        t = _split(t)
    values = enclose(node, t).g
    return float(values.lo.min()), float(values.hi.max())


def steepest(node: Expr, low: float, high: float) -> Expr:
    """The first operation of an expression, from the inside, that has no bounded slope."""
    order = list(walk(node))[::-1]
    for part in sorted(order, key=depth):
        is_number = part.op not in {*COMPARISONS, *LOGIC, "is_finite"}
        if part.leaves and is_number and not np.isfinite(largest_slope(part, low, high)):
            return part
    return node
