"""Station 7. The linen layers that jsn knows: which parameter is which linear map.

In: a layer and the input of one of its calls. Out: the exact operator of its weight, or why there
is none; and the linear part of a layer. Every layer is described here, and only here. Must not know
how calls are observed, nor anything about lifted axes, rules or state.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import numpy as np
from opt_einsum.parser import parse_einsum_input

from jsn._conv import Conv
from jsn._operator import Matrix, size
from jsn._types import Operator


def _tuple(value: Any) -> tuple:
    return tuple(value) if hasattr(value, "__iter__") else (value,)


def _matrix(module: Any, inputs: Any) -> Operator:
    del module, inputs
    return Matrix()


def _offset(module: Any, *args: Any, **kwargs: Any) -> None:
    del module, args, kwargs


def _dense_general(module: nn.DenseGeneral, inputs: Any, *, per_head: bool) -> Operator:
    del inputs
    n_out, n_in = len(_tuple(module.features)), len(_tuple(module.axis))
    if per_head and isinstance(module.parent, nn.MultiHeadDotProductAttention):
        if n_out > 1:  # query, key and value: (in, heads, head_dim)
            return Matrix(out_axis=-1, batch_axis=-2)
        if n_in > 1:  # out: (heads, head_dim, out)
            return Matrix(out_axis=-1, batch_axis=0)
    batch = tuple(range(len(_tuple(module.batch_dims))))
    return Matrix(out_axis=tuple(range(-n_out, 0)), batch_axis=batch)


def _einsum(module: nn.Einsum, inputs: Any, einsum_str: str | None = None) -> Operator | str:
    text = (einsum_str or module.einsum_str or "").replace(" ", "")
    shapes = (np.empty(inputs.shape), np.empty(module.shape))
    operands, result, _ = parse_einsum_input((text, *shapes))
    data, kernel = operands.split(",")
    letters = list(enumerate(kernel))
    ins = [axis for axis, letter in letters if letter in data and letter not in result]
    outs = [axis for axis, letter in letters if letter not in data and letter in result]
    batch = [axis for axis, letter in letters if letter in data and letter in result]
    if not ins or not outs or len(ins) + len(outs) + len(batch) < len(letters):
        return f"as {text} it is no matrix"
    return Matrix(ins, outs, batch)


def _conv(module: Any, inputs: Any) -> Operator | str:
    if isinstance(module, nn.ConvLocal):
        return "it holds a kernel for each place of the output"
    if module.mask is not None:
        return "the layer masks it"
    transpose = isinstance(module, nn.ConvTranspose)
    if transpose and module.transpose_kernel:
        return "the layer uses transpose_kernel=True, which jsn.Conv does not describe"
    if not transpose and not {*_tuple(module.input_dilation)} <= {1, None}:
        return "the layer dilates its input, which jsn.Conv does not describe"
    shape = inputs.shape[-len(_tuple(module.kernel_size)) - 1 :]
    groups = 1 if transpose else module.feature_group_count
    strides, dilation = module.strides or 1, module.kernel_dilation or 1
    return Conv(shape, strides, module.padding, dilation, groups, transpose)


_NORMS = (nn.BatchNorm, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.InstanceNorm)
_LAYERS: dict[Callable, tuple[str, Callable]] = {
    inspect.unwrap(method): entry
    for method, entry in (
        (nn.Dense.__call__, ("kernel", _matrix)),
        (nn.recurrent.DenseParams.__call__, ("kernel", _matrix)),  # within OptimizedLSTMCell
        (nn.DenseGeneral.__call__, ("kernel", _dense_general)),
        (nn.Einsum.__call__, ("kernel", _einsum)),
        (nn.Conv.__call__, ("kernel", _conv)),  # this is also the code of ConvLocal
        (nn.ConvTranspose.__call__, ("kernel", _conv)),
        (nn.Embed.__call__, ("embedding", _matrix)),
        (nn.Embed.attend, ("embedding", _matrix)),
        *((norm.__call__, ("scale", _offset)) for norm in _NORMS),
    )
}
"""The code of each known layer, the parameter that it multiplies by, and what reads it.

By code, not by class: a subclass with code of its own is another layer.
"""


def read(
    module: nn.Module, code: Any, args: Any, kwargs: Any, per_head: bool
) -> tuple[str, Operator | str | None]:
    """The parameter that a call of a known layer multiplies by, and what it makes of it.

    The parameter is "" for code that is not of a known layer. The operator is None where the
    parameter is no linear map of the layer's input, and a text where it cannot be read.
    """
    name, reader = _LAYERS.get(code, ("", None))
    if reader is None:
        return "", None
    if type(module).param is not nn.Module.param:
        return name, f"{type(module).__name__} changes its parameters before it uses them"
    if reader is _dense_general:
        reader = functools.partial(reader, per_head=per_head)
    return name, reader(module, *args, **kwargs)


_LINEAR = (nn.Dense, nn.DenseGeneral, nn.Conv, nn.ConvTranspose)
_OWN_ARITHMETIC = (
    "dot_general",
    "dot_general_cls",
    "conv_general_dilated",
    "conv_general_dilated_cls",
    "promote_dtype",
)
"""Fields by which a caller changes what a layer computes: it need not be linear any more."""


def is_linear(module: nn.Module) -> bool:
    """Whether a layer gives what is linear in its kernel, plus its bias, if any."""
    cls = type(module)
    if cls not in _LINEAR or getattr(module, "batch_dims", ()):
        return False
    changed = (getattr(module, x, None) is not getattr(cls, x, None) for x in _OWN_ARITHMETIC)
    return not any(changed)


def n_outputs(module: Any, kernel: tuple[int, ...], inputs: tuple[int, ...]) -> int:
    """About how many numbers a linear layer gives, from the shapes of its kernel and its input."""
    if isinstance(module, nn.Dense | nn.DenseGeneral):
        n_in = len(_tuple(getattr(module, "axis", -1)))
        return size(inputs) * size(kernel[n_in:]) // max(1, size(kernel[:n_in]))
    n_window = len(kernel) - 2
    strides = np.broadcast_to(np.array(_tuple(module.strides or 1)), n_window)
    places = np.array(inputs[-n_window - 1 : -1])
    transpose = isinstance(module, nn.ConvTranspose)
    places = places * strides if transpose else -(-places // strides)
    return size(inputs[: -n_window - 1]) * int(places.prod()) * kernel[-1]
