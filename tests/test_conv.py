"""`Conv`: the operator is the layer, and sigma its largest singular value, in every geometry."""

import functools
import itertools
import math
import pickle
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from matrices import assert_converged

import jsn


class Case:
    """A Flax layer, the size of one input, and the `jsn.Conv` that should be the same map."""

    def __init__(self, shape, window, features, transpose=False, **options):
        self.shape = shape
        shared = {"use_bias": False, **options}
        if transpose:
            strides = options.get("strides", 1)
            shared["strides"] = (strides,) * len(window) if isinstance(strides, int) else strides
            self.layer = nn.ConvTranspose(features, window, **shared)
        else:
            self.layer = nn.Conv(features, window, **shared)
        self.operator = jsn.Conv(shape, transpose=transpose, **options)
        groups = options.get("feature_group_count", 1)
        kernel = (*window, shape[-1] // groups, features)
        seed = sum(kernel) + sum(shape)
        self.kernel = np.random.default_rng(seed).standard_normal(kernel).astype(np.float32)

    def __repr__(self):
        window = "x".join(map(str, self.kernel.shape[:-2]))
        return f"{window} {self.operator}"

    def apply(self, x, kernel=None):
        kernel = self.kernel if kernel is None else kernel
        return self.layer.apply({"params": {"kernel": kernel}}, x)

    @functools.cached_property
    def singular_values(self):
        """By a float64 SVD of the layer, applied by Flax to every unit input."""
        dense = matrices(self in RARE)[repr(self)][0] if self in ALL else self.apply(units(self))
        return np.linalg.svd(np.asarray(dense, np.float64).reshape(len(dense), -1))[1]


def units(shape):
    """Every unit vector of a space of arrays of this shape, or of the inputs of a case."""
    shape = getattr(shape, "shape", shape)
    return np.eye(math.prod(shape), dtype=np.float32).reshape(-1, *shape)


# Each combination once; what only varies them follows in RARE.
CASES = [
    # 1-D
    Case((16, 4), (3,), 6),
    Case((17, 4), (4,), 5, strides=2),
    Case((15, 3), (5,), 4, padding="VALID", kernel_dilation=2),
    Case((16, 4), (3,), 4, padding="CIRCULAR", strides=2),
    Case((19, 3), (3,), 5, padding="CAUSAL", kernel_dilation=3),
    Case((19, 3), (4,), 5, padding="CAUSAL", strides=2),
    Case((12, 3), (5,), 3, padding="REFLECT"),
    Case((12, 4), (3,), 6, padding=[(3, 0)], feature_group_count=2),
    Case((2, 5), (7,), 4),  # the window is larger than the input
    # 2-D
    Case((9, 9, 3), (3, 3), 8),
    Case((8, 7, 4), (3, 3), 4, strides=2),
    Case((9, 8, 3), (5, 3), 4, strides=(1, 2)),
    Case((10, 11, 3), (3, 3), 4, padding="VALID"),
    Case((11, 11, 2), (3, 2), 3, padding="VALID", strides=(2, 3), kernel_dilation=(2, 1)),
    Case((8, 8, 4), (3, 3), 4, padding="CIRCULAR"),
    Case((8, 8, 4), (4, 4), 4, padding="CIRCULAR", strides=2),
    Case((9, 9, 4), (3, 3), 4, kernel_dilation=2, strides=2),
    Case((7, 8, 3), (3, 3), 4, padding=[(0, 2), 1], strides=2),
    Case((9, 9, 3), (4, 3), 3, padding="SAME_LOWER", strides=2),
    Case((8, 9, 6), (3, 3), 6, feature_group_count=3, strides=2),
    Case((8, 8, 8), (3, 3), 8, feature_group_count=8),
    Case((7, 7, 6), (1, 1), 4),
    Case((9, 8, 3), (3, 2), 8, strides=(3, 2), padding="VALID"),
    # 3-D
    Case((5, 4, 6, 2), (3, 3, 3), 3),
    Case((5, 6, 5, 2), (3, 2, 3), 3, strides=(2, 1, 2)),
    Case((4, 4, 6, 2), (3, 3, 3), 2, padding="CIRCULAR", strides=2),
    # transposed
    Case((8, 4), (3,), 3, transpose=True, strides=2),
    Case((7, 3), (5,), 4, transpose=True, strides=3, padding="VALID"),
    Case((6, 5, 4), (3, 3), 4, transpose=True, strides=2),
    Case((5, 6, 4), (2, 2), 3, transpose=True, strides=2),
    Case((5, 5, 3), (3, 3), 3, transpose=True, strides=2, padding="CIRCULAR"),
    Case((6, 6, 3), (3, 3), 3, transpose=True, kernel_dilation=2),
]
RARE = [
    Case((13, 4), (4,), 4, padding="CIRCULAR", strides=3),
    Case((40, 1), (9,), 1),
    Case((9, 9, 3), (4, 4), 6, strides=2),
    Case((7, 9, 3), (2, 3), 3, padding="CIRCULAR", strides=2),
    Case((9, 7, 3), (3, 3), 3, padding="REFLECT", kernel_dilation=2),
    Case((9, 9, 4), (3, 3), 4, kernel_dilation=2),
    Case((7, 7, 4), (3, 3), 4, padding=2),
    Case((8, 8, 4), (3, 3), 8, feature_group_count=2),
    Case((9, 9, 6), (5, 5), 12, feature_group_count=6, padding="CIRCULAR"),
    Case((7, 7, 6), (1, 1), 4, strides=2),
    Case((12, 12, 1), (3, 3), 1),
    Case((6, 5, 5, 2), (2, 3, 2), 2, padding="VALID", kernel_dilation=2),
    Case((4, 5, 4, 4), (3, 3, 3), 4, feature_group_count=4),
    Case((5, 5, 4), (4, 4), 3, transpose=True, strides=2, padding="VALID"),
    Case((4, 5, 3), (4, 5), 2, transpose=True, strides=3, padding="CIRCULAR"),
    Case((5, 5, 3), (3, 3), 3, transpose=True, strides=2, padding=[(1, 2), (2, 1)]),
    Case((3, 3, 4, 2), (3, 3, 3), 2, transpose=True, strides=2),
]
ALL = [*CASES, *RARE]
STRIDED = next(case for case in CASES if case.shape == (8, 7, 4))
by_name = pytest.mark.parametrize(
    "case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in RARE)], ids=repr
)


@functools.cache
def matrices(rare):
    """Of each case the layer as Flax applies it, and both products of the operator, as matrices.

    One program for all of them: most of the time would go into compiling each alone.
    """
    cases = RARE if rare else CASES

    def run(kernels):
        found = {}
        for case in cases:
            kernel, name = kernels[repr(case)], repr(case)
            outs = case.operator.codomain(kernel.shape)
            layer = case.apply(units(case.shape), kernel)
            forward = case.operator.matvec(kernel, jnp.asarray(units(case.shape)))
            back = case.operator.rmatvec(kernel, jnp.asarray(units(outs)))
            found[name] = (layer, forward, back)
        return found

    return jax.jit(run)({repr(case): case.kernel for case in cases})


@functools.cache
def tracked(rare):
    """All cases as one tree: sigmas after `init`, after 100 steps, and a normalized tree."""
    cases = {repr(case): case for case in (RARE if rare else CASES)}
    params = {name: jnp.asarray(case.kernel) for name, case in cases.items()}
    rules = [(f"^{re.escape(name)}$", case.operator) for name, case in cases.items()]
    state = jsn.init(params, rules=rules)
    sigmas, normalize = jax.jit(jsn.sigmas), jax.jit(jsn.normalize)
    first = sigmas(params, state)
    for _ in range(100):
        normalized, state = normalize(params, state)
    return first, sigmas(params, state), normalized


def test_there_are_at_least_thirty_configurations():
    assert len({case.operator for case in CASES}) >= 30
    assert len({repr(case) for case in ALL}) == len(ALL)


@by_name
def test_it_is_the_map_of_the_flax_layer(case):
    layer, forward, back = matrices(case in RARE)[repr(case)]
    assert case.operator.problem(case.kernel.shape) is None
    assert case.operator.domain(case.kernel.shape) == case.shape == back.shape[1:]
    assert case.operator.codomain(case.kernel.shape) == layer.shape[1:] == forward.shape[1:]
    np.testing.assert_allclose(forward, layer, atol=2e-5)
    transpose = np.asarray(back).reshape(len(back), -1).T
    np.testing.assert_allclose(transpose, np.reshape(layer, (len(layer), -1)), atol=2e-5)


@by_name
def test_sigma_is_the_norm_of_the_layer(case):
    first, later, _ = tracked(case in RARE)
    assert_converged(first[repr(case)], case.singular_values[0], rtol=1e-3)
    assert_converged(later[repr(case)], case.singular_values[0], rtol=1e-5)


@by_name
def test_the_normalized_kernel_has_norm_one(case):
    normalized = tracked(case in RARE)[2][repr(case)]
    factor = np.max(np.abs(normalized)) / np.max(np.abs(case.kernel))
    np.testing.assert_allclose(normalized, factor * case.kernel, rtol=1e-5)
    assert factor * case.singular_values[0] == pytest.approx(1, abs=1e-5)


@by_name
def test_the_cheaper_operator_has_the_same_norm(case):
    shape = case.kernel.shape
    simple = case.operator.simplest(shape)
    if isinstance(simple, jsn.Matrix):
        inner = case.kernel.swapaxes(-1, -2) if case.operator.transpose else case.kernel
        norm = np.linalg.norm(inner.astype(np.float64).reshape(-1, inner.shape[-1]), 2)
        assert norm == pytest.approx(case.singular_values[0], rel=1e-6)


def test_patches_and_pointwise_kernels_are_matrices():
    patch = jsn.Conv((12, 12, 3), strides=4, padding="VALID")
    assert patch.simplest((4, 4, 3, 8)) == jsn.Matrix()
    assert jsn.Conv((7, 7, 3)).simplest((1, 1, 3, 8)) == jsn.Matrix()
    assert jsn.Conv((7, 7, 3), strides=2, transpose=True).simplest((2, 2, 3, 8)) == jsn.Matrix(
        in_axis=-2, out_axis=None
    )
    for conv, shape in (
        (patch, (5, 5, 3, 8)),  # windows overlap
        (jsn.Conv((2, 2, 3), strides=3), (3, 3, 3, 8)),  # no whole window lies inside
        (jsn.Conv((9, 9, 3), strides=3, kernel_dilation=3), (3, 3, 3, 8)),  # phases collide
        (jsn.Conv((7, 7, 8), feature_group_count=4), (1, 1, 2, 8)),
        (jsn.Conv((5, 5, 3), strides=2, padding="CIRCULAR"), (2, 2, 3, 8)),  # wraps around
    ):
        assert conv.simplest(shape) == conv


def test_a_larger_input_contains_a_smaller_one_where_windows_keep_their_grid():
    plain = functools.partial(jsn.Conv, strides=2)
    assert plain((16, 3)).contains(plain((8, 3)), (3, 3, 4))
    assert plain((17, 3)).contains(plain((9, 3)), (3, 3, 4))
    assert not plain((8, 3)).contains(plain((16, 3)), (3, 3, 4))
    ring = functools.partial(jsn.Conv, padding="CIRCULAR")
    assert ring((8, 3)).contains(ring((8, 3)), (3, 3, 4))
    assert not ring((12, 3)).contains(ring((8, 3)), (3, 3, 4))
    found = []
    for small, large, (k, s, d), transpose in itertools.product(
        range(3, 8), range(3, 10), ((3, 2, 1), (4, 2, 1), (3, 3, 2), (3, 1, 1)), (False, True)
    ):
        options = {"strides": s, "kernel_dilation": d, "transpose": transpose}
        one, two = Case((small, 2), (k,), 2, **options), Case((large, 2), (k,), 2, **options)
        two.kernel = one.kernel
        if two.operator.contains(one.operator, one.kernel.shape):
            found.append(large > small)
            assert one.singular_values[0] <= two.singular_values[0] * (1 + 1e-6)
    assert sum(found) > 50


# --- the exact value where padding is circular ---------------------------------------------------


def circular_norm(kernel, sizes, strides) -> float:
    """The exact norm of a circular convolution whose strides divide the sizes, by FFT.

    One phase of the stride is one more input channel, at (n / s) frequencies: Sedghi, Gupta and
    Long 2019, https://arxiv.org/abs/1805.10408, and Senderovich et al. 2022 for strides.
    """
    *window, ins, outs = kernel.shape
    padded = np.zeros((*sizes, ins, outs))
    for tap in itertools.product(*map(range, window)):
        padded[tuple(i % n for i, n in zip(tap, sizes, strict=True))] += kernel[tap]
    split = [x for n, s in zip(sizes, strides, strict=True) for x in (n // s, s)]
    rank = len(sizes)
    phases = padded.reshape(*split, ins, outs)
    phases = np.moveaxis(phases, range(1, 2 * rank, 2), range(rank, 2 * rank))
    symbol = np.fft.fftn(phases.reshape(*phases.shape[:rank], -1, outs), axes=range(rank))
    return float(np.linalg.svd(symbol, compute_uv=False).max())


CIRCULAR = [
    case
    for case in CASES
    if case.operator.padding == "CIRCULAR"
    and not case.operator.transpose
    and case.operator.feature_group_count == 1
    and all(n % s == 0 for n, s in zip(case.shape, case.operator.strides, strict=False))
]


@pytest.mark.parametrize("case", CIRCULAR, ids=repr)
def test_sigma_is_the_exact_circular_value(case):
    exact = circular_norm(case.kernel, case.shape[:-1], case.operator.strides)
    assert exact == pytest.approx(case.singular_values[0], rel=1e-6)  # the kernel is in float32
    assert_converged(tracked(False)[1][repr(case)], exact, rtol=1e-5)


def test_there_are_circular_cases_with_and_without_strides():
    assert {max(case.operator.strides) for case in CIRCULAR} == {1, 2}


# --- how far the reshaped kernel is from the layer ------------------------------------------------


@by_name
def test_the_reshape_is_within_its_inequality(case):
    """Reshape <= layer <= sqrt(prod ceil(k / q)) reshape, with q = s / gcd(s, d).

    With groups the first holds for each of them, and for all together up to sqrt(groups).
    """
    conv, groups = case.operator, case.operator.feature_group_count
    if conv.transpose or conv.padding in ("CIRCULAR", "REFLECT"):
        return
    *window, _, outs = case.kernel.shape
    kernel = case.kernel.astype(np.float64).reshape(-1, outs)
    matrix = np.linalg.norm(kernel, 2)
    factor = 1
    for k, s, d in zip(window, conv.strides, conv.kernel_dilation, strict=True):
        factor *= math.ceil(k / (s // math.gcd(s, d)))
    if case.shape[0] > 2:  # a whole window lies inside
        one = max(np.linalg.norm(part, 2) for part in np.split(kernel, groups, axis=1))
        assert one <= case.singular_values[0] * (1 + 1e-6)
        assert matrix <= math.sqrt(groups) * case.singular_values[0] * (1 + 1e-6)
    assert case.singular_values[0] <= math.sqrt(factor) * matrix * (1 + 1e-6)


# --- several kernels, dtypes, scales, derivatives -------------------------------------------------

NORMALIZE = jax.jit(jsn.normalize)


@pytest.mark.parametrize("axis", [2, *(pytest.param(i, marks=pytest.mark.slow) for i in (0, 4))])
def test_a_stack_of_kernels_has_one_sigma_each(axis):
    stack = np.random.default_rng(0).standard_normal((4, 3, 3, 2, 3)).astype(np.float32)
    stack *= np.array([1, 10, 0.1, 3], np.float32).reshape(-1, 1, 1, 1, 1)
    conv = jsn.Conv((6, 5, 2), strides=2)
    alone = []
    for kernel in stack:
        alone.append(Case((6, 5, 2), (3, 3), 3, strides=2))
        alone[-1].kernel = kernel
    norms = [case.singular_values[0] for case in alone]
    operator = conv.lifted((axis,), 5)
    W = {"kernel": jnp.moveaxis(jnp.asarray(stack), 0, axis)}
    state = jsn.init(W, rules=[("kernel", operator)])
    for _ in range(100):
        normalized, state = NORMALIZE(W, state)
    sigma = jax.jit(jsn.sigmas)(W, state)["kernel"]
    assert sigma.shape == (4,)
    assert_converged(sigma, norms, rtol=1e-5)
    factors = jnp.moveaxis(normalized["kernel"], axis, 0) / stack
    np.testing.assert_allclose(factors[:, 1, 1, 1, 1], 1 / np.asarray(norms), rtol=1e-5)


def test_two_batch_axes_are_two_nested_stacks():
    stack = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 4, 2, 3)), jnp.float32)
    conv = jsn.Conv((7, 4))
    twice = conv.lifted((0,), 4).lifted((4,), 5)
    assert twice == conv.lifted((0, 4), 5)
    W = jnp.moveaxis(stack, 1, -1)  # (2, 4, 2, 3, 3): batch, window, in, ... batch
    W = jnp.moveaxis(jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 4, 4, 2))), 4, 4)
    v = jnp.ones((2, 2, 5, 7, 4))
    y = twice.matvec(W, v)
    expected = [[conv.matvec(W[i, ..., j], v[i, j]) for j in range(2)] for i in range(2)]
    np.testing.assert_allclose(y, jnp.array(expected), rtol=1e-5)


def test_sigma_has_the_derivative_of_the_norm():
    case = next(case for case in CASES if case.shape == (10, 11, 3))
    count = math.prod(case.shape)
    eye = np.eye(count, dtype=np.float32).reshape(count, *case.shape)

    def exact(kernel):
        return jnp.linalg.norm(case.apply(eye, kernel).reshape(count, -1), 2)

    u = np.random.default_rng(0).standard_normal((16, 8, 9, 4)).astype(np.float32)
    power = functools.partial(jsn.power_iterate, operator=case.operator)
    _, u = jax.jit(power, static_argnums=2)(case.kernel, u, 60)
    sigma = lambda kernel: power(kernel, u)[0]
    found, wanted = jax.jit(lambda K: (jax.grad(sigma)(K), jax.grad(exact)(K)))(case.kernel)
    np.testing.assert_allclose(found, wanted, atol=1e-3 * np.abs(wanted).max())
    # The normalized layer does not change with the scale of its kernel.
    objective = lambda k: jnp.sum(case.apply(eye, k / sigma(k)) ** 3)
    slope = jax.jit(jax.grad(objective))(case.kernel)
    size = np.linalg.norm(slope) * np.linalg.norm(case.kernel)
    assert abs(np.vdot(slope, case.kernel)) < 1e-5 * size
    # And so under a stack, whose entries are convolved in turn.
    stack = jnp.stack([case.kernel, 2 * case.kernel])
    lifted = case.operator.lifted((0,), 5)
    total = lambda W: jnp.sum(jsn.power_iterate(W, jnp.stack([u, u]), operator=lifted)[0])
    np.testing.assert_allclose(jax.jit(jax.grad(total))(stack)[1], found, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_scale_of_a_kernel_does_not_matter(scale):
    case = STRIDED
    rules = [("kernel", case.operator)]
    scaled = {"kernel": case.kernel * np.float32(scale)}
    normalized, _ = NORMALIZE(scaled, jsn.init(scaled, rules=rules))
    factor = np.max(np.abs(normalized["kernel"])) / np.max(np.abs(case.kernel))
    assert factor * case.singular_values[0] == pytest.approx(1, abs=2e-3)


def test_zero_and_nan_kernels_do_no_harm():
    case = STRIDED
    state = jsn.init({"kernel": case.kernel}, rules=[("kernel", case.operator)])
    zero, after = NORMALIZE({"kernel": 0 * case.kernel}, state)
    assert not np.any(zero["kernel"])
    bad = case.kernel.copy()
    bad[0, 0, 0, 0] = np.nan
    _, after = NORMALIZE({"kernel": bad}, after)
    for _ in range(30):
        good, after = NORMALIZE({"kernel": case.kernel}, after)
    factor = np.max(np.abs(good["kernel"])) / np.max(np.abs(case.kernel))
    assert factor * case.singular_values[0] == pytest.approx(1, abs=1e-3)


def test_a_bfloat16_kernel_is_computed_with_in_float32():
    case = STRIDED
    kernel = jnp.asarray(case.kernel, jnp.bfloat16)
    state = jsn.init({"kernel": kernel}, rules=[("kernel", case.operator)])
    normalized, state = NORMALIZE({"kernel": kernel}, state)
    assert normalized["kernel"].dtype == jnp.bfloat16
    assert state.u["kernel"].dtype == jnp.float32
    rounded = Case(case.shape, (3, 3), 4, strides=2)
    rounded.kernel = np.asarray(kernel.astype(jnp.float32))
    sigma = jax.jit(jsn.sigmas)({"kernel": kernel}, state)["kernel"]
    assert_converged(sigma, rounded.singular_values[0], rtol=1e-3)


RING = {"padding": "CIRCULAR", "strides": 2}


@pytest.mark.parametrize(
    ("axis", "options"),
    [
        (2, {}),
        (3, RING),
        pytest.param(3, {}, marks=pytest.mark.slow),
        pytest.param(2, RING, marks=pytest.mark.slow),
    ],
)
def test_channels_may_be_sharded_on_an_explicit_mesh(axis, options):
    mesh = jax.make_mesh((4,), ("x",))
    kernel = np.random.default_rng(0).standard_normal((3, 3, 8, 8)).astype(np.float32)
    rules = [("kernel", jsn.Conv((6, 6, 8), **options))]
    plain, _ = NORMALIZE({"kernel": kernel}, jsn.init({"kernel": kernel}, rules=rules))
    spec = PartitionSpec(*[None] * axis, "x")
    with jax.set_mesh(mesh):
        params = {"kernel": jax.device_put(kernel, NamedSharding(mesh, spec))}
        state = jsn.init(params, rules=rules)

        def cube(params):
            normalized, _ = jsn.normalize(params, state)
            return jnp.sum(normalized["kernel"] ** 3), normalized

        slope, normalized = jax.jit(jax.grad(cube, has_aux=True))(params)
    assert normalized["kernel"].sharding.spec[axis] == "x"
    assert slope["kernel"].sharding.spec[axis] == "x"
    np.testing.assert_allclose(np.asarray(normalized["kernel"]), plain["kernel"], atol=1e-6)


# --- what it is told ------------------------------------------------------------------------------


def test_it_is_static():
    conv = jsn.Conv((8, 8, 3), strides=[2, 2], padding=((1, 1), (1, 1)))
    assert conv == jsn.Conv([8, 8, 3], 2, 1)
    assert hash(conv) == hash(jsn.Conv((8, 8, 3), 2, [1, (1, 1)]))
    assert conv != jsn.Conv((8, 8, 3), 2)
    assert pickle.loads(pickle.dumps(conv)) == conv
    assert jsn.Conv((8, 3), None) == jsn.Conv((8, 3))


@pytest.mark.parametrize(
    "conv",
    [
        *(case.operator for case in CASES[::5]),
        jsn.Conv((8, 8, 3)).lifted((0,), 5),
        jsn.Conv((8, 3), 2).lifted((0, 4), 5),
    ],
    ids=repr,
)
def test_its_repr_makes_it_again(conv):
    assert eval(repr(conv), {"Conv": jsn.Conv}) == conv


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (((8,),), "input_shape=(8,)"),
        (((8, 8, 8, 8, 3),), "input_shape=(8, 8, 8, 8, 3)"),
        ((8,), "input_shape=8"),
        (((8, 8, 0),), "input_shape=(8, 8, 0)"),
        (((8, 8.0, 3),), "input_shape=(8, 8.0, 3)"),
        (((8, 8, 3), 0), "strides=0"),
        (((8, 8, 3), (1, 1, 1)), "strides=(1, 1, 1)"),
        (((8, 8, 3), 1, "same please"), "padding='same please'"),
        (((8, 8, 3), 1, "CAUSAL"), "padding='CAUSAL'"),
        (((8, 8, 3), 1, [1]), "padding=[1]"),
        (((8, 8, 3), 1, [(1, 2, 3), 1]), "padding=[(1, 2, 3), 1]"),
        (((8, 8, 3), 1, "REFLECT", 1, 1, True), "padding='REFLECT'"),
        (((8, 8, 3), 1, "SAME", True), "kernel_dilation=True"),
        (((8, 8, 3), 1, "SAME", 1, 0), "feature_group_count=0"),
    ],
)
def test_impossible_arguments_are_refused(arguments, found):
    with pytest.raises(ValueError, match=r"jsn.Conv: .* cannot be used") as error:
        jsn.Conv(*arguments)
    assert found in str(error.value)


@pytest.mark.parametrize(
    ("conv", "shape", "found"),
    [
        (jsn.Conv((8, 8, 3)), (3, 3, 4), "needs 4 axes, (*window, in / groups, out)"),
        (jsn.Conv((8, 3)), (3, 3, 3, 4), "needs 3 axes"),
        (jsn.Conv((8, 8, 3)), (3, 3, 4, 4), "4 input channels in 1 groups, input_shape has 3"),
        (jsn.Conv((8, 8, 4), feature_group_count=2), (3, 3, 4, 4), "4 input channels in 2 groups"),
        (jsn.Conv((8, 8, 4), feature_group_count=2), (3, 3, 2, 5), "5 output channels do not div"),
        (
            jsn.Conv((4, 4, 3), padding="VALID"),
            (3, 5, 3, 4),
            "window (3, 5) is larger than the pad",
        ),
        (jsn.Conv((4, 4, 2), 1, "SAME", 1, 2, True), (3, 3, 1, 2), "has no feature groups"),
        (jsn.Conv((4, 4, 3)), (3, 3, 3, 0), "is empty"),
        (jsn.Conv((8, 3)).lifted((0,), 4), (3, 3, 4), "needs 4 axes"),
    ],
)
def test_kernels_that_do_not_fit_are_reported_by_path(conv, shape, found):
    with pytest.raises(ValueError, match="cannot be viewed as asked") as error:
        jsn.init({"body": {"kernel": jnp.zeros(shape)}}, rules=[("kernel", conv)])
    assert "body/kernel" in str(error.value)
    assert found in str(error.value)


# --- the compiled program ---------------------------------------------------------------------


def resnet50():
    """The kernels of ResNet-50: 25.5 million entries."""
    kernels = {"stem": (7, 7, 3, 64), "head": (2048, 1000)}
    ins = 64
    for stage, (blocks, width) in enumerate(((3, 64), (4, 128), (6, 256), (3, 512))):
        for block in range(blocks):
            name = f"{stage}_{block}"
            kernels |= {
                f"{name}_a": (1, 1, ins, width),
                f"{name}_b": (3, 3, width, width),
                f"{name}_c": (1, 1, width, 4 * width),
            }
            if block == 0:
                kernels[f"{name}_d"] = (1, 1, ins, 4 * width)
            ins = 4 * width
    return {
        name: {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)}
        for name, shape in kernels.items()
    }


@pytest.mark.slow
def test_no_kernel_is_copied_flattened_or_transposed():
    """Bytes of the compiled step: W is read twice, and read and written once to be divided."""
    params = resnet50()
    state = jax.eval_shape(functools.partial(jsn.init, block_size=1), params)
    assert jaxprs.bytes_per_byte(jsn.normalize, params, state) <= 4.2


def test_the_count_of_bytes_would_see_a_copy():
    """The twin: the same vector iteration on a kernel that is laid out as a matrix first."""

    def naive(params, us):
        def one(W, u):
            matrix = W.reshape(-1, W.shape[-1]).T
            v = u @ matrix
            return W / jnp.linalg.norm(matrix @ (v / jnp.linalg.norm(v)))

        return jax.tree.map(one, params, us)

    params = {"kernel": jax.ShapeDtypeStruct((3, 3, 512, 512), jnp.float32)}
    us = {"kernel": jax.ShapeDtypeStruct((512,), jnp.float32)}
    assert jaxprs.bytes_per_byte(naive, params, us) > 4.2
    state = jax.eval_shape(functools.partial(jsn.init, block_size=1), params)
    assert jaxprs.bytes_per_byte(jsn.normalize, params, state) <= 4.2
