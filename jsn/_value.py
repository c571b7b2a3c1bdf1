"""Station 9, arrays: what is known of an array that depends on the input.

In: how an array came about. Out: a bound of its Lipschitz constant, and of its entries. Must not
know JAX, primitives or programs.

An array whose bound is known is a *root*. Other arrays are seen as element-wise functions of one
root: entry e is `expr` of the root's entry `index[e]`. So a rearrangement moves only the index,
gelu may reach here as any number of operations, and an array that uses each entry of its root at
most m times, with a slope of at most s, has at most sqrt(m) s times the constant of its root. An
expression may also contain sums and maxima over groups of the root's entries (`_groups`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from jsn import _groups
from jsn._expr import Expr, Pool
from jsn._slope import largest_slope, range_of
from jsn._upward import norm, root, times

MOST_DEPTH = 64
"""Expressions that are deeper than this are given up for their bound."""


class Problem(NamedTuple):
    """Why an array has no finite bound."""

    equation: Any
    reason: str


class Known(NamedTuple):
    """What is known of an array: its Lipschitz constant, its entries, what is wrong with it."""

    bound: float
    low: float = -math.inf
    high: float = math.inf
    problem: Problem | None = None


@dataclasses.dataclass(eq=False)
class Root:
    """An array of `size` entries whose bound is known.

    Attributes:
        size: Their number.
        known: What is known of them.
        pair: "max" or "min" and its two operands, if it is one of these.
    """

    size: int
    known: Known
    pair: tuple[str, Value, Value] | None = None


@dataclasses.dataclass(eq=False)
class Grouping:
    """A division of a root's entries into groups of one size.

    Attributes:
        number: Which grouping it is.
        size: Entries in a group.
        of: The group of each entry of the root, or -1.
        at: The entries in the order in which they were grouped.
    """

    number: int
    size: int
    of: np.ndarray
    at: np.ndarray


@dataclasses.dataclass(eq=False)
class Value:
    """An array as a function of a root.

    Attributes:
        root: The root.
        expr: The function.
        index: For each entry of the array the entry of the root it is a function of; if
            `grouping`, the group of the root's entries.
        grouping: Set if the function is one of whole groups only.
        otherwise: What is known of the array by other means.
        equation: The operation it comes from.
    """

    root: Root
    expr: Expr
    index: np.ndarray
    grouping: Grouping | None = None
    otherwise: Callable[[], Known] | None = None
    equation: Any = None
    known: Known | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array."""
        return self.index.shape

    @property
    def is_root(self) -> bool:
        """Whether the array is a rearrangement of its root."""
        return self.expr.op == "leaf"


Part = tuple[Value, np.ndarray]
"""A value, and how often each of its entries is used."""


def copies(index: np.ndarray, times: np.ndarray | None = None) -> int:
    """How often an entry is used at most, if entry e of the index is used `times[e]` times."""
    counts = np.bincount(index.ravel(), None if times is None else times.ravel())
    return int(counts.max(initial=0))


class Bounds:
    """Finds and keeps the bounds of values."""

    def __init__(self, note: Callable[[Any, float, float], None]):
        """Starts without any.

        Args:
            note: Called with the equation of every step that a bound is needed of, the step's
                own constant, and the bound so far.
        """
        self.pool = Pool()
        self.note = note
        self._slopes: dict[tuple, float] = {}
        self._ranges: dict[tuple, tuple[float, float]] = {}
        self._norms: dict[int, float] = {}
        self._groupings: dict[tuple, Grouping] = {}
        self._kept: list[Root] = []  # so that no identity is used twice

    def new(self, shape: tuple[int, ...], known: Known, equation: Any = None) -> Value:
        """An array as its own root."""
        size = math.prod(shape)
        index = np.arange(size, dtype=np.int32).reshape(shape)
        return Value(Root(size, known), self.pool.leaf, index, None, None, equation, known)

    def rearranged(self, value: Value, labels: np.ndarray) -> Value:
        """The entries `labels` of the flattened value, as an array of that shape."""

        def otherwise() -> Known:
            known = self.known(value)
            return known._replace(bound=times(known.bound, root(copies(labels))))

        index = value.index.ravel()[labels]
        return Value(value.root, value.expr, index, value.grouping, otherwise, value.equation)

    def broadcast(self, value: Value, shape: tuple[int, ...]) -> Value:
        """A value with copies of its entries along axes of size 1, or of a scalar."""
        if value.shape == shape:
            return value
        labels = np.arange(value.index.size, dtype=np.int32).reshape(value.shape)
        return self.rearranged(value, np.broadcast_to(labels, shape))

    def group(self, value: Value, axes: tuple[int, ...]) -> tuple[Grouping, np.ndarray] | None:
        """The groups of entries along axes, and the groups as an array; None if they overlap."""
        kept = [axis for axis in range(value.index.ndim) if axis not in axes]
        size = math.prod(value.shape[axis] for axis in axes)
        if value.grouping or not size or copies(value.index) != 1:
            return None
        shape = tuple(value.shape[axis] for axis in kept)
        count = math.prod(shape)
        of = np.full(value.root.size, -1, np.int32)
        arranged = value.index.transpose(*kept, *axes).reshape(count, size)
        of[arranged] = np.arange(count, dtype=np.int32)[:, None]
        key = (id(value.root), size, of.tobytes())
        if key not in self._groupings:
            self._kept.append(value.root)
            number = len(self._groupings)
            self._groupings[key] = Grouping(number, size, of, value.index.ravel())
        return self._groupings[key], np.arange(count, dtype=np.int32).reshape(shape)

    # --- bounds -----------------------------------------------------------------------------------

    def slope(self, value: Value) -> float:
        """A bound of the norm of a value's function, one element or group at a time."""
        if value.expr.grouped:
            return _groups.norm_bound(value.expr, self.pool, self._norms)
        return self.plain_slope(value.expr, value.root.known)

    def plain_slope(self, expr: Expr, of: Known) -> float:
        """A bound of the slope of an element-wise function of an array."""
        key = (id(expr), of.low, of.high)
        if key not in self._slopes:
            self._slopes[key] = self._find_slope(expr, of.low, of.high)
        return self._slopes[key]

    def _find_slope(self, expr: Expr, low: float, high: float) -> float:
        parts = self.pool.split(expr)
        if parts is None:
            return largest_slope(expr, low, high)
        outer, inner = parts  # the chain rule
        steepest = largest_slope(outer, *range_of(inner, low, high))
        return times(steepest, largest_slope(inner, low, high))

    def known(self, value: Value) -> Known:
        """What is known of a value.

        The bound is that of its function, or, where that has none, by other means.
        """
        if value.known is None:
            value.known = self._find(value)
        return value.known

    def _find(self, value: Value) -> Known:
        own = times(self.slope(value), root(copies(value.index)))
        bound, otherwise = times(own, value.root.known.bound), Known(math.inf)
        if math.isinf(bound) and value.otherwise is not None:
            otherwise = value.otherwise()
            bound = otherwise.bound
        elif not value.is_root:
            self.note(value.equation, own, bound)
        ends = self.range(value)
        low, high = max(otherwise.low, ends[0]), min(otherwise.high, ends[1])
        problem = (otherwise.problem or value.root.known.problem) if math.isinf(bound) else None
        return Known(bound, low, high, problem)

    def joined(self, parts: list[Part]) -> Known:
        """What is known of all these values side by side, entry e of one `counts[e]` times.

        Values that are functions of one root share its entries: where they use different ones,
        together they have no larger constant than one of them. The squares of the slopes add up
        entry by entry of the root.
        """
        squares, problem, parts = [], None, _sorted_pairs(parts)
        by_root: dict[int, list[Part]] = {}
        for value, counts in parts:
            by_root.setdefault(id(value.root), []).append((value, counts))
        for shared in by_root.values():
            values = [value for value, _ in shared]
            plain = not any(v.expr.grouped or v.grouping for v in values)
            slopes = [self.slope(v) if plain else math.inf for v in values]
            of = values[0].root
            if math.isfinite(max(slopes)) and math.isfinite(of.known.bound):
                squares.append((times(_shared_slope(shared, slopes), of.known.bound), 1))
                for value, slope in zip(values, slopes, strict=True):
                    if not value.is_root:
                        self.note(value.equation, slope, times(slope, of.known.bound))
                continue
            for value, counts in shared:
                known = self.known(value)
                problem = problem or known.problem
                squares.append((known.bound, int(counts.max(initial=0))))
        ranges = [self.range(value) for value, _ in parts]
        low, high = min(r[0] for r in ranges), max(r[1] for r in ranges)
        return Known(norm(squares), low, high, problem)

    def range(self, value: Value) -> tuple[float, float]:
        """An interval that contains all entries of a value."""
        of = value.root.known
        key = (id(value.expr), of.low, of.high)
        if key not in self._ranges:
            if value.expr.grouped:
                self._ranges[key] = _groups.range_of(value.expr, self.pool, of.low, of.high)
            else:
                self._ranges[key] = range_of(value.expr, of.low, of.high)
        return self._ranges[key]


def _sorted_pairs(parts: list[Part]) -> list[Part]:
    """With the operands in place of their maximum and minimum, where both are there.

    Together these two are the operands, sorted: they move no further than the operands do.
    """
    kept: list[Part] = []
    for value, counts in parts:
        of = _by_entry(value, counts)
        pair = value.root.pair if value.is_root else None
        for i, (other, other_counts) in enumerate(kept):
            twin = other.root.pair if other.is_root else None
            twins = pair is not None and twin is not None and _are_twins(pair, twin)
            if twins and np.array_equal(of, _by_entry(other, other_counts)):
                kept[i : i + 1] = [(x, of.reshape(x.shape)) for x in pair[1:]]  # type: ignore
                break
        else:
            kept.append((value, counts))
    return kept


def _by_entry(value: Value, counts: np.ndarray) -> np.ndarray:
    """How often each entry of the root is used."""
    return np.bincount(value.index.ravel(), counts.ravel(), value.root.size)


def _are_twins(first: tuple[str, Value, Value], second: tuple[str, Value, Value]) -> bool:
    """Whether one is the maximum and the other the minimum of the same two arrays."""

    def same(x: Value, y: Value) -> bool:
        return x.root is y.root and x.expr is y.expr and np.array_equal(x.index, y.index)

    (kind, a, b), (other, c, d) = first, second
    either = (same(a, c) and same(b, d)) or (same(a, d) and same(b, c))
    return {kind, other} == {"max", "min"} and either


def _shared_slope(shared: list[Part], slopes: list[float]) -> float:
    """The norm of element-wise functions of one root side by side."""
    size = shared[0][0].root.size
    if len(set(slopes)) == 1:
        index = np.concatenate([value.index.ravel() for value, _ in shared])
        counts = np.concatenate([counts.ravel() for _, counts in shared])
        return times(slopes[0], root(copies(index, counts)))
    total = np.zeros(size)
    for (value, counts), slope in zip(shared, slopes, strict=True):
        used = np.bincount(value.index.ravel(), counts.ravel(), size)
        total += np.nextafter(used * np.nextafter(slope**2, np.inf), np.inf)
        total = np.nextafter(total, np.inf)
    return norm([(float(np.nextafter(np.sqrt(total.max(initial=0)), np.inf)), 1)])
