"""How close proven bounds are to the truth, and what they cost beside an SVD.

Matrices are compared with the float64 SVD of numpy, singular values only, timed in turns with
`jsn.upper_bound`; the best of several rounds counts for both. Convolutions are compared with the
largest singular value of the layer itself at 32 x 32, by Lanczos in float64.

    python -m benchmarks bounds              five minutes on one quiet core
    python -m benchmarks bounds --only page  only the page, from stored results
    python -m benchmarks bounds --smoke      a few seconds, writes into out/

Writes `benchmarks/results/bounds.json` and the tables of `docs/bounds.md`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from benchmarks import _report
from benchmarks._program import Program

FULL = {"sizes": (256, 1024, 2048), "rounds": 7, "channels": (16, 64), "spatial": 32}
SMOKE = {"sizes": (64,), "rounds": 2, "channels": (4,), "spatial": 8}

Row = dict[str, Any]


# --- in a process of its own, on one core ------------------------------------------------------


def measure_matrices(settings: dict[str, Any]) -> list[Row]:
    """One row for each kind and size of matrix."""
    import numpy as np

    import jsn

    rows = []
    for n in settings["sizes"]:
        for kind, W in _matrices(n).items():
            exact = np.linalg.svd(W.astype(np.float64), compute_uv=False)[0]
            times = _in_turns(
                settings["rounds"],
                lambda W=W: np.linalg.svd(W.astype(np.float64), compute_uv=False),
                lambda W=W: jsn.upper_bound(W),
                lambda W=W: jsn.upper_bound(W, method="gram"),
            )
            rows.append(
                {
                    "matrix": kind,
                    "shape": list(W.shape),
                    "cholesky": float(jsn.upper_bound(W) / exact - 1),
                    "gram": float(jsn.upper_bound(W, method="gram") / exact - 1),
                    "svd_ms": 1e3 * times[0],
                    "cholesky_ms": 1e3 * times[1],
                    "gram_ms": 1e3 * times[2],
                    "ratio": times[1] / times[0],
                }
            )
    return rows


def _matrices(n: int) -> dict[str, Any]:
    import numpy as np

    rng = np.random.default_rng(n)
    gaussian = rng.standard_normal((n, n))
    left, right = (np.linalg.qr(rng.standard_normal((n, n)))[0] for _ in range(2))
    decaying = (left * np.arange(1, n + 1) ** -0.7) @ right
    made = {
        "Gaussian": gaussian,
        "Gaussian, tall": gaussian[:, : n // 4],
        "decaying spectrum": decaying,
        "orthogonal": left,
    }
    return {kind: W.astype(np.float32) for kind, W in made.items()}


def measure_convolutions(settings: dict[str, Any]) -> list[Row]:
    """One row for each kind of convolution."""
    import jax

    jax.config.update("jax_enable_x64", True)
    import jsn

    rows = []
    for kind, K, options in _convolutions(settings):
        n = settings["spatial"]
        channels = K.shape[2] * options.get("feature_group_count", 1)
        operator = jsn.Conv((n, n, channels), **options)
        bound = jsn.upper_bound(K, operator=operator, method="symbol")
        (seconds,) = _in_turns(
            max(1, settings["rounds"] // 2),
            lambda K=K, o=operator: jsn.upper_bound(K, operator=o, method="symbol"),
        )
        reshaped = jsn.upper_bound(K, operator=operator, method="gram")
        norm = _lanczos(K, operator)
        rows.append(
            {
                "convolution": kind,
                "kernel": list(K.shape),
                "symbol": float(bound / norm),
                "gram": float(reshaped / norm),
                "symbol_ms": 1e3 * seconds,
            }
        )
    return rows


def _convolutions(settings: dict[str, Any]) -> list[tuple[str, Any, dict[str, Any]]]:
    import numpy as np

    rng = np.random.default_rng(0)
    blur = np.outer([1, 2, 1], [1, 2, 1])[:, :, None, None] / 16
    made = []
    for c in settings["channels"]:
        made.append(("3 × 3, Gaussian", rng.standard_normal((3, 3, c, c)), {}))
        made.append(("3 × 3, low pass", blur * rng.standard_normal((c, 2 * c)), {}))
    c = settings["channels"][0]
    identity = np.zeros((3, 3, c, c))
    identity[1, 1] = np.eye(c)
    made += [
        ("3 × 3, identity", identity, {}),
        ("3 × 3, all ones", np.ones((3, 3, 1, 1)), {}),
        ("3 × 3, stride 2", rng.standard_normal((3, 3, c, c)), {"strides": 2}),
        ("3 × 3, dilation 2", rng.standard_normal((3, 3, c, c)), {"kernel_dilation": 2}),
        ("3 × 3, circular", rng.standard_normal((3, 3, c, c)), {"padding": "CIRCULAR"}),
        ("3 × 3, depthwise", rng.standard_normal((3, 3, 1, 4 * c)), {"feature_group_count": 4 * c}),
        ("3 × 3, transposed, stride 2", rng.standard_normal((3, 3, c, c)),
         {"strides": 2, "transpose": True}),
        ("5 × 5, Gaussian", rng.standard_normal((5, 5, c, c)), {}),
        ("7 × 7, stride 2", rng.standard_normal((7, 7, 3, 4 * c)), {"strides": 2}),
        ("8 × 8 patches", rng.standard_normal((8, 8, 3, 4 * c)),
         {"strides": 8, "padding": "VALID"}),
    ]  # fmt: skip
    return [(kind, K.astype(np.float32), options) for kind, K, options in made]


def _lanczos(K: Any, operator: Any, steps: int = 120) -> float:
    """The largest singular value of a layer, in float64, with full reorthogonalization."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    K = jnp.asarray(K, jnp.float64)
    domain = operator.domain(K.shape)
    apply = jax.jit(lambda v: operator.rmatvec(K, operator.matvec(K, v[None]))[0])
    v = np.random.default_rng(0).standard_normal(domain)
    basis, alpha, beta = [v.ravel() / np.linalg.norm(v)], [], []
    for _ in range(steps):
        z = np.asarray(apply(jnp.asarray(basis[-1].reshape(domain)))).ravel()
        alpha.append(z @ basis[-1])
        Q = np.stack(basis)
        for _ in range(2):
            z = z - Q.T @ (Q @ z)
        beta.append(np.linalg.norm(z))
        if beta[-1] < 1e-12 * alpha[0]:
            break
        basis.append(z / beta[-1])
    T = np.diag(alpha) + np.diag(beta[: len(alpha) - 1], -1)
    return float(np.sqrt(np.linalg.eigvalsh(T)[-1]))


def _in_turns(rounds: int, *calls: Callable) -> list[float]:
    """The least processor time of each call, measured in turns: other processes do not count."""
    best = [float("inf")] * len(calls)
    for call in calls:
        call()
    for _ in range(rounds):
        for i, call in enumerate(calls):
            start = time.process_time()
            call()
            best[i] = min(best[i], time.process_time() - start)
    return best


# --- the page ----------------------------------------------------------------------------------


def _parts(result: dict[str, Any]) -> dict[str, str]:
    matrices, convolutions = result["matrices"]["rows"], result["convolutions"]["rows"]
    made = result["matrices"]["made"]
    return {
        "matrices": _report.table(
            ["matrix", "cholesky: bound / norm − 1", "gram", "SVD, ms", "cholesky, ms", "ratio"],
            [
                [
                    f"{row['matrix']}, {' × '.join(map(str, row['shape']))}",
                    f"{row['cholesky']:.1e}",
                    f"{row['gram']:.1e}",
                    f"{row['svd_ms']:.1f}",
                    f"{row['cholesky_ms']:.1f}",
                    f"{row['ratio']:.2f}",
                ]
                for row in matrices
            ],
        ),
        "convolutions": _report.table(
            ["layer at 32 × 32", "kernel", "symbol: bound / norm", "gram", "symbol, ms"],
            [
                [
                    row["convolution"],
                    " × ".join(map(str, row["kernel"])),
                    f"{row['symbol']:.4f}",
                    f"{row['gram']:.2f}",
                    f"{row['symbol_ms']:.0f}",
                ]
                for row in convolutions
            ],
        ),
        "made": f"Measured on {made['date'][:10]}, processor time of one thread of {made['cpu']}, "
        f"numpy {made['versions']['numpy']}, jax {made['versions']['jax']}.",
    }


def main(argv: list[str]) -> None:
    measures = {"matrices": measure_matrices, "convolutions": measure_convolutions}
    Program(
        "bounds",
        __doc__,
        "bounds.md",
        measures,
        _parts,
        FULL,
        SMOKE,
        "seconds, to see that it runs",
    ).main(argv)


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
