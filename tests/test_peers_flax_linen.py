"""What other implementations do wrongly in linen, and jsn must not: one test for each defect.

Each was seen in `flax.linen.SpectralNorm`; the number in brackets is what it gives there.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization, traverse_util
from jaxprs import count

import jsn

KEY = jax.random.key(0)


def spectral(W) -> float:
    return float(np.linalg.norm(np.asarray(W, np.float64), 2))


def identity(scale):
    return lambda key, shape, dtype=jnp.float32: scale * jnp.eye(*shape, dtype=dtype)


def normalized_kernel(variables, n_steps=0):
    return jsn.normalize(variables["params"], variables["sn_state"], n_steps=n_steps)[0]["kernel"]


def trained(model, variables, x, steps):
    """Applies in training mode, without changing the parameters."""
    apply = jax.jit(lambda v: model.apply(v, x, mutable=["sn_state"])[1])
    for _ in range(steps):
        variables = {**variables, **apply(variables)}
    return variables


def test_1_init_leaves_are_those_of_the_plain_layer():
    """(1) init of 4 I stores 1.0, bfloat16 becomes float32, mutable=True normalizes params."""
    options = {"features": 8, "kernel_init": identity(4.0), "param_dtype": jnp.bfloat16}
    x = jnp.ones((2, 8))
    plain = nn.Dense(**options).init(KEY, x)["params"]
    model = jsn.linen.spectral_norm(nn.Dense)(**options)
    variables = model.init(KEY, x)
    _, updates = model.apply(variables, x, mutable=True)
    for params in (variables["params"], updates["params"]):
        assert jax.tree.structure(params) == jax.tree.structure(plain)
        for ours, theirs in zip(jax.tree.leaves(params), jax.tree.leaves(plain), strict=True):
            assert ours.dtype == theirs.dtype
            np.testing.assert_array_equal(ours, theirs)


def test_2_partitioned_kernels_keep_their_boxes():
    """(2) AttributeError."""
    init = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
    x = jnp.ones((2, 8))
    variables = jsn.linen.spectral_norm(nn.Dense)(4, kernel_init=init).init(KEY, x)
    assert variables["params"]["kernel"].names == ("in", "out")
    folded = jsn.fold(variables["params"], variables["sn_state"])
    assert folded["kernel"].names == ("in", "out")
    assert spectral(folded["kernel"].value) == pytest.approx(1, abs=1e-6)


def test_3_a_fan_out_to_heads_stretches_nothing():
    """(3) Jacobian norm 2.0, the root of the number of heads."""
    fan_out = lambda key, shape, dtype: jnp.tile(jnp.eye(8), (1, 4)).reshape(shape)
    model = jsn.linen.spectral_norm(nn.DenseGeneral)(features=(4, 8), kernel_init=fan_out)
    x = jnp.ones((8,))
    variables = model.init(KEY, x)
    jacobian = jax.jacobian(lambda x: model.apply(variables, x).ravel())(x)
    assert spectral(jacobian) == pytest.approx(1, abs=1e-6)

    attention = jsn.linen.spectral_norm(nn.MultiHeadDotProductAttention)(num_heads=4)
    variables = attention.init(KEY, jnp.ones((3, 8)))
    query = jsn.fold(variables["params"], variables["sn_state"])["query"]["kernel"]
    assert spectral(query.reshape(8, -1)) == pytest.approx(1, abs=1e-6)


def test_4_two_dimensional_biases_do_not_change():
    """(4) a bias of norm 52.8 is rescaled to 1."""
    attention = jsn.linen.spectral_norm(nn.MultiHeadDotProductAttention)(
        num_heads=4, bias_init=nn.initializers.normal(10.0)
    )
    variables = attention.init(KEY, jnp.ones((3, 8)))
    folded = jsn.fold(variables["params"], variables["sn_state"])
    np.testing.assert_array_equal(folded["query"]["bias"], variables["params"]["query"]["bias"])


def test_5_a_zero_kernel_recovers():
    """(5) after one step at zero, the norm of 4 I stays 4.0 for good."""
    x, model = jnp.ones((2, 8)), jsn.linen.spectral_norm(nn.Dense)(8)
    variables = model.init(KEY, x)
    zero = jax.tree.map(jnp.zeros_like, variables["params"])
    variables = trained(model, {**variables, "params": zero}, x, 1)
    assert not np.asarray(normalized_kernel(variables)).any()
    variables["params"] = {**zero, "kernel": 4 * jnp.eye(8)}
    assert spectral(normalized_kernel(trained(model, variables, x, 20))) == pytest.approx(
        1, abs=1e-5
    )


def test_6_a_nan_step_is_forgotten():
    """(6) the state stays NaN for good."""
    x, model = jnp.ones((2, 8)), jsn.linen.spectral_norm(nn.Dense)(8)
    good = model.init(KEY, x)
    bad = {**good, "params": jax.tree.map(lambda w: w * jnp.nan, good["params"])}
    after = {**trained(model, bad, x, 1), "params": good["params"]}
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after["sn_state"]))
    assert spectral(normalized_kernel(after)) == pytest.approx(1, abs=1e-5)


def test_7_evaluation_right_after_init_is_normalized():
    """(7) norm 1.37."""
    variables = jsn.linen.spectral_norm(nn.Dense)(256).init(KEY, jnp.ones((1, 256)))
    assert spectral(normalized_kernel(variables)) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1e-6, 1.0, 1e8, 1e30])
def test_8_the_scale_of_a_weight_does_not_matter(scale):
    """(8) sigma 1e-6 gives norm 450."""
    init = lambda key, shape, dtype: scale * jax.random.normal(key, shape, dtype)
    variables = jsn.linen.spectral_norm(nn.Dense)(8, kernel_init=init).init(KEY, jnp.ones((1, 8)))
    assert spectral(normalized_kernel(variables)) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("scale", [0.0, 1e-4, 1.0])
def test_9_half_precision_kernels_give_no_nan(scale):
    """(9) NaN for zero and for 1e-4."""
    model = jsn.linen.spectral_norm(nn.Dense)(
        8, kernel_init=identity(scale), param_dtype=jnp.float16
    )
    kernel = normalized_kernel(model.init(KEY, jnp.ones((1, 8))))
    assert kernel.dtype == jnp.float16
    assert spectral(kernel) == pytest.approx(float(scale > 0), abs=1e-3)


@pytest.mark.parametrize("axis", [0, 1])
def test_10_each_layer_of_a_scanned_stack_has_its_own_sigma(axis):
    """(10) one sigma for the whole stack."""

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.Dense(6)(x), None

    @jsn.linen.spectral_norm
    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            layers = nn.scan(
                Layer, variable_axes={"params": axis}, split_rngs={"params": True}, length=4
            )
            return layers()(x, None)[0]

    variables = Stack().init(KEY, jnp.ones((2, 6)))
    folded = jsn.fold(variables["params"], variables["sn_state"])
    kernels = np.moveaxis(folded["ScanLayer_0"]["Dense_0"]["kernel"], axis, 0)
    assert [spectral(kernel) for kernel in kernels] == pytest.approx([1] * 4, abs=1e-5)


def test_11_nonsense_and_missing_state_are_told():
    """(11) n_steps=-3 silently disables normalization; missing state is an error about PRNGs."""
    with pytest.raises(ValueError, match="n_steps is -3, expected an integer of at least 0"):
        jsn.linen.spectral_norm(nn.Dense, n_steps=-3)
    x = jnp.ones((2, 8))
    pretrained = nn.Dense(4).init(KEY, x)
    model = jsn.linen.spectral_norm(nn.Dense)(4)
    for mutable in (False, ["sn_state"]):
        with pytest.raises(ValueError, match=r"jsn\.linen\.init_state\(model, variables"):
            model.apply(pretrained, x, mutable=mutable)
    sn_state = jsn.linen.init_state(model, pretrained, x)
    y = model.apply({**pretrained, "sn_state": sn_state}, x)
    assert y.shape == (2, 4)


def test_12_the_state_flattens_and_unflattens_at_slashes():
    """(12) its keys contain the separator."""
    variables = jsn.linen.spectral_norm(nn.Dense)(4).init(KEY, jnp.ones((2, 8)))
    tree = serialization.to_state_dict(variables["sn_state"])
    there = traverse_util.flatten_dict(tree, sep="/")
    back = traverse_util.unflatten_dict(there, sep="/")
    assert jax.tree.structure(back) == jax.tree.structure(tree)


def test_13_a_folded_model_costs_what_the_plain_model_costs():
    """(13) a 12-layer evaluation runs 60 products where the plain network runs 12."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            for _ in range(12):
                x = nn.relu(nn.Dense(8)(x))
            return x

    x = jnp.ones((2, 8))
    variables = jsn.linen.spectral_norm(Net)().init(KEY, x)
    folded = jsn.fold(variables["params"], variables["sn_state"])
    evaluate = lambda params: Net().apply({"params": params}, x)
    assert count(evaluate, folded) == count(evaluate, variables["params"])
    assert count(evaluate, folded)["dot_general"] == 12
    for kernel in (layer["kernel"] for layer in folded.values()):
        assert spectral(kernel) == pytest.approx(1, abs=1e-5)
