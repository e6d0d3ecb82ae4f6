"""Operations of torch that fail in turn."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class Fault(TorchDispatchMode):
    """Counts torch's operations by name, views aside; the `nth` of one name fails."""

    def __init__(self, name: str = "", nth: int = 0, error: type[Exception] = RuntimeError) -> None:
        super().__init__()
        self.counts = Counter[str]()
        self._name, self._nth, self._error = name, nth, error

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.counts[str(func)] += 1
            if str(func) == self._name and self.counts[self._name] == self._nth:
                raise self._error(f"injected fault: {func}")
        return func(*args, **(kwargs or {}))


def some(count: int, most: int) -> list[int]:
    """Up to `most` numbers from 1 to `count`, the first and the last among them."""
    if count <= most:
        return list(range(1, count + 1))
    return sorted({1 + place * (count - 1) // (most - 1) for place in range(most)})
