"""The linen adapter: same parameters, normalized weights, one switch, inside what linen offers."""

import functools
import pickle

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxprs import count

import jsn

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (4, 6))


def spectral(W) -> float:
    return float(np.linalg.norm(np.asarray(W, np.float64), 2))


class Plain(nn.Module):
    """A network with what networks have: convolution, batch norm, dropout, two methods."""

    def setup(self):
        self.conv = nn.Conv(5, (3,))
        self.norm = nn.BatchNorm(momentum=0.5)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Dense(3)

    def features(self, x, train):
        x = self.norm(self.conv(x[..., None]), use_running_average=not train)
        return self.drop(nn.relu(x), deterministic=not train).reshape(len(x), -1)

    def __call__(self, x, train=False):
        return self.head(self.features(x, train))


@jsn.linen.spectral_norm
class Net(Plain):
    """The same, decorated."""


@pytest.fixture(scope="module")
def variables():
    return Net().init({"params": KEY, "dropout": KEY}, X)


def test_the_parameters_and_other_collections_are_those_of_the_plain_class(variables):
    plain = Plain().init({"params": KEY, "dropout": KEY}, X)
    assert set(variables) == {*plain, "sn_state"}
    for name, tree in plain.items():
        assert jax.tree.structure(tree) == jax.tree.structure(variables[name])
        for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(variables[name]), strict=True):
            np.testing.assert_array_equal(a, b)


def test_the_class_keeps_its_name_and_gives_back_the_undecorated_one():
    assert Net.__name__ == Net.__qualname__ == "Net"
    assert Net.__module__ == __name__
    assert Net.__doc__ == "The same, decorated."
    assert issubclass(Net.__wrapped__, Plain)
    assert issubclass(Net, Net.__wrapped__)
    assert pickle.loads(pickle.dumps(Net())) == Net()


def test_automatic_names_are_those_of_the_undecorated_class():
    class Outer(nn.Module):
        layer: type

        @nn.compact
        def __call__(self, x):
            return self.layer(2)(self.layer(3)(x))

    paths = [
        jax.tree.structure(Outer(layer).init(KEY, X)["params"])
        for layer in (nn.Dense, jsn.linen.spectral_norm(nn.Dense))
    ]
    assert paths[0] == paths[1]


def test_init_output_is_that_of_the_normalized_model(variables):
    y, made = Net().init_with_output({"params": KEY, "dropout": KEY}, X)
    np.testing.assert_allclose(y, Net().apply(made, X), rtol=1e-5, atol=1e-6)


def test_a_mutable_collection_is_training_and_a_frozen_one_evaluation(variables):
    evaluate = lambda v: Net().apply(v, X)
    train = lambda v: Net().apply(v, X, mutable=["sn_state"])
    assert count(evaluate, variables)["cholesky"] == 0
    assert count(train, variables)["cholesky"] > 0
    _, updates = train(variables)
    assert set(updates) == {"sn_state"}
    assert jax.tree.structure(updates["sn_state"]) == jax.tree.structure(variables["sn_state"])


def test_every_method_sees_normalized_weights(variables):
    folded = jsn.fold(variables["params"], variables["sn_state"])
    plain = {**variables, "params": folded}
    del plain["sn_state"]
    for arguments in ({}, {"method": "features", "train": False}):
        ours = Net().apply(variables, X, **arguments)
        theirs = Plain().apply(plain, X, **arguments)
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_batch_statistics_and_dropout_work_as_without(variables):
    rngs = {"dropout": jax.random.key(7)}
    folded = jsn.fold(variables["params"], variables["sn_state"])
    mutable = ["sn_state", "batch_stats"]
    y, ours = Net().apply(variables, X, train=True, mutable=mutable, rngs=rngs)
    plain = {"params": folded, "batch_stats": variables["batch_stats"]}
    z, theirs = Plain().apply(plain, X, train=True, mutable=mutable, rngs=rngs)
    np.testing.assert_allclose(y, z, rtol=1e-4, atol=1e-5)
    for a, b in zip(
        *map(jax.tree.leaves, (ours["batch_stats"], theirs["batch_stats"])), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_one_sigma_in_an_apply_however_often_the_module_is_called():
    class Twice(nn.Module):
        n_calls: int

        def setup(self):
            self.critic = jsn.linen.spectral_norm(nn.Dense)(3)

        def __call__(self, x):
            return sum(self.critic(x) for _ in range(self.n_calls))

    made = Twice(1).init(KEY, X)
    steps = [count(lambda v, n=n: Twice(n).apply(v, X, mutable=["sn_state"]), made) for n in (1, 4)]
    assert steps[0]["cholesky"] == steps[1]["cholesky"] > 0
    once, four = (Twice(n).apply(made, X, mutable=["sn_state"]) for n in (1, 4))
    np.testing.assert_allclose(4 * once[0], four[0], rtol=1e-6)
    for a, b in zip(*map(jax.tree.leaves, (once[1], four[1])), strict=True):
        np.testing.assert_array_equal(a, b)


def test_normalizing_once_outside_equals_the_decorated_class(variables):
    normalized, _ = jsn.normalize(variables["params"], variables["sn_state"])
    plain = {"params": normalized, "batch_stats": variables["batch_stats"]}
    ours = Net().apply(variables, X, mutable=["sn_state"])[0]
    np.testing.assert_allclose(ours, Net.__wrapped__().apply(plain, X), rtol=1e-6, atol=1e-6)


def test_gradients_flow_through_sigma():
    model = jsn.linen.spectral_norm(nn.Dense)(3, use_bias=False)
    made = model.init(KEY, X)
    loss = lambda params: (model.apply({**made, "params": params}, X) ** 3).sum()
    kernel, grad = made["params"]["kernel"], jax.grad(loss)(made["params"])["kernel"]
    assert jnp.abs(grad).max() > 1e-2
    assert abs(jnp.vdot(grad, kernel)) < 1e-4 * jnp.linalg.norm(grad) * jnp.linalg.norm(kernel)


@pytest.mark.parametrize("options", [{"bound": 2.5}, {"bound": 0.5, "soft": True}, {"scale": 3.0}])
def test_the_constraint_is_an_option(options):
    model = jsn.linen.spectral_norm(nn.Dense, **options)(6, use_bias=False)
    made = model.init(KEY, X)
    kernel = model.apply(made, jnp.eye(6))
    expected = {"bound": 2.5, "scale": 3.0}.get(next(iter(options)), 0)
    if "soft" in options:
        expected = min(0.5, spectral(made["params"]["kernel"]))
    elif "bound" in options:
        expected = options["bound"]
    assert spectral(kernel) == pytest.approx(expected, rel=1e-5)


def test_block_size_and_rules_are_options():
    rules = (("Dense_1/kernel$", None), *jsn.FLAX)

    @jsn.linen.spectral_norm(block_size=2, rules=rules)
    class Two(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(5)(x)
            return nn.Dense(4)(x)

    made = Two().init(KEY, X)
    (state,) = made["sn_state"].values()
    assert state.u["Dense_0"]["kernel"].shape == (2, 5)
    assert state.u["Dense_1"]["kernel"] is None


def test_a_partial_class_is_decorated_too():
    layer = jsn.linen.spectral_norm(functools.partial(nn.Dense, 3, use_bias=False))
    made = layer().init(KEY, X)
    assert set(made["params"]) == {"kernel"}
    assert layer().apply(made, X).shape == (4, 3)


@pytest.mark.parametrize("wrap", [nn.remat, nn.jit])
def test_inside_other_transformations(wrap):
    model = wrap(jsn.linen.spectral_norm(nn.Dense))(3)
    plain = jsn.linen.spectral_norm(nn.Dense)(3)
    made = plain.init(KEY, X)
    for a, b in zip(
        jax.tree.leaves(model.apply(made, X, mutable=["sn_state"])),
        jax.tree.leaves(plain.apply(made, X, mutable=["sn_state"])),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("axis", [0, 1])
def test_inside_scan_and_vmap_each_layer_has_its_own_state(axis):
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _=None):
            return nn.Dense(6)(x), None

    axes = {"params": axis, "sn_state": 0}
    layer = jsn.linen.spectral_norm(Layer)
    scanned = nn.scan(layer, variable_axes=axes, split_rngs={"params": True}, length=3)()
    mapped = nn.vmap(
        layer, variable_axes=axes, split_rngs={"params": True}, in_axes=None, axis_size=3
    )()
    for model in (scanned, mapped):
        made = model.init(KEY, X, None)
        _, updates = model.apply(made, X, None, mutable=["sn_state"])
        assert jax.tree.structure(updates["sn_state"]) == jax.tree.structure(made["sn_state"])
        folded = jsn.fold(made["params"], updates["sn_state"])["Dense_0"]["kernel"]
        norms = [spectral(kernel) for kernel in np.moveaxis(folded, axis, 0)]
        assert norms == pytest.approx([1] * 3, abs=1e-5)


def test_around_a_recurrent_network():
    model = jsn.linen.spectral_norm(nn.RNN)(nn.SimpleCell(5))
    sequence = jnp.ones((2, 7, 3), jnp.float32)
    made = model.init(KEY, sequence)
    y, updates = model.apply(made, sequence, mutable=["sn_state"])
    assert y.shape == (2, 7, 5)
    recurrent = jsn.fold(made["params"], updates["sn_state"])["cell"]["h"]["kernel"]
    assert spectral(recurrent) == pytest.approx(1, abs=1e-5)


def test_parameters_trained_without_jsn_load_and_work():
    plain = Plain().init({"params": KEY, "dropout": KEY}, X)
    sn_state = jsn.linen.init_state(Net(), plain, X)
    y = Net().apply({**plain, "sn_state": sn_state}, X)
    folded = {**plain, "params": jsn.fold(plain["params"], sn_state)}
    np.testing.assert_allclose(y, Plain().apply(folded, X), rtol=1e-4, atol=1e-5)


def test_a_module_decorated_within_a_plain_one_loads_too():
    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = jsn.linen.spectral_norm(nn.Dense)(3)(x)
            return nn.Dense(2)(x)

    made = Outer().init(KEY, X)
    assert set(made["sn_state"]) == {"Dense_0"}
    again = jsn.linen.init_state(Outer(), {"params": made["params"]}, X)
    assert jax.tree.structure(again) == jax.tree.structure(made["sn_state"])
    normalized, state = jsn.normalize(made["params"], made["sn_state"])
    assert spectral(normalized["Dense_0"]["kernel"]) == pytest.approx(1, abs=1e-5)
    np.testing.assert_array_equal(
        normalized["Dense_1"]["kernel"], made["params"]["Dense_1"]["kernel"]
    )
    assert jax.tree.structure(state) == jax.tree.structure(made["sn_state"])


def test_a_kernel_that_is_no_matrix_is_told():
    @jsn.linen.spectral_norm
    class Scaled(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(x * self.param("kernel", nn.initializers.ones, (6,))[None])

    with pytest.raises(ValueError, match=r"kernel: shape \(6,\), .* needs at least 2 axes"):
        Scaled().init(KEY, X)


def test_what_is_no_linen_class_is_refused():
    for target, found in ((nn.Dense(3), "an instance of Dense"), (len, "len"), (3, r"3 \(int\)")):
        with pytest.raises(TypeError, match=f"expected a flax.linen.Module class, found .*{found}"):
            jsn.linen.spectral_norm(target)


def test_a_model_without_decorated_modules_has_no_state():
    with pytest.raises(ValueError, match="no module of Dense keeps spectral normalization state"):
        jsn.linen.init_state(nn.Dense(3), nn.Dense(3).init(KEY, X), X)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_stacked_axis_as_long_as_the_layer_is_wide_is_still_found(axis):
    """With six layers of 6 x 6 the shape (6, 6, 6) does not tell which axis the layers are on."""

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.Dense(6, use_bias=False)(x), None

    @jsn.linen.spectral_norm
    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            axes = {"params": axis}
            layers = nn.scan(Layer, variable_axes=axes, split_rngs={"params": True}, length=6)
            return layers()(x, None)[0]

    made = Stack().init(KEY, X)
    folded = jsn.fold(made["params"], made["sn_state"])["ScanLayer_0"]["Dense_0"]
    norms = [spectral(kernel) for kernel in np.moveaxis(folded["kernel"], axis, 0)]
    assert norms == pytest.approx([1] * 6, abs=1e-5)


def test_a_cell_inside_a_recurrent_network():
    cell = jsn.linen.spectral_norm(nn.SimpleCell)(5)
    model = nn.RNN(cell, variable_broadcast=["params", "sn_state"])
    sequence = jax.random.normal(KEY, (2, 7, 3), jnp.float32)
    made = model.init(KEY, sequence)
    again = jsn.linen.init_state(model, {"params": made["params"]}, sequence)
    assert jax.tree.structure(again) == jax.tree.structure(made["sn_state"])
    folded, _ = jsn.normalize(made["params"], made["sn_state"], n_steps=0)
    expected = nn.RNN(nn.SimpleCell(5)).apply({"params": folded}, sequence)
    np.testing.assert_allclose(model.apply(made, sequence), expected, rtol=1e-5, atol=1e-6)
    # Flax cannot create what a scan carries, but carries what is there.
    for trained in (model, nn.RNN(cell, variable_carry="sn_state")):
        _, updates = trained.apply(made, sequence, mutable=["sn_state"])
        assert jax.tree.structure(updates["sn_state"]) == jax.tree.structure(made["sn_state"])
        changed = jax.tree.map(
            lambda a, b: bool((a != b).any()), updates["sn_state"], made["sn_state"]
        )
        assert any(jax.tree.leaves(changed))


def test_a_decorated_instance_may_be_handed_in():
    class Outer(nn.Module):
        layer: nn.Module

        def __call__(self, x):
            return self.layer(x) + self.layer(2 * x)

    model = Outer(jsn.linen.spectral_norm(nn.Dense)(6, use_bias=False))
    made = model.init(KEY, jnp.eye(6))
    y, updates = model.apply(made, jnp.eye(6), mutable=["sn_state"])
    assert spectral(y) == pytest.approx(3, abs=1e-4)
    assert jax.tree.structure(updates["sn_state"]) == jax.tree.structure(made["sn_state"])


@pytest.mark.parametrize(
    ("part", "parts"),
    [
        (lambda: nn.Dropout(0.5, deterministic=True), ["head"]),
        (lambda: nn.Dense(6, use_bias=False), ["head", "part"]),
        (nn.LayerNorm, ["head", "part"]),  # parameters, but no weight
    ],
)
def test_any_module_may_be_handed_in(part, parts):
    @jsn.linen.spectral_norm
    class Head(nn.Module):
        part: nn.Module

        @nn.compact
        def __call__(self, x):
            return nn.Dense(6, use_bias=False)(self.part(x))

    class Outer(nn.Module):
        def setup(self):
            self.part = part()
            self.head = Head(self.part)

        def __call__(self, x):
            return self.head(x)

    made = Outer().init(KEY, jnp.eye(6))
    assert sorted(made["params"]) == parts
    weights = [name for name in parts if "kernel" in str(made["params"][name])]
    assert sorted(made["sn_state"]) == weights
    y, updates = Outer().apply(made, jnp.eye(6), mutable=["sn_state"])
    assert spectral(y) <= (1 + 1e-5 if "scale" not in str(made["params"]) else np.inf)
    assert jax.tree.structure(updates["sn_state"]) == jax.tree.structure(made["sn_state"])
    for name in weights:
        lost = {"sn_state": {k: x for k, x in made["sn_state"].items() if k != name}}
        with pytest.raises(ValueError, match=f"{name} was applied without its"):
            Outer().apply(made | lost, jnp.eye(6))


def test_decorated_within_decorated_is_normalized_to_the_same():
    inner = jsn.linen.spectral_norm(nn.Dense)

    @jsn.linen.spectral_norm
    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return inner(6, use_bias=False)(x)

    made = Outer().init(KEY, jnp.eye(6))
    for mutable in (False, ["sn_state"]):
        y = Outer().apply(made, jnp.eye(6), mutable=mutable)
        assert spectral(y[0] if mutable else y) == pytest.approx(1, abs=1e-5)


def test_jit_grad_and_vmap_of_apply():
    model = jsn.linen.spectral_norm(nn.Dense)(3)
    made = jax.jit(model.init)(KEY, X)
    assert jax.tree.structure(made) == jax.tree.structure(jax.eval_shape(model.init, KEY, X))
    apply = lambda variables, x: model.apply(variables, x, mutable=["sn_state"])
    y, updates = jax.jit(apply)(made, X)
    np.testing.assert_allclose(y, apply(made, X)[0], rtol=1e-5)
    each = jax.vmap(apply, in_axes=(None, 0), out_axes=(0, None))
    np.testing.assert_allclose(each(made, X)[0], y, rtol=1e-5)
    ensemble = jax.vmap(model.init, in_axes=(0, None))(jax.random.split(KEY, 3), X)
    y, updates = jax.vmap(apply, in_axes=(0, None))(ensemble, X)
    assert y.shape == (3, 4, 3)
    assert jax.tree.structure(updates["sn_state"]) == jax.tree.structure(ensemble["sn_state"])
    for index in range(3):
        one = jax.tree.map(lambda leaf, index=index: leaf[index], ensemble)
        np.testing.assert_allclose(y[index], apply(one, X)[0], rtol=1e-5)


def test_a_method_marked_nowrap_and_a_property_are_left_alone():
    @jsn.linen.spectral_norm
    class Odd(nn.Module):
        width: int = 3

        @nn.nowrap
        def shape(self):
            return (self.width,)

        @property
        def double(self):
            return 2 * self.width

        @nn.compact
        def __call__(self, x):
            return nn.Dense(self.shape()[0])(x)

    assert Odd().shape() == (3,)
    assert Odd().double == 6
    assert Odd().apply(Odd().init(KEY, X), X).shape == (4, 3)
