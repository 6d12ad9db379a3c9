"""The output layer runs on the hidden states that are asked for, and on no others.

They are selected in front of the layer rather than after the model, so that whatever a family does to its
logits afterwards (a soft cap, a scale) still happens, to the selected ones.

Knows nothing of targets or of losses.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class Selection:
    """Some places of the flattened rows."""

    def __init__(self, output_layer: nn.Module | None) -> None:
        """Without an output layer, logits are selected afterwards."""
        self._index_M: Tensor | None = None
        self._done = False
        if output_layer is not None:
            output_layer.register_forward_pre_hook(self._select)

    @contextmanager
    def of(self, index_M: Tensor) -> Iterator[None]:
        """Forward passes inside compute the logits of these places."""
        self._index_M, self._done = index_M, False
        try:
            yield
        finally:
            self._index_M = None

    def _select(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self._index_M is None:
            return None
        self._done = True
        return args[0].flatten(0, 1)[self._index_M][None], *args[1:]

    def selected(self, logits: Tensor) -> Tensor:
        """The logits [M, V] among those the base gave: [1, M, V], or [B, T, V] without an output layer."""
        return logits[0] if self._done else logits.flatten(0, 1)[self._index_M]
