"""`jsn.linen.operators`: every layer is read as the map that it is, and nothing is skipped."""

import collections
import functools
import re
import warnings
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest
from flax import traverse_util

import jsn

KEY = jax.random.key(0)
Matrix, Conv = jsn.Matrix, jsn.Conv


def read(model, *args, **kwargs):
    """The rules of a model, by path; a warning fails the test."""
    rules = jsn.linen.operators(model, *args, **kwargs)
    assert all(pattern.startswith("^") and pattern.endswith("$") for pattern, _ in rules)
    return {re.sub(r"\\(.)", r"\1", pattern[1:-1]): operator for pattern, operator in rules}


def told(model, *args, **kwargs):
    """The rules of a model, and the one warning that comes with them."""
    with pytest.warns(UserWarning, match="jsn.linen.operators") as caught:
        rules = read(model, *args, **kwargs)
    assert len(caught) == 1
    return rules, str(caught[0].message)


def same(operator, shape, expected) -> bool:
    """Whether two matrices have the same axes on a weight of this shape."""
    sides = ("domain", "codomain", "batch")
    labels = tuple(range(101, 101 + len(shape)))  # sizes that name their axis
    return type(operator) is type(expected) and all(
        getattr(operator, side)(labels) == getattr(expected, side)(labels) for side in sides
    )


def inits(model, *args):
    return traverse_util.flatten_dict(made(model, *args)["params"], sep="/")


def made(model, *args):
    """The variables of a model: compiled, which is faster than `model.init` by itself."""
    return jax.jit(model.init)(KEY, *args)


def tracked(model, *args):
    """Paths and operators in the state of a decorated model."""
    return jax.eval_shape(model.init, KEY, *args)["sn_state"]["spectral_norm"].operators


def normalized(params, rules):
    """The parameters after 15 power steps."""
    return jax.jit(jsn.fold)(params, jsn.init(params, rules=rules))


# --- layers ---------------------------------------------------------------------------------------


X = jnp.ones((2, 6, 8))
LAYERS = {
    "dense": (nn.Dense(4), X, Matrix()),
    "dense_general": (nn.DenseGeneral((4, 3)), X, Matrix(out_axis=(-2, -1))),
    "dense_general_in": (nn.DenseGeneral(5, axis=(-2, -1)), X, Matrix(out_axis=-1)),
    "dense_general_batch": (
        nn.DenseGeneral(5, axis=-1, batch_dims=(0,)),
        X,
        Matrix(out_axis=-1, batch_axis=0),
    ),
    "einsum": (nn.Einsum((8, 2, 5), "...d,dhe->...he"), X, Matrix(0, (1, 2))),
    "einsum_reversed": (nn.Einsum((5, 8), "abd,ed->abe", use_bias=False), X, Matrix(1, 0)),
    "einsum_batch": (nn.Einsum((8, 6, 5), "bnd,dne->bne", use_bias=False), X, Matrix(0, 2, 1)),
    "conv": (nn.Conv(4, (3,), strides=2), X, Conv((6, 8), 2)),
    "conv_int": (nn.Conv(4, 3, padding="CAUSAL"), X, Conv((6, 8), padding="CAUSAL")),
    "conv_groups": (
        nn.Conv(8, (3,), feature_group_count=4, kernel_dilation=2, padding="CIRCULAR"),
        X,
        Conv((6, 8), 1, "CIRCULAR", 2, 4),
    ),
    "conv_no_batch": (nn.Conv(4, (2, 3)), X, Conv((2, 6, 8))),
    "conv_pads": (nn.Conv(4, (2,), padding=[(2, 1)]), X, Conv((6, 8), padding=[(2, 1)])),
    "conv_transpose": (
        nn.ConvTranspose(4, (3,), strides=(2,), padding="VALID"),
        X,
        Conv((6, 8), 2, "VALID", transpose=True),
    ),
    "patches": (nn.Conv(4, (3,), strides=3), X, Matrix()),
    "pointwise": (nn.Conv(4, (1,)), X, Matrix()),
    "upsampling": (nn.ConvTranspose(4, (2,), strides=(2,)), X, Matrix(-2, None)),
}


@functools.cache
def normalized_layers():
    """The operator and the normalized Jacobian of each layer: one program for all of them."""
    kernels = {name: inits(layer, x)["kernel"] for name, (layer, x, _) in LAYERS.items()}
    views = {name: list(read(layer, x).values()) for name, (layer, x, _) in LAYERS.items()}
    rules = [(f"^{name}$", view) for name, (view,) in views.items()]
    state = jsn.init(kernels, rules=rules)

    def run(kernels, state):
        normalized, _ = jsn.normalize(kernels, state, n_steps=15)
        found = {}
        for name, (layer, x, _) in LAYERS.items():
            linear, params = layer.clone(use_bias=False), {"kernel": normalized[name]}
            apply = functools.partial(linear.apply, {"params": params})
            found[name] = jax.jacobian(apply)(x if "batch" in name else x[:1])
        return found

    return kernels, dict(rules), jax.jit(run)(kernels, state)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_read_as_its_own_map(name):
    _, x, expected = LAYERS[name]
    kernels, rules, jacobians = normalized_layers()
    operator = rules[f"^{name}$"]
    if isinstance(expected, Conv):
        assert operator == expected
    else:
        assert same(operator, kernels[name].shape, expected)
    # And normalized so, the Jacobian of the layer has norm 1 (for each batch entry).
    size = x.size if "batch" in name else x[:1].size
    norm = np.linalg.norm(np.asarray(jacobians[name], np.float64).reshape(-1, size), 2)
    assert norm == pytest.approx(1, abs=1e-4)


def test_embeddings_are_maps_of_one_hot_vectors():
    class Tied(nn.Module):
        @nn.compact
        def __call__(self, ids):
            embed = nn.Embed(7, 4)
            return embed.attend(embed(ids))

    assert read(Tied(), jnp.zeros((2, 3), int)) == {"Embed_0/embedding": Matrix()}


CELLS = {
    "SimpleCell": {"i", "h"},
    "LSTMCell": {"ii", "if", "ig", "io", "hi", "hf", "hg", "ho"},
    "OptimizedLSTMCell": {"ii", "if", "ig", "io", "hi", "hf", "hg", "ho"},
    "GRUCell": {"ir", "iz", "in", "hr", "hz", "hn"},
    "MGUCell": {"if", "in", "hf", "hn"},
}


@pytest.mark.parametrize("name", CELLS)
def test_each_gate_of_a_recurrent_cell_is_a_weight(name):
    rules = read(nn.RNN(getattr(nn, name)(5)), jnp.ones((2, 7, 3)))
    assert rules == {f"cell/{gate}/kernel": Matrix() for gate in CELLS[name]}


def test_a_convolutional_cell_is_read_at_its_own_sizes():
    rules = read(nn.RNN(nn.ConvLSTMCell(4, (3, 3))), jnp.ones((2, 7, 6, 5, 3)))
    assert rules == {"cell/ih/kernel": Conv((6, 5, 3)), "cell/hh/kernel": Conv((6, 5, 4))}


def test_both_directions_of_a_bidirectional_network_are_read():
    model = nn.Bidirectional(nn.RNN(nn.SimpleCell(5)), nn.RNN(nn.SimpleCell(5)))
    assert len(read(model, jnp.ones((2, 7, 3)))) == 4


def test_norm_layers_and_biases_are_no_weights():
    class Norms(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.BatchNorm(use_running_average=False)(x)
            x = nn.LayerNorm(reduction_axes=(-2, -1), feature_axes=(-2, -1))(x)
            x = nn.GroupNorm(2)(nn.RMSNorm()(x))
            return nn.DenseGeneral((2, 3))(nn.PReLU()(x))

    assert list(read(Norms(), X)) == ["DenseGeneral_0/kernel"]


# --- attention ------------------------------------------------------------------------------------


def heads_norms(kernel, name):
    """The norm of one projection, jointly and for each head."""
    kernel = np.asarray(kernel, np.float64)
    per_head = np.moveaxis(kernel, 0 if name == "out" else 1, 0)
    joint = kernel.reshape(-1, kernel.shape[-1]) if name == "out" else kernel.reshape(8, -1)
    return np.linalg.norm(joint, 2), [np.linalg.norm(head, 2) for head in per_head]


@pytest.mark.parametrize("per_head", [False, True])
def test_attention_has_one_norm_for_all_heads_or_one_for_each(per_head):
    model = nn.MultiHeadDotProductAttention(4, qkv_features=12)
    rules = jsn.linen.operators(model, X, X, per_head=per_head)
    after = normalized(made(model, X, X)["params"], rules)
    for name in ("query", "key", "value", "out"):
        joint, each = heads_norms(after[name]["kernel"], name)
        if per_head:
            assert each == pytest.approx([1] * 4, abs=1e-5)
            assert 1 < joint < 2 + 1e-5
        else:
            assert joint == pytest.approx(1, abs=1e-5)


def test_per_head_is_for_attention_alone():
    plain = read(nn.DenseGeneral((4, 3)), X)
    assert read(nn.DenseGeneral((4, 3)), X, per_head=True) == plain
    assert len(read(nn.SelfAttention(2), X, per_head=True)) == 4

    class Gated(nn.MultiHeadDotProductAttention):
        @nn.compact
        def __call__(self, x):
            return nn.DenseGeneral(8, name="gate")(x) * super().__call__(x)

    rules = read(Gated(2), X, per_head=True)
    assert same(rules["gate/kernel"], (8, 8), Matrix())
    assert same(rules["query/kernel"], (8, 2, 4), Matrix(0, 2, 1))


# --- lifted axes ----------------------------------------------------------------------------------


class Layer(nn.Module):
    """Six wide, so that a stack of six of them is (6, 6, 6) in any order."""

    @nn.compact
    def __call__(self, x, _=None):
        return nn.Dense(6)(nn.tanh(nn.Conv(6, (3,))(x))), None


class Stack(nn.Module):
    """Six layers, lifted, with their axis anywhere."""

    axis: int
    scan: bool = True

    @nn.compact
    def __call__(self, x):
        options = {"variable_axes": {"params": self.axis}, "split_rngs": {"params": True}}
        if self.scan:
            return nn.scan(Layer, length=6, **options)()(x, None)[0]
        return nn.vmap(Layer, in_axes=None, axis_size=6, **options)()(x)[0]


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_the_layer_axis_is_found_though_all_sizes_are_equal(axis, scan):
    x = jnp.ones((2, 6, 6))
    name = "ScanLayer_0" if scan else "VmapLayer_0"
    rules = read(Stack(axis, scan), x)
    dense, conv = rules[f"{name}/Dense_0/kernel"], rules[f"{name}/Conv_0/kernel"]
    others = [a for a in range(3) if a != axis % 3]
    assert same(dense, (6, 6, 6), Matrix(*others, axis))
    assert conv == Conv((6, 6)).lifted((axis % 4,), 4)


def test_two_lifts_are_found_in_either_order():
    class Inner(nn.Module):
        @nn.compact
        def __call__(self, x):
            options = {"variable_axes": {"params": 1}, "split_rngs": {"params": True}}
            return nn.vmap(nn.Dense, in_axes=None, axis_size=4, **options)(4)(x).sum(0)

    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            options = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
            body = lambda inner, x, _: (inner(x), None)
            return nn.scan(body, length=4, **options)(Inner(), x, None)[0]

    (operator,) = read(Outer(), jnp.ones((3, 4))).values()
    assert same(operator, (4, 4, 4, 4), Matrix(1, 3, (0, 2)))


class Twofold(nn.Module):
    """A module without parameters."""

    def __call__(self, x):
        return 2 * x


OUTSIDE = Twofold()  # of no model: nothing is to be read there


def test_code_that_looks_at_lifted_weights_does_not_hide_their_axis():
    class Doubled(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(8, use_bias=False)(OUTSIDE(x))

    class Penalized(nn.Module):
        @nn.compact
        def __call__(self, x):
            options = {"variable_axes": {"params": 1}, "split_rngs": {"params": True}}
            layer = nn.vmap(Doubled, in_axes=None, axis_size=8, **options)()
            y = layer(x)
            kernel = layer.variables["params"]["Dense_0"]["kernel"]
            return y, jnp.sum(kernel) + kernel.mean()

    (operator,) = read(Penalized(), jnp.ones((2, 8))).values()
    assert same(operator, (8, 8, 8), Matrix(0, 2, 1))


def test_a_mixture_of_experts_is_a_batch_of_experts():
    class Experts(nn.Module):
        @nn.compact
        def __call__(self, x):
            options = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
            x = nn.vmap(nn.Dense, in_axes=None, axis_size=3, **options)(8)(x)
            x = nn.Einsum((3, 8, 8), "ebd,edf->ebf", use_bias=False)(x)
            return nn.DenseGeneral(8, batch_dims=(0,))(x)

    x = jax.random.normal(KEY, (5, 8))
    rules = jsn.linen.operators(Experts(), x)
    params = made(Experts(), x)["params"]
    state = jsn.init(params, rules=rules)
    after, sigmas = jax.jit(lambda *args: (jsn.fold(*args), jsn.sigmas(*args)))(params, state)
    kernels = [leaf for leaf in jax.tree.leaves(after) if leaf.ndim == 3]
    assert len(kernels) == 3
    for leaf in kernels:
        assert np.linalg.norm(leaf, 2, axis=(1, 2)) == pytest.approx([1] * 3, abs=1e-5)
    assert {sigma.shape for sigma in jax.tree.leaves(sigmas)} == {(3,)}


def test_metadata_boxes_do_not_hide_a_layer():
    init = nn.with_partitioning(nn.initializers.normal(), ("embed", "mlp"))
    options = {"variable_axes": {"params": 1}, "split_rngs": {"params": True}}
    options["metadata_params"] = {nn.PARTITION_NAME: "layers"}

    class Boxed(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.vmap(nn.Dense, in_axes=None, axis_size=8, **options)
            return layer(8, kernel_init=init, use_bias=False)(x)

    (operator,) = read(Boxed(), jnp.ones((2, 8))).values()
    assert same(operator, (8, 8, 8), Matrix(0, 2, 1))


def test_where_flax_does_not_tell_the_axis_the_smallest_is_taken_and_told():
    class Naked(nn.Module):
        """Reads its variables as only plain arrays can be read."""

        @nn.compact
        def __call__(self, x):
            layer = Stack(1)
            y = layer(x)
            kernel = layer.variables["params"]["ScanLayer_0"]["Dense_0"]["kernel"]
            if not self.is_initializing():
                assert isinstance(kernel, jax.Array)
            return y

    rules, message = told(Naked(), jnp.ones((2, 6, 6)))
    dense = rules["Stack_0/ScanLayer_0/Dense_0/kernel"]
    assert same(dense, (6, 6, 6), Matrix(1, 2, 0))
    assert "Dense_0/kernel: its shape leaves open which axes are lifted: took (0,)" in message


def test_the_default_rules_see_lifted_classes_too():
    options = {"variable_axes": {"params": 1}, "split_rngs": {"params": True}}
    dense = nn.vmap(nn.Dense, in_axes=None, axis_size=8, **options)

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return dense(8)(x)

    ((_, operator),) = tracked(jsn.linen.spectral_norm(Model)(), jnp.ones((2, 8)))
    assert same(operator, (8, 8, 8), Matrix(0, 2, 1))


# --- what cannot be read --------------------------------------------------------------------------


class Custom(nn.Module):
    """A layer with code of its own: offsets, a product, and something else."""

    @nn.compact
    def __call__(self, x):
        normal = nn.initializers.normal()
        x = x + self.param("position", normal, (1, 20, 8))[:, : x.shape[1]]
        token = self.param("token", normal, (1, 1, 8))
        x = jnp.concatenate([jnp.tile(token, (len(x), 1, 1)), x], axis=1)
        x = jnp.where(x > 0, x, self.param("masked", normal, (1, 1, 8)))
        x = jnp.einsum("bnd,hde->bnhe", x, self.param("product", normal, (2, 8, 3)))
        mixed = self.param("mixed", normal, (3, 3))
        return nn.Dense(4)(x @ (mixed / jnp.sum(mixed)))


def test_unknown_layers_are_named_and_offsets_are_not():
    rules, message = told(Custom(), X)
    assert rules == {"Dense_0/kernel": Matrix(), "product": None, "mixed": None}
    assert "2 weights could not be read exactly, and are left alone" in message
    assert "mixed: Custom is no layer that jsn knows" in message
    assert 'used as ("^product$", jsn.Matrix(in_axis=1, out_axis=(0, 2)))' in message.replace(
        "its program uses it as", "used as"
    )
    assert "position" not in message
    assert "token" not in message
    assert "masked" not in message


def test_the_suggested_rule_is_a_rule():
    _, message = told(Custom(), X)
    pattern, operator = eval(re.search(r"uses it as (\(.*\))", message)[1], {"jsn": jsn})
    own = [(pattern, operator), ("^mixed$", None)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rules = jsn.linen.operators(Custom(), X, rules=own)
    assert rules[:2] == tuple(own)
    product = normalized(made(Custom(), X)["params"], rules)["product"]
    joint = np.moveaxis(np.asarray(product), 1, 0).reshape(8, -1)
    assert np.linalg.norm(joint, 2) == pytest.approx(1, abs=1e-5)


def test_an_unknown_layer_in_a_lifted_stack_is_told_with_its_batch_axis():
    class Product(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return jnp.tanh(x @ self.param("w", nn.initializers.normal(), (8, 8))), None

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            options = {"variable_axes": {"params": 1}, "split_rngs": {"params": True}}
            return nn.scan(Product, length=8, **options)()(x, None)[0]

    rules, message = told(Model(), X)
    assert rules == {"ScanProduct_0/w": None}
    assert "jsn.Matrix(in_axis=0, out_axis=2, batch_axis=1)" in message


class Using(nn.Module):
    """A layer with one parameter, and any use of it."""

    shape: tuple
    use: Callable

    @nn.compact
    def __call__(self, x, _=None):
        return self.use(x, self.param("w", nn.initializers.normal(), self.shape)), None


def _halves(x, w):
    return jnp.einsum("bnd,hde->bnhe", x, w.reshape(2, 8, 3))


USES = {
    "cast and negated": ((8, 4), lambda x, w: x @ -w.astype(x.dtype), "in_axis=0, out_axis=1"),
    "squeezed": (
        (1, 8, 4),
        lambda x, w: x @ jnp.squeeze(w, 0),
        "in_axis=1, out_axis=2, batch_axis=0",
    ),
    "merged": ((2, 4, 3), lambda x, w: x @ w.reshape(8, 3), "in_axis=(0, 1), out_axis=2"),
    # Which axis is which can no longer be told:
    "cut in halves": ((16, 3), _halves, None),
    "joined": ((8, 2), lambda x, w: x @ jnp.concatenate([w, w], 1), None),
    "joined and turned": ((2, 8), lambda x, w: x @ jnp.concatenate([w, w]).T, None),
    "scanned by itself": (
        (8, 4),
        lambda x, w: x @ jax.lax.scan(lambda carry, row: (carry, -row), 0, w)[1],
        None,
    ),
}


@pytest.mark.parametrize("name", USES)
def test_the_use_of_a_parameter_is_read_from_the_program(name):
    shape, use, axes = USES[name]
    rules, message = told(Using(shape, use), X.astype(jnp.bfloat16))
    assert rules == {"w": None}
    suggestion = f'; its program uses it as ("^w$", jsn.Matrix({axes}))' if axes else ""
    assert f"w: Using is no layer that jsn knows{suggestion}\n" in message


def test_nothing_is_suggested_for_a_lifted_weight_whose_axes_were_guessed():
    class Naked(nn.Module):
        """Keeps Flax from telling the axis, by a look at raw variables."""

        @nn.compact
        def __call__(self, x):
            options = {"variable_axes": {"params": 1}, "split_rngs": {"params": True}}
            stack = nn.scan(Using, length=8, **options)((8, 8), lambda x, w: jnp.tanh(x @ w))
            y = stack(x, None)[0]
            w = stack.variables["params"]["w"]
            assert self.is_initializing() or isinstance(w, jax.Array)
            return y

    rules, message = told(Naked(), X)
    assert rules == {"ScanUsing_0/w": None}
    assert "w: Using is no layer that jsn knows\n" in message


def test_a_weight_that_is_changed_between_model_and_layer_is_told():
    turn = functools.partial(jax.tree.map, jnp.transpose)

    class Turned(nn.Module):
        @nn.compact
        def __call__(self, x):
            init = self.is_initializing()
            layer = nn.map_variables(nn.Dense, "params", turn, turn, init=init, mutable=False)
            return layer(4, use_bias=False)(x)

    rules, message = told(Turned(), X)
    assert list(rules.values()) == [None]
    assert "its layer gets shape (8, 4): it is changed on its way there" in message


class Standardized(nn.Conv):
    """Changes its kernel before it uses it, as weight standardization does."""

    def param(self, name, *args, **kwargs):
        value = super().param(name, *args, **kwargs)
        return value - value.mean() if name == "kernel" else value


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.WeightNorm(nn.Dense(4))(x)


class Twice(nn.Module):
    @nn.compact
    def __call__(self, x):
        layer = nn.Einsum((8, 8), use_bias=False)
        return layer(layer(x, "abd,de->abe"), "abd,ed->abe")


UNREADABLE = {
    "it holds a kernel for each place": nn.ConvLocal(4, (3,)),
    "the layer masks it": nn.Conv(4, (3,), mask=np.ones((3, 8, 4))),
    "transpose_kernel=True": nn.ConvTranspose(4, (3,), transpose_kernel=True),
    "the layer dilates its input": nn.Conv(4, (3,), padding=1, input_dilation=2),
    "Standardized changes its parameters": Standardized(4, (3,)),
    "WeightNorm changes it": Normed(),
    "as abd,kde->abe it is no matrix": nn.Einsum((2, 8, 3), "abd,kde->abe", use_bias=False),
    "its calls use it as Matrix(in_axis=0, out_axis=1) and as Matrix(in_axis=1": Twice(),
}


@pytest.mark.parametrize("what", UNREADABLE)
def test_what_a_layer_does_else_is_told_and_the_weight_left_alone(what):
    rules, message = told(UNREADABLE[what], X)
    assert list(rules.values()) == [None]
    assert what in message
    (path,) = rules
    assert f"{path}: " in message


def test_a_weight_that_the_call_does_not_use_is_told():
    class Heads(nn.Module):
        def setup(self):
            self.a, self.b = nn.Dense(3), nn.Dense(4)

        def __call__(self, x):
            return self.a(x)

        def other(self, x):
            return self.b(x)

    params = {**Heads().init(KEY, X)["params"], **Heads().init(KEY, X, method="other")["params"]}
    model = jsn.linen.spectral_norm(Heads, rules="operators")()
    with pytest.warns(UserWarning, match="b/kernel: this call does not use it"):
        jsn.linen.init_state(model, {"params": params}, X)
    assert read(Heads(), X, method="other") == {"b/kernel": Matrix()}
    # The default rules go by name, and so does what this call does not use.
    plain = jsn.linen.spectral_norm(Heads)()
    state = jax.eval_shape(lambda: jsn.linen.init_state(plain, {"params": params}, X))
    assert dict(state["spectral_norm"].operators)["b/kernel"] == Matrix()


# --- one layer, several sizes ---------------------------------------------------------------------


class Pyramid(nn.Module):
    """One convolution on three sizes, as in detection heads."""

    padding: str
    sizes: tuple[int, ...] = (4, 16, 8)

    @nn.compact
    def __call__(self, x):
        conv = nn.Conv(3, (3,), padding=self.padding)
        return [conv(x[:, :n]) for n in self.sizes]


def test_a_convolution_on_several_sizes_is_taken_on_the_largest():
    x = jnp.ones((1, 16, 3))
    assert read(Pyramid("SAME"), x) == {"Conv_0/kernel": Conv((16, 3))}
    rules, message = told(Pyramid("CIRCULAR"), x)
    assert rules == {"Conv_0/kernel": Conv((16, 3), padding="CIRCULAR")}
    assert "1 weight left a choice" in message
    assert "it convolves inputs of (4, 3) and (16, 3) and (8, 3): took (16, 3)" in message


# --- how it is called -----------------------------------------------------------------------------


class Switch(nn.Module):
    @nn.compact
    def __call__(self, x, *, train, scale=1.0):
        x = nn.Dropout(0.5, deterministic=not train)(nn.Dense(4)(x))
        return nn.BatchNorm(use_running_average=not train)(x) * scale


def test_shapes_are_enough_and_static_arguments_stay_static():
    x = jax.ShapeDtypeStruct((2, 6, 8), jnp.float32)
    expected = {"Dense_0/kernel": Matrix()}
    assert read(Switch(), x, train=False) == expected
    assert read(Switch(), x, train=True, scale=2) == expected
    rngs = {"params": KEY, "dropout": KEY}
    assert read(Switch(), X, train=True, rngs=rngs) == expected
    assert jax.jit(lambda x: x if read(Switch(), x, train=False) == expected else None)(X).shape


def test_nothing_is_computed():
    class Huge(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(10**6)(nn.Dense(10**6)(x))

    assert len(read(Huge(), X)) == 2


def test_a_decorated_model_is_read_as_the_plain_one():
    plain = nn.Sequential([nn.Conv(4, (3,)), nn.Dense(3)])
    decorated = jsn.linen.spectral_norm(nn.Sequential)(plain.layers)
    assert read(decorated, X) == read(plain, X)


@pytest.mark.parametrize("model", [nn.Dense, "Dense", None])
def test_what_is_no_model_is_refused(model):
    with pytest.raises(TypeError, match=r"expected an instance of a flax.linen.Module, found"):
        jsn.linen.operators(model, X)


def test_rules_of_your_own_are_checked():
    with pytest.raises(ValueError, match=r"jsn.linen.operators: rules are malformed"):
        jsn.linen.operators(nn.Dense(3), X, rules=[("kernel",)])


# --- rules="operators" ----------------------------------------------------------------------------


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3), strides=2)(x))
        return nn.Dense(3)(x.mean((1, 2)))


IMAGES = jnp.ones((2, 7, 7, 3))


def test_a_decorated_class_reads_itself():
    model = jsn.linen.spectral_norm(Net, rules="operators")()
    variables = made(model, IMAGES)
    operators = dict(variables["sn_state"]["spectral_norm"].operators)
    assert operators == read(Net(), IMAGES)
    assert operators["Conv_0/kernel"] == Conv((7, 7, 3), 2)
    plain = made(Net(), IMAGES)
    for ours, theirs in zip(
        *map(jax.tree.leaves, (variables["params"], plain["params"])), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
    later = jax.eval_shape(lambda: jsn.linen.init_state(model, plain, IMAGES))
    assert dict(later["spectral_norm"].operators) == operators
    # Another size of input is convolved with the same weights.
    other = jnp.ones((2, 9, 5, 3))
    y, _ = jax.eval_shape(lambda: model.apply(variables, other, mutable=["sn_state"]))
    assert y.shape == (2, 3)


def test_a_decorated_part_of_a_model_reads_itself():
    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(3, (3, 3))(x)
            return jsn.linen.spectral_norm(Net, rules="operators")(name="net")(x)

    variables = jax.eval_shape(Outer().init, KEY, IMAGES)
    state = variables["sn_state"]["net"]["spectral_norm"]
    assert dict(state.operators) == read(Net(), IMAGES)


def test_a_decorated_class_tells_what_it_cannot_read():
    with pytest.warns(UserWarning, match="product: Custom is no layer that jsn knows"):
        found = tracked(jsn.linen.spectral_norm(Custom, rules="operators")(), X)
    assert [path for path, _ in found] == ["Dense_0/kernel"]


def test_another_word_is_refused():
    with pytest.raises(TypeError, match="rules='operator' is unknown"):
        jsn.linen.spectral_norm(Net, rules="operator")


# --- recurrence -----------------------------------------------------------------------------------


LENGTH = 50
WIDTH = 96  # kernels too large to be stacked: each has products of its own


class Classifier(nn.Module):
    cell: type = nn.OptimizedLSTMCell

    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(nn.RNN(self.cell(WIDTH))(x)[:, -1])


def products(model, x):
    """How often an `apply` multiplies by a matrix of each shape; a loop counts all its rounds."""

    def apply(variables, x):
        return model.apply(variables, x, mutable=["sn_state"])

    found = collections.Counter()
    for equation in jaxprs.trace(apply, jax.eval_shape(model.init, KEY, x), x):
        if equation.primitive.name == "dot_general":
            found.update({operand.aval.shape for operand in equation.invars})
    return found


SEQUENCES = jax.ShapeDtypeStruct((2, LENGTH, 5), jnp.float32)


@pytest.mark.parametrize("around", ["model", "rnn"])
@pytest.mark.parametrize(
    ("cell", "gates"),
    [(nn.SimpleCell, 1), (nn.LSTMCell, 4), (nn.OptimizedLSTMCell, 4), (nn.GRUCell, 3)],
)
def test_a_recurrent_kernel_is_normalized_once_for_a_sequence(cell, gates, around):
    """The products with the recurrent kernels, of one size for each gate, are counted."""
    if around == "model":
        model = jsn.linen.spectral_norm(Classifier, rules="operators")(cell)
    else:
        model = jsn.linen.spectral_norm(nn.RNN, rules="operators")(cell(WIDTH))
    found = products(model, SEQUENCES)
    if cell is nn.OptimizedLSTMCell:  # one product a step, by all gates side by side
        assert found[WIDTH, 4 * WIDTH] == LENGTH
    else:
        found[WIDTH, WIDTH] -= gates * LENGTH
    assert found[WIDTH, WIDTH] == 2 * gates  # two reads of each gate, and none in the loop


def test_a_decorated_cell_is_normalized_in_each_step():
    """Which also shows that the count above would see it."""
    cell = jsn.linen.spectral_norm(nn.OptimizedLSTMCell, rules="operators")(WIDTH)
    model = nn.RNN(cell, variable_broadcast=["params", "sn_state"])
    found = products(model, SEQUENCES)
    assert found[WIDTH, 4 * WIDTH] == LENGTH
    assert found[WIDTH, WIDTH] >= 4 * LENGTH


@functools.cache
def true_recurrence():
    x = jax.random.normal(KEY, (3, LENGTH, 5))
    model = jsn.linen.spectral_norm(nn.RNN, rules="operators")(nn.SimpleCell(12))
    variables = made(model, x)
    params, _ = jax.jit(jsn.normalize)(variables["params"], variables["sn_state"])
    return model, variables, params, x


def test_the_normalized_recurrence_is_that_of_normalized_weights():
    model, variables, params, x = true_recurrence()
    plain = nn.RNN(nn.SimpleCell(12)).apply({"params": params}, x)
    apply = jax.jit(functools.partial(model.apply, mutable=["sn_state"]))
    np.testing.assert_allclose(apply(variables, x)[0], plain, rtol=1e-4, atol=1e-5)
    for gate in ("i", "h"):
        norm = np.linalg.norm(params["cell"][gate]["kernel"], 2)
        assert norm == pytest.approx(1, abs=1e-3)
