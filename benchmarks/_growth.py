"""Parts `layers` and `width`: how time and compile time grow with the network.

In: settings. Out: rows. Runs in a process of its own.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from benchmarks import _clock
from benchmarks._cases import Case, trajectory
from benchmarks._clock import Row
from benchmarks._contenders import copy, flax_linen, ours
from benchmarks._training import MLP, PyTree, Tick, floor_of_compiling, ready, total, variants

LAYER_WIDTH = 64
NETWORKS = ("one shape", "all shapes differ")
FLOOR = "floor: one normalized, the rest scaled"


def measure_layers(
    names: Sequence[str], settings: dict[str, Any], tick: Tick
) -> Iterator[tuple[str, Row]]:
    """Value and gradient of a deep MLP: trace plus compile, and time of a call.

    Compiling is repeated where it is short, and the shortest counts. Once a network took so long
    that a larger one would exceed the limit, a method is not tried on larger ones.
    """
    rows: list[Row] = []
    variants(MLP, jax.numpy.ones((1, 8)), widths=(8,))  # imports are not paid by the first method
    jobs = [(kind, n) for kind in NETWORKS for n in settings["layers"]]
    stopped: set[tuple[str, str]] = set()
    for index, (kind, n_layers) in enumerate(jobs):
        x, widths = jax.numpy.ones((16, LAYER_WIDTH)), _widths(kind, n_layers)
        params, makers = variants(MLP, x, made_up, widths=widths)
        makers[FLOOR] = floor_of_compiling(MLP, params, made_up, widths=widths)
        calls, compiling = {}, {}
        for name, (forward, state) in makers.items():
            if (kind, name) in stopped:
                continue
            step = jax.value_and_grad(total(forward), has_aux=True)
            make = functools.partial(ready, step, params, state, (x,))
            calls[name], compiling[name] = _shortest(make, settings["compile_seconds"])
            following = [n for n in settings["layers"] if n > n_layers]
            expected = compiling[name] * (following[0] / n_layers if following else 0)
            stopped |= {(kind, name)} if expected > settings["compile_limit"] else set()
        times = _clock.in_turns(calls, seconds=settings["growth_seconds"])
        rows += [
            {"kind": kind, "layers": n_layers, "name": name, **_clock.summary(times[name])}
            | {"compile_s": round(compiling[name], 3)}
            for name in times
        ]
        tick((index + 1) / len(jobs))
    yield "layers", {"title": "layers", "rows": rows}


def made_up(function: Callable, *args: Any) -> PyTree:
    """Random numbers in the shapes of what a function returns: to make it would take minutes."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda found: jax.device_put(rng.standard_normal(found.shape).astype(found.dtype)),
        jax.eval_shape(function, *args),
    )


def _widths(kind: str, n_layers: int) -> tuple[int, ...]:
    """Widths of which no two neighbours repeat, or one width."""
    if kind == NETWORKS[0]:
        return (LAYER_WIDTH,) * n_layers
    return tuple(LAYER_WIDTH + 1 + index for index in range(n_layers))


def _shortest(make: Callable[[], tuple[Any, float]], enough: float) -> tuple[Any, float]:
    """Compiles up to three times from scratch, as long as all that takes less than `enough`."""
    begin, found = time.perf_counter(), []
    call = None
    while len(found) < 3 and (not found or time.perf_counter() - begin + found[-1] < enough):
        jax.clear_caches()
        call, seconds = make()
        found.append(seconds)
    return call, min(found)


def measure_width(
    names: Sequence[str], settings: dict[str, Any], tick: Tick
) -> Iterator[tuple[str, Row]]:
    """One square weight, normalized alone."""
    makers = {
        "copy of the weights": copy,
        "jsn, block 1": lambda: ours(block_size=1),
        "jsn, block 8": lambda: ours(block_size=8),
        "jsn, default": ours,
        "Flax linen": flax_linen,
    }
    rows: list[Row] = []
    for index, width in enumerate(settings["widths"]):
        weights = next(trajectory(Case("", ((width, width),)), 0))
        ready = {name: make() for name, make in makers.items()}
        for contender in ready.values():
            contender.start(weights, False)
        times = _clock.in_turns(
            {name: contender.step for name, contender in ready.items()},
            seconds=settings["growth_seconds"],
        )
        rows += [
            {"width": width, "name": name, **_clock.summary(times[name])}
            | {"ratio": round(_clock.ratio(times[name], times["Flax linen"]), 3)}
            | {"compile_s": ready[name].facts["compile_s"]}
            for name in times
        ]
        tick((index + 1) / len(settings["widths"]))
    yield "width", {"title": "width", "rows": rows}
