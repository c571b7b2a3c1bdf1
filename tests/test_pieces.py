"""Between stations: what is laid side by side and cut apart, in every transformation."""

import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest
from jax.test_util import check_grads

from jsn._pieces import cut, join

SHAPES = [(), (3,), (4, 3), (2, 4, 3)]


def arrays(shape, n=3, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for _ in range(n)]


def bent(join):
    """A function of some of what is joined that is linear in nothing."""
    return lambda a, b: jnp.sum(jnp.sin(join([a * b, jnp.cos(a), jnp.ones_like(a), a])) ** 2)


@pytest.mark.parametrize("shape", SHAPES)
def test_join_is_a_stack_in_every_transformation(shape):
    a, b, da = arrays(shape)
    assert np.array_equal(join([a, b]), jnp.stack([a, b]))
    f, g = bent(join), bent(jnp.stack)
    for made in (
        lambda f: f(a, b),
        lambda f: jax.grad(f, argnums=(0, 1))(a, b),
        lambda f: jax.jit(jax.grad(f, argnums=1))(a, b),
        lambda f: jax.jvp(lambda a: f(a, b), (a,), (da,)),
        lambda f: jax.jvp(jax.grad(f), (a, b), (da, da)),
        lambda f: jax.grad(lambda a: jnp.sum(jax.grad(f)(a, b) ** 2))(a),
        lambda f: jax.linearize(lambda a: f(a, b), a)[1](da),
    ):
        found, expected = jax.tree.leaves(made(f)), jax.tree.leaves(made(g))
        assert all(np.allclose(*pair, rtol=1e-5) for pair in zip(found, expected, strict=True))
    check_grads(f, (a, b), order=2, modes=("fwd", "rev"), rtol=2e-2)


@pytest.mark.parametrize("axes", [(0, 0), (0, None), (None, -1)])
@pytest.mark.parametrize("shape", SHAPES[1:])
def test_join_under_vmap(axes, shape):
    pairs = zip(arrays(shape, 2), axes, strict=True)
    a, b = (x if axis is None else jnp.stack([x, 2 * x], axis) for x, axis in pairs)
    for change in (lambda f: f, lambda f: jax.grad(f, argnums=(0, 1))):
        found, expected = (jax.vmap(change(bent(j)), axes)(a, b) for j in (join, jnp.stack))
        assert jax.tree.all(
            jax.tree.map(lambda x, y: np.allclose(x, y, rtol=1e-5), found, expected)
        )


def test_join_promotes_as_a_stack_does():
    (half,), (full,) = arrays((3,), 1, jnp.bfloat16), arrays((3,), 1)
    found = join([half, full])
    assert found.dtype == jnp.float32
    assert np.array_equal(found, jnp.stack([half, full]))


def test_what_is_joined_is_cut_on_the_way_back_and_the_other_way_round():
    """Slices at known places would each be compiled by themselves."""
    parts, whole = arrays((4, 3), 5), jnp.ones((5, 4, 3))
    back = jaxprs.trace(jax.grad(lambda parts: jnp.sum(join(parts) ** 2)), parts)
    cuts = [x.primitive.name for x in back if x.outvars[0].aval.shape == (4, 3)]
    assert cuts.count("dynamic_slice") == 5
    assert not {"slice", "split"} & set(cuts)
    pieces = lambda whole: cut([whole], [()] * 5)[0]
    back = jaxprs.count(jax.grad(lambda whole: sum(jnp.sum(x**2) for x in pieces(whole))), whole)
    assert (back["pad"], back["add_any"]) == (0, 0)
    assert np.array_equal(jnp.stack(pieces(whole)), whole)
