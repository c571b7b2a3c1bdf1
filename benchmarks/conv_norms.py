"""How far apart two norms of a convolution are: that of its reshaped kernel, and its own.

    python -m benchmarks.conv_norms            prints two tables: a minute

The kernel reshaped to a matrix (Miyato et al., `jsn.Matrix()`) gives at most the norm of the layer
where a whole window lies inside the input, and the layer at most sqrt(prod ceil(k / q)) times
that, with q = s / gcd(s, d) for window k, stride s and dilation d in each direction. A grouped
kernel keeps neither side. Norms are float64 SVDs; the layers are Flax's.
"""

from __future__ import annotations

import argparse
import math

SIZE = 12
GEOMETRIES = (
    ("3 x 3", (3, 3), 16, 16, {}),
    ("3 x 3, VALID", (3, 3), 16, 16, {"padding": "VALID"}),
    ("3 x 3, CIRCULAR", (3, 3), 16, 16, {"padding": "CIRCULAR"}),
    ("3 x 3, stride 2", (3, 3), 16, 16, {"strides": 2}),
    ("4 x 4, stride 2", (4, 4), 16, 16, {"strides": 2}),
    ("5 x 5", (5, 5), 16, 16, {}),
    ("3 x 3, dilation 2, stride 2", (3, 3), 16, 16, {"kernel_dilation": 2, "strides": 2}),
    ("1 x 1", (1, 1), 16, 16, {}),
    ("4 x 4, stride 4", (4, 4), 3, 16, {"strides": 4}),
    ("3 x 3, 4 groups", (3, 3), 16, 16, {"feature_group_count": 4}),
    ("3 x 3, depthwise, 8 channels", (3, 3), 8, 8, {"feature_group_count": 8}),
    ("3 x 3, depthwise, 64 channels", (3, 3), 64, 64, {"feature_group_count": 64}),
)


def norms(kernel, size: int, options: dict) -> tuple[float, float]:
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
        own = max(own, np.linalg.norm(dense, 2))
    return float(matrix), float(own)


def most(window: tuple[int, ...], options: dict) -> str:
    """The largest ratio there can be, if there is one."""
    if options.get("feature_group_count", 1) > 1:
        return "none"
    stride, dilation = options.get("strides", 1), options.get("kernel_dilation", 1)
    phases = stride // math.gcd(stride, dilation)
    return f"{math.sqrt(math.prod(math.ceil(k / phases) for k in window)):.2f}"


def random_kernels() -> list[str]:
    """Rows for kernels as Flax initializes them, and for a blur, where the ratio is largest."""
    import jax
    import numpy as np
    from flax.linen.initializers import lecun_normal

    rows = ["| layer | random | all ones | at most |", "|---|---|---|---|"]
    for name, window, ins, outs, options in GEOMETRIES:
        shape = (*window, ins // options.get("feature_group_count", 1), outs)
        found = []
        for kernel in (lecun_normal()(jax.random.key(0), shape), np.ones(shape)):
            matrix, own = norms(kernel, SIZE, options)
            found.append(f"{own / matrix:.2f}")
        rows.append(f"| {name} | {' | '.join(found)} | {most(window, options)} |")
    return rows


def trained_kernels() -> list[str]:
    """Rows for a classifier of digits: what each rule makes of its three convolutions."""
    import jax
    import numpy as np
    import optax
    from flax import linen as nn
    from sklearn.datasets import load_digits

    import jsn

    images, labels = load_digits(return_X_y=True)
    images = (images.reshape(-1, 8, 8, 1) / 16 - 0.5).astype(np.float32)
    strides, sizes = (1, 2, 2), (8, 8, 4)

    class Classifier(nn.Module):
        @nn.compact
        def __call__(self, x):
            for features, stride in zip((16, 32, 32), strides, strict=True):
                x = nn.relu(nn.Conv(features, (3, 3), strides=stride)(x))
            return nn.Dense(10)(x.reshape(len(x), -1))

    model = Classifier()
    ours = jsn.linen.operators(model, images[:1])
    rows = ["| rules, block | three layers | product | accuracy |", "|---|---|---|---|"]
    for name, rules, block in (
        ("reshape, 1", jsn.FLAX, 1),
        ("reshape, 32", jsn.FLAX, 32),
        ("operators, 1", ours, 1),
        ("operators, 32", ours, 32),
    ):
        params = model.init(jax.random.key(0), images[:1])["params"]
        state, optimizer = jsn.init(params, rules=rules, block_size=block), optax.adam(1e-3)

        @jax.jit
        def step(params, state, moments, batch, optimizer=optimizer):
            def loss(params):
                normalized, after = jsn.normalize(params, state)
                logits = 20 * model.apply({"params": normalized}, images[batch])
                losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels[batch])
                return losses.mean(), (after, normalized)

            slope, (after, normalized) = jax.grad(loss, has_aux=True)(params)
            change, moments = optimizer.update(slope, moments)
            return optax.apply_updates(params, change), after, moments, normalized

        moments, rng, worst = optimizer.init(params), np.random.default_rng(0), (0.0,) * 4
        for i in range(400):
            batch = rng.integers(0, len(images), 64)
            params, state, moments, normalized = step(params, state, moments, batch)
            if i % 20 == 19:
                found = [
                    norms(np.asarray(normalized[f"Conv_{j}"]["kernel"]), n, {"strides": s})[1]
                    for j, (n, s) in enumerate(zip(sizes, strides, strict=True))
                ]
                worst = max(worst, (math.prod(found), *found))
        logits = model.apply({"params": normalized}, images)
        accuracy = np.mean(np.argmax(logits, -1) == labels)
        layers = ", ".join(f"{norm:.3f}" for norm in worst[1:])
        rows.append(f"| {name} | {layers} | {worst[0]:.3f} | {accuracy:.3f} |")
    return rows


def main(argv: list[str] | None = None) -> None:
    """Prints the two tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.conv_norms", description=__doc__)
    parser.parse_args(argv)
    print(f"Norm of the layer / norm of the reshaped kernel, on {SIZE} x {SIZE} inputs\n")
    print("\n".join(random_kernels()))
    print("\nTrue norms in a digits classifier, the worst moment of 400 steps\n")
    print("\n".join(trained_kernels()))


if __name__ == "__main__":
    main()
