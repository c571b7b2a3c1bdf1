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

from jsn._expr import Expr, Pool, walk
from jsn._forms import (
    Linear,
    Square,
    exact_number,
    group_size,
    is_shared,
    linear,
    norm,
    product,
    square,
    terms,
)
from jsn._rounding import float_up, sqrt_up
from jsn._slope import largest_slope
from jsn._slope import range_of as plain_range
from jsn._upward import times

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
    for outer, part in _splits(node, pool):
        inner = norm_bound(part, pool, known)
        if math.isfinite(inner):
            yield times(inner, norm_bound(outer, pool, known))


def _splits(node: Expr, pool: Pool) -> Iterator[tuple[Expr, Expr]]:
    """Pairs of functions, the first one after the second one, that an expression is."""
    for part in walk(node):
        if part.depends and part.op != "leaf" and part is not node:
            shared = is_shared(part)
            outer = pool.replaced(node, part)
            if outer is not None and not (shared and (outer.grouped or not is_shared(node))):
                yield outer, part


def range_of(node: Expr, pool: Pool, low: float, high: float) -> tuple[float, float]:
    """An interval that contains all values of a function of a group, not necessarily a small one.

    Args:
        node: The expression.
        pool: Where it was made.
        low: The least value of an element.
        high: The largest one.
    """
    ends = [plain_range(node, low, high), _own_range(node)]
    for outer, part in _splits(node, pool):
        own = _own_range(part)
        if not outer.grouped and math.isfinite(own[1]):
            ends.append(plain_range(outer, *own))
    return max(end[0] for end in ends), min(end[1] for end in ends)


def _own_range(node: Expr) -> tuple[float, float]:
    """What a softmax or a normalization cannot exceed."""
    n = group_size(node)
    if n is not None and (found := _softmax_of(node)) is not None:
        most = float_up(abs(found[0]))
        return (0.0, most) if found[0] > 0 else (-most, 0.0)
    if n is not None and (most := _normalized_size(node, n)) is not None:
        return -float_up(most), float_up(most)
    return -math.inf, math.inf


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
    return norm(z, n) if z.a else abs(z.b) * sqrt_up(Fraction(n))


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
    found = _softmax_of(node)
    z = None if found is None else linear(found[1])
    return None if z is None else abs(found[0] * z.a) / 2  # type: ignore


def _softmax_of(node: Expr) -> tuple[Fraction, Expr] | None:
    """A number and z, where an expression is the number times `exp(z) / sum(exp(z))`."""
    number, factors = product(node)
    if len(factors) != 2:
        return None
    top, bottom = sorted(factors, key=lambda factor: factor.op == "reciprocal")
    total = bottom.args[0] if bottom.op == "reciprocal" else None
    if total is None or top.op != "exp" or total.op != "group_sum" or total.args[0] is not top:
        return None
    return number, top.args[0]


def _log_softmax_of(node: Expr) -> Linear | None:
    if node.op != "add":
        return None
    for z, minus in (node.args, node.args[::-1]):
        if minus.op == "neg" and _log_sum(minus.args[0]) is z:
            return linear(z)
    return None


def _log_softmax(node: Expr, n: int) -> Fraction | None:
    number, factors = product(node)
    z = _log_softmax_of(factors[0]) if len(factors) == 1 else None
    return None if z is None else abs(number * z.a) * sqrt_up(Fraction(n))


def _log_sum_exp(node: Expr, n: int) -> Fraction | None:
    parts = terms(node)
    found = [
        i for i, (_, factors) in enumerate(parts) if len(factors) == 1 and _log_sum(factors[0])
    ]
    if len(found) != 1:
        return None
    number, (log,) = parts.pop(found[0])
    z = linear(_log_sum(log))  # type: ignore
    if z is None:
        return None
    # log(sum(exp(a y - k))) + k is that of a y; what was taken off must come back, exactly.
    # (b sum(y) is the same for the whole group too, and would have to come back as well.)
    back = sorted((n, *map(id, factors)) for n, factors in parts)
    taken = sorted((-number * term[0], *map(id, term[1:])) for term in z.rest)
    return abs(number * z.a) if back == taken and not z.b else None


def _root(node: Expr, n: int) -> Fraction | None:
    number, factors = product(node)
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
    found = _quotient(node)
    if found is None:
        return None
    scale, z, bottom = found
    least = _floor(bottom, z, n)
    return None if least is None else scale * norm(z, n) / least


def _quotient(node: Expr) -> tuple[Fraction, Linear, Expr] | None:
    """A quotient of what is linear, with a bound of all constants that it is multiplied by."""
    number, factors = product(node)
    widths = [max(map(abs, f.params[:2])) for f in factors if f.op == "const"]
    factors = [factor for factor in factors if factor.op != "const"]
    if len(factors) != 2 or not all(map(math.isfinite, widths)):
        return None
    top, bottom = sorted(factors, key=lambda factor: factor.op == "reciprocal")
    z = linear(top)
    if z is None or z.rest or bottom.op != "reciprocal":
        return None
    return math.prod(map(Fraction, widths), start=abs(number)), z, bottom.args[0]


def _normalized_size(node: Expr, n: int) -> Fraction | None:
    """A bound of z / sqrt(k |z|^2 + c): an entry of z is at most |z|."""
    found = _quotient(node)
    form = None if found is None or found[2].op != "sqrt" else square(found[2].args[0], n)
    if found is None or form is None or not _goes_with(form, found[1], n):
        return None
    return found[0] * sqrt_up(found[1].a ** 2 / form.squares)


def _floor(node: Expr, z: Linear, n: int) -> Fraction | None:
    """The least value of a denominator that grows with |z|: `sqrt`, plus or at least a number."""
    if node.op in ("add", "max"):
        numbers = [exact_number(arg) for arg in node.args]
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
        numbers = [exact_number(arg) for arg in inner.args]
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
