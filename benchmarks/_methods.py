"""How weights are normalized: jsn in all forms of its block step, and Flax's own wrapper.

In: raw parameters. Out: normalized parameters and the next state, in one call for all methods, so
that the tasks and the clock cannot tell them apart.

    lobpcg     what jsn ships: Ritz vectors, their residuals, previous directions (`_block.shares`)
    thirds     the same, as many of one kind as of the other, whatever the size of the block
    subspace   plain subspace iteration, the next block is `A A^T u`: `is_subspace` says always
    flax       `flax.linen.SpectralNorm`, around a layer that only hands out its kernel
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import flax.linen as nn
import jax
from flax import traverse_util

import jsn
from jsn import _block, _power

PyTree = Any


class Method(NamedTuple):
    """A form, and its size: tracked vectors (jsn), or power steps for each call (Flax)."""

    form: str
    size: int

    def init(self, params: PyTree, seed: int) -> PyTree:
        """The state of a method for raw parameters."""
        if self.form != "flax":
            return jsn.init(params, block_size=self.size)
        keys = iter(jax.random.split(jax.random.key(seed), len(_kernels(params))))
        return {
            path: _wrapper(kernel.shape, self.size).init(next(keys), update_stats=False)[
                "batch_stats"
            ]
            for path, kernel in _kernels(params).items()
        }

    def normalize(self, params: PyTree, state: PyTree) -> tuple[PyTree, PyTree]:
        """Normalized parameters, and the next state."""
        if self.form != "flax":
            return jsn.normalize(params, state)
        normalized, new = traverse_util.flatten_dict(params, sep="/"), {}
        for path, kernel in _kernels(params).items():
            variables = {"params": {"layer_instance": {"kernel": kernel}}}
            normalized[path], updates = _wrapper(kernel.shape, self.size).apply(
                {**variables, "batch_stats": state[path]}, update_stats=True, mutable="batch_stats"
            )
            new[path] = updates["batch_stats"]
        return traverse_util.unflatten_dict(normalized, sep="/"), new


class _Kernel(nn.Module):
    """A layer without arithmetic of its own."""

    shape: tuple[int, ...]

    @nn.compact
    def __call__(self) -> jax.Array:
        return self.param("kernel", nn.initializers.zeros, self.shape)


def _wrapper(shape: tuple[int, ...], n_steps: int) -> nn.SpectralNorm:
    return nn.SpectralNorm(_Kernel(shape), n_steps=n_steps)


def _kernels(params: PyTree) -> dict[str, jax.Array]:
    flat = traverse_util.flatten_dict(params, sep="/")
    return {path: leaf for path, leaf in flat.items() if leaf.ndim > 1}


@contextlib.contextmanager
def form_of(method: Method) -> Iterator[None]:
    """Makes jsn's block step that of the method, for whatever is traced within."""
    forms = {
        "subspace": mock.patch.object(_power, "is_subspace", return_value=True),
        "thirds": mock.patch.object(_block, "_DIRECTIONS", method.size),
    }
    jax.clear_caches()  # what jsn has traced in another form would be taken again
    with forms.get(method.form, contextlib.nullcontext()):
        yield
    jax.clear_caches()
