"""What a model is given: packed rows, and which tokens it must predict.

A row holds one or several documents side by side. `positions` start again at 0 with each document, which is
how the attention masks tell them apart; what pads a row is one more document that nobody looks at.
`target_index` points into the flattened rows at the places whose *next* token is a target, `target_ids` are
those tokens.

Knows nothing of models, files or ranks.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Batch:
    """One micro-batch. **B** rows, **T** text positions, **M** targets."""

    ids_BT: torch.Tensor
    positions_BT: torch.Tensor
    target_index_M: torch.Tensor
    target_ids_M: torch.Tensor
    num_tokens: int  # real ones, padding not counted

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device."""
        return Batch(
            self.ids_BT.to(device, non_blocking=True),
            self.positions_BT.to(device, non_blocking=True),
            self.target_index_M.to(device, non_blocking=True),
            self.target_ids_M.to(device, non_blocking=True),
            self.num_tokens,
        )


@dataclass(frozen=True)
class Share:
    """One rank's part of a global batch.

    Every rank has the same number of micro-batches, some perhaps without a target.
    """

    micro_batches: tuple[Batch, ...]
    global_targets: int  # over all ranks: what the summed loss is divided by
    global_tokens: int
    num_examples: int  # of the global batch
    global_squares: int = 0  # of the lengths of its examples, summed: what attention grows with
