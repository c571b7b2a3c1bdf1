"""What normalizing costs on the device that is there: one command, unattended, under five minutes.

    python -m benchmarks accelerator          writes benchmarks/results/accelerator-PLATFORM.json
    python -m benchmarks accelerator --smoke  seconds, writes into out/

Each case is compiled and timed by itself: a copy of the weights (the floor: one read, one write),
`jsn.normalize` with one step, and `jsn.sigmas`. sigma is compared with a float64 SVD on the host. A
case that does not fit the device's memory, or the time that is left, is written down as missing.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Sequence
from typing import Any

from benchmarks import _report

SECONDS = 200
"""Nothing is begun later than this."""
CASES = {
    # name: shape, number of weights, dtype
    "2 of 64 × 64": ((64, 64), 2, "float32"),
    "64 of 64 × 64": ((64, 64), 64, "float32"),
    "24 of 768 × 768": ((768, 768), 24, "float32"),
    "12 of 768 × 3072, bfloat16": ((768, 3072), 12, "bfloat16"),
    "stack of 24 of 1024 × 1024": ((24, 1024, 1024), 1, "float32"),
    "2 of 4096 × 11008": ((4096, 11008), 2, "float32"),
    "2 of 8192 × 28672, bfloat16": ((8192, 28672), 2, "bfloat16"),
}
BLOCKS = (32, 8, 1)
LARGEST_ON_CPU = 2**24
"""Entries of all weights; larger cases are for accelerators."""
LARGEST_SVD = 2**20

Row = dict[str, Any]


def weights(shape: tuple[int, ...], count: int, dtype: str) -> dict[str, Any]:
    import jax

    keys = jax.random.split(jax.random.key(0), count)
    return {f"layer_{i}": jax.random.normal(key, shape, dtype) for i, key in enumerate(keys)}


def timed(function: Any, *args: Any, seconds: float = 2.0) -> Row:
    """Compiles and times a call; the arguments stay what they are."""
    import jax

    begin = time.perf_counter()
    compiled = jax.jit(function).lower(*args).compile()
    row: Row = {"compile_s": round(time.perf_counter() - begin, 3)}
    jax.block_until_ready(compiled(*args))
    times: list[float] = []
    while len(times) < 5 or (sum(times) < seconds and len(times) < 200):
        begin = time.perf_counter()
        jax.block_until_ready(compiled(*args))
        times.append(time.perf_counter() - begin)
    return row | {"ms_median": round(1e3 * statistics.median(times), 4), "rounds": len(times)}


def case(name: str, blocks: Sequence[int], seconds: float, end: float) -> Row:
    """One row: the times of each block size, and how true sigma is."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    import jsn

    shape, count, dtype = CASES[name]
    params = weights(shape, count, dtype)
    rules = [("", jsn.Matrix(batch_axis=tuple(range(len(shape) - 2))))]
    copy = lambda params: jax.tree.map(lambda x: x * jnp.asarray(1.5, x.dtype), params)
    row: Row = {"case": name, "copy": timed(copy, params, seconds=seconds)}
    for block in blocks:
        if time.perf_counter() > end:
            row[f"block {block}"] = {"missing": "no time left"}
            continue
        state = jsn.init(params, rules=rules, block_size=block)
        sigma = np.ravel(jsn.sigmas(params, state)["layer_0"])[0]
        found: Row = {
            "normalize": timed(jsn.normalize, params, state, seconds=seconds),
            "sigmas": timed(jsn.sigmas, params, state, seconds=seconds),
        }
        if np.prod(shape[-2:]) <= LARGEST_SVD:
            first = np.asarray(params["layer_0"], np.float64).reshape(-1, *shape[-2:])[0]
            found["sigma_error"] = float(sigma / np.linalg.norm(first, 2) - 1)
        row[f"block {block}"] = found
    return row


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks accelerator",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--smoke", action="store_true", help="one small case, into out/")
    args = parser.parse_args(argv)
    begin = time.perf_counter()
    names, blocks, seconds = list(CASES), BLOCKS, 2.0
    if args.smoke:
        names, blocks, seconds = names[:1], (8,), 0.1

    import jax

    device = jax.devices()[0]
    made = _report.circumstances() | {
        "platform": device.platform,
        "device": device.device_kind,
        "devices": jax.device_count(),
    }
    rows = []
    for name in names:
        shape, count, _ = CASES[name]
        if device.platform == "cpu" and count * math.prod(shape) > LARGEST_ON_CPU:
            rows.append({"case": name, "missing": "too large for a CPU"})
        elif time.perf_counter() > begin + SECONDS:
            rows.append({"case": name, "missing": "no time left"})
        else:
            try:
                rows.append(case(name, blocks, seconds, begin + SECONDS))
            except jax.errors.JaxRuntimeError as error:  # out of memory
                rows.append({"case": name, "missing": str(error).splitlines()[0]})
        print(name, rows[-1].get("missing", "measured"), flush=True)
    folder = _report.ROOT / "out" if args.smoke else _report.ROOT
    file = folder / "benchmarks" / "results" / f"accelerator-{device.platform}.json"
    made["seconds"] = round(time.perf_counter() - begin, 1)
    _report.write_json(file, {"made": made, "rows": rows})
    print(file)
