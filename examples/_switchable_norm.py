"""Switchable normalization, which Flax does not have: a learned mix of instance, layer and batch.

In: images `(n, height, width, channels)`. Out: the same shape, normalized with a mean that is a
softmax-weighted sum of the three means, and a variance likewise. Must not know about GANs.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp


class SwitchableNorm(nn.Module):
    """Always with the statistics of this batch, as a GAN's critic uses it.

    References:
        Luo et al. 2018, Differentiable Learning-to-Normalize via Switchable Normalization,
        equations 3 and 5, https://arxiv.org/abs/1806.10779
    """

    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        mean_in = x.mean((1, 2), keepdims=True)
        var_in = x.var((1, 2), keepdims=True)
        # The other two follow from the first: means of means, and of second moments.
        square = var_in + mean_in**2
        mean_ln, mean_bn = mean_in.mean(3, keepdims=True), mean_in.mean(0, keepdims=True)
        var_ln = square.mean(3, keepdims=True) - mean_ln**2
        var_bn = square.mean(0, keepdims=True) - mean_bn**2
        p = nn.softmax(self.param("mean_weight", nn.initializers.zeros, (3,)))
        q = nn.softmax(self.param("var_weight", nn.initializers.zeros, (3,)))
        mean = p[0] * mean_in + p[1] * mean_ln + p[2] * mean_bn
        var = q[0] * var_in + q[1] * var_ln + q[2] * var_bn
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        x = (x - mean) * jax.lax.rsqrt(jnp.maximum(var, 0) + self.epsilon)
        return x * jnp.expand_dims(scale, (0, 1, 2)) + jnp.expand_dims(bias, (0, 1, 2))
