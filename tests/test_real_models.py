"""Whole models as their users write them, with rules="operators" and no rule by hand.

The norms are those of Flax's own layers (`layers.py`), by SVD of their Jacobians.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pages
import pytest
from flax import traverse_util
from layers import layer_norms

import jsn

# --- a vision transformer -------------------------------------------------------------------------


class MlpBlock(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        y = nn.gelu(nn.Dense(self.width)(x))
        return nn.Dense(x.shape[-1])(y)


class EncoderBlock(nn.Module):
    heads: int
    width: int

    @nn.compact
    def __call__(self, x, train):
        y = nn.LayerNorm()(x)
        y = nn.MultiHeadDotProductAttention(self.heads, dropout_rate=0.1)(
            y, deterministic=not train
        )
        x = x + nn.Dropout(0.1, deterministic=not train)(y)
        return x + MlpBlock(self.width)(nn.LayerNorm()(x))


class ViT(nn.Module):
    depth: int = 2
    dim: int = 16

    @nn.compact
    def __call__(self, images, train=True):
        x = nn.Conv(self.dim, (4, 4), strides=(4, 4), padding="VALID", name="embedding")(images)
        x = x.reshape(len(x), -1, self.dim)
        token = self.param("cls", nn.initializers.zeros, (1, 1, self.dim))
        x = jnp.concatenate([jnp.tile(token, (len(x), 1, 1)), x], axis=1)
        normal = nn.initializers.normal(stddev=0.02)
        x = x + self.param("pos_embedding", normal, (1, x.shape[1], self.dim))
        for _ in range(self.depth):
            x = EncoderBlock(4, 2 * self.dim)(x, train)
        return nn.Dense(10, name="head")(nn.LayerNorm()(x)[:, 0])


# --- a residual network ---------------------------------------------------------------------------


class ResidualBlock(nn.Module):
    filters: int
    strides: int = 1

    @nn.compact
    def __call__(self, x, train):
        conv = functools.partial(nn.Conv, use_bias=False)
        norm = functools.partial(nn.BatchNorm, use_running_average=not train)
        y = nn.relu(norm()(conv(self.filters, (3, 3), self.strides)(x)))
        y = norm(scale_init=nn.initializers.zeros)(conv(self.filters, (3, 3))(y))
        if x.shape != y.shape:
            x = norm(name="norm_proj")(
                conv(self.filters, (1, 1), self.strides, name="conv_proj")(x)
            )
        return nn.relu(x + y)


class ResNet(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        x = nn.Conv(8, (7, 7), (2, 2), padding=[(3, 3), (3, 3)], use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
        for filters, strides in ((8, 1), (16, 2)):
            x = ResidualBlock(filters, strides)(x, train)
        return nn.Dense(10)(x.mean((1, 2)))


# --- a U-Net --------------------------------------------------------------------------------------


class DoubleConv(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x, train):
        for _ in range(2):
            x = nn.Conv(self.features, (3, 3))(x)
            x = nn.relu(nn.GroupNorm(4)(x))
        return x


class UNet(nn.Module):
    widths: tuple[int, ...] = (4, 8)

    @nn.compact
    def __call__(self, x, train=True):
        skips = []
        for width in self.widths:
            x = DoubleConv(width)(x, train)
            skips.append(x)
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = DoubleConv(8)(x, train)
        for width, skip in zip(self.widths[::-1], skips[::-1], strict=True):
            x = nn.ConvTranspose(width, (3, 3), strides=(2, 2))(x)
            x = DoubleConv(width)(jnp.concatenate([x, skip], axis=-1), train)
        return nn.Conv(10, (1, 1))(x).mean((1, 2))


# --- a recurrent classifier -----------------------------------------------------------------------


class LSTMClassifier(nn.Module):
    @nn.compact
    def __call__(self, tokens, train=True):
        x = nn.Embed(20, 12)(tokens)
        forward = nn.RNN(nn.OptimizedLSTMCell(10))
        x = nn.Bidirectional(forward, nn.RNN(nn.OptimizedLSTMCell(10)))(x)
        x = nn.Dropout(0.2, deterministic=not train)(x[:, -1])
        return nn.Dense(10)(nn.relu(nn.Dense(16)(x)))


IMAGES = np.random.default_rng(0).standard_normal((4, 16, 16, 3)).astype(np.float32)
MODELS = {
    "vit": (ViT, IMAGES, 2 * 6 + 2),
    "resnet": (ResNet, IMAGES, 7),
    "unet": (UNet, IMAGES[:, :8, :8], 13),
    "lstm": (LSTMClassifier, np.random.default_rng(0).integers(0, 20, (4, 9)), 2 * 8 + 3),
}


def train(model, variables, x, steps):
    """A few steps with large updates; returns the variables after them."""
    optimizer = optax.adam(1e-2)
    labels = jnp.arange(len(x)) % 10
    params, rest = variables["params"], {k: v for k, v in variables.items() if k != "params"}

    @jax.jit
    def step(params, rest, moments, key):
        def loss(params):
            logits, updates = model.apply(
                {"params": params, **rest}, x, mutable=list(rest), rngs={"dropout": key}
            )
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), updates

        slope, updates = jax.grad(loss, has_aux=True)(params)
        change, moments = optimizer.update(slope, moments)
        return optax.apply_updates(params, change), updates, moments

    moments = optimizer.init(params)
    for i in range(steps):
        params, rest, moments = step(params, rest, moments, jax.random.key(i))
    return {"params": params, **rest}


def true_norms(model, variables, x):
    """The norms of all layers with the weights that an evaluation uses."""
    as_applied = jax.jit(functools.partial(jsn.normalize, n_steps=0))
    params, _ = as_applied(variables["params"], variables["sn_state"])
    plain = {k: v for k, v in variables.items() if k not in ("params", "sn_state")}
    norms = layer_norms(model, {"params": params, **plain}, x, train=False)
    for path, leaf in traverse_util.flatten_dict(params, sep="/").items():
        gate = path.endswith("/kernel") and path.removesuffix("/kernel") not in norms
        if path.endswith("/embedding") or gate:  # not layers of their own, or within a loop
            norms[path] = np.linalg.norm(np.asarray(leaf, np.float64), 2)
    return norms


@functools.cache
def initialized(name):
    """A decorated model and its variables."""
    cls, x, _ = MODELS[name]
    model = jsn.linen.spectral_norm(cls, rules="operators")()
    return model, jax.jit(model.init)(jax.random.key(0), x)


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("resnet", "unet")]


@pytest.mark.parametrize("name", ["vit", "lstm", *SLOW])
def test_every_layer_has_norm_one_at_first(name):
    cls, x, n_weights = MODELS[name]
    _, variables = initialized(name)
    assert len(variables["sn_state"]["spectral_norm"].operators) == n_weights
    norms = true_norms(cls(), variables, x)
    assert len(norms) == n_weights
    assert norms == pytest.approx(dict.fromkeys(norms, 1), abs=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_every_layer_has_norm_one_after_training(name):
    cls, x, n_weights = MODELS[name]
    variables = train(*initialized(name), x, 15)
    norms = true_norms(cls(), variables, x)
    assert len(norms) == n_weights
    assert norms == pytest.approx(dict.fromkeys(norms, 1), abs=1e-2)


@pytest.mark.slow
def test_the_default_rules_leave_convolutions_with_a_larger_norm():
    """The twin that shows the measurement: Miyato's reshape, on the residual network."""
    cls, x, _ = MODELS["resnet"]
    variables = jax.jit(jsn.linen.spectral_norm(cls)().init)(jax.random.key(0), x)
    norms = true_norms(cls(), variables, x)
    assert norms["Dense_0"] == pytest.approx(1, abs=2e-3)
    assert norms["Conv_0"] > 1.3


@pytest.mark.slow
def test_the_page_on_convolutions_runs(capsys):
    names = pages.run("convolutions.md")
    printed = capsys.readouterr().out.splitlines()
    page = (pages.DOCS / "convolutions.md").read_text()
    assert len(printed) == 4
    assert all(f"# {line}\n" in page for line in printed[:3])
    assert np.abs(names["guess"] - names["x"]).max() < 1e-5
    assert names["rules"][0] == ("experts/kernel$", jsn.Matrix(batch_axis=0))
