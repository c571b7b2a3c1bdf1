"""Part three: `kill -9` at random moments of a training run that writes checkpoints.

`train` is such a run, as a program of its own: parameters, state and moments of Adam are written
after every step, beside the last checkpoint, and then take its place. `run` starts it, kills it,
starts it again, and in the end compares the last checkpoint with that of a run in peace.
"""

from __future__ import annotations

import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

ROOT = pathlib.Path(__file__).parents[2]


def train(directory: pathlib.Path, steps: int) -> None:
    """Trains to a number of steps, from the last checkpoint if there is one; prints each step."""
    import jax
    import jax.numpy as jnp
    import optax
    from flax import linen as nn
    from flax import serialization

    import jsn

    @jsn.linen.spectral_norm(block_size=4)
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(nn.tanh(nn.Dense(16)(x)))

    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(carry: Any) -> Any:
        def loss(params: Any) -> Any:
            x = jax.random.normal(jax.random.fold_in(jax.random.key(0), carry["step"]), (32, 8))
            variables = {"params": params, "sn_state": carry["sn_state"]}
            y, updates = Net().apply(variables, x, mutable=["sn_state"])
            return jnp.mean((y - jnp.sin(3 * x[:, :3])) ** 2), updates

        slope, updates = jax.grad(loss, has_aux=True)(carry["params"])
        change, moments = optimizer.update(slope, carry["moments"])
        params = optax.apply_updates(carry["params"], change)
        return {"step": carry["step"] + 1, "params": params, "moments": moments, **updates}

    variables = Net().init(jax.random.key(0), jnp.zeros((1, 8)))
    carry = {
        "step": jnp.zeros((), jnp.int32),
        "moments": optimizer.init(variables["params"]),
        **variables,
    }
    last, new = directory / "last.msgpack", directory / "new.msgpack"
    if last.exists():
        carry = serialization.from_bytes(carry, last.read_bytes())
    print(int(carry["step"]), flush=True)
    while carry["step"] < steps:
        carry = step(carry)
        with new.open("wb") as file:
            file.write(serialization.to_bytes(carry))
            file.flush()
            os.fsync(file.fileno())
        new.replace(last)
        print(int(carry["step"]), flush=True)


def _start(directory: pathlib.Path, steps: int) -> subprocess.Popen[str]:
    argv = [sys.executable, "-m", __spec__.name if __spec__ else __name__, str(directory)]
    return subprocess.Popen([*argv, str(steps)], cwd=ROOT, stdout=subprocess.PIPE, text=True)


def _finish(directory: pathlib.Path, steps: int) -> tuple[int, bytes]:
    """Lets a run end: where it began, and its last checkpoint.

    Raises:
        RuntimeError: If it fails.
    """
    process = _start(directory, steps)
    out, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"the training run ended with {process.returncode}")
    return int(out.split()[0]), (directory / "last.msgpack").read_bytes()


def run(kills: int, tick: Callable[[], None] = lambda: None, seed: int = 0) -> dict[str, Any]:
    """Kills a run so many times, at random moments.

    Every fifth kill comes by the clock, most likely while JAX starts or compiles; the others come
    within a random step: while it computes, or while it writes.
    """
    rng, steps = random.Random(seed), 8 * kills + 8
    resumed = torn = starting = 0
    with tempfile.TemporaryDirectory() as calm, tempfile.TemporaryDirectory() as struck:
        _, expected = _finish(pathlib.Path(calm), steps)
        tick()
        directory, reached = pathlib.Path(struck), 0
        for index in range(kills):
            process = _start(directory, steps)
            assert process.stdout is not None
            begin = None
            if index % 5 == 4:
                time.sleep(rng.uniform(0, 3))
            else:
                begin = int(process.stdout.readline())
                for _ in range(rng.randrange(1, 8)):
                    process.stdout.readline()
                time.sleep(rng.uniform(0, 0.004))
            process.send_signal(signal.SIGKILL)
            rest, _ = process.communicate()
            resumed += begin is not None and begin >= reached
            starting += begin is None
            torn += begin is not None and (directory / "new.msgpack").exists()
            reached = max([reached, *map(int, rest.split()[:-1])])
            tick()
        begin, found = _finish(directory, steps)
        resumed += begin >= reached
        tick()
    return {
        "steps": steps,
        "kills": kills,
        "while_starting": starting,
        "while_writing": torn,
        "resumes": kills - starting,
        "resumed": resumed - 1,
        "equal": found == expected,
    }


if __name__ == "__main__":
    train(pathlib.Path(sys.argv[1]), int(sys.argv[2]))
