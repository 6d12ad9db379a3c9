"""Activations that are computed again in the backward pass instead of kept.

transformers' layers carry the switch. It is thrown here, layer by layer, rather than by
`activation_checkpointing_enable`, which also makes the embeddings require a gradient (nobody wants one below
the first prefix) and leaves the model unable to use a cache. It works in train mode only, so it is on for the
length of a forward pass, and dropout is zero by value. The state of random numbers is not kept, as nothing
draws any: reading it makes a GPU wait.

Knows nothing of prefixes.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from prefix_ds.errors import ModelError

Contexts = tuple[AbstractContextManager[None], AbstractContextManager[None]]


class Recomputation:
    """The layers of a base that are computed again (non-reentrant checkpointing)."""

    def __init__(self, base: nn.Module, again: bool | int, contexts: Callable[[], Contexts]) -> None:
        """`contexts` surround a layer's forward pass and its recomputation.

        Raises ModelError where no layer, or not so many, can be computed again.
        """
        self._layers = repeated_layers(base, again)
        function = partial(checkpoint, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
        for layer in self._layers:
            layer._gradient_checkpointing_func = function

    @contextmanager
    def on(self) -> Iterator[None]:
        """Forward passes inside keep only the inputs of layers."""
        self._switch(True)
        try:
            yield
        finally:
            self._switch(False)

    def _switch(self, on: bool) -> None:
        for layer in self._layers:
            layer.training = layer.gradient_checkpointing = on


def repeated_layers(base: nn.Module, again: bool | int) -> list[Any]:
    """Those that are computed again: all, or so many from below.

    The lowest, as their turn comes when what the others kept is gone: at no moment is one of them rebuilt
    beside all that is kept. Raises ModelError.
    """
    layers = repeatable_layers(base)
    if len(layers) < again:
        raise ModelError(
            f"model.recompute: {str(again).lower()}, but {type(base).__name__} has {len(layers) or 'no'} "
            f"layers that can be computed again; set it to {'true' if layers else 'false'}"
        )
    return layers if again is True else layers[:again]


def repeatable_layers(module: nn.Module) -> list[Any]:
    """Those that can be computed again and are not inside another, which would be repeated with it."""
    if isinstance(module, GradientCheckpointingLayer):
        return [module]
    return [layer for child in module.children() for layer in repeatable_layers(child)]
