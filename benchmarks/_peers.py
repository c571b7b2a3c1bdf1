"""The other libraries, each called as its documentation says; all of them optional.

In: raw weights. Out: contenders. A library that is not installed raises `ModuleNotFoundError`
when its contender starts.
"""

from __future__ import annotations

import os
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks._cases import Weights
from benchmarks._contenders import Contender, Jax, PyTree, restacked


def flax_nnx() -> Contender:
    """`flax.nnx.SpectralNorm` around each layer, as a function of its split state."""
    from flax import nnx

    class Kernel(nnx.Module):
        def __init__(self, shape: tuple[int, ...]):
            self.kernel = nnx.Param(jnp.zeros(shape))

        def __call__(self, x: None) -> jax.Array:
            return self.kernel[...]

    class Model(nnx.Module):
        def __init__(self, params: PyTree):
            rngs = nnx.Rngs(0)
            wrap = lambda leaf: nnx.SpectralNorm(Kernel(leaf["kernel"].shape), rngs=rngs)
            self.layers = nnx.data({name: wrap(leaf) for name, leaf in params.items()})

    parts = {}

    def init(params: PyTree) -> PyTree:
        parts["graph"], parts["params"], rest = nnx.split(Model(params), nnx.Param, ...)
        return rest

    def normalize(params: PyTree, state: PyTree) -> tuple[PyTree, PyTree]:
        names = sorted(params)  # as nnx orders a dictionary
        leaves = [params[name]["kernel"] for name in names]
        raw = jax.tree.unflatten(jax.tree.structure(parts["params"]), leaves)
        model = nnx.merge(parts["graph"], raw, state)
        out = {name: {"kernel": model.layers[name](None)} for name in names}
        return out, nnx.split(model, nnx.Param, ...)[2]

    return Jax(init, normalize)


def haiku() -> Contender:
    """`haiku.SNParamsTree` on the parameters."""

    def pair() -> Any:
        import haiku as hk

        return hk.transform_with_state(lambda tree: hk.SNParamsTree()(tree))

    @jax.jit
    def init(params: PyTree) -> PyTree:
        return pair().init(jax.random.key(0), params)[1]

    def normalize(params: PyTree, state: PyTree) -> tuple[PyTree, PyTree]:
        out, state = pair().apply({}, state, None, params)
        return {name: dict(entry) for name, entry in out.items()}, state

    return Jax(init, normalize)


def equinox() -> Contender:
    """`equinox.nn.SpectralNorm` around each layer."""
    parts = {}

    def init(params: PyTree) -> PyTree:
        import equinox as eqx

        class Kernel(eqx.Module):
            weight: jax.Array

            def __call__(self, x: None) -> jax.Array:
                return self.weight

        def make() -> dict[str, Any]:
            keys = iter(jax.random.split(jax.random.key(0), len(params)))
            return {
                name: eqx.nn.SpectralNorm(Kernel(leaf["kernel"]), "weight", key=next(keys))
                for name, leaf in params.items()
            }

        parts["layers"], state = eqx.nn.make_with_state(make)()
        return state

    def normalize(params: PyTree, state: Any) -> tuple[PyTree, PyTree]:
        import equinox as eqx

        out = {}
        for name, layer in parts["layers"].items():
            layer = eqx.tree_at(lambda x: x.layer.weight, layer, params[name]["kernel"])
            weight, state = layer(None, state)
            out[name] = {"kernel": weight}
        return out, state

    return Jax(init, normalize, "separate", outputs_first=True)


def keras() -> Contender:
    """`keras.layers.SpectralNormalization` around each layer, on the JAX backend."""
    parts = {}

    def init(params: PyTree) -> PyTree:
        os.environ["KERAS_BACKEND"] = "jax"
        import keras  # type: ignore

        class Kernel(keras.layers.Layer):  # type: ignore
            def __init__(self, shape: tuple[int, ...]):
                super().__init__()
                self.shape_of_kernel = shape

            def build(self, input_shape: Any) -> None:
                self.kernel = self.add_weight(shape=self.shape_of_kernel, name="kernel")

            def call(self, inputs: Any) -> Any:
                return keras.ops.convert_to_tensor(self.kernel)

        layers = {}
        for name, leaf in params.items():
            layers[name] = keras.layers.SpectralNormalization(Kernel(leaf["kernel"].shape))
            layers[name].build((1, leaf["kernel"].shape[-1]))
        parts["layers"] = layers
        return {name: [v.value for v in x.non_trainable_variables] for name, x in layers.items()}

    def normalize(params: PyTree, state: PyTree) -> tuple[PyTree, PyTree]:
        out, new = {}, {}
        for name, layer in parts["layers"].items():
            kernel = params[name]["kernel"]
            x = jnp.ones((1, kernel.shape[-1]))
            weight, new[name] = layer.stateless_call([kernel], state[name], x, training=True)
            out[name] = {"kernel": weight}
        return out, new

    return Jax(init, normalize, "separate")


class Torch(Contender):
    """`torch.nn.utils.parametrizations.spectral_norm` on each weight, with one thread.

    Args:
        compiled: Read all weights in one function under `torch.compile`.
    """

    def __init__(self, compiled: bool):
        self.compiled = compiled

    def start(self, weights: Weights, stacked: bool) -> None:
        # A store from an earlier run would hide what compiling takes.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="inductor-")
        os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
        import torch

        torch.set_num_threads(1)
        self.torch, self.stacked = torch, stacked
        begin = time.perf_counter()
        arrays = self._arrays(weights)
        self.modules = []
        for W in arrays:
            module = torch.nn.Module()
            module.weight = torch.nn.Parameter(W)
            torch.nn.utils.parametrizations.spectral_norm(module)
            self.modules.append(module)
        self.names = list(self._separate(weights))
        self.facts = {"init_s": round(time.perf_counter() - begin, 3)}
        read = lambda: [module.weight for module in self.modules]
        self.read = torch.compile(read) if self.compiled else read
        begin = time.perf_counter()
        self.step()
        if self.compiled:
            self.facts["compile_s"] = round(time.perf_counter() - begin, 3)

    def _separate(self, weights: Weights) -> Weights:
        if not self.stacked:
            return weights
        return {f"{name}_{i:03d}": W[i] for name, W in weights.items() for i in range(len(W))}

    def _arrays(self, weights: Weights) -> list[Any]:
        """Copies, with the outputs first."""
        separate = self._separate(weights).values()
        first = (np.array(np.moveaxis(W, -1, 0), order="C") for W in separate)
        return [self.torch.from_numpy(W) for W in first]

    def load(self, weights: Weights) -> None:
        with self.torch.no_grad():
            for module, W in zip(self.modules, self._arrays(weights), strict=True):
                module.parametrizations.weight.original.copy_(W)

    def step(self) -> None:
        with self.torch.no_grad():
            self.read()

    def handed(self) -> Weights:
        with self.torch.no_grad():
            arrays = [W.numpy() for W in self.read()]
        named = zip(self.names, arrays, strict=True)
        out = {name: np.moveaxis(W, 0, -1) for name, W in named}
        return restacked(out) if self.stacked else out


PEERS = {
    "Flax NNX": flax_nnx,
    "Haiku": haiku,
    "Equinox": equinox,
    "Keras, JAX backend": keras,
    "PyTorch": lambda: Torch(False),
    "PyTorch, torch.compile": lambda: Torch(True),
}
