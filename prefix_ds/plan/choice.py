"""`model.recompute: auto`: as few layers are computed again as fit into the memory of a device.

Every layer that is computed again costs its forward pass once more and, in shards, one more gathering, so by
the plan's own figures the fewest are the fastest. They are looked for in eighths of the layers, by halving:
five plans at most, each of which takes a rehearsal. What a run had before is kept where it still fits: the
results are the same, but for rounding.

Knows nothing of where the memory is.
"""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

from prefix_ds.plan.estimate import Estimate

Again = bool | int


@dataclass(frozen=True)
class Choice:
    """What is computed again, and the figures that say why."""

    again: Again
    limit_bytes: int
    plain: Estimate  # without recomputation
    found: Estimate

    @property
    def fits(self) -> bool:
        """Whether what was found does; it may be all layers, and too little."""
        return self.found.total_bytes <= self.limit_bytes

    def line(self) -> str:
        """For the log, or for a plan."""
        number = {"True": "all", "False": "none"}.get(str(self.again), str(self.again))
        what = f"{number} of {self.plain.num_layers} layers"
        text = f"model.recompute: auto: {what} computed again: {_gib(self.found.total_bytes)} GiB planned"
        if self.again:
            more = self.found.flops / self.plain.flops - 1
            text += f" ({_gib(self.plain.total_bytes)} without; {more:.0%} more arithmetic)"
        too_much = "" if self.fits else ", which is too little"
        return f"{text}, {_gib(self.limit_bytes)} a device may use{too_much}"


def chosen(estimated: Callable[[Again], Estimate], limit_bytes: int, had: Again | None = None) -> Choice:
    """The least recomputation that fits, or all where nothing does. Raises ModelError."""

    def fits(again: Again) -> bool:
        return estimated(again).total_bytes <= limit_bytes

    plain = estimated(False)
    again = had if had is not None and fits(had) else None
    if again is None:
        again = False if fits(False) or not plain.num_layers else _least(fits, plain.num_layers)
    return Choice(again, limit_bytes, plain, estimated(again))


def _least(fits: Callable[[Again], bool], num_layers: int) -> Again:
    parts = sorted({-(-num_layers * eighths // 8) for eighths in range(1, 8)} - {num_layers})
    steps: list[Again] = [*parts, True]
    return steps[bisect_left(steps, True, 0, len(parts), key=fits)]


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:,.1f}"
