"""Station 11, arrays: tensors of any library to numpy, safetensors files, numpy to torch.

In: a tensor, or a path. Out: arrays that share no memory with what came in. Neither torch nor
any other library is imported, unless torch tensors are asked for. Pickles are never opened.
"""

from __future__ import annotations

import importlib.util
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jsn import _errors

_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
"""The dtypes of safetensors. Its numpy reader knows neither bfloat16 nor float8."""


def read_all(call: str, source: Any) -> dict[str, Any]:
    """Reads a state dict, or a safetensors file of one: jax arrays stay, the rest is copied.

    Raises:
        TypeError: If `source` is neither.
        ValueError: If a file or an entry cannot be read; all such entries at once.
        FileNotFoundError: If there is no such file.
        ImportError: If safetensors is needed and not installed.
    """
    if isinstance(source, str | os.PathLike):
        return _read_file(call, pathlib.Path(source))
    if not isinstance(source, Mapping):
        what = "a state dict (names to tensors) or the path of a .safetensors file"
        raise TypeError(_errors.not_importable(call, what, type(source).__name__))
    arrays, problems = {}, []
    for name, value in source.items():
        try:
            if not isinstance(name, str):
                raise TypeError(f"the name is a {type(name).__name__}, expected a string")
            arrays[name] = to_array(value)
        except Exception as error:  # whatever a foreign tensor raises: told with its name
            problems.append((str(name), str(error).splitlines()[0] if str(error) else repr(error)))
    if problems:
        fix = (
            "Expected names to dense tensors in memory. From a training checkpoint, hand over "
            "the state dict inside it, such as checkpoint['model']."
        )
        raise ValueError(_errors.bad_entries(call, problems, fix))
    return arrays


def to_array(value: Any) -> Any:
    """One tensor as an array: a jax array as it is, anything else as a copy in numpy.

    Torch tensors are recognized by their methods. What numpy has no dtype for (bfloat16, float8)
    goes by way of float32, which is exact.

    Raises:
        TypeError: If it is no tensor of numbers. Torch may raise errors of its own.
    """
    if isinstance(value, jax.Array):
        return value
    if hasattr(value, "detach") and hasattr(value, "cpu"):
        value = value.detach().cpu()
        name = str(value.dtype).removeprefix("torch.")
        extended = getattr(ml_dtypes, name, None)
        value = value.numpy() if extended is None else value.float().numpy().astype(extended)
    if not isinstance(value, np.ndarray | np.generic):
        raise TypeError(f"found {type(value).__name__}, expected a tensor")
    widest = {"b": 1, "i": 8, "u": 8, "f": 8, "c": 16}.get(value.dtype.kind, 0)
    if value.itemsize > widest and not _is_extended(value.dtype):
        raise TypeError(f"found dtype {value.dtype}, expected numbers")
    return np.array(value, value.dtype.newbyteorder("="))


def _is_extended(dtype: np.dtype) -> bool:
    """Whether a dtype is one that ml_dtypes adds to numpy's: bfloat16 and smaller ones."""
    return hasattr(ml_dtypes, dtype.name)


def _read_file(call: str, path: pathlib.Path) -> dict[str, Any]:
    if path.suffix != ".safetensors":
        raise ValueError(_errors.pickled_file(call, str(path)))
    try:
        import safetensors
    except ImportError:
        what = "reading .safetensors files"
        raise ImportError(_errors.missing_package(call, "safetensors", what)) from None
    try:
        tensors = safetensors.deserialize(path.read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(_errors.unreadable_file(call, str(path), "no such file")) from None
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(_errors.unreadable_file(call, str(path), str(error))) from None
    unknown = [
        (name, f"has dtype {x['dtype']}") for name, x in tensors if x["dtype"] not in _DTYPES
    ]
    if unknown:
        fix = f"Expected one of {', '.join(_DTYPES)}. Cast these entries before saving."
        raise ValueError(_errors.bad_entries(call, unknown, fix))
    return {
        name: np.frombuffer(x["data"], _DTYPES[x["dtype"]]).reshape(x["shape"])
        for name, x in tensors
    }


def to_leaf(value: Any) -> Any:
    """An array as a parameter: floats in JAX, anything else as exact as it came, in numpy."""
    return jnp.array(value) if jnp.issubdtype(value.dtype, jnp.floating) else value


def to_tensors(call: str, arrays: Mapping[str, Any], tensors: bool | None) -> dict[str, Any]:
    """Arrays as torch tensors, or as numpy arrays.

    Raises:
        ImportError: If tensors are asked for and torch is not installed.
    """
    installed = importlib.util.find_spec("torch") is not None
    if tensors and not installed:
        raise ImportError(_errors.missing_package(call, "torch", "tensors=True"))
    copies = {name: np.array(value) for name, value in arrays.items()}
    if not installed or tensors is False:
        return copies
    import torch  # type: ignore

    def convert(x: np.ndarray) -> Any:
        if not _is_extended(x.dtype):
            return torch.from_numpy(x)
        bits = torch.from_numpy(x.view(f"i{x.dtype.itemsize}"))
        return bits.view(getattr(torch, x.dtype.name))

    return {name: convert(x) for name, x in copies.items()}
