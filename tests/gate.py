"""The type gate of the tests: what jsn's annotations say is checked at every call inside it.

The functions that check what a caller hands in are left out: there, a wrong type has to reach
the error message that explains it.
"""

from collections.abc import Callable

import beartype

CHECK_THEMSELVES = {
    "jsn._normalize": {"init", "normalize", "sigmas", "fold"},
    "jsn._operator": {"Matrix.__init__", "_as_axes"},
    "jsn._power": {"power_iterate", "check_count", "check_block"},
    "jsn._rules": {"_check", "assign"},
    "jsn.linen": {"spectral_norm", "init_state"},
}


def check(function: Callable) -> Callable:
    """The type checker that jaxtyping's import hook puts on every function of jsn."""
    if function.__qualname__ in CHECK_THEMSELVES.get(function.__module__, ()):
        return function
    return beartype.beartype(function)
