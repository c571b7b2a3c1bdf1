"""How things are timed: in turns within one process, which has the machine to itself.

In: functions without arguments. Out: seconds of each, and what the compiler says about them. Must
not know what they compute.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from unittest import mock

Row = dict[str, Any]

KEEP_MEMORY = {
    "GLIBC_TUNABLES": "glibc.malloc.arena_max=1:glibc.malloc.mmap_max=0:glibc.malloc.hugetlb=1:"
    "glibc.malloc.trim_threshold=68719476736:glibc.malloc.top_pad=268435456"
}
"""Freed memory stays with the process. Fresh pages cost as much as reading a weight, and which of
several libraries gets them would be chance. (A C library other than glibc does not read this.)"""


def in_turns(
    calls: Mapping[str, Callable[[], Any]],
    *,
    seconds: float,
    most: int = 200,
    tick: Callable[[float], None] = lambda done: None,
) -> dict[str, list[float]]:
    """Times every function once for each round, until the time is used up.

    Whatever disturbs the machine disturbs all of them. What ran before may have emptied the
    caches, so each is called once before it is timed. Two rounds that do not count come first: in
    them the process takes the memory that it keeps. Runs at least three that do.

    Args:
        calls: Functions that return when their work is done.
        seconds: When to stop beginning new rounds.
        most: Rounds at most.
        tick: Is told which part of the rounds is done.

    Returns:
        Seconds for each round, by name.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in [*calls.values()] * 2:
        call()
        call()
    start = time.perf_counter()
    for index in range(most):
        for name, call in calls.items():
            call()
            begin = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - begin)
        used = (time.perf_counter() - start) / seconds
        tick(min(1.0, max(used, (index + 1) / most)))
        if index >= 2 and used >= 1:
            break
    return times


def summary(times: list[float]) -> Row:
    """Milliseconds: the median, and the tenth percentile as the time of an undisturbed call."""
    return {
        "ms_median": round(statistics.median(times) * 1e3, 4),
        "ms_p10": round(statistics.quantiles(times, n=10, method="inclusive")[0] * 1e3, 4),
        "rounds": len(times),
    }


def ratio(times: list[float], others: list[float]) -> float:
    """The median of the ratios of the rounds: what slows a whole round down cancels."""
    return statistics.median(a / b for a, b in zip(times, others, strict=True))


def typical(runs: Sequence[Row]) -> Row:
    """One measurement of several: the medians of its numbers, and the range of the ratios."""
    rows = []
    for same in zip(*(run["rows"] for run in runs), strict=True):
        numbers = [key for key, value in same[0].items() if isinstance(value, float)]
        medians = {key: statistics.median(row[key] for row in same) for key in numbers}
        ratios = [row["ratio"] for row in same]
        rows.append(same[0] | medians | {"ratios": [min(ratios), max(ratios)]})
    return runs[0] | {"processes": len(runs), "rows": rows}


def compile_timed(function: Callable, *args: Any) -> tuple[Any, float]:
    """The compiled function, and the seconds that tracing, lowering and compiling took."""
    import jax

    begin = time.perf_counter()
    compiled = jax.jit(function).lower(*args).compile()
    return compiled, time.perf_counter() - begin


def analysis(compiled: Any) -> Row:
    """Bytes that a compiled function touches, and needs beside its arguments and results."""
    cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
    cost = cost[0] if isinstance(cost, list) else cost
    return {"bytes": cost["bytes accessed"], "temporary": memory.temp_size_in_bytes}


def use_one_core() -> None:
    """Keeps this process to one core, where the system can do that; to be called before JAX starts.

    Flags that ask for one thread do not reach all of XLA:CPU's libraries. And networks as small as
    those of the examples lose more by handing work between threads than they gain.
    """
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[os.getpid() % len(cores)]})


def run_apart(function: Callable[..., Any], *args: Any, tick: Callable[[float], None]) -> Any:
    """Yields what the generator `function(*args, tick)` yields, in a fresh process, on one core.

    The process keeps its memory (`KEEP_MEMORY`).

    Raises:
        RuntimeError: If the process ends too early.
    """
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe(duplex=False)
    process = spawn.Process(target=_report_to, args=(there, function, args), daemon=False)
    with mock.patch.dict(os.environ, KEEP_MEMORY):
        process.start()
    there.close()
    try:
        while (message := here.recv())[0] != "end":
            kind, value = message
            if kind == "result":
                yield value
            else:
                tick(value)
        process.join()
    except EOFError:
        process.join()
        raise RuntimeError(f"{function.__name__} ended with {process.exitcode}") from None
    finally:
        process.terminate()


def _report_to(pipe: Any, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    use_one_core()
    for result in function(*args, lambda done: pipe.send(("progress", done))):
        pipe.send(("result", result))
    pipe.send(("end", None))
