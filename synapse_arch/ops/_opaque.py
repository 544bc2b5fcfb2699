"""How torch.compile sees our loops over chunks: as one operator each, which it neither unrolls nor takes apart.

Traced through, such a loop becomes dozens of kernels, each compiled on its own, and none faster than what it calls.
Everything around the loops is fused as usual.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

Fake = Callable[..., Tensor | tuple[Tensor, ...]]


def opaque(
    function: type[torch.autograd.Function], schema: str, *, keep: tuple[str, ...], fake: Fake | None = None
) -> Callable[..., Any]:
    """An autograd function's `apply`, which is one operator of torch while torch.compile looks on.

    Args:
        function: what is computed, forward and backward.
        schema: "name(arguments) -> (outputs)" in torch's language, with names for the outputs.
        keep: what `forward` saves for `backward`, in its order: names of arguments and outputs. Arguments that are no
            tensors are found on the context, by their names.
        fake: outputs of the right shapes, where `forward` reads numbers out of its tensors and cannot run without them;
            every argument that has a gradient must then be kept.
    """
    parsed = torch._C.parse_schema(schema)
    names = [argument.name for argument in parsed.arguments]
    constants = [argument.name for argument in parsed.arguments if "Tensor" not in str(argument.type)]
    outputs = [output.name for output in parsed.returns]

    def forward(*args: Any) -> Any:
        found = function.forward(_Record(needs_input_grad=[True] * len(args)), *args)
        return found.contiguous() if len(outputs) == 1 else tuple(tensor.contiguous() for tensor in found)

    def backward(
        kept: Sequence[Tensor | None], numbers: Sequence[int], grads: Sequence[Tensor], wanted: Sequence[bool]
    ) -> list[Tensor]:
        record = _Record(needs_input_grad=wanted, saved_tensors=kept, **dict(zip(constants, numbers, strict=True)))
        found = function.backward(record, *grads)
        found = (found,) if isinstance(found, Tensor) else found
        return [_own(grad) for grad, want in zip(found, wanted, strict=True) if want]

    def like_arguments(kept: Sequence[Tensor], _: Any, __: Any, wanted: Sequence[bool]) -> list[Tensor]:
        there = dict(zip(keep, kept, strict=True))
        return [torch.empty_like(there[name]) for name, want in zip(names, wanted, strict=True) if want]

    name, _, rest = schema.partition("(")
    call = torch.library.custom_op(f"synapse_arch::{name}", forward, mutates_args=(), schema=f"({rest}")
    call.register_fake(fake or forward)
    given = "(Tensor?[] kept, int[] numbers, Tensor[] grads, bool[] wanted) -> Tensor[]"
    back = torch.library.custom_op(f"synapse_arch::{name}_backward", backward, mutates_args=(), schema=given)
    back.register_fake(like_arguments if fake else backward)

    def remember(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        results = (output,) if len(outputs) == 1 else output
        there = dict(zip([*names, *outputs], [*inputs, *results], strict=True))
        ctx.save_for_backward(*(there[item] for item in keep))
        ctx.numbers = [int(there[item]) for item in constants]

    def gradient(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        wanted = list(ctx.needs_input_grad)
        found = iter(back(list(ctx.saved_tensors), ctx.numbers, list(grads), wanted))
        return tuple(next(found) if want else None for want in wanted)

    call.register_autograd(gradient, setup_context=remember)
    operator = call._opoverload

    def run(*args: Any) -> Any:
        return operator(*args) if torch.compiler.is_compiling() else function.apply(*args)

    return run


def operator(function: Callable[..., Any], schema: str) -> Callable[..., Any]:
    """A function without gradients, which is one operator of torch while torch.compile looks on.

    Args:
        function: what is computed; its outputs share no memory with each other or with its arguments.
        schema: "name(arguments) -> (outputs)" in torch's language.
    """
    name, _, rest = schema.partition("(")
    call = torch.library.custom_op(f"synapse_arch::{name}", function, mutates_args=(), schema=f"({rest}")
    call.register_fake(function)
    overload = call._opoverload

    def run(*args: Any) -> Any:
        return (overload if torch.compiler.is_compiling() else function)(*args)

    return run


class _Record(SimpleNamespace):
    """Stands in for autograd's context where there is none."""

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """What is saved is known from `keep`."""

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        """Nothing is recorded here."""

    def set_materialize_grads(self, value: bool) -> None:
        """Gradients come as they come."""


def _own(tensor: Tensor) -> Tensor:
    """Contiguous, and no view: an operator's outputs share no memory."""
    return tensor.clone(memory_format=torch.contiguous_format) if tensor._is_view() else tensor.contiguous()
