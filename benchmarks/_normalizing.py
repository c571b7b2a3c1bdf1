"""Parts `small`, ..., `scanned` and `equal`: normalizing alone, and how true it is.

In: the name of a case. Out: one row for each contender. Runs in a process of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from benchmarks import _clock
from benchmarks._cases import CASES, SMOKE_CASES, Case, trajectory, true_norms, worst_norm
from benchmarks._clock import Row
from benchmarks._contenders import Contender, copy, flax_linen, nothing, ours, products, tracking
from benchmarks._peers import PEERS

MOMENTS = 4
"""Steps at which norms are taken, spread over the second half of the way."""

Tick = Callable[[float], None]


def contenders() -> dict[str, Callable[[], Contender]]:
    """The rows of every case, in order; `Flax linen` is what the others are compared with."""
    return {
        "copy of the weights": copy,
        "no normalization": nothing,
        "jsn, block 1": lambda: ours(block_size=1),
        "jsn, block 8": lambda: ours(block_size=8),
        "jsn, block 16": lambda: ours(block_size=16),
        "jsn, default": ours,
        "only the products of block 8": lambda: products(block_size=8),
        "only the products of the default": products,
        "and what keeps its block": tracking,
        "Flax linen": flax_linen,
        **PEERS,
    }


def measure_cases(
    names: Sequence[str], settings: dict[str, Any], tick: Tick
) -> Iterator[tuple[str, Row]]:
    """Every library on the weights of each case."""
    makers = contenders()
    makers = {name: make for name, make in makers.items() if name not in settings["without"]}
    cases = SMOKE_CASES if settings["smoke"] else CASES
    _warm_up({} if settings["smoke"] else makers)
    for index, name in enumerate(names):
        jax.clear_caches()
        yield (
            name,
            _measure(
                cases[name], makers, settings, lambda done, n=index: tick((n + done) / len(names))
            ),
        )


def measure_equal(
    names: Sequence[str], settings: dict[str, Any], tick: Tick
) -> Iterator[tuple[str, Row]]:
    """What one vector costs, with as many steps as it takes to be as true as the default."""
    case = SMOKE_CASES["small"] if settings["smoke"] else CASES["vit_ti"]
    one = lambda n: lambda: ours(n, block_size=1)
    rows = {"jsn, default": ours, "Flax linen": flax_linen}
    rows |= {f"one vector, {n} steps": one(n) for n in settings["equal_steps"]}
    yield "equal", _measure(case, rows, settings, tick)


def _measure(
    case: Case, makers: dict[str, Callable[[], Contender]], settings: dict[str, Any], tick: Tick
) -> Row:
    ready, rows = {}, {}
    way = trajectory(case, settings["steps"])
    weights = next(way)
    for index, (name, make) in enumerate(makers.items()):
        rows[name] = {"name": name}
        contender = _or_reason(make(), weights, case, rows[name])
        if contender is not None:
            ready[name] = contender
            rows[name] |= contender.facts
        tick(0.5 * (index + 1) / len(makers))
    _follow(case, way, ready, rows, settings["steps"], lambda done: tick(0.5 + 0.2 * done))
    times = _clock.in_turns(
        {name: contender.step for name, contender in ready.items()},
        seconds=settings["seconds"],
        tick=lambda done: tick(0.7 + 0.3 * done),
    )
    for name in ready:
        rows[name] |= _clock.summary(times[name])
        rows[name]["ratio"] = round(_clock.ratio(times[name], times["Flax linen"]), 3)
        if "copy of the weights" in times:
            floor = times["copy of the weights"]
            rows[name]["ratio_copy"] = round(_clock.ratio(times[name], floor), 3)
    return {
        "title": case.title,
        "weights": sum(shape[0] if case.stacked else 1 for shape in case.shapes),
        "parameter_bytes": sum(W.nbytes for W in weights.values()),
        "rows": list(rows.values()),
    }


def _warm_up(makers: dict[str, Callable[[], Contender]]) -> None:
    """Imports and first uses, which the first compilation would pay for: on a tiny tree."""
    tiny = SMOKE_CASES["small"]
    for make in makers.values():
        _or_reason(make(), next(trajectory(tiny, 0)), tiny, {})


def _or_reason(contender: Contender, weights: Any, case: Case, row: Row) -> Contender | None:
    """A contender that has started; or none, and the reason in its row."""
    try:
        contender.start(weights, case.stacked)
    except ModuleNotFoundError as error:
        row["missing"] = "not installed"
        row["module"] = error.name
        return None
    except Exception as error:  # another library's failure is a result, jsn's is not
        if "jsn" in row.get("name", "jsn"):
            raise
        row["missing"] = f"fails: {type(error).__name__}"
        print(row["name"], error, file=sys.stderr)
        return None
    return contender


def _follow(
    case: Case,
    way: Any,
    ready: dict[str, Contender],
    rows: dict[str, Row],
    steps: int,
    tick: Tick,
) -> None:
    """All contenders along the same way, and their worst layer at some moments of it."""
    moments = {steps - index * (steps // (2 * MOMENTS)) for index in range(MOMENTS)}
    worst: dict[str, list[float]] = {name: [] for name in ready}
    for step, weights in enumerate(way, start=1):
        for contender in ready.values():
            contender.load(weights)
            if step not in moments:
                contender.step()
        if step in moments:
            norms = true_norms(case, weights)
            for name, contender in ready.items():
                worst[name].append(worst_norm(case, weights, norms, contender.handed()))
        tick(step / steps)
    for name, values in worst.items():
        rows[name]["worst"] = round(max(values), 6)
