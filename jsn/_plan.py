"""Station 4. How a whole tree of weights runs at once.

In: the operators, weights and blocks of all tracked leaves. Out: all sigmas and next blocks. The
two reads run weight by weight; the algebra on the block axis, which is small and of one shape,
runs as one batched call for all of them. Must not know paths, rules, bounds or state trees.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jsn import _power
from jsn._operator import size
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
    return matrix.reshape(-1, *matrix.shape[-2:])


def _pad(matrix: Array, block: int, fill: float) -> Array:
    missing = block - matrix.shape[-1]
    if not missing:
        return matrix
    diagonal = jnp.where(jnp.arange(block) < matrix.shape[-1], 0.0, fill).astype(matrix.dtype)
    pad = [(0, 0)] * (matrix.ndim - 2) + [(0, missing)] * 2
    return jnp.pad(matrix, pad) + jnp.diag(diagonal)


def track(
    operators: Sequence[Operator], weights: Sequence[Weight], us: Sequence[Block], n_steps: int
) -> tuple[list[Sigma], list[Block]]:
    """Power steps on all weights of a tree at once."""
    return _power.iterate(operators, weights, us, n_steps, small=together)


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def begin(
    operators: tuple[Operator, ...], weights: Sequence[Weight], block_size: int, warmup: int
) -> list[Block]:
    """The first blocks of all weights, warmed up.

    The warm-up tracks at least `_WARM_BLOCK` vectors and then keeps the best `block_size` of
    them, so that one vector starts as true as sixteen. Compiled as a whole: called eagerly, the
    many small operations would each be compiled alone.
    """
    shapes = [W.shape for W in weights]
    sides = [
        _power.full_side(operator, shape) for operator, shape in zip(operators, shapes, strict=True)
    ]
    wide = [min(max(block_size, _WARM_BLOCK), side) for side in sides]
    us = [
        _power.start(operator, shape, block)
        for operator, shape, block in zip(operators, shapes, wide, strict=True)
    ]
    n_batch = [
        len(operator.batch(shape)) for operator, shape in zip(operators, shapes, strict=True)
    ]
    us = _power.orthonormal(us, us, n_batch, together)
    if warmup:
        us = track(operators, weights, us, warmup)[1]
    return [
        jax.lax.slice_in_dim(u, 0, min(block_size, side), axis=n)
        for u, side, n in zip(us, sides, n_batch, strict=True)
    ]


_WARM_BLOCK = 16
