"""Station 4. How a whole tree of weights runs at once.

In: the operators, weights and blocks of all tracked leaves. Out: all sigmas and next blocks. The
two reads run weight by weight; the algebra on the block axis, which is small and of one shape,
runs as one batched call for all of them. Must not know paths, rules, bounds or state trees.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType
from jaxtyping import Array

from jsn import _power
from jsn._operator import Matrix, Product, explicit_spec, rmatvec
from jsn._pieces import cut, join, split
from jsn._power import Pairs, Tracked, full_side, start, usable
from jsn._sharding import landing
from jsn._types import Block, Operator, Sigma, Weight


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Weights:
    """Several weights of one shape and dtype, side by side; nothing is copied."""

    members: tuple[Weight, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.members[0].shape


@dataclasses.dataclass(frozen=True)
class _Group:
    """The operator of several weights: one more batch axis, in front.

    Each weight is read where it lies, one product a weight: stacking large weights would copy
    them. What the products give is thin, and is stacked, so that everything that follows is one
    operation for the whole group.
    """

    member: Operator
    count: int

    def batch(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (self.count, *self.member.batch(shape))

    def domain(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return self.member.domain(shape)

    def codomain(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return self.member.codomain(shape)

    def matvec(self, W: _Weights, v: Block) -> Block:
        return jnp.stack([self.member.matvec(w, x) for w, x in self._each(W, v)])

    def rmatvec_as_made(self, W: _Weights, u: Block) -> Product:
        parts, last = zip(*[rmatvec(self.member, w, x) for w, x in self._each(W, u)], strict=True)
        return Product(jnp.stack(parts), last[0])

    def _each(self, W: _Weights, stacked: Array) -> Iterable[tuple[Weight, Array]]:
        return zip(W.members, *cut([stacked], ((),) * self.count), strict=True)


def _groups(tracked: Sequence[Tracked]) -> list[list[int]]:
    """Weights that can share their thin operations, by index."""
    groups: dict[Any, list[int]] = {}
    for index, (operator, W, u) in enumerate(tracked):
        kind = jax.typeof(W)
        # A mesh with automatic axes does not tell yet where a weight lies: stacked blocks of two
        # weights could lie on different axes, and one of them would have to move.
        alone = index if AxisType.Auto in kind.sharding.mesh.axis_types else None
        groups.setdefault((operator, kind, jax.typeof(u), alone), []).append(index)
    return list(groups.values())


def _together(members: Sequence[Tracked]) -> Tracked:
    """A group as one."""
    if len(members) == 1:
        return members[0]
    group: Any = _Group(members[0].operator, len(members))
    weights: Any = _Weights(tuple(member.W for member in members))
    return Tracked(group, weights, jnp.stack([member.u for member in members]))


def _many() -> int:
    """So many weights of one shape share their thin operations; fewer are run one by one.

    On a CPU sharing costs copies of what is thin, and kernels for each number of weights: the 54
    weights of a ResNet-50, up to six of a shape, take the same time either way, but twice as long
    to compile and 5 % more bytes. Twelve weights of 384 x 384 take 0.84 of the time together. On an
    accelerator every operation is a launch.
    """
    return 8 if jax.default_backend() == "cpu" else 2


_SMALL = 1 << 13
"""Up to this many elements, weights of one shape are copied into one array, for one product
instead of many: on a CPU 64 weights of 64 x 64 take 0.93 of the time, of 128 x 128 1.02."""


class Laid(NamedTuple):
    """A tree, laid out to run: small weights of one shape lie together, as one weight."""

    groups: list[list[int]]
    """Which weights lie together, by index."""
    operators: list[Operator]
    weights: list[Weight]
    us: list[Block]

    def together(self, values: Sequence[Any]) -> list[Any]:
        """Lays out numbers for each weight; what is one number for all of a group stays one."""
        return [
            self._numbers(W, [values[i] for i in group])
            for W, group in zip(self.weights, self.groups, strict=True)
        ]

    def _numbers(self, W: Weight, values: Sequence[Any]) -> Any:
        if all(x is values[0] for x in values):
            return values[0]
        dtype = np.promote_types(W.dtype, np.float32)  # no bfloat16 among them takes them all down
        return join(jnp.broadcast_arrays(*[jnp.asarray(x, dtype) for x in values]))

    def apart(self, *found: Sequence[Array]) -> Iterator[tuple[Array, ...]]:
        """What was found for the weights as they lie, for each of them again."""
        return zip(*_in_order(self.groups, found), strict=True)


def lay(operators: Sequence[Operator], weights: Sequence[Weight], us: Sequence[Block]) -> Laid:
    """Lays small matrices of one shape together, with one more batch axis; nothing else moves."""
    groups: list[list[int]] = []
    for group in _groups(list(map(Tracked, operators, weights, us))):
        first, W = operators[group[0]], weights[group[0]]
        small = isinstance(first, Matrix) and W.size <= _SMALL and explicit_spec(W) is None
        groups += [group] if small else [[i] for i in group]
    views = [
        operators[i].lifted((0,), 1 + weights[i].ndim) if more else operators[i]
        for i, *more in groups
    ]
    laid = lambda arrays: [join([arrays[i] for i in g]) if g[1:] else arrays[g[0]] for g in groups]
    return Laid(groups, views, laid(weights), laid(us))


def _in_order(
    groups: Sequence[Sequence[int]], found: Sequence[Sequence[Array]], cut: Callable = cut
) -> list[tuple[Array, ...]]:
    """What groups have found, for each of their members, in the order of the weights."""
    members: dict[int, tuple[Array, ...]] = {}
    for group, *each in zip(groups, *found, strict=True):
        parts = cut(each, ((),) * len(group)) if len(group) > 1 else [[x] for x in each]
        members |= zip(group, zip(*parts, strict=True), strict=True)
    return [members[i] for i in range(len(members))]


def _families(tracked: Sequence[Tracked]) -> list[list[int]]:
    """Weights whose small algebra has one form: those on subspace iteration, and all others.

    These all have blocks of one size, unless the states of several modules come side by side.
    """
    families: dict[int, list[int]] = {}
    for index, weight in enumerate(tracked):
        families.setdefault(0 if weight.is_subspace else weight.block, []).append(index)
    return list(families.values())


def _arranged(tracked: Sequence[Tracked]) -> Iterator[tuple[list[list[int]], list[Tracked]]]:
    """Family by family: the groups in it, by index, and each of them as one weight."""
    for family in _families(tracked):
        groups: list[list[int]] = []
        for group in _groups([tracked[i] for i in family]):
            members = [family[i] for i in group]
            groups += [members] if len(group) >= _many() else [[i] for i in members]
        yield groups, [_together([tracked[i] for i in group]) for group in groups]


def _place(operator: Operator, W: Weight, u: Block) -> Block:
    """Moves a block to where the output side of its weight lives (explicit meshes only)."""
    if explicit_spec(u) is None:
        return u
    return jax.sharding.reshard(u, landing(operator, W, u))


def _back(u: Block, old: Block) -> Block:
    """Moves a block to where it came from: a state keeps its shardings."""
    if explicit_spec(u) is None:
        return u
    return jax.sharding.reshard(u, jax.typeof(old).sharding)


def track(
    operators: Sequence[Operator], weights: Sequence[Weight], us: Sequence[Block], n_steps: int
) -> tuple[list[Sigma], list[Block]]:
    """Power steps on all weights of a tree at once: sigmas, with derivatives, and next blocks."""
    raw, old = lax.stop_gradient((list(weights), list(us)))
    pairs, new = _advance(tuple(operators), raw, old, n_steps)
    sigmas = _power.with_derivative(tuple(operators), list(weights), pairs)
    return sigmas, list(us) if n_steps == 0 else new


@functools.partial(jax.jit, static_argnums=(0, 3))  # traced once for each tree
def _advance(
    operators: tuple[Operator, ...], weights: list[Weight], us: list[Block], n_steps: int
) -> tuple[Pairs, list[Block]]:
    """Power steps on all weights of a tree at once: pairs, without derivatives, and next blocks."""
    tracked = [
        Tracked(operator, W, _place(operator, W, u))
        for operator, W, u in zip(operators, weights, us, strict=True)
    ]
    groups: list[list[int]] = []
    found: list[tuple[Array, ...]] = []
    for more, grouped in _arranged(tracked):
        grouped = [each._replace(u=usable(each.u, len(each.batch))) for each in grouped]
        pairs, blocks = _power.advance(grouped, n_steps)
        groups += more
        found += zip(*pairs, blocks, strict=True)
    sigma, *others = zip(*found, strict=True)
    (sigmas,) = zip(*_in_order(groups, [sigma], split), strict=True)
    left, right, blocks = map(list, zip(*_in_order(groups, others), strict=True))
    return Pairs(list(sigmas), left, right), list(map(_back, blocks, us))


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def begin(
    operators: tuple[Operator, ...], weights: Sequence[Weight], block_size: int, warmup: int
) -> list[Block]:
    """The first blocks of all weights, warmed up.

    The warm-up tracks at least `_WARM_BLOCK` vectors and then keeps the best `block_size` of
    them, so that one vector starts as true as thirty-two. Compiled as a whole: called eagerly,
    the many small operations would each be compiled alone.
    """
    sides = [full_side(op, W.shape) for op, W in zip(operators, weights, strict=True)]
    wide = [min(max(block_size, _WARM_BLOCK), side) for side in sides]
    us = [start(op, W.shape, b) for op, W, b in zip(operators, weights, wide, strict=True)]
    laid = lay(operators, weights, us)
    tracked = [
        Tracked(op, W, _place(op, W, u))
        for op, W, u in zip(laid.operators, laid.weights, laid.us, strict=True)
    ]
    groups: list[list[int]] = []
    best: list[Block] = []
    for more, grouped in _arranged(tracked):
        grouped = _power.settle(_power.orthonormal(grouped), warmup)
        groups += more
        best += [
            lax.slice_in_dim(each.u, 0, min(block_size, each.block), axis=len(each.batch))
            for each in grouped
        ]
    (together,) = zip(*_in_order(groups, [best]), strict=True)
    (apart,) = laid.apart(together)
    return list(apart)


_WARM_BLOCK = 32
