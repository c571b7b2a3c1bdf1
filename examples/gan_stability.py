"""GANs with eleven kinds of critic under seven settings: who is robust?

    python examples/gan_stability.py [--smoke]

Figure 1 of Miyato et al. 2018 in small: scikit-learn's 8x8 digits, and the Fréchet distance to
them in the features of a small classifier. Settings A to F are those of the paper, with learning
rates four times as large because training is a hundred times as short. G is not of the paper:
faster than is good for anyone.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _demo_judge import Digits, Judge, load_split
from _gallery import main, spread
from _switchable_norm import SwitchableNorm

import jsn
from benchmarks._report import table

NOISE, BATCH = 16, 32


class Setting(NamedTuple):
    """Of both players; `n_dis` critic steps for each step of the generator."""

    learning_rate: float
    beta1: float
    beta2: float
    n_dis: int


SETTINGS = {
    "A": Setting(4e-4, 0.5, 0.9, 5),
    "B": Setting(4e-4, 0.5, 0.999, 1),
    "C": Setting(8e-4, 0.5, 0.999, 1),
    "D": Setting(4e-3, 0.5, 0.9, 5),
    "E": Setting(4e-3, 0.5, 0.999, 5),
    "F": Setting(4e-3, 0.9, 0.999, 5),
    "G": Setting(1e-2, 0.5, 0.999, 5),
}


# --8<-- [start:model]
class Critic(nn.Module):
    """`wrap` goes around each layer, `norm` makes a layer after the second."""

    wrap: Callable = lambda layer: layer
    norm: Callable | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.leaky_relu(self.wrap(nn.Conv(8, (4, 4), 2))(x), 0.1)
        x = self.wrap(nn.Conv(16, (4, 4), 2))(x)
        x = nn.leaky_relu(self.norm()(x) if self.norm else x, 0.1)
        return self.wrap(nn.Dense(1))(x.reshape(len(x), -1))[:, 0]


whole_example = {"reduction_axes": (1, 2, 3), "feature_axes": -1}
CRITICS = {
    "none": Critic(),
    "weight clipping": Critic(),
    "gradient penalty": Critic(),
    "weight norm": Critic(wrap=nn.WeightNorm),
    "BatchNorm": Critic(norm=partial(nn.BatchNorm, use_running_average=False)),
    "LayerNorm": Critic(norm=partial(nn.LayerNorm, **whole_example)),
    "InstanceNorm": Critic(norm=nn.InstanceNorm),
    "GroupNorm": Critic(norm=partial(nn.GroupNorm, num_groups=4)),
    "switchable norm": Critic(norm=SwitchableNorm),
    "jsn, reshaped": jsn.linen.spectral_norm(Critic)(),
    "jsn, operator": jsn.linen.spectral_norm(Critic, rules="operators")(),
}
WASSERSTEIN = ("weight clipping", "gradient penalty")  # with the loss they were made for
# --8<-- [end:model]


class Generator(nn.Module):
    @nn.compact
    def __call__(self, noise: jax.Array) -> jax.Array:
        x = nn.relu(nn.LayerNorm()(nn.Dense(64)(noise)))
        x = nn.relu(nn.LayerNorm()(nn.Dense(64)(x)))
        return jnp.tanh(nn.Dense(64)(x)).reshape(-1, 8, 8, 1)


class Player(NamedTuple):
    params: Any
    opt_state: Any
    sn_state: Any = None

    def update(self, grads: Any, setting: Setting, **changes: Any) -> "Player":
        adam = optax.adam(setting.learning_rate, setting.beta1, setting.beta2)
        updates, opt_state = adam.update(grads, self.opt_state)
        params = optax.apply_updates(self.params, updates)
        return self._replace(params=params, opt_state=opt_state, **changes)


def init(kind: str, seed: jax.Array) -> tuple[Player, Player]:
    keys = jax.random.split(jax.random.key(seed))
    drawn = Generator().init(keys[0], jnp.zeros((1, NOISE)))["params"]
    variables = CRITICS[kind].init(keys[1], jnp.zeros((1, 8, 8, 1)))
    begin = optax.adam(0.0).init
    critic = Player(variables["params"], begin(variables["params"]), variables.get("sn_state"))
    return Player(drawn, begin(drawn)), critic


def critic_fn(kind: str, player: Player, params: Any, n_steps: int) -> tuple[Callable, Any]:
    """The critic as a function, and its next state. Normalized once for real and fake."""
    model, sn_state = CRITICS[kind], player.sn_state
    if sn_state is not None:
        params, sn_state = jsn.normalize(params, sn_state, n_steps=n_steps)
        model = Critic()
    # BatchNorm uses the statistics of its batch, and its averages are never needed.
    return lambda x: model.apply({"params": params}, x, mutable=["batch_stats"])[0], sn_state


def critic_step(
    kind: str, setting: Setting, generator: Player, critic: Player, images: jax.Array, key: Any
) -> tuple[Player, jax.Array]:
    row_key, noise_key, mix_key = jax.random.split(key, 3)
    real = images[jax.random.randint(row_key, (BATCH,), 0, len(images))]
    noise = jax.random.normal(noise_key, (BATCH, NOISE))
    fake = Generator().apply({"params": generator.params}, noise)

    def loss_fn(params: Any) -> tuple[jax.Array, Any]:
        score, sn_state = critic_fn(kind, critic, params, n_steps=1)
        if kind not in WASSERSTEIN:
            return nn.relu(1 - score(real)).mean() + nn.relu(1 + score(fake)).mean(), sn_state
        loss = score(fake).mean() - score(real).mean()
        if kind == "gradient penalty":
            mix = jax.random.uniform(mix_key, (BATCH, 1, 1, 1))
            slope = jax.grad(lambda x: score(x).sum())(mix * real + (1 - mix) * fake)
            norm = jnp.sqrt((slope**2).sum((1, 2, 3)) + 1e-12)
            loss += 10 * ((norm - 1) ** 2).mean()
        return loss, sn_state

    (loss, sn_state), grads = jax.value_and_grad(loss_fn, has_aux=True)(critic.params)
    critic = critic.update(grads, setting, sn_state=sn_state)
    if kind == "weight clipping":
        clipped = jax.tree.map(lambda w: w.clip(-0.01, 0.01), critic.params)
        critic = critic._replace(params=clipped)
    return critic, loss


def generator_step(
    kind: str, setting: Setting, generator: Player, critic: Player, key: Any
) -> Player:
    score, _ = critic_fn(kind, critic, critic.params, n_steps=0)
    noise = jax.random.normal(key, (BATCH, NOISE))
    loss_fn = lambda params: -score(Generator().apply({"params": params}, noise)).mean()
    return generator.update(jax.grad(loss_fn)(generator.params), setting)


@partial(jax.jit, static_argnames=("kind", "steps"))
def train(kind: str, setting: Setting, images: jax.Array, seed: jax.Array, steps: int) -> tuple:
    """Both players after `steps` steps of the generator, and the critic's last loss.

    A setting is traced, number of critic steps included, so each kind compiles once.
    """

    def step(carry: tuple, key: jax.Array) -> tuple[tuple, None]:
        generator, critic, loss = carry

        def critic_turn(i: jax.Array, carry: tuple) -> tuple:
            return critic_step(
                kind, setting, generator, carry[0], images, jax.random.fold_in(key, i + 1)
            )

        critic, loss = jax.lax.fori_loop(0, setting.n_dis, critic_turn, (critic, loss))
        generator = generator_step(kind, setting, generator, critic, jax.random.fold_in(key, 0))
        return (generator, critic, loss), None

    keys = jax.random.split(jax.random.key(seed), steps)
    return jax.lax.scan(step, (*init(kind, seed), jnp.float32(0)), keys)[0]


def measure(smoke: bool, progress: Any) -> dict[str, Any]:
    kinds = ("jsn, reshaped",) if smoke else CRITICS
    settings = {"E": SETTINGS["E"]} if smoke else SETTINGS
    seeds, steps = list(range(1 if smoke else 3)), 4 if smoke else 1000
    training, held_out = load_split(0)
    judge = Judge(training, seed=0, steps=10 if smoke else 400)
    noise = jax.random.normal(jax.random.key(1), (1000, NOISE))
    images = jnp.asarray(training.images)
    found: dict[tuple, list] = {(kind, letter): [] for kind in kinds for letter in settings}
    norms = {}
    task = progress.add_task("GANs", total=len(found) * len(seeds))
    for seed in seeds:
        for kind, letter in found:
            generator, critic, loss = train(kind, settings[letter], images, seed, steps)
            drawn = np.asarray(Generator().apply({"params": generator.params}, noise))
            score = judge.score(Digits(drawn, np.zeros(len(drawn), np.int32)))
            found[kind, letter].append(score.frechet if np.isfinite(loss) else np.nan)
            norms.setdefault((kind, letter), []).append(worst_norm(kind, critic))
            progress.advance(task)
    rows = [
        {"critic": kind, "setting": letter, "frechet": values, "norm": norms[kind, letter]}
        for (kind, letter), values in found.items()
    ]
    return {"seeds": seeds, "steps": steps, "real": judge.score(held_out).frechet, "rows": rows}


def worst_norm(kind: str, critic: Player) -> float:
    """The largest norm of a layer, by SVD: of the convolution itself where that is the promise."""
    if critic.sn_state is None:
        return np.nan
    params, _ = jsn.normalize(critic.params, critic.sn_state, n_steps=0)
    found = []
    for name, shape in ("Conv_0", (8, 8, 1)), ("Conv_1", (4, 4, 8)):
        kernel = params[name]["kernel"]
        matrix = kernel.reshape(-1, kernel.shape[-1])
        if kind == "jsn, operator":
            basis = jnp.eye(np.prod(shape)).reshape(-1, *shape)
            numbers = ("NHWC", "HWIO", "NHWC")
            outputs = jax.lax.conv_general_dilated(
                basis, kernel, (2, 2), "SAME", dimension_numbers=numbers
            )
            matrix = outputs.reshape(len(basis), -1)
        found.append(np.linalg.norm(np.asarray(matrix, np.float64), 2))
    return float(max(found))


def check(result: dict[str, Any]) -> None:
    for row in result["rows"]:
        if row["critic"].startswith("jsn"):
            assert np.isfinite(np.array(row["frechet"], float)).all(), "jsn: diverged"
            assert np.allclose(row["norm"], 1, atol=0.02), f"jsn: norm {row['norm']}, expected 1"


def medians(result: dict[str, Any]) -> tuple[list[str], list[str], np.ndarray]:
    """Critics, settings, and the median distance of each pair; infinite if any seed diverged."""
    kinds = list(dict.fromkeys(row["critic"] for row in result["rows"]))
    letters = list(dict.fromkeys(row["setting"] for row in result["rows"]))
    values = [np.array(row["frechet"], float) for row in result["rows"]]
    grid = [np.median(np.where(np.isfinite(v), v, np.inf)) for v in values]
    return kinds, letters, np.reshape(grid, (len(kinds), len(letters)))


def summary(result: dict[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
    """Of each critic: the distance under its worst setting and under its best."""
    kinds, _, grid = medians(result)
    worst, best = grid.max(axis=1).tolist(), grid.min(axis=1).tolist()
    return dict(zip(kinds, worst, strict=True)), dict(zip(kinds, best, strict=True))


def parts(result: dict[str, Any]) -> dict[str, str]:
    kinds, letters, _ = medians(result)
    worst, best = summary(result)
    cells = {(row["critic"], row["setting"]): row["frechet"] for row in result["rows"]}
    rows = [
        [
            kind,
            *[spread(cells[kind, letter], ".0f") for letter in letters],
            f"{best[kind]:.0f}",
            f"{worst[kind]:.0f}",
        ]
        for kind in kinds
    ]
    order = sorted(kinds, key=worst.__getitem__)
    norms = [row["norm"] for row in result["rows"] if row["critic"].startswith("jsn")]
    return {
        "headline": f"Fréchet distance under the worst of {len(letters)} settings: "
        f"{', '.join(f'{kind} {worst[kind]:.0f}' for kind in order)}.",
        "frechet": table(["", *letters, "best", "worst"], rows),
        "real": f"Real digits that were held out have a distance of {result['real']:.1f}. The "
        "largest norm of a layer of a critic with jsn after training, by SVD, is "
        f"{np.max(norms):.4f}, the smallest {np.min(norms):.4f}.",
    }


def draw(result: dict[str, Any], figure: Any) -> None:
    kinds, letters, grid = medians(result)
    axes = figure.subplots()
    shown = np.where(np.isfinite(grid), grid, np.nan)
    image = axes.pcolormesh(np.log10(shown), cmap="viridis_r", edgecolors="white", lw=1)
    middle = np.nanmean(image.get_clim())
    for (i, j), value in np.ndenumerate(grid):
        dark = np.isfinite(value) and np.log10(value) > middle
        text = f"{value:.0f}" if np.isfinite(value) else "diverged"
        axes.text(j + 0.5, i + 0.5, text, ha="center", va="center", color="wk"[not dark])
    labels = [
        f"{letter}\n{s.learning_rate:g}\n{s.beta1:g}, {s.beta2:g}\n{s.n_dis}"
        for letter, s in ((letter, SETTINGS[letter]) for letter in letters)
    ]
    axes.set_xticks(np.arange(len(letters)) + 0.5, labels, fontsize=8)
    axes.set_yticks(np.arange(len(kinds)) + 0.5, kinds)
    axes.invert_yaxis()
    axes.set_xlabel("setting: learning rate; beta 1, beta 2; critic steps")
    axes.set_title("Fréchet distance to real digits, median of the seeds (smaller is better)")


if __name__ == "__main__":
    main("gan_stability", __doc__, measure=measure, check=check, parts=parts, draw=draw)
