"""How precise sigma is: on weights that stand still, on weights that move, and in low precision.

Everything is compared with the float64 SVD of the same weight, as it is stored.

    python -m benchmarks precision              two minutes on one quiet core
    python -m benchmarks precision --only page  only the page, from stored results
    python -m benchmarks precision --smoke      a few seconds, writes into out/

Writes `benchmarks/results/precision.json` and the tables of `docs/precision.md`.
"""

from __future__ import annotations

from typing import Any

from benchmarks import _report
from benchmarks._program import Program

Row = dict[str, Any]

FULL = {
    "size": 512,
    "blocks": (1, 8, 32),
    "after": (0, 1, 10, 100),
    "n_steps": (1, 2, 4, 8),
    "moves": 48,
}
SMOKE = {"size": 32, "blocks": (1, 8), "after": (0, 1), "n_steps": (1,), "moves": 8}


# --- in a process of its own, on one core ------------------------------------------------------


def measure_still(settings: dict[str, Any]) -> list[Row]:
    """How far sigma is below the truth, some steps after `init`, on weights of known spectrum."""
    import jax
    import numpy as np

    import jsn

    rows = []
    for kind, W in _matrices(settings["size"]).items():
        exact = np.linalg.svd(W.astype(np.float64), compute_uv=False)[0]
        params = {"kernel": W}
        for block in settings["blocks"]:
            state, done, errors = jsn.init(params, block_size=block), 0, []
            step = jax.jit(lambda params, state: jsn.normalize(params, state)[1])
            for after in settings["after"]:
                for _ in range(after - done):
                    state = step(params, state)
                done = after
                sigma = jsn.sigmas(params, state)["kernel"]
                errors.append(float(1 - sigma / exact))
            rows.append({"matrix": kind, "block": block, "errors": errors})
    return rows


def _matrices(n: int) -> dict[str, Any]:
    """float32 matrices whose leading singular values lie close together, or not."""
    import numpy as np

    rng = np.random.default_rng(n)
    left, right = (np.linalg.qr(rng.standard_normal((n, n)))[0] for _ in range(2))
    index = np.arange(n)
    made = {
        "Gaussian": rng.standard_normal((n, n)),
        "Gaussian, tall": rng.standard_normal((4 * n, n // 4)),
        "falling like 1/k": (left / (index + 1)) @ right,
        "ten within 1 per cent": (left * np.where(index < 10, 1 - index / 1000, 0.5)) @ right,
        "orthogonal": left,
    }
    return {kind: W.astype(np.float32) for kind, W in made.items()}


def measure_moving(settings: dict[str, Any]) -> list[Row]:
    """The worst true norm of what is handed out, while the raw weights move as in training."""
    import jax

    import jsn
    from benchmarks._cases import Case, trajectory, true_norms, worst_norm

    n = settings["size"]
    case = Case("one layer of a transformer", ((n, n), (n, 4 * n), (4 * n, n)))
    options = [(block, steps) for block in settings["blocks"] for steps in settings["n_steps"]]
    way = trajectory(case, settings["moves"])
    first = {name: W.copy() for name, W in next(way).items()}
    rules = [("", jsn.Matrix())]
    states = {key: jsn.init(first, rules=rules, block_size=key[0]) for key in options}
    call = jax.jit(jsn.normalize, static_argnames="n_steps")
    worst = dict.fromkeys(options, 0.0)
    for index, raw in enumerate(way):
        late = index >= settings["moves"] // 2 and index % 4 == 0
        norms = true_norms(case, raw) if late else {}
        for key in options:
            handed, states[key] = call(raw, states[key], n_steps=key[1])
            if late:
                worst[key] = max(worst[key], worst_norm(case, raw, norms, handed))
    return [
        {"block": block, "n_steps": steps, "worst": worst[block, steps]} for block, steps in options
    ]


def measure_dtypes(settings: dict[str, Any]) -> list[Row]:
    """The true norm of a normalized weight in its own dtype, beside what rounding alone does."""
    import jax.numpy as jnp
    import numpy as np

    import jsn

    norm = lambda W: float(np.linalg.norm(np.asarray(W, np.float64), 2))
    rows = []
    for kind, W in _matrices(settings["size"]).items():
        for dtype in ("float32", "bfloat16", "float16"):
            params = {"kernel": jnp.asarray(W, dtype)}
            found = jsn.fold(params, jsn.init(params), n_steps=100)["kernel"]
            exact = np.asarray(params["kernel"], np.float64) / norm(params["kernel"])
            rounded = jnp.asarray(exact, jnp.float32).astype(dtype)
            rows.append(
                {
                    "matrix": kind,
                    "dtype": dtype,
                    "error": norm(found) - 1,
                    "rounding": norm(rounded) - 1,
                }
            )
    return rows


# --- the page ------------------------------------------------------------------------------------


def parts(result: dict[str, Any]) -> dict[str, str]:
    """The tables of the page."""
    after = result["still"]["settings"]["after"]
    head = ["matrix", "block", *["after `init`" if n == 0 else f"+ {n}" for n in after]]
    still = _report.table(
        head,
        [
            [row["matrix"], str(row["block"]), *[f"{error:.1e}" for error in row["errors"]]]
            for row in result["still"]["rows"]
        ],
    )
    rows = {(row["block"], row["n_steps"]): row["worst"] for row in result["moving"]["rows"]}
    steps = result["moving"]["settings"]["n_steps"]
    moving = _report.table(
        ["block", *[f"`n_steps={n}`" for n in steps]],
        [
            [str(block), *[f"{rows[block, n]:.4f}" for n in steps]]
            for block in result["moving"]["settings"]["blocks"]
        ],
    )
    dtypes = _report.table(
        ["matrix", "dtype", "jsn", "rounding alone"],
        [
            [row["matrix"], row["dtype"], f"{row['error']:+.1e}", f"{row['rounding']:+.1e}"]
            for row in result["dtypes"]["rows"]
        ],
    )
    return {"still": still, "moving": moving, "dtypes": dtypes}


def main(argv: list[str]) -> None:
    Program(
        name="precision",
        doc=__doc__ or "",
        page="precision.md",
        measures={"still": measure_still, "moving": measure_moving, "dtypes": measure_dtypes},
        parts=parts,
        full=FULL,
        smoke=SMOKE,
        smoke_help="a few seconds, to see that it runs",
    ).main(argv)


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
