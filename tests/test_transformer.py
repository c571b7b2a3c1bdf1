"""A transformer as people train them: scanned layers, remat, bfloat16, a 2-D mesh, Orbax."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jsn

WIDTH, HEADS, WORDS, LENGTH, LAYERS = 64, 4, 64, 8, 3
OPTIMIZER = optax.adamw(1e-2, eps=1e-3)
"""A large eps: where a gradient is rounding alone, Adam without it steps to a random side."""


def kernel(*names):
    return nn.with_partitioning(nn.initializers.lecun_normal(), names)


class Layer(nn.Module):
    """Attention and an MLP; names as for tensor parallelism ("model") and FSDP ("data")."""

    dtype: type

    @nn.compact
    def __call__(self, x, _):
        attention = nn.MultiHeadDotProductAttention(
            HEADS,
            dtype=self.dtype,
            kernel_init=kernel("data", "model", None),
            out_kernel_init=kernel("model", None, "data"),
            name="attention",
        )
        x = x + attention(nn.LayerNorm(dtype=self.dtype)(x))
        y = nn.LayerNorm(dtype=self.dtype)(x)
        y = nn.Dense(4 * WIDTH, dtype=self.dtype, kernel_init=kernel("data", "model"))(y)
        y = nn.Dense(WIDTH, dtype=self.dtype, kernel_init=kernel("model", "data"))(nn.gelu(y))
        return x + y, None


class Transformer(nn.Module):
    """A language model whose layers are stacked along an axis of their parameters."""

    axis: int = 0
    dtype: type = jnp.float32

    @nn.compact
    def __call__(self, words):
        x = nn.Embed(WORDS, WIDTH, dtype=self.dtype)(words)
        layers = nn.scan(
            nn.remat(Layer, prevent_cse=False),
            variable_axes={"params": self.axis},
            split_rngs={"params": True},
            length=LAYERS,
            metadata_params={nn.PARTITION_NAME: None},
        )
        x, _ = layers(self.dtype, name="layers")(x, None)
        x = nn.LayerNorm(dtype=self.dtype)(x)
        return nn.Dense(WORDS, dtype=jnp.float32, name="head")(x)


class Job:
    """A model on a mesh (or on one device): how it starts, and its training step."""

    def __init__(self, mesh_shape=None, axis=0, dtype=jnp.float32):
        model = jsn.linen.spectral_norm(Transformer, block_size=8, warmup=2)(axis, dtype)
        self.model = type(model).__wrapped__(axis, dtype)
        words = jnp.zeros((4, LENGTH), jnp.int32)

        def start():
            variables = model.init(jax.random.key(0), words)
            params = nn.unbox(variables["params"])
            return params, variables["sn_state"], OPTIMIZER.init(params)

        self.shapes = jax.eval_shape(start)
        self.mesh = self.sharding = None
        if mesh_shape is not None:
            names = ("data", "model")
            self.mesh = jax.make_mesh(mesh_shape, names, axis_types=(AxisType.Auto,) * 2)
            boxed = jax.eval_shape(model.init, jax.random.key(0), words)["params"]
            params = nn.get_sharding(boxed, self.mesh)
            state = jsn.state_sharding(params, self.shapes[0], self.shapes[1])
            everywhere = NamedSharding(self.mesh, P())
            optimizer = optax.tree_map_params(
                OPTIMIZER,
                lambda _, place: place,
                self.shapes[2],
                params,
                transform_non_params=lambda _: everywhere,
            )
            self.sharding = (params, state, optimizer)
        self.start = jax.jit(start, out_shardings=self.sharding)
        places = None if self.sharding is None else (self.sharding, everywhere)
        self.step = jax.jit(self._step, out_shardings=places, donate_argnums=0)

    def loss(self, params, words):
        logits = self.model.apply({"params": params}, words)
        return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], words[:, 1:]).mean()

    def _step(self, trained, words):
        """Accumulates gradients over microbatches, with one power step for all of them.

        Returns what is trained, and the loss.
        """
        params, state, opt_state = trained
        view, pullback, state = jax.vjp(lambda p: jsn.normalize(p, state), params, has_aux=True)

        def accumulate(total, micro):
            if self.mesh is not None:
                micro = jax.lax.with_sharding_constraint(micro, NamedSharding(self.mesh, P("data")))
            found = jax.value_and_grad(self.loss)(view, micro)
            return jax.tree.map(jnp.add, total, found), None

        zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, view))
        (loss, total), _ = jax.lax.scan(accumulate, zeros, words)
        (grads,) = pullback(total)
        updates, opt_state = OPTIMIZER.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), state, opt_state), loss


def batch(index):
    return jax.random.randint(jax.random.key(index), (2, 4, LENGTH), 0, WORDS)


@functools.cache
def job(*args, **options):
    return Job(*args, **options)


def agree(found, expected, **tolerance):
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.allclose(x, y, **tolerance)


def assert_agree(found, expected):
    """The loss and the trained parameters agree; trailing vectors of a block need not.

    Once a block has converged they are told apart by rounding alone, and they are not used.
    """
    (found, loss), (expected, expected_loss) = found, expected
    assert np.allclose(loss, expected_loss, rtol=1e-5)
    agree(found[0], expected[0], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("axis", [0, 1])
def test_training_on_a_mesh_equals_training_on_one_device(axis):
    here, there = job(axis=axis), job((4, 2), axis)
    spread = there.start()
    assert spread[1]["spectral_norm"].u["layers"]["Dense_0"]["kernel"].shape[0] == LAYERS
    for index in range(3):
        alone = jax.tree.map(jnp.asarray, jax.device_get(spread))
        expected = here.step(alone, batch(index))
        spread, loss = there.step(spread, batch(index))
        assert_agree((spread, loss), expected)
        for x, place in zip(jax.tree.leaves(spread), jax.tree.leaves(there.sharding), strict=True):
            assert x.sharding.is_equivalent_to(place, x.ndim)


@pytest.mark.slow
def test_buffers_are_donated():
    spread = job((4, 2), 0)
    before = spread.start()
    spread.step(before, batch(0))
    assert all(x.is_deleted() for x in jax.tree.leaves(before[:2]))


@pytest.mark.slow
def test_half_precision_compute_keeps_masters_and_state_in_single():
    whole, half = (job((4, 2), 0, dtype) for dtype in (jnp.float32, jnp.bfloat16))
    expected, found = whole.start(), half.start()
    for index in range(3):
        expected, expected_loss = whole.step(expected, batch(index))
        found, loss = half.step(found, batch(index))
        assert loss != expected_loss
        assert np.allclose(loss, expected_loss, rtol=2e-2)
    assert {x.dtype for x in jax.tree.leaves(found[:2])} == {jnp.dtype("float32")}


@pytest.mark.slow
def test_orbax_resumes_on_a_mesh_of_another_shape(tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    wide, tall = job((4, 2), 0), job((2, 4), 0)
    saved, _ = wide.step(wide.start(), batch(0))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "step_1", saved)
        checkpointer.wait_until_finished()
        target = jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
            tall.shapes,
            tall.sharding,
        )
        restored = checkpointer.restore(tmp_path / "step_1", target)
    assert jax.tree.structure(restored) == jax.tree.structure(saved)
    for x, y, place in zip(*map(jax.tree.leaves, (saved, restored, tall.sharding)), strict=True):
        assert np.array_equal(x, y)  # nothing was computed: bitwise
        assert y.sharding.is_equivalent_to(place, y.ndim)
    again = jax.tree.map(jnp.copy, jax.device_put(restored, wide.sharding))
    expected, again = (wide.step(trained, batch(1)) for trained in (saved, again))
    for x, y in zip(*map(jax.tree.leaves, (again, expected)), strict=True):
        assert np.array_equal(x, y)  # the same program on the same mesh: bitwise
    assert_agree(tall.step(restored, batch(1)), expected)


@pytest.mark.slow
def test_replicas_do_not_drift_apart_in_a_thousand_steps():
    """Data parallelism with explicit replicas: every device takes its own power steps."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    here, everywhere = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    keys = jax.random.split(jax.random.key(0))
    shapes = {"a": (64, 96), "b": (96, 48)}
    params = {
        name: jax.random.normal(key, shape) / 8
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    state = jsn.init(params, rules=[("", jsn.Matrix())], block_size=16)

    def loss(params, state, x):
        params, state = jsn.normalize(params, state)
        y = jnp.tanh(x @ params["a"]) @ params["b"]
        return ((y - x[:, :48]) ** 2).mean(), state

    @functools.partial(jax.jit, donate_argnums=(0, 1), out_shardings=everywhere)
    def step(params, state, index):
        x = jax.random.normal(jax.random.fold_in(jax.random.key(1), index), (64, 64))
        x = jax.lax.with_sharding_constraint(x, here)
        grads, state = jax.grad(loss, has_aux=True)(params, state, x)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), state

    trained = jax.device_put((params, state), everywhere)
    for index in range(1000):
        # XLA:CPU aborts where virtual devices get more than some steps ahead of each other.
        trained = jax.block_until_ready(step(*trained, index))
    for leaf in jax.tree.leaves(trained):
        replicas = [np.asarray(shard.data) for shard in leaf.addressable_shards]
        assert len(replicas) == 8
        for replica in replicas:
            assert np.array_equal(replica, replicas[0])
    sigmas = jsn.sigmas(*jax.device_get(trained))
    for name, sigma in sigmas.items():
        truth = np.linalg.norm(np.asarray(trained[0][name], np.float64), 2)
        assert -1e-6 < 1 - sigma / truth < 2e-2  # a flat spectrum, and half the default block
