"""How many bytes of tensors are alive at once while something is computed."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Live(TorchDispatchMode):
    """Counts the memory of tensors that are made while it is on, until they are gone; what lies under views once.

    Args:
        known: tensors that do not count.

    Attributes:
        peak: the most bytes at one time, so far or since `restart`.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak: int = 0
        self._now: int = 0
        self._found = {_place(tensor): weakref.ref(tensor.untyped_storage()) for tensor in known}

    def restart(self) -> None:
        """Begins `peak` anew, with what is alive now."""
        self.peak = self._now

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Runs one operator of torch and counts what it made."""
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor)
        return result

    def _count(self, tensor: Tensor) -> None:
        place, storage = _place(tensor), tensor.untyped_storage()
        if (there := self._found.get(place)) is not None and there() is not None:
            return
        size = storage.nbytes()
        self._now += size
        self.peak = max(self.peak, self._now)

        def gone(reference: weakref.ref[Any]) -> None:
            self._now -= size
            if self._found.get(place) is reference:
                del self._found[place]

        self._found[place] = weakref.ref(storage, gone)


def _place(tensor: Tensor) -> int:
    """What identifies a tensor's memory, as long as it is alive."""
    return int(tensor.untyped_storage()._cdata)
