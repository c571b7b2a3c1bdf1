"""On a mesh: what one device gives, where the parameters live, with reductions of vectors only."""

import collections
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from matrices import gaussian

import jsn
from benchmarks import _hlo as hlo
from jsn import Matrix

pytestmark = pytest.mark.usefixtures("together")

BLOCK = 4
MESHES = [AxisType.Auto, AxisType.Explicit]


@dataclasses.dataclass(frozen=True)
class Case:
    """A weight, how it is seen and sharded, and where its block has to live."""

    shape: tuple[int, ...]
    operator: Matrix
    spec: P
    block: P
    dtype: type = jnp.float32


# "data" is the axis of data parallelism and of FSDP, "model" that of tensor parallelism.
CASES = {
    "replicated": Case((24, 16), Matrix(), P(), P()),
    "fsdp": Case((32, 24), Matrix(), P("data", None), P()),
    "fsdp_out": Case((24, 32), Matrix(), P(None, "data"), P(None, "data")),
    "column": Case((24, 24), Matrix(), P(None, "model"), P(None, "model")),
    "row": Case((24, 24), Matrix(), P("model", None), P()),
    "both": Case((32, 24), Matrix(), P("data", "model"), P(None, "model")),
    "fused": Case((32, 12), Matrix(), P(("data", "model"), None), P()),
    "half": Case((32, 24), Matrix(), P("data", "model"), P(None, "model"), jnp.bfloat16),
    "query": Case(
        (32, 4, 8), Matrix(in_axis=0, out_axis=None), P("data", "model"), P(None, "model", None)
    ),
    "output": Case((4, 8, 32), Matrix(), P("model", None, "data"), P(None, "data")),
    "layers_0": Case(
        (3, 32, 16), Matrix(batch_axis=0), P(None, "data", "model"), P(None, None, "model")
    ),
    "layers_1": Case(
        (32, 3, 16), Matrix(batch_axis=1), P("data", None, "model"), P(None, None, "model")
    ),
}
EXPERTS = Case(
    (4, 24, 16), Matrix(batch_axis=0), P("data", None, "model"), P("data", None, "model")
)
RULES = [(f"^{name}$", case.operator) for name, case in CASES.items()]


def weights():
    return {
        name: jnp.asarray(gaussian(seed, *case.shape)).astype(case.dtype)
        for seed, (name, case) in enumerate(CASES.items())
    }


def loss(params, state):
    normalized, state = jsn.normalize(params, state)
    total = sum(jnp.sum(jnp.sin(3 * x.astype(jnp.float32))) for x in normalized.values())
    return total, (normalized, state)


training = jax.jit(jax.value_and_grad(loss, has_aux=True))
init = jax.jit(functools.partial(jsn.init, rules=RULES, block_size=BLOCK, warmup=1))


@functools.cache
def on_mesh(kind):
    """Parameters and state on a 2-D mesh, and what a compiled training step makes of them."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))
    with jax.set_mesh(mesh):
        params = {
            name: jax.device_put(x, NamedSharding(mesh, CASES[name].spec))
            for name, x in weights().items()
        }
        state = init(params)
        compiled = training.lower(params, state).compile()
        return mesh, params, state, compiled, compiled(params, state)


@functools.cache
def on_one_device():
    params = weights()
    state = init(params)
    return training(params, state)


def equal(x, y):
    """Whether two specs say the same, whatever the number of trailing Nones."""
    strip = lambda spec: tuple(spec)[: max((i + 1 for i, s in enumerate(spec) if s), default=0)]
    return strip(x) == strip(y)


@pytest.mark.parametrize("kind", MESHES, ids=str)
def test_init_under_jit_puts_each_block_where_its_weights_output_lives(kind):
    _, params, state, _, _ = on_mesh(kind)
    for name, case in CASES.items():
        assert equal(state.u[name].sharding.spec, case.block), name
        assert not params[name].sharding.is_fully_replicated or case.spec == P(), name


@pytest.mark.parametrize("kind", MESHES, ids=str)
def test_results_equal_those_of_one_device(kind):
    (value, (normalized, _)), grads = on_mesh(kind)[-1]
    (expected, (alone, _)), alone_grads = on_one_device()
    assert np.isclose(value, expected, rtol=1e-5)
    for name, case in CASES.items():
        tolerance = {"rtol": 1e-5, "atol": 1e-5 if case.dtype is jnp.float32 else 1e-2}
        for found, truth in ((normalized, alone), (grads, alone_grads)):
            pair = (np.asarray(x[name], np.float64) for x in (found, truth))
            assert np.allclose(*pair, **tolerance), name


@pytest.mark.parametrize("kind", MESHES, ids=str)
def test_outputs_live_where_inputs_do(kind):
    _, params, state, _, ((_, (normalized, following)), grads) = on_mesh(kind)
    for before, after in ((params, normalized), (params, grads), (state.u, following.u)):
        for name, x in before.items():
            assert after[name].sharding.is_equivalent_to(x.sharding, x.ndim), name


def sides(case):
    """Sizes of the batch, the input and the output side of a weight."""
    operator, shape = case.operator, case.shape
    return [math.prod(f(shape)) for f in (operator.batch, operator.domain, operator.codomain)]


@pytest.mark.parametrize("kind", MESHES, ids=str)
def test_a_step_and_its_gradient_send_reductions_of_vectors_and_nothing_else(kind):
    mesh, _, _, compiled, _ = on_mesh(kind)
    largest = max(n * BLOCK * max(ins, outs) * 4 for n, ins, outs in map(sides, CASES.values()))
    allowed, sent = collections.Counter(), collections.Counter()
    for case in CASES.values():
        n, ins, outs = sides(case)
        for axis in {name for entry in case.spec if entry for name in np.ravel(entry).tolist()}:
            allowed[axis] += 2 * n * BLOCK * (ins + outs) * 4
    found = hlo.collectives(compiled.as_text())
    assert found
    for collective in found:
        assert collective.kind == "all-reduce", collective
        assert max(collective.sizes) <= largest, collective
        for axis in collective.axes(mesh):
            sent[axis] += sum(collective.sizes)
    assert set(sent) == {"data", "model"}
    for axis, size in sent.items():
        assert size <= allowed[axis], axis


@pytest.mark.parametrize("kind", MESHES, ids=str)
def test_experts_on_different_devices_exchange_blocks_at_most(kind):
    """Each device has its own experts; the small algebra of all of them is done everywhere."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))
    alone = {"experts": jnp.asarray(gaussian(5, *EXPERTS.shape))}
    start = functools.partial(jsn.init, rules=[("", EXPERTS.operator)], block_size=BLOCK, warmup=1)
    expected, _ = jax.jit(jsn.normalize)(alone, jax.jit(start)(alone))
    with jax.set_mesh(mesh):
        params = jax.device_put(alone, NamedSharding(mesh, EXPERTS.spec))
        state = jax.jit(start)(params)
        compiled = jax.jit(jsn.normalize).lower(params, state).compile()
        normalized, following = compiled(params, state)
    assert np.allclose(normalized["experts"], expected["experts"], rtol=1e-5, atol=1e-6)
    for u in (state.u["experts"], following.u["experts"]):
        assert equal(u.sharding.spec, EXPERTS.block)
    n, _, outs = sides(EXPERTS)
    for collective in hlo.collectives(compiled.as_text()):
        if collective.kind != "all-reduce":
            assert collective.axes(mesh) == {"data"}, collective
            assert sum(collective.sizes) <= n * BLOCK * outs * 4, collective


def test_the_parser_of_programs_sees_a_gathered_weight():
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    for name in ("data", "model"):
        here, everywhere = NamedSharding(mesh, P(name)), NamedSharding(mesh, P())
        gather = jax.jit(lambda x: x * 2, in_shardings=here, out_shardings=everywhere)
        (found,) = hlo.collectives(gather.lower(jnp.ones((8, 4))).compile().as_text())
        assert (found.kind, found.sizes) == ("all-gather", [128])
        assert found.axes(mesh) == {name}
        total = jax.jit(lambda x: x.sum(0), in_shardings=here, out_shardings=everywhere)
        (found,) = hlo.collectives(total.lower(jnp.ones((8, 4))).compile().as_text())
        assert (found.kind, found.sizes) == ("all-reduce", [16])
        assert found.axes(mesh) == {name}


def test_state_sharding_names_where_each_block_lives_before_there_is_one():
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    shapes = {name: jax.ShapeDtypeStruct(c.shape, c.dtype) for name, c in CASES.items()}
    state = jax.eval_shape(init, shapes)
    sharding = {name: NamedSharding(mesh, case.spec) for name, case in CASES.items()}
    found = jsn.state_sharding(sharding, shapes, state)
    assert jax.tree.structure(found) == jax.tree.structure(state)
    for name, case in CASES.items():
        assert found.u[name].mesh == mesh
        assert equal(found.u[name].spec, case.block), name


def test_state_sharding_takes_a_prefix_and_a_single_device():
    params = {"a": {"kernel": jnp.ones((8, 4)), "bias": jnp.ones(4)}, "b": jnp.ones((4, 4))}
    state = jsn.init(params, warmup=0)
    here = SingleDeviceSharding(jax.devices()[1])
    found = jsn.state_sharding({"a": here, "b": None}, params, state)
    assert found.u == {"a": {"kernel": here, "bias": None}, "b": None}
    moved = jax.device_put(state, found)
    assert moved.u["a"]["kernel"].sharding == here


@functools.cache
def kernels():
    shapes = {"conv": (2, 2, 4, 8), "depthwise": (2, 2, 1, 8), "fine": (8, 8), "rough": (8, 8)}
    return {name: jnp.asarray(gaussian(3, *shape)) for name, shape in shapes.items()}


CONVS = [
    ("^conv$", jsn.Conv((6, 6, 4))),
    ("^depthwise$", jsn.Conv((6, 6, 8), feature_group_count=8)),
    ("fine|rough", Matrix()),
]


def test_what_cannot_be_kept_is_refused_by_name_and_all_at_once():
    mesh = jax.make_mesh((2,), ("model",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    params = kernels()
    state = jsn.init(params, rules=CONVS, block_size=2, warmup=0)
    sharding = {
        "conv": NamedSharding(mesh, P("model")),
        "depthwise": NamedSharding(mesh, P(None, None, None, "model")),
        "fine": NamedSharding(mesh, P("model")),
        "rough": P("model"),
    }
    with pytest.raises(ValueError, match="3 weights cannot be tracked") as error:
        jsn.state_sharding(sharding, params, state)
    for part in ("conv: sharding", "window", "depthwise", "grouped", "rough: found P"):
        assert part in str(error.value)
    assert "fine" not in str(error.value)


@pytest.mark.skipif(not hasattr(P(), "unreduced"), reason="this JAX has no unreduced sums yet")
def test_sums_that_are_not_reduced_yet_are_refused():
    kind = (AxisType.Explicit,)
    mesh = jax.make_mesh((2,), ("model",), axis_types=kind, devices=jax.devices()[:2])

    def init(a, b):
        W = jnp.einsum("ij,jk->ik", a, b, out_sharding=P(None, None, unreduced={"model"}))
        return jsn.init({"kernel": W}, warmup=0)

    with jax.set_mesh(mesh):
        a, b = (jax.device_put(jnp.ones((6, 6)), s) for s in (P(None, "model"), P("model")))
        with pytest.raises(ValueError, match=r"kernel: .* holds sums that are not reduced"):
            jax.eval_shape(init, a, b)


def test_a_sharded_window_is_not_gathered_silently():
    mesh = jax.make_mesh((2,), ("model",), (AxisType.Explicit,), devices=jax.devices()[:2])
    specs = {"conv": P("model"), "depthwise": P(None, None, None, "model"), "fine": P("model")}
    with jax.set_mesh(mesh):
        params = {k: jax.device_put(kernels()[k], NamedSharding(mesh, s)) for k, s in specs.items()}
        with pytest.raises(ValueError, match=r"jsn\.init: 2 weights cannot be tracked"):
            jsn.init(params, rules=[*CONVS[:2], ("fine", Matrix())], warmup=0)
    alone = {name: kernels()[name] for name in specs}
    state = jsn.init(alone, rules=[*CONVS[:2], ("fine", Matrix())], block_size=2, warmup=0)
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=r"jsn\.normalize: 2 weights cannot"):
        jsn.normalize(params, state)
