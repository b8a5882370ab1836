"""Results that are worth keeping, the ones used last."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

T = TypeVar("T")


class Memo:
    """At most ``size`` results by key, one version of each. Safe between threads."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._lock = threading.Lock()
        self._results: OrderedDict[Hashable, tuple[Hashable, Any]] = OrderedDict()

    def get(self, key: Hashable, version: Hashable, compute: Callable[[], T]) -> T:
        """Return the result of ``key`` as of ``version``; two threads that miss at once both compute it."""
        with self._lock:
            found = self._results.get(key)
            if found is not None and found[0] == version:
                self._results.move_to_end(key)
                known: T = found[1]
                return known
        result = compute()
        with self._lock:
            self._results[key] = version, result
            self._results.move_to_end(key)
            while len(self._results) > self._size:
                self._results.popitem(last=False)
        return result

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._results.clear()
