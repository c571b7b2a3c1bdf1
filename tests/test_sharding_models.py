"""Sharded models: Flax's metadata, convolutions, shard_map and replicas."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from matrices import gaussian

import jsn
from benchmarks import _hlo as hlo

pytestmark = pytest.mark.usefixtures("together")

X = jnp.ones((4, 8))


def mesh_of(kind, shape=(4, 2), names=("data", "model")):
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(names))


def partitioned(*names):
    return nn.with_partitioning(nn.initializers.lecun_normal(), names)


class Stack(nn.Module):
    """A dense layer that says where it lives, and two more under nn.scan."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8, kernel_init=partitioned("data", "model"), name="first")(x)
        layers = nn.scan(
            Layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=2,
            metadata_params={nn.PARTITION_NAME: None},
        )
        return layers(name="layers")(x, None)[0]


class Layer(nn.Module):
    """A layer of the scan."""

    @nn.compact
    def __call__(self, x, _):
        return nn.Dense(8, kernel_init=partitioned("model", "data"))(x), None


def specs(state):
    """The spec of each block, by path."""
    flat = jax.tree_util.tree_flatten_with_path(state.u)[0]
    return {"/".join(str(key.key) for key in keys): tuple(x.spec) for keys, x in flat}


def test_partitioned_metadata_carries_over_to_state_and_checkpoint_specs():
    """The decorated model is initialized under jit, with every array where its names say."""
    mesh = mesh_of(AxisType.Auto)
    model = jsn.linen.spectral_norm(Stack, block_size=4, warmup=1)()
    abstract = jax.eval_shape(model.init, jax.random.key(0), X)
    sharding = nn.get_sharding(abstract, mesh)
    sharding["sn_state"] = jsn.state_sharding(
        sharding["params"], abstract["params"], abstract["sn_state"]
    )
    (state,) = jax.tree.leaves(
        sharding["sn_state"], is_leaf=lambda node: isinstance(node, jsn.SNState)
    )
    assert specs(state) == {
        "first/kernel": (None, "model"),
        "layers/Dense_0/kernel": (None, None, "data"),
    }
    variables = jax.jit(model.init, out_shardings=sharding)(jax.random.key(0), X)
    alone = jax.jit(model.init)(jax.random.key(0), X)
    params = nn.unbox(variables["params"])
    assert tuple(params["layers"]["Dense_0"]["kernel"].sharding.spec) == (None, "model", "data")
    assert isinstance(variables["params"]["first"]["kernel"], nn.Partitioned)
    assert variables["params"]["first"]["kernel"].names == ("data", "model")
    for here, there in zip(
        jax.tree.leaves(variables["sn_state"]), jax.tree.leaves(sharding["sn_state"]), strict=True
    ):
        assert here.sharding.is_equivalent_to(there, here.ndim)
    apply = jax.jit(functools.partial(model.apply, mutable=["sn_state"]))
    expected, _ = apply(alone, X)
    with jax.set_mesh(mesh):
        y, _ = apply(variables, X)
    assert np.allclose(y, expected, rtol=1e-5, atol=1e-6)


def test_logical_names_carry_over():
    mesh = mesh_of(AxisType.Auto)
    kernel = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))
    model = nn.Dense(16, kernel_init=kernel)
    abstract = jax.eval_shape(model.init, jax.random.key(0), X)
    named = nn.get_partition_spec(abstract)
    rules = (("embed", "data"), ("mlp", "model"))
    sharding = nn.logical_to_mesh_sharding(named, mesh, rules)
    state = jax.eval_shape(jsn.init, abstract["params"])
    found = jsn.state_sharding(sharding["params"], abstract["params"], state)
    assert specs(found) == {"kernel": (None, "model")}


def test_nnx_metadata_carries_over():
    mesh = mesh_of(AxisType.Auto)
    kernel = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("data", "model"))
    with jax.set_mesh(mesh):
        linear = nnx.Linear(8, 16, kernel_init=kernel, rngs=nnx.Rngs(0))
        wrapper = jsn.nnx.spectral_norm(linear, block_size=4, warmup=1)
    params, state = nnx.state(linear, nnx.Param), jsn.nnx.sn_state(wrapper)
    found = jsn.state_sharding(nnx.get_named_sharding(params, mesh), params, state)
    assert specs(found) == {"kernel": (None, "model")}
    metadata = nnx.state(jsn.nnx.normalize(wrapper), nnx.Param)["kernel"].get_metadata()
    original = params["kernel"].get_metadata()
    assert metadata == original
    assert ("data", "model") in original.values()


# --- convolutions ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_a_convolution_keeps_its_channels_where_they_are(kind):
    rules = [("kernel", jsn.Conv((6, 6, 8)))]
    init = jax.jit(functools.partial(jsn.init, rules=rules, block_size=3, warmup=2))
    alone = {"kernel": jnp.asarray(gaussian(0, 3, 3, 8, 8))}
    expected, _ = jax.jit(jsn.normalize)(alone, init(alone))
    mesh = mesh_of(kind)
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, P(None, None, "data", "model"))
        params = jax.device_put(alone, sharding)
        state = init(params)
        compiled = jax.jit(jsn.normalize).lower(params, state).compile()
        normalized, following = compiled(params, state)
    assert normalized["kernel"].sharding.is_equivalent_to(sharding, 4)
    assert following.u["kernel"].sharding.is_equivalent_to(state.u["kernel"].sharding, 5)
    assert np.allclose(normalized["kernel"], expected["kernel"], rtol=1e-5, atol=1e-6)
    image = 3 * 6 * 6 * 8 * 4  # one block of images
    found = hlo.collectives(compiled.as_text())
    assert {collective.kind for collective in found} == {"all-reduce"}
    assert max(max(collective.sizes) for collective in found) <= image
    for name in ("data", "model"):
        sent = sum(sum(c.sizes) for c in found if name in c.axes(mesh))
        assert 0 < sent <= 2 * 2 * image


# --- replicas -------------------------------------------------------------------------------


def weights():
    return {"a": {"kernel": jnp.asarray(gaussian(1, 8, 12))}, "b": {"kernel": jnp.eye(12)[:, :8]}}


def loss(params, state, x):
    params, state = jsn.normalize(params, state)
    y = jnp.tanh(x @ params["a"]["kernel"]) @ params["b"]["kernel"]
    return (y**2).mean(), state


def gradient(params, state, x, axis=None):
    """One step of data parallelism: each replica takes its own power step, all take the same."""
    (value, state), grads = jax.value_and_grad(loss, has_aux=True)(params, state, x)
    if axis is not None:
        value, grads = jax.lax.pmean((value, grads), axis)
    return value, grads, state


def agree(found, expected):
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.allclose(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_shard_map_on_replicated_parameters(kind):
    params, x = weights(), jnp.asarray(gaussian(2, 16, 8))
    state = jsn.init(params, block_size=4, warmup=1)
    expected = jax.jit(gradient)(params, state, x)
    mesh = mesh_of(kind, (8,), ("data",))
    step = jax.shard_map(
        lambda params, state, x: jax.lax.pmean(loss(params, state, x)[0], "data"),
        mesh=mesh,
        in_specs=(P(), P(), P("data")),
        out_specs=P(),
    )
    with jax.set_mesh(mesh):
        params, state = jax.device_put((params, state), NamedSharding(mesh, P()))
        x = jax.device_put(x, NamedSharding(mesh, P("data")))
        value, grads = jax.jit(jax.value_and_grad(step))(params, state, x)
    agree((value, grads), expected[:2])


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_shard_map_on_a_network_for_each_device(kind):
    """Weights of one shape that lie together, and differ from device to device."""
    stack = lambda seed: jnp.asarray(gaussian(seed, 8, 20, 12))
    params = {name: {"kernel": stack(seed)} for seed, name in enumerate("abc")}
    state = jax.vmap(functools.partial(jsn.init, block_size=4))(params)
    scales = {name: jnp.full(8, 1.0 + index) for index, name in enumerate(params)}

    def loss(params, state, scales):
        scale = {name: {"kernel": factor} for name, factor in scales.items()}
        done, _ = jsn.normalize(params, state, scale=scale)
        return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(done))

    def of_one(*one):
        return loss(*jax.tree.map(lambda x: x[0], one))[None]

    mesh = mesh_of(kind, (8,), ("data",))
    expected = jax.vmap(jax.grad(loss, argnums=(0, 2)))(params, state, scales)
    apart = jax.shard_map(of_one, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    total = lambda *args: jnp.sum(apart(*args))
    with jax.set_mesh(mesh):
        args = jax.device_put((params, state, scales), NamedSharding(mesh, P("data")))
        agree(jax.jit(jax.grad(total, argnums=(0, 2)))(*args), expected)


def test_replicas_in_the_style_of_pmap_stay_equal():
    params, x = weights(), jnp.asarray(gaussian(2, 16, 8))
    state = jsn.init(params, block_size=4, warmup=1)
    expected = jax.jit(gradient)(params, state, x)
    everywhere = lambda tree: jax.tree.map(lambda a: jnp.stack([a] * 8), tree)
    step = jax.pmap(functools.partial(gradient, axis="data"), axis_name="data")
    found = step(everywhere(params), everywhere(state), x.reshape(8, 2, 8))
    for leaf in jax.tree.leaves(found):
        assert (np.asarray(leaf) == np.asarray(leaf)[:1]).all()
    agree(jax.tree.map(lambda leaf: leaf[0], found)[:2], expected[:2])
