"""Station 4. How a whole tree of weights runs at once.

In: the operators, weights and blocks of all tracked leaves. Out: all sigmas and next blocks. The
two reads run weight by weight; the algebra on the block axis, which is small and of one shape,
runs as one batched call for all of them. Must not know paths, rules, bounds or state trees.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType
from jaxtyping import Array

from jsn import _power
from jsn._block import cut, split
from jsn._operator import Matrix, explicit_spec
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

    def rmatvec(self, W: _Weights, u: Block) -> Block:
        return jnp.stack([self.member.rmatvec(w, x) for w, x in self._each(W, u)])

    def _each(self, W: _Weights, stacked: Array) -> Iterable[tuple[Weight, Array]]:
        return zip(W.members, *cut([stacked], ((),) * self.count), strict=True)


def _groups(tracked: Sequence[Tracked]) -> list[list[int]]:
    """Weights that can share their thin operations, by index."""
    groups: dict[Any, list[int]] = {}
    for index, (operator, W, u) in enumerate(tracked):
        sharding = jax.typeof(W).sharding
        # A mesh with automatic axes does not tell yet where a weight lies: stacked blocks of two
        # weights could lie on different axes, and one of them would have to move.
        alone = index if AxisType.Auto in sharding.mesh.axis_types else None
        key = (operator, W.shape, W.dtype, sharding, u.shape, alone)
        groups.setdefault(key, []).append(index)
    return list(groups.values())


_SMALL = 1 << 13
"""Up to this many elements, weights of one shape are copied into one array, for one product
instead of many: on a CPU 64 weights of 64 x 64 take 0.93 of the time, of 128 x 128 1.02."""


def _together(members: Sequence[Tracked]) -> Tracked:
    """A group as one."""
    if len(members) == 1:
        return members[0]
    operator, weights = members[0].operator, [member.W for member in members]
    u = jnp.stack([member.u for member in members])
    small = isinstance(operator, Matrix) and weights[0].size <= _SMALL
    if small and explicit_spec(weights[0]) is None:
        return Tracked(operator.lifted((0,), 1 + weights[0].ndim), jnp.stack(weights), u)
    group: Any = _Group(operator, len(members))
    return Tracked(group, _Weights(tuple(weights)), u)  # type: ignore


def _members(
    groups: Sequence[Sequence[int]], found: Sequence[Sequence[Array]], cut: Callable = cut
) -> Iterator[tuple[Array, ...]]:
    """What groups have found, for each of their members."""
    for group, *each in zip(groups, *found, strict=True):
        parts = cut(each, ((),) * len(group)) if len(group) > 1 else [[x] for x in each]
        yield from zip(*parts, strict=True)


def _families(tracked: Sequence[Tracked]) -> list[list[int]]:
    """Weights whose small algebra has one form: all, unless a tree has several block sizes.

    So it has where the states of several modules come side by side.
    """
    sizes = [weight.block for weight in tracked if not weight.is_subspace]
    families: dict[int, list[int]] = {}
    for index, weight in enumerate(tracked):
        home = max(sizes, default=0) if weight.is_subspace else weight.block
        families.setdefault(home, []).append(index)
    return list(families.values())


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
    found: dict[int, tuple] = {}
    for family in _families(tracked):
        groups = _groups([tracked[i] for i in family])
        grouped = [_together([tracked[family[i]] for i in group]) for group in groups]
        grouped = [each._replace(u=usable(each.u, len(each.batch))) for each in grouped]
        pairs, blocks = _power.advance(grouped, n_steps)
        members = [family[i] for group in groups for i in group]
        sigmas = _members(groups, [pairs.sigma], split)
        others = _members(groups, [pairs.u, pairs.v, blocks])
        found |= {i: one + more for i, one, more in zip(members, sigmas, others, strict=True)}
    sigmas, left, right, blocks = ([found[i][k] for i in range(len(tracked))] for k in range(4))
    return Pairs(sigmas, left, right), list(map(_back, blocks, us))


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
    tracked = [
        Tracked(op, W, _place(op, W, start(op, W.shape, block)))
        for op, W, block in zip(operators, weights, wide, strict=True)
    ]
    groups = _groups(tracked)
    grouped = [_together([tracked[i] for i in group]) for group in groups]
    grouped = _power.settle(_power.orthonormal(grouped), warmup)
    best = [
        lax.slice_in_dim(each.u, 0, min(block_size, sides[group[0]]), axis=len(each.batch))
        for group, each in zip(groups, grouped, strict=True)
    ]
    members = [i for group in groups for i in group]
    found = {i: x for i, (x,) in zip(members, _members(groups, [best]), strict=True)}
    return [found[i] for i in range(len(tracked))]


_WARM_BLOCK = 32
