"""Numbers as int8 and a scale a row: the vector-wise quantisation of bitsandbytes (Dettmers et al. 2022,
2.1).

A row is the last dimension of a weight as it is stored. Its largest magnitude becomes 127, so no row's scale
depends on another row, and a rank that owns a part of a weight reads and quantises the rows it touches and no
others.

Knows nothing of modules or files.
"""

from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from prefix_ds.promise import Source


def quantised(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [..., K] as int8 [..., K] and their scales [...] in float32: row = int8 * scale.

    A row of zeros has scale 0; one with a NaN or an infinity has a scale that is not finite.
    """
    largest = rows.abs().amax(dim=-1, keepdim=True).float()
    factor = torch.where(largest > 0, 127.0 / largest, 0.0)
    return (rows * factor).round_().to(torch.int8), (largest / 127.0)[..., 0]


@dataclass(frozen=True)
class QuantisedRows:
    """A weight that is quantised when a part of it is read, each row once if the values are read first."""

    source: Source

    @cached_property
    def known_scales(self) -> Tensor:
        """[rows] in float32, NaN where the row was not read yet; made when a row is."""
        return torch.full((prod(self.source.shape[:-1]),), float("nan"))

    @property
    def values(self) -> "Values":
        """The int8 numbers, of the weight's shape."""
        return Values(self)

    @property
    def scales(self) -> "Scales":
        """The scales in float32, of the weight's shape without its last dimension."""
        return Scales(self)

    def rows(self, first: int, last: int) -> Tensor:
        """Rows [first, last) as int8."""
        width = self.source.shape[-1]
        rows = self.source.read(first * width, last * width).view(-1, width)
        values, self.known_scales[first:last] = quantised(rows)
        return values


@dataclass(frozen=True)
class Values:
    """The int8 numbers of a weight."""

    weight: QuantisedRows
    dtype: torch.dtype = torch.int8

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's."""
        return self.weight.source.shape

    def read(self, start: int, stop: int) -> Tensor:
        """Elements [start, stop); reads the rows they touch."""
        width = self.shape[-1]
        first, last = start // width, -(-stop // width)
        return self.weight.rows(first, last).flatten()[start - first * width : stop - first * width]


@dataclass(frozen=True)
class Scales:
    """The scales of a weight's rows."""

    weight: QuantisedRows
    dtype: torch.dtype = torch.float32

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's, without its last dimension."""
        return self.weight.source.shape[:-1]

    def read(self, start: int, stop: int) -> Tensor:
        """Scales [start, stop); reads the rows whose values nobody has read."""
        unknown = (start + self.weight.known_scales[start:stop].isnan().nonzero()[:, 0]).tolist()
        for row in unknown:
            self.weight.rows(row, row + 1)
        return self.weight.known_scales[start:stop].clone()
