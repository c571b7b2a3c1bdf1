"""Station 3. The block power iteration: two reads of W, a small Rayleigh-Ritz, sigma.

In: a weight, its operator, and the tracked block `u` of its output side. Out: sigma with its
derivative, and the next block. Must not know about trees, rules or constraints.

One step (`W` as the map A, rows of `u` orthonormal, M = A A^T):

    v = A^T u                                the first read of W, with the whole block
    G = v v^T = u M u^T,  G = Q diag(w) Q^T  Rayleigh-Ritz on the span of u
    v = (leading columns of Q)^T v,  z = A v the second read, with the leading third
    sigma = |z1| / |v1|                      one half step beyond the best Ritz vector
    u <- orthonormal rows of [ Ritz vectors | their residuals M q - w q | previous directions ]

The next block is that of LOBPCG without a preconditioner, in thirds. Where the block spans a
whole side of the matrix, and for a block of one vector, it is z itself: subspace iteration,
which for one vector is the iteration of Miyato et al. The step is written in phases, so that
`_plan` can run the small ones (`ritz`, `orthonormalizer`) for all weights at once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from operator import index
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jsn import _errors
from jsn._operator import Matrix, contract, size
from jsn._rules import Leaf, check_weights
from jsn._types import Block, Operator, Sigma, Weight

_NOISE = 2.0**-23
"""Size of the probe mixed into each new block: at rounding level, it only matters where nothing
else is left, and there it brings a lost or rank-deficient block back to life."""


class Pair(NamedTuple):
    """The tracked singular pair: sigma and the unit vectors it was read off."""

    sigma: Sigma
    u: Float[Array, "*batch_codomain"]
    v: Float[Array, "*batch_domain"]


class First(NamedTuple):
    """What the first read gives: `v = A^T u`, scaled by a power of two, and its Gram matrix."""

    scale: Sigma
    v: Block
    gram: Float[Array, "*batch block block"]


# --- small dense algebra on the block axis --------------------------------------------------


def _gram(x: Block, n_batch: int) -> Float[Array, "*batch block block"]:
    axes, batch = tuple(range(n_batch + 1, x.ndim)), tuple(range(n_batch))
    return contract(x, x, (axes, axes), (batch, batch))


def _mix(coefficients: Float[Array, "*batch rows block"], x: Block) -> Block:
    """Linear combinations of the vectors of a block."""
    n_batch = coefficients.ndim - 2
    batch = tuple(range(n_batch))
    return contract(coefficients, x, ((n_batch + 1,), (n_batch,)), (batch, batch))


def _over(values: Array, x: Array) -> Array:
    """Broadcasts one value for each batch entry over the trailing axes of x."""
    return values.reshape(values.shape + (1,) * (x.ndim - values.ndim))


def _safe(x: Array) -> Array:
    """The values that are usable divisors, and 1 for the others."""
    return jnp.where(x > 0, x, 1)


def _norm(x: Array, n_batch: int) -> Sigma:
    return jnp.sqrt(jnp.sum(x * x, axis=tuple(range(n_batch, x.ndim))))


def probe(shape: tuple[int, ...], n_batch: int) -> Block:
    """A fixed, seemingly random block in [-1, 1): an integer hash of the position.

    Computed where it is used, so that no array of its size becomes a constant of the program,
    and equal on every platform.
    """
    index = lax.iota(jnp.uint32, size(shape[n_batch:])).reshape(shape[n_batch:])
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        index = (index ^ (index >> shift)) * jnp.uint32(factor)
    index = index ^ (index >> 16)
    return jnp.broadcast_to(index.astype(jnp.float32) * 2.0**-31 - 1, shape)


# --- the five phases of a step ---------------------------------------------------------------


def read(operator: Operator, W: Weight, u: Block) -> First:
    """Phase 1, the first read of W. `v` is rescaled, so that no scale of W overflows later."""
    n_batch = len(operator.batch(W.shape))
    v = operator.rmatvec(W, u)
    peak = jnp.max(jnp.abs(v), axis=tuple(range(n_batch, v.ndim)))
    info = jnp.finfo(peak.dtype)
    scale = lax.reduce_precision(peak, info.nexp, mantissa_bits=0)  # a power of two
    scale = _safe(jnp.maximum(scale, info.tiny) * (peak > 0))
    v = v * _over(1 / scale, v)
    return First(scale, v, _gram(v, n_batch))


def ritz(gram: Float[Array, "*n b b"]) -> tuple[Float[Array, "*n b"], Float[Array, "*n b b"]]:
    """Phase 2, eigenvalues (largest first) and eigenvectors (as rows) of the Gram matrices."""
    values, vectors = lax.platform_dependent(gram, cpu=_eigh_on_cpu, default=_eigh)
    return values[..., ::-1], jnp.swapaxes(vectors, -1, -2)[..., ::-1, :]


def _eigh(gram: Array) -> tuple[Array, Array]:
    values, vectors = jnp.linalg.eigh(gram, symmetrize_input=False)
    return values, vectors


def _eigh_on_cpu(gram: Array) -> tuple[Array, Array]:
    """One matrix at a time where several devices share one CPU.

    LAPACK's batched calls share their work among the threads that the virtual devices themselves
    run on, and eight devices wait for each other for ever (jaxlib 0.10.2 and 0.12.0).
    """
    if jax.default_backend() != "cpu" or jax.local_device_count() == 1 or gram.ndim == 2:
        return _eigh(gram)
    values, vectors = lax.map(_eigh, gram.reshape(-1, *gram.shape[-2:]))
    return values.reshape(gram.shape[:-1]), vectors.reshape(gram.shape)


def thirds(block: int) -> tuple[int, int, int]:
    """How many Ritz vectors, residuals and previous directions make up a block."""
    n_ritz = -(-block // 3)
    n_residual = -(-(block - n_ritz) // 2)
    return n_ritz, n_residual, block - n_ritz - n_residual


def full_side(operator: Operator, shape: tuple[int, ...]) -> int:
    """The number of vectors that span the smaller side of the map: no block needs more."""
    return min(size(operator.domain(shape)), size(operator.codomain(shape)))


def is_subspace(operator: Operator, shape: tuple[int, ...], block: int) -> bool:
    """Whether plain subspace iteration is the step: one vector, or a whole side (then exact)."""
    return block == 1 or block >= full_side(operator, shape)


def second_read(
    operator: Operator, W: Weight, first: First, vectors: Float[Array, "*batch b b"]
) -> tuple[Pair, Block]:
    """Phase 3, the second read of W: the pair, and `z = A v / scale` of the leading `v`.

    Only the Ritz vectors whose residuals are wanted are read with: about a third of the block.
    sigma is |A v| / |v| of the best of them, never above the truth.
    """
    n_batch, block = vectors.ndim - 2, vectors.shape[-1]
    n_leading = block if is_subspace(operator, W.shape, block) else thirds(block)[1]
    v = _mix(lax.slice_in_dim(vectors, 0, n_leading, axis=n_batch), first.v)
    z = operator.matvec(W, v)
    z = z * _over(1 / first.scale, z)
    best_v, best_z = (lax.index_in_dim(x, 0, n_batch, keepdims=False) for x in (v, z))
    v_norm, z_norm = _norm(best_v, n_batch), _norm(best_z, n_batch)
    sigma = first.scale * (z_norm / _safe(v_norm))
    unit_u, unit_v = best_z / _over(_safe(z_norm), best_z), best_v / _over(_safe(v_norm), best_v)
    return Pair(sigma, unit_u, unit_v), z


def candidates(
    z: Block, u: Block, values: Float[Array, "*batch b"], vectors: Float[Array, "*batch b b"]
) -> Block:
    """Phase 4, the vectors that span the next block, not yet orthonormal."""
    n_batch, block = vectors.ndim - 2, vectors.shape[-1]
    x = z
    if z.shape[n_batch] < block:
        n_ritz, n_residual, n_previous = thirds(block)
        leading = -values[..., :n_residual, None] * vectors[..., :n_residual, :]
        # A Ritz vector's part outside the last Ritz vectors: where it came from.
        previous = vectors[..., :n_previous, :]
        previous = previous * jnp.broadcast_to(jnp.arange(block) >= n_ritz, previous.shape)
        rows = [vectors[..., :n_ritz, :], leading, previous]
        pad = [(0, 0)] * n_batch + [(n_ritz, n_previous)] + [(0, 0)] * (u.ndim - n_batch - 1)
        x = _mix(jnp.concatenate(rows, axis=-2), u) + jnp.pad(z, pad)
    return x + _NOISE * probe(x.shape, n_batch)


def orthonormalizer(gram: Float[Array, "*n b b"]) -> Float[Array, "*n b b"]:
    """Phase 5, the T for which T x has orthonormal rows, from the Gram matrix of x (Cholesky)."""
    block = gram.shape[-1]
    scale = 1 / jnp.sqrt(_safe(jnp.diagonal(gram, axis1=-2, axis2=-1)))
    gram = gram * scale[..., :, None] * scale[..., None, :]
    eye = jnp.broadcast_to(jnp.eye(block, dtype=gram.dtype), gram.shape)
    gram = gram + block * 2.0**-22 * eye
    change = lax.platform_dependent(gram, cpu=_eliminated, default=_factorized)
    return change * scale[..., None, :]


def _factorized(gram: Array) -> Array:
    """The inverse of the Cholesky factor."""
    factor = lax.linalg.cholesky(gram, symmetrize_input=False)
    eye = jnp.broadcast_to(jnp.eye(gram.shape[-1], dtype=gram.dtype), gram.shape)
    return lax.linalg.triangular_solve(factor, eye, left_side=True, lower=True)


def _eliminated(gram: Array) -> Array:
    """The same by Gaussian elimination on `[gram | 1]`, a row at a time for all matrices at once.

    For the CPU, where batched LAPACK hangs on several devices (`_eigh_on_cpu`). It is no slower:
    a hundred matrices of 32 x 32 take 0.7 ms, with LAPACK 1.1 ms.
    """
    block = gram.shape[-1]
    eye = jnp.broadcast_to(jnp.eye(block, dtype=gram.dtype), gram.shape)
    beside = jnp.concatenate([gram, eye], axis=-1)

    def next_row(i: Array, done: Array) -> Array:
        row = lax.dynamic_slice_in_dim(beside, i, 1, axis=-2)
        factors = jnp.swapaxes(lax.dynamic_slice_in_dim(done, i, 1, axis=-1), -1, -2)
        row = row - jnp.matmul(factors, done, precision=lax.Precision.HIGHEST)
        row = row / jnp.sqrt(lax.dynamic_slice_in_dim(row, i, 1, axis=-1))
        return lax.dynamic_update_slice_in_dim(done, row, i, axis=-2)

    done = lax.fori_loop(0, block, next_row, jnp.zeros_like(beside))
    return lax.slice_in_dim(done, block, 2 * block, axis=-1)


# --- one weight -------------------------------------------------------------------------------


def with_derivative(operator: Operator, W: Weight, pair: Pair) -> Sigma:
    """The sigma of a pair, with the derivative d sigma = u^T dA v and no further read of W."""
    return _attach(operator, pair.sigma, W, pair.u, pair.v)  # pyright: ignore[reportCallIssue]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _attach(operator: Operator, sigma: Sigma, W: Weight, u: Array, v: Array) -> Sigma:
    del operator, W, u, v
    return sigma


@_attach.defjvp
def _(operator, primals, tangents):
    sigma, W, u, v = primals
    dW = tangents[1]
    n_batch = len(operator.batch(W.shape))
    dz = operator.matvec(dW, jnp.expand_dims(v, n_batch)).squeeze(n_batch)
    return sigma, jnp.sum(u * dz, axis=tuple(range(n_batch, u.ndim))).astype(sigma.dtype)


def start(operator: Operator, shape: tuple[int, ...], block: int) -> Block:
    """The first block of a weight: a fixed probe; the first step makes it orthonormal."""
    batch = operator.batch(shape)
    return probe((*batch, block, *operator.codomain(shape)), len(batch))


def usable(u: Block) -> Block:
    """A stored block, with entries that are not finite replaced by 0 (one step repairs it)."""
    return jnp.where(jnp.isfinite(u), u, 0)


def stored_pair(first: First, u: Block, vectors: Float[Array, "*batch b b"]) -> Pair:
    """The best pair in the span of a stored block, from the first read alone."""
    n_batch = vectors.ndim - 2
    u, v = (_mix(vectors[..., :1, :], x).squeeze(n_batch) for x in (u, first.v))
    u_norm, v_norm = _norm(u, n_batch), _norm(v, n_batch)
    sigma = first.scale * (v_norm / _safe(u_norm))
    return Pair(sigma, u / _over(_safe(u_norm), u), v / _over(_safe(v_norm), v))


# --- any number of weights --------------------------------------------------------------------

Small = Callable[[Callable, Sequence[Array]], Sequence]
"""How a small phase runs over the matrices of several weights."""


def each(phase: Callable, matrices: Sequence[Array]) -> list:
    """Runs a small phase for one weight after the other."""
    return [phase(matrix) for matrix in matrices]


def orthonormal(
    blocks: Sequence[Block], last: Sequence[Block], n_batch: Sequence[int], small: Small
) -> list[Block]:
    """Phase 5: makes rows orthonormal; the second pass repairs the rounding of the first.

    Where a block is not finite (a NaN in W), the block from before is kept.
    """
    for _ in range(2):
        grams = [_gram(x, n) for x, n in zip(blocks, n_batch, strict=True)]
        changes = small(orthonormalizer, grams)
        blocks = [_mix(T, x) for T, x in zip(changes, blocks, strict=True)]
    return [
        jnp.where(_over(jnp.isfinite(T).all(axis=(-2, -1)), x), x, u).astype(jnp.float32)
        for T, x, u in zip(changes, blocks, last, strict=True)
    ]


def step(
    operators: Sequence[Operator], weights: Sequence[Weight], us: Sequence[Block], small: Small
) -> tuple[list[Pair], list[Block]]:
    """One step for several weights: their pairs and their next blocks."""
    tracked = list(zip(operators, weights, us, strict=True))
    firsts = [read(operator, W, u) for operator, W, u in tracked]
    bases = small(ritz, [first.gram for first in firsts])
    found = [
        second_read(operator, W, first, vectors)
        for (operator, W, _), first, (_, vectors) in zip(tracked, firsts, bases, strict=True)
    ]
    spans = [candidates(z, u, *basis) for (_, z), u, basis in zip(found, us, bases, strict=True)]
    n_batch = [len(operator.batch(W.shape)) for operator, W, _ in tracked]
    return [pair for pair, _ in found], orthonormal(spans, us, n_batch, small)


def settle(
    operators: Sequence[Operator],
    weights: Sequence[Weight],
    us: Sequence[Block],
    n_steps: int,
    small: Small = each,
) -> list[Block]:
    """Runs power steps on several weights, for their blocks alone."""
    if n_steps == 0:
        return list(us)
    return lax.fori_loop(0, n_steps, lambda _, us: step(operators, weights, us, small)[1], list(us))


def advance(
    operators: Sequence[Operator],
    weights: Sequence[Weight],
    us: Sequence[Block],
    n_steps: int,
    small: Small = each,
) -> tuple[list[Pair], list[Block]]:
    """Runs power steps on several weights: their pairs, without derivatives, and blocks.

    With `n_steps=0` the blocks come back as they are, and sigma costs one read.
    """
    clean = [usable(u) for u in us]
    if n_steps == 0:
        firsts = [read(*weight) for weight in zip(operators, weights, clean, strict=True)]
        bases = small(ritz, [first.gram for first in firsts])
        found = zip(firsts, clean, bases, strict=True)
        return [stored_pair(first, u, vectors) for first, u, (_, vectors) in found], list(us)
    clean = settle(operators, weights, clean, n_steps - 1, small)
    return step(operators, weights, clean, small)


def power_iterate(
    W: Weight, u: Block, n_steps: int = 1, *, operator: Operator | None = None
) -> tuple[Sigma, Block]:
    """Estimates the largest singular value of a weight, and improves the block that tracks it.

    Pure, and works alone on any matrix under `jit`, `vmap`, `scan` and `grad`: `u` comes back
    with the shape and dtype it came in, so it is a scan carry. Each step reads `W` twice,
    whatever the block size. sigma is never above the truth, up to rounding, and is
    differentiable in `W`, with d sigma = u^T dA v; `u` carries no gradient.

    A zero `W` gives sigma 0; a NaN or infinite one gives a NaN sigma and leaves `u` as it was.
    Entries of `u` that are not finite are replaced. A bfloat16 or float16 `W` is computed with
    in float32. Scaling `W` scales sigma, whatever the scale.

    Args:
        W: The weight, in any layout that `operator` describes.
        u: Vectors of the output side as rows: `(*batch, block, *codomain)`, or
            `(*batch, *codomain)` for a single vector. Any start that is not orthogonal to the
            answer will do; rows need not be orthonormal at first, and are afterwards.
        n_steps: Power steps. 0 gives the best estimate in the span of `u`, with one read.
        operator: How `W` is seen as a linear map; `Matrix()` if None.

    Returns:
        sigma, of shape `(*batch)`, and the next `u`.

    Raises:
        TypeError: If `W` or `u` is not real floating point.
        ValueError: If `operator` does not fit `W`, `u` does not fit both, or `n_steps < 0`.

    Examples:
        >>> import jax, jax.numpy as jnp, jsn
        >>> W = jnp.diag(jnp.array([3.0, 2.0, 1.0]))
        >>> sigma, u = jsn.power_iterate(W, jnp.ones(3), n_steps=20)
        >>> print(f"{sigma:.4f}")
        3.0000
        >>> print(jax.grad(lambda W: jsn.power_iterate(W, u)[0])(W).round(2)[0, 0])
        1.0

    References:
        One vector: Miyato et al. 2018, algorithm 1, https://arxiv.org/abs/1802.05957.
        Blocks: Knyazev 2001, Toward the Optimal Preconditioned Eigensolver: LOBPCG,
        algorithm 5.1 without a preconditioner, https://doi.org/10.1137/S1064827500366124.
    """
    call = "jsn.power_iterate"
    operator = Matrix() if operator is None else operator
    if not isinstance(operator, Operator) or isinstance(operator, type):
        raise TypeError(_errors.no_operator(call, operator))
    n_steps = check_count(call, "n_steps", n_steps, 0)
    check_weights([Leaf("", W, operator)], call)
    single = check_block(call, operator, W.shape, u)
    block = jnp.expand_dims(u, len(operator.batch(W.shape))) if single else u
    raw, block = lax.stop_gradient((W, jnp.asarray(block, jnp.float32)))
    if n_steps:  # a caller's own vectors may have any lengths and angles
        (block,) = orthonormal([block], [block], [len(operator.batch(W.shape))], each)
    (found,), (block,) = advance([operator], [raw], [block], n_steps)
    return with_derivative(operator, W, found), block.reshape(u.shape).astype(u.dtype)


def check_count(call: str, name: str, value: int, least: int) -> int:
    """Returns a static count as an int.

    Raises:
        ValueError: If it is not an integer of at least `least`.
    """
    try:
        count = index(value)
    except TypeError:  # a traced value's too
        count = least - 1
    if isinstance(value, bool) or count < least:
        raise ValueError(_errors.bad_count(call, name, value, least))
    return count


def check_block(call: str, operator: Operator, shape: tuple[int, ...], u: Block) -> bool:
    """Whether `u` is a single vector without a block axis.

    Raises:
        TypeError: If `u` is not real floating point.
        ValueError: If its shape fits neither a vector nor a block.
    """
    dtype = getattr(u, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        found = f"a {type(u).__name__}" if dtype is None else f"of dtype {dtype}"
        raise TypeError(_errors.bad_u_dtype(call, found))
    batch, codomain = operator.batch(shape), operator.codomain(shape)
    if u.shape == (*batch, *codomain):
        return True
    n_batch = len(batch)
    fits = u.shape == (*batch, *u.shape[n_batch : n_batch + 1], *codomain)
    if not fits or 0 in u.shape or u.shape[n_batch] > size(codomain):
        expected = [f"{(*batch, *codomain)}", f"{(*batch, 'block', *codomain)}".replace("'", "")]
        raise ValueError(_errors.bad_u(call, tuple(u.shape), expected, tuple(shape)))
    return False
