"""Station 2. A convolution kernel as a linear map: `Conv`.

In: a kernel, and all that its layer does with it: the size of its input, strides, padding,
dilation, groups. Out: products of the convolution itself, and of its transpose, with blocks of
images; the block axis is the batch axis of the convolution, and nothing is flattened.
Must not know about rules, trees, power iteration, state or any layer class.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from jsn import _errors
from jsn._conv_axis import Axis, Pads, extend, fold
from jsn._operator import Matrix, explicit_spec
from jsn._types import Block, Sigma, Weight

_FORWARD = ("SAME", "VALID", "SAME_LOWER", "CIRCULAR", "REFLECT", "CAUSAL")
_TRANSPOSED = ("SAME", "VALID", "CIRCULAR")


@dataclasses.dataclass(frozen=True)
class Conv:
    """A convolution kernel as the map of its layer, from one whole image to another.

    Its norm is the true operator norm of the convolution, where `Matrix` gives the norm of the
    kernel reshaped to a matrix: up to three times smaller for a 3 x 3 kernel, and for a grouped
    one up to sqrt(groups) times larger (`docs/convolutions.md`). One step costs the forward and the
    backward pass of the layer on `block_size` images.

    Args:
        input_shape: Spatial sizes and then channels of one example, `(32, 32, 3)`: the norm
            depends on them. One, two or three spatial axes.
        strides: One number, or one for each spatial axis. With `transpose` the upsampling.
        padding: What `flax.linen.Conv` accepts: "SAME", "VALID", "CIRCULAR", "REFLECT",
            "CAUSAL", a number, or a number or (low, high) for each spatial axis. With
            `transpose`, what `flax.linen.ConvTranspose` accepts.
        kernel_dilation: One number, or one for each spatial axis.
        feature_group_count: Groups of channels; the kernel is `(*window, in / groups, out)`.
        transpose: `flax.linen.ConvTranspose` with `transpose_kernel=False`.

    Raises:
        ValueError: If an argument is of the wrong kind, or a length does not fit `input_shape`.

    Examples:
        >>> import jax.numpy as jnp, jsn
        >>> params = {"Conv_0": {"kernel": jnp.ones((3, 3, 1, 1)) / 9}}  # a blur
        >>> rules = [("Conv_0/kernel", jsn.Conv((64, 64, 1)))]
        >>> sigma = jsn.sigmas(params, jsn.init(params, rules=rules))["Conv_0"]["kernel"]
        >>> print(f"{sigma:.2f}")  # the reshaped kernel has norm 0.33
        1.00

    References:
        Gouk et al. 2018, Regularisation of Neural Networks by Enforcing Lipschitz Continuity,
        section 3.2, https://arxiv.org/abs/1804.04368. Farnia et al. 2019, Generalizable
        Adversarial Training via Spectral Normalization, https://arxiv.org/abs/1811.07457.
    """

    input_shape: Sequence[int]
    strides: int | Sequence[int] = 1
    padding: str | int | Sequence[int | tuple[int, int]] = "SAME"
    kernel_dilation: int | Sequence[int] = 1
    feature_group_count: int = 1
    transpose: bool = False
    _batch: tuple[int, ...] = dataclasses.field(default=(), init=False)

    def __post_init__(self):
        shape = _integers("input_shape", self.input_shape, None, 1)
        if len(shape) not in (2, 3, 4):
            raise ValueError(_errors.bad_conv(f"input_shape={self.input_shape!r}"))
        rank, groups = len(shape) - 1, self.feature_group_count
        for name, value in (
            ("input_shape", shape),
            ("strides", _integers("strides", self.strides, rank, 1)),
            ("kernel_dilation", _integers("kernel_dilation", self.kernel_dilation, rank, 1)),
            ("padding", _padding(self.padding, rank, self.transpose)),
            ("feature_group_count", *_integers("feature_group_count", groups, 1, 1)),
            ("transpose", bool(self.transpose)),
        ):
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        plain, shown = Conv(self.input_shape), [f"{self.input_shape}"]
        for field in dataclasses.fields(self)[1:-1]:
            value = getattr(self, field.name)
            if value != getattr(plain, field.name):
                one = field.name in ("strides", "kernel_dilation") and len(set(value)) == 1
                shown.append(f"{field.name}={value[0] if one else value!r}")
        ndim = len(self.input_shape) + 1 + len(self._batch)
        lifted = f".lifted({self._batch}, {ndim})" if self._batch else ""
        return f"Conv({', '.join(shown)}){lifted}"

    # --- shapes ---------------------------------------------------------------------------------

    def problem(self, shape: tuple[int, ...]) -> str | None:
        """Says why a kernel of this shape cannot be viewed this way, or None if it can."""
        *sizes, channels = self.input_shape
        expected = len(sizes) + 2 + len(self._batch)
        if len(shape) != expected or any(axis >= len(shape) for axis in self._batch):
            return (
                f"needs {expected} axes, (*window, in / groups, out), "
                f"for {len(sizes)} spatial sizes and channels {self.input_shape}"
            )
        if 0 in shape:
            return "is empty"
        *window, ins, outs = self._kernel(shape)
        groups = self.feature_group_count
        if self.transpose and groups > 1:
            return "a transposed convolution has no feature groups"
        if ins * groups != channels:
            return f"{ins} input channels in {groups} groups, input_shape has {channels}"
        if outs % groups:
            return f"{outs} output channels do not divide into {groups} groups"
        if min(axis.conv for axis in self._axes(window)) < 1:
            return f"window {tuple(window)} is larger than the padded input {tuple(sizes)}"
        return None

    def _kernel(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of one kernel, without batch axes."""
        return tuple(n for axis, n in enumerate(shape) if axis not in self._batch)

    def _axes(self, window: Sequence[int]) -> list[Axis]:
        rank = len(self.input_shape) - 1
        pads = (self.padding,) * rank if isinstance(self.padding, str) else self.padding
        given = (self.input_shape, window, self.strides, self.kernel_dilation, pads)
        return [Axis.of(*each, self.transpose) for each in zip(*given)]  # type: ignore  # noqa: B905

    def batch(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Sizes of the batch axes."""
        return tuple(shape[axis] for axis in self._batch)

    def domain(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Sizes of the input: spatial axes, then channels."""
        del shape
        return self.input_shape  # type: ignore

    def codomain(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Sizes of the output: spatial axes, then channels."""
        *window, _, channels = self._kernel(shape)
        return (*(axis.out for axis in self._axes(window)), channels)

    def spread(self, values: Sigma, shape: tuple[int, ...]) -> Array:
        """Puts one value for each batch entry on the kernel's own batch axes."""
        values = jnp.broadcast_to(values, self.batch(shape))
        return values.reshape([n if a in self._batch else 1 for a, n in enumerate(shape)])

    def lifted(self, axes: tuple[int, ...], ndim: int) -> Conv:
        """The same map for a kernel of rank `ndim` that has gained these batch axes."""
        kept = [axis for axis in range(ndim) if axis not in axes]
        batch = sorted((*axes, *(kept[axis] for axis in self._batch)))
        lifted = dataclasses.replace(self)
        object.__setattr__(lifted, "_batch", tuple(batch))
        return lifted

    def simplest(self, shape: tuple[int, ...]) -> Conv | Matrix:
        """The same norm as cheaply as it comes: a matrix where no two windows overlap.

        So it is for 1 x 1 kernels and for patches (stride at least the window): the convolution
        is then one and the same matrix at each place.
        """
        apart = all(axis.disjoint for axis in self._axes(self._kernel(shape)[:-2]))
        if not apart or self.feature_group_count > 1 or self._batch:
            return self
        return Matrix(in_axis=-2, out_axis=None) if self.transpose else Matrix()

    def contains(self, other: Conv, shape: tuple[int, ...]) -> bool:
        """Whether its norm is certainly at least that of `other`, which differs in input size."""
        window = self._kernel(shape)[:-2]
        pairs = zip(self._axes(window), other._axes(window), strict=True)
        return all(mine.size >= its.size and mine.contains(its) for mine, its in pairs)

    # --- products -------------------------------------------------------------------------------

    def matvec(self, W: Weight, v: Block) -> Block:
        """Convolves a block of inputs."""
        axes = self._axes(self._kernel(W.shape)[:-2])

        def one(K: Array, x: Array) -> Array:
            x = extend(x, axes)
            y = self._conv(x, K, [axis.pads for axis in axes])
            return fold(y, axes)

        return self._each(one, W, v)

    def rmatvec(self, W: Weight, u: Block) -> Block:
        """Convolves a block of outputs with the transpose of the map."""
        *window, _, channels = self._kernel(W.shape)
        axes = self._axes(window)

        def one(K: Array, y: Array) -> Array:
            shape = (len(y), *(axis.conv for axis in axes), channels)
            y = _transposed(lambda y: fold(y, axes), shape, y)
            x = self._conv(y, self._swapped(K), [axis.back for axis in axes], swap=True)
            shape = (len(y), *self.input_shape)
            return _transposed(lambda x: extend(x, axes), shape, x)

        return self._each(one, W, u)

    def _each(self, one: Callable, W: Weight, x: Block) -> Block:
        """Runs one convolution for each entry of the batch axes.

        In turn: XLA:CPU turns a batch of convolutions into a grouped one, which is twice to
        five times slower (eight 3 x 3 kernels of 64 channels: 102 ms against 23 ms).
        """
        dtype = np.promote_types(W.dtype, x.dtype)
        W = jnp.moveaxis(W.astype(dtype), self._batch, range(len(self._batch)))
        spec = explicit_spec(W)
        if spec is not None:  # channels stay where they are, unless they come in groups
            whole = len(spec) if self.feature_group_count > 1 else len(spec) - 2
            W = jax.sharding.reshard(W, PartitionSpec(*[None] * whole, *spec[whole:]))
        run = one
        for _ in self._batch:
            run = functools.partial(_in_turn, run)
        return run(W, x.astype(dtype))

    def _conv(self, x: Array, K: Array, pads: Sequence, swap: bool = False) -> Array:
        """The only convolution jsn forms: full precision, accumulated in the dtype of `x`."""
        rank, spec, place = len(pads), explicit_spec(K), {}
        if spec is not None and explicit_spec(x) is not None:
            alone = [None] * (rank + 1)
            x = jax.sharding.reshard(x, PartitionSpec(*alone, spec[-2]))
            out = PartitionSpec(*alone, spec[-1])
            place["out_sharding"] = NamedSharding(jax.typeof(x).sharding.mesh, out)
        space, one = "DHW"[-rank:], (1,) * rank
        down, up = (one, self.strides) if self.transpose != swap else (self.strides, one)
        return lax.conv_general_dilated(
            x,
            K,
            down,  # type: ignore
            pads,
            lhs_dilation=up,  # type: ignore
            rhs_dilation=self.kernel_dilation,  # type: ignore
            dimension_numbers=(f"N{space}C", f"{space}IO", f"N{space}C"),
            feature_group_count=self.feature_group_count,
            precision=lax.Precision.HIGHEST,
            preferred_element_type=x.dtype,
            **place,
        )

    def _swapped(self, K: Array) -> Array:
        """The kernel of the transpose: window reversed, input and output channels swapped.

        Laid out here, and not left to `jax.linear_transpose` of the convolution: that is as fast
        by itself, but inside a loop, such as the warm-up, XLA:CPU misses its fast path for it
        (a step of a 3 x 3 kernel of 64 channels on 32 x 32: 145 ms against 49 ms).
        """
        *window, ins, outs = K.shape
        groups = self.feature_group_count
        K = lax.rev(K, tuple(range(len(window))))
        if groups == 1:
            return jnp.swapaxes(K, -1, -2)
        K = K.reshape(*window, ins, groups, outs // groups)
        return jnp.swapaxes(K, -1, -3).reshape(*window, outs // groups, groups * ins)


def _transposed(fn: Callable[[Array], Array], shape: tuple[int, ...], y: Array) -> Array:
    """Applies the transpose of a linear function of arrays of this shape."""
    place = None if explicit_spec(y) is None else jax.typeof(y).sharding
    return jax.linear_transpose(fn, jax.ShapeDtypeStruct(shape, y.dtype, sharding=place))(y)[0]


def _in_turn(run: Callable, W: Array, x: Array) -> Array:
    return lax.map(lambda entry: run(*entry), (W, x))


# --- arguments ---------------------------------------------------------------------------------


def _integer(value: Any) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool)


def _integers(name: str, value: Any, rank: int | None, least: int) -> tuple[int, ...]:
    """An argument as a tuple of integers; one number stands for all spatial axes.

    Raises:
        ValueError: If it is anything else, or of another length than `rank`.
    """
    single = rank is not None and (value is None or _integer(value))
    entries = (1 if value is None else value,) * (rank or 1) if single else value
    if (
        not isinstance(entries, Sequence)
        or not all(_integer(n) and n >= least for n in entries)
        or len(entries) != (len(entries) if rank is None else rank)
    ):
        raise ValueError(_errors.bad_conv(f"{name}={value!r}"))
    return tuple(map(operator.index, entries))


def _padding(value: Any, rank: int, transpose: bool) -> str | Pads:
    """Padding as one of Flax's words, or as (low, high) for each spatial axis.

    Raises:
        ValueError: If Flax would not accept it either.
    """
    if isinstance(value, str):
        known = _TRANSPOSED if transpose else _FORWARD
        if value.upper() in known and (value.upper() != "CAUSAL" or rank == 1):
            return value.upper()
    else:
        entries = (value,) * rank if _integer(value) else value
        if isinstance(entries, Sequence) and len(entries) == rank:
            pairs = [(pad, pad) if _integer(pad) else pad for pad in entries]
            if all(
                isinstance(p, Sequence) and len(p) == 2 and all(map(_integer, p)) for p in pairs
            ):
                return tuple((operator.index(low), operator.index(high)) for low, high in pairs)
    raise ValueError(_errors.bad_conv(f"padding={value!r}"))
