"""Station 8: every constant of the proofs is needed. Weaken one, and a bound fails.

Real rounding errors are far smaller than what a proof must allow, so weakening a constant would go
unnoticed. Here an adversary computes instead: with a unit of rounding of 2^-10 or so, and each
error as large as the model of arithmetic allows it to be, all in the same direction. With the
constants as they are the bounds hold even then; with any one of them weakened they do not.
"""

import contextlib
import math
from fractions import Fraction

import jax.numpy as jnp
import mpmath
import numpy as np
import oracles
import pytest

import jsn
from jsn import _certify, _gram, _rounding, _symbol, _window
from jsn._rounding import TERMS, float_up, gamma, sqrt_up

TESTED = set()


@contextlib.contextmanager
def terms(**changed):
    """The table of constants with some of them changed."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in changed.items():
            patch.setitem(TERMS, name, value)
        yield patch


def weakened(*names):
    """Parametrizes a test over constants, each weakened to nothing and to the half."""
    TESTED.update(names)
    shares = (Fraction(0), Fraction(1, 2))
    return pytest.mark.parametrize(
        "weak",
        [{name: share * Fraction(TERMS[name])} for name in names for share in shares],
        ids=lambda weak: "-".join(f"{name}={float(value):.3g}" for name, value in weak.items()),
    )


# --- one factorization -------------------------------------------------------------------------

TOY = {"unit": Fraction(1, 2**10), "tiny": Fraction(1, 2**16)}


class Adversary:
    """Rounds every step of the certificate for a matrix of ones against it.

    |H|^T |H| = H^T H is a multiple of the matrix of ones there, with one eigenvalue: each error
    that the model allows can be had in full, in the direction that hurts.
    """

    def __init__(self, rows: int, n: int, dtype=float):
        self.rows, self.n, self.dtype = rows, n, dtype
        self.depth = rows + 1
        with terms(**TOY):
            self.top = float(rows * n * (1 - gamma(self.depth)))

    def gram(self, matrix, exponent):
        G = np.full((self.n, self.n), self.top / self.n, self.dtype, order="F")
        return G, self.depth

    def shifted(self, G, d):
        A = -G
        A[np.diag_indices(self.n)] = (d - np.real(G[0, 0])) * (1 + float(TOY["unit"]))
        return A

    def least(self, A) -> float:
        """The most negative eigenvalue with which a factorization may still run to its end."""
        n, largest = self.n, float(np.real(A[0, 0]))
        steps = (n + 3) * (8 if self.dtype is complex else 1)
        relative = steps * TOY["unit"] / (1 - steps * TOY["unit"])
        rounding = relative / (1 - relative) * n * largest
        return -float(rounding + 4 * n * (2 * (n + 1) + largest) * float(TOY["tiny"]))

    def factors(self, A):
        return np.linalg.eigvalsh(A)[0] >= self.least(A) * (1 - 1e-6)

    def guesses(self, G):
        low, high = 0.0, 4 * self.top
        for _ in range(200):
            d = (low + high) / 2
            low, high = (low, d) if self.factors(self.shifted(G, d)) else (d, high)
        yield high * (1 + 1e-9)

    def attack(self, patch):
        for name in ("gram", "shifted", "factors", "guesses"):
            patch.setattr(_certify, name, getattr(self, name))


def attacked_bound(weak, rows, n):
    """The bound of a matrix of ones under attack, as a share of the truth."""
    adversary = Adversary(rows, n)
    with terms(**{**TOY, **weak}) as patch:
        adversary.attack(patch)
        return float(_certify.norm_bound(np.ones((rows, n)), 0)) / math.sqrt(rows * n)


@pytest.mark.parametrize(("rows", "n"), [(16, 8), (64, 4), (128, 12)])
def test_the_certificate_survives_the_adversary(rows, n):
    assert 1 <= attacked_bound({}, rows, n) < 1 + 1e-4


@weakened("product", "trace", "factor", "diagonal", "underflow", "unit", "tiny")
def test_the_certificate_needs_each_constant(weak):
    weak = {name: value * TOY.get(name, TERMS[name]) / TERMS[name] for name, value in weak.items()}
    assert attacked_bound(weak, 128, 12) < 1 - 1e-5


@weakened("complex")
def test_complex_factorizations_need_their_constant(weak):
    def bound(changed):
        adversary = Adversary(1, 12, complex)
        with terms(**{**TOY, **changed}) as patch:
            adversary.attack(patch)
            G, _ = adversary.gram(None, 0)
            return float(_certify.largest_eigenvalue_bound(G)) / adversary.top

    assert 1 <= bound({}) < 1 + 1e-4
    assert bound(weak) < 1


@weakened("dropped", "small")
def test_small_entries_need_their_constant(weak):
    toy = Fraction(1, 2**6)
    W = np.full((40000, 1), 0.9 * float(toy))  # each one small, together larger than the first
    W[0] = 0.75
    with terms(small=toy):
        kept = _rounding.scaled(W, 0)
        assert np.count_nonzero(kept) == 1
        assert _certify.norm_bound(kept, 0) >= np.linalg.norm(W)
    weak = {
        name: value * (toy / TERMS[name] if name == "small" else 1) for name, value in weak.items()
    }
    with terms(**{"small": toy, **weak}):
        assert _certify.norm_bound(kept, 0) < np.linalg.norm(W)


# --- the symbol ----------------------------------------------------------------------------------


def symbol_error(columns, taps, weak):
    """What the adversary does to the Gram symbol at frequency 0, as a share of what is allowed."""
    C = np.full((1, taps, 1, columns), 0.5)
    toy = {"unit": Fraction(1, 2**13)}
    with terms(**toy) as patch:
        unit = float(toy["unit"])
        one, many = (float(gamma(n)) for n in (taps * columns + 1, taps + 1))
        correlate, waves, at = _symbol.correlate, _symbol.waves, _symbol.Symbol.at
        patch.setattr(_symbol, "correlate", lambda X, Y: correlate(X, Y) * (1 + one))
        patch.setattr(
            _symbol, "waves",
            lambda *args: tuple(w + float(TERMS["waves"]) * unit for w in waves(*args)),
        )  # fmt: skip
        patch.setattr(_symbol.Symbol, "at", lambda *args: at(*args) * (1 + many))
        gram = _symbol.symbol(C)
        error = abs(gram.at(np.zeros((1, 1), int), [1])[0, 0, 0, 0] - (0.5 * taps) ** 2 * columns)
    with terms(**toy, **weak):
        return error / float(_symbol.symbol(C).error)


@pytest.mark.parametrize(("columns", "taps"), [(1, 100), (90, 3), (4, 3), (1, 1)])
def test_the_symbol_survives_the_adversary(columns, taps):
    assert 0.5 < symbol_error(columns, taps, {}) <= 1


TESTED.update(("coefficients", "waves", "series"))


@pytest.mark.parametrize(
    ("name", "columns", "taps"),
    [("coefficients", 150, 2), ("waves", 2, 3), ("series", 1, 300)],
)
def test_the_symbol_needs_each_constant(name, columns, taps):
    assert symbol_error(columns, taps, {name: 0}) > 1


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_waves_are_as_close_as_they_say(rank):
    rng = np.random.default_rng(rank)
    lags = rng.integers(-20, 21, (7, rank))
    of = [int(n) for n in rng.choice([12, 64, 1000, 4096], rank)]
    turns = rng.integers(0, of, (5, rank))
    cos, sin = _symbol.waves(lags, turns, of)
    off = 0
    with mpmath.workdps(40):
        for i, turn in enumerate(turns):
            for j, lag in enumerate(lags):
                phase = sum(
                    mpmath.mpf(int(a * b)) / n for a, b, n in zip(lag, turn, of, strict=True)
                )
                off = max(off, abs(mpmath.cos(2 * mpmath.pi * phase) - cos[i, j]))
                off = max(off, abs(mpmath.sin(2 * mpmath.pi * phase) - sin[i, j]))
    assert off <= float(TERMS["waves"] * rank * TERMS["unit"]) / 2


@weakened("riesz")
def test_a_grid_of_frequencies_is_no_bound(weak):
    # 1 + R exp(i w) with a rotation R by pi / 4: its norm |2 cos((w +- pi / 4) / 2)| is 2 halfway
    # between two frequencies of the first grid, and falls from there as fast as it can.
    half = math.sqrt(0.5)
    K = np.stack([np.eye(2), [[half, -half], [half, half]]])
    operator = jsn.Conv((500, 2))
    for budget in (0, _symbol._BUDGET):
        with terms() as patch:
            patch.setattr(_symbol, "_BUDGET", budget)
            assert 2 <= jsn.upper_bound(K, operator=operator, method="symbol") < 2.01
    with terms(**weak) as patch:
        patch.setattr(_symbol, "_BUDGET", 0)
        assert jsn.upper_bound(K, operator=operator, method="symbol") < 1.99


@weakened("padding")
def test_reflected_padding_needs_its_constant(weak):
    K = np.ones((5, 1, 1))
    layer = oracles.Layer(K, (4,), (1,), "REFLECT", (1,), 1, False)
    norm = np.linalg.norm(oracles.dense(layer), 2)
    operator = jsn.Conv(**layer.arguments())
    assert jsn.upper_bound(K, operator=operator, method="symbol") >= norm
    with terms(padding=0):
        assert jsn.upper_bound(K, operator=operator, method="symbol") < norm
    with terms(**weak):  # the factor is attained by the extension itself
        assert _window._extension(operator._axes((5,))) < math.sqrt(2)


@weakened("overlap")
def test_overlapping_taps_need_their_constant(weak):
    K = np.ones((3, 3, 1, 1), np.float32)
    operator = jsn.Conv((200, 200, 1))
    assert jsn.upper_bound(K, operator=operator, method="gram") >= 9 * (1 - 1e-3)
    with terms(**weak):
        assert jsn.upper_bound(K, operator=operator, method="gram") < 9 * (1 - 1e-3)


@weakened("assembly")
def test_taps_that_meet_need_their_constant(weak):
    K = np.full((32, 1, 1), 0.5)
    operator = jsn.Conv((2, 1), padding="CIRCULAR")
    exact = _window.dense

    def off(K, axes):  # each entry is a sum of 16, rounded down as far as it may be
        return exact(K, axes) * (1 - float(gamma(15)) if K[0, 0, 0] == 0.5 else 1)

    def bound(changed):
        with terms(**TOY) as patch:
            moduli = iter([off, exact, exact])
            patch.setattr(_window, "dense", lambda K, axes: next(moduli)(K, axes))
            patch.setattr(
                _certify, "norm_bound", lambda A, _: Fraction(float(np.linalg.norm(A, 2)))
            )
            with terms(**changed):
                return float(_window.dense_bound(operator, K))

    assert bound({}) >= 16
    assert bound(weak) < 16


# --- the device ----------------------------------------------------------------------------------


class Device:
    """Rounds every step of the Gram iteration for a matrix of ones against it."""

    def __init__(self, unit=2.0**-12, tiny=0.0, root=0.0):
        self.unit, self.tiny, self.root = unit, tiny, root

    def bound(self, rows, n, weak):
        eps = float(jnp.finfo(jnp.float32).eps)
        toy = {
            "device_unit": Fraction(self.unit / (eps / 2)),
            "device_flush": Fraction(self.tiny / float(jnp.finfo(jnp.float32).tiny)),
        }
        weak = {name: value * toy.get(name, 1) for name, value in weak.items()}
        allowed = lambda terms: terms * self.unit / (1 - terms * self.unit)
        square, add, root = _gram.square, _gram._sum, jnp.sqrt

        def squared(X, contracted, batch):
            terms = X.shape[contracted[0]]
            exact = square(X, contracted, batch)
            return exact * (1 - 0.999 * allowed(terms)) - 2 * terms * self.tiny

        def added(x):
            return add(x) * (1 - 0.999 * allowed(x.shape[-1] - 1))

        with terms(**{**toy, **weak}) as patch:
            patch.setattr(_gram, "square", squared)
            patch.setattr(_gram, "_sum", added)
            patch.setattr(_gram, "_root", lambda x: root(x) * (1 - self.root))
            W = jnp.full((rows, n), 1.5)  # not cached: evaluated as it stands
            found = _gram.bound(W, (0,), (1,), ())
        return float(found) / (1.5 * math.sqrt(rows * n))


ATTACKS = {
    "device_product": (Device(), 128, 32),
    "device_sums": (Device(), 8, 512),
    "device_unit": (Device(), 128, 32),
    "device_flush": (Device(tiny=2.0**-12), 32, 8),
    "device_scalars": (Device(unit=2.0**-24, root=2.0**-22), 1, 1),
}
TESTED.update(ATTACKS)


@pytest.mark.parametrize("name", ATTACKS)
def test_the_device_survives_the_adversary_and_needs_its_constants(name):
    device, rows, n = ATTACKS[name]
    assert 1 <= device.bound(rows, n, {}) < 1.6
    assert device.bound(rows, n, {name: 0}) < 1


# --- rounding up ---------------------------------------------------------------------------------


def test_fractions_are_rounded_up():
    rng = np.random.default_rng(0)
    for _ in range(300):
        x = Fraction(int(rng.integers(1, 2**62)), int(rng.integers(1, 2**62)))
        x *= Fraction(2) ** int(rng.integers(-1150, 1100))
        up = float_up(x)
        assert math.isinf(up) or x <= Fraction(up)
        below = math.nextafter(up, 0)
        assert Fraction(below) < x
        root = sqrt_up(x)
        assert x < root**2 <= x * (1 + Fraction(1, 2**60))
    assert sqrt_up(Fraction(0)) == 0
    assert float_up(Fraction(2) ** 1024) == math.inf
    assert float_up(Fraction(1, 2**1075)) == 5e-324


def test_constants_of_the_device_are_rounded_up():
    for x in (Fraction(1, 3), Fraction(2, 3), 1 + Fraction(1, 2**30), Fraction(1, 2**140)):
        assert Fraction(float(_gram._constant(x, np.dtype(np.float32)))) >= x


def test_every_constant_is_tested():
    assert set(TERMS) == TESTED
