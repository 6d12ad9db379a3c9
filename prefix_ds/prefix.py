"""The trained thing: for every attention of a model, keys and values in front of the text.

All of them live in one float32 table of P rows, a row holding the position's key and value for each slot in
turn:

    row p = [key of slot 0 | value of slot 0 | key of slot 1 | ...]      a key is N x H numbers, a value N x
    H'

One tensor means one all-reduce, one optimizer state and a save without gathering; it is also, row for row,
the layout of PEFT's files. Slots may differ in heads and sizes.

`Reparameterised` is the training form of Li & Liang (2021), section 4.3: the table is the output of a
two-layer tanh MLP over a small embedding of each position. Theirs starts anywhere; ours adds the MLP, which
starts at zero, to a constant `origin`, so that it can start from text too. Once trained, the table it
computes is the prefix.

Knows nothing of transformers, DeepSpeed or files.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Slot:
    """One place where a prefix enters: an attention, named by its module, and its key and value shapes."""

    name: str
    num_heads: int
    key_dim: int
    value_dim: int

    @property
    def width(self) -> int:
        """Numbers one position takes here: key and value of all heads."""
        return self.num_heads * (self.key_dim + self.value_dim)


KeyValue = tuple[Tensor, Tensor]  # key_NPH, value_NPH


class Prefix(Protocol):
    """What is trained.

    An `nn.Module` whose parameters are all trained, and whose buffers are constants it needs.
    """

    slots: tuple[Slot, ...]

    def table(self) -> Tensor:
        """The keys and values as one table [P, D], differentiable."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """All that is trained."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Everything needed to go on training, by name."""
        ...


def check_table(table_PD: Tensor, slots: Sequence[Slot]) -> None:
    """Raises ValueError unless the table's columns are those of the slots."""
    width = sum(slot.width for slot in slots)
    if table_PD.dim() != 2 or table_PD.shape[1] != width:
        raise ValueError(f"a table of shape {tuple(table_PD.shape)} for slots that need [positions, {width}]")


class Direct(nn.Module):
    """The table itself is trained."""

    def __init__(self, slots: Sequence[Slot], table_PD: Tensor) -> None:
        """Starts from a table [P, D], which is copied."""
        super().__init__()
        check_table(table_PD, slots)
        self.slots = tuple(slots)
        self.table_PD = nn.Parameter(table_PD.detach().to(torch.float32, copy=True))

    def table(self) -> Tensor:
        """The trained table [P, D]."""
        return self.table_PD


class Reparameterised(nn.Module):
    """The table is `origin` plus a two-layer tanh MLP over an embedding a position (Li & Liang 2021, 4.3)."""

    def __init__(
        self, slots: Sequence[Slot], origin_PD: Tensor, dim: int, generator: torch.Generator
    ) -> None:
        """`dim` is the width of the embeddings and of the hidden layer. The MLP's output starts at zero."""
        super().__init__()
        check_table(origin_PD, slots)
        self.slots = tuple(slots)
        length, width = origin_PD.shape
        self.register_buffer("origin_PD", origin_PD.detach().to(torch.float32, copy=True))
        self.embedding = nn.Parameter(torch.randn(length, dim, generator=generator))
        self.hidden = nn.Linear(dim, dim)
        self.output = nn.Linear(dim, width)
        with torch.no_grad():
            self.hidden.weight.normal_(0, dim**-0.5, generator=generator)
            self.hidden.bias.zero_()
            self.output.weight.zero_()
            self.output.bias.zero_()

    def table(self) -> Tensor:
        """The table [P, D] the MLP computes now."""
        origin_PD: Tensor = self.get_buffer("origin_PD")
        change_PD: Tensor = self.output(torch.tanh(self.hidden(self.embedding)))
        return origin_PD + change_PD


def num_positions(table_PD: Tensor | None) -> int:
    """That a table puts in front of a text; none without one."""
    return 0 if table_PD is None else len(table_PD)


def random_table(slots: Sequence[Slot], length: int, std: float, seed: int) -> Tensor:
    """A table [P, D] of normal noise, the same on every rank and machine."""
    noise = torch.Generator().manual_seed(seed)
    return torch.randn(length, sum(s.width for s in slots), generator=noise) * std


def table_of(keys_values: Sequence[KeyValue]) -> Tensor:
    """The table [P, D] of one (key_NPH, value_NPH) a slot, in slot order; float32 on the CPU."""
    columns = [t.transpose(0, 1).flatten(1) for pair in keys_values for t in pair]
    return torch.cat([c.detach().to("cpu", torch.float32) for c in columns], dim=1)


def keys_values_of(table_PD: Tensor, slots: Sequence[Slot]) -> list[KeyValue]:
    """The inverse of `table_of`: (key_NPH, value_NPH) of each slot, as differentiable views of the table."""
    length = table_PD.shape[0]
    sizes = [n for s in slots for n in (s.num_heads * s.key_dim, s.num_heads * s.value_dim)]
    columns = iter(torch.split(table_PD, sizes, dim=1))
    return [
        (
            next(columns).view(length, slot.num_heads, slot.key_dim).transpose(0, 1),
            next(columns).view(length, slot.num_heads, slot.value_dim).transpose(0, 1),
        )
        for slot in slots
    ]
