"""Products with a weight stored in 8 bits, and the gradient to the input.

An int8 number is exact in bfloat16, so a tile of the weight is only cast, never rounded, and the scales are
multiplied into the smaller factor: with one scale a row of the weight W [R, K],

    x W' = (x Q') * scale        and        x W = (x * scale) Q

The second is the gradient of the first and the other way round. The weight is cast tile by tile: a whole
layer in bfloat16 would be twice the bytes that 8 bits save. For the backward pass the parameter itself is
kept, not what was gathered into it: an alias of a gathered weight keeps its memory, in every layer.

Rejected: casting and scaling the weight (rounds it again, and touches more numbers); bitsandbytes'
`Linear8bitLt` (its state keeps a full int8 copy on every rank under ZeRO-3).

Knows nothing of modules.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from prefix_ds.int8.misuse import scales_known

Product = Callable[[Tensor, Tensor, Tensor], Tensor]  # of an input, a weight and its scales

_TILE_NUMBERS = {"cpu": 2**21, "cuda": 2**26}  # of the weight, cast at once


@contextmanager
def tiles_as_on(device_type: str) -> Iterator[None]:
    """Tensors on the meta device, which stand for others, are cast in tiles as on such a device."""
    _TILE_NUMBERS["meta"] = _TILE_NUMBERS[device_type]
    try:
        yield
    finally:
        del _TILE_NUMBERS["meta"]


def times_rows(x: Tensor, weight: Tensor, scale: Tensor, index: int | None = None) -> Tensor:
    """x [..., K] times the transposed weight [R, K]: [..., R]. `index` picks a matrix of a stack."""
    return differentiable(x, weight, scale, index, True, lambda: product_of(x, weight, scale, index, True))


def times_columns(x: Tensor, weight: Tensor, scale: Tensor, index: int | None = None) -> Tensor:
    """x [..., R] times the weight [R, K]: [..., K]. `index` picks a matrix of a stack."""
    return differentiable(x, weight, scale, index, False, lambda: product_of(x, weight, scale, index, False))


def differentiable(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    index: int | None,
    by_rows: bool,
    computed: Callable[[], Tensor],
) -> Tensor:
    """What `computed` gives for a product, with the gradient that the weight gives.

    A function of autograd saves its tensors once it has run. Here they are saved before anything is
    computed: a layer that is computed again stops when all it saves is there, so its last product is left
    out.
    """
    place: Tensor = _Place.apply(x, weight, scale, index, by_rows)  # type: ignore[no-untyped-call]
    filled: Tensor = _Filled.apply(place, computed)  # type: ignore[no-untyped-call]
    return filled


class _Place(torch.autograd.Function):
    """A tensor of the product's shape, and of no memory, that knows its gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, index: int | None, by_rows: bool
    ) -> Tensor:
        ctx.save_for_backward(weight, scale)
        ctx.index, ctx.by_rows = index, by_rows
        return x.new_empty(()).expand(*x.shape[:-1], weight.shape[-2 if by_rows else -1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        weight, scale = ctx.saved_tensors
        return product_of(grads[0], weight, scale, ctx.index, not ctx.by_rows), None, None, None, None


class _Filled(torch.autograd.Function):
    """The numbers in their place."""

    @staticmethod
    def forward(ctx: Any, place: Tensor, computed: Callable[[], Tensor]) -> Tensor:
        return computed()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def product_of(x: Tensor, weight: Tensor, scale: Tensor, index: int | None, by_rows: bool) -> Tensor:
    """The product alone, without a gradient: `times_rows` or `times_columns`."""
    with scales_known():
        matrix_RK, scale_R = (weight, scale) if index is None else (weight[index], scale[index])
        result = x.new_empty(*x.shape[:-1], len(matrix_RK) if by_rows else matrix_RK.shape[1])
        x, flat = x.reshape(-1, x.shape[-1]), result.view(-1, result.shape[-1])
        (_by_rows if by_rows else _by_columns)(x, matrix_RK, scale_R, flat)
    return result  # itself, not a view: layers write into what they get


def _by_rows(x_MK: Tensor, matrix_RK: Tensor, scale_R: Tensor, result_MR: Tensor) -> None:
    for tile in _tiles(len(matrix_RK), matrix_RK.shape[1], x_MK.device):
        product_MR = x_MK @ matrix_RK[tile].to(x_MK.dtype).t()
        torch.mul(product_MR, scale_R[tile], out=result_MR[:, tile])


def _by_columns(x_MR: Tensor, matrix_RK: Tensor, scale_R: Tensor, result_MK: Tensor) -> None:
    scaled_MR = torch.empty_like(x_MR)
    for rows in _tiles(len(x_MR), x_MR.shape[1], x_MR.device):  # their product with the scales is in float32
        scaled_MR[rows] = x_MR[rows] * scale_R
    for tile in _tiles(matrix_RK.shape[1], len(matrix_RK), x_MR.device):
        torch.mm(scaled_MR, matrix_RK[:, tile].to(x_MR.dtype), out=result_MK[:, tile])


def _tiles(length: int, width: int, device: torch.device) -> list[slice]:
    """Slices of a dimension, such that a tile has about as many numbers as suits the device."""
    count = max(1, length * width // _TILE_NUMBERS.get(device.type, 2**26))
    size = max(1, -(-length // count))  # experts may be hit by no token
    return [slice(start, start + size) for start in range(0, length, size)]
