"""Station 11, PyTorch: state dicts of both spectral_norm functions.

In: names and tensors. Out: parameters under the names of the plain model, and their state; and
back. Torch itself is not needed.

Layouts, for a parameter `N` (such as `weight`) of the module `X`, with h outputs and w inputs:

    torch.nn.utils.parametrizations.spectral_norm      torch.nn.utils.spectral_norm
    X.parametrizations.N.original    the raw weight    X.N_orig
    X.parametrizations.N.0._u        (h,)              X.N_u
    X.parametrizations.N.0._v        (w,)              X.N_v

where the matrix is `weight.movedim(dim, 0).flatten(1)`; `dim` is 0, or 1 for ConvTranspose, and
is not stored. Before PyTorch 1.1 the second form had no `N_v`, and `N` beside `N_orig`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jsn import _errors
from jsn._operator import Matrix
from jsn._rules import flatten
from jsn._types import PyTree, SNState
from jsn.interop._arrays import read_all, to_leaf, to_tensors
from jsn.interop._beside import other_view
from jsn.interop._blocks import Found, Triple, take_over, triples

_PARAMETRIZED = re.compile(r"^((?:.*\.)?)parametrizations\.([^.]+)\.(original|0\._u|0\._v)$")
_OTHER = re.compile(r"(^|\.)parametrizations\.")
_REMOVE = (
    "Expected, for each normalized weight, what torch.nn.utils.parametrizations.spectral_norm or "
    "torch.nn.utils.spectral_norm saves: the raw weight (.original, _orig) and its u (.0._u, _u). "
    "Remove other parametrizations in torch first (torch.nn.utils.parametrize."
    "remove_parametrizations), and rename what only looks like these."
)


def from_torch(
    state_dict: Any, *, rules: Any = (), block_size: int = 1
) -> tuple[dict[str, Any], SNState]:
    """Reads a PyTorch state dict that holds spectrally normalized weights.

    Both of torch's functions are read, in one dict even. Parameters keep torch's layout, and the
    names that the plain model has: `layer.weight`, not `layer.parametrizations.weight.original`.
    Whatever else is in the dict (biases, running statistics) is handed through.

    With `n_steps=0`, `jsn.normalize` then gives what a parametrized model computes in `eval()`.
    With `n_steps=1` it gives what a model with torch's older hook computes in its next forward
    pass in `train()`; in `eval()` that hook uses a sigma half a step older than its own `u`.

    Args:
        state_dict: Names to tensors (of torch, numpy or jax), or the path of a `.safetensors`
            file. Pickled files are refused.
        rules: Pairs of a name pattern and an operator or None, which come before what the dict
            says. Torch does not store which axis is the output. Where the lengths of `u` and `v`
            leave a choice, it is the first axis, unless the vectors clearly fit another. A rule
            such as `("up.*weight$", jsn.Matrix(out_axis=1))` settles it.
        block_size: With 1, torch's `u` is continued. With more, the state is made anew.

    Returns:
        The parameters, a flat dict by torch name, and their state. float64 becomes float32
        unless JAX runs in 64 bits. Entries that are not floating point stay in numpy.

    Raises:
        TypeError: If `state_dict` is neither a mapping nor a path, or a weight is not real
            floating point.
        ValueError: If entries cannot be read or do not fit each other, if another
            parametrization is found, or if nothing is spectrally normalized; if a file is
            damaged or a pickle.
        FileNotFoundError: If there is no such file.
        ImportError: If a file is to be read and safetensors is not installed.

    Examples:
        >>> import jax.numpy as jnp, jsn
        >>> state_dict = {
        ...     "head.parametrizations.weight.original": 4 * jnp.eye(2, 3),
        ...     "head.parametrizations.weight.0._u": jnp.array([1.0, 0.0]),
        ...     "head.parametrizations.weight.0._v": jnp.array([1.0, 0.0, 0.0]),
        ...     "head.bias": jnp.zeros(2),
        ... }
        >>> params, state = jsn.interop.from_torch(state_dict)
        >>> print(jsn.normalize(params, state, n_steps=0)[0]["head.weight"])
        [[1. 0. 0.]
         [0. 1. 0.]]

    References:
        torch/nn/utils/parametrizations.py and torch/nn/utils/spectral_norm.py of PyTorch 2.13.
    """
    call = "jsn.interop.from_torch"
    entries = read_all(call, state_dict)
    plain, groups, problems = _grouped(entries)
    problems += [(name, what) for name, group in groups.items() if (what := _incomplete(group))]
    problems += [
        (name, "is here both with and without spectral normalization")
        for name in groups
        if name in plain
    ]
    found = {}
    if not problems:
        for name, group in groups.items():
            dim, what = _dim(*(group.get(part) for part in ("original", "u", "v")))
            problems += [(name, what)] if what else []
            found[name] = Found(Matrix(out_axis=dim), np.asarray(group["u"])[None])
    if problems:
        raise ValueError(_errors.bad_entries(call, problems, _REMOVE))
    if not groups:
        expected = "keys such as X.parametrizations.weight.original or X.weight_orig"
        fix = (
            "For a plain model: params = {name: jax.numpy.asarray(x) for name, x in "
            "state_dict.items()}; state = jsn.init(params, rules=jsn.TORCH)."
        )
        raise ValueError(_errors.nothing_imported(call, expected, list(plain), fix))
    raw = {name: group["original"] for name, group in groups.items()}
    params = {name: to_leaf(x) for name, x in {**plain, **raw}.items()}
    return params, take_over(call, params, found, rules, block_size)


def to_torch(
    params: PyTree,
    state: Any = None,
    *,
    old: bool = False,
    tensors: bool | None = None,
) -> dict[str, Any]:
    """Writes parameters and their state as a PyTorch state dict, for `load_state_dict`.

    Torch always normalizes to 1: where you use another `bound`, or `soft`, or a `scale`, leave
    with plain weights, `to_torch(jsn.fold(params, state, bound=...))`. The same goes for
    operators that torch does not have. With `block_size > 1` torch gets the best vector of the
    block, so its sigma starts as true as jsn's.

    Args:
        params: Parameters in torch's layouts. A flat dict by torch name, or nested ones, whose
            keys are then joined by dots.
        state: Their state; None writes the parameters as they are.
        old: Write the keys of `torch.nn.utils.spectral_norm` (`weight_orig`), not those of
            `torch.nn.utils.parametrizations.spectral_norm`.
        tensors: Whether values are torch tensors or numpy arrays (for
            `safetensors.numpy.save_file`); None means tensors where torch is installed.

    Returns:
        Names to values. They share no memory with the parameters. `u` and `v` have the dtype of
        their weight, as in torch.

    Raises:
        TypeError: If `state` is no state.
        ValueError: If the state does not fit the parameters, or an operator is not a matrix onto
            a single axis; naming every such weight.
        ImportError: If `tensors=True` and torch is not installed.

    Examples:
        >>> import jax.numpy as jnp, jsn
        >>> params = {"head.weight": 4 * jnp.eye(2, 3), "head.bias": jnp.zeros(2)}
        >>> state = jsn.init(params, rules=jsn.TORCH)
        >>> sorted(jsn.interop.to_torch(params, state))
        ['head.bias', 'head.parametrizations.weight.0._u', 'head.parametrizations.weight.0._v',
         'head.parametrizations.weight.original']

    References:
        torch/nn/utils/parametrizations.py and torch/nn/utils/spectral_norm.py of PyTorch 2.13.
    """
    call = "jsn.interop.to_torch"
    leaves, made = (flatten(params)[0], {}) if state is None else triples(call, params, state)
    problems = [(path, what) for path, triple in made.items() if (what := _no_dim(triple))]
    if problems:
        raise ValueError(_errors.cannot_export(call, "torch's spectral_norm", problems))
    flat = isinstance(params, Mapping)
    arrays: dict[str, Any] = {}
    for leaf in leaves:
        name = leaf.path if flat and leaf.path in params else leaf.path.replace("/", ".")
        if leaf.path in made:
            arrays |= _entries(name, made[leaf.path], old)
        elif leaf.value is not None:
            arrays[name] = leaf.value
    return to_tensors(call, arrays, tensors)


# --- reading ----------------------------------------------------------------------------------


def _grouped(entries: Mapping[str, Any]) -> tuple[dict, dict[str, dict[str, Any]], list]:
    """Plain entries, the parts of each normalized weight by its plain name, and problems."""
    plain, groups, problems = {}, {}, []
    for name, value in entries.items():
        parametrized, (base, part) = _PARAMETRIZED.match(name), _hooked(name, entries)
        if parametrized:
            module, parameter, part = parametrized.groups()
            base, part = module + parameter, part.removeprefix("0._")
        elif _OTHER.search(name):
            problems.append((name, "belongs to a parametrization other than spectral_norm"))
            continue
        if base and part in groups.get(base, {}):
            problems.append((base, "is here in both of torch's forms"))
        elif base:
            groups.setdefault(base, {})[part] = value
        elif not ({f"{name}_orig", f"{name}_u"} <= entries.keys() and f"{name}_v" not in entries):
            plain[name] = value  # else it is the normalized weight, which PyTorch 1.0 stored too
    return plain, groups, problems


def _hooked(name: str, entries: Mapping[str, Any]) -> tuple[str, str]:
    """The plain name and the part that an entry of the older form is, or two empty strings."""
    base, _, suffix = name.rpartition("_")
    has = {part: f"{base}_{part}" in entries for part in ("orig", "u", "mask")}
    pruned = has["mask"] and not has["u"]  # torch.nn.utils.prune stores N_orig and N_mask
    parts = {"orig": "original", "u": "u", "v": "v"}
    return (base, parts[suffix]) if suffix in parts and has["orig"] and not pruned else ("", "")


def _incomplete(group: Mapping[str, Any]) -> str:
    """What is wrong with the parts of one weight, or an empty string."""
    missing = [part for part in ("original", "u") if part not in group]
    if missing:
        return f"found {' and '.join(group)}, but no {' and no '.join(missing)}"
    for part, x in group.items():
        if part != "original" and not jnp.issubdtype(x.dtype, jnp.floating):
            return f"{part} has dtype {x.dtype}, expected real floating point"
    return ""


def _dim(W: Any, u: Any, v: Any) -> tuple[int, str]:
    """The axis of a weight that is torch's output side, and what is wrong, if anything."""
    shape, n_out = tuple(W.shape), tuple(u.shape)
    n_in = None if v is None else tuple(v.shape)
    size = int(np.prod(shape))
    fits = [
        dim for dim, n in enumerate(shape) if n and n_out == (n,) and n_in in (None, (size // n,))
    ]
    if not fits:
        return 0, f"u of shape {n_out} and v of shape {n_in} fit no axis of the weight, {shape}"
    if len(fits) == 1 or v is None:
        return fits[0], ""
    alignment = {dim: _alignment(W, u, v, dim) for dim in fits}
    best = max(fits, key=lambda dim: alignment[dim])
    # The default axis, unless these vectors could hardly come from it.
    first = fits[0]
    clearly = alignment[best] > max(0.95, alignment[first] + 0.02)
    return (best if clearly else first), ""


def _alignment(W: Any, u: Any, v: Any, dim: int) -> float:
    """How well W^T u agrees with v, or W v with u: one of them is exact after a forward pass."""
    matrix, u, v = (np.asarray(x).astype(np.float64) for x in (W, u, v))
    matrix = np.moveaxis(matrix, dim, 0).reshape(len(u), -1)

    def cosine(x: np.ndarray, y: np.ndarray) -> float:
        norm = np.linalg.norm(x) * np.linalg.norm(y)
        return float(x @ y / norm) if np.isfinite(norm) and norm > 0 else 0.0

    return max(cosine(matrix.T @ u, v), cosine(matrix @ v, u))


# --- writing ----------------------------------------------------------------------------------


def _no_dim(triple: Triple) -> str:
    """Why torch cannot see a weight this way, or an empty string."""
    ndim = np.ndim(triple.weight)
    whats = [other_view(triple, Matrix(out_axis=dim)) for dim in range(ndim)]
    return whats[0] if all(whats) else ""


def _entries(name: str, triple: Triple, old: bool) -> dict[str, Any]:
    W = np.asarray(triple.weight)
    u, v = (x.reshape(-1).astype(W.dtype) for x in (triple.u, triple.v))
    if old:
        return {f"{name}_orig": W, f"{name}_u": u, f"{name}_v": v}
    module, _, parameter = name.rpartition(".")
    prefix = f"{module}.parametrizations.{parameter}" if module else f"parametrizations.{parameter}"
    return {f"{prefix}.original": W, f"{prefix}.0._u": u, f"{prefix}.0._v": v}
