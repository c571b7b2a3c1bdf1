"""Parts `step`, `uses` and `evaluation`: normalizing within the step, and after it.

In: settings. Out: rows. Whole networks, once plain, once with jsn and once with Flax's wrapper
around every layer. Runs in a process of its own.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import traverse_util

import jsn
from benchmarks import _clock
from benchmarks._cases import CRITIC
from benchmarks._clock import Row
from benchmarks._contenders import both_products
from jsn._constrain import constrain
from jsn._power import Pairs, Tracked, with_derivative

PyTree = Any
Tick = Callable[[float], None]


class Critic(nn.Module):
    """The SN-GAN critic of Miyato et al. for 32 x 32 pictures.

    Attributes:
        layers: Features and window of each convolution.
        wrap: Flax's wrapper around every layer.
    """

    layers: Sequence[tuple[int, int]] = CRITIC
    wrap: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        for index, (features, window) in enumerate(self.layers):
            window, stride = (window, window), window - 2
            layer = nn.Conv(features, window, strides=stride, name=f"conv_{index}")
            x = nn.leaky_relu(_layer(layer, x, self.wrap, train), 0.1)
        head = nn.Dense(1, name="head")
        return _layer(head, x.reshape(len(x), -1), self.wrap, train)[:, 0]


class MLP(nn.Module):
    """Dense layers with relu between them."""

    widths: Sequence[int]
    wrap: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        for index, width in enumerate(self.widths):
            x = nn.relu(_layer(nn.Dense(width, name=f"dense_{index}"), x, self.wrap, train))
        return x


def _layer(layer: nn.Module, x: jax.Array, wrap: bool, train: bool) -> jax.Array:
    return nn.SpectralNorm(layer)(x, update_stats=train) if wrap else layer(x)  # type: ignore


def decorated(cls: type[nn.Module], **options: Any) -> Any:
    """A network under the decorator of jsn."""
    return jsn.linen.spectral_norm(cls, **options)


# --- forward passes of one training step: (params, state, inputs) -> outputs, next state --------

Forward = Callable[[PyTree, PyTree, Sequence[jax.Array]], tuple[list[jax.Array], PyTree]]


def plain(model: nn.Module) -> Forward:
    def forward(params: PyTree, state: PyTree, inputs: Sequence[jax.Array]) -> Any:
        return [model.apply({"params": params}, x) for x in inputs], state

    return forward


def once(model: nn.Module) -> Forward:
    def forward(params: PyTree, state: PyTree, inputs: Sequence[jax.Array]) -> Any:
        params, state = jsn.normalize(params, state)
        return [model.apply({"params": params}, x) for x in inputs], state

    return forward


def each_time(model: nn.Module, collection: str) -> Forward:
    """Whatever the model does about norms, it does in each of its passes."""

    def forward(params: PyTree, state: PyTree, inputs: Sequence[jax.Array]) -> Any:
        outputs = []
        for x in inputs:
            variables = {"params": params, collection: state}
            y, updates = model.apply(variables, x, mutable=collection)
            outputs.append(y)
            state = updates[collection]
        return outputs, state

    return forward


def floor(model: nn.Module, as_jsn: bool) -> Forward:
    """What no block of this size can do without to normalize once, and nothing else.

    Its two products with each weight, the scaling, and the derivative of both. Weights are
    multiplied with 1 / sigma, or scaled as jsn does it, which XLA treats differently.
    """

    def normalized(W: jax.Array, u: jax.Array) -> tuple[jax.Array, jax.Array]:
        weight = Tracked(jsn.Matrix(), jax.lax.stop_gradient(W), u)
        v, y = both_products(weight)
        # As if it had converged: all is of the right size, whatever was found.
        pairs = Pairs([jnp.linalg.norm(v[0])], [u[0]], [v[0] / jnp.linalg.norm(v[0])])
        (sigma,) = with_derivative((weight.operator,), [W], pairs)
        if as_jsn:
            ((scaled,), _) = constrain([weight.operator], [W], [sigma], [1.0], False, [None])
        else:
            scaled = W * (1 / jnp.where(sigma > 0, sigma, 1))
        return scaled, u.at[: len(y)].add(1e-6 * y)  # so that no compiler leaves it out

    def both(params: PyTree, us: PyTree) -> tuple[PyTree, PyTree]:
        leaves = traverse_util.flatten_dict(params)
        pairs = {path: normalized(leaves[path], u) for path, u in us.items()}
        leaves |= {path: scaled for path, (scaled, _) in pairs.items()}
        return traverse_util.unflatten_dict(leaves), {path: u for path, (_, u) in pairs.items()}

    def forward(params: PyTree, us: PyTree, inputs: Sequence[jax.Array]) -> Any:
        scaled, us = both(params, us)
        return [model.apply({"params": scaled}, x) for x in inputs], us

    return forward


def one_normalized(model: nn.Module) -> Forward:
    """What compiling cannot do without: the power step for one kernel, a product for every other.

    Those others are multiplied by given numbers: no reads, no blocks, no derivative of sigma.
    """

    def forward(params: PyTree, state: PyTree, inputs: Sequence[jax.Array]) -> Any:
        (tracked, numbers), leaves = state, traverse_util.flatten_dict(params)
        first, *others = (path for path in leaves if path[-1] == "kernel")
        normalized, tracked = jsn.normalize({"kernel": leaves[first]}, tracked)
        leaves |= {path: leaves[path] * n for path, n in zip(others, numbers, strict=True)}
        leaves[first] = normalized["kernel"]
        variables = {"params": traverse_util.unflatten_dict(leaves)}
        return [model.apply(variables, x) for x in inputs], (tracked, numbers)

    return forward


def made(function: Callable, *args: Any) -> PyTree:
    """What a function returns."""
    return jax.jit(function)(*args)


def variants(
    cls: type[nn.Module], x: jax.Array, make: Callable[..., PyTree] = made, **fields: Any
) -> tuple[PyTree, dict[str, Any]]:
    """Raw parameters, and for each way of normalizing its forward passes and its first state.

    `make(function, *args)` gives what the function returns, or something of its shapes.
    """
    model, wrapped = cls(**fields), cls(**fields, wrap=True)
    params = make(model.init, jax.random.key(0), x)["params"]
    stats = make(lambda key: wrapped.init(key, x, train=False), jax.random.key(0))
    return params, {
        "no normalization": (plain(model), ()),
        **both_ways("jsn", cls, params, x, make, fields),
        "Flax linen": (each_time(wrapped, "batch_stats"), stats["batch_stats"]),
    }


def both_ways(
    name: str,
    cls: type[nn.Module],
    params: PyTree,
    x: jax.Array,
    make: Callable[..., PyTree],
    fields: dict[str, Any],
    **options: Any,
) -> dict[str, Any]:
    """The two ways of jsn, once for all passes and in each of them, as `variants` gives them."""
    model = decorated(cls, **options)(**fields)
    return {
        f"{name}, normalized once": (
            once(cls(**fields)),
            make(functools.partial(jsn.init, **options), params),
        ),
        f"{name}, decorator": (
            each_time(model, "sn_state"),
            make(lambda params: _state_of(model, params, x), params),
        ),
    }


def _state_of(model: Any, params: PyTree, x: jax.Array) -> PyTree:
    return jsn.linen.init_state(model, {"params": params}, x)


# --- the parts --------------------------------------------------------------------------------


def floors(
    cls: type[nn.Module], params: PyTree, make: Callable[..., PyTree] = made, **fields: Any
) -> dict[str, Any]:
    """The floors of the default, as forward passes and their first state."""
    model, state = cls(**fields), make(jsn.init, params)
    us = {path: u for path, u in traverse_util.flatten_dict(state.u).items() if u is not None}
    return {
        f"floor of the default, once{how}": (floor(model, bool(how)), us)
        for how in ("", ", scaled as jsn does")
    }


def floor_of_compiling(
    cls: type[nn.Module], params: PyTree, make: Callable[..., PyTree] = made, **fields: Any
) -> tuple[Forward, PyTree]:
    """One layer normalized, the others scaled: its forward passes and its first state."""
    leaves = traverse_util.flatten_dict(params)
    first, *others = (leaf for path, leaf in leaves.items() if path[-1] == "kernel")
    state = make(jsn.init, {"kernel": first}), [jnp.ones(())] * len(others)
    return one_normalized(cls(**fields)), state


def measure_step(
    names: Sequence[str], settings: dict[str, Any], tick: Tick
) -> Iterator[tuple[str, Row]]:
    """A step of the critic: hinge losses on real and on generated pictures, and Adam."""
    fields = {"layers": CRITIC[:2]} if settings["smoke"] else {}
    rows = []
    for index, batch in enumerate(settings["batches"]):
        real, fake = jax.random.normal(jax.random.key(0), (2, batch, 32, 32, 3))
        params, makers = variants(Critic, real[:1], **fields)
        makers |= both_ways("jsn, block 16", Critic, params, real[:1], made, fields, block_size=16)
        makers |= floors(Critic, params, **fields)
        calls, compiling = {}, {}
        for name, (forward, state) in makers.items():
            step = _adam_step(_hinge(forward), params)
            calls[name], compiling[name] = ready(step, params, state, (real, fake))
        times = _clock.in_turns(
            calls,
            seconds=settings["step_seconds"],
            tick=lambda done, n=index: tick((n + done) / len(settings["batches"])),
        )
        rows += _rows(times, {"batch": batch}, compiling)
    yield "step", {"title": "SN-GAN critic, real and generated batch", "rows": rows}


def measure_uses(
    names: Sequence[str], settings: dict[str, Any], tick: Tick
) -> Iterator[tuple[str, Row]]:
    """A gradient through several forward passes of one small network."""
    rows = []
    for index, uses in enumerate(settings["uses"]):
        inputs = tuple(jax.random.normal(jax.random.key(0), (uses, 16, 256)))
        params, makers = variants(MLP, inputs[0], widths=(256,) * settings["depth"])
        calls, compiling = {}, {}
        for name, (forward, state) in makers.items():
            step = jax.value_and_grad(total(forward), has_aux=True)
            calls[name], compiling[name] = ready(step, params, state, inputs)
        times = _clock.in_turns(calls, seconds=settings["growth_seconds"])
        rows += _rows(times, {"uses": uses}, compiling)
        tick((index + 1) / len(settings["uses"]))
    yield "uses", {"title": "forward passes in a step", "rows": rows}


def measure_evaluation(
    names: Sequence[str], settings: dict[str, Any], tick: Tick
) -> Iterator[tuple[str, Row]]:
    """Evaluating: products in the program, and time. Folded parameters are plain parameters."""
    x = jax.random.normal(jax.random.key(0), (16, 256))
    widths = (256,) * settings["depth"]
    model, wrapped = MLP(widths), MLP(widths, wrap=True)
    ours = decorated(MLP)(widths)
    params = jax.jit(model.init)(jax.random.key(0), x)["params"]
    state = jsn.init(params)
    stats = jax.jit(lambda key: wrapped.init(key, x, train=False))(jax.random.key(0))
    variables = {
        "no normalization": (model, {"params": params}),
        "jsn, folded": (model, {"params": jax.jit(jsn.fold)(params, state)}),
        "jsn, decorator": (ours, {"params": params, "sn_state": _state_of(ours, params, x)}),
        "Flax linen": (wrapped, {"params": params, "batch_stats": stats["batch_stats"]}),
    }
    rows, calls, texts = [], {}, {}
    for name, (network, given) in variables.items():
        evaluate = lambda given, x, network=network: network.apply(given, x, train=False)
        compiled, seconds = _clock.compile_timed(evaluate, given, x)
        texts[name] = jax.jit(evaluate).lower(given, x).as_text()
        calls[name] = lambda call=compiled, given=given: jax.block_until_ready(call(given, x))
        products = len(re.findall(r"stablehlo\.(?:dot_general|convolution)\b", texts[name]))
        rows.append({"name": name, "products": products, "compile_s": round(seconds, 3)})
    times = _clock.in_turns(calls, seconds=settings["growth_seconds"], tick=tick)
    for row in rows:
        row |= _clock.summary(times[row["name"]])
        row["ratio"] = round(_clock.ratio(times[row["name"]], times["no normalization"]), 3)
        row["same_program"] = texts[row["name"]] == texts["no normalization"]
    yield "evaluation", {"title": f"{settings['depth']} dense layers", "rows": rows}


def _hinge(forward: Forward) -> Callable:
    def loss(params: PyTree, state: PyTree, inputs: Sequence[jax.Array]) -> Any:
        (real, fake), state = forward(params, state, inputs)
        return jnp.mean(nn.relu(1 - real)) + jnp.mean(nn.relu(1 + fake)), state

    return loss


def total(forward: Forward) -> Callable:
    def loss(params: PyTree, state: PyTree, inputs: Sequence[jax.Array]) -> Any:
        outputs, state = forward(params, state, inputs)
        return sum(jnp.mean(y) for y in outputs), state

    return loss


def _adam_step(loss: Callable, params: PyTree) -> Callable:
    adam = optax.adam(2e-4, b1=0.0, b2=0.9)
    moments = jax.jit(adam.init)(params)

    def step(params: PyTree, state: PyTree, inputs: Sequence[jax.Array]) -> Any:
        gradient, state = jax.grad(loss, has_aux=True)(params, state, inputs)
        updates, next_moments = adam.update(gradient, moments)
        return optax.apply_updates(params, updates), state, next_moments

    return step


def ready(step: Callable, *args: Any) -> tuple[Callable[[], Any], float]:
    """A call that returns when it is done, and the seconds that compiling it took."""
    compiled, seconds = _clock.compile_timed(step, *args)
    return lambda: jax.block_until_ready(compiled(*args)), seconds


def _rows(times: dict[str, list[float]], what: Row, compiling: dict[str, float]) -> list[Row]:
    return [
        {"name": name, **what, **_clock.summary(times[name])}
        | {"ratio": round(_clock.ratio(times[name], times["no normalization"]), 3)}
        | {"compile_s": round(compiling[name], 3)}
        for name in times
    ]
