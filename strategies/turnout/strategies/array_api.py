"""One set of array functions for NumPy and torch."""

from __future__ import annotations

from typing import Any

import numpy as np


def array_namespace(x: Any) -> Any:
    """Return the array API functions for arrays such as ``x``.

    NumPy 2 has them itself; array-api-compat's own NumPy module would import all of NumPy, f2py included,
    which takes longer than everything else a server does before its first round.
    """
    if isinstance(x, np.ndarray):
        return np
    from array_api_compat import array_namespace as namespace_of

    return namespace_of(x)
