"""The attack of the gallery is a real one, and its letters look like digits' pictures."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("rich")


@pytest.mark.parametrize(("classes", "share"), [(2, 1.0), (10, 0.9)])
def test_attack_turns_a_linear_classifier_just_beyond_its_margin(classes, share, load):
    """There the distance to the nearest other class is known: margin over |w_i - w_j|.

    Between two classes the way is straight. Among ten, the one that leads at the start may not be
    the nearest, so a few pictures hold out a little longer.
    """
    rng = np.random.default_rng(0)
    W, x = rng.standard_normal((20, classes)), rng.standard_normal((60, 20))
    logits = x @ W
    y = logits.argmax(axis=1)
    apart = np.linalg.norm(W[:, y].T[:, None] - W.T, axis=-1)
    margin = logits.max(axis=1, keepdims=True) - logits
    distance = np.nanmin(margin / np.where(apart == 0, np.nan, apart), axis=1, keepdims=True)
    attack = load("robust_digits").attack
    params = {"kernel": jnp.asarray(W, jnp.float32), "bias": jnp.zeros(classes)}
    keys = jax.random.split(jax.random.key(0), 3)

    def kept(radius):
        runs = [attack(nn.Dense(classes), params, x, y, radius, key) for key in keys]
        return np.all(runs, axis=0)

    assert kept(0.99 * distance).all()
    assert np.mean(~kept(1.02 * distance)) >= share


def test_attack_does_not_start_from_a_wrong_answer(load):
    rng = np.random.default_rng(0)  # shapes as above: nothing compiles again
    W, x = rng.standard_normal((20, 10)), rng.standard_normal((60, 20))
    y = ((x @ W).argmax(axis=1) + 1) % 10
    params = {"kernel": jnp.asarray(W, jnp.float32), "bias": jnp.zeros(10)}
    attack = load("robust_digits").attack
    kept = attack(nn.Dense(10), params, x, y, np.full((60, 1), 1e-3), jax.random.key(0))
    assert not kept.any()


def test_letters_are_pictures_as_those_of_digits(load):
    from sklearn.datasets import load_digits

    letters = load("_letters")
    found, digits = letters.letters(), load_digits().data / 16
    assert found.shape == (len(letters.FONTS) * len(letters.LETTERS), 64)
    assert len(np.unique(found, axis=0)) > 0.95 * len(found)
    assert (np.unique(found * 16) == np.arange(17)).all()
    assert abs(found.mean() - digits.mean()) < 0.05
