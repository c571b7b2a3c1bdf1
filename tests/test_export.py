"""The training step compiles for accelerators that are not here, and means the same as here."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from matrices import gaussian

import jsn

RULES = [("conv", jsn.Conv((6, 6, 3))), ("stack", jsn.Matrix(batch_axis=0)), ("", jsn.Matrix())]
OPTIMIZER = optax.sgd(1e-2, momentum=0.9)


def weights():
    shapes = {"conv": (3, 3, 3, 4), "stack": (2, 16, 16), "head": (16, 8)}
    params = {name: jnp.asarray(gaussian(1, *shape)) for name, shape in shapes.items()}
    return {**params, "head": params["head"].astype(jnp.bfloat16)}


def loss(params, state):
    params, state = jsn.normalize(params, state)
    return sum(jnp.sum(jnp.sin(x.astype(jnp.float32))) for x in params.values()), state


def step(params, state, opt_state):
    grads, state = jax.grad(loss, has_aux=True)(params, state)
    updates, opt_state = OPTIMIZER.update(grads, opt_state)
    return optax.apply_updates(params, updates), state, opt_state


@functools.cache
def arguments():
    params = weights()
    state = jsn.init(params, rules=RULES, block_size=4, warmup=1)
    return params, state, OPTIMIZER.init(params)


def plain(params, u, opt_state):
    """The step with the blocks alone in place of the state: its operators are static."""
    state = jsn.SNState(u, arguments()[1].operators)
    params, state, opt_state = step(params, state, opt_state)
    return params, state.u, opt_state


def plain_arguments():
    params, state, opt_state = arguments()
    return params, state.u, opt_state


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_a_training_step_is_exported(platform):
    exported = export.export(jax.jit(plain), platforms=[platform])(*plain_arguments())
    assert exported.platforms == (platform,)
    text = exported.mlir_module()
    assert "lapack" not in text
    names = ("stablehlo.dot_general", "stablehlo.convolution")
    products = [line for line in text.splitlines() if any(name in line for name in names)]
    assert products
    assert all("HIGHEST" in line for line in products)


def test_an_export_for_all_platforms_computes_the_same():
    arguments = plain_arguments()
    exported = export.export(jax.jit(plain), platforms=["cpu", "cuda", "tpu"])(*arguments)
    found, expected = jax.jit(exported.call)(*arguments), jax.jit(plain)(*arguments)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.allclose(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_a_sharded_step_is_exported_for_as_many_devices(platform):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    sharding = NamedSharding(mesh, P("data", "model"))
    params = jax.ShapeDtypeStruct((32, 16), jnp.float32, sharding=sharding)
    state = jax.eval_shape(functools.partial(jsn.init, block_size=4), {"kernel": params})
    places = jsn.state_sharding({"kernel": sharding}, {"kernel": params}, state)

    def normalize(params, u):
        params, after = jsn.normalize(params, jsn.SNState(u, state.operators))
        return params, after.u

    where = ({"kernel": sharding}, places.u)
    compiled = jax.jit(normalize, in_shardings=where, out_shardings=where)
    exported = export.export(compiled, platforms=[platform])({"kernel": params}, state.u)
    assert exported.nr_devices == 8
