"""Frozen norms by the root mean square, which keep for the backward pass what it needs.

transformers computes them in float32, and autograd keeps that copy of the hidden states: in a layer of a
Llama it is an eighth of all that is kept. Kept here are the states as they came and one number for each
place. On a CPU some places are computed at a time, which stay in the cache, and that takes half the time; on
a GPU torch has a kernel for it, which keeps the same.

Families differ in how the weight is applied, and no configuration says how. So each norm is asked once, with
states so small that its epsilon matters, and is left alone unless one of the ways known here gives what it
gives. So is it where its weight is trained, or not of the states' type.

Knows nothing of the models that norms are in.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from prefix_ds.model.agreement import error_between
from prefix_ds.model.blocks import by_blocks

_EPSILONS = ("variance_epsilon", "eps", "epsilon")  # the names it has in transformers
_TYPES = (torch.bfloat16, torch.float16)
_SMALL = 1e-3

Forward = Callable[..., Tensor]


def take_over_norms(base: nn.Module) -> None:
    """Every module that may be such a norm computes it this way, from when it has agreed."""
    for module in base.modules():
        epsilon = _epsilon(module)
        if epsilon is not None:
            module.forward = _Norm(module, epsilon)


def _epsilon(module: nn.Module) -> float | None:
    names = [name for name, _ in module.named_parameters()]
    if not type(module).__name__.endswith("Norm") or names != ["weight"]:
        return None
    return next((e for name in _EPSILONS if isinstance(e := getattr(module, name, None), float)), None)


@dataclass(frozen=True)
class _Way:
    """How a norm is computed. `plus`: added to the weight; `late`: it multiplies what is already rounded."""

    epsilon: float
    plus: float
    late: bool

    def apply(self, unit_CD: Tensor, weight_D: Tensor) -> Tensor:
        """The weight to numbers in float32; the result has the weight's type."""
        if self.late:
            return unit_CD.to(weight_D.dtype) * (weight_D + self.plus)
        return (unit_CD * (weight_D.to(unit_CD.dtype) + self.plus)).to(weight_D.dtype)

    def unapply(self, grad_CD: Tensor, weight_D: Tensor) -> Tensor:
        """The gradient to those numbers, in float32."""
        if self.late:
            return (grad_CD * (weight_D + self.plus)).to(torch.float32)
        return grad_CD * (weight_D.to(torch.float32) + self.plus)


class _Norm:
    """A norm's forward pass: ours where it has agreed, else its own."""

    def __init__(self, module: nn.Module, epsilon: float) -> None:
        self._module, self._epsilon = module, epsilon
        self._stock: Forward = module.forward
        self._way: _Way | None = None
        self._is_asked = False

    def __call__(self, *given: Any, **options: Any) -> Tensor:
        if len(given) != 1 or options:
            return self._stock(*given, **options)
        (hidden,) = given
        weight: Any = self._module.weight
        if hidden.dtype not in _TYPES or weight.dtype != hidden.dtype or weight.dim() != 1:
            return self._stock(hidden)
        if not self._is_asked:
            self._way, self._is_asked = self._asked(weight), True
        if self._way is None or weight.requires_grad:
            return self._stock(hidden)
        if hidden.is_cuda and self._way.late and not self._way.plus:
            return fused(hidden, weight, self._epsilon)
        normed: Tensor = _Normed.apply(hidden, weight, self._way)  # type: ignore[no-untyped-call]
        return normed

    @torch.no_grad()
    def _asked(self, weight_D: Tensor) -> _Way | None:
        """The way that gives what the norm itself gives."""
        ways = [_Way(self._epsilon, plus, late) for late in (True, False) for plus in (0.0, 1.0)]
        if weight_D.is_meta:
            return ways[0]
        numbers = torch.linspace(-_SMALL, _SMALL, 2 * len(weight_D), device=weight_D.device)
        hidden_2D = numbers.view(2, -1).to(weight_D.dtype)
        theirs = self._stock(hidden_2D)
        errors = [error_between(_Normed.apply(hidden_2D, weight_D, way), theirs) for way in ways]  # type: ignore[no-untyped-call]
        least = min(errors)
        return ways[errors.index(least)] if least < 4 * torch.finfo(weight_D.dtype).eps else None


def fused(hidden: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
    """A norm whose weight multiplies what is already rounded, in torch's own kernel where it has one."""
    return functional.rms_norm(hidden, weight_D.shape, None, epsilon) * weight_D


class _Normed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight_D: Tensor, way: _Way) -> Tensor:
        def work(hidden_CD: Tensor) -> tuple[Tensor, Tensor]:
            wide_CD = hidden_CD.to(torch.float32)
            length_C1 = torch.linalg.vector_norm(wide_CD, dim=-1, keepdim=True)
            scale_C1 = (length_C1.square_() / wide_CD.shape[-1]).add_(way.epsilon).rsqrt_()
            return way.apply(wide_CD.mul_(scale_C1), weight_D), scale_C1

        made, scale = by_blocks(work, hidden)
        ctx.save_for_backward(hidden, weight_D, scale)
        ctx.way = way
        return made

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        hidden, weight_D, scale = ctx.saved_tensors

        def work(hidden_CD: Tensor, grad_CD: Tensor, scale_C1: Tensor) -> tuple[Tensor]:
            unit_CD = hidden_CD.to(torch.float32).mul_(scale_C1)
            to_unit_CD = ctx.way.unapply(grad_CD, weight_D)
            mean_C1 = (to_unit_CD * unit_CD).mean(dim=-1, keepdim=True)
            to_hidden_CD = (to_unit_CD - unit_CD.mul_(mean_C1)).mul_(scale_C1)
            return (to_hidden_CD.to(hidden.dtype),)

        (to_hidden,) = by_blocks(work, hidden, grads[0], scale)
        return to_hidden, None, None
