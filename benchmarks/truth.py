"""How true the norms are during training, for each block size and form, and at what cost.

Trains six tasks (`_tasks`) with each method (`_methods`) in the loop, three seeds each, and takes
the true norm of every weight *as the model used it*: the largest singular value, in float64, of
what normalization handed to the forward pass. It should be 1. What counts is the worst layer: its
median and its maximum over steps 56, 64, ... 400. The cost is that of normalizing alone, timed in
turns with Flax's own arithmetic on the same weights.

    python -m benchmarks truth                 everything: about 20 minutes on two quiet cores
    python -m benchmarks truth --only cost     only the clock: wants a quiet machine
    python -m benchmarks truth --only page     only the page and its picture, from stored results
    python -m benchmarks truth --smoke         a minute, writes into out/

Writes `benchmarks/results/truth.json`, the tables of `docs/which.md`, and `docs/img/truth.png`.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks import _clock, _report

BLOCKS = (1, 4, 8, 12, 16, 24, 32)
FLAX_STEPS = (1, 5, 15)
METHODS = (
    *(("flax", n) for n in FLAX_STEPS),
    *(("lobpcg", n) for n in BLOCKS),
    *(("subspace", n) for n in BLOCKS if n > 1),  # one vector is the same in all forms
    ("thirds", 32),  # up to 24 the same as lobpcg
)
TASKS = ("digits", "digits_20", "codes", "autoencoder", "critic", "teacher")
SHAPES = {"digits_20": "digits", "teacher": "codes"}
"""Tasks whose weights have the shapes of another task's: these are timed once."""

FULL = {
    "tasks": TASKS,
    "methods": METHODS,
    "seeds": 3,
    "steps": 400,
    "first": 50,
    "every": 8,
    "rounds": 200,
}
SMOKE = {
    "tasks": ("digits", "critic", "teacher"),
    "methods": (("flax", 1), ("lobpcg", 32), ("subspace", 8)),
    "seeds": 1,
    "steps": 32,
    "first": 16,
    "every": 8,
    "rounds": 5,
}

Row = dict[str, Any]


# --- in the worker processes: jax is imported here, with one thread ---------------------------


def measure_truth(task_name: str, form: str, size: int, settings: dict[str, Any]) -> list[Row]:
    """Trains one task with one method, for each seed; compiles once for all of them."""
    from benchmarks._methods import Method, form_of
    from benchmarks._tasks import TASKS as tasks

    task, method = tasks[task_name], Method(form, size)
    step = _training_step(task, method)
    with form_of(method):
        return [
            {"task": task_name, "form": form, "size": size, "seed": seed}
            | _train(task, method, step, seed, settings)
            for seed in range(settings["seeds"])
        ]


def _training_step(task: Any, method: Any) -> Callable:
    """A jitted step, which also hands out the normalized weights it used.

    A loop around the step would not do: inside one, XLA:CPU runs convolutions ten times slower.
    """
    import jax
    import optax

    @jax.jit
    def step(carry, key, data):
        trained, state, opt_state = carry
        rows_key, loss_key = jax.random.split(key)
        rows = jax.random.randint(rows_key, (task.batch_size,), 0, len(data["x"]))
        batch = jax.tree.map(lambda x: x[rows], data)

        def loss(trained):
            params, extra = trained
            normalized, new_state = method.normalize(params, state)
            return task.loss(normalized, extra, batch, loss_key), (normalized, new_state)

        gradient, (normalized, state) = jax.grad(loss, has_aux=True)(trained)
        updates, opt_state = task.optimizer.update(gradient, opt_state)
        return (optax.apply_updates(trained, updates), state, opt_state), normalized

    return step


def _train(task: Any, method: Any, step: Callable, seed: int, settings: dict[str, Any]) -> Row:
    import jax
    import numpy as np

    start = task.start(seed)
    trained = (start.params, start.extra)
    carry = trained, jax.jit(method.init)(start.params, seed), task.optimizer.init(trained)
    data = jax.device_put(start.data)
    keys = jax.random.split(jax.random.key(1000 + seed), settings["steps"])
    norms = []
    for index, key in enumerate(keys, start=1):
        carry, normalized = step(carry, key, data)
        if index >= settings["first"] and index % settings["every"] == 0:
            norms.append(_true_norms(normalized))
    worst = [max(layers.values()) for layers in norms]
    return {
        "median": float(np.median(worst)),
        "max": max(worst),
        "layers": {path: round(max(layers[path] for layers in norms), 6) for path in norms[0]},
    }


def _true_norms(normalized: Any) -> dict[str, float]:
    """The largest singular value of every kernel, from its smaller Gram matrix in float64."""
    import numpy as np
    import scipy.linalg
    from flax import traverse_util

    norms = {}
    for path, kernel in traverse_util.flatten_dict(normalized, sep="/").items():
        if kernel.ndim > 1:
            matrix = np.asarray(kernel, np.float64).reshape(-1, kernel.shape[-1])
            gram = matrix.T @ matrix if matrix.shape[0] > matrix.shape[1] else matrix @ matrix.T
            last = len(gram) - 1
            top = scipy.linalg.eigh(gram, eigvals_only=True, subset_by_index=[last, last])
            norms[path] = float(np.sqrt(top[0]))
    return norms


def measure_cost(task_name: str, settings: dict[str, Any]) -> list[Row]:
    """Times normalizing alone, all methods in turns, and counts the bytes it touches."""
    _clock.use_one_core()
    import jax

    from benchmarks._methods import Method, form_of
    from benchmarks._tasks import TASKS as tasks

    params = jax.device_put(tasks[task_name].start(0).params)
    compiled = {}
    for form, size in settings["methods"]:
        method = Method(form, size)
        with form_of(method):
            state = jax.jit(method.init)(params, 0)
            call = jax.jit(method.normalize).lower(params, state).compile()
        compiled[form, size] = call, state
    seconds: dict[tuple[str, int], list[float]] = {key: [] for key in compiled}
    for _ in range(settings["rounds"]):
        for key, (call, state) in compiled.items():
            jax.block_until_ready(call(params, state))  # what ran before may have emptied caches
            begin = time.perf_counter()
            for _ in range(3):
                jax.block_until_ready(call(params, state))
            seconds[key].append((time.perf_counter() - begin) / 3)
    ones = ("flax", 1)
    return [
        {
            "task": task_name,
            "form": form,
            "size": size,
            "ms_median": round(statistics.median(seconds[form, size]) * 1e3, 4),
            "ms_undisturbed": round(_undisturbed(seconds[form, size]) * 1e3, 4),
            "ratio_of_medians": round(
                statistics.median(seconds[form, size]) / statistics.median(seconds[ones]), 3
            ),
            "time_ratio": round(_undisturbed(seconds[form, size]) / _undisturbed(seconds[ones]), 3),
            "bytes_ratio": round(_bytes(call) / _bytes(compiled[ones][0]), 3),
        }
        for (form, size), (call, _) in compiled.items()
    ]


def _undisturbed(times: list[float]) -> float:
    """The tenth percentile: on a quiet machine near the median, on a busy one much steadier."""
    return statistics.quantiles(times, n=10)[0]


def _bytes(compiled: Any) -> float:
    analysis = compiled.cost_analysis()
    return (analysis[0] if isinstance(analysis, list) else analysis)["bytes accessed"]


# --- in the parent process --------------------------------------------------------------------


def run_truth(settings: dict[str, Any], workers: int) -> list[Row]:
    """All tasks, methods and seeds, in worker processes; the slow task first."""
    order = sorted(settings["tasks"], key=lambda name: name != "critic")
    jobs = [(name, *method, settings) for name in order for method in settings["methods"]]
    rows = itertools.chain.from_iterable(_in_workers(measure_truth, jobs, workers, "training"))
    rank = lambda row: (
        TASKS.index(row["task"]),
        METHODS.index((row["form"], row["size"])),
        row["seed"],
    )
    return sorted(rows, key=rank)


def run_cost(settings: dict[str, Any]) -> list[Row]:
    """The clock wants the machine for itself: one process, one task after the other."""
    shapes = dict.fromkeys(SHAPES.get(name, name) for name in settings["tasks"])
    jobs = [(name, settings) for name in shapes]
    rows = itertools.chain.from_iterable(_in_workers(measure_cost, jobs, 1, "timing"))
    return sorted(rows, key=lambda row: TASKS.index(row["task"]))


def _in_workers(
    function: Callable, jobs: list[tuple], workers: int, what: str
) -> Iterable[list[Row]]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.progress import TimeRemainingColumn as Remaining

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    spawn = multiprocessing.get_context("spawn")
    with (
        Progress(*columns, TimeElapsedColumn(), Remaining()) as progress,
        concurrent.futures.ProcessPoolExecutor(workers, mp_context=spawn) as pool,
    ):
        bar = progress.add_task(what, total=len(jobs))
        futures = [pool.submit(function, *job) for job in jobs]
        try:
            for future in concurrent.futures.as_completed(futures):
                yield future.result()
                progress.advance(bar)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks truth",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--smoke", action="store_true", help="a minute, to see that it runs")
    parser.add_argument("--only", choices=("truth", "cost", "page"), help="one part of it")
    parser.add_argument("--workers", type=int, default=2, help="processes that train (default 2)")
    args = parser.parse_args(argv)

    settings = SMOKE if args.smoke else FULL
    folder = _report.ROOT / "out" if args.smoke else _report.ROOT
    stored = folder / ("truth.json" if args.smoke else "benchmarks/results/truth.json")
    result = _report.read_json(stored)
    parts = (args.only,) if args.only else ("truth", "cost")
    used = {name: settings[name] for name in ("seeds", "steps", "first", "every", "rounds")}
    os.environ.update(_report.ONE_THREAD)
    for part in [part for part in parts if part != "page"]:
        made = _report.circumstances()
        rows = run_truth(settings, args.workers) if part == "truth" else run_cost(settings)
        result[part] = {"made": made, "settings": used, "rows": rows}
        _report.write_json(stored, result)
    _show(result, folder)


def _show(result: dict[str, Any], folder: Path) -> None:
    from benchmarks import _truth_page

    _truth_page.write(result, folder)


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
