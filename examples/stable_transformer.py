"""sigmaReparam: a transformer without LayerNorm and without warm-up, at four learning rates.

    python examples/stable_transformer.py [--smoke]

Zhai et al. 2023: every weight is divided by its norm and multiplied by a learned number, so that
its norm can move only as fast as one parameter does. Characters of the descriptions that
scikit-learn ships with its data sets; a plain transformer, one with LayerNorm, one with jsn.

References:
    Zhai et al. 2023, Stabilizing Transformer Training by Preventing Attention Entropy Collapse,
    https://arxiv.org/abs/2303.06296
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _gallery import BLUE, GREEN, GREY, ORANGE, lines, main, spread
from sklearn import datasets

import jsn
from benchmarks._report import table

RATES = (1e-3, 3e-3, 1e-2, 3e-2)
LENGTH, BATCH, WIDTH = 48, 16, 32
TAIL = 30  # steps over which the last losses are averaged
LOST = 100.0  # bits per character above which a run counts as diverged


# --8<-- [start:model]
class Transformer(nn.Module):
    """Predicts the next character at each position, causally."""

    n_characters: int
    depth: int = 6
    layer_norm: bool = False

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        norm = (lambda x: nn.LayerNorm()(x)) if self.layer_norm else (lambda x: x)
        place = self.param("place", nn.initializers.normal(0.5), (LENGTH, WIDTH))
        x = nn.Embed(self.n_characters, WIDTH)(tokens) + place[: tokens.shape[1]]
        mask = nn.make_causal_mask(tokens)
        for _ in range(self.depth):
            x += nn.MultiHeadDotProductAttention(4)(norm(x), mask=mask)
            x += nn.Dense(WIDTH)(nn.gelu(nn.Dense(4 * WIDTH)(norm(x))))
        return nn.Dense(self.n_characters)(norm(x))


def reparametrize(model: Transformer, params: Any, tokens: jax.Array) -> tuple[Any, Any]:
    """The state of jsn, and a learned scale of 1 for each weight it normalizes.

    The model itself is asked for the axes of its attention kernels; tables are left alone.
    """
    leave = ((r"embedding$", None), (r"place$", None))
    sn_state = jsn.init(params, rules=jsn.linen.operators(model, tokens, rules=leave))
    return sn_state, jax.tree.map(jnp.ones_like, jsn.sigmas(params, sn_state))


# In the loss: weights, sn_state = jsn.normalize(params, sn_state, scale=scales)
# --8<-- [end:model]

KINDS = ("plain", "LayerNorm", "jsn, learned scale")


def read_text() -> tuple[np.ndarray, int]:
    """The descriptions of six data sets, one after the other, as numbers."""
    loaders = (
        datasets.load_iris,
        datasets.load_wine,
        datasets.load_digits,
        datasets.load_diabetes,
        datasets.load_breast_cancer,
        datasets.load_linnerud,
    )
    text = "".join(load().DESCR for load in loaders)
    characters = sorted(set(text))
    return np.array([characters.index(c) for c in text], np.int32), len(characters)


@partial(jax.jit, static_argnames=("model", "with_jsn", "steps"))
def train(
    model: Transformer, with_jsn: bool, steps: int, text: jax.Array, rate: jax.Array, key: jax.Array
) -> dict[str, Any]:
    """Adam at one constant rate from the first step on; losses are bits per character."""
    init_key, data_key = jax.random.split(key)
    shown = jnp.zeros((1, LENGTH), int)
    params, sn_state, scales = model.init(init_key, shown)["params"], None, None
    if with_jsn:
        sn_state, scales = reparametrize(model, params, shown)
    optimizer = optax.adam(rate)

    def step(carry: Any, key: jax.Array) -> tuple[Any, Any]:
        learned, sn_state, opt_state = carry
        starts = jax.random.randint(key, (BATCH, 1), 0, len(text) - LENGTH - 1)
        window = text[starts + jnp.arange(LENGTH + 1)]

        def loss_fn(learned: Any) -> tuple[jax.Array, Any]:
            weights, scales = learned
            new = None
            if sn_state is not None:
                weights, new = jsn.normalize(weights, sn_state, scale=scales)
            logits = model.apply({"params": weights}, window[:, :-1])
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, window[:, 1:])
            return loss.mean() / jnp.log(2), new

        (loss, new), grads = jax.value_and_grad(loss_fn, has_aux=True)(learned)
        updates, opt_state = optimizer.update(grads, opt_state)
        return (optax.apply_updates(learned, updates), new, opt_state), loss

    learned = (params, scales)
    start = (learned, sn_state, optimizer.init(learned))
    (learned, sn_state, _), losses = jax.lax.scan(step, start, jax.random.split(data_key, steps))
    params, scales = learned
    if sn_state is not None:
        params = jsn.normalize(params, sn_state, n_steps=0, scale=scales)[0]
    return {"loss": losses, "params": params, "scales": scales}


def largest_norm(params: Any) -> float:
    """Of the layers as the network uses them, by SVD; attention kernels by their axes."""
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params)):
        return np.nan
    norms = [0.0]
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if jax.tree_util.keystr(path).endswith("['kernel']"):
            rows = leaf.shape[0] if "['out']" not in jax.tree_util.keystr(path) else -1
            matrix = leaf.reshape(rows, -1) if rows > 0 else leaf.reshape(-1, leaf.shape[-1])
            norms.append(np.linalg.norm(np.asarray(matrix, np.float64), 2))
    return float(max(norms))


def measure(smoke: bool, progress: Any) -> dict[str, Any]:
    text, n_characters = read_text()
    kinds, rates, seeds, steps, depth = KINDS, RATES, [0, 1, 2], 400, 6
    if smoke:
        kinds, rates, seeds, steps, depth = KINDS[-1:], (1e-2,), [0], 30, 1
    rows = []
    task = progress.add_task("transformers", total=len(kinds) * len(rates) * len(seeds))
    for kind in kinds:
        model = Transformer(n_characters, depth, layer_norm=kind == "LayerNorm")
        for rate in rates:
            curves, norms = [], []
            for seed in seeds:
                key = jax.random.key(seed)
                done = jax.device_get(
                    train(model, kind == KINDS[-1], steps, jnp.asarray(text), rate, key)
                )
                curves.append(np.where(np.isfinite(done["loss"]), done["loss"], np.nan))
                norms.append(largest_norm(done["params"]))
                if done["scales"] is not None:
                    largest = max(np.abs(leaf) for leaf in jax.tree.leaves(done["scales"]))
                    assert abs(norms[-1] / largest - 1) < 0.02, "a norm is not its learned scale"
                progress.advance(task)
            last = [float(curve[-TAIL:].mean()) for curve in curves]
            thinned = [curve.reshape(-1, 10).mean(1) for curve in curves]
            row = {"model": kind, "rate": rate, "bits": last, "norm": norms, "curves": thinned}
            rows.append(row)
    counts = np.bincount(text) / len(text)
    entropy = float(-(counts[counts > 0] * np.log2(counts[counts > 0])).sum())
    return {"seeds": seeds, "steps": steps, "entropy": entropy, "rows": rows}


def check(result: dict[str, Any]) -> None:
    bits = {key: np.nan_to_num(values, nan=np.inf) for key, values in last_bits(result).items()}
    rates = sorted({rate for _, rate in bits})
    for rate in rates:
        limit = result["entropy"] if len(rates) > 1 else 6.0  # smoke: a few steps
        assert (bits[KINDS[-1], rate] < limit).all(), f"jsn: has not learned anything at {rate}"
    if len(rates) > 1:
        assert np.median(bits["plain", rates[-1]]) == np.inf, "plain: trains at the highest rate"


def last_bits(result: dict[str, Any]) -> dict[tuple, np.ndarray]:
    """By network and rate: what each seed ends with, NaN where it diverged."""
    values = {(r["model"], r["rate"]): np.array(r["bits"], float) for r in result["rows"]}
    return {key: np.where(value < LOST, value, np.nan) for key, value in values.items()}


def parts(result: dict[str, Any]) -> dict[str, str]:
    kinds = list(dict.fromkeys(row["model"] for row in result["rows"]))
    rates = sorted({row["rate"] for row in result["rows"]})
    bits = last_bits(result)
    norms = {(row["model"], row["rate"]): row["norm"] for row in result["rows"]}
    grid = lambda cells: [[k, *[spread(cells[k, r]) for r in rates]] for k in kinds]
    head = ["", *[f"{rate:g}" for rate in rates]]
    top = rates[-1]
    fast = "; ".join(f"{kind} {spread(bits[kind, top])}" for kind in kinds)
    return {
        "headline": f"Bits per character at a learning rate of {top:g}: {fast}.",
        "bits": table(head, grid(bits)),
        "norm": table(head, grid(norms)),
        "entropy": f"Knowing only how frequent each character is gives {result['entropy']:.2f}; "
        f"above {LOST:g} a run counts as diverged.",
    }


def draw(result: dict[str, Any], figure: Any) -> None:
    rates = sorted({row["rate"] for row in result["rows"]})
    panels = figure.subplots(1, len(rates), sharey=True, squeeze=False)[0]
    colors = dict(zip(KINDS, (ORANGE, GREEN, BLUE), strict=True))
    for axes, rate in zip(panels, rates, strict=True):
        for row in result["rows"]:
            if row["rate"] == rate:
                steps = 10 * np.arange(len(row["curves"][0])) + 5
                lines(axes, steps, row["curves"], row["model"], color=colors[row["model"]])
        axes.axhline(result["entropy"], color=GREY, lw=0.8, ls=":")
        axes.set(title=f"learning rate {rate:g}", xlabel="step", ylim=(2.5, 8))
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("bits per character")
    panels[-1].legend(fontsize=8)


if __name__ == "__main__":
    main("stable_transformer", __doc__, measure=measure, check=check, parts=parts, draw=draw)
