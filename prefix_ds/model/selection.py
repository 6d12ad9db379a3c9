"""The output layer runs on the hidden states that are asked for, and on no others.

They are selected in front of the layer rather than after the model, so that whatever a family does to its
logits afterwards (a soft cap, a scale) still happens, to the selected ones.

Knows nothing of targets or of losses.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class Selection:
    """Some places of the flattened rows."""

    def __init__(self, output_layer: nn.Module | None) -> None:
        """Without an output layer, logits are selected afterwards."""
        self._wanted_M: Tensor | None = None
        if output_layer is not None:
            output_layer.register_forward_pre_hook(self._select)

    def logits(self, index_M: Tensor, forward: Callable[[], Tensor]) -> Tensor:
        """The logits [M, V] at these places, out of a forward pass."""
        self._wanted_M = index_M
        try:
            logits = forward()
            missed_M = self._wanted_M
        finally:
            self._wanted_M = None
        return logits[0] if missed_M is None else logits.flatten(0, 1).index_select(0, missed_M)

    def _select(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        wanted_M = self._wanted_M
        if wanted_M is None or args[0].dim() != 3:
            return None
        self._wanted_M = None
        return args[0].flatten(0, 1).index_select(0, wanted_M)[None], *args[1:]
