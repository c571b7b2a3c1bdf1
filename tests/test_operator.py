"""Station 2: Matrix, a weight as a linear map, against numpy on explicitly permuted axes."""

import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest
from matrices import assert_converged, gaussian

import jsn
from jsn import Matrix
from jsn._operator import contract

VIEWS = {
    # operator: (shape, input axes, output axes, batch axes)
    Matrix(): ((5, 7), (0,), (1,), ()),
    Matrix(in_axis=None, out_axis=-1): ((2, 3, 4, 5), (0, 1, 2), (3,), ()),
    Matrix(out_axis=0): ((6, 2, 3), (1, 2), (0,), ()),
    Matrix(in_axis=0, out_axis=None): ((4, 2, 3), (0,), (1, 2), ()),
    Matrix(in_axis=(0, 1), out_axis=(2,)): ((2, 3, 6), (0, 1), (2,), ()),
    Matrix(in_axis=(2, 0), out_axis=1): ((2, 5, 3), (0, 2), (1,), ()),
    Matrix(in_axis=1, out_axis=(0, 2)): ((2, 5, 3), (1,), (0, 2), ()),
    Matrix(in_axis=-1, out_axis=-2): ((4, 6), (1,), (0,), ()),
    Matrix(batch_axis=0): ((3, 4, 5), (1,), (2,), (0,)),
    Matrix(batch_axis=1): ((4, 3, 5), (0,), (2,), (1,)),
    Matrix(in_axis=0, out_axis=1, batch_axis=2): ((4, 5, 3), (0,), (1,), (2,)),
    Matrix(in_axis=None, out_axis=-1, batch_axis=(0, 2)): ((2, 4, 3, 2, 5), (1, 3), (4,), (0, 2)),
    Matrix(in_axis=-2, out_axis=-1, batch_axis=(-3, 0)): ((2, 3, 4, 5), (2,), (3,), (0, 1)),
    Matrix(in_axis=1, out_axis=None, batch_axis=-1): ((3, 4, 2, 2), (1,), (0, 2), (3,)),
}

every_view = pytest.mark.parametrize(("operator", "view"), VIEWS.items(), ids=map(repr, VIEWS))


def stacked(W, view):
    """The weight as a plain stack of matrices (*batch, inputs, outputs), in float64."""
    shape, ins, outs, batch = view
    W = np.asarray(W, np.float64).transpose(*batch, *ins, *outs)
    sizes = [shape[a] for a in batch]
    return W.reshape(*sizes, np.prod([shape[a] for a in ins]), -1)


@every_view
def test_sides(operator, view):
    shape, *axes = view
    sides = [tuple(shape[a] for a in side) for side in axes]
    assert [operator.domain(shape), operator.codomain(shape), operator.batch(shape)] == sides
    assert operator.problem(shape) is None


@every_view
def test_products_are_those_of_the_plain_matrices(operator, view):
    shape = view[0]
    W = gaussian(1, *shape)
    batch, ins, outs = operator.batch(shape), operator.domain(shape), operator.codomain(shape)
    v, u = gaussian(2, *batch, 4, *ins), gaussian(3, *batch, 4, *outs)
    plain = stacked(W, view)
    forward, backward = (
        np.asarray(product)
        for product in jax.jit(lambda: (operator.matvec(W, v), operator.rmatvec(W, u)))()
    )
    assert forward.shape == u.shape
    assert backward.shape == v.shape
    flat = lambda x: x.reshape(*batch, 4, -1)
    assert np.allclose(flat(forward), flat(v) @ plain, atol=1e-5)
    assert np.allclose(flat(backward), flat(u) @ np.swapaxes(plain, -1, -2), atol=1e-5)


@every_view
def test_sigma_is_that_of_the_plain_matrices(operator, view):
    shape = view[0]
    W = gaussian(4, *shape)
    codomain = operator.codomain(shape)  # a block of the whole side, for which a step is exact
    u = gaussian(5, *operator.batch(shape), np.prod(codomain), *codomain)
    sigma, new = jax.jit(lambda W, u: jsn.power_iterate(W, u, operator=operator))(W, u)
    exact = np.linalg.svd(stacked(W, view), compute_uv=False)[..., 0]
    assert sigma.shape == operator.batch(shape)
    assert new.shape == u.shape
    assert_converged(sigma, exact, rtol=1e-5)


@every_view
def test_spread_divides_each_matrix_by_its_own_value(operator, view):
    shape = view[0]
    W = gaussian(6, *shape)
    values = 1 + np.arange(np.prod(operator.batch(shape), dtype=int)).reshape(operator.batch(shape))
    divided = W / np.asarray(operator.spread(jnp.asarray(values, jnp.float32), shape))
    assert divided.shape == shape
    assert np.allclose(stacked(divided, view), stacked(W, view) / values[..., None, None])


@every_view
def test_the_weight_is_read_as_it_lies(operator, view):
    """Neither flattened nor transposed: on a mesh that would gather it."""
    shape = view[0]
    W = gaussian(7, *shape)
    v = gaussian(8, *operator.batch(shape), 2, *operator.domain(shape))
    u = gaussian(9, *operator.batch(shape), 2, *operator.codomain(shape))
    for product in (lambda W: operator.matvec(W, v), lambda W: operator.rmatvec(W, u)):
        uses = [
            equation.primitive.name
            for equation in jaxprs.trace(product, W)
            if any(operand.aval.size == W.size for operand in equation.invars)
        ]
        assert uses == ["dot_general"]


@every_view
def test_an_operator_is_a_value(operator, view):
    del view
    assert eval(repr(operator)) == operator
    assert hash(eval(repr(operator))) == hash(operator)


def test_one_axis_may_be_given_as_a_number_or_a_sequence():
    assert Matrix(in_axis=0) == Matrix(in_axis=(0,)) == Matrix(in_axis=[0])
    assert Matrix(in_axis=0) != Matrix(in_axis=1)
    assert repr(Matrix()) == "Matrix()"
    assert repr(Matrix(in_axis=(0, 1), batch_axis=2)) == "Matrix(in_axis=(0, 1), batch_axis=2)"


@pytest.mark.parametrize(
    ("operator", "shape", "problem"),
    [
        (Matrix(), (4,), "needs at least 2 axes"),
        (Matrix(), (), "needs at least 2 axes"),
        (Matrix(batch_axis=0), (4, 4), "needs at least 3 axes"),
        (Matrix(in_axis=4), (3, 3, 8, 16), "in_axis 4 is out of range for 4 axes"),
        (Matrix(out_axis=2), (3, 4), "out_axis 2 is out of range for 2 axes"),
        (Matrix(batch_axis=-4), (2, 3, 4), "batch_axis -4 is out of range for 3 axes"),
        (Matrix(in_axis=0, out_axis=1), (2, 3, 4), "cover each axis once"),
        (Matrix(in_axis=1), (3, 4), "cover each axis once"),  # axis 1 and axis -1 are the same
        (Matrix(in_axis=(0, 1), out_axis=None), (3, 4), "no axis is left for the output side"),
        (Matrix(out_axis=(0, 1)), (3, 4), "no axis is left for the input side"),
        (Matrix(), (0, 4), "is empty"),
        (Matrix(), (4, 0), "is empty"),
        (Matrix(batch_axis=0), (0, 3, 4), "is empty"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_said(operator, shape, problem):
    assert problem in operator.problem(shape)


@pytest.mark.parametrize(
    ("inner", "axes", "shape", "expected"),
    [
        (Matrix(), (0,), (7, 3, 4), Matrix(in_axis=1, out_axis=2, batch_axis=0)),
        (Matrix(), (1,), (3, 7, 4), Matrix(in_axis=0, out_axis=2, batch_axis=1)),
        (Matrix(), (2,), (3, 4, 7), Matrix(in_axis=0, out_axis=1, batch_axis=2)),
        (
            Matrix(batch_axis=0),
            (1,),
            (2, 7, 3, 4),
            Matrix(in_axis=2, out_axis=3, batch_axis=(0, 1)),
        ),
        (Matrix(), (), (3, 4), Matrix()),
        (
            Matrix(in_axis=0, out_axis=None),
            (0, 2),
            (7, 3, 5, 2, 2),
            Matrix(in_axis=1, out_axis=(3, 4), batch_axis=(0, 2)),
        ),
    ],
    ids=str,
)
def test_an_operator_lifts_to_a_weight_with_more_batch_axes(inner, axes, shape, expected):
    lifted = inner.lifted(axes, len(shape))
    for method in ("domain", "codomain"):
        assert getattr(lifted, method)(shape) == getattr(expected, method)(shape)
    assert sorted(lifted.batch(shape)) == sorted(expected.batch(shape))
    W = jnp.asarray(gaussian(10, *shape))
    u = gaussian(11, *lifted.batch(shape), *lifted.codomain(shape))
    u_expected = u.reshape(*expected.batch(shape), *expected.codomain(shape))
    found = jsn.power_iterate(W, jnp.asarray(u), 0, operator=lifted)[0]
    assert np.allclose(
        found, jsn.power_iterate(W, jnp.asarray(u_expected), 0, operator=expected)[0]
    )


@pytest.mark.parametrize(("shape", "kept_apart"), [((5, 1), True), ((5, 2), False)])
def test_a_layer_with_one_output_is_multiplied_by_a_vector_that_is_ready(shape, kept_apart):
    """Else XLA:CPU computes the vector within the sum of products: 12 times as long."""
    W, v = jnp.asarray(gaussian(0, *shape)), jnp.asarray(gaussian(1, 1, 5))
    assert jaxprs.count(Matrix().matvec, W, v)["reduce_precision"] == kept_apart
    assert jaxprs.count(lambda v: contract(v, v, ((1,), (1,))), v)["reduce_precision"] == 0
    np.testing.assert_allclose(Matrix().matvec(W, v), np.asarray(v) @ np.asarray(W), rtol=1e-6)
    total = lambda W, v: Matrix().matvec(W, v).sum()
    of_W, of_v = jax.grad(total, argnums=(0, 1))(W, v)
    np.testing.assert_allclose(of_W, np.repeat(v.T, shape[1], axis=1), rtol=1e-6)
    np.testing.assert_allclose(of_v, W.sum(1)[None], rtol=1e-6)
