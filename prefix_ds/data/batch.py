"""What a model is given: packed rows, and which tokens it must predict.

A row holds one or several documents side by side. `positions` start again at 0 with each document, which is
how models' own masks tell them apart, and `documents` says where they are; what pads a row is in none of
them. `target_index` points into the flattened rows at the places whose *next* token is a target, `target_ids`
are those tokens.

Knows nothing of models, files or ranks.
"""

import itertools
from dataclasses import dataclass, replace
from typing import Any

import torch


@dataclass(frozen=True)
class Document:
    """The columns start..stop of a row."""

    row: int
    start: int
    stop: int

    @property
    def length(self) -> int:
        """Its tokens."""
        return self.stop - self.start


def documents_of(positions_BT: torch.Tensor) -> tuple[Document, ...]:
    """The documents of rows, read off their positions: a new one starts where they do not go on."""
    found = []
    for row, positions_T in enumerate(positions_BT.cpu()):
        starts = torch.nonzero(positions_T.diff(prepend=positions_T[:1] - 2) != 1).flatten().tolist()
        found += [Document(row, *pair) for pair in itertools.pairwise([*starts, len(positions_T)])]
    return tuple(found)


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The same on a device, which goes on meanwhile: from memory that may be paged a copy waits for it."""
    if device.type == "cuda" and not tensor.is_cuda:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


@dataclass(frozen=True)
class Batch:
    """One micro-batch. **B** rows, **T** text positions, **M** targets."""

    ids_BT: torch.Tensor
    positions_BT: torch.Tensor
    target_index_M: torch.Tensor
    target_ids_M: torch.Tensor
    num_tokens: int  # real ones, padding not counted
    documents: tuple[Document, ...]  # in their order

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device."""
        there: dict[str, Any] = {name: sent(tensor, device) for name, tensor in self.tensors().items()}
        return replace(self, **there)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Its tensors by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}


@dataclass(frozen=True)
class Share:
    """One rank's part of a global batch.

    Every rank has the same number of micro-batches, some perhaps without a target.
    """

    micro_batches: tuple[Batch, ...]
    global_targets: int  # over all ranks: what the summed loss is divided by
    global_tokens: int
    global_squares: int = 0  # of the lengths of its examples, summed: what attention grows with
