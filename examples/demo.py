"""Trains the same small GAN twice on real digits: once with a plain critic, once with jsn.

    python examples/demo.py [--smoke] [--seed N] [--steps N] [--out DIR] [--save]
                            [--learning-rate LR] [--publish]

Both runs have the same networks, initial weights, batches, noise and settings. The one difference
is `@jsn.linen.spectral_norm` on the critic. The critic's learning rate is aggressive on purpose;
`--learning-rate 0.002` is a tame one, with which a plain critic does well too. A table and
three pictures say what came out: nothing is pre-recorded.

This file is the loop around it. `_demo_gan.py` has the networks and the training step, and is the
one to read for jsn; `_demo_judge.py` has data and scores, `_demo_report.py` table and pictures.
"""

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

try:
    import flax
    import jax
    import numpy as np
    import optax
    from _demo_gan import Generator, Players, Settings, init_players, train_step, true_norms
    from _demo_judge import Digits, Judge, load_split
    from _demo_report import Checkpoint, Run, progress_bar, publish, summary, write_pictures
    from rich.console import Console

    import jsn
except ModuleNotFoundError as error:
    sys.exit(f"The demo needs {error.name}. To install all it needs: pip install -e '.[demo]'")

DEFAULT_STEPS, SMOKE_STEPS = 2000, 40
N_CHECKPOINTS = 50


def train(
    name: str,
    players: Players,
    settings: Settings,
    digits: tuple[Digits, Digits],
    judge: Judge,
    show: Callable[..., None],
) -> tuple[Run, Players]:
    """Trains one GAN and looks at it `N_CHECKPOINTS` times.

    Each look draws a picture for every held-out digit, with its label and always the same noise,
    so that generated and held-out digits are scored alike.

    Args:
        name: "plain" or "jsn".
        players: Where to start from.
        settings: Steps, seed and learning rates.
        digits: Those to train on, and those held out.
        judge: What scores pictures.
        show: Called with `completed` and `note` for the progress bar.

    Returns:
        What there is to report, and the trained networks.
    """
    start = time.perf_counter()
    training, held_out = digits
    training = jax.device_put(training)
    draw = jax.jit(Generator().apply)
    noise_shape = (len(held_out.labels), settings.noise_size)
    noise = jax.random.normal(jax.random.key(settings.seed), noise_shape)
    checkpoint_every = -(-settings.steps // N_CHECKPOINTS)
    checkpoints, losses = [], []
    # A Python loop around one jitted step, not `lax.scan`: inside a scan XLA:CPU runs
    # convolutions some 30 times slower, while this loop costs next to nothing.
    for step in range(1, settings.steps + 1):
        players, loss = train_step(players, training, step, settings)
        losses.append(loss)
        if step % checkpoint_every and step < settings.steps:
            continue
        images = np.asarray(draw({"params": players.generator}, noise, held_out.labels))
        samples = Digits(images, held_out.labels)
        scores = judge.score(samples)
        mean_loss = float(np.mean(jax.device_get(losses)))
        checkpoints.append(Checkpoint(step, mean_loss, true_norms(players), scores))
        losses = []
        show(completed=step, note=f"Fréchet distance {scores.frechet:.0f}")
    return Run(name, checkpoints, samples, seconds=time.perf_counter() - start), players


def save_critic(folder: Path, name: str, players: Players) -> Path:
    """Saves the weights that a critic computes with, for `jsn audit`: plain ones, by Flax."""
    weights = players.critic
    if players.sn_state is not None:
        weights = jsn.fold(weights, players.sn_state)
    path = folder / f"critic_{name}.msgpack"
    path.write_bytes(flax.serialization.to_bytes({"params": weights}))
    return path


def check_smoke(plain: Run, with_jsn: Run) -> None:
    """What must hold after however few steps; the plain critic's norms may be anything."""
    for run in (plain, with_jsn):
        assert np.isfinite(run.over_time("critic_loss")).all(), f"{run.name}: loss not finite"
    for layer, norm in with_jsn.last.norms.items():
        assert abs(norm - 1.0) < 0.02, f"{layer}: true norm {norm}, expected 1"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="a few steps, checked, for CI")
    parser.add_argument("--seed", type=int, default=0, help="of data, weights and noise")
    parser.add_argument("--steps", type=int, help="training steps of each run")
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder for pictures")
    parser.add_argument("--save", action="store_true", help="save the critics there too")
    parser.add_argument("--publish", action="store_true", help="renew README and documentation")
    parser.add_argument("--learning-rate", type=float, default=3e-2, help="of the critics")
    arguments = parser.parse_args()
    if arguments.steps is None:
        arguments.steps = SMOKE_STEPS if arguments.smoke else DEFAULT_STEPS
    if arguments.steps < 1:
        parser.error(f"--steps: got {arguments.steps}, expected 1 or more")
    if arguments.smoke and arguments.publish:
        parser.error("--smoke trains too little for --publish")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    settings = Settings(arguments.steps, arguments.seed, arguments.learning_rate)
    console = Console(highlight=False)
    modules = (jsn, jax, flax, optax)
    versions = ", ".join(f"{module.__name__} {module.__version__}" for module in modules)
    console.print(f"{versions}, on {jax.default_backend()}")
    console.print(", ".join(f"{key} {value}" for key, value in settings._asdict().items()))

    digits = load_split(settings.seed)
    training, held_out = digits
    judge = Judge(training, settings.seed)
    real = judge.score(held_out)
    console.print(f"the judge, a small classifier: {real.accuracy:.1%} right on held-out digits")

    players = init_players(settings)
    starts = {"plain": players._replace(sn_state=None), "jsn": players}
    runs, trained = [], {}
    with progress_bar(console) as progress:
        for name, start in starts.items():
            task = progress.add_task(name, total=settings.steps, note="")
            show = partial(progress.update, task)
            run, trained[name] = train(name, start, settings, digits, judge, show)
            runs.append(run)
    console.print(summary(*runs, real))
    for path in write_pictures(arguments.out, runs, held_out, real):
        console.print(f"wrote {path}")
    for name in trained if arguments.save else ():
        console.print(f"wrote {save_critic(arguments.out, name, trained[name])}")
    if arguments.publish:
        publish(Path(__file__).resolve().parents[1], runs, held_out, real, settings)
    if arguments.smoke:
        check_smoke(*runs)


if __name__ == "__main__":
    main()
