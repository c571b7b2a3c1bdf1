"""How far apart two norms of a convolution are: that of its reshaped kernel, and its own.

The kernel reshaped to a matrix (Miyato et al., `jsn.Matrix()`) gives at most the norm of the layer
where a whole window lies inside the input, and the layer at most sqrt(prod ceil(k / q)) times
that, with q = s / gcd(s, d) for window k, stride s and dilation d in each direction. With groups
only the second holds. Norms are those of the matrices of Flax's layers, in float64.

    python -m benchmarks conv_norms              three minutes on one quiet core
    python -m benchmarks conv_norms --only page  only the page, from stored results
    python -m benchmarks conv_norms --smoke      half a minute, writes into out/

Writes `benchmarks/results/conv_norms.json` and the tables of `docs/convolutions.md`.
"""

from __future__ import annotations

import math
from typing import Any

from benchmarks import _report
from benchmarks._program import Program

FULL = {"size": 10, "seeds": 3, "steps": 400, "every": 20}
SMOKE = {"size": 6, "seeds": 1, "steps": 20, "every": 10}
GEOMETRIES = (
    ("3 × 3", (3, 3), 16, 16, {}),
    ("3 × 3, VALID", (3, 3), 16, 16, {"padding": "VALID"}),
    ("3 × 3, CIRCULAR", (3, 3), 16, 16, {"padding": "CIRCULAR"}),
    ("3 × 3, stride 2", (3, 3), 16, 16, {"strides": 2}),
    ("4 × 4, stride 2", (4, 4), 16, 16, {"strides": 2}),
    ("5 × 5", (5, 5), 16, 16, {}),
    ("3 × 3, dilation 2, stride 2", (3, 3), 16, 16, {"kernel_dilation": 2, "strides": 2}),
    ("1 × 1", (1, 1), 16, 16, {}),
    ("4 × 4, stride 4", (4, 4), 3, 16, {"strides": 4}),
    ("3 × 3, 4 groups", (3, 3), 16, 16, {"feature_group_count": 4}),
    ("3 × 3, depthwise, 8 channels", (3, 3), 8, 8, {"feature_group_count": 8}),
    ("3 × 3, depthwise, 64 channels", (3, 3), 64, 64, {"feature_group_count": 64}),
)
METHODS = (("reshape", 1), ("reshape", 32), ("operators", 1), ("operators", 32))
STRIDES, SIZES = (1, 2, 2), (8, 8, 4)
"""The digits classifier: strides of its three convolutions, and the sizes that they see."""

Row = dict[str, Any]


def norms(kernel: Any, size: int, options: dict[str, Any]) -> tuple[float, float]:
    """The norm of the reshaped kernel, and of the layer on inputs of `size` x `size`."""
    import flax.linen as nn
    import jax.numpy as jnp
    import numpy as np

    *window, ins, outs = kernel.shape
    groups = options.get("feature_group_count", 1)
    matrix = np.linalg.norm(np.asarray(kernel, np.float64).reshape(-1, outs), 2)
    own = 0.0
    for group in range(groups):  # the layer is a sum of independent ones
        share = slice(group * outs // groups, (group + 1) * outs // groups)
        alone = {key: value for key, value in options.items() if key != "feature_group_count"}
        layer = nn.Conv(outs // groups, tuple(window), use_bias=False, **alone)
        units = np.eye(size * size * ins, dtype=np.float32).reshape(-1, size, size, ins)
        dense = layer.apply({"params": {"kernel": jnp.asarray(kernel[..., share])}}, units)
        dense = np.asarray(dense, np.float64).reshape(len(units), -1)
        gram = dense.T @ dense if dense.shape[0] > dense.shape[1] else dense @ dense.T
        own = max(own, math.sqrt(np.linalg.eigvalsh(gram)[-1]))  # a third of the time of an SVD
    return float(matrix), own


def _most(window: tuple[int, ...], options: dict[str, Any]) -> float:
    """The largest ratio there can be."""
    stride, dilation = options.get("strides", 1), options.get("kernel_dilation", 1)
    phases = stride // math.gcd(stride, dilation)
    return math.sqrt(math.prod(math.ceil(k / phases) for k in window))


# --- in a process of its own, with one thread --------------------------------------------------


def measure_kernels(settings: dict[str, Any]) -> list[Row]:
    """Kernels as Flax initializes them, and a blur: all ones, where the ratio is largest."""
    import jax
    import numpy as np
    from flax.linen.initializers import lecun_normal

    rows = []
    for name, window, ins, outs, options in GEOMETRIES:
        shape = (*window, ins // options.get("feature_group_count", 1), outs)
        row = {"layer": name, "kernel": list(shape), "most": _most(window, options)}
        for kind, kernel in (
            ("random", lecun_normal()(jax.random.key(0), shape)),
            ("ones", np.ones(shape)),
        ):
            matrix, own = norms(kernel, settings["size"], options)
            row[kind] = own / matrix
        rows.append(row)
    return rows


def measure_training(settings: dict[str, Any]) -> list[Row]:
    """A classifier of digits: what each rule makes of its three convolutions."""
    return [
        {"rules": rules, "block": block, "seed": seed, **_train(rules, block, seed, settings)}
        for rules, block in METHODS
        for seed in range(settings["seeds"])
    ]


def _train(rules: str, block: int, seed: int, settings: dict[str, Any]) -> Row:
    """The true norms at the worst moment of one run, which is that of their largest product."""
    import jax
    import numpy as np
    import optax
    from flax import linen as nn
    from sklearn.datasets import load_digits

    import jsn

    class Classifier(nn.Module):
        @nn.compact
        def __call__(self, x):
            for features, stride in zip((16, 32, 32), STRIDES, strict=True):
                x = nn.relu(nn.Conv(features, (3, 3), strides=stride)(x))
            return nn.Dense(10)(x.reshape(len(x), -1))

    images, labels = load_digits(return_X_y=True)
    images = (images.reshape(-1, 8, 8, 1) / 16 - 0.5).astype(np.float32)
    model = Classifier()
    chosen = jsn.FLAX if rules == "reshape" else jsn.linen.operators(model, images[:1])
    params = model.init(jax.random.key(seed), images[:1])["params"]
    state, optimizer = jsn.init(params, rules=chosen, block_size=block), optax.adam(1e-3)

    @jax.jit
    def step(params, state, moments, x, y):
        def loss(params):
            normalized, after = jsn.normalize(params, state)
            logits = 20 * model.apply({"params": normalized}, x)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
            return losses.mean(), (after, normalized)

        slope, (after, normalized) = jax.grad(loss, has_aux=True)(params)
        change, moments = optimizer.update(slope, moments)
        return optax.apply_updates(params, change), after, moments, normalized

    moments, rng, worst, normalized = optimizer.init(params), np.random.default_rng(seed), [], None
    for i in range(1, settings["steps"] + 1):
        batch = rng.integers(0, len(images), 64)
        x, y = images[batch], labels[batch]
        params, state, moments, normalized = step(params, state, moments, x, y)
        if i % settings["every"] == 0:
            now = [
                norms(np.asarray(normalized[f"Conv_{j}"]["kernel"]), n, {"strides": s})[1]
                for j, (n, s) in enumerate(zip(SIZES, STRIDES, strict=True))
            ]
            worst = max(worst, now, key=math.prod) if worst else now
    logits = model.apply({"params": normalized}, images)
    accuracy = float(np.mean(np.argmax(logits, -1) == labels))
    return {"layers": worst, "product": math.prod(worst), "accuracy": accuracy}


# --- the page ----------------------------------------------------------------------------------


def _parts(result: dict[str, Any]) -> dict[str, str]:
    kernels, training = result["kernels"]["rows"], result["training"]["rows"]
    made, settings = result["training"]["made"], result["training"]["settings"]
    runs = [
        max(
            (row for row in training if (row["rules"], row["block"]) == method),
            key=lambda row: row["product"],
        )
        for method in METHODS
    ]
    return {
        "kernels": _report.table(
            ["layer / reshape", "random", "all ones", "at most"],
            [
                [
                    row["layer"],
                    f"{row['random']:.2f}",
                    f"{row['ones']:.2f}",
                    f"{row['most']:.2f}",
                ]
                for row in kernels
            ],
        ),
        "training": _report.table(
            ["rules", "vectors", "norms of the three layers", "product", "accuracy"],
            [
                [
                    row["rules"],
                    str(row["block"]),
                    ", ".join(f"{norm:.3f}" for norm in row["layers"]),
                    f"{row['product']:.3f}",
                    f"{row['accuracy']:.3f}",
                ]
                for row in runs
            ],
        ),
        "made": f"The worst moment of {settings['seeds']} runs of {settings['steps']} steps, seen "
        f"every {settings['every']} steps; the accuracy is that of the same run, on the images it "
        f"was trained on. The first table has inputs of {result['kernels']['settings']['size']} × "
        f"{result['kernels']['settings']['size']}. `python -m benchmarks conv_norms`, "
        f"{made['date'][:10]}, one thread of {made['cpu']}, jax {made['versions']['jax']}, "
        f"flax {made['versions']['flax']}.",
    }


def main(argv: list[str]) -> None:
    measures = {"kernels": measure_kernels, "training": measure_training}
    Program(
        "conv_norms",
        __doc__,
        "convolutions.md",
        measures,
        _parts,
        FULL,
        SMOKE,
        "to see that it runs",
    ).main(argv)


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
