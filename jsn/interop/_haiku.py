"""Station 11, Haiku: the state of hk.SpectralNorm and of hk.SNParamsTree.

In: Haiku parameters and Haiku state. Out: an `SNState`; and back. Haiku itself is not needed.

Layouts, for a weight `(..., n)`, seen as the matrix from all axes but the last to the last:

    hk.SpectralNorm in a module    state["module/spectral_norm"]["u0"]           (1, n)
    hk.SNParamsTree                state["sn_params_tree/module__name"]["u0"]    (1, n)

each with a scalar "sigma" beside it. The first does not say which parameter it was called on.
The second writes the parameter's path into its name, with "/" as "__" and "~" as "_tilde".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jsn._types import PyTree, SNState
from jsn.interop._beside import Layout, Parts, found, match, write
from jsn.interop._blocks import expect_mapping, take_over


def from_haiku(
    params: PyTree,
    hk_state: Any,
    *,
    names: Mapping[str, str] | None = None,
    rules: Any = (),
    block_size: int = 1,
) -> SNState:
    """Makes a state from what `hk.SpectralNorm` or `hk.SNParamsTree` keep in Haiku's state.

    Haiku normalizes by one power step more than its state says: `jsn.normalize` with `n_steps=1`
    gives what it computes next, up to its `eps` of 1e-4, which makes small weights come out too
    large.

    Args:
        params: The parameters. For SNParamsTree, those that it is called on.
        hk_state: The state that lies beside them.
        names: For an `hk.SpectralNorm` whose parameter its place does not tell: the name of the
            module in the state to the path of its parameter, such as
            `{"critic/spectral_norm": "critic/linear/w"}`.
        rules: Pairs of a path pattern and an operator or None, which come before Haiku's own
            view.
        block_size: With 1, Haiku's `u0` is continued. With more, the state is made anew.

    Returns:
        The state of these parameters.

    Raises:
        TypeError: If `hk_state` is no mapping, or a weight is not real floating point.
        ValueError: If a `u0` has no parameter, several that fit, or one of another shape; or if
            there is none at all.

    Examples:
        >>> import jax.numpy as jnp, jsn
        >>> params = {"linear": {"w": 4 * jnp.eye(3), "b": jnp.zeros(3)}}
        >>> hk_state = {"sn_params_tree/linear__w": {"u0": jnp.ones((1, 3)), "sigma": jnp.ones(())}}
        >>> state = jsn.interop.from_haiku(params, hk_state)
        >>> print(jsn.normalize(params, state)[0]["linear"]["w"][0].round(4))
        [1. 0. 0.]

    References:
        haiku/_src/spectral_norm.py of Haiku 0.0.17.
    """
    call = "jsn.interop.from_haiku"
    expect_mapping(call, "the state of hk.transform_with_state", hk_state)
    layout = _layout(names)
    where = match(call, layout, params, hk_state)
    return take_over(call, params, found(layout, hk_state, where), rules, block_size)


def to_haiku(
    params: PyTree, state: Any, hk_state: Any, *, names: Mapping[str, str] | None = None
) -> Any:
    """Writes a state into the Haiku state of a model with spectral normalization.

    Haiku always normalizes to 1: where you use another `bound`, or `soft`, or a `scale`, leave
    with `jsn.fold` and a model without it.

    Args:
        params: The parameters, which both models share.
        state: Their state.
        hk_state: The state of the Haiku model, from its `init`, as a template.
        names: See `from_haiku`.

    Returns:
        The Haiku state with every `u0` and `sigma` replaced, and all else as it was.

    Raises:
        TypeError: If `state` is no state or `hk_state` no mapping.
        ValueError: If state and template do not normalize the same weights, or Haiku cannot
            express an operator; naming every such weight.

    Examples:
        >>> import jax.numpy as jnp, jsn
        >>> params = {"linear": {"w": 4 * jnp.eye(3)}}
        >>> hk_state = {"sn_params_tree/linear__w": {"u0": jnp.ones((1, 3)), "sigma": jnp.ones(())}}
        >>> state = jsn.init(params, rules=[("w$", jsn.Matrix())])
        >>> written = jsn.interop.to_haiku(params, state, hk_state)
        >>> print(written["sn_params_tree/linear__w"]["sigma"].round(4))
        4.0

    References:
        haiku/_src/spectral_norm.py of Haiku 0.0.17.
    """
    call = "jsn.interop.to_haiku"
    expect_mapping(call, "the state of hk.transform_with_state", hk_state)
    layout = _layout(names)
    where = match(call, layout, params, hk_state)
    return write(call, layout, params, state, hk_state, where)


def _layout(names: Mapping[str, str] | None) -> Layout:
    chosen = {tuple(k.split("/")): tuple(v.split("/")) for k, v in (names or {}).items()}

    def candidates(key: Parts, params: Sequence[Parts]) -> Iterator[Sequence[Parts]]:
        if key in chosen:
            yield [chosen[key]]
        else:
            yield [path for path in params if _tree_name(path) == key[-1]]
            yield [path for path in params if _scope(path) == _scope(key)]

    fix = (
        "Expected one parameter (..., n) for each u0 of shape (1, n). Say which with "
        "names={'module/spectral_norm': 'module/w'}."
    )
    return Layout("haiku.SpectralNorm", "u0", candidates, fix)


def _tree_name(path: Parts) -> str:
    """What SNParamsTree calls the module of a parameter."""
    return "/".join(path).replace("/", "__").replace("~", "_tilde")


def _scope(path: Parts) -> Parts:
    """The module that a name lies in; a "~" only says that it was made in the constructor."""
    scope = path[:-1]
    return scope[:-1] if scope[-1:] == ("~",) else scope
