"""Station 9, element-wise primitives: one more operation on values.

In: a primitive and its operands, values or constants. Out: a value, a function of the same root
where the operands have one in common. Must not know other primitives, or programs.
"""

from __future__ import annotations

import hashlib
import math
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from jsn import _interval as iv
from jsn._expr import CONDITIONS, Expr
from jsn._jet import ELEMENTWISE
from jsn._upward import plus, root, times
from jsn._value import MOST_DEPTH, Bounds, Grouping, Known, Problem, Root, Value

_NAMES = {"select_n": "select"}
NAMES = ELEMENTWISE | {"pow"}


class _Common(NamedTuple):
    """What operands are functions of: all entries of one array, each of one entry of the root."""

    root: Root
    index: np.ndarray
    grouping: Grouping | None


def apply(bounds: Bounds, equation: Any, operands: list) -> Any:
    """The value of an element-wise primitive; a constant where it is one after all."""
    aval = equation.outvars[0].aval
    xs = [
        bounds.broadcast(x, aval.shape) if isinstance(x, Value) else np.asarray(x) for x in operands
    ]
    name, params = _named(equation, xs)
    otherwise = lambda: _otherwise(bounds, equation, name, params, xs)
    common = _common(xs)
    args = _arguments(bounds, xs, common, aval.shape) if common else None
    if args is None:
        common = _promoted(common, aval.shape)
        args = _arguments(bounds, xs, common, aval.shape) if common else None
    if name is None or args is None or common is None:
        new = bounds.new(aval.shape, otherwise(), equation)
        if name in ("max", "min") and all(isinstance(x, Value) for x in xs):
            new.root.pair = (name, *xs)  # type: ignore
        return new
    expr = bounds.pool.make(name, *args, params=params)
    if expr.value is not None:
        return np.full(aval.shape, expr.value, aval.dtype)
    value = Value(common.root, expr, common.index, common.grouping, otherwise, equation)
    if expr.depth > MOST_DEPTH:
        return bounds.new(aval.shape, bounds.known(value), equation)
    return value


def _named(equation: Any, xs: list) -> tuple[str | None, tuple]:
    """The operation of an expression that a primitive is; None if it is none of them."""
    name = equation.primitive.name
    if equation.outvars[0].aval.dtype.kind in "iu":  # wraps around, truncates, counts bits
        return None, ()
    if name == "integer_pow":
        return _power(equation.params["y"])
    if name == "pow":
        exponents = np.unique(xs.pop()) if not isinstance(xs[1], Value) else np.zeros(0)
        return _power(float(exponents[0])) if len(exponents) == 1 else (None, ())
    if name == "select_n" and len(xs) != 3:
        return None, ()
    if name == "div" and not isinstance(xs[1], Value) and xs[1].all():
        xs[1] = _Inverse(xs[1].astype(np.float64))
        return "mul", ()
    return _NAMES.get(name, name), ()


def _power(exponent: float) -> tuple[str | None, tuple]:
    """The operation of a power of a value."""
    if exponent == 2:
        return "square", ()
    if exponent in (0.5, -0.5):
        return ("sqrt" if exponent > 0 else "rsqrt"), ()
    whole = exponent == int(exponent) and abs(exponent) < 100
    return ("integer_pow", (int(exponent),)) if whole else (None, ())


# --- operands of one root ---------------------------------------------------------------------


def _common(xs: list) -> _Common | None:
    """What the values among the operands are functions of, if that is the same for all."""
    values = [x for x in xs if isinstance(x, Value)]
    whole = [x for x in values if x.grouping is not None]
    parts = [x for x in values if x.grouping is None]
    first, root = (parts or whole)[0], values[0].root
    same = all(x.root is root for x in values)
    same = same and all(x.grouping is whole[0].grouping for x in whole)
    if not same or not all(_equal(x.index, parts[0].index) for x in parts):
        return None
    if whole and not all(_equal(x.index, whole[0].index) for x in whole):
        return None
    if whole and parts and not _equal(whole[0].grouping.of[parts[0].index], whole[0].index):  # type: ignore
        return None
    return _Common(root, first.index, first.grouping)


def _equal(x: np.ndarray, y: np.ndarray) -> bool:
    return x is y or np.array_equal(x, y)


def _promoted(common: _Common | None, shape: tuple[int, ...]) -> _Common | None:
    """Functions of groups, repeated for all entries of the groups, as functions of entries."""
    grouping = common and common.grouping
    if grouping is None or grouping.at.size != math.prod(shape):
        return None
    at = grouping.at.reshape(shape)
    return _Common(common.root, at, None) if _equal(grouping.of[at], common.index) else None  # type: ignore


def _arguments(bounds: Bounds, xs: list, common: _Common, shape: tuple) -> list[Expr] | None:
    """Operands as expressions; None where a constant is no function of the root's entry."""
    args = []
    for x in xs:
        arg = x.expr if isinstance(x, Value) else _constant(bounds, x, common, shape)
        if arg is None:
            return None
        args.append(arg)
    return args


class _Inverse(NamedTuple):
    """The entry by entry inverse of a constant array without zeros."""

    of: np.ndarray


def _limits(x: np.ndarray | _Inverse) -> tuple[float, float]:
    """The least and the largest entry of a constant; NaN if there are NaNs, or no entries."""
    if isinstance(x, _Inverse):
        with np.errstate(over="ignore", under="ignore"):
            inverse = 1 / x.of
        ends = float(np.min(inverse)), float(np.max(inverse))
        return math.nextafter(ends[0], -math.inf), math.nextafter(ends[1], math.inf)
    x = x.astype(np.float64)
    return (float(x.min()), float(x.max())) if x.size else (math.nan, math.nan)


def _constant(bounds: Bounds, x: Any, common: _Common, shape: tuple) -> Expr | None:
    """A constant array, by what it says for each entry of the root."""
    low, high = _limits(x)
    if math.isnan(low) or math.isnan(high):
        return None
    inverse = isinstance(x, _Inverse)
    x = x.of if isinstance(x, _Inverse) else x.astype(np.float64)
    if x.min() == x.max():
        number = bounds.pool.const(float(x.min()))
        return bounds.pool.make("reciprocal", number) if inverse else number
    x = np.broadcast_to(x, shape)
    size = common.root.size if common.grouping is None else int(common.index.max()) + 1
    by_entry = np.full(size, np.nan)
    by_entry[common.index] = x
    if not np.array_equal(by_entry[common.index], x):
        return None
    kind = ("entry" if common.grouping is None else "group", inverse)
    return bounds.pool.const(low, high, (*kind, hashlib.sha256(by_entry.tobytes()).digest()))


# --- by the constants of the operands -----------------------------------------------------------


def _otherwise(bounds: Bounds, equation: Any, name: str | None, params: tuple, xs: list) -> Known:
    """What follows from the bounds of the operands alone."""
    values = [x for x in xs if isinstance(x, Value)]
    known = [bounds.known(x) for x in values]
    if name in CONDITIONS:
        return _refused(known, equation, "jumps")._replace(low=0.0, high=1.0)
    if name in ("max", "min", "clamp") and len(values) > 1:
        found = bounds.joined([(x, np.ones(x.shape, int)) for x in values])
        return _with(found, known, equation, "")
    if name is None or (len(values) > 1 and name not in ("add", "sub", "mul", "div")):
        return _refused(known, equation, "has no known constant with these operands")
    if len(values) == 1:
        return _of_one(bounds, equation, name, params, xs, known[0])
    (a, b), (x, y) = known, (iv.interval(k.low, k.high) for k in known)
    if name in ("add", "sub"):
        ends = iv.add(x, y if name == "add" else iv.neg(y))
        # (1, 1) has norm sqrt(2): better than the sum where they use different entries of x.
        apart = bounds.joined([(v, np.ones(v.shape, int)) for v in values]).bound
        bound = min(plus(a.bound, b.bound), times(root(2), apart))
        return _with(Known(bound, *_ends(ends)), known, equation, "")
    if name == "div":
        inverse = bounds.pool.make("reciprocal", bounds.pool.leaf)
        y = iv.reciprocal(y)
        b = b._replace(bound=times(bounds.plain_slope(inverse, b), b.bound))
    sizes = [float(iv.magnitude(end).max()) for end in (x, y)]
    bound = plus(times(sizes[1], a.bound), times(sizes[0], b.bound))
    reason = "is a product of two values that both depend on x and are not both bounded"
    if name == "div":
        reason = (
            "divides by a value that depends on x and can be 0, or whose quotient is not bounded"
        )
    return _with(Known(bound, *_ends(iv.mul(x, y))), known, equation, reason)


def _ends(x: iv.Interval) -> tuple[float, float]:
    return float(x.lo.min()), float(x.hi.max())


def _refused(known: list[Known], equation: Any, reason: str) -> Known:
    none = not any(k.bound for k in known)  # of constants after all
    return _with(Known(0.0 if none else math.inf), known, equation, reason)


def _with(found: Known, known: list[Known], equation: Any, reason: str) -> Known:
    """With the first problem: that of an operand, or this operation itself."""
    if math.isfinite(found.bound):
        return found
    problems = [k.problem for k in known if k.problem is not None]
    return found._replace(problem=problems[0] if problems else Problem(equation, reason))


def _weighted(bounds: Bounds, x: Value, c: Any) -> float:
    """A bound of a product with constants: each entry of the root by all that multiplies it."""
    c = np.abs(1 / c.of if isinstance(c, _Inverse) else c.astype(np.float64))
    most = float(c.max())
    if x.expr.grouped or not 0 < most < math.inf:
        return math.inf
    shares = np.broadcast_to(c / most, x.shape)
    square = np.bincount(x.index.ravel(), np.square(shares).ravel()).max()
    square *= 1 + (c.size + 8) * 2.0**-52
    return times(bounds.slope(x), root(Fraction(square)), most, x.root.known.bound)


def _of_one(
    bounds: Bounds, equation: Any, name: str, params: tuple, xs: list, known: Known
) -> Known:
    """A function of one value with constants, each of them anything between its ends."""
    args = []
    for x in xs:
        if isinstance(x, Value):
            args.append(bounds.pool.leaf)
        elif math.isnan(sum(_limits(x))):
            return _refused([known], equation, "has a constant operand that is NaN")
        else:
            args.append(bounds.pool.const(*_limits(x), ("any", len(args))))
    expr = bounds.pool.make(name, *args, params=params)
    bound = times(bounds.plain_slope(expr, known), known.bound)
    if name == "mul":
        bound = min(bound, _weighted(bounds, *sorted(xs, key=lambda x: not isinstance(x, Value))))
    reason = (
        "jumps" if name in ("floor", "ceil", "round", "sign", "select") else "has no largest slope"
    )
    value = Value(Root(1, known), expr, np.zeros(1, np.int32))
    ends = bounds.range(value)
    return _with(Known(bound, *ends), [known], equation, reason)
