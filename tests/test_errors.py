"""Every message of jsn, brought about through its public interface: where, got, expected, fix.

`CASES` lists bad input by the function of `_errors.py` that has to word it; `SURROUNDINGS` those
that also need a file, a missing package or a strange processor. A wording without a case fails.
"""

import ast
import collections
import contextlib
import inspect
import io
import pathlib
import re
import sys

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, serialization
from jax.sharding import SingleDeviceSharding

import jsn
from jsn import Conv, Matrix, _errors
from jsn.__main__ import main

KEY = jax.random.key(0)
W, U = jnp.ones((4, 3)), jnp.ones(3)
PARAMS = {
    "enc": {"kernel": W, "bias": U},
    "dec": {"kernel": jnp.ones((3, 3, 2, 5)), "bias": jnp.ones(5)},
}
STATE = jsn.init(PARAMS, warmup=0)
X = jnp.ones((2, 4))


def replaced(path, value):
    """PARAMS with another leaf."""
    outer, inner = path.split("/")
    return {**PARAMS, outer: {**PARAMS[outer], inner: value}}


def normalize(params=PARAMS, state=STATE, **options):
    return lambda: jsn.normalize(params, state, **options)


def init(params=PARAMS, **options):
    return lambda: jsn.init(params, **options)


def iterate(W=W, u=U, n_steps=1, operator=None):
    return lambda: jsn.power_iterate(W, u, n_steps, operator=operator)


integers, complexes = jnp.ones((4, 3), int), jnp.ones((4, 3), complex)
rule = lambda pattern, operator: [(pattern, operator), *jsn.FLAX]
dense = jsn.linen.spectral_norm(nn.Dense)
ONE_BY_ONE = {"u": {"enc": {"kernel": np.ones((1, 1))}}}


class Custom(nn.Module):
    """A layer that jsn does not know."""

    @nn.compact
    def __call__(self, x):
        return x @ self.param("kernel", nn.initializers.ones, (4, 3))


def linear():
    return nnx.Linear(4, 3, rngs=nnx.Rngs(0))


WRAPPED = jsn.nnx.spectral_norm(linear(), warmup=0)


def bound(W=W, **options):
    return lambda: jsn.upper_bound(W, **options)


def gram(W):
    return jsn.upper_bound(W, method="gram")


def updated(tx):
    return tx.update(PARAMS, tx.init(PARAMS))


def far(x):
    for _ in range(10):
        x = x @ (1e38 * jnp.eye(3))
    return x


def radius(logits=((3.0, 1.0),), bound=1.0):
    return lambda: jsn.certified_radius(logits, bound)


def accuracy(labels=(0,), radii=1.0):
    return lambda: jsn.certified_accuracy([[3.0, 1.0]], np.array(labels), 1.0, radii)


SHARDING = [
    (
        "cannot_keep_sharding",
        ValueError,
        lambda: jsn.state_sharding({"enc": SingleDeviceSharding(jax.devices()[0])}, PARAMS, STATE),
        ["jsn.state_sharding: 1 weight cannot be tracked", "dec/kernel: no sharding", "rule None"],
    ),
]
SHARDING = SHARDING if hasattr(jsn, "state_sharding") else []

# wording, kind of error, what to do, and parts of the message: where, got, expected, fix.
CASES = [
    # --- views ---
    (
        "cannot_view",
        ValueError,
        init(
            {
                "Conv_0": {"kernel": jnp.ones((3, 3, 8, 16))},
                "head": {"kernel": U},
                "ok": {"kernel": W},
            },
            rules=rule("Conv", Matrix(in_axis=4)),
        ),
        [
            "jsn.init",
            "2 of 3 weights cannot be viewed as asked",
            "Conv_0/kernel: shape (3, 3, 8, 16), rule Matrix(in_axis=4): in_axis 4 is out of range",
            "head/kernel: shape (3,), rule Matrix(): needs at least 2 axes",
            "Give these leaves a rule of their own, or None",
        ],
    ),
    (
        "cannot_view",
        ValueError,
        init({"a": {"kernel": jnp.ones((0, 3))}, "b": {"kernel": jnp.ones((3, 0))}}),
        ["a/kernel: shape (0, 3)", "b/kernel: shape (3, 0)", "is empty"],
    ),
    (
        "cannot_view",
        ValueError,
        init(rules=rule("dec/kernel", Matrix(in_axis=0, out_axis=1))),
        ["dec/kernel", "input (0,), output (1,) and batch () do not cover each axis once"],
    ),
    (
        "cannot_view",
        ValueError,
        init(rules=rule("enc/kernel", Matrix(in_axis=(0, 1), out_axis=None))),
        ["enc/kernel", "no axis is left for the output side"],
    ),
    ("cannot_view", ValueError, iterate(W=U), ["jsn.power_iterate", "the weight itself", "2 axes"]),
    ("cannot_view", ValueError, iterate(W=jnp.ones((0, 3))), ["the weight itself", "is empty"]),
    (
        "cannot_view",
        ValueError,
        iterate(operator=Matrix(batch_axis=0)),
        ["rule Matrix(batch_axis=0)", "needs at least 3 axes"],
    ),
    # --- dtypes ---
    (
        "bad_dtype",
        TypeError,
        init({"a": {"kernel": integers}, "b": {"kernel": complexes}, "c": {"kernel": 1.0}, "d": W}),
        [
            "jsn.init: 3 of 3 weights cannot be normalized",
            "a/kernel: found dtype int",
            "b/kernel: found dtype complex",
            "c/kernel: found float, which is no array",
            "Expected real floating point weights. Cast them",
        ],
    ),
    ("bad_dtype", TypeError, init({"kernel": W > 0}), ["kernel: found dtype bool"]),
    ("bad_dtype", TypeError, init({"kernel": KEY}), ["kernel: found dtype key"]),
    (
        "bad_dtype",
        TypeError,
        normalize(replaced("enc/kernel", integers)),
        ["jsn.normalize", "enc/kernel: found dtype int"],
    ),
    ("bad_dtype", TypeError, iterate(W=integers), ["jsn.power_iterate", "found dtype int"]),
    ("bad_dtype", TypeError, iterate(W=complexes), ["found dtype complex"]),
    ("bad_dtype", TypeError, iterate(W=[[1.0, 2.0]]), ["found list, which is no array"]),
    # --- rules ---
    ("bad_rules", TypeError, init(rules="kernel"), ["jsn.init", "found str: 'kernel'", "sequence"]),
    ("bad_rules", TypeError, init(rules={"kernel": Matrix()}), ["found dict", "sequence of"]),
    ("bad_rules", TypeError, init(rules=None), ["found NoneType", "*jsn.FLAX"]),
    (
        "bad_rules",
        ValueError,
        init(rules=[("kernel",), ("kernel", 3), ("(", None), 7]),
        [
            "rule 0: ('kernel',) is not a pair",
            "rule 1, 'kernel': 3 is no operator and not None",
            "rule 2: '(' is no regular expression",
            "rule 3: 7 is not a pair",
            "Expected a sequence of (path pattern, operator or None)",
        ],
    ),
    ("bad_rules", ValueError, init(rules=[("kernel", Matrix)]), ["rule 0, 'kernel': <class"]),
    (
        "bad_rules",
        ValueError,
        init(rules=[("kernel", lambda W: W.ndim)]),
        ["enc/kernel: its rule gave 2, no operator", "dec/kernel: its rule gave 4"],
    ),
    (
        "unmatched_rules",
        ValueError,
        init(rules=[("kernle", Matrix()), ("dce/", None), *jsn.FLAX]),
        [
            "jsn.init: 2 rules match no leaf: 'kernle', 'dce/'",
            "The leaves are: dec/bias, dec/kernel, enc/bias, enc/kernel",
            "Correct the pattern, or remove the rule",
        ],
    ),
    (
        "nothing_tracked",
        ValueError,
        init({"scale": U, "bias": U}),
        ["jsn.init: no leaf", "The leaves are: bias, scale", "Add a rule such as"],
    ),
    ("nothing_tracked", ValueError, init({}), ["The leaves are: (none)"]),
    ("nothing_tracked", ValueError, init(None), ["no leaf"]),
    ("nothing_tracked", ValueError, init(rules=[("", None)]), ["enc/kernel", "at least one leaf"]),
    # --- states ---
    (
        "other_model",
        ValueError,
        normalize({"enc": {"kernel": W, "extra": U}, "dec": PARAMS["dec"]}),
        [
            "jsn.normalize: the state does not fit",
            "enc/bias: in the state, not in the parameters",
            "enc/extra: in the parameters, not in the state",
            "Make a new one with jsn.init(params)",
        ],
    ),
    (
        "other_model",
        ValueError,
        lambda: jsn.sigmas(
            {
                "enc": {"kernel": jnp.ones((5, 7)), "bias": U},
                "dec": replaced("dec/kernel", W)["dec"],
            },
            STATE,
        ),
        [
            "jsn.sigmas",
            "enc/kernel: shape (5, 7), view Matrix(), does not go with a block of shape (3, 3)",
            "dec/kernel: shape (4, 3)",
        ],
    ),
    (
        "other_model",
        ValueError,
        lambda: jsn.fold({"enc": PARAMS["enc"]}, STATE),
        ["jsn.fold", "dec/kernel"],
    ),
    (
        "not_a_state",
        TypeError,
        normalize(state=None),
        ["jsn.normalize", "found NoneType", "jsn.init"],
    ),
    ("not_a_state", TypeError, normalize(state={}), ["found a dict with the keys []"]),
    ("not_a_state", TypeError, normalize(state=PARAMS), ["a dict with the keys ['enc', 'dec']"]),
    ("not_a_state", TypeError, normalize(state=STATE.u), ["variables['sn_state']"]),
    ("not_a_state", TypeError, normalize(STATE, PARAMS), ["found a dict"]),
    (
        "not_a_state",
        TypeError,
        normalize(state=serialization.to_state_dict(STATE)),
        ["found a dict with the keys ['u']", "restore it into a target made by jsn.init(params)"],
    ),
    (
        "bad_restore",
        ValueError,
        lambda: serialization.from_state_dict(STATE, ONE_BY_ONE),
        [
            "SNState",
            "dec/kernel: found nothing, expected shape (5, 5)",
            "enc/kernel: found shape (1, 1), expected shape (3, 3)",
            "same parameters, rules and block_size",
        ],
    ),
    *SHARDING,
    # --- u ---
    (
        "bad_u",
        ValueError,
        iterate(u=jnp.ones(4)),
        [
            "jsn.power_iterate: u has shape (4,)",
            "a weight of shape (4, 3)",
            "needs (3,) or (block, 3)",
            "transpose or rebuild it",
        ],
    ),
    ("bad_u", ValueError, iterate(u=jnp.ones((4, 3))), ["(4, 3)"]),  # more vectors than outputs
    ("bad_u", ValueError, iterate(u=jnp.ones((0, 3))), ["(0, 3)"]),
    ("bad_u", ValueError, iterate(u=jnp.ones((1, 1, 3))), ["(1, 1, 3)"]),
    (
        "bad_u",
        ValueError,
        iterate(W=jnp.ones((7, 4, 2, 3)), u=U, operator=Matrix(1, (2, 3), 0)),
        ["needs (7, 2, 3) or (7, block, 2, 3)"],
    ),
    (
        "bad_u_dtype",
        TypeError,
        iterate(u=jnp.ones(3, int)),
        ["jsn.power_iterate", "int", "cast it"],
    ),
    ("bad_u_dtype", TypeError, iterate(u=jnp.ones(3, complex)), ["u is of dtype complex"]),
    ("bad_u_dtype", TypeError, iterate(u=[1.0, 2.0, 3.0]), ["u is a list", "array"]),
    ("bad_u_dtype", TypeError, iterate(u=None), ["u is a NoneType"]),
    # --- counts ---
    (
        "bad_count",
        ValueError,
        iterate(n_steps=-1),
        ["jsn.power_iterate: n_steps is -1", "at least 0"],
    ),
    ("bad_count", ValueError, iterate(n_steps=1.0), ["n_steps is 1.0, expected an integer"]),
    ("bad_count", ValueError, iterate(n_steps=True), ["n_steps is True, expected an integer"]),
    ("bad_count", ValueError, iterate(n_steps=jnp.ones(2, int)), ["expected an integer"]),
    (
        "bad_count",
        ValueError,
        lambda: jax.jit(jsn.power_iterate)(W, U, 2),
        ["n_steps is", "It is static: under jit, pass a Python number"],
    ),
    ("bad_count", ValueError, normalize(n_steps=-1), ["jsn.normalize: n_steps is -1"]),
    (
        "bad_count",
        ValueError,
        lambda: jsn.sigmas(PARAMS, STATE, n_steps=-1),
        ["jsn.sigmas: n_steps"],
    ),
    (
        "bad_count",
        ValueError,
        lambda: jsn.fold(PARAMS, STATE, n_steps=0.5),
        ["jsn.fold: n_steps is 0.5"],
    ),
    ("bad_count", ValueError, init(block_size=0), ["jsn.init: block_size is 0", "at least 1"]),
    ("bad_count", ValueError, init(block_size=2.5), ["block_size is 2.5"]),
    ("bad_count", ValueError, init(warmup=-3), ["jsn.init: warmup is -3", "at least 0"]),
    (
        "bad_count",
        ValueError,
        lambda: jsn.linen.spectral_norm(nn.Dense, n_steps=-3),
        ["jsn.linen.spectral_norm: n_steps is -3", "at least 0"],
    ),
    (
        "bad_count",
        ValueError,
        lambda: jsn.linen.spectral_norm(nn.Dense, block_size=0),
        ["jsn.linen.spectral_norm: block_size is 0"],
    ),
    # --- bound and scale ---
    *[
        (
            "bad_bound",
            ValueError,
            normalize(bound=bad),
            ["bound is not usable", "every weight", text],
        )
        for bad, text in [
            (0, "found 0"),
            (-1.0, "found -1.0"),
            (float("nan"), "found nan"),
            (np.float32(0), "found "),
            (jnp.float32(-2), "found "),
            (True, "bool"),
            (1j, "complex"),
            ("1", "found '1'"),
            (jnp.ones(2), "found shape (2,), the weight has one sigma"),
        ]
    ],
    (
        "bad_bound",
        ValueError,
        lambda: jsn.fold(PARAMS, STATE, bound=0.0),
        ["jsn.fold: bound is not"],
    ),
    (
        "bad_bound",
        ValueError,
        normalize(bound={"enc": 0.0, "dec": {"kernel": -3.0, "bias": -3.0}}),
        [
            "jsn.normalize: bound is not usable",
            "enc/kernel: found 0.0",
            "dec/kernel: found -3.0",
            "Expected a real number above 0, a scalar array, or a tree prefix of params",
        ],
    ),
    (
        "bad_bound",
        ValueError,
        normalize(bound={"enc": None, "dec": 1.0}),
        ["enc/kernel: found None"],
    ),
    ("bad_bound", ValueError, normalize(scale="x"), ["scale is not usable", "'x'", "real number"]),
    ("bad_bound", ValueError, normalize(scale=jnp.ones(7)), ["scale is not usable", "shape (7,)"]),
    *[
        (
            "bad_prefix",
            ValueError,
            normalize(**{name: bad}),
            [f"{name} is not a tree prefix", "params' own keys"],
        )
        for name in ("bound", "scale")
        for bad in (
            {"enc": 1.0},
            {"enc": 1.0, "cod": 1.0},
            {"enc": 1.0, "dec": {"kernel": {"deeper": 1.0}, "bias": 1.0}},
            [1.0, 2.0],
        )
    ],
    ("bad_bound", ValueError, normalize(bound=None), ["enc/kernel: found None"]),
    # --- operators ---
    (
        "bad_axes",
        ValueError,
        lambda: Matrix(in_axis=1.5),
        ["jsn.Matrix: in_axis=", "1.5", "integers"],
    ),
    ("bad_axes", ValueError, lambda: Matrix(in_axis="xy"), ["jsn.Matrix: in_axis=", "integers"]),
    ("bad_axes", ValueError, lambda: Matrix(out_axis=True), ["jsn.Matrix: out_axis=", "True"]),
    ("bad_axes", ValueError, lambda: Matrix(None, None), ["in_axis and out_axis are both None"]),
    (
        "bad_axes",
        ValueError,
        lambda: Matrix(in_axis=0, out_axis=0),
        ["names an axis twice", "once"],
    ),
    ("bad_axes", ValueError, lambda: Matrix(batch_axis=(0, 0)), ["names an axis twice"]),
    ("bad_axes", ValueError, lambda: Matrix(batch_axis=None), ["batch_axis", "integers"]),
    ("no_operator", TypeError, iterate(operator="x"), ["jsn.power_iterate", "'x'", "an instance"]),
    ("no_operator", TypeError, iterate(operator=Matrix), ["jsn.power_iterate", "class", "Matrix("]),
    # --- linen ---
    (
        "no_linen_state",
        ValueError,
        lambda: dense(3).apply({"params": PARAMS["enc"]}, X),
        ["without its 'sn_state'", "model.apply({'params': params", "jsn.linen.init_state(model"],
    ),
    (
        "not_linen",
        TypeError,
        lambda: jsn.linen.spectral_norm(nn.Dense(3)),
        ["an instance of Dense", "class"],
    ),
    (
        "not_linen",
        TypeError,
        lambda: jsn.linen.spectral_norm(len),
        ["built-in function len", "jsn.init"],
    ),
    (
        "not_decorated",
        ValueError,
        lambda: jsn.linen.init_state(nn.Dense(3), {"params": PARAMS["enc"]}, X),
        ["no module of Dense", "jsn.linen.spectral_norm(Model)(...)"],
    ),
    (
        "unknown_rules",
        TypeError,
        lambda: jsn.linen.spectral_norm(nn.Dense, rules="operator"),
        ["jsn.linen.spectral_norm", "'operator'", '"operators"'],
    ),
    (
        "bad_bound",
        ValueError,
        lambda: jsn.linen.spectral_norm(nn.Dense, bound=-1.0)(3).init(KEY, X),
        ["bound is not usable", "found -1.0"],
    ),
    (
        "not_a_model",
        TypeError,
        lambda: jsn.linen.operators(nn.Dense, X),
        [
            "jsn.linen.operators: expected an instance",
            "linear.Dense'> (type)",
            "operators(Model(), x)",
        ],
    ),
    (
        "not_exact",
        UserWarning,
        lambda: jsn.linen.operators(Custom(), X),
        ["jsn.linen.operators: 1 weight could not be read exactly", "kernel", "rules=[("],
    ),
    # --- nnx ---
    (
        "not_nnx",
        TypeError,
        lambda: jsn.nnx.spectral_norm(nnx.Linear),
        ["jsn.nnx.spectral_norm: expected a flax.nnx.Module", "class Linear", "Wrap an instance"],
    ),
    (
        "nnx_wrapped_twice",
        ValueError,
        lambda: jsn.nnx.spectral_norm(WRAPPED),
        ["jsn.nnx.spectral_norm: the module is wrapped already", "wrapper.module"],
    ),
    (
        "no_nnx_wrapper",
        ValueError,
        lambda: jsn.nnx.fold(linear()),
        ["jsn.nnx.fold: found no wrapper in this Linear", "jsn.nnx.spectral_norm"],
    ),
    (
        "nnx_other_trace",
        flax.errors.TraceContextError,
        lambda: jax.jit(WRAPPED)(X),
        ["jsn.nnx: in training mode", "Pass the module as an argument through nnx.jit", ".eval()"],
    ),
    # --- optim ---
    (
        "no_params",
        ValueError,
        lambda: updated(jsn.optim.keep_spectral_norm_below(1.0, warmup=0)),
        ["jsn.optim.", "needs the parameters", "tx.update(updates, state, params)"],
    ),
    (
        "no_cap",
        ValueError,
        lambda: jsn.optim.soft_cap(1.0, max_update=0.5),
        ["jsn.optim.soft_cap: for bound=1", "max_update=0.5", "expected at most", "hard_cap"],
    ),
    (
        "cap_needs_matrix",
        ValueError,
        lambda: jsn.optim.hard_cap(1.0, rules=[("dec/kernel", Conv((8, 8, 2)))]).init(PARAMS),
        ["jsn.optim.hard_cap: 1 weight is not seen as a matrix", "dec/kernel", "jsn.Matrix"],
    ),
    # --- convolutions ---
    ("bad_conv", ValueError, lambda: Conv((32,)), ["jsn.Conv: input_shape=(32,)", "(32, 32, 3)"]),
    ("bad_conv", ValueError, lambda: Conv((8, 3), strides=0), ["jsn.Conv: strides=0", "from 1 on"]),
    ("bad_conv", ValueError, lambda: Conv((8, 3), padding="EDGE"), ["padding='EDGE'", "'REFLECT'"]),
    (
        "cannot_view",
        ValueError,
        init(rules=rule("dec/kernel", Conv((8, 8, 3)))),
        ["dec/kernel: shape (3, 3, 2, 5), rule Conv((8, 8, 3)): 2 input channels"],
    ),
    # --- bounds ---
    (
        "not_finite",
        ValueError,
        bound(np.array([[1.0, np.nan], [np.inf, 0.0]])),
        ["jsn.upper_bound: 2 of 4 entries not finite", "at (0, 1), is nan", "repair the weight"],
    ),
    (
        "no_bound_for",
        TypeError,
        bound(operator="conv"),
        ["jsn.upper_bound: no bound is known for the operator 'conv'", "jsn.Matrix or jsn.Conv"],
    ),
    (
        "bad_method",
        ValueError,
        bound(method="svd"),
        ["jsn.upper_bound: method is 'svd'", "Matrix()", "'auto', 'gram', 'cholesky'"],
    ),
    (
        "traced_bound",
        TypeError,
        lambda: jax.jit(jsn.upper_bound)(W),
        ["jsn.upper_bound: W is traced", "'auto' runs on the host", 'method="gram"'],
    ),
    (
        "too_long",
        ValueError,
        lambda: jax.eval_shape(gram, jax.ShapeDtypeStruct((2**23, 1), jnp.float32)),
        ["jsn.upper_bound: an inner product of 8388609 terms", 'method="cholesky"'],
    ),
    # --- lipschitz_bound ---
    (
        "not_moved",
        TypeError,
        lambda: jsn.lipschitz_bound(lambda x: x, jnp.ones(3, int)),
        ["jsn.lipschitz_bound: x is made of int", "floating point", "lambda x: fn(x, labels)"],
    ),
    (
        "bound_overflows",
        ValueError,
        lambda: jsn.lipschitz_bound(far, U),
        ["jsn.lipschitz_bound: the bound is larger than any float64", "Normalize the weights"],
    ),
    (
        "no_constant",
        ValueError,
        lambda: jsn.lipschitz_bound(lambda x: x * x, U),
        ["no finite Lipschitz constant is known", "`mul`", "test_errors.py:", "jnp.clip"],
    ),
    # --- certified robustness ---
    (
        "bad_logits",
        ValueError,
        radius(logits=[[1.0]]),
        ["jsn.certified_radius: logits have shape (1, 1)", "at least two classes"],
    ),
    (
        "bad_lipschitz",
        ValueError,
        radius(bound=-2.0),
        ["jsn.certified_radius: bound is -2.0", "at least 0", "jsn.lipschitz_bound"],
    ),
    (
        "bad_labels",
        ValueError,
        accuracy(labels=[2]),
        ["jsn.certified_accuracy: labels have values from 2 to 2, expected 0 to 1"],
    ),
    (
        "bad_radii",
        ValueError,
        accuracy(radii=-1.0),
        ["jsn.certified_accuracy: radii are -1.0, expected numbers of at least 0"],
    ),
    # --- interop ---
    (
        "not_importable",
        TypeError,
        lambda: jsn.interop.from_torch(3),
        ["jsn.interop.from_torch: expected a state dict", "found int"],
    ),
    (
        "bad_entries",
        ValueError,
        lambda: jsn.interop.from_torch({"a": "text", "b": np.eye(2)}),
        ["jsn.interop.from_torch: 1 entry cannot be used", "a: found str", "Expected names to"],
    ),
    (
        "nothing_imported",
        ValueError,
        lambda: jsn.interop.from_torch({"fc.weight": np.eye(2)}),
        ["jsn.interop.from_torch: nothing here", "Expected keys", "The entries are: fc.weight"],
    ),
    (
        "cannot_export",
        ValueError,
        lambda: jsn.interop.to_torch({"w": jnp.ones((2, 3, 4))}, STACKED),
        ["jsn.interop.to_torch: 1 weight cannot be expressed", "w: ", "jsn.fold(params, state)"],
    ),
    (
        "pickled_file",
        ValueError,
        lambda: jsn.interop.from_torch("critic.pt"),
        ["jsn.interop.from_torch: critic.pt is no .safetensors file", "weights_only=True"],
    ),
    (
        "unreadable_file",
        FileNotFoundError,
        lambda: jsn.interop.from_torch("nowhere.safetensors"),
        ["nowhere.safetensors cannot be read as safetensors: no such file", "Save or download"],
    ),
]
STACKED = jsn.init({"w": jnp.ones((2, 3, 4))}, rules=[("w", Matrix(batch_axis=0))], warmup=0)


@pytest.mark.parametrize(
    ("wording", "error", "do", "parts"),
    CASES,
    ids=[f"{index}-{case[0]}" for index, case in enumerate(CASES)],
)
def test_bad_input_is_told(wording, error, do, parts, monkeypatch):
    check_told(wording, error, do, parts, monkeypatch)


def check_told(wording, error, do, parts, monkeypatch):
    """The error is raised, and it was this wording that said all of it."""
    worded, original = [], getattr(_errors, wording)

    def listen(*facts, **more):
        worded.append(original(*facts, **more))
        return worded[-1]

    monkeypatch.setattr(_errors, wording, listen)
    with pytest.raises(error) as caught:  # a warning is raised too, as everywhere in these tests
        do()
    assert type(caught.value) is error
    told = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    assert any(" ".join(text.split()) in " ".join(told.split()) for text in worded)
    for part in parts:
        assert part in told


# --- what needs files, packages or processors ------------------------------------------------


class Told(Exception):
    """What the command wrote on stderr."""


def jsn_audit(*argv):
    """Runs the command, and raises what it tells."""
    with contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            status = main(["audit", *map(str, argv)])
        except SystemExit as stop:
            status = stop.code
    assert status
    raise Told(err.getvalue())


class Elsewhere:
    """What a weight looks like whose other shards other processes hold."""

    is_fully_addressable = False
    shape, ndim, dtype, size = (2, 2), 2, np.dtype(np.float32), 4


def without(patch, *packages):
    for package in packages:
        patch.setitem(sys.modules, package, None)


def plot_without_matplotlib(patch, folder):
    without(patch, "matplotlib", "matplotlib.figure")
    jsn.audit(PARAMS["enc"]).plot(folder / "out.png")


def read_without_safetensors(patch, folder):
    without(patch, "safetensors")
    jsn.interop.from_torch(folder / "x.safetensors")


def audit_a_pickle(patch, folder):
    (folder / "x.pt").write_bytes(b"PK\3\4")
    jsn_audit(folder / "x.pt")


def audit_a_text(patch, folder):
    (folder / "x.txt").write_text("hello")
    jsn_audit(folder / "x.txt")


def flush_subnormal_numbers(patch, folder):
    patch.setattr(np, "ones", np.zeros)  # a stand-in: with ones the check computes
    jsn.upper_bound(np.eye(2))


def run_on_a_tpu(patch, folder):
    patch.setattr(jax, "default_backend", lambda: "tpu")
    jax.jit(gram)(W)


SURROUNDINGS = [
    (
        "missing_extra",
        ImportError,
        plot_without_matplotlib,
        ["jsn.audit: a plot needs matplotlib, which is not installed", "pip install 'jsn[audit]'"],
    ),
    (
        "missing_package",
        ImportError,
        read_without_safetensors,
        ["jsn.interop.from_torch: reading .safetensors files", "pip install safetensors"],
    ),
    (
        "pickled_checkpoint",
        Told,
        audit_a_pickle,
        ["x.pt: is a pickle, which can run code", "safetensors.torch.save_file"],
    ),
    (
        "unknown_checkpoint",
        Told,
        audit_a_text,
        ["x.txt: is in no format that jsn reads: expected .safetensors, .npz"],
    ),
    (
        "bad_view",
        Told,
        lambda patch, folder: jsn_audit("x.npz", "--rules", "kernel=what"),
        ["--rules 'kernel=what': 'what' means nothing", "Expected PATTERN=VIEW"],
    ),
    (
        "bad_arithmetic",
        FloatingPointError,
        flush_subnormal_numbers,
        ["jsn.upper_bound: on this thread, subnormal numbers are flushed", "Expected the IEEE"],
    ),
    (
        "not_addressable",
        ValueError,
        lambda patch, folder: jsn.upper_bound(Elsewhere()),
        ["jsn.upper_bound: this process can read only a part", "process_allgather"],
    ),
    (
        "gram_on_tpu",
        ValueError,
        run_on_a_tpu,
        ['jsn.upper_bound: method="gram" is not proven on a TPU', "jax.default_device"],
    ),
    pytest.param(
        "too_wide",
        TypeError,
        lambda patch, folder: jsn.upper_bound(np.ones((2, 2), np.longdouble)),
        ["jsn.upper_bound: dtype float128 has more digits", "Expected float64 or less"],
        marks=pytest.mark.skipif(
            np.finfo(np.longdouble).bits == 64, reason="long double is float64 here"
        ),
    ),
]


@pytest.mark.parametrize(("wording", "error", "do", "parts"), SURROUNDINGS)
def test_bad_surroundings_are_told(wording, error, do, parts, monkeypatch, tmp_path):
    check_told(wording, error, lambda: do(monkeypatch, tmp_path), parts, monkeypatch)


# --- the wordings themselves ----------------------------------------------------------------

PACKAGE = pathlib.Path(_errors.__file__).parent
WORDINGS = {name for name, f in inspect.getmembers(_errors, inspect.isfunction) if name[0] != "_"}
CORE = ["_types", "_operator", "_rules", "_power", "_plan", "_constrain", "_normalize", "linen"]


def uses(source: str) -> collections.Counter:
    """The attributes of `_errors` that a module's source reads."""
    return collections.Counter(
        node.attr
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "_errors"
    )


def test_no_wording_is_unreachable():
    modules = [path.read_text() for path in PACKAGE.rglob("*.py")]
    used = sum(map(uses, modules), collections.Counter())
    assert WORDINGS - set(used) == set(), "nothing uses these"
    assert set(used) - WORDINGS == set(), "these do not exist"


def test_every_wording_has_a_case():
    """A new message needs a case above: input that brings it about, and what it must say."""
    cases = {case[0] for case in CASES}
    cases |= {getattr(case, "values", case)[0] for case in SURROUNDINGS}
    assert WORDINGS - cases == set()


def test_the_search_for_uses_sees_a_use():
    assert uses("def f():\n    raise ValueError(_errors.bad_u(1))") == {"bad_u": 1}


@pytest.mark.parametrize("module", CORE)
def test_the_core_words_every_error_in_one_place(module):
    """A message written where it is raised would escape the tests above."""
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text())):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            assert re.match(r"\w+\(_errors\.", ast.unparse(node.exc)), ast.unparse(node)
