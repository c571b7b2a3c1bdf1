"""Station 11. Spectral normalization of other libraries, in and out.

In: the parameters and state of PyTorch, Flax, Haiku or Equinox. Out: parameters and an `SNState`
that go on from there; and back. Must not know how sigma is found, and never opens a pickle.

| library | where it keeps its state | given back |
|---|---|---|
| `torch` | `X.parametrizations.weight.original`, `.0._u`, `.0._v` | params, state |
| `torch`, older | `X.weight_orig`, `X.weight_u`, `X.weight_v` | params, state |
| `flax.linen` | `batch_stats[scope]["layer/kernel/u"]` and `.../sigma` | state |
| `flax.nnx` | `BatchStat`s at `batch_stats[("kernel", "u")]` and `"sigma"` | params, state |
| `haiku`, both modules | `state[module]["u0"]` and `"sigma"` | state |
| `equinox.nn` | `(u, v)` at the wrapper's `StateIndex` | model, state |

All of them track one vector `u` on the output side, as jsn does with `block_size=1`, and see a
weight of more than two axes as a matrix whose one side is a single axis. Importers continue from
that `u`. Every importer takes two options:

- `block_size`: with 1, the default, jsn follows the trajectory of the other library; with more,
  the state is made anew for these weights, and sigma is as true as jsn makes it.
- `rules`: which weights, and as which operators, where the other library's answer is not wanted;
  these come before it. `("bias$", None)` lets go of what Flax normalizes by accident.

A `u` that is zero or not finite, from which none of them recovers, is started anew.
"""

from jsn.interop._equinox import from_equinox as from_equinox
from jsn.interop._equinox import to_equinox as to_equinox
from jsn.interop._flax import from_flax_linen as from_flax_linen
from jsn.interop._flax import from_flax_nnx as from_flax_nnx
from jsn.interop._flax import to_flax_linen as to_flax_linen
from jsn.interop._flax import to_flax_nnx as to_flax_nnx
from jsn.interop._haiku import from_haiku as from_haiku
from jsn.interop._haiku import to_haiku as to_haiku
from jsn.interop._torch import from_torch as from_torch
from jsn.interop._torch import to_torch as to_torch
