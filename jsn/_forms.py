"""Station 9, functions of whole groups: which expressions are linear or quadratic in a group.

In: an expression in one element y and in sums and maxima over its group. Out: its coefficients, as
exact fractions. Must not know what they are good for.
"""

from __future__ import annotations

from fractions import Fraction
from typing import NamedTuple

from jsn._expr import GROUP, Expr, walk


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


def exact_number(node: Expr) -> Fraction | None:
    """The exact number that a constant is."""
    if node.op == "reciprocal":
        inner = exact_number(node.args[0])
        return 1 / inner if inner else None
    return None if node.op != "const" or node.value is None else Fraction(node.value)


def product(node: Expr) -> tuple[Fraction, list[Expr]]:
    """A product as an exact number and other factors."""
    if node.op == "neg":
        number, factors = product(node.args[0])
        return -number, factors
    if node.op == "mul":
        parts = [product(arg) for arg in node.args]
        return parts[0][0] * parts[1][0], parts[0][1] + parts[1][1]
    if node.op == "square":
        number, factors = product(node.args[0])
        return number**2, factors * 2
    number = exact_number(node)
    return (Fraction(1), [node]) if number is None else (number, [])


def terms(node: Expr) -> list[tuple[Fraction, list[Expr]]]:
    """A sum as its terms, each an exact number and other factors."""
    if node.op == "add":
        return [term for arg in node.args for term in terms(arg)]
    number, factors = product(node)
    if len(factors) == 1 and factors[0].op == "add":
        return [(number * n, rest) for n, rest in terms(factors[0])]
    return [(number, factors)]


def linear(node: Expr) -> Linear | None:
    """An expression as `a y + b sum(y) + ...`, if it is one."""
    a = b = Fraction(0)
    rest = []
    for number, factors in terms(node):
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
    for number, factors in terms(node):
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
        inner = [arg for arg in node.args if exact_number(arg) != 0]
        form = square(inner[0], n) if len(inner) == 1 else None
        positive = form is not None and form.squares >= 0 and form.squares + n * form.square >= 0
        return form if positive and not form.constant else None  # type: ignore
    return None


def norm(z: Linear, n: int) -> Fraction:
    """The norm of `a I + b 1 1^T`."""
    whole = abs(z.a + n * z.b)
    return whole if n == 1 else max(abs(z.a), whole)
