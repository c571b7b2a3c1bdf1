"""Station 4. How a whole tree of weights runs at once.

In: the operators, weights and blocks of all tracked leaves. Out: all sigmas and next blocks. The
two reads run weight by weight; the algebra on the block axis, which is small and of one shape,
runs as one batched call for all of them. Must not know paths, rules, bounds or state trees.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType

from jsn import _power
from jsn._operator import explicit_spec
from jsn._power import Tracked, full_side, start, usable
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
        return jnp.stack([self.member.matvec(w, v[i]) for i, w in enumerate(W.members)])

    def rmatvec(self, W: _Weights, u: Block) -> Block:
        return jnp.stack([self.member.rmatvec(w, u[i]) for i, w in enumerate(W.members)])


def _grouped(tracked: Sequence[Tracked]) -> tuple[list[list[int]], list[Tracked]]:
    """Weights that can share their thin operations: their indices, and each group as one."""
    found: dict[Any, list[int]] = {}
    for index, (operator, W, u) in enumerate(tracked):
        sharding = jax.typeof(W).sharding
        # A mesh with automatic axes does not tell yet where a weight lies: stacked blocks of two
        # weights could lie on different axes, and one of them would have to move.
        alone = index if AxisType.Auto in sharding.mesh.axis_types else None
        key = (operator, W.shape, W.dtype, sharding, u.shape, alone)
        found.setdefault(key, []).append(index)
    groups = list(found.values())
    return groups, [_together([tracked[i] for i in group]) for group in groups]


def _together(members: Sequence[Tracked]) -> Tracked:
    operator: Any = _Group(members[0].operator, len(members))
    weights: Any = _Weights(tuple(member.W for member in members))
    return Tracked(operator, weights, jnp.stack([member.u for member in members]))


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
    tracked = [
        Tracked(operator, W, usable(_place(operator, W, u)))
        for operator, W, u in zip(operators, raw, old, strict=True)
    ]
    sigmas: list[Any] = [None] * len(raw)
    new: list[Any] = [None] * len(raw)
    for family in _families(tracked):
        groups, grouped = _grouped([tracked[i] for i in family])
        pairs, blocks = _power.advance(grouped, n_steps)
        live = [_Weights(tuple(weights[family[i]] for i in group)) for group in groups]
        found = _power.with_derivative(tuple(group.operator for group in grouped), live, pairs)
        # A group's sigmas are those of its members, one behind the other.
        members = [family[i] for group in groups for i in group]
        found = _power.stack_of([tracked[i] for i in members]).split(found, [0] * len(members))
        for index, sigma in zip(members, found, strict=True):
            sigmas[index] = sigma
        for group, block in zip(groups, blocks, strict=True):
            for at, i in enumerate(group):
                index = family[i]
                new[index] = us[index] if n_steps == 0 else _back(block[at], old[index])
    return sigmas, new


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
    groups, grouped = _grouped(tracked)
    grouped = _power.settle(_power.orthonormal(grouped), warmup)
    new: list[Any] = [None] * len(tracked)
    for group, weight in zip(groups, grouped, strict=True):
        best = min(block_size, sides[group[0]])
        best = lax.slice_in_dim(weight.u, 0, best, axis=len(weight.batch))
        for at, i in enumerate(group):
            new[i] = best[at]
    return new


_WARM_BLOCK = 32
