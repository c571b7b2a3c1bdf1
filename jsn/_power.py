"""Station 3. The block power iteration: two reads of W, a small Rayleigh-Ritz, sigma.

In: weights, their operators, and the tracked blocks `u` of their output sides. Out: sigmas with
their derivative, and the next blocks. Must not know about trees, rules or constraints.

One step (`W` as the map A, rows of `u` orthonormal, M = A A^T):

    v = A^T u                                the first read of W, with the whole block
    G = v v^T = u M u^T,  G = Q diag(w) Q^T  Rayleigh-Ritz on the span of u
    v = (leading columns of Q)^T v,  y = A v the second read, with a few vectors
    r = y - w q                              residuals of the leading Ritz vectors q = Q^T u
    sigma = |y1| / |v1|                      one half step beyond the best Ritz vector
    u <- orthonormal rows of [ Ritz vectors | residuals and previous directions, in turns ]

The next block is that of LOBPCG without a preconditioner; of a large block only the leading columns
of Q are looked for (`_block.leading`). Where the block spans a whole side of the matrix, and for
a block of one vector, it is y itself: subspace iteration, which for one vector is the iteration of
Miyato et al. What has the size of a weight or of a block is done weight by weight here; the algebra
in between, which is small, for all of them at once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from operator import index
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from jsn import _errors
from jsn._block import (
    NOISE,
    Basis,
    Stack,
    everywhere,
    largest,
    leading,
    lobpcg,
    orthonormalizer,
    probe,
    ritz,
    shares,
)
from jsn._operator import Matrix, Product, contract, explicit_spec, rmatvec, size
from jsn._pieces import split
from jsn._rules import Leaf, check_weights
from jsn._types import Block, Operator, Sigma, Weight


class Pairs(NamedTuple):
    """The tracked singular pairs of several weights: sigmas, and the vectors they were read off.

    The lengths of u and v multiply to 1, or are what zero weights leave.
    """

    sigma: list[Sigma]
    u: list[Float[Array, "*batch_codomain"]]
    v: list[Float[Array, "*batch_domain"]]


class First(NamedTuple):
    """What the first read of several weights gives."""

    v: list[Product]
    """The images `A^T u` of their blocks."""
    far: Float[Array, " n"]
    """Powers of two that bring v to where its squares are in no danger: hardly ever not 1."""
    grams: Float[Array, "n b b"]
    """The Gram matrices of `far v`."""


# --- blocks of vectors ------------------------------------------------------------------------


def _gram(x: Array, n_batch: int, last: bool = False) -> Float[Array, "*batch block block"]:
    """The Gram matrix of a block, whose block axis comes after the batch axes, or last."""
    axes = tuple(range(n_batch, x.ndim - 1) if last else range(n_batch + 1, x.ndim))
    batch = tuple(range(n_batch))
    return contract(x, x, (axes, axes), (batch, batch))


def _mix(coefficients: Float[Array, "*batch rows block"], x: Array, last: bool = False) -> Block:
    """Linear combinations of the vectors of a block, whose block axis may come last."""
    n_batch = coefficients.ndim - 2
    y = _mix_in_place(coefficients, x, last)
    return jnp.moveaxis(y, -1, n_batch) if last else y


def _mix_in_place(coefficients: Float[Array, "*batch rows block"], x: Array, last: bool) -> Array:
    """The same, with the block axis where it was."""
    n_batch = coefficients.ndim - 2
    batch, coefficients = tuple(range(n_batch)), _beside(x, coefficients, n_batch)
    if last:
        return contract(x, coefficients, ((x.ndim - 1,), (n_batch + 1,)), (batch, batch))
    return contract(coefficients, x, ((n_batch + 1,), (n_batch,)), (batch, batch))


def _rescaled(factors: Sigma, x: Array, last: bool = False) -> Array:
    """A block times a power of two for each batch entry, with the block axis where it was.

    As a product with a diagonal matrix: XLA:CPU has products ready, and compiles the rest anew for
    each shape. (What is not finite spreads to the whole block, as it does in any Gram matrix.)
    """
    block = x.shape[-1 if last else factors.ndim]
    eye = jnp.broadcast_to(jnp.eye(block, dtype=factors.dtype), (*factors.shape, block, block))
    return _mix_in_place(factors[..., None, None] * eye, x, last)


def _over(values: Array, x: Array) -> Array:
    """One value for each batch entry, shaped to broadcast over the trailing axes of x."""
    values = _beside(x, values, jnp.ndim(values))
    return values.reshape(values.shape + (1,) * (x.ndim - values.ndim))


def _beside(x: Array, small: Array, n_batch: int) -> Array:
    """What was computed everywhere, moved to where the batch axes of x are (explicit meshes)."""
    spec = explicit_spec(x)
    return small if spec is None else jax.sharding.reshard(small, PartitionSpec(*spec[:n_batch]))


def _safe(x: Array) -> Array:
    """The values that are usable divisors, and 1 for the others."""
    return jnp.where(x > 0, x, 1)


def start(operator: Operator, shape: tuple[int, ...], block: int) -> Block:
    """The first block of a weight, not yet orthonormal: a fixed probe."""
    batch = operator.batch(shape)
    return probe((*batch, block, *operator.codomain(shape)), len(batch))


@functools.partial(jax.jit, static_argnums=(1, 2))  # traced once for each shape
def usable(u: Block, n_batch: int, largest: float = 2.0) -> Block:
    """A block, with what is not finite or too large replaced: stored rows have length 1."""
    fresh = probe(u.shape, n_batch)
    if explicit_spec(u) is not None:
        fresh = jax.sharding.reshard(fresh, jax.typeof(u).sharding)
    return jnp.where(jnp.abs(u) <= largest, u, fresh)  # a NaN is not


def full_side(operator: Operator, shape: tuple[int, ...]) -> int:
    """The number of vectors that span the smaller side of the map: no block needs more."""
    return min(size(operator.domain(shape)), size(operator.codomain(shape)))


def is_subspace(operator: Operator, shape: tuple[int, ...], block: int) -> bool:
    """Whether plain subspace iteration is the step: one vector, or a whole side (then exact)."""
    return block == 1 or block >= full_side(operator, shape)


# --- one step -----------------------------------------------------------------------------------


class Tracked(NamedTuple):
    """A weight, how it is seen, and its block."""

    operator: Operator
    W: Weight
    u: Block

    @property
    def batch(self) -> tuple[int, ...]:
        """Sizes of the batch axes."""
        return self.operator.batch(self.W.shape)

    @property
    def block(self) -> int:
        """Vectors in the block."""
        return self.u.shape[len(self.batch)]

    @property
    def is_subspace(self) -> bool:
        """Whether its step is plain subspace iteration."""
        return is_subspace(self.operator, self.W.shape, self.block)

    @property
    def n_ritz(self) -> int:
        """How many Ritz vectors of this block the next one keeps; in subspace iteration, all."""
        return self.block if self.is_subspace else shares(self.block)[0]

    @property
    def n_leading(self) -> int:
        """How many vectors the second read takes: those whose residuals are wanted."""
        return self.block if self.is_subspace else shares(self.block)[1]


class Second(NamedTuple):
    """What the second read gives."""

    v: Block
    """The leading Ritz vectors on the input side, times the roots of Ritz values."""
    y: Block
    """Their images `A v`, shrunk as v was: of a size that has a square."""


def read(weights: Sequence[Tracked]) -> First:
    """The first read of each weight, and Gram matrices that no scale of W overflows."""
    stack = stack_of(weights)
    v = [rmatvec(weight.operator, weight.W, weight.u) for weight in weights]

    lasts = [made.last for made in v]

    def measured(xs):
        grams = [_gram(x, len(weight.batch), last) for weight, x, last in _zip(weights, xs, lasts)]
        return stack.matrices(grams, fill=-1)

    def on_cpu(xs):  # one more pass over the blocks, but only if one of them asks for it
        grams = measured(xs)
        far = _far(largest(grams))
        nearer = lambda: measured(_each(_rescaled, stack.split(far), xs, lasts))
        return far, lax.cond(jnp.all(far == 1), lambda: grams, nearer)

    def elsewhere(xs):  # such a decision would wait for the device
        axes = [tuple(range(len(weight.batch), x.ndim)) for x, weight in _zip(xs, weights)]
        peaks = stack.flat([jnp.max(jnp.abs(x), axis) for x, axis in _zip(xs, axes)])
        far = _far(peaks**2)
        return far, measured([x * _over(f, x) for x, f in _zip(xs, stack.split(far))])

    far, grams = lax.platform_dependent([made.x for made in v], cpu=on_cpu, default=elsewhere)
    return First(v, far, grams)


def _far(squares: Float[Array, " n"]) -> Float[Array, " n"]:
    """What brings blocks nearer to 1, by their largest squares: 1 where these are in no danger."""
    limit = 2.0**80
    far = jnp.where(squares < 1 / limit, limit, jnp.where(squares <= limit, 1, 1 / limit))
    return far.astype(squares.dtype)


def _mix_shrunk(
    weight: Tracked, rows: Float[Array, "*batch rows b"], v: Product, far: Sigma, near: Sigma
) -> Block:
    """Linear combinations of `far near v`: in two steps, or small coefficients would be lost."""
    return _rescaled(far, _mix_images(weight, rows * _over(near, rows), v))


def _mix_images(weight: Tracked, rows: Float[Array, "*batch rows b"], v: Product) -> Block:
    """Linear combinations of what the first read gave, as the second takes them."""
    return _on_domain(weight, _mix(rows, *v))


def _on_domain(weight: Tracked, x: Array) -> Block:
    """A block of the input side whose axes may have become one: with all of them again."""
    n_batch = len(weight.batch)
    return x.reshape(*x.shape[: n_batch + 1], *weight.operator.domain(weight.W.shape))


def second_read(
    weight: Tracked, v: Product, far: Sigma, near: Sigma, rows: Float[Array, "*batch ritz b"]
) -> Second:
    """The second read of W, with the leading Ritz vectors: eight of 32."""
    first = lax.slice_in_dim(rows, 0, weight.n_leading, axis=len(weight.batch))
    x = _mix_shrunk(weight, first, v, far, near)
    y = weight.operator.matvec(weight.W, x)
    return Second(x, _rescaled(far * near, y))


def added(weight: Tracked, y: Block, others: Block | None) -> Block:
    """What is added to the Ritz vectors: residuals `y - w q` and previous directions; or y alone.

    A probe at rounding level fills in where nothing is left of a row.
    """
    noise = NOISE / size(weight.operator.codomain(weight.W.shape)) ** 0.5
    if others is not None:  # every second row; by a product, as in `_rescaled`
        places = np.eye(2 * weight.n_leading, dtype=y.dtype)[: weight.block - weight.n_ritz, ::2]
        y = _mix(jnp.broadcast_to(places, (*weight.batch, *places.shape)), y) + others
    return y + noise * probe(y.shape, len(weight.batch))


def span(weight: Tracked, rows: Float[Array, "*batch ritz b"], fresh: Block) -> Block:
    """The vectors that span the next block: Ritz vectors, and what is added to them."""
    return lax.concatenate([_mix(rows, weight.u), fresh], len(weight.batch))


def renewed(weight: Tracked, block: Block) -> Block:
    """The next block, or the last one where that is NaN: all of it is, or nothing."""
    return jnp.where(jnp.isnan(block), weight.u, block).astype(jnp.float32)


def step(weights: Sequence[Tracked]) -> tuple[Pairs, list[Block]]:
    """One step for several weights: their pairs and their next blocks.

    Either all are on subspace iteration, or none is and their blocks are of one size.
    """
    stack, blocks = stack_of(weights), [weight.block for weight in weights]
    first, subspace = read(weights), weights[0].is_subspace
    basis = ritz(first.grams) if subspace else leading(first.grams)
    rows = stack.split(basis.vectors, [weight.n_ritz for weight in weights], blocks)
    far, near = stack.split(first.far), stack.split(basis.shrink)
    seconds = _each(second_read, weights, first.v, far, near, rows)
    ys, vs = [second.y for second in seconds], [second.v for second in seconds]

    # What is added is made orthonormal by itself first. The second pass, over all, repairs the
    # rounding of the first, which is large where residuals are all but zero.
    others = [None] * len(weights) if subspace else _others(weights, basis)
    fresh = _orthonormal(weights, _each(added, weights, ys, others))
    spans = fresh if subspace else _each(span, weights, rows, fresh)
    new = _each(renewed, weights, _orthonormal(weights, spans))

    y_square = stack.flat(_each(_square, weights, ys))
    per_length = _inverse_length(y_square * basis.values[:, 0])
    sigma = y_square * per_length / (first.far * basis.shrink)
    return _pairs(weights, sigma, ys, vs, per_length), new


def _others(weights: Sequence[Tracked], basis: Basis) -> list[Block]:
    """The `-w q` of residuals and previous directions, in turns."""
    blocks = [weight.block for weight in weights]
    n_others = [weight.block - weight.n_ritz for weight in weights]
    parts = stack_of(weights).split(lobpcg(basis), n_others, blocks)
    return [_mix(part, weight.u) for part, weight in _zip(parts, weights)]


def stored(weights: Sequence[Tracked]) -> Pairs:
    """The best pairs in the span of the blocks as they are: one read, and no step."""
    stack, blocks = stack_of(weights), [weight.block for weight in weights]
    first = read(weights)
    basis = ritz(first.grams)
    best = stack.split(basis.vectors, [1] * len(blocks), blocks)
    us = [_mix(Q, weight.u) for Q, weight in _zip(best, weights)]
    far, near = stack.split(first.far), stack.split(basis.shrink)
    vs = _each(_mix_shrunk, weights, best, first.v, far, near)
    v_square = jnp.maximum(basis.values[:, 0], 0)  # rounding can make a square negative
    # A block that is not orthonormal, as an average of states is, must not raise sigma.
    u_square = stack.flat(_each(_square, weights, us))
    per_length = _inverse_length(v_square) * _inverse_length(u_square)
    sigma = v_square * per_length / (first.far * basis.shrink)
    return _pairs(weights, sigma, us, vs, per_length)


def _pairs(
    weights: Sequence[Tracked],
    sigma: Float[Array, " n"],
    us: Sequence[Block],
    vs: Sequence[Block],
    per_length: Float[Array, " n"],
) -> Pairs:
    """Pairs, from all sigmas, and the first vectors of blocks, with 1 over their lengths."""
    stack = stack_of(weights)
    (sigmas,) = split([sigma], stack.batches)
    us, vs = _each(_best, weights, us), _each(_best, weights, vs)
    return Pairs(sigmas, [u * _over(per, u) for u, per in _zip(us, stack.split(per_length))], vs)


def _inverse_length(square: Float[Array, " n"]) -> Float[Array, " n"]:
    """1 / |x| from |x|^2, and 1 for what has no length."""
    return jnp.sqrt(1 / _safe(square))


def settle(weights: Sequence[Tracked], n_steps: int) -> list[Tracked]:
    """Runs power steps on several weights, for their blocks alone."""
    us = [weight.u for weight in weights]
    if n_steps:
        again = lambda _, us: step([w._replace(u=u) for w, u in _zip(weights, us)])[1]
        us = lax.fori_loop(0, n_steps, again, us)
    return [weight._replace(u=u) for weight, u in _zip(weights, us)]


def advance(weights: Sequence[Tracked], n_steps: int) -> tuple[Pairs, list[Block]]:
    """Runs power steps on several weights: their pairs, without derivatives, and blocks.

    With `n_steps=0` the blocks come back as they are, and sigma costs one read.
    """
    if n_steps == 0:
        return stored(weights), [weight.u for weight in weights]
    return step(settle(weights, n_steps - 1))


def orthonormal(weights: Sequence[Tracked]) -> list[Tracked]:
    """The weights with blocks of orthonormal rows, whatever their lengths and angles before."""
    us = [weight.u for weight in weights]
    for _ in range(2):  # the second pass repairs the rounding of the first
        us = _orthonormal(weights, us)
    return [weight._replace(u=u) for weight, u in _zip(weights, us)]


def _orthonormal(weights: Sequence[Tracked], blocks: Sequence[Block]) -> list[Block]:
    """Blocks made orthonormal, or NaN throughout."""
    stack, sizes = stack_of(weights), [x.shape[len(w.batch)] for w, x in _zip(weights, blocks)]
    changes = orthonormalizer(stack.matrices(_each(_gram_of, weights, blocks), fill=1))
    return _each(_mix, stack.split(changes, sizes, sizes), blocks)


def stack_of(weights: Sequence[Tracked]) -> Stack:
    """How the small matrices of these weights are stacked."""
    return Stack(tuple(weight.batch for weight in weights))


def _best(weight: Tracked, x: Block) -> Array:
    """The first vector of a block."""
    return lax.index_in_dim(x, 0, len(weight.batch), keepdims=False)


def _square(weight: Tracked, x: Block) -> Sigma:
    """The squared length of the first vector of a block."""
    return _gram_of(weight, x)[..., 0, 0]  # XLA:CPU has products ready, and compiles sums


def _gram_of(weight: Tracked, x: Block) -> Float[Array, "*batch b b"]:
    return _gram(x, len(weight.batch))


def _zip(*lists: Sequence) -> Any:
    return zip(*lists, strict=True)


def _each(function: Callable, *lists: Sequence) -> list:
    """Calls a function for each weight and what belongs to it."""
    return [function(*each) for each in _zip(*lists)]


# --- the derivative -----------------------------------------------------------------------------


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def with_derivative(
    operators: tuple[Operator, ...], weights: list[Weight], pairs: Pairs
) -> list[Sigma]:
    """The sigma of each weight, with the derivative d sigma = u^T dA v: no further read of W."""
    return list(pairs.sigma)


@functools.partial(with_derivative.defjvp, symbolic_zeros=True)
def _(operators, primals, tangents):
    """Weight by weight: a vector of all sigmas would have to be cut apart on the way back."""
    (weights, pairs), changes = primals, tangents[0]
    sigmas = with_derivative(operators, weights, pairs)  # has a derivative in its turn
    return sigmas, _each(_change, operators, sigmas, changes, pairs.u, pairs.v)


def _change(operator: Operator, sigma: Sigma, dW: Any, u: Array, v: Array) -> Sigma:
    if isinstance(dW, SymbolicZero):
        return jnp.zeros_like(sigma)
    return everywhere(_projected(operator, dW, u, v).astype(sigma.dtype))


@functools.partial(jax.jit, static_argnums=0)  # traced once for each shape
def _projected(operator: Operator, W: Weight, u: Array, v: Array) -> Sigma:
    """`u^T A v`, for one vector of each side."""
    n_batch = len(operator.batch(W.shape))
    y = operator.matvec(W, jnp.expand_dims(v, n_batch)).squeeze(n_batch)
    return jnp.sum(u * y, axis=tuple(range(n_batch, u.ndim)))


# --- the public function --------------------------------------------------------------------------


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
    batch = operator.batch(W.shape)
    block = jnp.expand_dims(u, len(batch)) if single else u
    raw, block = lax.stop_gradient((W, jnp.asarray(block, jnp.float32)))
    block = usable(block, len(batch), float(jnp.finfo(block.dtype).max))
    tracked = [Tracked(operator, raw, block)]
    if n_steps:  # a caller's own vectors may have any lengths and angles
        tracked = orthonormal(tracked)
    pairs, (new,) = advance(tracked, n_steps)
    (sigma,) = with_derivative((operator,), [W], pairs)
    return sigma, (new if n_steps else block).reshape(u.shape).astype(u.dtype)


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
