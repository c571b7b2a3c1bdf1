"""Station 7. Scaling what a linen layer takes and gives, where that is less than its weight.

In: the calls of a model that runs on normalized weights, seen by a method interceptor. Out: what
these calls give, from the raw weight and its factor. Must not know state, nor any particular layer.

A factor can stand anywhere in a linear map: `x (W c) = (x c) W`. A step on a small batch has layers
with far more weights than activations; there nothing of the size of a weight has to be written
on the way, nor read on the way back, and what XLA makes of a raw weight serves all passes of
a step. The normalized weight is still what everyone else sees; where no one looks, it is not made.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.core import Scope, tracers
from jaxtyping import Array

from jsn._constrain import around
from jsn._linen_layers import is_linear, n_outputs
from jsn._normalize import Factored
from jsn._rules import flatten

_LARGE = 1 << 16
"""Smaller weights are scaled: that takes next to nothing, and is less to compile."""


class Outputs:
    """A method interceptor for a model that runs on normalized weights."""

    def __init__(self, found: Iterable[Factored]):
        """Takes what has been normalized: a layer is known by the array that it holds."""
        self._found = {id(each.normalized): each for each in found if each.factor.ndim == 0}
        self._trace = tracers.current_trace()

    def __call__(
        self, call_next: Callable, args: Any, kwargs: Any, context: nn.module.InterceptorContext
    ) -> Any:
        """Calls a method; of a layer with more weights than activations, on its raw weight."""
        module = context.module
        weight = self._found.get(id(_parameter(module, "kernel")))
        plain = context.method_name == "__call__" and len(args) == 1 and not kwargs
        if weight is None or not plain or not is_linear(module):
            return call_next(*args, **kwargs)
        x, bias = jnp.asarray(args[0]), _parameter(module, "bias")
        if not self._pays(module, weight.raw, bias, x):
            return call_next(*args)
        before, after = around(weight.factor)
        with _holding(module, weight.raw, bias):
            y = call_next(x * before)
        y = y * after.astype(y.dtype)
        if bias is None:
            return y
        return y + bias.astype(y.dtype).reshape((1,) * (y.ndim - bias.ndim) + bias.shape)

    def _pays(self, module: Any, raw: Array, bias: Array | None, x: Array) -> bool:
        """Whether there is less to scale than a weight, and in numbers that are wide enough."""
        if raw.size < _LARGE or tracers.current_trace() != self._trace:
            return False  # within a loop, say, a call is many calls
        given = [a for a in (raw, bias, x) if a is not None]
        dtype = jnp.result_type(*given) if module.dtype is None else module.dtype
        # Narrower numbers would be rounded once more, after the product.
        wide = jnp.issubdtype(dtype, jnp.floating) and jnp.dtype(dtype).itemsize >= 4
        return wide and x.size + n_outputs(module, raw.shape, x.shape) < raw.size


@contextlib.contextmanager
def _holding(module: nn.Module, kernel: Array, bias: Array | None) -> Iterator[None]:
    """Has a layer hold another kernel, and a bias of zero, for the time of a call.

    Not a copy of the layer: interceptors that a user has set would see a second call.
    """
    params = (
        {"kernel": kernel} if bias is None else {"kernel": kernel, "bias": jnp.zeros_like(bias)}
    )
    own: Any = module.scope
    other = Scope({"params": params}, name=own.name, path=own.path)
    object.__setattr__(module, "scope", other)  # modules are frozen; Flax binds them likewise
    try:
        yield
    finally:
        object.__setattr__(module, "scope", own)


def _parameter(module: nn.Module, name: str) -> Any:
    """A parameter of a module itself, its box opened; None if it has none of that name."""
    if module.scope is None or not module.has_variable("params", name):
        return None
    leaves = flatten(module.get_variable("params", name))[0]
    return leaves[0].value if len(leaves) == 1 else None
