"""What a step costs on many devices: formulas, checked against compiled programs, then evaluated.

For a weight of `m` inputs and `n` outputs, sharded `p` ways on its inputs and `q` ways on its
outputs, with a block of `b` vectors, `t` of which take the second read. Everything is for one
device. Programs are compiled for 1, 2, 4 and 8 virtual CPU devices; nothing is timed.

    python -m benchmarks scaling              a minute on one quiet core
    python -m benchmarks scaling --only page  only the page, from stored results
    python -m benchmarks scaling --smoke      seconds, writes into out/

Writes `benchmarks/results/scaling.json` and the tables of `docs/scaling.md`.
"""

from __future__ import annotations

import os
from typing import Any

from benchmarks import _report
from benchmarks._program import Program

Row = dict[str, Any]

FULL: Row = {"shape": (2048, 4096), "block": 32, "devices": (1, 2, 4, 8)}
SMOKE: Row = {"shape": (256, 512), "block": 8, "devices": (8,)}
LAYOUTS = {
    "inputs": lambda devices: (devices, 1),
    "outputs": lambda devices: (1, devices),
    "both": lambda devices: (devices // 2, 2),
}
MODELS = {
    # width, width of keys and values, width of the MLP, layers
    "7B": (4096, 4096, 11008, 32),
    "70B": (8192, 1024, 28672, 80),
}
FLEETS = (8, 64, 512, 4096)
TENSOR = 8
"""Devices of tensor parallelism; the others do FSDP."""
TOKENS = 4_000_000
FLOAT = 4


# --- formulas -------------------------------------------------------------------------------------


def predicted(m: int, n: int, p: int, q: int, b: int) -> Row:
    """What one weight costs one device in one step.

    Returns:
        `flops_W`: two reads, and the division. `flops_thin`: Gram matrices and combinations of
        blocks. `flops_small`: what has the size of a block squared, for blocks of more than 16
        vectors, without factorizations, which compilers do not count. `bytes_W`: three reads and
        one write of W. `bytes_thin`: of blocks and what is smaller. `sent_in`, `sent_out`: reduced
        along the axis of the inputs and of the outputs. `state`: bytes kept.

    Compilers count a branch in which blocks are scaled and measured once more, with `b^2` sent. It
    hardly ever runs: where the scale of a weight is so far from 1 that squares would be lost.

    What is proportional to `b` alone, and every number of `bytes_thin`, depends on how operations
    are fused, and is read off programs of XLA:CPU.
    """
    from jsn._block import shares

    ritz, t, _ = shares(b)
    ins, outs, f = m / p, n / q, b - ritz  # t vectors are read with, f are added
    return {
        "flops_W": (2 * b + 2 * t + 1) * ins * outs,
        "flops_thin": (6 * b * b + 2 * b * t + 2 * t * t) * ins
        + (6 * b * b + 4 * f * f + 4 * t * t + 2 * f * t + 20 * b) * outs,
        "flops_small": 27 * b**3,
        "bytes_W": 4 * FLOAT * ins * outs,
        "bytes_thin": FLOAT * b * (9 * ins + 17 * outs + 270 * b),
        "sent_in": FLOAT * (t * outs + 2 * b * b) * (p > 1),
        "sent_out": FLOAT * (b * ins + b * b + f * f + t * t) * (q > 1),
        "state": FLOAT * b * outs,
    }


def weights_of(model: str) -> list[tuple[int, int, bool]]:
    """The weights of one layer of a Llama model: inputs, outputs, and whether outputs are split.

    Tensor parallelism splits the outputs of queries, keys, values, gate and up, and the inputs of
    the two projections back.
    """
    d, kv, f, _ = MODELS[model]
    return [*((d, outs, True) for outs in (d, kv, kv, f, f)), (d, d, False), (f, d, False)]


def planned(model: str, devices: int, b: int) -> Row:
    """A whole model on so many devices: tensor parallel over eight, FSDP over the rest."""
    fsdp, layers = devices // TENSOR, MODELS[model][-1]
    row: Row = dict.fromkeys(("flops", "small", "bytes", "model_axis", "data_axis", "state"), 0.0)
    parameters = 0
    for m, n, split_outputs in weights_of(model):
        p, q = (fsdp, TENSOR) if split_outputs else (TENSOR, fsdp)
        cost = predicted(m, n, p, q, b)
        ins, outs = ("data_axis", "model_axis") if split_outputs else ("model_axis", "data_axis")
        row["flops"] += layers * (cost["flops_W"] + cost["flops_thin"])
        row["small"] += layers * cost["flops_small"]
        row["bytes"] += layers * (cost["bytes_W"] + cost["bytes_thin"])
        row["state"] += layers * cost["state"]
        row[ins] += layers * cost["sent_in"]
        row[outs] += layers * cost["sent_out"]
        parameters += layers * m * n
    training = 6 * parameters * TOKENS / devices
    gathered = 3 * FLOAT * parameters / TENSOR  # forward, backward, and the gradient's reduction
    return {
        "model": model,
        "devices": devices,
        "parameters": parameters,
        **row,
        "share_flops": (row["flops"] + row["small"]) / training,
        "share_sent": row["data_axis"] / gathered,
    }


# --- compiled programs ----------------------------------------------------------------------------


def measure_compiled(settings: Row) -> list[Row]:
    """All layouts on all numbers of devices; begins before JAX is imported."""
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    return [
        compiled(layout, devices, settings)
        for devices in settings["devices"]
        for layout in LAYOUTS
        if devices > 1 or layout == "inputs"
        if devices > 2 or layout != "both"
    ]


def compiled(layout: str, devices: int, settings: Row) -> Row:
    """The compiler's own account of a step, for one weight, beside the formulas."""
    import functools

    import jax
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    import jsn
    from benchmarks import _hlo

    m, n = settings["shape"]
    b = settings["block"]
    p, q = LAYOUTS[layout](devices)
    mesh = jax.make_mesh(
        (p, q), ("in", "out"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:devices]
    )
    sharding = {"kernel": NamedSharding(mesh, PartitionSpec("in", "out"))}
    params = {"kernel": jax.ShapeDtypeStruct((m, n), "float32", sharding=sharding["kernel"])}
    state = jax.eval_shape(functools.partial(jsn.init, block_size=b), params)
    where = (sharding, jsn.state_sharding(sharding, params, state))
    step = jax.jit(jsn.normalize, in_shardings=where, out_shardings=where)
    program = step.lower(params, state).compile()
    cost: Any = program.cost_analysis()
    found = _hlo.collectives(program.as_text() or "")
    sent = {
        f"sent_{axis}": sum(sum(c.sizes) for c in found if axis in c.axes(mesh))
        for axis in ("in", "out")
    }
    return {
        "layout": layout,
        "devices": devices,
        "collectives": sorted({collective.kind for collective in found}),
        "flops": cost["flops"],
        "bytes": cost["bytes accessed"],
        **sent,
        "formulas": predicted(m, n, p, q, b),
    }


# --- the page -------------------------------------------------------------------------------------


def _pair(row: Row, unit: float, measured: str, *formulas: str) -> str:
    formula = sum(row["formulas"][name] for name in formulas)
    return f"{row[measured] / unit:.1f} / {formula / unit:.1f}"


def _checked(result: Row) -> str:
    rows = [
        [
            f"{row['devices']}, {row['layout']}" if row["devices"] > 1 else "1",
            _pair(row, 1e6, "flops", "flops_W", "flops_thin", "flops_small"),
            _pair(row, 2**20, "bytes", "bytes_W", "bytes_thin"),
            _pair(row, 2**10, "sent_in", "sent_in"),
            _pair(row, 2**10, "sent_out", "sent_out"),
        ]
        for row in result["compiled"]["rows"]
    ]
    head = ["devices, sharded axis", "Mflop", "MiB", "KiB sent, inputs", "KiB sent, outputs"]
    made, settings = result["compiled"]["made"], result["compiled"]["settings"]
    m, n = settings["shape"]
    what = f"A float32 weight of {m} × {n}, a block of {settings['block']}; each cell: compiled"
    where = f"/ formula. jax {made['versions']['jax']}, jsn `{made['jsn']}`, {made['date'][:10]}."
    return f"{_report.table(head, rows)}\n\n{what} {where}"


def _planned() -> str:
    plans = [planned(model, devices, 32) for model in MODELS for devices in FLEETS]
    rows = [
        [
            f"{row['model']}, {row['devices']}",
            f"{row['flops'] / 1e9:.1f}",
            f"{row['small'] / 1e9:.1f}",
            f"{row['share_flops']:.0e}",
            f"{row['bytes'] / 2**30:.2f}",
            f"{row['model_axis'] / 2**20:.0f}",
            f"{row['data_axis'] / 2**20:.0f}" if row["data_axis"] else "–",
            f"{100 * row['share_sent']:.1f} %" if row["data_axis"] else "–",
            f"{row['state'] / 2**20:.0f}",
        ]
        for row in plans
    ]
    head = ["model, devices", "Gflop", "small Gflop", "of a step's flops", "GiB"]
    head += ["MiB sent, model", "MiB sent, data", "of FSDP's bytes", "MiB state"]
    return _report.table(head, rows)


def parts(result: Row) -> dict[str, str]:
    """The tables of the page."""
    return {"checked": _checked(result), "planned": _planned()}


def main(argv: list[str]) -> None:
    Program(
        "scaling",
        __doc__ or "",
        "scaling.md",
        {"compiled": measure_compiled},
        parts,
        FULL,
        SMOKE,
        "seconds, writes into out/",
    ).main(argv)
