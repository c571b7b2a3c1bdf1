"""Station 7, the linen adapter: `spectral_norm` on a module class, `init_state`, `operators`.

In: a linen class. Out: the same class, whose methods see normalized weights. The state lives in
the collection `sn_state`; whether that is mutable is the train or eval switch. Must not know
anything about spectra: stations 1 to 6 do.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
from flax.core import lift, unfreeze
from flax.core.scope import DenyList, Scope

from jsn import _errors, _normalize
from jsn._linen_operators import describe, tell
from jsn._linen_operators import operators as operators
from jsn._linen_outputs import Outputs
from jsn._normalize import Factored
from jsn._power import check_count
from jsn._read_linen import Reader, Reading
from jsn._rules import FLAX, Rules, covers, flatten, refined
from jsn._types import PyTree, SNState

COLLECTION = "sn_state"
_NAME = "spectral_norm"
"""The variable, within the collection, that holds the state of a decorated module."""

_READ = "operators"
"""The rules that stand for reading the model."""

_creating = contextvars.ContextVar("jsn.linen creates missing state", default=False)


class _Settings(NamedTuple):
    rules: Rules | Literal["operators"]
    block_size: int
    warmup: int
    options: Mapping[str, Any]


def spectral_norm(
    target: Any = None,
    *,
    rules: Rules | Literal["operators"] = FLAX,
    block_size: int = 32,
    warmup: int = 15,
    n_steps: int = 1,
    bound: Any = 1.0,
    soft: bool = False,
    scale: Any = None,
) -> Any:
    """Decorates a linen module class, so that its methods see spectrally normalized weights.

    The parameters stay raw: same paths, values, dtypes and metadata boxes as without jsn, so
    checkpoints are interchangeable. State lives in the collection `sn_state`. Where that is
    mutable, `apply` takes `n_steps` power steps, once per `apply` however often the module is
    called in it; where it is not, `apply` uses the state as it is, with one read of each weight.
    No PRNG is needed. `Decorated.__wrapped__` is the undecorated class.

    With the default rules the model itself is asked for what a path cannot tell: layers stacked
    by `nn.scan` or `nn.vmap` get one sigma each, and the axes of `nn.DenseGeneral` (so of
    attention) are those of the layer. Convolutions are seen as Miyato et al. do, reshaped to a
    matrix; with `rules="operators"` every layer has its true operator norm, convolutions at the
    input sizes of `init`: see `jsn.linen.operators`. Rules of your own are taken as they are.

    Around `nn.RNN` or a whole model a recurrent kernel is normalized once for a sequence; around
    the cell alone, once for every time step.

    Whoever looks at a weight sees it normalized. Where a layer takes and gives less than its weight
    has entries, as on small batches, jsn scales its input and output instead: the same up to
    rounding, without a scaled copy of the weight. It does so for large weights of `nn.Dense`,
    `DenseGeneral`, `Conv` and `ConvTranspose` in at least float32, outside of loops and `nn.remat`.

    Args:
        target: A module class such as `nn.Dense` or your own; without it, a decorator.
        rules: See `jsn.init`; or "operators", to read them from the model.
        block_size: See `jsn.init`.
        warmup: See `jsn.init`.
        n_steps: Power steps of an `apply` in which `sn_state` is mutable.
        bound: See `jsn.normalize`.
        soft: See `jsn.normalize`.
        scale: See `jsn.normalize`.

    Returns:
        A class of the same name and module.

    Raises:
        TypeError: If `target` is no linen module class, or `rules` another word.
        ValueError: On `apply`, if there is no `sn_state`; else what `jsn.init` and
            `jsn.normalize` raise.

    Examples:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, jsn
        >>> @jsn.linen.spectral_norm
        ... class Critic(nn.Module):
        ...     @nn.compact
        ...     def __call__(self, x):
        ...         return nn.Dense(1)(nn.relu(nn.Dense(64)(x)))
        >>> x = jnp.ones((2, 8))
        >>> variables = Critic().init(jax.random.key(0), x)
        >>> y, updates = Critic().apply(variables, x, mutable=["sn_state"])  # training
        >>> variables = {**variables, **updates}
        >>> y = Critic().apply(variables, x)  # evaluation

    References:
        Miyato et al. 2018, https://arxiv.org/abs/1802.05957
    """
    if isinstance(rules, str) and rules != _READ:
        raise TypeError(_errors.unknown_rules(rules))
    options = {"bound": bound, "soft": soft, "scale": scale}
    settings = _Settings(rules, block_size, warmup, options)
    check_count("jsn.linen.spectral_norm", "n_steps", n_steps, 0)
    check_count("jsn.linen.spectral_norm", "block_size", block_size, 1)
    check_count("jsn.linen.spectral_norm", "warmup", warmup, 0)

    def decorate(cls: Any) -> Any:
        if isinstance(cls, functools.partial):
            return functools.partial(decorate(cls.func), *cls.args, **cls.keywords)
        if not (inspect.isclass(cls) and issubclass(cls, nn.Module)):
            raise TypeError(_errors.not_linen(describe(cls)))
        transform = functools.partial(_lift, settings=settings, n_steps=n_steps)
        functools.update_wrapper(transform, _lift)
        methods = _public_methods(cls)
        decorated = nn.transforms.lift_transform(transform, cls, methods=methods)
        for name in ("__name__", "__qualname__", "__module__", "__doc__"):
            setattr(decorated, name, getattr(cls, name))
        setattr(decorated, "__wrapped__", cls)  # noqa: B010
        return decorated

    return decorate if target is None else decorate(target)


def init_state(model: nn.Module, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
    """Makes the `sn_state` collection for parameters that were trained without jsn.

    Args:
        model: A model with decorated modules in it.
        variables: Its variables, `{"params": ...}` and whatever else it needs.
        *args: What `model.apply` is called with, only for its shapes.
        **kwargs: Likewise; `rngs` and `method` too.

    Returns:
        The collection, to be passed as `{**variables, "sn_state": collection}`.

    Raises:
        ValueError: What `jsn.init` raises, or if no module of the model is decorated.

    Examples:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, jsn
        >>> x = jnp.ones((2, 8))
        >>> variables = nn.Dense(4).init(jax.random.key(0), x)  # a checkpoint, say
        >>> model = jsn.linen.spectral_norm(nn.Dense)(4)
        >>> sn_state = jsn.linen.init_state(model, variables, x)
        >>> y = model.apply({**variables, "sn_state": sn_state}, x)
    """
    bare = {name: value for name, value in variables.items() if name != COLLECTION}

    def create(bare):
        return model.apply(bare, *args, mutable=[COLLECTION], **kwargs)[1]

    with _create_missing():
        made = jax.jit(create)(bare)  # jit drops the forward pass, which nothing needs
    if COLLECTION not in made:
        raise ValueError(_errors.not_decorated(type(model).__name__))
    return made[COLLECTION]


@contextlib.contextmanager
def _create_missing() -> Iterator[None]:
    token = _creating.set(True)
    try:
        yield
    finally:
        _creating.reset(token)


def _public_methods(cls: type[nn.Module]) -> list[str]:
    """The methods a caller may use: those that the class or its bases add to nn.Module."""
    names = {
        name
        for base in cls.__mro__
        if issubclass(base, nn.Module) and base is not nn.Module
        for name, value in vars(base).items()
        if inspect.isfunction(value)
        and not getattr(value, "nowrap", False)
        and (name == "__call__" or not name.startswith("_"))
    }
    return sorted(names - {"setup"} - (set(dir(nn.Module)) - {"__call__"}))


# --- the lifted transform --------------------------------------------------------------------


def _lift(fn: Callable, *, settings: _Settings, n_steps: int) -> Callable:
    """Runs a scope function on normalized parameters."""

    def call(scopes: Any, *args: Any, **kwargs: Any) -> Any:
        # Within one apply a module may be called several times: it is normalized the first time.
        root = jax.tree.leaves(scopes, is_leaf=lambda x: isinstance(x, Scope))[0].root
        seen = root.__dict__.setdefault("_jsn_seen", {})
        inner = functools.partial(_call, fn, settings, n_steps, seen)
        groups = ("params", COLLECTION, True)
        return lift.pack(inner, groups, groups, (True,), name=_NAME, enable_kwargs=True)(
            scopes, *args, **kwargs
        )

    return call


def _call(
    fn: Callable,
    settings: _Settings,
    n_steps: int,
    seen: dict,
    scope_fn: Callable,
    repack: Callable,
    groups: Any,
    rngs: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """What runs inside the lifted scope: creates what is missing, normalizes, calls `fn`."""
    scopes = scope_fn(groups, rngs)
    roots = list({id(scope.root): scope.root for scope in _leaves(scopes)}.values())
    mine = _leaves(scopes)[-1].root  # those of modules that were handed in come first
    training = roots[0].is_mutable_collection(COLLECTION)
    making = roots[0].get_flag("initializing", False) and roots[0].is_mutable_collection("params")
    creating = making or _creating.get()
    params, states, rest = (tuple(map(unfreeze, group)) for group in groups)
    made: Any = tuple({} for _ in roots)
    reader = Reader()
    if creating:
        with nn.intercept_methods(reader):
            fn(scopes, *args, **kwargs)
        new_params, new_states, _ = repack(scopes)
        states = tuple(map(unfreeze, new_states))
        made = params = tuple(map(unfreeze, new_params)) if making else params

    def run(index: int, tree: PyTree) -> Any:
        trees = (*params[:index], {"params": tree}, *params[index + 1 :])
        scopes = scope_fn((trees, states, rest), rngs, mutable_filter=DenyList("params"))
        return fn(scopes, *args, **kwargs)

    views, own, found = [], [], []
    for index, (root, tree, state) in enumerate(zip(roots, params, states, strict=True)):
        raw, old = tree.get("params"), state.get(COLLECTION, {}).get(_NAME)
        if not raw or (root is not mine and not covers(raw, settings.rules)):
            views.append(tree)  # a module handed in that has nothing to normalize
            own.append({})
            continue
        if creating:
            prefix = "".join(f"{name}/" for name in root.path)
            seen_here = {path.removeprefix(prefix): x for path, x in reader.seen.items()}
            reading = Reading(raw, seen_here, functools.partial(run, index))
            old = _create(raw, old, settings, reading)
        if old is None:
            raise ValueError(_errors.no_linen_state("/".join(root.path) or "the model"))
        steps = n_steps if training and not creating else 0
        view, new, factored = _normalized_once(seen, root.path, raw, old, steps, settings.options)
        found += factored
        views.append({"params": view})
        own.append({_NAME: new} if training else {})

    scopes = scope_fn((tuple(views), states, rest), rngs, mutable_filter=DenyList("params"))
    with nn.intercept_methods(Outputs(() if creating else found)):
        y = fn(scopes, *args, **kwargs)
    _, states, rest = repack(scopes)
    merged = tuple(
        {COLLECTION: inner} if (inner := {**unfreeze(state.get(COLLECTION, {})), **new}) else {}
        for state, new in zip(states, own, strict=True)
    )
    return y, (made, merged, rest)


def _leaves(scopes: Any) -> list[Scope]:
    return jax.tree.leaves(scopes, is_leaf=lambda node: isinstance(node, Scope))


def _normalized_once(
    seen: dict, path: tuple[str, ...], raw: PyTree, state: SNState, n_steps: int, options: Mapping
) -> tuple[PyTree, SNState, list[Factored]]:
    """Normalizes, or hands out what this apply made of the very same leaves before."""
    leaves = jax.tree.leaves(raw)
    before, view, found = seen.get(path, ([], None, []))
    if len(before) == len(leaves) and all(x is y for x, y in zip(before, leaves, strict=True)):
        return view, state, found
    view, state, found = _normalize.factored(raw, state, n_steps, **options)
    seen[path] = (leaves, view, found)
    return view, state, found


def _create(
    raw: PyTree, old: SNState | None, settings: _Settings, reading: Reading
) -> SNState | None:
    """The state of a scope at init; made anew where another method has added parameters."""
    leaves = [leaf.path for leaf in flatten(raw)[0]]
    if old is not None and leaves == [leaf.path for leaf in flatten(old.u)[0]]:
        return old
    rules = settings.rules
    if rules is FLAX:
        rules = refined(raw, reading.observed())
    elif isinstance(rules, str):
        rules, reports = reading.rules()
        tell(reports)
    return _normalize.init(raw, rules=rules, block_size=settings.block_size, warmup=settings.warmup)
