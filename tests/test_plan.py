"""Station 4: a whole tree at once gives what each weight alone gives, in a few batched calls."""

import functools
import re

import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest
from matrices import gaussian, true_norm

import jsn
from jsn import Matrix, _plan, _power

normalize = jax.jit(jsn.normalize, static_argnames=("n_steps", "soft"))


@pytest.fixture(params=[2, 5], ids="shared from {} on".format)
def many(request, monkeypatch):
    """From how many weights of one shape on they share their thin operations: four do, or not."""
    jax.clear_caches()
    monkeypatch.setattr(_plan, "_many", lambda: request.param)
    yield
    jax.clear_caches()


def kernels(*shapes, seed=0):
    """A tree with a Gaussian kernel of each shape."""
    return {
        f"layer_{index}": {"kernel": jnp.asarray(gaussian(seed + index, *shape))}
        for index, shape in enumerate(shapes)
    }


def cost(params, n_steps, block_size=8):
    state = jsn.init(params, block_size=block_size, warmup=0)
    return jaxprs.count(functools.partial(jsn.normalize, n_steps=n_steps), params, state)


MIXED = [(20, 12), (12, 20), (3, 3, 4, 16), (30, 5), (5, 30), (1, 9), (9, 1), (20, 12)]


@pytest.mark.parametrize(("n_steps", "reads"), [(0, 1), (1, 1), (4, 4)])
def test_the_small_algebra_of_all_weights_of_a_kind_is_one_batched_call(n_steps, reads):
    """Of one kind are blocks that span a side, all others of another; what is added to a block is
    made orthonormal by itself, and then the block."""
    for shapes, kinds in ((1, 1), (3, 1), (len(MIXED), 2)):
        counts = cost(kernels(*MIXED[:shapes]), n_steps)
        # For several devices that share a CPU there is another branch: eigh one by one.
        assert counts["eigh"] == reads * (kinds + shapes)
        assert counts["cholesky"] == n_steps * kinds * 2


@pytest.mark.parametrize(("shape", "products"), [((20, 12), 0), ((120, 80), 2)])
def test_weights_of_one_shape_share_their_operations(shape, products):
    """More weights cost more slices; and two products each, where stacking would copy much."""
    few, many = (cost(kernels(*[shape] * n), 1) for n in (8, 12))
    per_weight = {name for name in many if many[name] != few[name]}
    for name in ("concatenate", "reduce_max", "reduce_precision", "sqrt"):
        assert name not in per_weight
        assert many[name] > 0
    assert "pad" not in per_weight
    assert many["dot_general"] - few["dot_general"] == 4 * products


def test_a_few_weights_of_each_shape_need_no_more_kernels_than_one():
    """Side by side they would: for each shape and number of weights anew."""
    shapes = [(120, 80), (80, 120), (120, 120), (160, 120)]
    several = [shape for n, shape in enumerate(shapes, 2) for _ in range(n)]
    assert compiled_kernels(*several) <= compiled_kernels(*shapes)


def test_the_gradient_pads_nothing_for_each_weight():
    """A sum of padded arrays, one for each weight, is compiled in more than quadratic time."""

    def paddings(n: int, step: int) -> int:
        params = kernels(*[(40, 40 + step * i) for i in range(n)])
        state = jsn.init(params, block_size=4, warmup=0)
        norm = lambda params: sum(map(jnp.sum, jax.tree.leaves(jsn.normalize(params, state)[0])))
        forward, both = (jaxprs.count(f, params)["pad"] for f in (norm, jax.grad(norm)))
        return both - forward

    assert paddings(9, 0) == paddings(3, 0)  # of one shape
    assert paddings(9, 1) == paddings(3, 1)  # all shapes differ


@pytest.mark.parametrize("shape", [(20, 12), (120, 80)])
def test_weights_of_one_shape_share_their_kernels(shape):
    """XLA:CPU compiles equal kernels once: what is done for each weight must not differ.

    Where a slice begins differs, and is written into the kernel unless it is hidden.
    """

    def distinct(n: int) -> int:
        params = kernels(*[shape] * n)
        state = jsn.init(params, block_size=4, warmup=0)
        norm = lambda params: sum(map(jnp.sum, jax.tree.leaves(jsn.normalize(params, state)[0])))
        found = jaxprs.fusions(jax.grad(norm), params)
        assert found
        return len({re.sub(r"%[\w.-]+|metadata=\{[^}]*\}", "", body) for body in found})

    # Some differ between the first or the last and the others; one for each would be 12 more.
    assert distinct(16) - distinct(4) < 6


def test_few_kernels_are_compiled_for_each_shape():
    """XLA:CPU has products ready. All else that touches a block is compiled for each shape anew.

    That is: what is not usable replaced, what is added to a block, and the next block.
    """

    shapes = [(128 + i, 160 + i) for i in range(12)]
    more = compiled_kernels(*shapes) - compiled_kernels(*shapes[:9])
    assert more <= 3 * 4  # one in reserve for other versions of XLA


def test_few_kernels_are_compiled_for_many_weights_of_one_shape():
    """Most are of the small algebra, which is the same for all of them."""
    few, many = (compiled_kernels(*[(64, 64)] * n) for n in (10, 40))
    assert few <= 43  # 41 with JAX 0.10.2, 43 with 0.12.0
    assert many <= few + 1  # XLA:CPU adds up long vectors in two steps


def compiled_kernels(*shapes: tuple[int, int]) -> int:
    """How many kernels XLA:CPU compiles for normalizing weights, beside products."""
    params = kernels(*shapes)
    found = jaxprs.fusions(jsn.normalize, params, jax.eval_shape(jsn.init, params))
    assert found
    bodies = {re.sub(r"%[\w.-]+|metadata=\{[^}]*\}", "", body) for body in found}
    return len([body for body in bodies if " dot(" not in body])


@pytest.mark.parametrize("block_size", [1, 16])
def test_a_convolution_is_normalized_with_the_bytes_of_its_matrix(block_size):
    """What it is multiplied with is nowhere copied to have several axes summed up."""

    def touched(shape):
        params = kernels(shape)
        state = jax.eval_shape(lambda: jsn.init(params, block_size=block_size))
        return jaxprs.bytes_per_byte(jsn.normalize, params, state)

    assert touched((3, 3, 64, 128)) <= 1.002 * touched((576, 128))


READS = []


class Noted(Matrix):
    """Notes when it is traced."""

    def rmatvec(self, W, u):
        READS.append(W.shape)
        return super().rmatvec(W, u)


def test_steps_of_one_tree_are_traced_once():
    """However often a training step normalizes, and under whatever transformation."""
    params = kernels((20, 12), (7, 5))
    state = jsn.init(params, rules=[("kernel$", Noted())], block_size=4, warmup=0)

    def passes(params, state):
        for _ in range(3):
            normalized, state = jsn.normalize(params, state)
        return sum(map(jnp.sum, jax.tree.leaves(normalized)))

    READS.clear()
    jax.jit(jax.value_and_grad(passes)).lower(params, state)
    jsn.normalize(params, state)
    assert READS == [(20, 12), (7, 5)]


@pytest.mark.parametrize("block_size", [1, 8])
def test_a_tree_gives_what_each_weight_alone_gives(block_size):
    params = kernels((20, 12), (3, 3, 2, 16), (30, 5), (9, 1))
    options = {"block_size": block_size, "warmup": 2}
    together, _ = normalize(params, jsn.init(params, **options))
    for name in params:
        part = {name: params[name]}
        alone, _ = normalize(part, jsn.init(part, **options))
        assert np.allclose(together[name]["kernel"], alone[name]["kernel"], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("shape", [(20, 12), (120, 80), (3, 20, 12), (3, 3, 4, 8)])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.usefixtures("many")
def test_weights_of_one_shape_have_bounds_and_scales_of_their_own(shape, soft):
    """Numbers, arrays and none; values and every gradient are those of each weight alone."""
    rules = [("kernel", Matrix(batch_axis=0 if len(shape) == 3 else ()))]
    batch = shape[:1] if len(shape) == 3 else ()
    params = kernels(*[shape] * 4)
    state = jsn.init(params, rules=rules, block_size=4)
    values = [2.0, jnp.full(batch, 3.0), jnp.full((), 2.0, jnp.bfloat16), 2.0]
    bounds = dict(zip(params, values, strict=True))
    scales = dict(zip(params, (None, 0.5, jnp.full(batch, -2.0), None), strict=True))

    def loss(params, state, bounds, scales):
        done, _ = jsn.normalize(params, state, bound=bounds, scale=scales, soft=soft)
        return sum(jnp.sum(jnp.sin(7 * x) * x) for x in jax.tree.leaves(done)), done

    gradient = jax.value_and_grad(loss, argnums=(0, 2, 3), has_aux=True)
    (_, done), found = jax.jit(gradient)(params, state, bounds, scales)
    for name in params:
        part = [{name: tree[name]} for tree in (params, bounds, scales)]
        alone = jsn.init(part[0], rules=rules, block_size=4)
        (_, one), expected = gradient(part[0], alone, *part[1:])
        # The order of sums, which differs here, shows in singular vectors to 1e-5.
        same = functools.partial(np.allclose, rtol=1e-3, atol=1e-4)
        found_for_it = [tree[name] for tree in (done, *found)]
        expected_for_it = [tree[name] for tree in (one, *expected)]
        assert jax.tree.all(jax.tree.map(same, found_for_it, expected_for_it))


def test_one_array_may_be_two_weights():
    W = jnp.asarray(gaussian(3, 20, 12))
    params = {"a": {"kernel": W}, "b": {"kernel": W}}
    state = jsn.init(params, block_size=4)
    done, _ = jsn.normalize(params, state)
    assert jsn.sigmas(params, state)["b"]["kernel"].shape == ()
    assert done["a"]["kernel"].shape == (20, 12)
    assert np.array_equal(done["a"]["kernel"], done["b"]["kernel"])
    assert abs(true_norm(done["a"]["kernel"]) - 1) < 1e-3


def test_the_order_of_the_leaves_does_not_matter():
    params = kernels(*MIXED)
    renamed = {f"z{9 - int(name[-1])}": value for name, value in params.items()}
    first, _ = normalize(params, jsn.init(params))
    second, _ = normalize(renamed, jsn.init(renamed))
    for name, other in zip(params, renamed, strict=True):
        assert np.allclose(first[name]["kernel"], second[other]["kernel"], rtol=1e-5, atol=1e-7)


def test_dtypes_views_and_batches_mix():
    W = gaussian(1, 16, 12)
    params = {
        "single": jnp.asarray(W),
        "half": jnp.asarray(W).astype(jnp.bfloat16),
        "other_view": jnp.asarray(W),
        "stack": jnp.stack([jnp.asarray(W)] * 3),
        "small": jnp.asarray(W[:, :2]),
    }
    rules = [("stack", Matrix(batch_axis=0)), ("other_view", Matrix(out_axis=0)), ("", Matrix())]
    state = jsn.init(params, rules=rules, block_size=6)
    assert jsn.sigmas(params, state)["stack"].shape == (3,)
    normalized, _ = normalize(params, state)
    for name, tolerance in (("single", 1e-3), ("other_view", 1e-3), ("small", 1e-6)):
        assert -1e-6 < true_norm(normalized[name]) - 1 < tolerance
    assert abs(true_norm(normalized["half"]) - 1) < 5e-3
    for matrix in normalized["stack"]:
        assert np.allclose(matrix, normalized["single"], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("shape", [(20, 12), (120, 80)])
@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0])
@pytest.mark.usefixtures("many")
def test_weights_of_one_shape_do_not_spoil_each_other(bad, shape):
    params = kernels(*[shape] * 4)
    state = jsn.init(params, block_size=6)
    broken = {**params, "layer_2": {"kernel": jnp.full(shape, bad)}}
    expected, found = normalize(params, state), normalize(broken, state)
    for name in ("layer_0", "layer_1", "layer_3"):
        assert np.array_equal(expected[0][name]["kernel"], found[0][name]["kernel"])
        assert np.array_equal(expected[1].u[name]["kernel"], found[1].u[name]["kernel"])
    if bad:
        kept = (state.u["layer_2"]["kernel"], found[1].u["layer_2"]["kernel"])
        assert np.array_equal(*kept)


@pytest.mark.parametrize("count", [1, 4], ids="{} weights".format)
@pytest.mark.usefixtures("many")
def test_a_matrix_comes_first_in_its_first_read(count):
    """`W u^T`, and what it gives stays as it is: `u W^T` takes XLA:CPU longer."""
    params = kernels(*[(96, 200)] * count)
    state = jsn.init(params, block_size=8, warmup=0)
    text = jax.jit(jsn.normalize).lower(params, state).compile().as_text()
    made = set(re.findall(r"= f32\[([\d,]+)\]\S* dot\(", text))
    assert "96,8" in made, "the block is the last axis"
    assert not {"8,96", f"{count},8,96"} & made


def test_blocks_are_not_rescaled_where_their_squares_are_in_no_danger():
    """What scales a block of the input side is in a branch that is hardly ever taken."""
    params = kernels((3, 3, 40, 56))
    state = jsn.init(params, block_size=8, warmup=0)
    program = jax.jit(jsn.normalize).lower(params, state).compile().as_text()
    shapes = ("360,8", "8,360", "3,3,40,8", "8,3,3,40")

    def products(text: str) -> int:
        return len(re.findall(rf"= f32\[(?:{'|'.join(shapes)})\]\S* dot\(", text))

    assert products(jaxprs.reached(program, branches=False)) == 1, "the first read"
    assert products(jaxprs.reached(program, branches=True)) == 2, "with a diagonal matrix"


@pytest.mark.parametrize("scale", [1.0, 1e9])
def test_a_padded_matrix_keeps_its_own_vectors(monkeypatch, scale):
    """Padding sorts behind the eigenvalues of any Gram matrix, zeros and rounding included."""
    found = []
    ritz = _power.ritz
    monkeypatch.setattr(_power, "ritz", lambda grams: found.append(ritz(grams)) or found[-1])
    flat = jnp.asarray(scale * gaussian(0, 9, 2) @ gaussian(1, 2, 40), jnp.float32)  # of rank two
    us = [jnp.asarray(gaussian(2, 9, 9)), jnp.asarray(gaussian(3, 16, 16))]
    weights = [flat.T, jnp.asarray(gaussian(4, 60, 16))]
    tracked = [
        _power.Tracked(Matrix(), W, jnp.linalg.qr(u.T)[0].T)
        for W, u in zip(weights, us, strict=True)
    ]
    with jax.disable_jit():
        _power.step(tracked)
    (basis,) = found
    assert np.allclose(basis.vectors[0, :9, 9:], 0)
    assert np.allclose(basis.vectors[0, 9:, :9], 0)
