"""Station 1: which leaves are weights, seen through jsn.init and the paths of its state."""

import dataclasses
import typing

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jsn
from jsn import Matrix


def tracked(params, **options):
    """Path to operator of every tracked leaf. Nothing is computed: only shapes are looked at."""
    return dict(jax.eval_shape(lambda p: jsn.init(p, **options), params).operators)


def arrays(**shapes):
    return {name: jnp.ones(shape) for name, shape in shapes.items()}


# --- the rules that come with jsn -----------------------------------------------------------


def test_flax_tracks_kernels_and_nothing_else():
    params = {
        "Dense_0": arrays(kernel=(3, 4), bias=(4,)),
        "Conv_0": arrays(kernel=(3, 3, 2, 5), bias=(5,)),
        "BatchNorm_0": arrays(scale=(4,), bias=(4,)),
        "Embed_0": arrays(embedding=(10, 4)),
        "LSTMCell_0": {"hi": arrays(kernel=(4, 4), bias=(4,))},
        "not_a_kernel": arrays(kernels=(4, 4), my_kernel=(4, 4)),
    }
    expected = ["Conv_0/kernel", "Dense_0/kernel", "LSTMCell_0/hi/kernel"]
    assert tracked(params) == dict.fromkeys(expected, Matrix())


def test_flax_sees_attention_as_the_maps_it_is_made_of():
    attention = nn.MultiHeadDotProductAttention(num_heads=4)
    x = jnp.ones((1, 3, 8))
    params = jax.eval_shape(lambda: attention.init(jax.random.key(0), x))["params"]
    found = tracked(params)
    fan_out = Matrix(in_axis=0, out_axis=None)
    names = ("key", "query", "value")
    assert found == {**{f"{name}/kernel": fan_out for name in names}, "out/kernel": Matrix()}
    assert fan_out.codomain((8, 4, 2)) == (4, 2)


def test_torch_tracks_weights_of_two_axes_or_more():
    params = {
        "conv.weight": jnp.ones((5, 2, 3, 3)),
        "conv.bias": jnp.ones((5,)),
        "norm.weight": jnp.ones((5,)),
        "head": arrays(weight=(4, 5), bias=(4,), weight_g=(4, 1)),
    }
    first = Matrix(out_axis=0)
    assert tracked(params, rules=jsn.TORCH) == {"conv.weight": first, "head/weight": first}


# --- rules of one's own ---------------------------------------------------------------------


def test_the_first_rule_that_matches_wins():
    params = {"a": arrays(kernel=(3, 4)), "b": arrays(kernel=(3, 4)), "c": arrays(kernel=(3, 4))}
    rules = [("a/kernel", None), ("[ab]/kernel", Matrix(out_axis=0)), *jsn.FLAX]
    assert tracked(params, rules=rules) == {"b/kernel": Matrix(out_axis=0), "c/kernel": Matrix()}
    rules = [*jsn.FLAX, ("a/kernel", None)]
    assert set(tracked(params, rules=rules)) == {"a/kernel", "b/kernel", "c/kernel"}


def test_patterns_are_searched_for_not_matched_from_the_start():
    params = {"net": {"layer_12": arrays(w=(3, 4)), "layer_3": arrays(w=(3, 4))}}
    assert set(tracked(params, rules=[(r"r_\d\d/", Matrix())])) == {"net/layer_12/w"}
    assert set(tracked(params, rules=[(r"3/w$", Matrix())])) == {"net/layer_3/w"}


def test_a_rule_may_decide_by_the_leaf():
    rule = lambda leaf: Matrix(batch_axis=0) if leaf.ndim == 3 else None
    params = arrays(one=(3, 4), stack=(2, 3, 4))
    assert tracked(params, rules=[("", rule)]) == {"stack": Matrix(batch_axis=0)}


def test_a_leaf_that_no_rule_matches_is_left_alone():
    params = {**arrays(kernel=(3, 4)), "steps": jnp.arange(3), "none": None}
    state = jsn.init(params)
    assert state.u["steps"] is None
    assert state.u["none"] is None
    normalized, _ = jsn.normalize(params, state)
    assert normalized["steps"] is params["steps"]
    assert normalized["none"] is None


# --- trees and their paths ------------------------------------------------------------------


class Pair(typing.NamedTuple):
    first: jax.Array
    second: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    kernel: jax.Array
    bias: jax.Array


@jax.tree_util.register_pytree_with_keys_class
class Named:
    """A node whose keys are of no kind that JAX knows."""

    def __init__(self, weight):
        self.weight = weight

    def tree_flatten_with_keys(self):
        return (("own name", self.weight),), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


TREES = {
    "dict": ({"a": {"b": 0}}, "a/b"),
    "list": ([0], "0"),
    "tuple": (({"x": 0},), "0/x"),
    "namedtuple": (Pair(0, None), "first"),
    "dataclass": (Layer(0, None), "kernel"),
    "int key": ({3: 0}, "3"),
    "slash in key": ({"a/b": 0}, "a/b"),
    "own keys": ({"a": Named(0)}, "a/own name"),
    "a bare leaf": (0, ""),
}


@pytest.mark.parametrize(("tree", "path"), TREES.values(), ids=TREES)
def test_paths_are_keys_joined_by_slashes(tree, path):
    W = jnp.asarray(np.random.default_rng(0).standard_normal((3, 4)), jnp.float32)
    params = jax.tree.map(lambda _: W, tree)
    state = jsn.init(params, rules=[(f"^{path}$", Matrix())])
    assert state.operators == ((path, Matrix()),)
    is_none = lambda x: x is None
    structure = jax.tree.structure(params, is_leaf=is_none)
    assert jax.tree.structure(state.u, is_leaf=is_none) == structure
    normalized, new = jsn.normalize(params, state)
    assert jax.tree.structure(normalized) == jax.tree.structure(params)
    assert jax.tree.structure(new) == jax.tree.structure(state)
    (found,) = jax.tree.leaves(normalized)
    assert np.isclose(np.linalg.norm(found, 2), 1, atol=1e-5)


def test_boxes_are_opened_for_the_state_and_kept_for_the_weights():
    W = 4 * jnp.eye(3)
    boxes = {
        "linen": {"kernel": nn.Partitioned(W, names=("x", None))},
        "logical": {"kernel": nn.LogicallyPartitioned(W, names=("in", "out"))},
        "nnx": {"kernel": nnx.Param(W)},
    }
    state = jsn.init(boxes)
    assert set(dict(state.operators)) == {f"{name}/kernel" for name in boxes}
    assert all(isinstance(u["kernel"], jax.Array) for u in state.u.values())
    normalized, _ = jsn.normalize(boxes, state)
    assert jax.tree.structure(normalized) == jax.tree.structure(boxes)
    assert normalized["linen"]["kernel"].names == ("x", None)
    assert type(normalized["nnx"]["kernel"]) is nnx.Param
    for leaf in jax.tree.leaves(normalized):
        assert np.allclose(leaf, jnp.eye(3), atol=1e-6)
    sigmas = jsn.sigmas(boxes, state)
    assert np.isclose(sigmas["linen"]["kernel"], 4)
    # A box that was emptied, as by a tree map that gives None for frozen weights, is no weight.
    boxes["linen"] = jax.tree.map(lambda _: None, boxes["linen"])
    state = jax.eval_shape(jsn.init, boxes)
    assert set(dict(state.operators)) == {"logical/kernel", "nnx/kernel"}
    assert jax.tree.leaves(jax.eval_shape(jsn.normalize, boxes, state)[0]["linen"]) == []
