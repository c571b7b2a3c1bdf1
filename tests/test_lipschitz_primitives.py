"""One primitive at a time: the norm of its Jacobian, by a float64 SVD, against its bound.

`EXACT` are those whose bound is the norm itself; `ABOVE` those whose bound may be higher.
"""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from networks import gaussian

import jsn

RNG = np.random.default_rng(0)


def dense(fn, x) -> np.ndarray:
    """The Jacobian at a random point, as a matrix."""
    point = jnp.asarray(np.random.default_rng(1).standard_normal(x.shape), jnp.float32)
    J = jax.jit(jax.jacfwd(lambda p: jnp.ravel(fn(p.reshape(x.shape)))))(jnp.ravel(point))
    return np.asarray(J, np.float64)


def applied(model: nn.Module, x, **variables):
    """A model as a function of its input; statistics that it collects are dropped."""
    return lambda x: model.apply(variables, x, mutable=[*variables])[0]


def check(fn, x, exact: bool, slack: float = 2e-6):
    norm = np.linalg.norm(dense(fn, x), 2)
    bound = jsn.lipschitz_bound(fn, x)
    assert bound >= norm * (1 - 1e-6)
    if exact:
        assert bound <= norm * (1 + slack)


x4, image = jnp.ones((3, 4)), jnp.ones((2, 5, 6, 4))
W, tensor = gaussian(4, 5), gaussian(4, 3, 2)
STACK = jnp.stack([2 * jnp.eye(4), W[:, :4]])
indices = jnp.asarray([[0, 2], [2, 2], [1, 0]])


def _running_down(x):
    return lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, 2 * c[1]), (0, x))[1]


def _weights_out_of_a_scan(x):
    x, doubled = lax.scan(lambda y, A: (3 * y, 2 * A), x, STACK)
    return x @ doubled[1]


def _dilated(x):
    return lax.conv_general_dilated(x, jnp.ones((1, 1, 1)), (1,), [(0, 0)], (2,))


def _masked_softmax(x):
    return jax.nn.softmax(jnp.where(jnp.eye(3, 4) > 0, -jnp.inf, 3 * x))


def _shortened(x):
    return x / jnp.sqrt(1 + jnp.sum(x**2, axis=1, keepdims=True))


STATISTICS = {"mean": jnp.zeros(4), "var": jnp.ones(4)}
NORM = applied(nn.LayerNorm(epsilon=0.1), x4, params={"scale": W[:, 0], "bias": W[:, 1]})
GROUP_NORM = applied(
    nn.GroupNorm(num_groups=2, epsilon=0.3, use_scale=False, use_bias=False), image
)
BATCH_NORM = applied(
    nn.BatchNorm(use_running_average=False, epsilon=0.2, use_scale=False, use_bias=False),
    x4,
    batch_stats=STATISTICS,
)

EXACT = {
    "matmul on the right": (lambda x: x @ W, x4),
    "matmul on the left": (lambda x: W.T @ x.T, x4),
    "a vector": (lambda x: x @ W[:, 0], x4),
    "a dot with itself as a vector": (lambda x: jnp.vdot(W[:, 1], x), jnp.ones(4)),
    "an outer product": (lambda x: jnp.outer(x, W[0]), jnp.ones(4)),
    "attention heads": (lambda x: jnp.einsum("bte,ehd->bthd", x, tensor), jnp.ones((2, 5, 4))),
    "heads back": (lambda x: jnp.einsum("bthd,ehd->bte", x, tensor), jnp.ones((2, 5, 3, 2))),
    "a batch of matrices": (lambda x: jnp.einsum("bi,bij->bj", x, gaussian(3, 4, 5)), x4),
    "mixing tokens": (lambda x: jnp.einsum("st,btd->bsd", gaussian(3, 5), x), jnp.ones((2, 5, 4))),
    "integers": (lambda x: x @ jnp.arange(8.0).reshape(4, 2).astype(int), x4),
    "zeros": (lambda x: x @ jnp.zeros((4, 2)), x4),
    "a kernel of zeros": (
        lambda x: lax.conv_general_dilated(x[:, None], jnp.zeros((1, 1, 2)), (1,), "VALID"),
        x4,
    ),
    "a mask and a condition": (lambda x: jnp.where((x > 0) & (jnp.eye(3, 4) < 1), x, 0.0), x4),
    "a scale": (lambda x: x * W[:, 0], jnp.ones((4, 4))[0]),
    "a division": (lambda x: x / jnp.asarray([2.0, 0.5, 3.0, -4.0]), jnp.ones(4)),
    "a sum": (lambda x: x.sum(1), x4),
    "a mean": (lambda x: x.mean(), x4),
    "sums over two axes": (lambda x: image[0, 0, 0, 0] * x.sum((1, 2)), image),
    "a maximum": (lambda x: x.max(1), x4),
    "a minimum": (lambda x: x.min(), x4),
    "running sums": (lambda x: jnp.cumsum(x, 1), x4),
    "running sums from the right": (lambda x: lax.cumsum(x, 0, reverse=True), x4),
    "reshape": (lambda x: x.reshape(2, 6), x4),
    "transpose": (lambda x: x.transpose(3, 1, 0, 2), image),
    "reverse": (lambda x: x[::-1], x4),
    "a strided slice": (lambda x: x[::2, 1:], x4),
    "repeat": (lambda x: jnp.repeat(x, 3, 1), x4),
    "tile": (lambda x: jnp.tile(x, (2, 3)), x4),
    "broadcast": (lambda x: jnp.broadcast_to(x[:, None], (3, 7, 4)), x4),
    "gather": (lambda x: x[indices], x4),
    "take": (lambda x: jnp.take(x, jnp.asarray([0, 0, 3]), 1), x4),
    "take along an axis": (lambda x: jnp.take_along_axis(x, indices, 1), x4),
    "concatenate with itself": (lambda x: jnp.concatenate([x, x[:, :2]], 1), x4),
    "concatenate with constants": (lambda x: jnp.concatenate([x, jnp.ones((3, 2))], 1), x4),
    "concatenate scaled": (lambda x: jnp.concatenate([2 * x, -x[:, :2]], 1), x4),
    "stack": (lambda x: jnp.stack([x, x, 3 * x]), x4),
    "pad": (lambda x: jnp.pad(x, ((1, 0), (0, 2)), constant_values=5.0), x4),
    "pad inside and away": (lambda x: lax.pad(x, 1.0, ((0, -1, 2), (-1, 1, 0))), x4),
    "pad by reflection": (lambda x: jnp.pad(x, ((0, 0), (1, 2)), mode="reflect"), x4),
    "pad around": (lambda x: jnp.pad(x, ((2, 1), (0, 0)), mode="wrap"), x4),
    "roll": (lambda x: jnp.roll(x, 1, 0), x4),
    "split": (lambda x: jnp.split(x, [1, 2], 1)[2], x4),
    "a constant mask": (lambda x: jnp.where(jnp.eye(3, 4) > 0, x, 7.0), x4),
    "two masked": (lambda x: jnp.where(jnp.eye(3, 4) > 0, x, 2 * x), x4),
    "dynamic slice": (lambda x: lax.dynamic_slice(x, (1, 2), (2, 2)), x4),
    "update a slice": (lambda x: lax.dynamic_update_slice(x, 3 * x[:1, :1], (2, 2)), x4),
    "set rows": (lambda x: x.at[jnp.asarray([2])].set(5.0), x4),
    "overwritten": (lambda x: x * x.at[:].set(3.0), x4),
    "filled beyond the end": (
        lambda x: x * x.at[jnp.asarray([7, 8, 9])].get(mode="fill", fill_value=5.0),
        x4,
    ),
    "split in front of all": (lambda x: lax.split(x, (0, 3))[1], x4),
    "add rows up": (lambda x: jax.ops.segment_sum(x, jnp.asarray([1, 1, 0]), 3), x4),
    "sort": (lambda x: jnp.sort(x, 0), x4),
    "top k": (lambda x: lax.top_k(x, 2)[0], x4),
    "carried by constant keys": (
        lambda x: lax.sort((jnp.asarray([3.0, 1.0, 2.0]), x[:, 0]), num_keys=1)[1],
        x4,
    ),
    "triangle": (lambda x: jnp.tril(x), x4),
    "diagonal": (lambda x: jnp.diagonal(x), x4),
    "average pooling": (lambda x: nn.avg_pool(x, (2, 2), (2, 2)), image),
    "average pooling, overlapping": (
        lambda x: nn.avg_pool(x, (3, 2), (1, 2), padding="SAME"),
        image,
    ),
    "global pooling": (lambda x: x.mean((1, 2)), image),
    "max pooling, disjoint": (lambda x: nn.max_pool(x, (2, 2), (2, 2)), image),
    "vmap": (jax.vmap(lambda x: W.T @ x), x4),
    "jit": (jax.jit(lambda x: x @ W), x4),
    "remat": (jax.checkpoint(lambda x: x @ W), x4),
    "doubling in a loop": (lambda x: lax.fori_loop(0, 3, lambda i, y: 2 * y, x), x4),
    "running down": (_running_down, x4),
    "a scan over weights": (lambda x: lax.scan(lambda y, A: (y @ A, None), x, STACK)[0], x4),
    "weights out of a scan": (_weights_out_of_a_scan, x4),
    "a scan of no rounds": (lambda x: 2 * lax.scan(lambda y, _: (y * y, y), x, None, 0)[0], x4),
    "printing": (lambda x: (jax.debug.print("x is here"), 2 * x)[1], x4),
    "a branch": (lambda x: lax.cond(W[0, 0] > 9, lambda y: y * 5, lambda y: y * 2, x), x4),
    "a switch": (lambda x: lax.switch(1, [lambda y: y, lambda y: 3 * y], x), x4),
    "the identity, dilated": (_dilated, jnp.ones((1, 1, 5))),
}  # fmt: skip


@pytest.mark.parametrize("name", EXACT)
def test_the_bound_is_the_norm(name):
    check(*EXACT[name], exact=True)


def _scan(x):
    def body(carry, row):
        carry = jnp.tanh(carry @ W[:, :4]) + row
        return carry, 2 * carry

    return lax.scan(body, jnp.zeros(4), x)[1]


def _scan_reversed(x):
    return lax.scan(lambda c, row: (c + row, c), jnp.zeros(4), x, reverse=True)[1]


CHOICE = jnp.asarray(RNG.integers(0, 3, (3, 4)), jnp.int32)


ABOVE = {
    "max pooling": (lambda x: nn.max_pool(x, (3, 3), (2, 2), padding="SAME"), image),
    "min pooling": (lambda x: -nn.max_pool(-x, (3, 3), (1, 1)), image),
    "running maxima": (lambda x: lax.cummax(x, 1), x4),
    "running log-sum-exp": (lambda x: lax.cumlogsumexp(x, 1), x4),
    "differences": (lambda x: jnp.diff(x, axis=1), x4),
    "convex": (lambda x: 0.25 * x + 0.75 * x[::-1], x4),
    "median": (lambda x: jnp.median(x, axis=1), x4),
    "layers that share": (lambda x: jnp.concatenate([x @ W, jnp.tanh(x)], 1), x4),
    "gates": (lambda x: jnp.tanh(x @ W) * jax.nn.sigmoid(x @ W[::-1]), x4),
    "scan": (_scan, x4),
    "scan from the right": (_scan_reversed, x4),
    "mapped": (lambda x: lax.map(lambda row: jnp.tanh(row @ W), x), x4),
    "associative scan": (lambda x: lax.associative_scan(jnp.add, x, axis=1), x4),
    "layer norm of softmax": (lambda x: NORM(jax.nn.softmax(x)), x4),
    "group norm": (GROUP_NORM, image),
    "batch norm in training": (BATCH_NORM, x4),
    "per-channel prelu": (lambda x: jnp.where(x > 0, x, W[0, 0] * x), x4),
    "masked softmax": (_masked_softmax, x4),
    "softmax of features": (lambda x: jax.nn.softmax(jnp.tanh(3 * x) + W[None, :, 0]), x4),
    "weight normalized by x": (_shortened, x4),
    "negative power": (lambda x: (jnp.abs(x) + 1) ** -3, x4),
    "root as a power": (lambda x: lax.pow(jnp.abs(x) + 1, jnp.full_like(x, 0.5)), x4),
    "zeroth power": (lambda x: x * lax.integer_pow(jnp.tanh(x), 0), x4),
    "within two limits": (lambda x: jnp.where((x > -1) & (x < 1), x, jnp.sign(x)), x4),
    "a bias in one of two gates": (lambda x: jnp.tanh(x + W[:1, :4]) * jax.nn.sigmoid(x), x4),
    "sums in two orders": (lambda x: jnp.tanh(x.sum(1)) + x.sum(1)[::-1], x4),
    "not above": (lambda x: jnp.where(~(x > 0), 0.0, x), x4),
    "chosen of three": (lambda x: lax.select_n(CHOICE, x, 2 * x, jnp.tanh(x)), x4),
    "partly filled": (
        lambda x: jnp.tanh(x[:2]) * jnp.take(jnp.tanh(x), jnp.asarray([0, 7]), 0, fill_value=9.0),
        x4,
    ),
    "rounded to integers": (lambda x: x + 0 * jnp.floor(x).astype(int).astype(x.dtype), x4),
}  # fmt: skip


@pytest.mark.parametrize("name", ABOVE)
def test_the_bound_is_not_below_the_norm(name):
    check(*ABOVE[name], exact=False)


# --- almost one of the known compositions -----------------------------------------------------

RAMP, TWICE = jnp.asarray([[1.0, 2.0, 3.0, 4.0]]), jnp.asarray([[1.0, 2.0, 2.0, 1.0]])
MASK = jnp.eye(3, 4) > 0


def _sum(x):
    return x.sum(1, keepdims=True)


def _norm(x):
    return jnp.sqrt(_sum(x * x))


def _shifted_exp(x):
    return jnp.exp(x - x.max(1, keepdims=True))


def _plus(x, y):
    return x + y


def _times(x, y):
    return x * y


def _deep(x):
    for _ in range(300):
        x = jnp.sin(x)
    return x


NEAR_MISSES = {
    "another row's softmax": lambda x: _shifted_exp(x) / jnp.roll(_sum(_shifted_exp(x)), 1, 0),
    "another bias": lambda x: jnp.exp(jnp.tanh(x) + RAMP) / _sum(jnp.exp(jnp.tanh(x) + TWICE)),
    "another axis": lambda x: (x - x.mean(0, keepdims=True)) / (0.1 + x.std(1, keepdims=True)),
    "scales in another order": lambda x: x * RAMP[:, ::-1] / jnp.sqrt(1 + _sum((x * RAMP) ** 2)),
    "entries in another order": lambda x: x[:, ::-1] * RAMP / jnp.sqrt(1 + _sum((x * RAMP) ** 2)),
    "a symmetric scale": lambda x: x[:, ::-1] * TWICE / jnp.sqrt(1 + _sum((x * TWICE) ** 2)),
    "other masked entries": lambda x: (
        jnp.where(MASK, 5.0, x) / jnp.sqrt(0.1 + _sum(jnp.where(MASK, 7.0, x * x)))
    ),
    "over what may vanish": lambda x: x / (_norm(x) - 0.25),
    "over two norms": lambda x: x / (0.1 + _norm(x) + jnp.abs(_norm(x))),
    "over what is no root": lambda x: x / jnp.cosh(_sum(x)),
    "over squares": lambda x: x / (1 + _sum(x * x)),
    "over the larger of two": lambda x: x * lax.rsqrt(jnp.maximum(_sum(x * x), _sum(x))),
    "a root of three factors": lambda x: x / jnp.sqrt(1 + _sum(x * x) * _sum(jnp.tanh(x)) ** 2),
    "the logarithm of another sum": lambda x: x - jnp.log(1 + _sum(jnp.abs(x))),
    "what was taken off is not added": lambda x: jnp.log(_sum(_shifted_exp(x))),
    "twice the maximum, once the minimum": lambda x: jnp.concatenate(
        [2 * jnp.maximum(x[:, :2], x[:, 2:]), jnp.minimum(x[:, :2], x[:, 2:])], 1
    ),
    "constants cut from a join": lambda x: x * jnp.concatenate([x, jnp.ones((3, 4))])[3:],
    "windowed sums": lambda x: lax.reduce_window(x, 0.0, _plus, (1, 2), (1, 1), "VALID"),
    "windowed products": lambda x: lax.reduce_window(x, 1.0, _times, (1, 2), (1, 1), "VALID"),
    "an odd power": lambda x: lax.pow(jnp.abs(x) + 1, jnp.full_like(x, 1.7)),
    "what is finite": lambda x: jnp.where(jnp.isfinite(x), x, 0.0),
    "batch groups": lambda x: lax.conv_general_dilated(
        x.reshape(3, 1, 4), jnp.ones((3, 1, 2)), (1,), "VALID", batch_group_count=3
    ),
    "deeper than expressions go": _deep,
    "the minimum of others": lambda x: jnp.concatenate(
        [jnp.maximum(x[:, :2], x[:, 2:]), jnp.minimum(x[:, :2], x[:, :1:-1])], 1
    ),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_are_refused_or_bounded(name):
    fn = NEAR_MISSES[name]
    try:
        bound = jsn.lipschitz_bound(fn, x4)
    except ValueError:
        bound = np.inf
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1000, 3, 4)) * np.geomspace(0.01, 10, 1000)[:, None, None]
    y = x + rng.standard_normal(x.shape) * 10 ** rng.uniform(-2, 1, (1000, 1, 1))
    mapped = jax.jit(jax.vmap(fn))
    apart = np.asarray(mapped(jnp.asarray(x))) - np.asarray(mapped(jnp.asarray(y)))
    quotient = np.linalg.norm(apart.reshape(1000, -1), axis=1) / np.linalg.norm(
        (x - y).reshape(1000, -1), axis=1
    )
    assert 0 < quotient.max() <= bound * (1 + 1e-3)


# --- convolutions -------------------------------------------------------------------------------

GEOMETRY = [
    # strides, padding, input dilation, kernel dilation, groups
    ((1,), [(1, 1)], (1,), (1,), 1),
    ((2,), [(2, 0)], (1,), (1,), 1),
    ((1,), [(2, 2)], (1,), (2,), 2),
    ((1,), [(2, 1)], (2,), (1,), 1),
    ((1,), [(2, 2)], (3,), (1,), 2),
    ((2,), [(1, 2)], (3,), (2,), 1),
    ((1,), [(-1, 2)], (1,), (1,), 2),
    ((1, 2), [(1, 1), (0, 2)], (1, 1), (2, 1), 1),
    ((1, 1), [(1, 1), (2, 2)], (2, 2), (1, 1), 2),
    ((1, 1), [(0, 0), (-1, -1)], (2, 1), (1, 1), 1),
]


@pytest.mark.parametrize("case", GEOMETRY, ids=str)
def test_convolutions_of_any_geometry(case):
    strides, padding, ups, dilation, groups = case
    sizes = (7, 5)[: len(strides)]
    window = (3, 2)[: len(strides)]
    K = gaussian(*window, 2, 4)
    letters = "HW"[: len(strides)]
    layout = (f"NC{letters}", f"{letters}IO", f"N{letters}C")

    def fn(x):
        return lax.conv_general_dilated(
            x, K, strides, padding, ups, dilation, layout, feature_group_count=groups
        )

    x = jnp.ones((2, 2 * groups, *sizes))
    norm, bound = np.linalg.norm(dense(fn, x), 2), jsn.lipschitz_bound(fn, x)
    assert norm * (1 - 1e-6) <= bound <= 1.6 * norm


@pytest.mark.parametrize(("strides", "padding"), [*itertools.product((1, 2), ("SAME", "VALID"))])
def test_transposed_convolutions_of_flax(strides, padding):
    layer = nn.ConvTranspose(3, (3,), (strides,), padding=padding)
    x = jnp.ones((1, 5, 2))
    variables = layer.init(jax.random.key(0), x)
    check(lambda x: layer.apply(variables, x), x, exact=True)


@pytest.mark.parametrize("padding", ["SAME", "CIRCULAR", "REFLECT", "CAUSAL"])
def test_paddings_of_flax(padding):
    layer = nn.Conv(3, (3,), padding=padding)
    x = jnp.ones((1, 6, 2))
    variables = layer.init(jax.random.key(0), x)
    check(lambda x: layer.apply(variables, x), x, exact=False)


def test_a_large_convolution_is_bounded_by_its_symbol():
    K = jnp.ones((3, 3, 1, 1)) / 9
    layer = nn.Conv(1, (3, 3), use_bias=False)
    x = jax.ShapeDtypeStruct((1, 64, 64, 1), jnp.float32)
    bound = jsn.lipschitz_bound(lambda x: layer.apply({"params": {"kernel": K}}, x), x)
    assert 0.999 < bound < 1.01


# --- random programs ----------------------------------------------------------------------------


def random_program(seed: int):
    """A chain and a tree of operations that keep the shape (4, 4), some of them linear."""
    rng = np.random.default_rng(seed)
    M = jnp.asarray(rng.standard_normal((6, 4, 4)) / 2, jnp.float32)
    mask = jnp.asarray(rng.random((4, 4)) < 0.5)
    order = jnp.asarray(rng.integers(0, 4, 4))
    one = [
        lambda x: x @ M[0],
        lambda x: M[1] @ x,
        lambda x: x * M[2],
        lambda x: x + M[3],
        lambda x: x.T,
        lambda x: x[order],
        lambda x: x[:, ::-1],
        lambda x: jnp.where(mask, x, 0.5),
        lambda x: jnp.where(mask, x, x.T),
        lambda x: jnp.roll(x, 1, 1),
        lambda x: jnp.sort(x, 1),
        lambda x: jnp.cumsum(x, 0) / 2,
        jax.nn.relu,
        jnp.tanh,
        jax.nn.softmax,
        lambda x: jax.nn.silu(2 * x),
        lambda x: jnp.abs(x - 0.3),
        lambda x: jnp.clip(x, -0.5, 0.7) ** 2,
        lambda x: jnp.broadcast_to(x.mean(0, keepdims=True), x.shape),
        lambda x: jnp.broadcast_to(x.max(1, keepdims=True), x.shape),
        lambda x: x - jax.nn.logsumexp(x, axis=1, keepdims=True),
        lambda x: x / jnp.sqrt(0.3 + jnp.mean(x * x, 1, keepdims=True)),
    ]
    two = [
        lambda x, y: x + y,
        lambda x, y: x - 2 * y,
        jnp.maximum,
        jnp.minimum,
        lambda x, y: jnp.where(mask, x, y),
        lambda x, y: jnp.tanh(x) * jax.nn.sigmoid(y),
        lambda x, y: jnp.concatenate([x[:2], y[:2]]),
        lambda x, y: jnp.concatenate([jnp.maximum(x, y)[:2], jnp.minimum(x, y)[:2]]),
        lambda x, y: jnp.tanh(x) @ jnp.tanh(y),
    ]
    choices = [
        (two[rng.integers(len(two))], rng.random(2))
        if rng.random() < 0.35
        else (one[rng.integers(len(one))], rng.random(1))
        for _ in range(7)
    ]

    def fn(x):
        made = [x]
        for operation, places in choices:
            recent = len(made) - 1 - np.floor(places**2 * len(made)).astype(int)
            made.append(operation(*(made[i] for i in recent)))
        return made[-1]

    return fn


def check_program(seed: int) -> bool:
    """Checks the bound of a program, if it has one."""
    fn, x = random_program(seed), jnp.ones((4, 4))
    try:
        bound = jsn.lipschitz_bound(fn, x)
    except ValueError:
        return False
    jacobian = jax.jit(jax.vmap(jax.jacfwd(lambda p: jnp.ravel(fn(p.reshape(4, 4))))))
    rng = np.random.default_rng(seed)
    points = rng.standard_normal((40, 16)) * np.geomspace(0.03, 10, 40)[:, None]
    norms = np.linalg.norm(
        np.asarray(jacobian(jnp.asarray(points, jnp.float32)), np.float64), 2, (1, 2)
    )
    assert bound >= norms.max() * (1 - 1e-5)
    return True


def test_random_programs():
    assert sum(check_program(seed) for seed in range(10)) >= 9


@pytest.mark.slow
@pytest.mark.parametrize("start", range(100, 500, 50))
def test_many_random_programs(start):
    assert sum(check_program(seed) for seed in range(start, start + 50)) >= 45
