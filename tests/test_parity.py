"""With one vector, jsn follows the trajectories of torch's and of Flax's spectral normalization.

Same weights, same `u`, same data, 25 steps of SGD: the weights stay equal to 1e-4. Torch's newer
parametrization takes its power step from `v`, not from `u`, so its sigma is half a step ahead:
equal to 1e-3 where half a step changes little, or where jsn takes its step before it reads sigma.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_reference
from flax import nnx
from jax import lax

import jsn
from jsn import interop

N_STEPS, LEARNING_RATE = 25, 0.1


@pytest.fixture(scope="module")
def torch():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    torch.set_num_threads(1)
    return torch


class Task(NamedTuple):
    """One layer, and what it is trained on: least squares."""

    x: np.ndarray
    y: np.ndarray
    apply: object
    """The layer in JAX, on torch's layout."""


KINDS = ("Linear", "Conv2d")


def make_task(kind: str) -> Task:
    rng = np.random.default_rng(0)

    def data(*shape):
        return rng.standard_normal((N_STEPS, *shape)).astype(np.float32)

    if kind == "Linear":

        def linear(params, x):
            return x @ params["weight"].T + params["bias"].reshape(1, -1)

        return Task(data(16, 12), data(16, 20), linear)

    def conv(params, x):
        dims = ("NCHW", "OIHW", "NCHW")
        y = lax.conv_general_dilated(x, params["weight"], (1, 1), "VALID", dimension_numbers=dims)
        return y + params["bias"].reshape(1, -1, 1, 1)

    return Task(data(8, 4, 6, 6), data(8, 10, 4, 4), conv)


@pytest.fixture(scope="module", params=KINDS)
def task(request):
    return request.param, make_task(request.param)


def step_then_read(params, state):
    """The order of torch's newer parametrization: first the power step, then sigma."""
    _, state = jsn.normalize(lax.stop_gradient(params), state)
    return jsn.normalize(params, state, n_steps=0)


def trained_in_jax(task: Task, params, state, rate=LEARNING_RATE, normalize=jsn.normalize):
    """The weights after each step of SGD on weights normalized by jsn."""

    def step(carry, batch):
        params, state = carry
        x, y = batch

        def loss(params):
            normalized, new = normalize(params, state)
            return jnp.mean((task.apply(normalized, x) - y) ** 2), new

        grads, state = jax.grad(loss, has_aux=True)(params)
        params = jax.tree.map(lambda p, g: p - rate * g, params, grads)
        return (params, state), params

    data = (jnp.asarray(task.x), jnp.asarray(task.y))
    return jax.jit(lambda carry: lax.scan(step, carry, data))((params, state))


def trained_in_torch(torch, layer, task: Task, raw: str, rate=LEARNING_RATE):
    optimizer = torch.optim.SGD(layer.parameters(), rate)
    weights = []
    for x, y in zip(task.x, task.y, strict=True):
        optimizer.zero_grad()
        ((layer(torch.tensor(x)) - torch.tensor(y)) ** 2).mean().backward()
        optimizer.step()
        weights.append(layer.state_dict()[raw].numpy().copy())
    return np.stack(weights)


def worst(found, expected) -> float:
    """The largest relative error over the trajectory."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    axes = tuple(range(1, found.ndim))
    return float((abs(found - expected).max(axes) / abs(expected).max(axes)).max())


def torch_layer(torch, kind: str, wrap):
    torch.manual_seed(0)
    layer = torch.nn.Linear(12, 20) if kind == "Linear" else torch.nn.Conv2d(4, 10, 3)
    return wrap(layer)


def settle(layer):
    """A power step for each access, until half a step changes little."""
    for _ in range(300):
        layer.weight  # noqa: B018


@pytest.mark.parametrize(("api", "tolerance"), [("hooks", 1e-4), ("parametrizations", 1e-3)])
def test_25_steps_are_those_recorded_of_torch(task, api, tolerance):
    """Runs without torch; `torch_reference.py` wrote what is compared with."""
    kind, task = task
    params, state = interop.from_torch(torch_reference.read(f"{kind}/{api}/start/"))
    expected = torch_reference.read(f"{kind}/{api}/")["weights"]
    _, found = trained_in_jax(task, params, state, torch_reference.RATES[api])
    assert worst(expected[-1:], np.asarray(params["weight"])[None]) > 0.05, "hardly moved"
    assert worst(found["weight"][torch_reference.STEPS], expected) < tolerance


def test_25_steps_equal_those_of_torch(torch, task):
    kind, task = task
    layer = torch_layer(torch, kind, torch.nn.utils.spectral_norm)
    params, state = interop.from_torch(layer.state_dict())
    expected = trained_in_torch(torch, layer, task, "weight_orig")
    (_, state), found = trained_in_jax(task, params, state)
    assert worst(expected[-1:], np.asarray(params["weight"])[None]) > 0.05, "hardly moved"
    assert worst(found["weight"], expected) < 1e-4
    assert abs(np.asarray(state.u["weight"][0]) - layer.weight_u.numpy()).max() < 1e-4


def test_25_steps_follow_those_of_torchs_parametrization(torch, task):
    kind, task = task
    layer = torch_layer(torch, kind, torch.nn.utils.parametrizations.spectral_norm)
    settle(layer)
    params, state = interop.from_torch(layer.state_dict())
    raw = "parametrizations.weight.original"
    expected = trained_in_torch(torch, layer, task, raw, rate=0.03)
    _, found = trained_in_jax(task, params, state, rate=0.03)
    assert worst(expected[-1:], np.asarray(params["weight"])[None]) > 0.05
    assert worst(found["weight"], expected) < 1e-3


def test_25_steps_in_the_order_of_torchs_parametrization(torch, task):
    kind, task = task
    layer = torch_layer(torch, kind, torch.nn.utils.parametrizations.spectral_norm)
    params, state = interop.from_torch(layer.state_dict())
    raw = "parametrizations.weight.original"
    expected = trained_in_torch(torch, layer, task, raw, rate=0.03)
    _, found = trained_in_jax(task, params, state, rate=0.03, normalize=step_then_read)
    assert worst(expected[-1:], np.asarray(params["weight"])[None]) > 0.05
    assert worst(found["weight"], expected) < 1e-3


# --- Flax ----------------------------------------------------------------------------------------


def flax_task(kind: str, task: Task):
    """The same data in Flax's layout, and a layer for it."""
    if kind == "Linear":
        return task.x, task.y, functools.partial(nn.Dense, 20)
    x, y = (np.moveaxis(data, 2, -1) for data in (task.x, task.y))
    return x, y, functools.partial(nn.Conv, 10, (3, 3), padding="VALID")


def sgd(loss, params, *args):
    grads, new = jax.grad(loss, has_aux=True)(params, *args)
    return jax.tree.map(lambda p, g: p - LEARNING_RATE * g, params, grads), new


def test_25_steps_equal_those_of_flax_linen(task):
    x, y, make = flax_task(*task)
    flax_layer, plain = nn.SpectralNorm(make()), make()
    init = jax.jit(functools.partial(flax_layer.init, update_stats=False))
    variables = init(jax.random.key(0), x[0])
    params, stats = variables["params"], variables["batch_stats"]
    state = interop.from_flax_linen(params, stats)

    def flax_loss(params, stats, x, y):
        variables = {"params": params, "batch_stats": stats}
        out, new = flax_layer.apply(variables, x, update_stats=True, mutable=["batch_stats"])
        return jnp.mean((out - y) ** 2), new["batch_stats"]

    def loss(params, state, x, y):
        normalized, state = jsn.normalize(params, state)
        out = plain.apply({"params": normalized["layer_instance"]}, x)
        return jnp.mean((out - y) ** 2), state

    def step(carry, batch):
        theirs, ours = carry
        carry = sgd(flax_loss, *theirs, *batch), sgd(loss, *ours, *batch)
        return carry, [params["layer_instance"]["kernel"] for params, _ in carry]

    start = ((params, stats), (params, state))
    ((_, stats), (_, state)), (expected, found) = jax.jit(lambda c: lax.scan(step, c, (x, y)))(
        start
    )
    kernel = np.asarray(params["layer_instance"]["kernel"])
    assert worst(expected[-1:], kernel[None]) > 0.05, "hardly moved"
    assert worst(found, expected) < 1e-4
    u = state.u["layer_instance"]["kernel"]
    assert abs(u - stats["layer_instance/kernel/u"]).max() < 1e-4


@pytest.mark.skipif(
    not hasattr(nnx, "SpectralNorm"), reason="this Flax has no nnx.SpectralNorm yet"
)
def test_25_steps_equal_those_of_flax_nnx():
    """nnx.SpectralNorm writes the normalized weight over the raw one, so here jsn does as well."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((N_STEPS, 16, 12)).astype(np.float32)
    y = rng.standard_normal((N_STEPS, 16, 20)).astype(np.float32)
    layer = nnx.SpectralNorm(nnx.Linear(12, 20, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1))
    params, state = interop.from_flax_nnx(layer)
    params = nnx.to_pure_dict(params)

    @nnx.jit
    def flax_step(layer, x, y):
        grads = nnx.grad(lambda layer: jnp.mean((layer(x) - y) ** 2))(layer)
        params = nnx.state(layer, nnx.Param)
        nnx.update(layer, jax.tree.map(lambda p, g: p - LEARNING_RATE * g, params, grads))

    @jax.jit
    def step(params, state, x, y):
        def loss(params):
            params, new = jsn.normalize(params, state)
            out = x @ params["kernel"] + params["bias"].reshape(1, -1)
            return jnp.mean((out - y) ** 2), (params, new)

        grads, (params, new) = jax.grad(loss, has_aux=True)(params)
        return jax.tree.map(lambda p, g: p - LEARNING_RATE * g, params, grads), new

    for batch in zip(x, y, strict=True):
        flax_step(layer, *batch)
        params, state = step(params, state, *batch)
        expected = layer.layer_instance.kernel[...]
        assert worst(params["kernel"][None], expected[None]) < 1e-4
