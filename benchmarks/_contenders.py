"""Who normalizes: every library behind one face, so that the clock cannot tell them apart.

In: raw weights as numpy arrays. Out: what the library hands to the model. Here are jsn, the floor
and Flax linen; `_peers` has the others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jsn
from benchmarks import _clock
from benchmarks._cases import Weights
from jsn._operator import rmatvec
from jsn._power import Tracked, _gram, _mix, _mix_images, _on_domain

PyTree = Any


class Contender:
    """A library with one set of weights: `start`, then `load` and `step` in turns.

    Attributes:
        facts: Seconds of `init` and `compile`, and what the compiler says.
    """

    facts: _clock.Row

    def start(self, weights: Weights, stacked: bool) -> None:
        """Makes the state, and compiles."""
        raise NotImplementedError

    def load(self, weights: Weights) -> None:
        """Takes new raw weights, outside the clock."""
        raise NotImplementedError

    def step(self) -> None:
        """Normalizes once and keeps the next state; returns when it is done."""
        raise NotImplementedError

    def handed(self) -> Weights:
        """Normalizes once, and hands out what the model would get."""
        raise NotImplementedError


class Jax(Contender):
    """Two functions of JAX: `init(params) -> state`, `normalize(params, state)`, which is jitted.

    Args:
        init: Takes `{name: {"kernel": array}}`.
        normalize: Returns normalized parameters and the next state.
        layers: What to do with stacked layers: they are "native" to the library, run one after
            the other in a "map", as in `nn.scan`, or are "separate" weights.
        outputs_first: The library wants kernels transposed.
    """

    def __init__(
        self,
        init: Callable[[PyTree], PyTree],
        normalize: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]],
        layers: str = "map",
        outputs_first: bool = False,
    ):
        self.init, self.normalize, self.layers = init, normalize, layers
        self.outputs_first = outputs_first

    def start(self, weights: Weights, stacked: bool) -> None:
        self.separate = stacked and self.layers == "separate"
        self.load(weights)
        mapped = stacked and self.layers == "map"
        begin = time.perf_counter()
        self.state = jax.block_until_ready(
            _init_each(self.init, self.params) if mapped else self.init(self.params)
        )
        self.facts = {"init_s": round(time.perf_counter() - begin, 3)}
        function = self.normalize
        if mapped:
            function = lambda params, state: lax.map(
                lambda layer: self.normalize(*layer), (params, state)
            )
        self.call, seconds = _clock.compile_timed(function, self.params, self.state)
        self.facts |= {"compile_s": round(seconds, 3), **_clock.analysis(self.call)}

    def load(self, weights: Weights) -> None:
        if self.separate:
            weights = {
                f"{name}_{i:03d}": W[i] for name, W in weights.items() for i in range(len(W))
            }
        if self.outputs_first:
            weights = {name: np.moveaxis(W, -1, 0) for name, W in weights.items()}
        self.params = {name: {"kernel": jnp.array(W)} for name, W in weights.items()}

    def step(self) -> None:
        out, self.state = jax.block_until_ready(self.call(self.params, self.state))
        del out

    def handed(self) -> Weights:
        out, self.state = self.call(self.params, self.state)
        arrays = {name: np.asarray(entry["kernel"]) for name, entry in out.items()}
        if self.outputs_first:
            arrays = {name: np.moveaxis(W, 0, -1) for name, W in arrays.items()}
        return restacked(arrays) if self.separate else arrays


def _init_each(init: Callable[[PyTree], PyTree], params: PyTree) -> PyTree:
    """The states of all layers, stacked."""
    n_layers = len(jax.tree.leaves(params)[0])
    states = [init(jax.tree.map(lambda x, i=i: x[i], params)) for i in range(n_layers)]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)


def restacked(arrays: Mapping[str, np.ndarray]) -> Weights:
    """Undoes `name_000`, `name_001`, ...: back to one stack for each name."""
    stacks: dict[str, list[np.ndarray]] = {}
    for name, W in arrays.items():
        stacks.setdefault(name.rpartition("_")[0], []).append(W)
    return {name: np.stack(layers) for name, layers in stacks.items()}


def copy() -> Contender:
    """The floor: every weight is read once and written once."""
    return Jax(lambda params: (), lambda params, state: (jax.tree.map(jnp.copy, params), state))


def nothing() -> Contender:
    """No normalization: the weights go to the model as they are."""
    return Jax(lambda params: (), lambda params, state: (params, state), "native")


def products(**options: Any) -> Contender:
    """The floor of a block: both products with each weight and its scaling, no more."""
    return _floor(lambda weight: both_products(weight)[1], options)


def tracking(**options: Any) -> Contender:
    """The floor of a block that tracks a subspace: also what mixes and orthonormalizes vectors.

    Beside both products a Gram matrix of the block on each side, the combinations that go into the
    second product, and those that make the next block. What finds coefficients is left out.
    """

    def next_block(weight: Tracked) -> jax.Array:
        n_batch, new = len(weight.batch), weight.n_leading
        v = rmatvec(weight.operator, weight.W, weight.u)
        rows = lax.slice_in_dim(_gram(v.x, n_batch, v.last), 0, new, axis=n_batch)
        y = weight.operator.matvec(weight.W, _mix_images(weight, rows, v))
        kept = lax.slice_in_dim(weight.u, 0, weight.block - new, axis=n_batch)
        block = jnp.concatenate([kept, y], axis=n_batch)
        return _mix(_gram(block, n_batch), block)

    return _floor(next_block, options)


def _floor(read: Callable[[Tracked], jax.Array], options: Mapping[str, Any]) -> Contender:
    """Scales each weight by a constant, and does what a block has to do with it."""

    def init(params: PyTree) -> PyTree:
        return jsn.init(params, rules=_RULES, **options).u

    def normalize(params: PyTree, us: PyTree) -> tuple[PyTree, PyTree]:
        out = {}
        for name, entry in params.items():
            W, u = entry["kernel"], us[name]["kernel"]
            out[name] = {"kernel": 0.5 * W, "read": read(Tracked(_operator(W), W, u))}
        return out, us

    return Jax(init, normalize, "native")


def both_products(weight: Tracked) -> tuple[jax.Array, jax.Array]:
    """Leading vectors on the input side, and their images: what a block reads a weight for."""
    v, last = rmatvec(weight.operator, weight.W, weight.u)
    n_batch = len(weight.batch)
    axis = v.ndim - 1 if last else n_batch
    v = jnp.moveaxis(lax.slice_in_dim(v, 0, weight.n_leading, axis=axis), axis, n_batch)
    v = _on_domain(weight, v)
    return v, weight.operator.matvec(weight.W, v)


def ours(n_steps: int = 1, **options: Any) -> Contender:
    """`jsn.init` and `jsn.normalize`; layers that are stacked are a batch axis."""

    def init(params: PyTree) -> PyTree:
        return jsn.init(params, rules=_RULES, **options)

    return Jax(init, lambda params, state: jsn.normalize(params, state, n_steps=n_steps), "native")


def _operator(leaf: Any) -> jsn.Matrix:
    return jsn.Matrix(batch_axis=0) if leaf.ndim == 3 else jsn.Matrix()


_RULES = [("kernel$", _operator)]


class Kernel(nn.Module):
    """A layer without arithmetic of its own."""

    shape: tuple[int, ...]

    @nn.compact
    def __call__(self) -> jax.Array:
        return self.param("kernel", nn.initializers.zeros, self.shape)


class Wrapped(nn.Module):
    """Flax's wrapper around each layer of a network."""

    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    n_steps: int = 1

    @nn.compact
    def __call__(self, train: bool) -> PyTree:
        return {
            name: {
                "kernel": nn.SpectralNorm(Kernel(shape, name=name), n_steps=self.n_steps)(
                    update_stats=train
                )
            }
            for name, shape in self.shapes
        }


def flax_linen(n_steps: int = 1) -> Contender:
    """`flax.linen.SpectralNorm`, called as it is."""

    def wrapped(params: PyTree) -> Wrapped:
        return Wrapped(tuple((name, x["kernel"].shape) for name, x in params.items()), n_steps)

    @jax.jit
    def init(params: PyTree) -> PyTree:
        return wrapped(params).init(jax.random.key(0), train=False)["batch_stats"]

    def normalize(params: PyTree, state: PyTree) -> tuple[PyTree, PyTree]:
        variables = {"params": params, "batch_stats": state}
        model = wrapped(params)
        out, updates = model.apply(variables, train=True, mutable="batch_stats")  # type: ignore
        return out, updates["batch_stats"]

    return Jax(init, normalize)
