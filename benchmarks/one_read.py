"""Whether reading a large weight once, row block by row block, beats reading it twice.

A step needs `v = W u` and `z = W^T v`: two reads of `W`. With a block of rows in the cache both
products can be done at once, `z` as a running sum: one read. What that gains depends on how far
the time is that of memory, not of arithmetic: on the number of vectors.

    python -m benchmarks one_read              a minute, wants a quiet machine
    python -m benchmarks one_read --only page  only the page, from stored results
    python -m benchmarks one_read --smoke      seconds, writes into out/

Writes `benchmarks/results/one_read.json` and a table of `docs/speed.md`. jsn keeps the form that
reads twice unless the other one is at least 1.3 times faster.
"""

from __future__ import annotations

import functools
import statistics
import time
from typing import Any

from benchmarks import _report
from benchmarks._program import Program

FULL = {"size": 4096, "vectors": (1, 8, 32), "rows": (64, 256, 1024), "rounds": 30}
SMOKE = {"size": 128, "vectors": (1, 8), "rows": (32,), "rounds": 3}


# --- in a process of its own, on one core ------------------------------------------------------


def measure(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each number of vectors: the median time of each form, in turns."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    n, rng = settings["size"], np.random.default_rng(0)
    W = jnp.asarray(rng.standard_normal((n, n), np.float32))

    @jax.jit
    def twice(W, u):
        v = W @ u
        return v, W.T @ v

    @functools.partial(jax.jit, static_argnums=2)
    def once(W, u, rows):
        def one_block(z, W):
            v = W @ u
            return z + W.T @ v, v

        z, v = jax.lax.scan(one_block, jnp.zeros_like(u), W.reshape(-1, rows, n))
        return v.reshape(u.shape), z

    found = []
    for vectors in settings["vectors"]:
        u = jnp.asarray(rng.standard_normal((n, vectors), np.float32))
        forms = {"twice": functools.partial(twice, W, u)}
        forms |= {rows: functools.partial(once, W, u, rows) for rows in settings["rows"]}
        expected = jax.block_until_ready(forms["twice"]())
        for form in forms.values():
            for x, y in zip(form(), expected, strict=True):
                np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-3 * float(jnp.abs(y).max()))
        seconds: dict[Any, list[float]] = {name: [] for name in forms}
        for _ in range(settings["rounds"]):
            for name, form in forms.items():
                begin = time.perf_counter()
                jax.block_until_ready(form())
                seconds[name].append(time.perf_counter() - begin)
        medians = {name: statistics.median(times) for name, times in seconds.items()}
        found.append(
            {"vectors": vectors, "twice_ms": round(1e3 * medians["twice"], 3)}
            | {
                f"once_{rows}": round(medians["twice"] / medians[rows], 3)
                for rows in settings["rows"]
            }
        )
    return found


# --- the page ----------------------------------------------------------------------------------


def parts(result: dict[str, Any]) -> dict[str, str]:
    """How many times faster one read is."""
    part = result["one_read"]
    rows = part["settings"]["rows"]
    head = ["vectors", "twice, ms", *[f"once, {n} rows at a time" for n in rows]]
    cells = [
        [
            str(row["vectors"]),
            f"{row['twice_ms']:.1f}",
            *[f"{row[f'once_{n}']:.2f} ×" for n in rows],
        ]
        for row in part["rows"]
    ]
    return {"table": _report.table(head, cells)}


def main(argv: list[str]) -> None:
    Program(
        name="one_read",
        doc=__doc__ or "",
        page="speed.md",
        measures={"one_read": measure},
        parts=parts,
        full=FULL,
        smoke=SMOKE,
        smoke_help="seconds, to see that it runs",
    ).main(argv)


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
