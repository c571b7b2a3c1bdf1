"""Element-wise functions and functions of groups: enclosures that contain, slopes that bound."""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from networks import GELU, GELU_TANH, MISH, SELU, SILU

import jsn
from jsn import _interval as iv
from jsn import _upward
from jsn._expr import Pool
from jsn._interval import Interval
from jsn._jet import enclose
from jsn._slope import largest_slope, range_of
from jsn._unary import UNARY

POOL = Pool()
T = POOL.leaf


def make(op, *args, **params):
    return POOL.make(
        op, *(a if not isinstance(a, float) else POOL.const(a) for a in args), **params
    )


def cells(seed: int, count: int = 400) -> Interval:
    """Intervals of all sizes: points, small and large ones, unbounded ones."""
    rng = np.random.default_rng(seed)
    at = rng.standard_normal(count) * 10.0 ** rng.uniform(-8, 3, count)
    width = 10.0 ** rng.uniform(-12, 3, count) * (rng.random(count) < 0.9)
    lo, hi = at - width / 2, at + width / 2
    lo, hi = (
        np.where(rng.random(count) < 0.05, -np.inf, lo),
        np.where(rng.random(count) < 0.05, np.inf, hi),
    )
    return Interval(lo, hi)


def points(t: Interval, seed: int) -> np.ndarray:
    """A finite number in each interval, an end of it every now and then."""
    rng = np.random.default_rng(seed)
    lo = np.where(np.isinf(t.lo), np.minimum(t.hi, 0) - 1e3 * rng.random(len(t.lo)), t.lo)
    lo = np.where(np.isinf(lo), -700.0, lo)
    hi = np.where(np.isinf(t.hi), np.maximum(lo, 0) + 1e3 * rng.random(len(t.lo)), t.hi)
    share = rng.choice([0.0, 1.0, *rng.random(6)], len(t.lo))
    return np.clip(lo + share * (hi - lo), lo, hi)


# --- interval arithmetic ------------------------------------------------------------------------

FOUR = {
    "add": (iv.add, lambda a, b: a + b),
    "mul": (iv.mul, lambda a, b: a * b),
    "div": (iv.div, lambda a, b: a / b if b else None),
}


@pytest.mark.parametrize("name", FOUR)
def test_the_four_operations_contain_the_exact_result(name):
    operation, exact = FOUR[name]
    for seed in range(4):
        x, y = cells(2 * seed), cells(2 * seed + 1)
        found = operation(x, y)
        for a, b, lo, hi in zip(points(x, seed), points(y, seed + 9), *found, strict=True):
            value = exact(Fraction(a), Fraction(b))
            if value is not None:
                assert math.isinf(lo) or Fraction(lo) <= value
                assert math.isinf(hi) or value <= Fraction(hi)
                assert lo <= hi


def test_numbers_that_need_no_rounding_get_none():
    one = iv.interval(np.array([3.0, 0.1]), np.array([3.0, 0.1]))
    two = iv.interval(2.0, 2.0, one)
    assert iv.mul(one, two) == (pytest.approx([6.0, 0.2], abs=0), pytest.approx([6.0, 0.2], abs=0))
    third = iv.reciprocal(iv.interval(np.array([3.0]), np.array([3.0])))
    assert third.lo < third.hi


# --- functions of the library ---------------------------------------------------------------------

EXACT = {
    "exp": mpmath.exp, "exp2": lambda u: mpmath.mpf(2) ** u, "expm1": mpmath.expm1,
    "log": mpmath.log, "log1p": mpmath.log1p, "tanh": mpmath.tanh,
    "logistic": lambda u: 1 / (1 + mpmath.exp(-u)),
    "softplus": lambda u: mpmath.log1p(mpmath.exp(u)),
    "erf": mpmath.erf, "erfc": mpmath.erfc, "sin": mpmath.sin, "cos": mpmath.cos,
    "atan": mpmath.atan, "asinh": mpmath.asinh, "sinh": mpmath.sinh, "cosh": mpmath.cosh,
    "sqrt": mpmath.sqrt,
}  # fmt: skip
SLOPES = {
    "exp": mpmath.exp, "exp2": lambda u: mpmath.log(2) * mpmath.mpf(2) ** u, "expm1": mpmath.exp,
    "log": lambda u: 1 / u, "log1p": lambda u: 1 / (1 + u), "tanh": lambda u: mpmath.sech(u) ** 2,
    "logistic": lambda u: 1 / (2 * mpmath.cosh(u / 2)) ** 2,
    "softplus": lambda u: 1 / (1 + mpmath.exp(-u)),
    "erf": lambda u: 2 / mpmath.sqrt(mpmath.pi) * mpmath.exp(-(u**2)),
    "erfc": lambda u: -2 / mpmath.sqrt(mpmath.pi) * mpmath.exp(-(u**2)),
    "sin": mpmath.cos, "cos": lambda u: -mpmath.sin(u), "atan": lambda u: 1 / (1 + u**2),
    "asinh": lambda u: 1 / mpmath.sqrt(1 + u**2), "sinh": mpmath.cosh, "cosh": mpmath.sinh,
    "sqrt": lambda u: 1 / (2 * mpmath.sqrt(u)),
}  # fmt: skip


def holds(interval: Interval, at: int, value) -> bool:
    """Whether an interval contains a number of 50 digits."""
    lo, hi, slack = interval.lo[at], interval.hi[at], abs(value) * mpmath.mpf(10) ** -38
    above = lo == -np.inf or mpmath.mpf(lo) <= value + slack
    return bool(above and (hi == np.inf or value - slack <= mpmath.mpf(hi)))


@pytest.mark.parametrize("name", UNARY)
def test_enclosures_contain_value_slope_rise_and_power(name):
    function = UNARY[name]
    u = cells(7, 300)
    if name in ("log", "sqrt"):
        ends = np.sort(np.abs(np.stack(u)), axis=0) + 1e-9
        u = Interval(np.minimum(ends[0], 1e300), ends[1])
    if name == "log1p":
        u = Interval(np.maximum(u.lo, -0.999), np.maximum(u.hi, -0.998))
    value, slope = function.value(u), function.slope(u)
    rise = function.rise(u) if function.rise else None
    power = function.power(u) if function.power else None
    with mpmath.workdps(50):
        for i, at in enumerate(points(u, 3)):
            v = mpmath.mpf(float(at))
            if abs(v) > 5000:
                continue
            exact, steep = EXACT[name](v), SLOPES[name](v)
            assert holds(value, i, exact), (name, at)
            assert holds(slope, i, steep), (name, at)
            assert rise is None or holds(rise, i, v * steep), (name, at)
            assert power is None or exact == 0 or holds(power, i, v * steep / exact), (name, at)


# --- expressions ------------------------------------------------------------------------------


def random_expression(rng, depth: int):
    """An expression and the same as a function of mpmath numbers."""
    if depth == 0 or rng.random() < 0.1:
        if rng.random() < 0.6:
            return T, lambda t: t
        number = float(np.round(rng.standard_normal() * 2, 1))
        return POOL.const(number), lambda t: mpmath.mpf(number)
    kind = rng.integers(9)
    x, f = random_expression(rng, depth - 1)
    if kind < 3:
        name = rng.choice(["tanh", "logistic", "softplus", "erf", "sin", "atan", "exp"])
        return make(name, x), lambda t: EXACT[name](f(t))
    if kind == 3:
        return make("abs", x), lambda t: abs(f(t))
    if kind == 4:
        return make("square", x), lambda t: f(t) ** 2
    y, g = random_expression(rng, depth - 1)
    if kind == 5:
        return make("mul", x, y), lambda t: f(t) * g(t)
    if kind == 6:
        return make("max", x, y), lambda t: max(f(t), g(t))
    if kind == 7:
        return make("add", x, make("neg", y)), lambda t: f(t) - g(t)
    root = make("sqrt", make("add", make("square", y), 0.5))
    return make("div", x, root), lambda t: f(t) / mpmath.sqrt(g(t) ** 2 + mpmath.mpf("0.5"))


@pytest.mark.parametrize("seed", range(60))
def test_enclosures_of_random_expressions_contain_values_and_differences(seed):
    rng = np.random.default_rng(seed)
    expression, function = random_expression(rng, 4)
    t = cells(seed, 40)
    jet = enclose(expression, t)
    with mpmath.workdps(40):
        for i, (a, b) in enumerate(zip(points(t, seed), points(t, seed + 1), strict=True)):
            if max(abs(a), abs(b)) > 300:
                continue
            a, b = mpmath.mpf(float(a)), mpmath.mpf(float(b))
            values = function(a), function(b)
            assert holds(jet.g, i, values[0])
            lost = (abs(values[0]) + abs(values[1]) + 1) * mpmath.mpf(10) ** -35
            if a != b:  # the mean value theorem, for functions with corners too
                mean = (values[0] - values[1]) / (a - b)
                lo, hi = jet.d.lo[i] - lost / abs(a - b), jet.d.hi[i] + lost / abs(a - b)
                assert lo <= mean <= hi


@pytest.mark.parametrize("seed", range(40))
def test_no_difference_quotient_exceeds_the_largest_slope(seed):
    rng = np.random.default_rng(1000 + seed)
    expression, function = random_expression(rng, 3)
    slope, (low, high) = largest_slope(expression), range_of(expression)
    at = np.sort(rng.standard_normal(60) * 10.0 ** rng.uniform(-2, 1.5, 60))
    with mpmath.workdps(40):
        at = [mpmath.mpf(float(x)) for x in at]
        values = [function(x) for x in at]
        for a, b, u, v in zip(at, at[1:], values, values[1:], strict=False):
            assert low <= u <= high
            assert slope == math.inf or abs(u - v) <= slope * (b - a)


# --- the constants of activations -------------------------------------------------------------

ACTIVATIONS = {
    "relu": (jax.nn.relu, 1), "gelu": (lambda x: jax.nn.gelu(x, approximate=False), GELU),
    "gelu tanh": (jax.nn.gelu, GELU_TANH), "silu": (jax.nn.silu, SILU), "mish": (jax.nn.mish, MISH),
    "swish of any steepness": (lambda x: x * jax.nn.sigmoid(1.702 * x), SILU),
    "selu": (jax.nn.selu, SELU), "hard swish": (jax.nn.hard_swish, 1.5), "relu6": (jax.nn.relu6, 1),
    "tanh": (jnp.tanh, 1), "sigmoid": (jax.nn.sigmoid, 0.25), "softplus": (jax.nn.softplus, 1),
    "softplus by hand": (lambda x: jnp.log(1 + jnp.exp(x)), 1),
    "sigmoid by hand": (lambda x: 1 / (1 + jnp.exp(-x)), 0.25),
    "hard tanh": (jax.nn.hard_tanh, 1), "hard sigmoid": (jax.nn.hard_sigmoid, 1 / 6),
    "soft sign": (jax.nn.soft_sign, 1), "log sigmoid": (jax.nn.log_sigmoid, 1),
    "squareplus": (jax.nn.squareplus, 1), "sparse plus": (jax.nn.sparse_plus, 1),
    "elu": (jax.nn.elu, 1), "elu, steep": (lambda x: jax.nn.elu(x, 2.5), 2.5),
    "celu": (jax.nn.celu, 1),
    "leaky relu": (jax.nn.leaky_relu, 1), "leaky, steep": (lambda x: jax.nn.leaky_relu(x, 4.0), 4),
    "serf": (lambda x: x * jax.lax.erf(jax.nn.softplus(x)), 1.0861254441509971534),
    "erf": (jax.lax.erf, 1.1283791670955126), "snake": (lambda x: x + jnp.sin(x) ** 2, 2),
    "lipswish": (lambda x: jax.nn.silu(x) / 1.1, 0.9998539274),
    "bump": (lambda x: jnp.exp(-(x**2)), 0.8577638849607), "sin": (jnp.sin, 1), "abs": (jnp.abs, 1),
    "arctan": (jnp.arctan, 1), "relu as a selection": (lambda x: jnp.where(x > 0, x, 0.0), 1),
    "relu as a mask": (lambda x: x * (x > 0), 1), "clip": (lambda x: jnp.clip(x, -1, 2), 1),
    "soft threshold": (lambda x: jnp.sign(x) * 0 + jax.nn.relu(x - 1) - jax.nn.relu(-x - 1), 1),
    "huber": (lambda x: jnp.where(jnp.abs(x) < 1, 0.5 * x * x, jnp.abs(x) - 0.5), 1),
    "triangle wave": (lambda x: jnp.where((x > -1) & (x < 1), 1 - jnp.abs(x), 0.0), 1),
    "quadratic on a bounded range": (lambda x: jax.nn.sigmoid(x) ** 2, 8 / 27),
    "root of a square": (lambda x: jnp.sqrt(x * x), 1),
    "clamp": (lambda x: jax.lax.clamp(-1.0, x, 2.0), 1),
    "below infinity": (lambda x: jnp.minimum(x, jnp.inf), 1),
    "inverse of a product": (lambda x: 1 / (2 * (1 + x * x)), 3 * math.sqrt(3) / 16),
    "almost softplus": (lambda x: jax.nn.relu(x) + jnp.log1p(jnp.exp(-jnp.abs(2 * x))), 1),
    "over the norm and a floor": (lambda x: x / (0.25 + jnp.sqrt(jnp.sum(x * x))), 4),
    "over the norm or a floor": (lambda x: x / jnp.maximum(jnp.sqrt(jnp.sum(x * x)), 0.25), 4),
    "by a root with a floor": (lambda x: x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x), 0.25)), 2),
    "log of what is at least 1": (lambda x: jnp.log(1 + x * x), 1), "nothing": (lambda x: 0 * x, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_constant_of_an_activation(name):
    fn, constant = ACTIVATIONS[name]
    bound = jsn.lipschitz_bound(fn, jnp.ones(3))
    assert constant * (1 - 1e-7) <= bound <= constant * (1 + 2e-6)


# --- rounding up ------------------------------------------------------------------------------


def test_constants_are_combined_without_rounding_down():
    rng = np.random.default_rng(0)
    for _ in range(300):
        a, b, c = (float(x) for x in np.ldexp(rng.random(3), rng.integers(-300, 300, 3)))
        assert Fraction(_upward.times(a, b)) >= Fraction(a) * Fraction(b)
        assert Fraction(_upward.plus(a, b, c)) >= Fraction(a) + Fraction(b) + Fraction(c)
        square = Fraction(a) ** 2 + 3 * Fraction(b) ** 2
        assert (
            square
            <= Fraction(_upward.norm([(a, 1), (b, 3)])) ** 2
            <= square * (1 + Fraction(1, 2**50))
        )
    assert _upward.root(9) == 3
    assert _upward.times(0.0, math.inf) == 0
    assert _upward.plus(1.0, math.inf) == _upward.norm([(math.inf, 1)]) == math.inf
    assert _upward.times(1e200, 1e200) == math.inf


@pytest.mark.parametrize("activation", [jax.nn.gelu, jax.nn.swish, jnp.tanh])
def test_a_bias_does_not_change_how_steep_an_activation_is(activation):
    bias, x = jnp.linspace(-5, 5, 8), jnp.ones(8)
    plain = float(jsn.lipschitz_bound(activation, x))
    shifted = float(jsn.lipschitz_bound(lambda x: activation(x + bias), x))
    assert shifted == pytest.approx(plain, rel=1e-6)


def test_factors_that_vary_count_by_their_largest():
    factor, x = jnp.linspace(0.5, 3, 8), jnp.ones(8)
    bound = float(jsn.lipschitz_bound(lambda x: jax.nn.gelu(factor * x - 1), x))
    t = jnp.linspace(-9, 9, 20001)
    steepest = jnp.abs(jax.vmap(jax.grad(jax.nn.gelu))(t)).max()
    assert 3 * steepest <= bound <= 3 * steepest * (1 + 1e-4)
