"""Modules without values: to count what a configuration would cost, and to load weights into."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import init
from torch.overrides import TorchFunctionMode


_FILLS = {Tensor.normal_, Tensor.uniform_, init.normal_, init.uniform_, init.kaiming_uniform_}


class _NoFill(TorchFunctionMode):
    """Leaves out random fills: on the meta device they do nothing, but would import torch._dynamo for it (seconds)."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _FILLS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


@contextmanager
def without_values() -> Iterator[None]:
    """Modules made inside have shapes and dtypes but no values and take no memory (meta device)."""
    with torch.device("meta"), _NoFill():
        yield
