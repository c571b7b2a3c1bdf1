"""The NNX adapter: parameters stay raw, whatever is done with the wrapper."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pages
import pytest
from flax import errors, nnx

import jsn

X = jnp.asarray(np.random.default_rng(0).normal(size=(5, 8)), jnp.float32)


class Net(nnx.Module):
    """Two layers, a list of layers, batch statistics, random keys, a second argument."""

    kind = "net"

    def __init__(self, rngs):
        self.first = nnx.Linear(8, 16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.rest = nnx.List([nnx.Linear(16, 8, rngs=rngs)])
        self.calls = 0

    def __call__(self, x, shift=0.0, *, gain=1.0):
        return gain * self.rest[0](self.dropout(self.encode(x))) + shift

    def encode(self, x):
        return self.norm(self.first(x))

    def count(self):
        self.calls += 1
        return self.calls

    def forget(self):
        del self.calls

    @property
    def kernel(self):
        return self.first.kernel[...]

    @staticmethod
    def about():
        return "static"


def norm(W):
    """The true norm of a kernel, as the matrix onto its last axis."""
    W = np.asarray(W[...], np.float64)
    return np.linalg.norm(W.reshape(-1, W.shape[-1]), 2)


def raw(module):
    return [np.array(leaf) for leaf in jax.tree.leaves(nnx.state(module, nnx.Param))]


def values(module):
    """All Variables, random keys as their data."""
    leaves = jax.tree.leaves(nnx.state(module))
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return [np.array(jax.random.key_data(x) if is_key(x) else x) for x in leaves]


def assert_same(before, after):
    assert len(before) == len(after)
    for x, y in zip(before, after, strict=True):
        np.testing.assert_array_equal(x, y)


def net(**options):
    return jsn.nnx.spectral_norm(Net(nnx.Rngs(0)), **options)


def scaled(factor, size=4):
    """A wrapped linear layer whose kernel is a multiple of the identity."""
    layer = nnx.Linear(size, size, rngs=nnx.Rngs(0))
    layer.kernel[...] = factor * jnp.eye(size)
    return layer, jsn.nnx.spectral_norm(layer)


# --- the defects of flax.nnx.SpectralNorm, one by one -----------------------------------------


def test_defect_nnx_one_eval_call_turns_4_identity_into_identity():
    layer, wrapper = scaled(4.0)
    wrapper.eval()
    y = wrapper(jnp.ones((1, 4)))
    np.testing.assert_array_equal(layer.kernel[...], 4 * np.eye(4))
    np.testing.assert_allclose(y, np.ones((1, 4)), rtol=1e-6)


def test_defect_nnx_sgd_with_learning_rate_0_changes_weights():
    wrapper = net()
    optimizer = nnx.Optimizer(wrapper, optax.sgd(0.0), wrt=nnx.Param)
    before = raw(wrapper)

    @nnx.jit
    def step(wrapper, optimizer, x):
        grads = nnx.grad(lambda wrapper: (wrapper(x) ** 2).sum())(wrapper)
        optimizer.update(wrapper, grads)

    blocks = [np.array(u) for u in jax.tree.leaves(nnx.state(wrapper, jsn.nnx.SpectralState))]
    for _ in range(3):
        step(wrapper, optimizer, X)
    assert_same(before, raw(wrapper))
    moved = jax.tree.leaves(nnx.state(wrapper, jsn.nnx.SpectralState))
    assert any((x != y).any() for x, y in zip(blocks, moved, strict=True))


def test_defect_nnx_a_tied_layer_used_elsewhere_is_altered():
    class Tied(nnx.Module):
        def __init__(self):
            self.plain, self.wrapped = scaled(4.0)

        def __call__(self, x):
            return self.plain(x), self.wrapped(x), self.plain(x)

    model = Tied()
    before, inside, after = model(jnp.ones((1, 4)))
    np.testing.assert_array_equal(before, 4 * np.ones((1, 4)))
    np.testing.assert_allclose(inside, np.ones((1, 4)), rtol=1e-6)
    np.testing.assert_array_equal(after, 4 * np.ones((1, 4)))
    assert len(jax.tree.leaves(nnx.state(model, nnx.Param))) == 2  # still one layer


@pytest.mark.parametrize(
    "transform",
    [
        jax.jit,
        jax.vmap,
        lambda f: jax.grad(lambda x: f(x).sum()),
        jax.checkpoint,
        lambda f: jax.jit(jax.grad(lambda x: jax.checkpoint(f)(x).sum())),
        lambda f: lambda x: jax.lax.scan(lambda carry, x: (carry, f(x)), 0, x)[1],
    ],
    ids=["jit", "vmap", "grad", "checkpoint", "all", "scan"],
)
def test_defect_nnx_eval_in_closures_raises_trace_context_error(transform):
    wrapper = net()
    wrapper.eval()
    before = raw(wrapper)
    result = transform(lambda x: wrapper(x))(X)
    plain = transform(lambda x: jsn.nnx.normalize(wrapper)(x))(X)
    np.testing.assert_allclose(result, plain, rtol=1e-5, atol=1e-6)
    assert_same(before, raw(wrapper))


def test_defect_nnx_two_argument_calls_fail():
    wrapper = net()
    wrapper.eval()
    y = wrapper(X)
    np.testing.assert_allclose(wrapper(X, 1.0), y + 1, rtol=1e-5)
    np.testing.assert_allclose(wrapper(X, shift=1.0, gain=2.0), 2 * y + 1, rtol=1e-5)


# --- training ---------------------------------------------------------------------------------


def test_training_moves_raw_weights_by_the_gradient_of_the_normalized_model():
    wrapper = net(rules=jsn.FLAX, block_size=4)
    wrapper.dropout.deterministic = True
    params = nnx.state(wrapper.module, nnx.Param)
    state = jsn.init(params, block_size=4)
    before = raw(wrapper)
    graphdef, _, rest = nnx.split(wrapper.module, nnx.Param, ...)

    def loss(params):
        module = nnx.merge(graphdef, jsn.normalize(params, state)[0], rest, copy=True)
        return (module(X) ** 2).sum()

    expected = jax.jit(jax.grad(loss))(params)
    grads = nnx.jit(nnx.grad(lambda wrapper: (wrapper(X) ** 2).sum()))(wrapper)
    for x, y in zip(jax.tree.leaves(expected), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
    assert_same(before, raw(wrapper))
    optimizer = nnx.Optimizer(wrapper, optax.sgd(0.1), wrt=nnx.Param)
    optimizer.update(wrapper, grads)
    for old, grad, new in zip(before, jax.tree.leaves(grads), raw(wrapper), strict=True):
        np.testing.assert_allclose(new, old - 0.1 * np.asarray(grad), rtol=1e-6, atol=1e-7)


def test_the_norm_is_the_bound_while_training():
    wrapper = net(bound=2.0)
    optimizer = nnx.Optimizer(wrapper, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(wrapper, optimizer, x):
        grads = nnx.grad(lambda wrapper: -(wrapper(x) ** 2).mean())(wrapper)
        optimizer.update(wrapper, grads)

    for _ in range(20):
        step(wrapper, optimizer, X)
        seen = jsn.nnx.normalize(wrapper)
        assert norm(seen.first.kernel) == pytest.approx(2, rel=1e-3)
        assert norm(seen.rest[0].kernel) == pytest.approx(2, rel=1e-3)
    assert norm(wrapper.module.first.kernel) > 2.5


@pytest.mark.slow
def test_batch_statistics_and_random_keys_advance_as_without_jsn():
    wrapper, plain = net(), Net(nnx.Rngs(0))
    for module in (wrapper.module, plain):  # equal, since norm 1 in both
        for layer in (module.first, module.rest[0]):
            layer.kernel[...] = jnp.eye(*layer.kernel.shape)
    wrapper = jsn.nnx.spectral_norm(wrapper.module)
    for _ in range(3):
        np.testing.assert_allclose(wrapper(X), plain(X), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(wrapper.module.norm.mean[...], plain.norm.mean[...], rtol=1e-5)
    assert wrapper.module.dropout.rngs.count[...] == plain.dropout.rngs.count[...] == 3


def test_train_and_eval_switch_the_wrapper_and_what_it_wraps():
    wrapper = net()
    assert not wrapper.use_running_average
    model = nnx.Sequential(wrapper)
    model.eval()
    assert wrapper.use_running_average
    assert wrapper.module.norm.use_running_average
    assert wrapper.module.dropout.deterministic
    blocks = jax.tree.leaves(nnx.state(wrapper, jsn.nnx.SpectralState))
    model(X)
    assert all(
        x is y
        for x, y in zip(
            blocks, jax.tree.leaves(nnx.state(wrapper, jsn.nnx.SpectralState)), strict=True
        )
    )
    model.train()
    assert not wrapper.use_running_average
    assert not wrapper.module.dropout.deterministic


@pytest.mark.skipif(not hasattr(nnx, "view"), reason="this flax has no nnx.view")
def test_nnx_view_gives_an_eval_view():
    wrapper = net()
    view = nnx.view(wrapper, use_running_average=True, deterministic=True)
    assert view.use_running_average
    assert not wrapper.use_running_average
    np.testing.assert_allclose(view(X), view(X))
    assert not nnx.view(wrapper, deterministic=True).use_running_average  # not its switch


def test_training_in_a_closure_says_what_to_do():
    wrapper = net()
    with pytest.raises(errors.TraceContextError) as error:
        jax.jit(lambda x: wrapper(x))(X)
    assert any("call .eval() on it first" in note for note in error.value.__notes__)


def test_normalize_takes_one_step_for_several_forward_passes():
    wrapper = net(block_size=1, warmup=0)
    twin = copy.deepcopy(wrapper)

    def loss(wrapper):
        critic = jsn.nnx.normalize(wrapper)
        return (critic(X) - critic(2 * X)).mean()

    nnx.jit(nnx.grad(loss))(wrapper)
    twin(X)  # one call is one step
    for x, y in zip(
        jax.tree.leaves(nnx.state(wrapper, jsn.nnx.SpectralState)),
        jax.tree.leaves(nnx.state(twin, jsn.nnx.SpectralState)),
        strict=True,
    ):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
    assert wrapper.module.dropout.rngs.count[...] == 2


# --- nnx transforms and state -----------------------------------------------------------------


def test_split_merge_filters_and_state():
    wrapper = net()
    graphdef, params, blocks, rest = nnx.split(wrapper, nnx.Param, jsn.nnx.SpectralState, ...)
    assert len(jax.tree.leaves(params)) == 6
    assert [path for path, _ in nnx.to_flat_state(blocks)] == [
        ("sn_state", "first", "kernel"),
        ("sn_state", "rest", 0, "kernel"),
    ]
    merged = nnx.merge(graphdef, params, blocks, rest)
    merged.eval()
    wrapper.eval()
    np.testing.assert_array_equal(merged(X), wrapper(X))
    nnx.update(wrapper, params, blocks)
    assert hash(nnx.split(wrapper)[0]) == hash(nnx.split(merged)[0])


def test_plain_jax_transforms_take_the_wrapper_as_an_argument():
    wrapper = net()
    wrapper.eval()
    np.testing.assert_allclose(jax.jit(lambda m, x: m(x))(wrapper, X), wrapper(X), rtol=1e-5)


@pytest.mark.slow
def test_stacks_made_by_vmap_run_by_vmap_scan_and_remat():
    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=0, out_axes=0)
    def create(rngs):
        return jsn.nnx.spectral_norm(nnx.Linear(8, 8, rngs=rngs))

    stack = create(nnx.Rngs(0))
    stack.module.kernel[...] *= jnp.array([1.0, 10.0, 0.1])[:, None, None]
    before = raw(stack)
    assert stack.sn_state["kernel"].shape == (3, 8, 8)

    @nnx.jit
    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def chain(x, layer):
        return nnx.remat(lambda layer, x: layer(x))(layer, x)

    for _ in range(30):
        y = chain(X, stack)
    each = nnx.jit(nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None)))(stack, X)
    assert_same(before, raw(stack))
    plain = jsn.nnx.fold(stack)
    for W in np.asarray(plain.kernel[...]):
        assert norm(W) == pytest.approx(1, rel=1e-4)
    expected = X
    for W in plain.kernel[...]:
        expected = expected @ W
    np.testing.assert_allclose(y, expected, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(each, jnp.einsum("bi,lio->lbo", X, plain.kernel[...]), atol=1e-4)


def test_each_layer_of_a_wrapped_scan_stack_gets_its_own_sigma():
    class Stack(nnx.Module):
        def __init__(self, rngs):
            @nnx.split_rngs(splits=3)
            @nnx.vmap(in_axes=0, out_axes=0)
            def create(rngs):
                return nnx.Linear(8, 8, rngs=rngs)

            self.layers = create(rngs)

        def __call__(self, x):
            forward = nnx.scan(
                lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry
            )
            return forward(x, self.layers)

    wrapper = jsn.nnx.spectral_norm(Stack(nnx.Rngs(0)))
    wrapper(X)
    for W in np.asarray(jsn.nnx.fold(wrapper).layers.kernel[...]):
        assert norm(W) == pytest.approx(1, rel=1e-4)
    grads = nnx.jit(nnx.grad(lambda wrapper: wrapper(X).sum()))(wrapper)
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_nnx_vmap_with_a_shared_wrapper():
    wrapper = net()
    wrapper.dropout.deterministic = True
    wrapper.norm.use_running_average = True
    y = nnx.jit(nnx.vmap(lambda wrapper, x: wrapper(x), in_axes=(None, 0)))(wrapper, X)
    wrapper.eval()
    np.testing.assert_allclose(y, wrapper(X), rtol=1e-4, atol=1e-5)


def test_orbax_round_trip(tmp_path):
    checkpoint = pytest.importorskip("orbax.checkpoint")
    wrapper = net()
    wrapper(X)
    graphdef, state = nnx.split(wrapper)
    with checkpoint.StandardCheckpointer() as saver:
        saver.save(tmp_path / "model", state)
        saver.wait_until_finished()
        abstract = nnx.state(nnx.eval_shape(net))
        restored = nnx.merge(graphdef, saver.restore(tmp_path / "model", abstract))
    wrapper.eval()
    restored.eval()
    np.testing.assert_array_equal(restored(X), wrapper(X))


def test_copies_are_independent():
    wrapper = net()
    copies = [copy.deepcopy(wrapper), nnx.clone(wrapper)]
    blocks = nnx.to_pure_dict(nnx.state(wrapper, jsn.nnx.SpectralState))
    for other in copies:
        assert isinstance(other, jsn.nnx.SpectralNorm)
        other(X)
        other.module.first.kernel[...] *= 3
    for x, y in zip(
        jax.tree.leaves(blocks),
        jax.tree.leaves(nnx.to_pure_dict(nnx.state(wrapper, jsn.nnx.SpectralState))),
        strict=True,
    ):
        np.testing.assert_array_equal(x, y)


def test_pickles_where_the_module_does():
    try:
        pickle.dumps(Net(nnx.Rngs(0)))
    except (AttributeError, pickle.PicklingError):
        pytest.skip("this flax keeps local functions in its layers")
    wrapper = net()
    wrapper.eval()
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(wrapper))(X), wrapper(X))


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(nnx, "capture"), reason="this flax has no nnx.capture")
def test_sown_values_arrive():
    class Sower(nnx.Module):
        def __init__(self):
            self.layer = nnx.Linear(8, 4, rngs=nnx.Rngs(0))

        def __call__(self, x):
            y = self.layer(x)
            self.sow(nnx.Intermediate, "features", y)
            return y

    wrapper = jsn.nnx.spectral_norm(Sower())
    y, found = nnx.capture(wrapper, nnx.Intermediate)(X)
    np.testing.assert_array_equal(found["module"]["features"][0], y)


@pytest.mark.slow
def test_autoregressive_decoding_keeps_its_cache():
    attention = nnx.MultiHeadAttention(2, 8, decode=True, rngs=nnx.Rngs(0))
    wrapper = jsn.nnx.spectral_norm(attention)
    wrapper.eval()
    wrapper.init_cache((1, 3, 8))
    assert attention.cache_index[...] == 0
    for step in range(3):
        wrapper(X[None, step : step + 1])
    assert attention.cache_index[...] == 3


# --- reaching into the wrapped module ---------------------------------------------------------


def test_methods_properties_and_submodules_see_normalized_weights():
    wrapper = net()
    wrapper.eval()
    plain = jsn.nnx.normalize(wrapper)
    np.testing.assert_allclose(wrapper.encode(X), plain.encode(X), rtol=1e-6)
    np.testing.assert_allclose(wrapper.first(X), plain.first(X), rtol=1e-6)
    np.testing.assert_allclose(wrapper.first.__call__(X), plain.first(X), rtol=1e-6)
    np.testing.assert_allclose(wrapper.rest[0](wrapper.first(X)), plain.rest[0](plain.first(X)))
    assert len(wrapper.rest) == len(list(wrapper.rest)) == 1
    assert norm(wrapper.kernel) == pytest.approx(1, rel=1e-5)
    assert wrapper.about() == "static"
    assert wrapper.kind == "net"
    assert "Linear" in repr(wrapper.first)


def test_variables_reached_through_the_wrapper_are_the_raw_ones():
    wrapper = net()
    assert wrapper.first.kernel is wrapper.module.first.kernel
    wrapper.first.kernel[...] *= 2
    wrapper.norm.use_running_average = True
    assert wrapper.module.norm.use_running_average
    assert not wrapper.use_running_average


def test_attributes_are_set_where_they_are():
    wrapper = net()
    wrapper.calls = 5
    assert wrapper.module.calls == 5
    assert wrapper.count() == wrapper.calls == 6
    wrapper.tag = "mine"
    assert not hasattr(wrapper.module, "tag")
    with pytest.raises(AttributeError, match="nothing"):
        wrapper.nothing  # noqa: B018
    wrapper.forget()
    assert not hasattr(wrapper.module, "calls")


def test_a_property_takes_no_power_step():
    wrapper = net(block_size=1, warmup=0)
    before = np.array(wrapper.sn_state["first"]["kernel"][...])
    wrapper.kernel  # noqa: B018
    np.testing.assert_array_equal(wrapper.sn_state["first"]["kernel"][...], before)


# --- which weights, as what -------------------------------------------------------------------


def test_attention_is_the_matrix_its_layers_apply():
    module = nnx.MultiHeadAttention(4, 8, rngs=nnx.Rngs(0), decode=False)
    plain = jsn.nnx.fold(jsn.nnx.spectral_norm(module))
    for name in ("query", "key", "value"):
        W = np.asarray(getattr(plain, name).kernel[...])
        assert W.shape == (8, 4, 2)
        assert norm(W.reshape(8, 8)) == pytest.approx(1, rel=1e-4)
    W = np.asarray(plain.out.kernel[...])
    assert norm(W.reshape(8, 8)) == pytest.approx(1, rel=1e-4)
    np.testing.assert_array_equal(plain.query.bias[...], module.query.bias[...])


EINSUMS = [
    ("bi, io -> bo", (3, 4), jsn.Matrix(in_axis=(0,), out_axis=(1,))),
    ("bhi,hio->bho", (2, 3, 4), jsn.Matrix(in_axis=(1,), out_axis=(2,), batch_axis=(0,))),
    ("bi,opi->bop", (5, 6, 3), jsn.Matrix(in_axis=(2,), out_axis=(0, 1))),
    # No matrix of its equation, and so the one that the default rules know:
    ("bi...,io->bo...", (3, 4), jsn.Matrix()),
    ("bi,kio->bo", (2, 3, 4), jsn.Matrix()),
]


def test_the_equation_of_an_einsum_tells_its_axes():
    class Layers(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(3, 4, (2, 2), rngs=rngs)
            for index, (equation, shape, _) in enumerate(EINSUMS):
                setattr(self, f"einsum{index}", nnx.Einsum(equation, shape, rngs=rngs))

    wrapper = jsn.nnx.spectral_norm(Layers(nnx.Rngs(0)), block_size=1, warmup=0)
    expected = {f"einsum{index}/kernel": operator for index, (*_, operator) in enumerate(EINSUMS)}
    assert dict(wrapper.operators) == {"conv/kernel": jsn.Matrix(), **expected}


@pytest.mark.slow
def test_linear_general_einsum_and_conv_axes():
    class Layers(nnx.Module):
        def __init__(self, rngs):
            self.general = nnx.LinearGeneral(
                (3, 4), (5, 6), axis=(1, 2), batch_axis={0: 2}, rngs=rngs
            )
            self.einsum = nnx.Einsum("bhi,hio->bho", (2, 3, 4), rngs=rngs)
            self.out_first = nnx.Einsum("bi,opi->bop", (5, 6, 3), rngs=rngs)
            self.unknown = nnx.Einsum("bi...,io->bo...", (3, 4), rngs=rngs)
            self.conv = nnx.Conv(3, 4, (2, 2), rngs=rngs)
            self.embed = nnx.Embed(5, 3, rngs=rngs)

    wrapper = jsn.nnx.spectral_norm(Layers(nnx.Rngs(0)))
    assert dict(wrapper.operators) == {
        "general/kernel": jsn.Matrix(in_axis=None, out_axis=(-2, -1), batch_axis=0),
        "einsum/kernel": jsn.Matrix(in_axis=(1,), out_axis=(2,), batch_axis=(0,)),
        "out_first/kernel": jsn.Matrix(in_axis=(2,), out_axis=(0, 1)),
        "unknown/kernel": jsn.Matrix(),
        "conv/kernel": jsn.Matrix(),
    }
    plain = jsn.nnx.fold(wrapper)
    for W in np.asarray(plain.general.kernel[...]).reshape(2, 12, 30):
        assert norm(W) == pytest.approx(1, rel=1e-4)
    assert norm(np.asarray(plain.out_first.kernel[...]).reshape(30, 3)) == pytest.approx(1, 1e-4)
    assert norm(plain.conv.kernel) == pytest.approx(1, rel=1e-4)


def test_rules_of_ones_own_are_taken_as_they_are():
    wrapper = net(rules=((r"^first/kernel$", jsn.Matrix()),))
    assert [path for path, _ in wrapper.operators] == ["first/kernel"]
    plain = jsn.nnx.fold(wrapper)
    np.testing.assert_array_equal(plain.rest[0].kernel[...], wrapper.rest[0].kernel[...])


@pytest.mark.slow
def test_a_module_goes_through_init_and_normalize_as_a_plain_tree():
    module = Net(nnx.Rngs(0))
    params = nnx.state(module, nnx.Param)
    state = jsn.init(params)
    view, state = jax.jit(jsn.normalize)(params, state)
    assert type(view) is type(params)
    assert isinstance(view["first"]["kernel"], nnx.Param)
    assert norm(view["first"]["kernel"]) == pytest.approx(1, rel=1e-4)
    wrapper = jsn.nnx.spectral_norm(module)
    same, _ = jsn.normalize(params, jsn.nnx.sn_state(wrapper))
    np.testing.assert_allclose(
        same["first"]["kernel"][...], view["first"]["kernel"][...], rtol=1e-4
    )


def test_dtypes_and_metadata_stay():
    init = nnx.with_metadata(nnx.initializers.lecun_normal(), note="mine")
    layer = nnx.Linear(8, 4, param_dtype=jnp.bfloat16, kernel_init=init, rngs=nnx.Rngs(0))
    plain = jsn.nnx.fold(jsn.nnx.spectral_norm(layer))
    assert plain.kernel[...].dtype == jnp.bfloat16
    assert plain.kernel.note == layer.kernel.note == "mine"


# --- bound, soft, scale -----------------------------------------------------------------------


def test_bound_as_a_tree_of_numbers_is_static():
    bound = {
        "first": 0.5,
        "norm": 1.0,
        "rest": {0: {"kernel": 3.0, "bias": 1.0}},
    }
    wrapper = net(bound=bound)
    assert not isinstance(jax.tree.leaves(nnx.state(wrapper))[0], float)
    plain = jsn.nnx.fold(wrapper)
    assert norm(plain.first.kernel) == pytest.approx(0.5, rel=1e-4)
    assert norm(plain.rest[0].kernel) == pytest.approx(3, rel=1e-4)
    hash(nnx.split(wrapper)[0])


def test_bound_as_a_tree_of_arrays_is_data():
    layer, _ = scaled(4)
    wrapper = jsn.nnx.spectral_norm(layer, bound={"kernel": jnp.float32(0.5), "bias": None})
    plain = jsn.nnx.fold(wrapper)
    assert norm(plain.kernel) == pytest.approx(0.5, rel=1e-5)
    wrapper.bound = jax.tree.map(lambda x: 2 * x, wrapper.bound)
    assert norm(jsn.nnx.fold(wrapper).kernel) == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize(
    "tree", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["one", "tree"]
)
def test_a_scale_is_learned_with_the_other_parameters(tree):
    gain = nnx.Param(jnp.float32(1.0))
    scale = {"first": gain, "norm": None, "rest": 2.0} if tree else gain
    wrapper = net(scale=scale)
    optimizer = nnx.Optimizer(wrapper, optax.sgd(0.1), wrt=nnx.Param)
    grads = nnx.jit(nnx.grad(lambda wrapper: wrapper(X).sum()))(wrapper)
    optimizer.update(wrapper, grads)
    assert gain[...] != 1
    plain = jsn.nnx.fold(wrapper)
    assert norm(plain.first.kernel) == pytest.approx(abs(float(gain[...])), rel=1e-4)
    factor = 2 if tree else abs(float(gain[...]))
    assert norm(plain.rest[0].kernel) == pytest.approx(factor, rel=1e-4)


def test_soft_leaves_small_weights_alone():
    layer, _ = scaled(0.5)
    plain = jsn.nnx.fold(jsn.nnx.spectral_norm(layer, soft=True))
    np.testing.assert_array_equal(plain.kernel[...], layer.kernel[...])


# --- folding, nesting -------------------------------------------------------------------------


def test_fold_returns_a_plain_module_and_writes_nothing():
    wrapper = net()
    wrapper(X)
    wrapper.eval()
    before = values(wrapper)
    plain = jsn.nnx.fold(wrapper)
    assert type(plain) is Net
    plain.first.kernel[...] = jnp.zeros_like(plain.first.kernel[...])
    plain.first.bias[...] = jnp.ones_like(plain.first.bias[...])
    plain.train()
    plain(X)
    assert_same(before, values(wrapper))
    np.testing.assert_allclose(jsn.nnx.fold(wrapper)(X), wrapper(X), rtol=1e-4, atol=1e-5)


def test_fold_and_normalize_find_wrappers_within_a_module():
    class Model(nnx.Module):
        def __init__(self):
            self.shared, self.wrapper = scaled(4.0)
            self.again = nnx.List([self.wrapper])
            self.table = nnx.data({"k": (self.wrapper, 3)})

        def __call__(self, x):
            return self.wrapper(x)

    model = Model()
    for make in (jsn.nnx.fold, jsn.nnx.normalize):
        plain = make(model)
        assert plain.wrapper is plain.again[0] is plain.table["k"][0]
        assert type(plain.wrapper) is nnx.Linear
        assert norm(plain.wrapper.kernel) == pytest.approx(1, rel=1e-5)
        assert norm(plain.shared.kernel) == norm(model.shared.kernel) == 4
    assert isinstance(model.wrapper, jsn.nnx.SpectralNorm)


def test_a_wrapper_within_a_wrapped_module_keeps_its_weights():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.head = jsn.nnx.spectral_norm(nnx.Linear(8, 4, rngs=rngs), bound=0.5)
            self.body = nnx.Linear(8, 8, rngs=rngs)

        def __call__(self, x):
            return self.head(self.body(x))

    wrapper = jsn.nnx.spectral_norm(Model(nnx.Rngs(0)))
    assert [path for path, _ in wrapper.operators] == ["body/kernel"]
    plain = jsn.nnx.fold(wrapper)
    assert norm(plain.head.kernel) == pytest.approx(0.5, rel=1e-4)
    assert norm(plain.body.kernel) == pytest.approx(1, rel=1e-4)
    wrapper.eval()
    np.testing.assert_allclose(wrapper(X), plain(X), rtol=1e-4, atol=1e-5)


# --- errors -----------------------------------------------------------------------------------


def test_errors():
    with pytest.raises(TypeError, match=r"expected a flax.nnx.Module, found the class Linear"):
        jsn.nnx.spectral_norm(nnx.Linear)
    with pytest.raises(TypeError, match="found an instance of"):
        jsn.nnx.spectral_norm({"kernel": jnp.ones((2, 2))})
    with pytest.raises(ValueError, match="wrapped already"):
        jsn.nnx.spectral_norm(net())
    for call in (jsn.nnx.fold, jsn.nnx.normalize, jsn.nnx.sn_state):
        with pytest.raises(ValueError, match=r"jsn.nnx.\w+: found no wrapper in this Net"):
            call(Net(nnx.Rngs(0)))
    with pytest.raises(ValueError, match="bound is not usable"):
        net(bound=-1.0)
    with pytest.raises(ValueError, match="first/kernel: found 0"):
        net(bound={"first": 0, "norm": 1.0, "rest": 1.0})
    with pytest.raises(ValueError, match="not a tree prefix"):
        net(bound={"first": 1.0})
    with pytest.raises(ValueError, match="n_steps"):
        net(n_steps=-3)
    with pytest.raises(ValueError, match="n_steps"):
        jsn.nnx.fold(net(), n_steps=-1)
    with pytest.raises(ValueError, match="no leaf of the parameters is normalized"):
        jsn.nnx.spectral_norm(nnx.Embed(3, 4, rngs=nnx.Rngs(0)))


@pytest.mark.slow
def test_the_page_runs():
    with jax.numpy_rank_promotion("allow"):
        pages.run("nnx.md")
