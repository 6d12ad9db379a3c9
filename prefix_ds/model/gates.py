"""Gated linear units, down(activation(gate) * up), which keep gate and up for the backward pass.

Autograd keeps three tensors of the inner size, which is by far the largest of a layer: gate, up, and the
activation between them. That is a fifth of all that a layer of a Llama keeps, and it costs one pass over the
numbers to have it again. Same operations in the same types, so the same results, bit by bit.

Families write such a unit in a few ways, and some do more in it: cap what is large, say. So each is asked
once, with small matrices in the place of its own and numbers of all sizes, and is left alone unless it gives
exactly this; so is one whose activation has weights.

Knows nothing of the models that units are in.
"""

import math
from collections.abc import Callable
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from prefix_ds.model.blocks import by_blocks

Function = Callable[..., Tensor]

_ACTIVATIONS = ("act_fn", "activation_fn")  # the names it has in transformers
_APART, _JOINED, _DOWN = ("gate_proj", "up_proj"), ("gate_up_proj",), "down_proj"
_NARROW, _WIDE = 8, 12  # of the matrices that a unit is asked with
_TYPES = (torch.float32, torch.bfloat16)
_LARGEST = 1e5  # of the numbers it is asked with, which start at one


def take_over_gates(base: nn.Module) -> None:
    """Every unit that is no more than this keeps two tensors, also where experts have it between products."""
    for module in base.modules():
        names, activation = _projections(module), _activation(module)
        if activation is not None and names and _is_no_more(module, names, activation):
            module.forward = _Unit(module, names, activation, module.forward)
        if activation is not None and _splits_and_gates(module, activation):
            module._apply_gate = _Split(activation)  # type: ignore[assignment]


def gated(gate: Tensor, up: Tensor, activation: Function) -> Tensor:
    """The activation of the gate, times what comes up beside it [..., I]."""
    made: Tensor = _Gated.apply(gate, up, activation)  # type: ignore[no-untyped-call]
    return made


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: Function) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        (made,) = by_blocks(lambda gate_CI, up_CI: (activation(gate_CI) * up_CI,), gate, up)
        return made

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, None]:
        def work(gate_CI: Tensor, up_CI: Tensor, grad_CI: Tensor) -> tuple[Tensor, Tensor]:
            with torch.enable_grad():
                leaf_CI = gate_CI.detach().requires_grad_()
                active_CI = ctx.activation(leaf_CI)
            (to_gate_CI,) = torch.autograd.grad(active_CI, leaf_CI, grad_CI * up_CI)
            return to_gate_CI, grad_CI * active_CI.detach()

        to_gate, to_up = by_blocks(work, *ctx.saved_tensors, grads[0])
        return to_gate, to_up, None


class _Split:
    """Gate and up side by side, as one product gives them, gated."""

    def __init__(self, activation: Function) -> None:
        self._activation = activation

    def __call__(self, gate_and_up: Tensor) -> Tensor:
        gate, up = gate_and_up.chunk(2, dim=-1)
        return gated(gate, up, self._activation)


class _Unit:
    """A unit's forward pass; its own where it is asked otherwise than with hidden states alone."""

    def __init__(self, module: Any, names: tuple[str, ...], activation: Function, stock: Function) -> None:
        self._module, self._names, self._activation, self._stock = module, names, activation, stock

    def __call__(self, *given: Any, **options: Any) -> Tensor:
        if len(given) != 1 or options:
            return self._stock(*given, **options)
        projected = [getattr(self._module, name)(*given) for name in self._names]
        gate, up = projected if len(projected) == 2 else projected[0].chunk(2, dim=-1)
        down: Tensor = getattr(self._module, _DOWN)(gated(gate, up, self._activation))
        return down


def _activation(module: nn.Module) -> Function | None:
    """A module's own, without the hooks that modules have: it is called a block at a time, and once more."""
    found = next((a for name in _ACTIVATIONS if callable(a := getattr(module, name, None))), None)
    if not isinstance(found, nn.Module):
        return found
    has_weights = any(True for _ in found.parameters()) or any(True for _ in found.buffers())
    return None if has_weights or getattr(found, "inplace", False) else found.forward


def _projections(module: nn.Module) -> tuple[str, ...]:
    """The names of what makes gate and up, where a module has them and the way down, and is no other's."""
    children = {name for name, _ in module.named_children()} - set(_ACTIVATIONS)
    if "forward" in vars(module) or any(True for _ in module.parameters(recurse=False)):
        return ()
    return next((names for names in (_APART, _JOINED) if children == {*names, _DOWN}), ())


class _Imitation:
    """A module in which some attributes are others."""

    def __init__(self, module: nn.Module, others: dict[str, Function]) -> None:
        vars(self).update(others, _module=module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


@torch.no_grad()
def _is_no_more(module: nn.Module, names: tuple[str, ...], activation: Function) -> bool:
    """Whether a unit gives what ours gives, with small matrices in the place of its own."""
    forward, inner = type(module).forward, _WIDE * 2 // len(names)
    sizes = dict.fromkeys(names, (inner, _NARROW)) | {_DOWN: (_NARROW, _WIDE)}

    def is_alike(dtype: torch.dtype) -> bool:
        matrices = {name: _made(size, dtype, seed) for seed, (name, size) in enumerate(sizes.items())}
        imitation: Any = _Imitation(module, {name: _times(matrix) for name, matrix in matrices.items()})
        theirs = partial(forward, imitation)
        return _is_same(theirs, _Unit(imitation, names, activation, theirs), _of_all_sizes(_NARROW, dtype))

    return len(signature(forward).parameters) == 2 and all(map(is_alike, _TYPES))


def _times(matrix: Tensor) -> Function:
    """Number by number: matrix products are counted while a base is tried, and this is none of its own."""
    return lambda numbers: (numbers.unsqueeze(-2) * matrix).sum(-1)


@torch.no_grad()
def _splits_and_gates(module: nn.Module, activation: Function) -> bool:
    """Whether experts, stacked in one tensor, have a function between their products that is only this."""
    theirs: Any = getattr(type(module), "_apply_gate", None)
    if theirs is None or "_apply_gate" in vars(module):
        return False
    tried = [_of_all_sizes(2 * _WIDE, dtype) for dtype in _TYPES]
    return all(_is_same(partial(theirs, module), _Split(activation), numbers) for numbers in tried)


def _of_all_sizes(width: int, dtype: torch.dtype) -> Tensor:
    """Places [6, width] around one, ten, and so on: a cap shows in what is larger than it."""
    sizes_61 = torch.logspace(0, math.log10(_LARGEST), 6)[:, None]
    return (_made((6, width), torch.float32) * sizes_61).to(dtype)


def _made(size: tuple[int, ...], dtype: torch.dtype, seed: int = 9) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _is_same(theirs: Callable[[Tensor], Any], ours: Function, numbers: Tensor) -> bool:
    try:
        return torch.equal(theirs(numbers), ours(numbers))
    except Exception:  # code of a family, called with what it does not expect
        return False
