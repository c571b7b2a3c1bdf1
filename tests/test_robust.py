"""Certified radii: sound against every attack, tight where the bound is attained."""

from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import pytest
from matrices import gaussian

import jsn


def test_the_radius_is_margin_over_sqrt_2_times_the_bound():
    logits = np.array([[3.0, 1.0, 2.5], [0.0, 4.0, -1.0]])
    assert jsn.certified_radius(logits, 2.0) == pytest.approx([0.5 / 8**0.5, 4 / 8**0.5])
    assert jsn.certified_radius(logits, [1.0, 4.0]) == pytest.approx([0.5 / 2**0.5, 1 / 2**0.5])
    assert jsn.certified_radius(logits[0], 2.0).shape == ()
    assert jsn.certified_radius(logits.reshape(2, 1, 3), 1.0).shape == (2, 1)


def test_the_radius_is_rounded_down():
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((300, 3)) * np.exp(rng.uniform(-30, 30, (300, 1)))
    bounds = np.exp(rng.uniform(-30, 30, 300))
    for x, L, r in zip(logits, bounds, jsn.certified_radius(logits, bounds), strict=True):
        second, first = sorted(map(Fraction, x.tolist()))[1:]
        assert 2 * (Fraction(float(L)) * Fraction(float(r))) ** 2 < (first - second) ** 2
        assert r == pytest.approx(float(first - second) / (2**0.5 * L), rel=1e-14)


def test_the_radius_is_rounded_down_at_the_ends_of_float64():
    tiny, huge = 5e-324, 1.7e308
    cases = [([0.0, tiny], 1.0), ([0.0, 1.0], tiny), ([-huge, huge], 1.0), ([0.0, huge], huge)]
    for x, L in cases:
        r = float(jsn.certified_radius(x, L))
        margin = Fraction(x[1]) - Fraction(x[0])
        assert 2 * (Fraction(L) * Fraction(r)) ** 2 < margin**2


def test_it_is_attained_by_a_linear_classifier():
    """f = W x with two classes along one direction: the class flips right at the radius."""
    W = np.array([[1.0, -1.0], [0.0, 0.0]]) / 2**0.5  # norm 1, logits x0 / sqrt 2 and -x0 / sqrt 2
    x = np.array([0.7, 0.2])
    radius = float(jsn.certified_radius(x @ W, jsn.upper_bound(W)))
    assert radius == pytest.approx(0.7, rel=1e-6)
    assert np.argmax((x - [radius * 0.999, 0]) @ W) == 0
    assert np.argmax((x - [radius * 1.001, 0]) @ W) == 1


def test_no_attack_beats_it():
    W = gaussian(0, 20, 7).astype(np.float64)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((40, 20))
    logits = x @ W
    radius = jsn.certified_radius(logits, jsn.upper_bound(W))
    label = logits.argmax(axis=-1)
    assert radius.min() > 0
    for other in range(7):  # the best attack on a linear map: straight to the other class
        d = W[:, other] - W[:, label].T
        norm = np.linalg.norm(d, axis=-1, keepdims=True)
        step = d / np.where(norm == 0, 1, norm) * radius[:, None]
        assert (((x + step) @ W).argmax(axis=-1) == label).all()


def test_ties_and_values_that_are_not_finite_give_0():
    logits = [[1.0, 1.0], [np.nan, 1.0], [np.inf, 1.0], [-np.inf, 1.0], [0.0, 2.0]]
    assert (jsn.certified_radius(logits, 1.0) > 0).tolist() == [False] * 4 + [True]
    assert (jsn.certified_radius(logits, np.inf) == 0).all()
    assert jsn.certified_radius(logits, 0.0).tolist() == [0, 0, 0, 0, np.inf]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16, jnp.int32])
def test_any_real_dtype(dtype):
    assert jsn.certified_radius(jnp.array([[3, 1]], dtype), 1.0) == pytest.approx(2**0.5)


@pytest.mark.parametrize(
    ("logits", "bound", "match"),
    [
        (np.ones((3, 1)), 1.0, r"logits have shape \(3, 1\)"),
        (np.ones(()), 1.0, "logits have shape"),
        (np.ones((3, 2), complex), 1.0, "complex128"),
        (np.ones((3, 2), bool), 1.0, "bool"),
        (np.ones((3, 2)), -1.0, r"bound is -1\.0"),
        (np.ones((3, 2)), np.nan, "bound is nan"),
        (np.ones((3, 2)), [1.0, 2.0], r"of shape \(2,\), for \(3,\)"),
    ],
)
def test_what_makes_no_sense_is_told(logits, bound, match):
    with pytest.raises(ValueError, match=match):
        jsn.certified_radius(logits, bound)


def test_certified_accuracy_counts_right_and_proven():
    logits = np.array([[3.0, 1.0], [0.0, 1.0], [0.0, 4.0], [2.0, 2.0]])
    labels = np.array([0, 0, 1, 0])
    radii = np.array([0.0, 1.0, 2.0, 3.0])
    found = jsn.certified_accuracy(logits, labels, 1.0, radii)
    assert found.tolist() == [0.5, 0.5, 0.25, 0.0]
    assert jsn.certified_accuracy(logits, labels, 1.0, 1.0) == 0.5
    stacked = jsn.certified_accuracy(logits.reshape(2, 2, 2), labels.reshape(2, 2), 1.0, radii)
    assert stacked.tolist() == found.tolist()


@pytest.mark.parametrize(
    ("labels", "radii", "match"),
    [
        ([0, 1], 1.0, r"labels have shape \(2,\)"),
        ([0.0, 1.0, 1.0], 1.0, "labels have shape.*float64"),
        ([0, 1, 2], 1.0, "labels have values from 0 to 2, expected 0 to 1"),
        ([0, -1, 1], 1.0, "labels have values from -1"),
        ([0, 1, 1], -1.0, r"radii are -1\.0"),
        ([0, 1, 1], [np.nan], "radii are nan"),
    ],
)
def test_labels_and_radii_are_checked(labels, radii, match):
    with pytest.raises(ValueError, match=f"jsn.certified_accuracy: {match}"):
        jsn.certified_accuracy(np.ones((3, 2)), labels, 1.0, radii)
