"""Twenty layers of norm 1.5 amplify by 1.5^20 = 3325: what depth does, and what jsn does about it.

    python examples/cascade.py [--smoke]

The norm of a composition is at most the product of the norms. First without any training: twenty
layers of one given norm. Then with it: classifiers of twenty layers, whose norms go where the loss
drives them. For each, how far a small disturbance of a picture can spread at each depth (the norm
of the Jacobian), and how far it spreads in a random direction.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _gallery import BLUE, GREEN, GREY, ORANGE, lines, main, spread
from sklearn.datasets import load_digits

import jsn
from benchmarks._report import table

DEPTH, WIDTH = 20, 64
GIVEN = (0.8, 1.0, 1.1, 1.5)


# --8<-- [start:model]
def max_min(x: jax.Array) -> jax.Array:
    """Sorts pairs: it bends as relu does, but neither stretches nor shrinks."""
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    return jnp.concatenate([pairs.max(axis=-1), pairs.min(axis=-1)], axis=-1)


class Cascade(nn.Module):
    """Many layers and a head; also returns what comes out of each layer."""

    depth: int
    activation: Any = nn.relu
    kernel_init: Any = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        outputs = []
        for _ in range(self.depth):
            x = self.activation(nn.Dense(WIDTH, kernel_init=self.kernel_init)(x))
            outputs.append(x)
        return nn.Dense(10)(x), jnp.stack(outputs)


orthogonal = nn.initializers.orthogonal()
NormalizedCascade = jsn.linen.spectral_norm(Cascade)
MODELS = {
    "plain, relu": Cascade(DEPTH, kernel_init=nn.initializers.he_normal()),
    "jsn, relu": NormalizedCascade(DEPTH, kernel_init=orthogonal),
    "jsn, max_min": NormalizedCascade(DEPTH, max_min, orthogonal),
}
# --8<-- [end:model]


def train(model: nn.Module, steps: int, digits: tuple, key: jax.Array) -> Any:
    """Trains by cross entropy; logits of a network of norm 1 are small, so they are scaled."""
    x, y = digits
    init_key, data_key = jax.random.split(key)
    variables = model.init(init_key, x[:1])
    scale = 10.0 if "sn_state" in variables else 1.0
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-3, steps))

    def step(carry: Any, key: jax.Array) -> tuple[Any, None]:
        variables, opt_state = carry
        rows = jax.random.randint(key, (64,), 0, len(x))

        def loss(params: Any) -> tuple[jax.Array, Any]:
            now = {**variables, "params": params}
            (logits, _), new = model.apply(now, x[rows], mutable=["sn_state"])
            loss = optax.softmax_cross_entropy_with_integer_labels(scale * logits, y[rows])
            return loss.mean(), new

        grads, new = jax.grad(loss, has_aux=True)(variables["params"])
        updates, opt_state = optimizer.update(grads, opt_state)
        params = optax.apply_updates(variables["params"], updates)
        return ({**variables, **new, "params": params}, opt_state), None

    start = (variables, optimizer.init(variables["params"]))
    return jax.lax.scan(step, start, jax.random.split(data_key, steps))[0][0]


def jacobians(model: nn.Module, variables: Any, x: jax.Array) -> jax.Array:
    """Of each layer's output, for each picture: shape `(pictures, layers, outputs, inputs)`."""
    outputs = lambda image: model.apply(variables, image[None])[1][:, 0]
    return jax.lax.map(jax.jacfwd(outputs), x)


def amplification(jacobians: Any) -> dict[str, np.ndarray]:
    """At each depth: the largest stretch over pictures and directions, and the typical one.

    Typical is the root mean square over pictures and over all directions.
    """
    found = np.linalg.svd(np.asarray(jacobians), compute_uv=False)
    worst = found[..., 0].max(axis=-2)
    return {"worst": worst, "typical": np.sqrt((found**2).mean(axis=(-3, -1)))}


def measure(smoke: bool, progress: Any) -> dict[str, Any]:
    data = load_digits()
    images, labels = jnp.asarray(data.data / 16, jnp.float32), jnp.asarray(data.target)
    n_train = 1400
    shown = images[n_train : n_train + (4 if smoke else 50)]
    depth = 4 if smoke else DEPTH
    names = ["jsn, max_min"] if smoke else MODELS
    models = {name: MODELS[name].copy(depth=depth) for name in names}
    seeds, steps = list(range(1 if smoke else 5)), 20 if smoke else 1000
    rows = []
    for norm in progress.track([1.5] if smoke else GIVEN, description="a given norm"):
        model = Cascade(depth, max_min, nn.initializers.orthogonal(norm))
        found = jax.jit(partial(jacobians, model))(model.init(jax.random.key(0), shown), shown)
        rows.append({"model": f"norm {norm}", "given": norm, **amplification(found)})

    @partial(jax.jit, static_argnums=0)
    def run(model: nn.Module, key: jax.Array) -> tuple:
        variables = train(model, steps, (images[:n_train], labels[:n_train]), key)
        guesses = model.apply(variables, images[n_train:])[0].argmax(-1)
        accuracy = (guesses == labels[n_train:]).mean()
        return variables, accuracy, jacobians(model, variables, shown)

    task = progress.add_task("trained", total=len(models) * len(seeds))
    for name, model in models.items():
        found = []
        for seed in seeds:
            variables, accuracy, jacobian = jax.device_get(run(model, jax.random.key(seed)))
            one = {"accuracy": accuracy, "product": product(variables)}
            found.append({**one, **amplification(jacobian)})
            progress.advance(task)
        rows.append({"model": name, **{key: [x[key] for x in found] for key in found[0]}})
    return {"depth": depth, "seeds": seeds, "steps": steps, "rows": rows}


def product(variables: Any) -> float:
    """The product of the true norms of all layers but the head as the network uses them, by SVD."""
    params = variables["params"]
    if "sn_state" in variables:
        params, _ = jsn.normalize(params, variables["sn_state"], n_steps=0)
    kernels = [
        np.asarray(params[f"Dense_{i}"]["kernel"], np.float64) for i in range(len(params) - 1)
    ]
    return float(np.prod([np.linalg.norm(kernel, 2) for kernel in kernels]))


def check(result: dict[str, Any]) -> None:
    for row in result["rows"]:
        if "given" in row:  # orthogonal layers stretch everything alike: exactly norm^20
            assert np.allclose(row["worst"][-1], row["given"] ** result["depth"], rtol=1e-3), row[
                "model"
            ]
            continue
        last = np.array(row["worst"])[:, -1]
        assert (last <= np.array(row["product"]) * (1 + 1e-4)).all(), row["model"]
        if row["model"].startswith("jsn"):
            assert (np.array(row["worst"]) <= 1.02).all(), "jsn: more than the bound"
    if len(result["rows"]) > 2:  # the full run
        plain = next(row for row in result["rows"] if row["model"].startswith("plain"))
        assert np.min(plain["worst"], axis=0)[-1] > 2, "plain: no amplification to speak of"


def parts(result: dict[str, Any]) -> dict[str, str]:
    last = lambda row, what: spread(np.atleast_2d(np.array(row[what], float))[:, -1])
    trained = [
        [
            row["model"],
            spread(row["product"]),
            last(row, "worst"),
            last(row, "typical"),
            spread(row["accuracy"], ".1f", 100),
        ]
        for row in result["rows"]
        if "accuracy" in row
    ]
    given = [
        [
            row["model"],
            f"{row['given'] ** result['depth']:.4g}",
            last(row, "worst"),
            last(row, "typical"),
        ]
        for row in result["rows"]
        if "given" in row
    ]
    head = ["", "product of the norms", "largest amplification", "typical amplification"]
    name, _, worst, *_ = trained[0]
    jsn_worst = trained[-1][2]
    return {
        "headline": f"Largest amplification by twenty trained layers: {worst} ({name}), "
        f"{jsn_worst} ({trained[-1][0]}).",
        "given": table(head, given),
        "trained": table([*head, "accuracy, %"], trained),
    }


def draw(result: dict[str, Any], figure: Any) -> None:
    left, right = figure.subplots(1, 2)
    depth = np.arange(1, result["depth"] + 1)
    given = [row for row in result["rows"] if "given" in row]
    for row, shade in zip(given, np.linspace(0.35, 1, len(given)), strict=True):
        color = BLUE if row["given"] == 1 else ORANGE
        left.plot(depth, row["worst"], color=color, alpha=1 if color == BLUE else shade)
        left.annotate(
            f" {row['given']}$^{{{len(depth)}}}$ = {row['given'] ** len(depth):.4g}",
            (depth[-1], row["worst"][-1]),
            va="center",
        )
    left.set(title="Untrained: each layer has this norm", xlim=(1, 29))
    colors = dict(zip(MODELS, (ORANGE, GREEN, BLUE), strict=True))
    for row in result["rows"]:
        if "accuracy" in row:
            color = colors[row["model"]]
            lines(right, depth, row["worst"], f"{row['model']}: largest", color=color)
            lines(right, depth, row["typical"], "typical direction", color=color, ls=":")
    right.set(title="Trained on digits, five seeds", xlim=(1, DEPTH))
    right.axhline(1, color=GREY, lw=0.8)
    right.legend(fontsize=8, loc="lower left")
    for axes in (left, right):
        axes.set(yscale="log", xlabel="layer", xticks=[1, 5, 10, 15, 20])
        axes.grid(alpha=0.25)
    left.set_ylabel("a small disturbance is multiplied by")


if __name__ == "__main__":
    main("cascade", __doc__, measure=measure, check=check, parts=parts, draw=draw)
