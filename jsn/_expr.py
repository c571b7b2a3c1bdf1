"""Station 9, element-wise functions: what JAX's element-wise primitives compute, as expressions.

In: names of primitives and their operands. Out: expressions, equal ones as one object, in the form
that is easiest to enclose. Must not know intervals of numbers, arrays or programs.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any

import numpy as np

COMPARISONS = frozenset({"gt", "ge", "lt", "le", "eq", "ne"})
LOGIC = frozenset({"and", "or", "not"})


@dataclasses.dataclass(frozen=True, eq=False)
class Expr:
    """A node of an expression; equal ones are one object (see `make`).

    Attributes:
        op: "leaf", "const", or the name of an operation.
        args: Its operands.
        params: What else determines it: the key of a leaf, the ends of a constant.
        origin: The equation it comes from, for messages.
    """

    op: str
    args: tuple[Expr, ...] = ()
    params: tuple = ()
    origin: Any = None

    @functools.cached_property
    def leaves(self) -> frozenset:
        """The keys of the leaves it depends on."""
        own = {self.params[0]} if self.op == "leaf" else set()
        return frozenset(own).union(*(arg.leaves for arg in self.args))

    @property
    def value(self) -> float | None:
        """The number that a constant is; None for anything else."""
        return self.params[0] if self.op == "const" and self.params[0] == self.params[1] else None


class Pool:
    """Makes expressions, each once, and simplifies what would lose when taken apart."""

    def __init__(self):
        self._made: dict[tuple, Expr] = {}
        self._zero, self._one = self.const(0.0), self.const(1.0)

    def const(self, lo: float, hi: float | None = None) -> Expr:
        """A constant, or one that lies between two numbers."""
        return self._node("const", (), (float(lo), float(lo if hi is None else hi)))

    def leaf(self, key: Any) -> Expr:
        """A variable."""
        return self._node("leaf", (), (key,))

    def _node(
        self, op: str, args: tuple[Expr, ...], params: tuple = (), origin: Any = None
    ) -> Expr:
        if op in ("add", "mul", "max", "min", "and", "or", "eq", "ne") and id(args[0]) > id(
            args[1]
        ):
            args = args[::-1]
        key = (op, *map(id, args), params)
        return self._made.setdefault(key, Expr(op, args, params, origin))

    def make(self, op: str, *args: Expr, params: tuple = (), origin: Any = None) -> Expr:
        """The expression `op(*args)`, or an equal one that is easier to enclose."""
        simplify = getattr(self, f"_{op}", None)
        found = simplify(*args, origin) if simplify and not params else None
        return found if found is not None else self._node(op, args, params, origin)

    def replaced(self, node: Expr, leaves: Mapping[Any, Expr]) -> Expr:
        """An expression with other expressions in place of its leaves."""
        known: dict[int, Expr] = {}

        def one(node: Expr) -> Expr:
            if id(node) not in known:
                if node.op == "leaf":
                    known[id(node)] = leaves[node.params[0]]
                else:
                    args = [one(arg) for arg in node.args]
                    same = all(a is b for a, b in zip(args, node.args, strict=True))
                    made = self.make(node.op, *args, params=node.params, origin=node.origin)
                    known[id(node)] = node if same else made
            return known[id(node)]

        return one(node)

    def _sub(self, x: Expr, y: Expr, origin: Any) -> Expr:
        return self.make("add", x, self.make("neg", y, origin=origin), origin=origin)

    def _neg(self, x: Expr, origin: Any) -> Expr | None:
        if x.op == "const":
            return self.const(-x.params[1], -x.params[0])
        return x.args[0] if x.op == "neg" else None

    def _add(self, x: Expr, y: Expr, origin: Any) -> Expr | None:
        if 0.0 in (x.value, y.value):
            return y if x.value == 0 else x
        for a, b in ((x, y), (y, x)):  # jax.nn.softplus: max(u, 0) + log1p(exp(-|u|))
            if a.op == "max" and self._zero in a.args and b.op == "softplus":
                u = next((arg for arg in a.args if arg is not self._zero), self._zero)
                if b.args[0] is self.make("neg", self.make("abs", u)):
                    return self.make("softplus", u, origin=origin)
        return None

    def _mul(self, x: Expr, y: Expr, origin: Any) -> Expr | None:
        if 1.0 in (x.value, y.value):
            return y if x.value == 1 else x
        if 0.0 in (x.value, y.value):
            return self._zero
        return self.make("square", x, origin=origin) if x is y else None

    def _square(self, x: Expr, origin: Any) -> Expr | None:
        if x.op in ("sin", "cos"):  # (1 -+ cos 2u) / 2
            double = self.make("cos", self.make("mul", self.const(2.0), x.args[0]), origin=origin)
            double = self.make("neg", double) if x.op == "sin" else double
            return self.make("mul", self.const(0.5), self.make("add", self._one, double))
        return None

    def _div(self, x: Expr, y: Expr, origin: Any) -> Expr | None:
        return self.make("mul", x, self.make("reciprocal", y, origin=origin), origin=origin)

    def _reciprocal(self, x: Expr, origin: Any) -> Expr | None:
        if x.op == "mul":
            parts = (self.make("reciprocal", arg, origin=origin) for arg in x.args)
            return self.make("mul", *parts, origin=origin)
        if x.value and 1 / Fraction(x.value) == Fraction(1 / x.value):
            return self.const(1 / x.value)
        u = self._exp_plus_one(x)
        return None if u is None else self.make("logistic", self.make("neg", u), origin=origin)

    def _rsqrt(self, x: Expr, origin: Any) -> Expr:
        return self.make("reciprocal", self.make("sqrt", x, origin=origin), origin=origin)

    def _log(self, x: Expr, origin: Any) -> Expr | None:
        u = self._exp_plus_one(x)
        return None if u is None else self.make("softplus", u, origin=origin)

    def _log1p(self, x: Expr, origin: Any) -> Expr | None:
        return self.make("softplus", x.args[0], origin=origin) if x.op == "exp" else None

    def _exp_plus_one(self, x: Expr) -> Expr | None:
        if x.op == "add" and self._one in x.args:
            return next((arg.args[0] for arg in x.args if arg.op == "exp"), None)
        return None

    def _sqrt(self, x: Expr, origin: Any) -> Expr | None:
        if x.op == "square":
            return self.make("abs", x.args[0], origin=origin)
        if x.op == "add" and {arg.op for arg in x.args} == {"square", "const"}:
            square, const = sorted(x.args, key=lambda arg: arg.op == "const")
            if const.params[0] > 0:
                return self._node("root", (square.args[0],), const.params, origin)
        return None

    def _abs(self, x: Expr, origin: Any) -> Expr | None:
        return x if x.op in ("abs", "exp", "logistic", "square") else None

    def _max(self, x: Expr, y: Expr, origin: Any) -> Expr | None:
        if -math.inf in (x.value, y.value):
            return y if x.value == -math.inf else x
        return None

    def _min(self, x: Expr, y: Expr, origin: Any) -> Expr | None:
        if math.inf in (x.value, y.value):
            return y if x.value == math.inf else x
        return None

    def _select(self, condition: Expr, off: Expr, on: Expr, origin: Any) -> Expr | None:
        if condition.op == "is_finite":  # real numbers are
            return on
        if condition.op in COMPARISONS and condition.args[0] is condition.args[1]:
            return on if condition.op in ("eq", "ge", "le") else off
        return on if on is off else None

    def _clamp(self, low: Expr, x: Expr, high: Expr, origin: Any) -> Expr:
        return self.make("min", self.make("max", x, low, origin=origin), high, origin=origin)


# --- where pieces meet ----------------------------------------------------------------------------


def walk(node: Expr) -> Iterator[Expr]:
    seen, stack = set(), [node]
    while stack:
        node = stack.pop()
        if id(node) not in seen:
            seen.add(id(node))
            yield node
            stack += node.args


def _affine(node: Expr) -> tuple[Fraction, Fraction] | None:
    """Slope and offset of an expression that is affine in its leaf with known numbers."""
    if node.op == "leaf":
        return Fraction(1), Fraction(0)
    if node.op == "const":
        finite = node.value is not None and np.isfinite(node.value)
        return (Fraction(0), Fraction(node.value)) if finite else None  # type: ignore
    known = node.op in ("add", "neg", "mul", "reciprocal")
    parts = [_affine(arg) for arg in node.args] if known else [None]
    if None in parts:
        return None
    if node.op == "reciprocal":
        slope, offset = parts[0]  # type: ignore
        return None if slope or not offset else (slope, 1 / offset)
    if node.op == "neg":
        return -parts[0][0], -parts[0][1]  # type: ignore
    (a, b), (c, d) = parts  # type: ignore
    if node.op == "add":
        return a + c, b + d
    return None if a and c else (a * d + b * c, b * d)


def crossing(x: Expr, y: Expr) -> Fraction | None:
    """Where two affine expressions are equal."""
    first, second = _affine(x), _affine(y)
    if first is None or second is None or first[0] == second[0]:
        return None
    return (second[1] - first[1]) / (first[0] - second[0])


def breakpoints(node: Expr) -> list[float]:
    """Where the pieces of an expression meet, as far as that is known."""
    found = set()
    for part in walk(node):
        pairs = []
        if part.op in {"max", "min", *COMPARISONS}:
            pairs = [part.args]
        elif part.op in ("abs", "sign"):
            pairs = [(part.args[0], Expr("const", (), (0.0, 0.0)))]
        found |= {at for pair in pairs if (at := crossing(*pair)) is not None}
    return sorted(float(at) for at in found)


# --- names ---


def key(node: Expr) -> tuple:
    """What determines an expression in one variable, whatever that is."""
    if node.op == "leaf":
        return ("t",)
    return (node.op, node.params, *map(key, node.args))


def depth(node: Expr) -> int:
    return 1 + max(map(depth, node.args), default=0)
