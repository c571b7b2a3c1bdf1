"""Station 9, element-wise functions: the largest slope of one, and the values it takes.

In: an expression in one variable, and an interval. Out: a proven bound of its slope there, and of
its values. Must not know how an expression is enclosed, arrays, programs or norms.
"""

from __future__ import annotations

import numpy as np

from jsn import _interval as iv
from jsn._expr import Expr, affine, breakpoints, walk
from jsn._interval import Interval
from jsn._jet import enclose
from jsn._rounding import float_up

_TOLERANCE = 1e-6
_MOST_CELLS = 2**15
_MOST_ROUNDS = 28
_SPLITS = 3
_PATIENCE = 3
"""Rounds without progress after which a finite bound is good enough. Where constants vary from
element to element, one: they are intervals, and no division of cells makes those smaller."""


def _cells(node: Expr, low: float, high: float) -> Interval:
    """The first cells: pieces of the expression, and powers of 4."""
    powers = (sign * 4.0**k for sign in (-1, 1) for k in range(-1, 4))
    ends = {low, high, *breakpoints(node), *powers, 0.0}
    edges = np.array(sorted(end for end in ends if low <= end <= high))
    return Interval(edges[:-1], edges[1:]) if len(edges) > 1 else Interval(edges, edges)


def _middle(t: Interval) -> np.ndarray:
    """Where to divide cells; an unbounded one at twice its finite end."""
    with np.errstate(all="ignore"):
        middle = t.lo / 2 + t.hi / 2
        middle = np.where(np.isinf(t.hi), np.maximum(2 * np.abs(t.lo), 1), middle)
        middle = np.where(np.isinf(t.lo), np.minimum(-2 * np.abs(t.hi), -1), middle)
    return np.clip(np.where(np.isinf(t.lo) & np.isinf(t.hi), 0, middle), t.lo, t.hi)


def _split(t: Interval, times: int = 1) -> Interval:
    """Cells in two, so many times."""
    for _ in range(times):
        middle = _middle(t)
        t = Interval(np.concatenate([t.lo, middle]), np.concatenate([middle, t.hi]))
    return t


def largest_slope(node: Expr, low: float = -np.inf, high: float = np.inf) -> float:
    """A bound of the slope of an expression over an interval, by dividing it into cells.

    A cell whose slopes do not exceed one that is attained elsewhere is closed; others are divided.

    Returns:
        The bound: some 1e-6 above the largest slope where that is attained; infinity where no
        bound is found.
    """
    straight = affine(node)
    if straight is not None:
        return float_up(abs(straight[0]))
    t, closed, attained = _cells(node, low, high), 0.0, 0.0
    varies = any(part.op == "const" and part.value is None for part in walk(node))
    patience, progress = (1, 1e-3) if varies else (_PATIENCE, 0.0)
    best, waited = np.inf, 0
    for _ in range(_MOST_ROUNDS):
        n, points = len(t.lo), _middle(t)
        both = Interval(np.concatenate([t.lo, points]), np.concatenate([t.hi, points]))
        d = enclose(node, both).d
        slopes, at = iv.magnitude(d)[:n], iv.mignitude(d)[n:][np.isfinite(points)]
        attained = max(attained, float(np.nan_to_num(at, posinf=0).max(initial=0.0)))
        worst = max(closed, float(slopes.max()))
        waited = 0 if worst < best * (1 - progress) else waited + 1
        best = min(best, worst)
        open_ = slopes > attained * (1 + _TOLERANCE)
        closed = max(closed, float(slopes[~open_].max(initial=0.0)))
        stuck = np.isfinite(best) and waited >= patience
        if stuck or not open_.any() or open_.sum() * 2**_SPLITS > _MOST_CELLS:
            break
        t = _split(Interval(t.lo[open_], t.hi[open_]), _SPLITS)
    return best


def range_of(node: Expr, low: float = -np.inf, high: float = np.inf) -> tuple[float, float]:
    """An interval that contains all values of an expression, not necessarily a small one."""
    t = _cells(node, low, high)
    values = enclose(node, _split(t, 5)).g
    return float(values.lo.min()), float(values.hi.max())
