"""Station 9, element-wise functions: what JAX's element-wise primitives compute, as expressions.

In: names of primitives and their operands. Out: expressions in one variable, equal ones as one
object, in the form that is easiest to enclose. Must not know intervals, arrays or programs.

A constant may differ from element to element: then it is an interval with a name, and two such
constants are the same node only if they agree in every element.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from fractions import Fraction

import numpy as np

COMPARISONS = frozenset({"gt", "ge", "lt", "le", "eq", "ne"})
LOGIC = frozenset({"and", "or", "not"})
CONDITIONS = COMPARISONS | LOGIC | {"is_finite"}
GROUP = frozenset({"group_sum", "group_max"})
_SYMMETRIC = frozenset({"add", "mul", "max", "min", "and", "or", "eq", "ne"})


@dataclasses.dataclass(frozen=True, eq=False)
class Expr:
    """A node of an expression; equal ones are one object (see `Pool`).

    Attributes:
        op: "leaf", "const", or the name of an operation.
        args: Its operands.
        params: What else determines it: the two ends of a constant, and its name if it varies.
        depends: Whether the variable occurs in it.
        grouped: Whether a sum or maximum over a group occurs in it.
        depth: The length of the longest way down.
    """

    op: str
    args: tuple[Expr, ...] = ()
    params: tuple = ()
    depends: bool = False
    grouped: bool = False
    depth: int = 0

    @property
    def value(self) -> float | None:
        """The number that a constant is; None for anything else."""
        return self.params[0] if self.op == "const" and self.params[0] == self.params[1] else None


class Pool:
    """Makes expressions, each once, and simplifies what would lose when taken apart."""

    def __init__(self):
        self._made: dict[tuple, Expr] = {}
        self.leaf = self._node("leaf", ())
        self._zero, self._one = self.const(0.0), self.const(1.0)

    def const(self, lo: float, hi: float | None = None, name: tuple = ()) -> Expr:
        """A constant, or a named one that lies between two numbers."""
        return self._node("const", (), (float(lo), float(lo if hi is None else hi), *name))

    def group(self, op: str, arg: Expr, grouping: int, size: int) -> Expr:
        """The sum or the maximum of an expression over the groups of a grouping."""
        return self._node(op, (arg,), (grouping, size))

    def _node(self, op: str, args: tuple[Expr, ...], params: tuple = ()) -> Expr:
        if op in _SYMMETRIC and id(args[0]) > id(args[1]):
            args = args[::-1]
        key = (op, *map(id, args), params)
        if key not in self._made:
            depends = op == "leaf" or any(arg.depends for arg in args)
            grouped = op in GROUP or any(arg.grouped for arg in args)
            depth = 1 + max((arg.depth for arg in args), default=0)
            self._made[key] = Expr(op, args, params, depends, grouped, depth)
        return self._made[key]

    def make(self, op: str, *args: Expr, params: tuple = ()) -> Expr:
        """The expression `op(*args)`, or an equal one that is easier to enclose."""
        if op in COMPARISONS and args[0] is args[1]:
            return self._one if op in ("eq", "ge", "le") else self._zero
        if op == "is_finite":  # real numbers are
            return self._one
        simplify = getattr(self, f"_{op}", None)
        found = simplify(*args) if simplify and not params else None
        return found if found is not None else self._node(op, args, params)

    def replaced(self, node: Expr, part: Expr) -> Expr | None:
        """An expression with the variable in place of `part`; None if it also stands elsewhere."""
        known: dict[int, Expr | None] = {id(part): self.leaf}

        def one(node: Expr) -> Expr | None:
            if id(node) not in known:
                known[id(node)] = again(node)
            return known[id(node)]

        def again(node: Expr) -> Expr | None:
            if not node.depends:
                return node
            args = [one(arg) for arg in node.args]
            if not args or None in args:
                return None
            if node.op in GROUP:
                return self.group(node.op, args[0], *node.params)  # type: ignore
            return self.make(node.op, *args, params=node.params)  # type: ignore

        return one(node)

    def split(self, node: Expr) -> tuple[Expr, Expr] | None:
        """Functions g and p with `node = g(p)`, where p is straight but varies with the element.

        In `gelu(x + b)` each element meets its own b, the same wherever x + b is used. Enclosed as
        a whole, the uses would meet any b, each a different one.

        Returns:
            g and the largest such p; None without one.
        """
        parts = [part for part in walk(node) if part is not node and _straight_but_varies(part)]
        for part in sorted(parts, key=lambda part: -part.depth):
            outer = self.replaced(node, part)
            if outer is not None:
                return outer, part
        return None

    # --- simpler forms ----------------------------------------------------------------------------

    def _sub(self, x: Expr, y: Expr) -> Expr:
        return self.make("add", x, self.make("neg", y))

    def _neg(self, x: Expr) -> Expr | None:
        if x.value is not None:
            return self.const(-x.value)
        return x.args[0] if x.op == "neg" else None

    def _add(self, x: Expr, y: Expr) -> Expr | None:
        if 0.0 in (x.value, y.value):
            return y if x.value == 0 else x
        for a, b in ((x, y), (y, x)):  # jax.nn.softplus: max(u, 0) + log1p(exp(-|u|))
            if a.op == "max" and self._zero in a.args and b.op == "softplus":
                u = next((arg for arg in a.args if arg is not self._zero), self._zero)
                if b.args[0] is self.make("neg", self.make("abs", u)):
                    return self.make("softplus", u)
        return None

    def _mul(self, x: Expr, y: Expr) -> Expr | None:
        if 1.0 in (x.value, y.value):
            return y if x.value == 1 else x
        if 0.0 in (x.value, y.value):
            return self._zero
        for a, b in ((x, y), (y, x)):  # a number where a condition holds, else 0
            if b.op in CONDITIONS:
                return self.make("select", b, self._zero, a)
        return self.make("square", x) if x is y else None

    def _square(self, x: Expr) -> Expr | None:
        if x.op in ("sin", "cos"):  # (1 -+ cos 2u) / 2
            double = self.make("cos", self.make("mul", self.const(2.0), x.args[0]))
            double = self.make("neg", double) if x.op == "sin" else double
            return self.make("mul", self.const(0.5), self.make("add", self._one, double))
        return None

    def _div(self, x: Expr, y: Expr) -> Expr | None:
        return self.make("mul", x, self.make("reciprocal", y))

    def _reciprocal(self, x: Expr) -> Expr | None:
        if x.op == "mul":
            return self.make("mul", *(self.make("reciprocal", arg) for arg in x.args))
        if x.value and math.isfinite(x.value) and exactly_invertible(x.value):
            return self.const(1 / x.value)
        u = self._exp_plus_one(x)
        return None if u is None else self.make("logistic", self.make("neg", u))

    def _rsqrt(self, x: Expr) -> Expr:
        return self.make("reciprocal", self.make("sqrt", x))

    def _log(self, x: Expr) -> Expr | None:
        u = self._exp_plus_one(x)
        return None if u is None else self.make("softplus", u)

    def _log1p(self, x: Expr) -> Expr | None:
        return self.make("softplus", x.args[0]) if x.op == "exp" else None

    def _exp_plus_one(self, x: Expr) -> Expr | None:
        if x.op == "add" and self._one in x.args:
            return next((arg.args[0] for arg in x.args if arg.op == "exp"), None)
        return None

    def _sqrt(self, x: Expr) -> Expr | None:
        if x.op == "square":
            return self.make("abs", x.args[0])
        if x.op == "add" and {arg.op for arg in x.args} == {"square", "const"}:
            square, const = sorted(x.args, key=lambda arg: arg.op == "const")
            if const.params[0] > 0 and not square.grouped:
                return self._node("root", (square.args[0], const))
        return None

    def _abs(self, x: Expr) -> Expr | None:
        return x if x.op in ("abs", "exp", "logistic", "square") else None

    def _max(self, x: Expr, y: Expr) -> Expr | None:
        if x is y:
            return x
        if -math.inf in (x.value, y.value):
            return y if x.value == -math.inf else x
        return None

    def _min(self, x: Expr, y: Expr) -> Expr | None:
        if x is y:
            return x
        if math.inf in (x.value, y.value):
            return y if x.value == math.inf else x
        return None

    def _select(self, condition: Expr, off: Expr, on: Expr) -> Expr | None:
        del condition  # one that does not depend on the variable makes no expression
        return on if on is off else None

    def _clamp(self, low: Expr, x: Expr, high: Expr) -> Expr:
        return self.make("min", self.make("max", x, low), high)


def exactly_invertible(x: float) -> bool:
    """Whether 1 / x is a float: for powers of two that are not too small."""
    return math.isfinite(1 / x) and Fraction(x) * Fraction(1 / x) == 1


# --- where pieces meet ----------------------------------------------------------------------------


def walk(node: Expr) -> Iterator[Expr]:
    """All parts of an expression, each once, itself first."""
    seen, stack = set(), [node]
    while stack:
        node = stack.pop()
        if id(node) not in seen:
            seen.add(id(node))
            yield node
            stack += node.args


def _straight_but_varies(node: Expr) -> bool:
    """Whether a part is the variable, times and plus constants, of which some vary."""
    varies = False
    while node.op != "leaf":
        inner = [arg for arg in node.args if arg.depends]
        if node.op not in ("add", "mul", "neg") or len(inner) != 1:
            return False
        varies = varies or any(arg.op == "const" and arg.value is None for arg in node.args)
        node = inner[0]
    return varies


def affine(node: Expr) -> tuple[Fraction, Fraction] | None:
    """Slope and offset of an expression that is affine in its variable with known numbers."""
    if node.op == "leaf":
        return Fraction(1), Fraction(0)
    if node.op == "const":
        finite = node.value is not None and np.isfinite(node.value)
        return (Fraction(0), Fraction(node.value)) if finite else None  # type: ignore
    known = node.op in ("add", "neg", "mul", "reciprocal")
    parts = [affine(arg) for arg in node.args] if known else [None]
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


def crossings(x: Expr, y: Expr) -> list[Fraction] | None:
    """Where two expressions are equal: affine ones, or the modulus of one and a number.

    Returns:
        All these points; None where they are not known.
    """
    if y.op == "abs":
        x, y = y, x
    second = affine(y)
    if x.op == "abs" and second is not None and not second[0]:
        x = x.args[0]
        sides = [second[1], -second[1]] if second[1] >= 0 else []
    else:
        sides = [second[1]] if second is not None else []
    first = affine(x)
    if first is None or second is None or first[0] == second[0]:
        return None
    return [(side - first[1]) / (first[0] - second[0]) for side in sides]


def exact(node: Expr, at: Fraction) -> Fraction | None:
    """The value of an expression at a rational number, if it is rational arithmetic."""
    if node.op == "leaf":
        return at
    if node.op == "const":
        finite = node.value is not None and math.isfinite(node.value)
        return Fraction(node.value) if finite else None  # type: ignore
    rational = _RATIONAL.get(node.op)
    args = [exact(arg, at) for arg in node.args] if rational else [None]
    if None in args or (node.op == "reciprocal" and not args[0]):
        return None
    return rational(*args, *node.params)  # type: ignore


_RATIONAL: dict[str, Callable] = {
    "add": lambda x, y: x + y,
    "mul": lambda x, y: x * y,
    "neg": lambda x: -x,
    "reciprocal": lambda x: 1 / x,
    "square": lambda x: x * x,
    "integer_pow": lambda x, n: x**n if n >= 0 or x else None,
    "abs": abs,
    "max": max,
    "min": min,
}


def breakpoints(node: Expr) -> list[float]:
    """Where the pieces of an expression meet, as far as that is known."""
    found = set()
    for part in walk(node):
        pairs = []
        if part.op in {"max", "min", *COMPARISONS}:
            pairs = [part.args]
        elif part.op in ("abs", "sign"):
            pairs = [(part.args[0], Expr("const", (), (0.0, 0.0)))]
        found |= {at for pair in pairs for at in crossings(*pair) or []}
    return sorted(float(at) for at in found)
