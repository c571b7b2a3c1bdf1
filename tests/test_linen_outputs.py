"""Where a layer takes and gives less than its weight, the decorator scales that instead."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

import jsn
from jsn import _constrain, _linen_layers, _linen_outputs

KEY = jax.random.key(0)


class OwnDense(nn.Dense):
    """A layer with code of its own."""

    def __call__(self, inputs):
        return super().__call__(inputs) ** 2


def layers():
    """Layers that are linear in their kernel, and the shape of a small input of each."""
    conv = functools.partial(nn.Conv, 32)
    return {
        "dense": (nn.Dense(32), (2, 48)),
        "no bias": (nn.Dense(32, use_bias=False), (2, 48)),
        "one example": (nn.Dense(32), (48,)),
        "several axes": (nn.DenseGeneral((4, 8), axis=(-2, -1)), (2, 6, 8)),
        "conv": (conv((3, 3)), (1, 4, 4, 16)),
        "strided": (conv((4, 4), strides=2), (2, 4, 4, 16)),
        "circular": (conv((3, 3), padding="CIRCULAR"), (1, 4, 4, 16)),
        "causal": (conv((5,), padding="CAUSAL"), (2, 6, 16)),
        "groups": (conv((3, 3), feature_group_count=2), (1, 3, 3, 16)),
        "masked": (conv((3, 3), mask=np.tri(144, 32).reshape(3, 3, 16, 32)), (1, 4, 4, 16)),
        "unbatched": (conv((3, 3)), (4, 4, 16)),
        "transpose": (nn.ConvTranspose(32, (3, 3), strides=(2, 2)), (1, 3, 3, 32)),
    }


def made(layer, x, **options):
    """A layer under the decorator, and its variables."""
    decorated = jsn.linen.spectral_norm(type(layer), **options)
    fields = {name: getattr(layer, name) for name in type(layer).__dataclass_fields__}
    model = decorated(**{k: v for k, v in fields.items() if k not in ("parent", "name")})
    variables = model.init(KEY, x)
    params = dict(variables["params"])
    if "bias" in params:
        zero = params["bias"]
        params["bias"] = jnp.linspace(-1, 1, zero.size, dtype=zero.dtype).reshape(zero.shape)
    return model, {**variables, "params": params}


@pytest.fixture
def scaled(monkeypatch):
    """Notes of how many layers the input and output were scaled; here of small ones too."""
    monkeypatch.setattr(_linen_outputs, "_LARGE", 1)
    seen = []

    def around(factor):
        seen.append(factor)
        return _constrain.around(factor)

    monkeypatch.setattr(_linen_outputs, "around", around)
    return seen


def both(model, plain, variables):
    """The decorated layer, and the plain one on normalized weights: functions of params and x."""

    def ours(params, x):
        return model.apply({**variables, "params": params}, x, mutable=["sn_state"])[0]

    def theirs(params, x):
        normalized, _ = jsn.normalize(params, variables["sn_state"])
        return plain.apply({"params": normalized}, x)

    return ours, theirs


def check(model, plain, variables, x):
    """Outputs and gradients are the same."""
    found = []
    for function in both(model, plain, variables):
        y, back = jax.vjp(function, variables["params"], x)
        found.append((y, *back(jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))))
    ours, theirs = found
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=3e-6 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("name", layers())
def test_a_layer_gives_what_it_gives_on_its_normalized_weight(name, scaled):
    layer, shape = layers()[name]
    x = jax.random.normal(KEY, shape)
    model, variables = made(layer, x)
    check(model, layer, variables, x)
    assert len(scaled) == 1


def test_a_gradient_penalty_is_that_of_the_normalized_weight(scaled):
    """The gradient of the gradient: nothing of the factor may be a constant."""
    x = jax.random.normal(KEY, (2, 48))
    layer = nn.Dense(32)
    model, variables = made(layer, x)

    def penalty(function, params):
        return (jax.grad(lambda x: jnp.cos(function(params, x)).sum())(x) ** 2).sum()

    functions = both(model, layer, variables)
    found = [jax.grad(functools.partial(penalty, f))(variables["params"]) for f in functions]
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    assert scaled


@pytest.mark.parametrize("exponent", [-100, -30, 30, 118])
def test_no_scale_of_a_weight_changes_what_comes_out(exponent, scaled):
    x = jax.random.normal(KEY, (2, 48))
    model, variables = made(nn.Dense(32), x)
    kernel, bias = variables["params"]["kernel"], variables["params"]["bias"]
    far = {**variables, "params": {"kernel": kernel * 2.0**exponent, "bias": bias}}
    np.testing.assert_allclose(model.apply(far, x), model.apply(variables, x), rtol=2e-6)
    assert len(scaled) == 2


def test_zero_stays_zero_and_a_nan_is_seen(scaled):
    x = jax.random.normal(KEY, (2, 48))
    model, variables = made(nn.Dense(32), x)
    params = variables["params"]
    apply = lambda kernel: model.apply({**variables, "params": {**params, "kernel": kernel}}, x)
    zero, bias = apply(jnp.zeros_like(params["kernel"])), params["bias"]
    np.testing.assert_array_equal(zero, jnp.broadcast_to(bias, zero.shape))
    assert jnp.isnan(apply(params["kernel"].at[3, 4].set(jnp.nan))).any()
    assert len(scaled) == 2


@pytest.mark.parametrize("scale", [3.0, -0.5, 0.0])
@pytest.mark.parametrize("options", [{"bound": 2.5}, {"bound": 0.1, "soft": True}, {"soft": True}])
def test_every_constraint_is_kept(options, scale, scaled):
    x = jax.random.normal(KEY, (2, 48))
    layer = nn.Dense(32)
    model, variables = made(layer, x, scale=scale, **options)
    normalized, _ = jsn.normalize(
        variables["params"], variables["sn_state"], scale=scale, **options
    )
    ours = model.apply(variables, x, mutable=["sn_state"])[0]
    theirs = layer.apply({"params": normalized}, x)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    assert len(scaled) == 1


def test_the_gradient_of_a_learned_scale_arrives(scaled):
    x = jax.random.normal(KEY, (2, 48))
    layer = nn.Dense(32)
    _, variables = made(layer, x)

    def ours(scale):
        model = jsn.linen.spectral_norm(nn.Dense, scale=scale)(32)
        return (model.apply(variables, x) ** 2).sum()

    def theirs(scale):
        normalized = jsn.normalize(
            variables["params"], variables["sn_state"], n_steps=0, scale=scale
        )
        return (layer.apply({"params": normalized[0]}, x) ** 2).sum()

    np.testing.assert_allclose(jax.grad(ours)(0.7), jax.grad(theirs)(0.7), rtol=1e-5)
    assert scaled


class Mixed(nn.Module):
    """A layer, and a regularizer that looks at its weight."""

    @nn.compact
    def __call__(self, x):
        layer = nn.Dense(32)
        y = layer(x)
        return y, jnp.linalg.norm(layer.variables["params"]["kernel"], 2)


def test_who_looks_at_a_weight_sees_it_normalized(scaled):
    x = jax.random.normal(KEY, (2, 48))
    model = jsn.linen.spectral_norm(Mixed)()
    variables = model.init(KEY, x)
    assert model.apply(variables, x)[1] == pytest.approx(1, rel=1e-5)
    assert len(scaled) == 1


@pytest.mark.parametrize(
    ("layer", "shape", "dtype"),
    [
        (nn.Dense(32), (64, 48), np.float32),
        (nn.Conv(32, (3, 3)), (4, 8, 8, 16), np.float32),
        (nn.Dense(32, dtype=np.dtype(jnp.bfloat16)), (2, 48), np.float32),
        (nn.Dense(32, param_dtype=jnp.bfloat16), (2, 48), jnp.bfloat16),
        (nn.Dense(32, dot_general=jax.lax.dot_general), (2, 48), np.float32),
        (nn.DenseGeneral(32, batch_dims=(0,)), (2, 1, 48), np.float32),
        (OwnDense(32), (2, 48), np.float32),
    ],
)
def test_else_a_layer_runs_on_its_normalized_weight(layer, shape, dtype, scaled):
    """Many activations, narrow numbers, code or arithmetic of its own, a batch of maps."""
    x = jax.random.normal(KEY, shape).astype(dtype)
    model, variables = made(layer, x)
    normalized, _ = jsn.normalize(variables["params"], variables["sn_state"], n_steps=0)
    np.testing.assert_allclose(
        np.asarray(model.apply(variables, x), np.float32),
        np.asarray(layer.apply({"params": normalized}, x), np.float32),
        rtol=1e-6,
        atol=1e-6,
    )
    assert not scaled


def test_small_weights_are_scaled(scaled, monkeypatch):
    monkeypatch.setattr(_linen_outputs, "_LARGE", 48 * 32 + 1)
    x = jax.random.normal(KEY, (2, 48))
    model, variables = made(nn.Dense(32), x)
    check(model, nn.Dense(32), variables, x)
    assert not scaled


def test_narrow_weights_in_wide_arithmetic_are_not_rounded_twice(scaled):
    x = jax.random.normal(KEY, (2, 48))
    model, variables = made(nn.Dense(32, param_dtype=jnp.bfloat16), x)
    kernel = np.asarray(variables["params"]["kernel"], np.float64)
    bias = np.asarray(variables["params"]["bias"], np.float64)
    expected = np.asarray(x, np.float64) @ (kernel / np.linalg.norm(kernel, 2)) + bias
    np.testing.assert_allclose(model.apply(variables, x), expected, rtol=1e-4, atol=1e-5)
    assert len(scaled) == 1


class Recurrent(nn.Module):
    """Layers within a loop, under rematerialization, and called as often as one likes."""

    @nn.compact
    def __call__(self, x):
        x = nn.remat(nn.Dense)(48)(nn.RNN(nn.SimpleCell(48))(x)[:, -1])
        layer = nn.Dense(48)
        return layer(layer(x))


def test_in_a_loop_the_weight_is_scaled_before_it(scaled):
    x = jax.random.normal(KEY, (2, 5, 48))
    model = jsn.linen.spectral_norm(Recurrent)()
    variables = jax.jit(model.init)(KEY, x)
    normalized, _ = jsn.normalize(variables["params"], variables["sn_state"], n_steps=0)
    np.testing.assert_allclose(
        model.apply(variables, x), Recurrent().apply({"params": normalized}, x), atol=1e-5
    )
    assert len(scaled) == 2  # both calls of the last layer


def test_a_boxed_weight_is_known(scaled):
    boxed = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
    x = jax.random.normal(KEY, (2, 48))
    layer = nn.Dense(32, kernel_init=boxed)
    model = jsn.linen.spectral_norm(nn.Dense)(32, kernel_init=boxed)
    variables = model.init(KEY, x)
    normalized, _ = jsn.normalize(meta.unbox(variables["params"]), variables["sn_state"], n_steps=0)
    expected = layer.apply({"params": normalized}, x)
    np.testing.assert_allclose(model.apply(variables, x), expected, rtol=1e-5, atol=1e-5)
    assert len(scaled) == 1


def test_captured_intermediates_are_those_of_the_plain_model(scaled):
    x = jax.random.normal(KEY, (2, 48))
    layer = nn.Dense(32)
    model, variables = made(layer, x)
    y, seen = model.apply(variables, x, capture_intermediates=True, mutable=["intermediates"])
    (captured,) = seen["intermediates"]["__call__"]
    np.testing.assert_array_equal(captured, y)
    assert set(seen["intermediates"]) == {"__call__"}
    assert len(scaled) == 1


def test_interceptors_of_a_user_see_each_call_once(scaled):
    x = jax.random.normal(KEY, (2, 48))
    model, variables = made(nn.Dense(32), x)

    def doubled(call_next, args, kwargs, context):
        return 2 * call_next(*args, **kwargs)

    y = model.apply(variables, x)
    with nn.intercept_methods(doubled):
        twice = model.apply(variables, x)
    np.testing.assert_array_equal(twice, 2 * y)
    assert len(scaled) == 2


@pytest.mark.parametrize("name", layers())
def test_the_size_of_what_a_layer_gives_is_known_without_running_it(name):
    layer, shape = layers()[name]
    x = jnp.zeros(shape)
    y, variables = layer.init_with_output(KEY, x)
    kernel = variables["params"]["kernel"]
    assert _linen_layers.n_outputs(layer, kernel.shape, shape) == y.size


def wide(text: str, size: int) -> int:
    """How many operations of a compiled program give something of the size of a weight."""
    given = re.findall(r"^ *(?:ROOT )?\S+ = f32\[([\d,]+)\]\S* (?!parameter|bitcast)", text, re.M)
    return sum(np.prod(list(map(int, shape.split(",")))) == size for shape in given)


def test_nothing_of_the_size_of_a_weight_is_written():
    """In the compiled program of an apply; on many activations there is the scaled weight."""
    few, many = jnp.ones((2, 768)), jnp.ones((1024, 768))
    model, variables = made(nn.Dense(512), few)

    def written(x):
        apply = jax.jit(functools.partial(model.apply, mutable=["sn_state"]))
        return wide(apply.lower(variables, x).compile().as_text(), 512 * 768)

    assert written(few) == 0
    assert written(many) > 0
