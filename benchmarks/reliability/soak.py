"""Part four: a GAN trains for a long time, in a Python loop as in a user's program.

Seen every so often: the true norm of each normalized weight (float64 SVD), the memory of the
process, the arrays that are alive, the number of traces, and whether all is finite.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable
from typing import Any

Row = dict[str, Any]


def resident() -> float:
    """MiB of memory that this process has in use."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def run(steps: int, every: int, tick: Callable[[int], None] = lambda n: None) -> Row:
    """Trains for so many steps."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from flax import linen as nn
    from sklearn.datasets import load_digits

    import jsn

    class Generator(nn.Module):
        @nn.compact
        def __call__(self, z):
            return nn.tanh(nn.Dense(64)(nn.relu(nn.Dense(64)(nn.relu(nn.Dense(64)(z))))))

    @jsn.linen.spectral_norm
    class Critic(nn.Module):
        @nn.compact
        def __call__(self, x):
            for _ in range(2):
                x = nn.leaky_relu(nn.Dense(96)(x), 0.2)
            return nn.Dense(1)(x)

    images = jnp.asarray(load_digits(return_X_y=True)[0] / 8 - 1, jnp.float32)
    generator, critic = Generator(), Critic()
    plain = Critic.__wrapped__()  # two passes on one normalization
    optimizer = optax.adam(2e-4, b1=0.5)
    traces = 0

    @jax.jit
    def step(carry: Any, key: Any) -> Any:
        nonlocal traces
        traces += 1
        g, d, sn_state, g_moments, d_moments = carry
        keys = jax.random.split(key, 3)
        real = images[jax.random.randint(keys[0], (64,), 0, len(images))]
        z = jax.random.normal(keys[1], (64, 16))

        def d_loss(d: Any) -> Any:
            normalized, after = jsn.normalize(d, sn_state)
            apply = lambda x: plain.apply({"params": normalized}, x)
            fake = apply(generator.apply({"params": g}, z))
            return nn.relu(1 - apply(real)).mean() + nn.relu(1 + fake).mean(), (after, normalized)

        slope, (sn_state, normalized) = jax.grad(d_loss, has_aux=True)(d)
        change, d_moments = optimizer.update(slope, d_moments)
        d = optax.apply_updates(d, change)

        def g_loss(g: Any) -> Any:
            fixed, _ = jsn.normalize(d, sn_state, n_steps=0)
            return -plain.apply({"params": fixed}, generator.apply({"params": g}, z)).mean()

        loss, slope = jax.value_and_grad(g_loss)(g)
        change, g_moments = optimizer.update(slope, g_moments)
        carry = optax.apply_updates(g, change), d, sn_state, g_moments, d_moments
        return carry, normalized, loss

    g = generator.init(jax.random.key(0), jnp.zeros((1, 16)))["params"]
    variables = critic.init(jax.random.key(1), images[:1])
    d = variables["params"]
    carry = (g, d, variables["sn_state"], optimizer.init(g), optimizer.init(d))
    key, rows = jax.random.key(2), []
    for i in range(1, steps + 1):
        carry, normalized, loss = step(carry, jax.random.fold_in(key, i))
        if i % every == 0:
            kernels = [layer["kernel"] for layer in normalized.values()]
            norms = [np.linalg.norm(np.asarray(W, np.float64), 2) for W in kernels]
            leaves = [loss, *jax.tree.leaves((carry, normalized))]
            row = {
                "step": i,
                "worst": float(max(norms, key=lambda norm: abs(norm - 1))),
                "memory_mib": round(resident(), 1),
                "arrays": len(jax.live_arrays()),
                "traces": traces,
                "finite": all(bool(jnp.isfinite(x).all()) for x in leaves),
            }
            rows.append(row)
            tick(every)
    return {"steps": steps, "every": every, "rows": rows}
