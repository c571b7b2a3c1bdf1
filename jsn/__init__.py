"""Spectral normalization for JAX: true, pure, proven.

One idea: a weight is a linear operator. Track its largest singular value in the training step,
divide by it, and never touch the raw weight.

    params --rules--> operators --power_iterate--> sigma --constraint--> W * bound / sigma --> model
       |   which?        as what map?   how large?         how strict?          ^
       +------------- raw weights stay in params; u stays in sn_state ----------+

`init` makes the state, `normalize` runs the whole picture, `fold` ends it; `jsn.linen` does both
inside a Flax module.
"""

from jsn import interop as interop
from jsn import linen as linen
from jsn import nnx as nnx
from jsn import optim as optim
from jsn._audit import audit as audit
from jsn._bounds import upper_bound as upper_bound
from jsn._conv import Conv as Conv
from jsn._lipschitz import lipschitz_bound as lipschitz_bound
from jsn._normalize import fold as fold
from jsn._normalize import init as init
from jsn._normalize import normalize as normalize
from jsn._normalize import sigmas as sigmas
from jsn._operator import Matrix as Matrix
from jsn._power import power_iterate as power_iterate
from jsn._robust import certified_accuracy as certified_accuracy
from jsn._robust import certified_radius as certified_radius
from jsn._rules import FLAX as FLAX
from jsn._rules import TORCH as TORCH
from jsn._state_sharding import state_sharding as state_sharding
from jsn._types import SNState as SNState

__version__ = "0.1.0.dev0"
