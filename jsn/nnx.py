"""Station 7, the NNX adapter: `spectral_norm` around a module, `normalize`, `fold`, `sn_state`.

In: an nnx module. Out: a wrapper whose methods see normalized weights, while every `nnx.Param`
stays raw. The blocks live in Variables of their own type, `SpectralState`; `train()` and `eval()`
are the switch. Must not know anything about spectra: stations 1 to 6 do.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import errors, nnx
from flax.core import FrozenDict, freeze

from jsn import _errors, _normalize
from jsn._constrain import broadcast
from jsn._nnx_module import (
    Path,
    join,
    nested,
    nodes,
    observe,
    params_outside,
    part,
    run_on_copy,
    set_attribute,
    unnested,
)
from jsn._power import check_count
from jsn._rules import FLAX, Rules, refined
from jsn._types import SNState


class SpectralState(nnx.Variable):
    """The tracked block of one weight, `(*batch, block, *codomain)`, always float32.

    A Variable type of its own, so that filters tell it from parameters and batch statistics:
    `nnx.split(model, nnx.Param, jsn.nnx.SpectralState, ...)`.
    """


def spectral_norm(
    module: nnx.Module,
    *,
    rules: Rules = FLAX,
    block_size: int = 32,
    warmup: int = 15,
    n_steps: int = 1,
    bound: Any = 1.0,
    soft: bool = False,
    scale: Any = None,
) -> SpectralNorm:
    """Wraps an nnx module, so that its methods see spectrally normalized weights.

    No `nnx.Param` is changed by being used: the optimizer sees and moves raw weights, and a
    layer that is also used outside the wrapper is not normalized there. In training mode, which
    is how a wrapper starts, each call takes `n_steps` power steps and stores the next blocks;
    after `.eval()` a call reads each weight once and writes nothing, so it also works inside
    plain `jax.jit`, `jax.vmap` and `jax.grad` closures. Where a step has several forward passes
    (real and fake), normalize once, with `jsn.nnx.normalize`.

    All methods of the module, and of its submodules, are reached through the wrapper:
    `wrapper.encode(x)`, `wrapper.encoder(x)`. `wrapper.module` is the module itself, raw.
    A method that writes to a normalized weight writes to a copy of it, which is dropped.

    With the default rules the module is asked for what a path cannot tell: the axes of
    `nn.LinearGeneral` (so of attention) and `nn.Einsum`, and one sigma for each of the layers
    stacked by `nnx.vmap`. Rules of your own are taken as they are. Paths are those of
    `nnx.state(module)`, joined by "/". Weights within an inner wrapper are left to it.

    Args:
        module: Any nnx module. It is kept, not copied: other references to it stay raw.
        rules: See `jsn.init`.
        block_size: See `jsn.init`.
        warmup: See `jsn.init`.
        n_steps: Power steps of a call in training mode.
        bound: See `jsn.normalize`; also an `nnx.Variable`, or a nested dict of them by path.
        soft: See `jsn.normalize`.
        scale: See `jsn.normalize`; an `nnx.Param` is learned with the others.

    Returns:
        A module that holds the wrapped one as `.module`.

    Raises:
        TypeError: If `module` is no nnx module, or what `jsn.init` raises.
        ValueError: If `module` is a wrapper itself, or what `jsn.init` and `jsn.normalize` raise.

    Examples:
        >>> import jax.numpy as jnp, jsn, optax
        >>> from flax import nnx
        >>> critic = jsn.nnx.spectral_norm(nnx.Linear(8, 1, rngs=nnx.Rngs(0)))
        >>> optimizer = nnx.Optimizer(critic, optax.adam(1e-3), wrt=nnx.Param)
        >>> @nnx.jit
        ... def train_step(critic, optimizer, x):
        ...     grads = nnx.grad(lambda critic: critic(x).mean())(critic)
        ...     optimizer.update(critic, grads)
        >>> train_step(critic, optimizer, jnp.ones((4, 8)))
        >>> critic.eval()
        >>> critic(jnp.ones((4, 8))).shape
        (4, 1)

    References:
        Miyato et al. 2018, https://arxiv.org/abs/1802.05957
    """
    return SpectralNorm(
        module,
        rules=rules,
        block_size=block_size,
        warmup=warmup,
        n_steps=n_steps,
        bound=bound,
        soft=soft,
        scale=scale,
    )


def normalize(module: nnx.Module) -> Any:
    """Normalizes once, for a step that uses the weights several times.

    Every wrapper in `module` takes its power steps (none in eval mode) and is replaced by the
    module it wraps, with normalized weights. Gradients flow through to the raw ones, and all
    other Variables (batch statistics, random keys) are the very same objects.

    Args:
        module: A wrapper, or a module with wrappers somewhere in it.

    Returns:
        A plain module, to be used within the step.

    Raises:
        ValueError: If there is no wrapper in `module`.

    Examples:
        >>> import jax.numpy as jnp, jsn
        >>> from flax import nnx
        >>> critic = jsn.nnx.spectral_norm(nnx.Linear(8, 1, rngs=nnx.Rngs(0)))
        >>> def loss(critic, real, fake):
        ...     critic = jsn.nnx.normalize(critic)  # one power step, one sigma
        ...     return (critic(fake) - critic(real)).mean()
        >>> grads = nnx.grad(loss)(critic, jnp.ones((4, 8)), jnp.zeros((4, 8)))
    """
    return _unwrapped("jsn.nnx.normalize", nnx.clone(module, variables=False), SpectralNorm._step)


def fold(module: nnx.Module, *, n_steps: int = 15) -> Any:
    """Normalizes once and for all, for inference or export: afterwards jsn can be forgotten.

    Args:
        module: A wrapper, or a module with wrappers somewhere in it. Nothing is written to it.
        n_steps: Power steps, to make sigma as true as it gets.

    Returns:
        A new plain module that shares no Variable with `module`.

    Raises:
        ValueError: If there is no wrapper in `module`, or `n_steps < 0`.

    Examples:
        >>> import jax.numpy as jnp, jsn
        >>> from flax import nnx
        >>> linear = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
        >>> linear.kernel[...] = 4 * jnp.eye(3)
        >>> plain = jsn.nnx.fold(jsn.nnx.spectral_norm(linear))
        >>> type(plain).__name__, print(plain.kernel[...][0].round(5))
        [1. 0. 0.]
        ('Linear', None)
    """
    n_steps = check_count("jsn.nnx.fold", "n_steps", n_steps, 0)
    make = lambda wrapper: wrapper._normalized(n_steps)[0]
    return _unwrapped("jsn.nnx.fold", nnx.clone(module), make)


def sn_state(module: SpectralNorm) -> SNState:
    """The state of a wrapper in the form that `jsn.normalize` and `jsn.sigmas` take.

    Args:
        module: A wrapper.

    Returns:
        The state that belongs to `nnx.state(module.module, nnx.Param)`.

    Raises:
        ValueError: If `module` is no wrapper.

    Examples:
        >>> import jsn
        >>> from flax import nnx
        >>> wrapper = jsn.nnx.spectral_norm(nnx.Linear(8, 4, rngs=nnx.Rngs(0)))
        >>> params = nnx.state(wrapper.module, nnx.Param)
        >>> tree = jsn.sigmas(params, jsn.nnx.sn_state(wrapper))
    """
    if not isinstance(module, SpectralNorm):
        raise ValueError(_errors.no_nnx_wrapper("jsn.nnx.sn_state", type(module).__name__))
    blocks = {path: block[...] for path, block in module._blocks().items()}
    every = nnx.to_flat_state(nnx.state(module.module, nnx.Param))
    return SNState({join(path): blocks.get(join(path)) for path, _ in every}, module.operators)


class SpectralNorm(nnx.Module):
    """What `jsn.nnx.spectral_norm` returns: a module whose methods see normalized weights.

    Attributes:
        module: The wrapped module, with its raw parameters.
        sn_state: A `SpectralState` for each normalized weight, nested by path.
        operators: The operator of each normalized weight, by path. Static.
        n_steps: Power steps of a call in training mode.
        bound: The norm each weight is given.
        soft: Whether weights below the bound are left alone.
        scale: A factor on top, or None.
        use_running_average: Whether calls use the state as it is. `.train()` and `.eval()` set
            it, as they do for batch normalization.
    """

    def __init__(
        self,
        module: nnx.Module,
        *,
        rules: Rules = FLAX,
        block_size: int = 32,
        warmup: int = 15,
        n_steps: int = 1,
        bound: Any = 1.0,
        soft: bool = False,
        scale: Any = None,
    ):
        """Takes what `jsn.nnx.spectral_norm` takes."""
        call = "jsn.nnx.spectral_norm"
        if not isinstance(module, nnx.Module):
            raise TypeError(_errors.not_nnx(_describe(module)))
        if isinstance(module, SpectralNorm):
            raise ValueError(_errors.nnx_wrapped_twice())
        params = params_outside(module, SpectralNorm)
        flat = {join(path): param for path, param in params.items()}
        if rules is FLAX:
            rules = refined(flat, observe(module))
        state = _normalize.init(flat, rules=rules, block_size=block_size, warmup=warmup)
        tracked = [path for path in params if state.u[join(path)] is not None]
        self.module = module
        self.operators = state.operators
        self.sn_state = nnx.data(
            nested({path: SpectralState(state.u[join(path)]) for path in tracked})
        )
        self.n_steps = check_count(call, "n_steps", n_steps, 0)
        self.soft = soft
        self.bound = _stored(call, "bound", bound, params, tracked)
        self.scale = _stored(call, "scale", scale, params, tracked)
        self.use_running_average = False
        jax.eval_shape(lambda: self._normalized(0)[1])  # a bad bound raises here

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the wrapped module, with normalized weights."""
        return self._run(lambda module: module(*args, **kwargs))

    def __getattr__(self, name: str) -> Any:
        """What the wrapped module has under this name: methods see normalized weights."""
        module = vars(self).get("module")
        if module is None or name.startswith("_"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return part(self, lambda module: module, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets an attribute of its own, or of the wrapped module where that has it."""
        module = vars(self).get("module")
        if name in _OWN or name.startswith("_") or not hasattr(module, name):
            super().__setattr__(name, value)
        else:
            setattr(module, name, value)

    def set_view(self, use_running_average: bool | None = None) -> None:
        """Called by `nnx.view`, as for batch normalization."""
        if use_running_average is not None:
            self.use_running_average = use_running_average

    def _blocks(self) -> dict[str, SpectralState]:
        return {join(path): block for path, block in unnested(self.sn_state).items()}

    def _normalized(self, n_steps: int) -> tuple[nnx.Module, Mapping[str, Any]]:
        """A copy of the module with normalized weights, and the next blocks.

        The copy has Variables of its own for the normalized weights, and shares all others, so
        nothing is ever swapped in and out of a Variable, which may belong to an outer trace.
        """
        graphdef, variables = nnx.split(self.module)
        variables = dict(nnx.to_flat_state(variables))
        keys = {join(path): path for path in variables}
        state = SNState({path: x[...] for path, x in self._blocks().items()}, self.operators)
        raw = {path: variables[keys[path]] for path in state.u if path in keys}
        static: dict[str, Any] = {"n_steps": n_steps, "soft": self.soft}
        traced = {}
        for name in ("bound", "scale"):
            stored = getattr(self, name)
            (static if _is_static(stored) else traced)[name] = _value(stored)
        view, state = _compiled(raw, state, traced, freeze(static))
        variables.update((keys[path], variable) for path, variable in view.items())
        return nnx.merge(graphdef, nnx.from_flat_state(variables)), state.u

    def _step(self) -> nnx.Module:
        """The normalized copy that the current mode asks for; stores the next blocks."""
        if self.use_running_average:
            return self._normalized(0)[0]
        copy, us = self._normalized(self.n_steps)
        try:
            for path, block in self._blocks().items():
                block[...] = us[path]
        except errors.TraceContextError as error:
            error.add_note(_errors.nnx_other_trace())
            raise
        return copy

    def _run(self, function: Callable[[Any], Any], advance: bool = True) -> Any:
        """Runs a function on the normalized copy; `advance` if that counts as a call."""
        copy = self._step() if advance else self._normalized(0)[0]
        return run_on_copy(self.module, copy, function)


_OWN = frozenset(
    ("module", "sn_state", "operators", "n_steps", "bound", "soft", "scale", "use_running_average")
)


# --- wrappers within a module ----------------------------------------------------------------


def _unwrapped(call: str, copy: Any, make: Callable[[SpectralNorm], nnx.Module]) -> Any:
    """Replaces the wrappers in a copy of a module, inner ones first, by what `make` returns."""
    made: dict[int, nnx.Module] = {}

    def plain(node: Any) -> Any:
        if not isinstance(node, SpectralNorm):
            return node
        if id(node) not in made:
            made[id(node)] = make(node)
        return made[id(node)]

    is_node = lambda x: isinstance(x, nnx.Pytree | nnx.Variable)
    for node in nodes(copy):
        for name, value in list(vars(node).items()):
            leaves = jax.tree.leaves(value, is_leaf=is_node)
            if any(isinstance(leaf, SpectralNorm) for leaf in leaves):
                set_attribute(node, name, nnx.data(jax.tree.map(plain, value, is_leaf=is_node)))
    result = plain(copy)
    if not made:
        raise ValueError(_errors.no_nnx_wrapper(call, type(copy).__name__))
    return result


@functools.partial(jax.jit, static_argnums=3)
def _compiled(raw: Any, state: SNState, traced: Mapping, static: FrozenDict) -> tuple[Any, SNState]:
    """One compiled call where nnx runs eagerly; within a trace, part of it."""
    return _normalize.normalize(raw, state, **traced, **static.unfreeze())


# --- bounds and scales -----------------------------------------------------------------------


def _stored(call: str, name: str, value: Any, params: Mapping[Path, Any], tracked: Any) -> Any:
    """A bound or scale as the wrapper keeps it: static if made of numbers, else data.

    A tree prefix becomes a nested dict with one value for each weight.
    """
    is_leaf = lambda x: x is None or isinstance(x, nnx.Variable)
    leaves, treedef = jax.tree.flatten(value, is_leaf=is_leaf)
    if treedef == jax.tree.structure(0):
        return value
    places = treedef.unflatten(range(len(leaves)))
    tree = nested({path: join(path) for path in params})
    every = dict(zip(jax.tree.leaves(tree), broadcast(call, name, places, tree), strict=True))
    found = {path: leaves[every[join(path)]] for path in tracked}
    if not any(isinstance(x, nnx.Variable | jax.Array) for x in found.values()):
        return freeze(nested(found))
    return nnx.data(
        nested({k: x if is_leaf(x) else jnp.asarray(x, jnp.float32) for k, x in found.items()})
    )


def _is_static(stored: Any) -> bool:
    return stored is None or isinstance(stored, int | float | FrozenDict)


def _value(stored: Any) -> Any:
    """A bound or scale as `jsn.normalize` takes it: Variables opened, nested dicts by path."""
    if isinstance(stored, Mapping):
        return {join(path): _value(x) for path, x in unnested(stored).items()}
    return stored[...] if isinstance(stored, nnx.Variable) else stored


def _describe(target: Any) -> str:
    if inspect.isclass(target):
        return f"the class {target.__name__}"
    return f"an instance of {type(target).__module__}.{type(target).__name__}"
