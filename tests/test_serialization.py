"""The state survives what checkpoints do to it, and training goes on as if nothing had happened."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from flax import serialization, traverse_util

import jsn


@jsn.linen.spectral_norm(block_size=4)
class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.relu(nn.Dense(16)(x)))


X = jax.random.normal(jax.random.key(1), (8, 5))
OPTIMIZER = optax.adam(1e-2)


@jax.jit
def step(variables, moments):
    def loss(params):
        y, updates = Net().apply({**variables, "params": params}, X, mutable=["sn_state"])
        return (y**2).sum(), updates

    grads, updates = jax.grad(loss, has_aux=True)(variables["params"])
    changes, moments = OPTIMIZER.update(grads, moments)
    return {"params": optax.apply_updates(variables["params"], changes), **updates}, moments


def start():
    variables = Net().init(jax.random.key(0), X)
    return variables, OPTIMIZER.init(variables["params"])


def train(carry, n):
    for _ in range(n):
        carry = step(*carry)
    return carry


def through_msgpack(carry, _):
    return serialization.from_bytes(start(), serialization.to_bytes(carry))


def through_orbax(carry, path):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "checkpoint", carry)
        checkpointer.wait_until_finished()
        return checkpointer.restore(path / "checkpoint", jax.tree.map(jnp.zeros_like, start()))


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("through", [through_msgpack, through_orbax])
@pytest.mark.filterwarnings("ignore")  # of orbax and what it imports
def test_training_resumes_bitwise(through, tmp_path):
    half = train(start(), 5)
    restored = through(half, tmp_path)
    assert_same(restored, half)
    assert_same(train(restored, 5), train(half, 5))


def test_the_serialized_state_nests_and_has_no_slashes_in_its_keys():
    variables, _ = start()
    tree = serialization.to_state_dict(variables)["sn_state"]
    flat = traverse_util.flatten_dict(tree, sep="/")
    assert all("/" not in part for path in traverse_util.flatten_dict(tree) for part in path)
    assert_same(traverse_util.unflatten_dict(flat, sep="/"), tree)


def test_a_state_of_another_block_size_is_refused_by_path():
    params = start()[0]["params"]
    saved = serialization.to_state_dict(jsn.init(params, block_size=2))
    with pytest.raises(ValueError, match=r"Dense_1/kernel: found shape \(2, 16\), expected shape"):
        serialization.from_state_dict(jsn.init(params, block_size=3), saved)
    with pytest.raises(ValueError, match=r"Dense_1/kernel: found nothing, expected shape"):
        serialization.from_state_dict(jsn.init({"Dense_1": params["Dense_1"]}), {"u": {}})


def test_a_bare_checkpoint_is_no_state():
    params = start()[0]["params"]
    bare = serialization.msgpack_restore(serialization.to_bytes(jsn.init(params)))
    with pytest.raises(TypeError, match=r"restore it into a target made by jsn\.init"):
        jsn.normalize(params, bare)
