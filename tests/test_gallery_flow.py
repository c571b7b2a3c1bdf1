"""The parts of the gallery's residual flow and simulator that have a right answer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("rich")


def test_roulette_is_unbiased_in_value_and_gradient_and_a_stopped_series_is_not(load):
    flow = load("_flow")
    W = jnp.array([[0.5, 0.3], [-0.4, 0.6]])
    x = jnp.ones((1000, 2))
    g = lambda W, x: x @ W

    def estimate(W, key, keep):
        return flow.block(g, W, x, key, keep)[1].mean()

    exact = jax.value_and_grad(lambda W: jnp.linalg.slogdet(jnp.eye(2) + W)[1])(W)
    keys = jax.random.split(jax.random.key(0), 200)
    both = jax.jit(jax.vmap(jax.value_and_grad(estimate), (None, 0, None)))
    off = {}
    for keep in (flow.KEEP, 0.0):
        found = [np.asarray(leaf) for leaf in both(W, keys, keep)]
        errors = [np.abs(leaf.mean(0) - e) for leaf, e in zip(found, exact, strict=True)]
        noise = [leaf.std(0) / np.sqrt(len(keys)) for leaf in found]
        off[keep] = [(e / (n + 1e-6)).max() for e, n in zip(errors, noise, strict=True)]
    assert max(off[flow.KEEP]) < 4  # standard errors
    assert min(off[0.0]) > 20


def test_exact_determinants_and_the_inverse(load):
    flow = load("_flow")
    W = jnp.array([[0.5, 0.3], [-0.4, 0.6]])
    x = jax.random.normal(jax.random.key(0), (5, 2))
    y, log_det = flow.exact_block(lambda W, x: x @ W, W, x)
    np.testing.assert_allclose(y, x + x @ W, rtol=1e-6)
    np.testing.assert_allclose(log_det, np.linalg.slogdet(np.eye(2) + W)[1], rtol=1e-5)


@pytest.mark.parametrize(("density", "corner"), [("eight", (2, 0)), ("checkerboard", (-2, -2))])
def test_densities_of_the_plane_are_what_their_logarithms_say(density, corner, load):
    """The mean of 1 / p over what is drawn, within a square, is the square's area."""
    x, log_p = getattr(load("residual_flow"), density)(np.random.default_rng(0), 50000)
    inside = ((x >= corner) & (x < np.array(corner) + 0.25)).all(-1)
    np.testing.assert_allclose((inside / np.exp(log_p)).mean(), 0.25**2, rtol=0.05)


def test_the_true_step_brings_states_together_and_keeps_the_heat(load):
    advance = load("learned_physics").advance
    x, y = 3 * jax.random.normal(jax.random.key(0), (2, 50, 64))
    distance = lambda x, y: np.linalg.norm(np.asarray(x - y, float), axis=-1)
    assert (distance(advance(x, 0.0), advance(y, 0.0)) <= distance(x, y)).all()
    np.testing.assert_allclose(advance(x, 0.0).mean(-1), x.mean(-1), atol=1e-5)
    low, none = jnp.full(64, 0.1), jnp.zeros(64)
    assert distance(advance(low, 0.05), advance(none, 0.05)) > distance(low, none)  # with growth
