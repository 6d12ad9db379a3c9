"""Equal layers behave alike, so a deep base is rehearsed with one layer of each kind.

The first layer is a kind of its own: nothing below the first prefix has a gradient. What a rehearsal of the
few layers saw is then laid out for all of them: their marks in order, forward and backward, and on top of
each what the layers below have saved. A base that does not run its layers one after the other and back is
rehearsed whole.

Knows nothing of what marks are for.
"""

import copy
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any

from torch import nn

from prefix_ds.model.recompute import repeatable_layers
from prefix_ds.plan.marks import Mark, Moment

_FEW = 3  # layers that are not worth the trouble


class IrregularError(Exception):
    """The layers do not run one after the other and back."""


@dataclass(frozen=True)
class Stack:
    """The layers of a base: the name of their list, those kept, and which of the kept stands for each."""

    name: str
    kept: tuple[int, ...]
    stands: tuple[int, ...]
    again: int  # of those kept, computed again

    def layer_of(self, module: str) -> int | None:
        """The kept layer that a module of the shortened base belongs to."""
        start, _, rest = module.partition(f"{self.name}.")
        return int(rest.split(".")[0]) if not start and rest else None

    def renamed(self, module: str, layer: int) -> str:
        """The name that a module of a kept layer has in the layer it stands for."""
        rest = module.removeprefix(f"{self.name}.").partition(".")[2]
        return f"{self.name}.{layer}" + (f".{rest}" if rest else "")


def shortened(base: Any, again: Collection[nn.Module]) -> tuple[Any, Stack] | None:
    """A copy of a base without the layers that are like others; those computed again are like each other.

    None: it has no layers to spare.
    """
    repeatable = set(repeatable_layers(base))
    lists = [
        (name, module)
        for name, module in base.named_modules()
        if isinstance(module, nn.ModuleList) and not repeatable.isdisjoint(module)
    ]
    if len(lists) != 1 or len(lists[0][1]) <= _FEW:
        return None
    name, layers = lists[0]
    kinds = [None, *((_kind(layer), layer in again) for layer in list(layers)[1:])]
    kept = tuple(dict.fromkeys(map(kinds.index, kinds)))
    stands = tuple(kept.index(kinds.index(kind)) for kind in kinds)
    base.set_submodule(name, nn.ModuleList([layers[n] for n in kept]))
    try:
        short = copy.deepcopy(base)
    finally:
        base.set_submodule(name, layers)
    return short, Stack(name, kept, stands, sum(layers[n] in again for n in kept))


def _kind(layer: nn.Module) -> Any:
    """All that tells a layer from others, but for its number."""
    return tuple((name, type(module).__name__, _plain(module)) for name, module in layer.named_modules())


def _plain(module: nn.Module) -> Any:
    values = tuple(
        (name, value)
        for name, value in vars(module).items()
        if isinstance(value, (int, float, str)) and name not in ("layer_idx", "training")
    )
    weights = tuple((n, tuple(p.shape), p.dtype) for n, p in module.named_parameters(recurse=False))
    return values, weights


def laid_out(marks: Sequence[Mark], stack: Stack) -> list[Mark]:
    """The marks of the whole base. Raises IrregularError."""
    by_layer = groupby(marks, key=lambda mark: stack.layer_of(mark.moment.module))
    runs = [(layer, list(run)) for layer, run in by_layer]
    there = range(len(stack.kept))
    if [layer for layer, _ in runs if layer is not None] != [*there, *reversed(there)]:
        raise IrregularError
    layered = [run for layer, run in runs if layer is not None]
    up, down = layered[: len(there)], layered[: -len(there) - 1 : -1]
    saved = [_after(run, marks).before.total - run[0].before.total for run in up]
    below = list(accumulate(saved, initial=0))  # of a layer in the shortened base
    beneath = list(accumulate((saved[position] for position in stack.stands), initial=0))

    def block(runs_up_or_down: list[list[Mark]], layer: int) -> list[Mark]:
        position = stack.stands[layer]
        more = beneath[layer] - below[position]
        return [_raised(_renamed(mark, stack, layer), more) for mark in runs_up_or_down[position]]

    layers = range(len(stack.stands))
    begin, middle, end = _around(runs, len(there))
    return [
        *begin,
        *(mark for layer in layers for mark in block(up, layer)),
        *(_raised(mark, beneath[-1] - below[-1]) for mark in middle),
        *(mark for layer in reversed(layers) for mark in block(down, layer)),
        *end,
    ]


def _after(run: list[Mark], marks: Sequence[Mark]) -> Mark:
    return marks[next(n for n, mark in enumerate(marks) if mark is run[-1]) + 1]


def _around(runs: list[tuple[int | None, list[Mark]]], num_kept: int) -> Iterator[list[Mark]]:
    """The marks before, between and after the layers. Raises IrregularError where others are among them."""
    first = next(n for n, (layer, _) in enumerate(runs) if layer is not None)
    turn = first + num_kept
    for piece in (runs[:first], runs[turn : turn + 1], runs[turn + 1 + num_kept :]):
        if any(layer is not None for layer, _ in piece):
            raise IrregularError
        yield [mark for _, run in piece for mark in run]


def _renamed(mark: Mark, stack: Stack, layer: int) -> Mark:
    module, *what = mark.moment
    return Mark(Moment(stack.renamed(module, layer), *what), mark.before, mark.highest, mark.flops)


def _raised(mark: Mark, more: int) -> Mark:
    return Mark(mark.moment, mark.before.raised(more), mark.highest.raised(more), mark.flops)
