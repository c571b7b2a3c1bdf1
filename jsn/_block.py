"""Station 3, the small algebra: Rayleigh-Ritz and orthonormalization on the block axis.

In: the Gram matrices of the blocks of all weights. Out: the combinations of vectors that make the
next blocks. Everything here has the size of a block squared, whatever the size of the weights,
and so runs once for all of them, on one stack of matrices. Must not know weights or operators.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from jsn._operator import contract, explicit_spec, size
from jsn._pieces import cut
from jsn._types import Block


class Basis(NamedTuple):
    """Rayleigh-Ritz in the span of orthonormal blocks: M = A A^T seen from inside of each."""

    values: Float[Array, "n values"]
    """Ritz values, the largest first: squares of singular values, times those of `shrink`."""
    vectors: Float[Array, "n vectors b"]
    """Ritz vectors, as rows of coefficients; there may be more rows, of vectors that follow."""
    shrink: Float[Array, " n"]
    """Powers of two that bring the longest images to lengths between 1 and 2."""


NOISE = 2.0**-23
"""Size of the probe mixed into each new block: at rounding level, it only matters where nothing
else is left, and there it brings a lost or rank-deficient block back to life."""


def probe(shape: tuple[int, ...], n_batch: int) -> Block:
    """A fixed, seemingly random block in [-1, 1): an integer hash of the position.

    Computed where it is used, so that no array of its size becomes a constant of the program,
    and equal on every platform. (A multiple of the squared position, modulo 1, is cheaper and will
    not do: it leaves blocks of some shapes without full rank.)
    """
    index = lax.iota(jnp.uint32, size(shape[n_batch:])).reshape(shape[n_batch:])
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        index = (index ^ (index >> shift)) * jnp.uint32(factor)
    index = index ^ (index >> 16)
    return jnp.broadcast_to(index.astype(jnp.float32) * 2.0**-31 - 1, shape)


_DIRECTIONS = 8
"""At most so many residuals, and as many previous directions: where much competes, 32 vectors in
thirds leave up to twice the error, and cost more (`docs/which.md`)."""


def shares(block: int) -> tuple[int, int, int]:
    """How many Ritz vectors, residuals and previous directions make up a block."""
    n_residual, n_previous = min((block + 1) // 3, _DIRECTIONS), min(block // 3, _DIRECTIONS)
    return block - n_residual - n_previous, n_residual, n_previous


def ritz(grams: Float[Array, "n b b"]) -> Basis:
    """The Ritz basis of blocks, exact and whole, from the Gram matrices of their images."""
    return _ritz(grams, _shrink(grams))


def _ritz(grams: Float[Array, "n b b"], shrink: Float[Array, " n"]) -> Basis:
    """The same with powers of two given, so that LAPACK sees matrices of one size at all scales."""
    padding = (identity(grams) > 0) & (grams < 0)  # no square is
    grams = jnp.where(padding, grams, grams * shrink[:, None, None] ** 2)
    if grams.shape[-1] == 1:
        return Basis(grams[..., 0], jnp.ones_like(grams), shrink)  # of a single vector, itself
    # Of -gram, as they come in ascending order: the largest first.
    values, vectors = lax.platform_dependent(-grams, cpu=_eigh_on_cpu, default=_eigh)
    return Basis(-values, jnp.swapaxes(vectors, -1, -2), shrink)


def _shrink(grams: Float[Array, "n b b"]) -> Float[Array, " n"]:
    return _to_length_one(largest(grams))


def _eigh(grams: Float[Array, "*n b b"]) -> tuple[Array, Array]:
    values, vectors = jnp.linalg.eigh(grams, symmetrize_input=False)
    return values, vectors


def _eigh_on_cpu(grams: Float[Array, "n b b"]) -> tuple[Array, Array]:
    return lax.map(_eigh, grams) if _lapack_hangs() else _eigh(grams)


def _lapack_hangs() -> bool:
    """Whether several devices share one CPU.

    LAPACK's batched calls share their work among the threads that the virtual devices themselves
    run on, and eight devices wait for each other for ever (jaxlib 0.10.2 and 0.12.0).
    """
    return jax.default_backend() == "cpu" and jax.local_device_count() > 1


_EXACT = 16
"""Blocks of at most so many vectors get all their Ritz vectors, exactly: for 16 LAPACK takes 14 us,
for 32 it takes 51, more than all other small algebra, and `leading` 10."""


def leading(grams: Float[Array, "n b b"]) -> Basis:
    """The leading Ritz pairs of a block, as LOBPCG needs them; after them, rows that it only keeps.

    In a large block by one pass of subspace iteration with a polynomial of the Gram matrix, and
    Rayleigh-Ritz among the first rows of what it gives. Blocks come with the last Ritz vectors in
    front, so the pass starts close to what it looks for.
    """
    n_ritz, n_residual, _ = shares(grams.shape[-1])
    if grams.shape[-1] <= _EXACT:
        basis = ritz(grams)
        return basis._replace(
            values=basis.values[:, :n_residual], vectors=basis.vectors[:, :n_ritz]
        )
    rows = _product(_front(n_ritz, grams), _steep(grams))
    rows = _orthonormal(_orthonormal(rows))  # the second pass repairs the rounding of the first
    seen = _product(_product(rows, grams), jnp.swapaxes(rows, -1, -2))
    basis = _ritz(seen[:, :n_residual, :n_residual], _shrink(grams))
    turn = jnp.pad(basis.vectors, [(0, 0), *[(0, n_ritz - n_residual)] * 2])
    turn += identity(turn) * (jnp.arange(n_ritz) >= n_residual)[None, None]  # what follows, stays
    return basis._replace(vectors=_product(turn, rows))


def _front(n_rows: int, grams: Float[Array, "n b b"]) -> Float[Array, "n rows b"]:
    """The first rows of the identity; with a share of all that follows the leading ones.

    So none goes unseen, wherever it hides. Larger shares cost accuracy: 1/8 leaves 4e-6 of sigma
    where the largest singular values all but tie, and 1/64 a few 1e-5 of the singular vectors.
    """
    n_residual = shares(grams.shape[-1])[1]
    follows = jnp.arange(grams.shape[-1]) >= n_residual
    front = identity(grams)[:, :n_rows]
    return front + jnp.where(follows, probe(front.shape, 1) / 256, 0)


def _steep(grams: Float[Array, "n b b"]) -> Float[Array, "n b b"]:
    """`x^64 + x^8 / 2^6 + x / 2^12 + 1 / 2^18` of matrices whose largest entry is made 1.

    Steep where the largest eigenvalues compete, yet nothing drowns in the rounding of the largest,
    as it does in a power: orthonormalized twice, the rows have full rank, and zero stays as it is.
    """
    power, total = _to_one(grams), identity(grams)
    for _ in range(2):
        total = power + total / 64
        for _ in range(3):  # entries reach the eighth power of the block size at most
            power = _product(power, power)
        power = _to_one(power)
    return power + total / 64


def _to_one(grams: Float[Array, "n b b"]) -> Float[Array, "n b b"]:
    """Gram matrices over their largest entries."""
    most = largest(grams)[:, None, None]
    return grams / jnp.where(most > 0, most, 1)


def lobpcg(basis: Basis) -> Float[Array, "n others b"]:
    """What the next blocks are made of beside Ritz vectors q, as rows of coefficients.

    In turns the `-w q` of a residual `y - w q`, and where that q came from: its part outside the
    last Ritz vectors, orthogonal to all new ones (times w as well).
    """
    q, n_residual, (n_ritz, block) = basis.vectors, basis.values.shape[-1], basis.vectors.shape[-2:]
    eye, outside = np.eye(block), np.diag(np.arange(block) >= n_ritz)
    scaled = basis.values[..., None] * q[:, :n_residual]
    seen = _product(_product(_by(scaled, outside), jnp.swapaxes(q, -1, -2)), q)
    rows = _in_turns(scaled, -eye, outside) - _in_turns(seen, 0 * eye, eye)
    return rows[:, : block - n_ritz]


def _in_turns(x: Float[Array, "n a b"], first: np.ndarray, second: np.ndarray) -> Array:
    """The rows of `x first` and of `x second`, in turns."""
    n, n_rows, block = x.shape
    return _by(x, np.concatenate([first, second], 1)).reshape(n, 2 * n_rows, block)


def _by(x: Float[Array, "n a b"], constant: np.ndarray) -> Float[Array, "n a c"]:
    """A product with a constant. XLA:CPU has products ready, and compiles all else anew."""
    return contract(x, jnp.asarray(constant, x.dtype), ((2,), (0,)))


def _orthonormal(x: Float[Array, "n a b"]) -> Float[Array, "n a b"]:
    return _product(orthonormalizer(_product(x, jnp.swapaxes(x, -1, -2))), x)


def orthonormalizer(grams: Float[Array, "n b b"]) -> Float[Array, "n b b"]:
    """The T for which T x has orthonormal rows, from the Gram matrix of x.

    Cholesky, shifted so that it succeeds on dependent rows too, and then one Newton-Schulz step
    towards `T gram T^T = 1`, which takes the shift out again. NaN throughout if anything is not
    finite.
    """
    block, eye = grams.shape[-1], identity(grams)
    if block == 1:
        change = lax.rsqrt(jnp.where(grams > 0, grams, 1))
        return jnp.where(jnp.isfinite(grams), change, jnp.nan)
    squares = _diagonal(grams).reshape(-1)  # one vector: XLA:CPU writes out a loop over short rows
    scale = _to_length_one(squares).reshape(-1, block)
    change = grams * scale[..., :, None] * scale[..., None, :] + block * 2.0**-22 * eye
    change = lax.platform_dependent(change, cpu=_factorized_on_cpu, default=_factorized)
    change = change * scale[..., None, :]
    reached = _product(_product(change, grams), jnp.swapaxes(change, -1, -2))
    return _product(1.5 * eye - 0.5 * reached, change)


def _to_length_one(squares: Float[Array, " n"]) -> Float[Array, " n"]:
    """What brings vectors of these squared lengths to lengths from 1 to 2; 1 if they have none."""
    length = jnp.sqrt(jnp.where(squares > 0, squares, 1))
    # To a power of two: nothing is rounded. (And not by `rsqrt`: XLA:CPU compiles it slowly.)
    return 1 / lax.reduce_precision(length, jnp.finfo(length.dtype).nexp, mantissa_bits=0)


def _factorized(grams: Float[Array, "n b b"]) -> Float[Array, "n b b"]:
    """The inverses of the Cholesky factors."""
    factor = lax.linalg.cholesky(grams, symmetrize_input=False)
    return lax.linalg.triangular_solve(factor, identity(grams), left_side=True, lower=True)


def _factorized_on_cpu(grams: Float[Array, "n b b"]) -> Float[Array, "n b b"]:
    return _eliminated(grams) if _lapack_hangs() else _factorized(grams)


def _eliminated(grams: Float[Array, "n b b"]) -> Float[Array, "n b b"]:
    """The same by Gaussian elimination on `[gram | 1]`: row by row, for all matrices at once."""
    beside = jnp.concatenate([grams, identity(grams)], axis=-1)

    def next_row(i: Array, done: Array) -> Array:
        row = lax.dynamic_slice_in_dim(beside, i, 1, axis=-2)
        factors = jnp.swapaxes(lax.dynamic_slice_in_dim(done, i, 1, axis=-1), -1, -2)
        row = row - _product(factors, done)
        row = row / jnp.sqrt(lax.dynamic_slice_in_dim(row, i, 1, axis=-1))
        return lax.dynamic_update_slice_in_dim(done, row, i, axis=-2)

    n_rows = np.uint32(grams.shape[-1])  # unsigned: no index has to be looked at for its sign
    done = lax.fori_loop(np.uint32(0), n_rows, next_row, jnp.zeros_like(beside))
    return lax.slice_in_dim(done, grams.shape[-1], beside.shape[-1], axis=-1)


def identity(grams: Float[Array, "*n b b"]) -> Float[Array, "*n b b"]:
    """The identity, in the shape and dtype of a stack of matrices."""
    return jnp.broadcast_to(jnp.eye(grams.shape[-1], dtype=grams.dtype), grams.shape)


def largest(grams: Float[Array, "n b b"]) -> Float[Array, " n"]:
    """The largest entries of Gram matrices: the square of a longest vector, on the diagonal."""
    return _diagonal(grams).max(-1)


def _diagonal(grams: Float[Array, "n b b"]) -> Float[Array, "n b"]:
    """The diagonals of a stack of matrices: every so many entries of its rows, end to end."""
    n, block, _ = grams.shape
    return lax.slice(grams.reshape(n, block**2), (0, 0), (n, block**2), (1, block + 1))


def _product(x: Float[Array, "n a b"], y: Float[Array, "n b c"]) -> Float[Array, "n a c"]:
    return contract(x, y, ((2,), (1,)), ((0,), (0,)))


class Stack(NamedTuple):
    """How what is small of several weights lies in one array, and back.

    A weight has one entry, or one for each entry of its batch axes.
    """

    batches: tuple[tuple[int, ...], ...]
    """The sizes of the batch axes of each weight."""

    def flat(self, values: Sequence[Array]) -> Array:
        """One value for each entry of each weight, as one vector."""
        return self._join([x.reshape(-1) for x in map(everywhere, values)])

    def matrices(self, matrices: Sequence[Array], fill: float) -> Float[Array, "n b b"]:
        """The matrices of all entries, padded to the largest with `fill` on the diagonal.

        The padding must not mix with what it surrounds: -1 sorts last in `ritz`, as a Gram matrix
        has no negative eigenvalue; 1 changes nothing in `orthonormalizer`.
        """
        largest = max(matrix.shape[-1] for matrix in matrices)
        padded = [_pad(everywhere(matrix), largest, fill) for matrix in matrices]
        return self._join([x.reshape(-1, largest, largest) for x in padded])

    def split(self, stacked: Array, *sizes: Sequence[int]) -> list[Array]:
        """Cuts an array apart: its first axis into entries, the others to the sizes given."""
        (entries,) = cut([stacked], self.batches)
        shapes = [(*batch, *inner) for batch, *inner in zip(self.batches, *sizes, strict=True)]
        return [
            part if part.shape == shape else lax.slice(part, (0,) * part.ndim, shape)
            for part, shape in zip(entries, shapes, strict=True)
        ]

    def _join(self, parts: Sequence[Array]) -> Array:
        dtype = np.result_type(*[part.dtype for part in parts])
        return jnp.concatenate([part.astype(dtype) for part in parts])


def everywhere(x: Array) -> Array:
    """Small things are wanted by every device (meshes with explicit axes say so)."""
    return x if explicit_spec(x) is None else jax.sharding.reshard(x, PartitionSpec())


def _pad(matrix: Array, block: int, fill: float) -> Array:
    missing = block - matrix.shape[-1]
    if not missing:
        return matrix
    diagonal = jnp.where(jnp.arange(block) < matrix.shape[-1], 0.0, fill).astype(matrix.dtype)
    padded = jnp.pad(matrix, [(0, 0)] * (matrix.ndim - 2) + [(0, missing)] * 2)
    return padded + jnp.broadcast_to(jnp.diag(diagonal), padded.shape)
