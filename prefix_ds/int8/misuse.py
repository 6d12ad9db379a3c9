"""Watches a forward pass for a use of 8-bit numbers that leaves their scales out.

Some layers compute with the weight of another layer themselves (a router with its classifier's, cast to
float32). With an int8 weight that runs, and the result is off by a factor that differs from row to row; no
other error says so. So in one pass, the trial that every base goes through, an operation that makes
floating-point numbers of an int8 tensor is an error, unless it is ours.

Knows nothing of what the operations are for.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from prefix_ds.errors import ModelError


def scales_known() -> AbstractContextManager[Any]:
    """Inside, 8-bit numbers may be used: whoever says this multiplies the scales in."""
    context: AbstractContextManager[Any] = torch._C.DisableTorchFunction()
    return context


class Watched(TorchFunctionMode):
    """Inside, operations on a base's 8-bit weights raise ModelError if they leave the scales out."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self._names = {id(weight): name for name, weight in base.named_parameters()}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """What torch asks of every operation."""
        eights = [arg for arg in args if isinstance(arg, Tensor) and arg.dtype == torch.int8]
        has_floats = any(_is_float(arg) for arg in args)
        try:
            result = func(*args, **(kwargs or {}))
        except RuntimeError as error:
            raise self._misuse(eights[0]) if eights and has_floats else error from error
        if eights and _is_float(result):
            raise self._misuse(eights[0])
        if has_floats and isinstance(result, Tensor) and result.dtype == torch.int8:
            raise ModelError(
                "model.bits: 8: the base's code casts what goes into a layer to its weight's type; leave "
                "that layer in 16 bits: model.in_16_bits: [the end of its name]"
            )
        return result

    def _misuse(self, weight: Tensor) -> ModelError:
        name = self._names.get(id(weight)) or self._names.get(id(weight._base), "a weight")
        layer = ".".join(name.removesuffix(".weight").split(".")[-2:])
        return ModelError(
            f"model.bits: 8: the base's code computes with {name} itself, without its scales; leave that "
            f"layer in 16 bits: model.in_16_bits: [{layer}]"
        )


def _is_float(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
