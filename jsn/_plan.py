"""Station 4. How a whole tree of weights runs at once.

In: the operators, weights and blocks of all tracked leaves. Out: all sigmas and next blocks. The
two reads run weight by weight; the algebra on the block axis, which is small and of one shape,
runs as one batched call for all of them. Must not know paths, rules, bounds or state trees.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array

from jsn import _power
from jsn._operator import explicit_spec, size
from jsn._sharding import landing
from jsn._types import Block, Operator, Sigma, Weight


def together(phase: Callable, matrices: Sequence[Array]) -> list:
    """Runs a small phase once, for the stacked matrices of all weights.

    Smaller matrices are padded to the largest. The padding must not mix with what it surrounds:
    -1 on the diagonal sorts last in `ritz` (Gram matrices have no negative eigenvalue), and
    rows that are orthogonal to all others change nothing in `orthonormalizer`.
    """
    largest = max(matrix.shape[-1] for matrix in matrices)
    fill = -1.0 if phase is _power.ritz else 1.0
    stacked = jnp.concatenate([_flat(_pad(matrix, largest, fill)) for matrix in matrices])
    results = phase(stacked)
    unstacked, begin = [], 0
    for matrix in matrices:
        *batch, block, _ = matrix.shape
        end = begin + size(batch)
        unstacked.append(
            jax.tree.map(
                lambda x, batch=batch, block=block, begin=begin, end=end: x[
                    (slice(begin, end), *[slice(block)] * (x.ndim - 1))
                ].reshape(*batch, *[block] * (x.ndim - 1)),
                results,
            )
        )
        begin = end
    return unstacked


def _flat(matrix: Array) -> Array:
    if explicit_spec(matrix) is not None:
        matrix = jax.sharding.reshard(matrix, PartitionSpec())  # small, wanted everywhere
    return matrix.reshape(-1, *matrix.shape[-2:])


def _pad(matrix: Array, block: int, fill: float) -> Array:
    missing = block - matrix.shape[-1]
    if not missing:
        return matrix
    diagonal = jnp.where(jnp.arange(block) < matrix.shape[-1], 0.0, fill).astype(matrix.dtype)
    pad = [(0, 0)] * (matrix.ndim - 2) + [(0, missing)] * 2
    matrix = jnp.pad(matrix, pad)
    return matrix + jnp.broadcast_to(jnp.diag(diagonal), matrix.shape)


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


def _grouped(
    operators: Sequence[Operator], weights: Sequence[Weight], blocks: Sequence[int]
) -> tuple[list[list[int]], list[Any], list[Any]]:
    """Weights that can share their thin operations: their indices, operators and weights."""
    found: dict[Any, list[int]] = {}
    for index, (operator, W, block) in enumerate(zip(operators, weights, blocks, strict=True)):
        sharding = jax.typeof(W).sharding
        # A mesh with automatic axes does not tell yet where a weight lies: stacked blocks of two
        # weights could lie on different axes, and one of them would have to move.
        alone = index if AxisType.Auto in sharding.mesh.axis_types else None
        key = (operator, W.shape, W.dtype, sharding, block, alone)
        found.setdefault(key, []).append(index)
    groups = list(found.values())
    members = [_Weights(tuple(weights[i] for i in group)) for group in groups]
    return groups, [_Group(operators[group[0]], len(group)) for group in groups], members


def _place(operator: Operator, W: Weight, u: Block) -> Block:
    """Moves a block to where the output side of its weight lives (explicit meshes only)."""
    if explicit_spec(u) is None:
        return u
    return jax.sharding.reshard(u, landing(operator, W, u))


def track(
    operators: Sequence[Operator], weights: Sequence[Weight], us: Sequence[Block], n_steps: int
) -> tuple[list[Sigma], list[Block]]:
    """Power steps on all weights of a tree at once: sigmas, with derivatives, and next blocks."""
    raw, old = lax.stop_gradient((list(weights), list(us)))
    placed = [_place(*weight) for weight in zip(operators, raw, old, strict=True)]
    groups, grouped, members = _grouped(operators, raw, [u.shape for u in placed])  # type: ignore
    stacked = [jnp.stack([placed[i] for i in group]) for group in groups]
    pairs, blocks = _power.advance(grouped, members, stacked, n_steps, small=together)
    sigmas: list[Any] = [None] * len(raw)
    new: list[Any] = [None] * len(raw)
    for group, pair, block in zip(groups, pairs, blocks, strict=True):
        for at, i in enumerate(group):
            own = jax.tree.map(lambda x, at=at: x[at], pair)
            sigmas[i] = _power.with_derivative(operators[i], weights[i], own)
            new[i] = block[at] if explicit_spec(block) is None else _back(block[at], old[i])
    return sigmas, new


def _back(u: Block, old: Block) -> Block:
    """Moves a block to where it came from: a state keeps its shardings."""
    return jax.sharding.reshard(u, jax.typeof(old).sharding)


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def begin(
    operators: tuple[Operator, ...], weights: Sequence[Weight], block_size: int, warmup: int
) -> list[Block]:
    """The first blocks of all weights, warmed up.

    The warm-up tracks at least `_WARM_BLOCK` vectors and then keeps the best `block_size` of
    them, so that one vector starts as true as thirty-two. Compiled as a whole: called eagerly, the
    many small operations would each be compiled alone.
    """
    sides = [_power.full_side(op, W.shape) for op, W in zip(operators, weights, strict=True)]
    wide = [min(max(block_size, _WARM_BLOCK), side) for side in sides]
    groups, grouped, members = _grouped(operators, weights, wide)
    us = []
    for group, operator, W in zip(groups, grouped, members, strict=True):
        us.append(_place(operator, W, _power.start(operator, W.shape, wide[group[0]])))
    n_batch = [len(operator.batch(W.shape)) for operator, W in zip(grouped, members, strict=True)]
    us = _power.orthonormal(us, us, n_batch, together)
    us = _power.settle(grouped, members, us, warmup, together)
    new: list[Any] = [None] * len(weights)
    for group, u, n in zip(groups, us, n_batch, strict=True):
        best = lax.slice_in_dim(u, 0, min(block_size, sides[group[0]]), axis=n)
        for at, i in enumerate(group):
            new[i] = best[at]
    return new


_WARM_BLOCK = 32
