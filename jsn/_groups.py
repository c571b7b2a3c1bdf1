"""Station 9, functions of whole groups: softmax, log-sum-exp, norms and normalizations.

In: an expression in one element y and in sums and maxima over its group, such as all channels at
one place. Out: a bound of the norm of its derivative, where it is one of the compositions whose
parts alone have no bound. Must not know arrays or programs.

Over a group of n, with z = a y + b sum(y) + (what is the same for the whole group):

    exp(z) / sum(exp(z))     |a| / 2          the variance of a variable in v, |v| = 1, is at most
                                              (max v - min v)^2 / 4 <= 1/2
    log(sum(exp(z)))         |a|              its gradient is a probability vector
    z - log(sum(exp(z)))     |a| sqrt(n)      I - 1 p^T is an oblique projection, of norm |1| |p|
    sqrt(|z|^2 + c)          |I a + b 1 1^T|
    z / sqrt(k |z|^2 + c)    |I a + b 1 1^T| / sqrt(c)
    z / (sqrt(...) + c), z / max(sqrt(...), c)    the same over c

The last three: along z and across it, the slopes are c (k |z|^2 + c)^(-3/2) and
(k |z|^2 + c)^(-1/2), and likewise. The variance k |z|^2 may be written as mean(y^2) - mean(y)^2:
that both are the same is checked with exact fractions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple

from jsn._expr import GROUP, Expr, Pool, walk
from jsn._rounding import float_up, sqrt_up
from jsn._slope import largest_slope
from jsn._upward import times


class Linear(NamedTuple):
    """`a y + b sum(y)` plus an expression that is the same for the whole group."""

    a: Fraction
    b: Fraction
    rest: tuple[tuple, ...]
    """Terms of that expression, each a number and factors."""


class Square(NamedTuple):
    """`squares * sum(y^2) + square * sum(y)^2 + constant`."""

    squares: Fraction
    square: Fraction
    constant: Fraction


def is_shared(node: Expr) -> bool:
    """Whether an expression is the same for all elements of a group."""
    if node.op == "leaf" or (node.op == "const" and node.value is None):
        return False
    return node.op in GROUP or all(map(is_shared, node.args))


def group_size(node: Expr) -> int | None:
    """The size of the groups of an expression; None if there are none, or of several kinds."""
    found = {part.params for part in walk(node) if part.op in GROUP}
    return next(iter(found))[1] if len(found) == 1 else None


def _exact(node: Expr) -> Fraction | None:
    """The exact number that a constant is."""
    if node.op == "reciprocal":
        inner = _exact(node.args[0])
        return 1 / inner if inner else None
    return None if node.op != "const" or node.value is None else Fraction(node.value)


def _product(node: Expr) -> tuple[Fraction, list[Expr]]:
    """A product as an exact number and other factors."""
    if node.op == "neg":
        number, factors = _product(node.args[0])
        return -number, factors
    if node.op == "mul":
        parts = [_product(arg) for arg in node.args]
        return parts[0][0] * parts[1][0], parts[0][1] + parts[1][1]
    if node.op == "square":
        number, factors = _product(node.args[0])
        return number**2, factors * 2
    number = _exact(node)
    return (Fraction(1), [node]) if number is None else (number, [])


def _terms(node: Expr) -> list[tuple[Fraction, list[Expr]]]:
    """A sum as its terms, each an exact number and other factors."""
    if node.op == "add":
        return [term for arg in node.args for term in _terms(arg)]
    number, factors = _product(node)
    if len(factors) == 1 and factors[0].op == "add":
        return [(number * n, rest) for n, rest in _terms(factors[0])]
    return [(number, factors)]


def linear(node: Expr) -> Linear | None:
    """An expression as `a y + b sum(y) + ...`, if it is one."""
    a = b = Fraction(0)
    rest = []
    for number, factors in _terms(node):
        if len(factors) == 1 and factors[0].op == "leaf":
            a += number
        elif len(factors) == 1 and _sum_of(factors[0]) is not None:
            inner = _sum_of(factors[0])
            b += number * inner  # type: ignore
        elif all(map(is_shared, factors)):
            rest.append((number, *factors))
        else:
            return None
    return Linear(a, b, tuple(rest))


def _sum_of(node: Expr) -> Fraction | None:
    """C, where an expression is the sum of `c y` over the group."""
    if node.op != "group_sum":
        return None
    inner = linear(node.args[0])
    if inner is None or inner.rest:
        return None
    return inner.a + node.params[1] * inner.b


def square(node: Expr, n: int) -> Square | None:
    """An expression as a quadratic form of the group, if it is one."""
    found = Square(Fraction(0), Fraction(0), Fraction(0))
    for number, factors in _terms(node):
        one = _one_square(factors, n)
        if one is None:
            return None
        found = Square(*(x + number * y for x, y in zip(found, one, strict=True)))
    return found


def _one_square(factors: list[Expr], n: int) -> Square | None:
    zero = Fraction(0)
    if not factors:
        return Square(zero, zero, Fraction(1))
    if len(factors) == 2:
        sums = [_sum_of(factor) for factor in factors]
        return None if None in sums else Square(zero, sums[0] * sums[1], zero)  # type: ignore
    (node,) = factors if len(factors) == 1 else (None,)
    if node is None:
        return None
    if node.op == "group_sum" and node.args[0].op == "square":
        z = linear(node.args[0].args[0])
        if z is None or z.rest:
            return None
        return Square(z.a**2, 2 * z.a * z.b + n * z.b**2, zero)
    if node.op in ("max", "abs"):  # max(0, variance): rounding alone can make it negative
        inner = [arg for arg in node.args if _exact(arg) != 0]
        form = square(inner[0], n) if len(inner) == 1 else None
        positive = form is not None and form.squares >= 0 and form.squares + n * form.square >= 0
        return form if positive and not form.constant else None  # type: ignore
    return None


def _norm(z: Linear, n: int) -> Fraction:
    """The norm of `a I + b 1 1^T`."""
    whole = abs(z.a + n * z.b)
    return whole if n == 1 else max(abs(z.a), whole)


# --- the compositions -----------------------------------------------------------------------------


def norm_bound(node: Expr, pool: Pool, known: dict[int, float]) -> float:
    """A bound of the norm of the derivative of a function of a group; infinity for unknown ones.

    Where an expression depends on its variable only through a part w, it is tried as a function
    of w after w: softmax(tanh(y)), or a normalization of y + bias.

    Args:
        node: The expression.
        pool: Where it was made.
        known: Bounds that were found before, by the identity of the expression.
    """
    if id(node) not in known:
        known[id(node)] = math.inf if node.grouped else largest_slope(node)
        if node.grouped:
            known[id(node)] = min([_alone(node), *_after(node, pool, known)])
    return known[id(node)]


def _after(node: Expr, pool: Pool, known: dict[int, float]) -> Iterator[float]:
    for part in walk(node):
        if part.depends and part.op != "leaf" and part is not node:
            shared = is_shared(part)
            outer = pool.replaced(node, part)
            if outer is None or (shared and (outer.grouped or not is_shared(node))):
                continue
            inner = norm_bound(part, pool, known)
            if math.isfinite(inner):
                yield times(inner, norm_bound(outer, pool, known))


def _alone(node: Expr) -> float:
    """The bound of one of the known compositions; infinity for others."""
    n = group_size(node)
    if n is not None:
        for one in (_linear, _softmax, _log_softmax, _log_sum_exp, _root, _normalized):
            found = one(node, n)
            if found is not None:
                return float_up(found)
    return math.inf


def _linear(node: Expr, n: int) -> Fraction | None:
    z = linear(node)
    if z is None or z.rest:
        return None
    return _norm(z, n) if z.a else abs(z.b) * sqrt_up(Fraction(n))


def _log_sum(node: Expr) -> Expr | None:
    """Z, where an expression is `log(sum(exp(z)))`; what is positive may stand within abs."""
    if node.op != "log":
        return None
    inner = node.args[0]
    inner = inner.args[0] if inner.op == "abs" else inner
    if inner.op == "group_sum" and inner.args[0].op == "exp":
        return inner.args[0].args[0]
    return None


def _softmax(node: Expr, n: int) -> Fraction | None:
    if node.op == "exp":  # of a log-softmax
        z = _log_softmax_of(node.args[0])
        return None if z is None else abs(z.a) / 2
    number, factors = _product(node)
    if len(factors) != 2:
        return None
    top, bottom = sorted(factors, key=lambda factor: factor.op == "reciprocal")
    total = bottom.args[0] if bottom.op == "reciprocal" else None
    if total is None or top.op != "exp" or total.op != "group_sum" or total.args[0] is not top:
        return None
    z = linear(top.args[0])
    return None if z is None else abs(number * z.a) / 2


def _log_softmax_of(node: Expr) -> Linear | None:
    if node.op != "add":
        return None
    for z, minus in (node.args, node.args[::-1]):
        if minus.op == "neg" and _log_sum(minus.args[0]) is z:
            return linear(z)
    return None


def _log_softmax(node: Expr, n: int) -> Fraction | None:
    number, factors = _product(node)
    z = _log_softmax_of(factors[0]) if len(factors) == 1 else None
    return None if z is None else abs(number * z.a) * sqrt_up(Fraction(n))


def _log_sum_exp(node: Expr, n: int) -> Fraction | None:
    terms = _terms(node)
    found = [
        i for i, (_, factors) in enumerate(terms) if len(factors) == 1 and _log_sum(factors[0])
    ]
    if len(found) != 1:
        return None
    number, (log,) = terms.pop(found[0])
    z = linear(_log_sum(log))  # type: ignore
    if z is None:
        return None
    # log(sum(exp(a y - k))) + k is that of a y; what was taken off must come back, exactly.
    # (b sum(y) is the same for the whole group too, and would have to come back as well.)
    back = sorted((n, *map(id, factors)) for n, factors in terms)
    taken = sorted((-number * term[0], *map(id, term[1:])) for term in z.rest)
    return abs(number * z.a) if back == taken and not z.b else None


def _root(node: Expr, n: int) -> Fraction | None:
    number, factors = _product(node)
    if len(factors) != 1:
        return None
    form = _rooted(factors[0], n)
    if form is None or form.squares < 0 or form.squares + n * form.square < 0 or form.constant < 0:
        return None
    # The quadratic form is |B y|^2 with B = sqrt(squares) I + ..., of this norm:
    whole = form.squares + n * form.square
    return abs(number) * sqrt_up(whole if n == 1 else max(form.squares, whole))


def _rooted(node: Expr, n: int) -> Square | None:
    if node.op == "sqrt":
        return square(node.args[0], n)
    return None


def _normalized(node: Expr, n: int) -> Fraction | None:
    number, factors = _product(node)
    widths = [max(map(abs, f.params[:2])) for f in factors if f.op == "const"]
    factors = [factor for factor in factors if factor.op != "const"]
    if len(factors) != 2 or not all(map(math.isfinite, widths)):
        return None
    top, bottom = sorted(factors, key=lambda factor: factor.op == "reciprocal")
    z = linear(top)
    if z is None or z.rest or bottom.op != "reciprocal":
        return None
    least = _floor(bottom.args[0], z, n)
    if least is None:
        return None
    scale = math.prod((Fraction(width) for width in widths), start=abs(number))
    return scale * _norm(z, n) / least


def _floor(node: Expr, z: Linear, n: int) -> Fraction | None:
    """The least value of a denominator that grows with |z|: `sqrt`, plus or at least a number."""
    if node.op in ("add", "max"):
        numbers = [_exact(arg) for arg in node.args]
        others = [arg for arg, number in zip(node.args, numbers, strict=True) if number is None]
        added = sum((number for number in numbers if number is not None), start=Fraction(0))
        if len(others) != 1 or not added > 0:
            return None
        form = _rooted(others[0], n)
        return added if form is not None and _goes_with(form, z, n) else None
    if node.op != "sqrt":
        return None
    inner, least = node.args[0], None
    if inner.op == "max":  # rsqrt(max(|z|^2, c))
        numbers = [_exact(arg) for arg in inner.args]
        least = max((number for number in numbers if number is not None), default=None)
        inner = next(
            (a for a, number in zip(inner.args, numbers, strict=True) if number is None), inner
        )
    form = square(inner, n)
    if form is None or not _goes_with(form, z, n):
        return None
    least = max(least or Fraction(0), form.constant)
    return 1 / sqrt_up(1 / least) if least > 0 else None


def _goes_with(form: Square, z: Linear, n: int) -> bool:
    """Whether a quadratic form is a positive multiple of |z|^2, and a number of at least 0."""
    mine = (z.a**2, 2 * z.a * z.b + n * z.b**2)
    share = form.squares / mine[0] if mine[0] else Fraction(0)
    return share > 0 and form.square == share * mine[1] and form.constant >= 0
