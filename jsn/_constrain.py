"""Station 5. From sigma to the weight the model uses: hard, soft, learned scale.

In: weights, their sigmas, and what the caller asks for. Out: the constrained weights, each in
its own dtype, and what they were multiplied by. Must not know how sigma was found.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec
from jaxtyping import Array

from jsn import _errors
from jsn._block import Stack
from jsn._operator import explicit_spec
from jsn._rules import Leaf, flatten
from jsn._types import Operator, PyTree, Sigma, Weight


def constrain(
    operators: Sequence[Operator],
    weights: Sequence[Weight],
    sigmas: Sequence[Sigma],
    bounds: Sequence[Any],
    soft: bool,
    scales: Sequence[Any],
) -> tuple[list[Weight], list[Sigma]]:
    """Scales weights: `W * bound / sigma`, or `W * min(1, bound / sigma)`, times `scale`.

    The factors of all weights are formed at once. They are formed and applied in at least
    float32; the cast to the dtype of `W` comes last. A zero weight stays zero.

    Returns:
        The scaled weights, and their factors.
    """
    one = jnp.ndim(bounds[0]) == 0 and all(bound is bounds[0] for bound in bounds)
    bare = _factors(soft, list(sigmas), list(bounds[:1] if one else bounds))
    factors = [_with_scale(*each) for each in zip(weights, bare, scales, strict=True)]
    every = zip(operators, weights, factors, scales, strict=True)
    return [_scaled(*each) for each in every], factors


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _factors(soft: bool, sigmas: list[Sigma], bounds: list[Any]) -> list[Sigma]:
    """What each weight is multiplied by, from all sigmas and all bounds, or their only one."""
    stack = Stack(tuple(sigma.shape for sigma in sigmas))
    sigma = stack.flat(sigmas)
    bound = jnp.asarray(bounds[0], sigma.dtype)
    if len(bounds) > 1 or bound.ndim:
        each = zip(bounds, stack.batches, strict=True)
        bound = stack.flat([jnp.broadcast_to(jnp.asarray(b, sigma.dtype), n) for b, n in each])
    scaled = ~(sigma <= bound) if soft else sigma != 0  # a NaN sigma scales
    factor = jnp.where(scaled, bound, 1) / jnp.where(scaled, sigma, 1)
    # Else XLA divides a factor by its bound as `bound / (sigma * bound)`, which may underflow.
    return stack.split(lax.optimization_barrier(factor))


@functools.partial(_factors.defjvp, symbolic_zeros=True)
def _(soft, primals, tangents):
    """Without the square of sigma, which over- or underflows where sigma does not."""
    (sigmas, bounds), (d_sigmas, d_bounds) = primals, tangents
    factors = _factors(soft, sigmas, bounds)
    bounds, d_bounds = (list(x) * (len(sigmas) // len(bounds)) for x in (bounds, d_bounds))
    each = zip(factors, bounds, map(_known, d_sigmas), map(_known, d_bounds), strict=True)
    return factors, [_change(soft, *one) for one in each]


def _known(change: Any) -> Any:
    return None if isinstance(change, SymbolicZero) else change


@functools.partial(jax.jit, static_argnums=0)  # traced once for each shape
def _change(soft: bool, factor: Sigma, bound: Any, d_sigma: Any, d_bound: Any) -> Sigma:
    """The change of `bound / sigma`. Where sigma is 0, whatever this is meets a weight of 0."""
    inverse = factor / jnp.asarray(bound, factor.dtype)  # of sigma, which need not be handed on
    if soft:
        inverse = jnp.where(factor == 1, 0, inverse)  # below the bound nothing changes
    change = jnp.zeros_like(factor)
    if d_sigma is not None:
        change = -factor * (d_sigma * inverse)
    if d_bound is not None:
        change = change + d_bound.astype(factor.dtype) * inverse
    return change


def around(factor: Sigma) -> tuple[Sigma, Sigma]:
    """What to multiply the input and the output of a linear map with, instead of its weight.

    The output by a power of two, a constant: 1, unless the input would leave the numbers there are.
    That rounds nothing, or XLA would round the sum with a bias differently in each copy of it.
    """
    size = jnp.abs(lax.stop_gradient(factor))
    beyond = jnp.where(size == 0, 1, size / jnp.clip(size, 2.0**-60, 2.0**60))
    after = lax.reduce_precision(beyond, jnp.finfo(beyond.dtype).nexp, mantissa_bits=0)
    return factor / after, after


def _with_scale(W: Weight, factor: Sigma, scale: Any) -> Sigma:
    factor = factor.astype(np.promote_types(W.dtype, np.float32))
    return factor if scale is None else factor * jnp.asarray(scale, factor.dtype)


def _scaled(operator: Operator, W: Weight, factor: Sigma, scale: Any) -> Weight:
    dtype = factor.dtype
    if scale is None and factor.ndim == 0 and _is_kernel(operator, W):
        return _kernel_scaled(False, W.astype(dtype), factor).astype(W.dtype)
    if factor.ndim:
        factor = _spread(operator, W, factor)
    return (W.astype(dtype) * factor).astype(W.dtype)


def _spread(operator: Operator, W: Weight, factor: Sigma) -> Array:
    """One factor for each batch entry, on the batch axes of the weight, and where those live."""
    factor = operator.spread(factor, W.shape)
    spec = explicit_spec(W)
    if spec is None:
        return factor
    kept = [axis if n > 1 else None for axis, n in zip(spec, factor.shape, strict=True)]
    return jax.sharding.reshard(factor, PartitionSpec(*kept))


def _is_kernel(operator: Operator, W: Weight) -> bool:
    """Whether it looks like a convolution's kernel in Flax, with its window in front.

    Three axes may be attention's too.
    """
    return W.ndim > 3 and getattr(operator, "out_axis", None) != (0,)  # as PyTorch's kernels have


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _kernel_scaled(back: bool, W: Weight, factor: Sigma) -> Weight:
    """`W * factor` for kernels of convolutions; `back`: in a program that has a way back.

    On that way a convolution takes its kernel reversed and transposed, and XLA:CPU does both in one
    slow pass. It only has to transpose what lies reversed already.
    """
    if not back:
        return W * factor
    return lax.platform_dependent(W, factor, cpu=_scaled_in_reverse, default=jnp.multiply)


@_kernel_scaled.defjvp
def _(_, primals, tangents):
    """One product for both parts: the way back then scales and transposes in one fast pass."""
    (W, factor), (dW, d_factor) = primals, tangents
    return _kernel_scaled(True, W, factor), (dW + W * (d_factor / factor)) * factor


def _scaled_in_reverse(W: Weight, factor: Sigma) -> Weight:
    """`W * factor`, computed in the reverse order of its window, and seen in the order of W."""
    window = tuple(range(W.ndim - 2))
    scaled = lambda W, factor: lax.rev(W, window) * factor
    # Either way the same: XLA fuses nothing across a condition, so this is a pass of its own.
    return lax.rev(lax.cond(factor > 0, scaled, scaled, W, factor), window)


def per_leaf(call: str, name: str, value: Any, params: PyTree, leaves: Sequence[Leaf]) -> list[Any]:
    """Gives each leaf its bound or scale, from one value or from a tree prefix of the parameters.

    Raises:
        ValueError: If a value known at trace time is no number (a bound: no number above 0) or
            does not broadcast to the leaf's sigmas, by path; or if the tree is no prefix.
    """
    if value is None and name == "scale":
        return [None] * len(leaves)
    values = broadcast(call, name, value, params)
    problems = [
        (leaf.path, what)
        for leaf, x in zip(leaves, values, strict=True)
        if leaf.operator is not None and (what := _problem(name, x, leaf))
    ]
    if problems:
        if jax.tree.structure(value) == jax.tree.structure(0):
            problems = [("every weight", problems[0][1])]
        raise ValueError(_errors.bad_bound(call, name, problems))
    return [1.0 if x is None else x for x in values]  # no scale


def broadcast(call: str, name: str, prefix: PyTree, params: PyTree) -> list[Any]:
    """Gives each leaf of a tree the value that a prefix of the tree has for it.

    Raises:
        ValueError: If it is no prefix.
    """
    if jax.tree.structure(prefix) == jax.tree.structure(0):
        return [prefix] * len(flatten(params)[0])
    values: list[Any] = []
    try:
        jax.tree.map(
            lambda x, subtree: values.extend([x] * len(flatten(subtree)[0])),
            prefix,
            params,
            is_leaf=lambda x: x is None,
        )
    except (ValueError, TypeError) as error:
        raise ValueError(_errors.bad_prefix(call, name, str(error))) from None
    return values


def _problem(name: str, value: Any, leaf: Leaf) -> str | None:
    """What is wrong with one value, as far as can be seen before run time."""
    if value is None:
        return None if name == "scale" else "found None"
    shape = np.shape(value)
    batch = leaf.operator.batch(leaf.value.shape)  # type: ignore
    dtype = value.dtype if hasattr(value, "dtype") else np.asarray(value).dtype
    real = jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)
    if not real:
        return f"found {value!r} of dtype {dtype}"
    if shape and shape != batch:
        return f"found shape {shape}, the weight has {batch or 'one sigma'}"
    if name == "bound" and not isinstance(value, Tracer):
        found = np.asarray(value, np.float64)
        if not (found > 0).all():
            return f"found {value!r}"
    return None
