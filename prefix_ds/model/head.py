"""The output layer runs on the hidden states that are asked for, and on no others.

They are selected in front of the layer rather than after the model, so that whatever a family does to its
logits afterwards (a soft cap, a scale) still happens, to the selected ones.

For a loss there need not be logits of all of them at once: with a vocabulary of 128,000, those of a thousand
targets take half a gigabyte, and their gradient as much again. Where the layer is frozen, the loss and its
gradient to the hidden states are computed within its call, some targets at a time, while its weight is there:
the backward pass needs no logits and, under ZeRO-3, does not gather the weight again.

Knows nothing of batches.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from prefix_ds.model.finish import Finish
from prefix_ds.model.likelihood import LogitsOf, summed_nll_behind

Layer = Callable[..., Tensor]
_Answer = Callable[[Tensor], Tensor]  # what the layer gives for hidden states [1, M, D]
_Loss = Callable[[Tensor, Tensor, LogitsOf, int], Tensor]  # of hidden states [M, D] and ids [M]


class Head:
    """A model's output layer."""

    def __init__(self, base: Any) -> None:
        """Of a transformers model; where it has no output layer, logits are selected afterwards."""
        layer: nn.Module | None = base.get_output_embeddings()
        self._wanted_M: Tensor | None = None
        self._loss_of: _Answer | None = None
        self._chosen_1MD: Tensor | None = None
        self._layer = layer
        self._is_outermost = layer in set(base.children())
        if layer is not None:
            layer.register_forward_pre_hook(self._select, prepend=True)  # before those of ZeRO-3
            self._stock: Layer = layer.forward
            layer.forward = self._forward

    @property
    def gives_losses(self) -> bool:
        """Whether `nll` may be asked: nothing of the layer is trained, and no module is around it.

        What goes past the layer gives a module around it an input with a gradient and an output without, for
        which ZeRO-3's backward hooks have no place (BERT and its kin).
        """
        if self._layer is None or not self._is_outermost:
            return False
        return not any(p.requires_grad for p in self._layer.parameters())

    @contextmanager
    def heard(self) -> Iterator[list[Tensor]]:
        """What the layer itself gives at each of its calls inside."""
        given: list[Tensor] = []
        hook = self._layer and self._layer.register_forward_hook(lambda _, __, raw: given.append(raw))
        yield given
        if hook:
            hook.remove()

    def logits(self, index_M: Tensor, forward: Callable[[], Tensor]) -> Tensor:
        """The logits [M, V] at these places, out of a forward pass."""
        logits, is_selected = self._during(forward, index_M, None)
        return logits[0] if is_selected else logits.flatten(0, 1).index_select(0, index_M)

    def nll(
        self,
        index_M: Tensor,
        ids_M: Tensor,
        finish: Finish,
        vocab_size: int,
        forward: Callable[[], Tensor],
        loss: _Loss = summed_nll_behind,
    ) -> Tensor:
        """The summed negative log-likelihood of these tokens at these places: a float64 scalar.

        `finish` makes logits of what the layer gives; `loss` may be another of the room `likelihood`.
        """
        found: list[Tensor] = []

        def logits_of(hidden_CD: Tensor) -> Tensor:
            return finish(self._stock(hidden_CD[None]))

        def loss_of(hidden_1MD: Tensor) -> Tensor:
            found.append(loss(hidden_1MD[0], ids_M, logits_of, vocab_size))
            return hidden_1MD.new_zeros(1, 1, vocab_size)  # for what the family does to logits

        self._during(forward, index_M, loss_of)
        return found[0]

    def _during(
        self, forward: Callable[[], Tensor], index_M: Tensor, loss_of: _Answer | None
    ) -> tuple[Tensor, bool]:
        self._wanted_M, self._loss_of = index_M, loss_of
        try:
            return forward(), self._wanted_M is None
        finally:
            self._wanted_M = self._loss_of = self._chosen_1MD = None

    def _select(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Where a loss is wanted the hidden states go past the layer's hooks: no gradient passes it."""
        if self._wanted_M is None or args[0].dim() != 3:
            return None
        chosen_1MD = args[0].flatten(0, 1).index_select(0, self._wanted_M)[None]
        self._wanted_M = None
        if self._loss_of is None:
            return chosen_1MD, *args[1:]
        self._chosen_1MD = chosen_1MD
        return chosen_1MD.detach(), *args[1:]

    def _forward(self, hidden: Tensor, *rest: Any, **options: Any) -> Tensor:
        if self._loss_of is None or self._chosen_1MD is None:
            return self._stock(hidden, *rest, **options)
        chosen_1MD, self._chosen_1MD = self._chosen_1MD, None
        return self._loss_of(chosen_1MD)
