"""What is drawn of a comparison: losses by step and by time, and what a row is worth for its size.

Curves are drawn of the first rows only, since more lines than that tell nothing; the first eight rows have
colours of their own, in every drawing and in the tables. Ways without training are dashed levels.

Knows nothing of HTML or of where runs were found.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from prefix_ds.compare import measures
from prefix_ds.compare.comparison import Comparison
from prefix_ds.compare.plots import COLOURS, Curve, Level, Plot, Spot, curves_plot, sizes_plot
from prefix_ds.compare.rows import Row
from prefix_ds.compare.seen import Seen
from prefix_ds.compare.table import short
from prefix_ds.tracking import Histories

MOST_CURVES = 30  # runs
_MOST_LEVELS = 3
_METRICS = ("valid/loss", "train/loss")
_LOSS = "loss, nats a target token"


class Source(Protocol):
    """Where the runs were found."""

    def histories(self, runs: Sequence[Seen], names: Sequence[str]) -> list[Histories]:
        """Of each run the values of some metrics at all steps. Raises PrefixError."""
        ...


@dataclass(frozen=True)
class Drawn:
    """A run whose curves are drawn, in the colour of its row."""

    run: Seen
    colour: int
    histories: Histories

    def curve(self, metric: str, units_a_step: float = 1) -> Curve:
        """One of its metrics by step, or by what a step takes."""
        points = [(point.step * units_a_step, point.value) for point in self.histories.get(metric, [])]
        return Curve(short(self.run.name), self.colour, points)

    @property
    def seconds_a_step(self) -> float | None:
        """None where its time is not known."""
        seconds, steps = self.run.values.get("train_seconds"), self.run.values.get("steps")
        return seconds.value / steps.value if seconds and steps and steps.value else None


def colours_of(rows: Sequence[Row]) -> list[int]:
    """A colour for each row: 1, 2, ... for the first that were trained, 0 for the others."""
    trained = [index for index, row in enumerate(rows) if row.is_trained][:COLOURS]
    return [trained.index(index) + 1 if index in trained else 0 for index in range(len(rows))]


def drawings(comparison: Comparison, source: Source) -> list[Plot]:
    """Those for which there are numbers. Raises PrefixError."""
    drawn = _drawn(comparison, source)
    levels = _levels(comparison, measures.DEFAULT)
    timed = [(d, seconds) for d in drawn if (seconds := d.seconds_a_step)]
    by_step = [d.curve("valid/loss") for d in drawn]
    by_time = [d.curve("valid/loss", seconds) for d, seconds in timed]
    training = [d.curve("train/loss") for d in drawn]
    tried = [
        curves_plot("valid", ("Validation loss by step", "step", _LOSS), by_step, levels),
        curves_plot("time", ("Validation loss by time", "seconds in steps", _LOSS), by_time, levels),
        curves_plot("train", ("Training loss by step", "step", _LOSS), training),
        _sizes(comparison),
    ]
    return [plot for plot in tried if plot is not None]


def _drawn(comparison: Comparison, source: Source) -> list[Drawn]:
    colours = colours_of(comparison.rows)
    rows = [(row, colour) for row, colour in zip(comparison.rows, colours, strict=True) if row.is_trained]
    pairs = [(run, colour) for row, colour in rows for run in row.members][:MOST_CURVES]
    histories = source.histories([run for run, _ in pairs], _METRICS)
    return [Drawn(run, colour, told) for (run, colour), told in zip(pairs, histories, strict=True)]


def _levels(comparison: Comparison, measure: str) -> list[Level]:
    rows = [row for row in comparison.rows if not row.is_trained and measure in row.values]
    rows.sort(key=lambda row: len(row.members), reverse=True)  # the start that most runs have
    levels = dict.fromkeys(Level(short(row.name, 60), row.values[measure].value) for row in rows)
    return [level for level in levels if math.isfinite(level.y)][:_MOST_LEVELS]


def _sizes(comparison: Comparison) -> Plot | None:
    by = comparison.by if comparison.by != "result_bytes" else measures.DEFAULT
    title = measures.title(by)
    pairs = zip(comparison.rows, colours_of(comparison.rows), strict=True)
    spots = [_spot(row, colour, by) for row, colour in pairs if {"result_bytes", by} <= row.values.keys()]
    titles = (f"{title[:1].upper()}{title[1:]} against size", "size of what is kept", title)
    return sizes_plot(titles, spots, _levels(comparison, by), measures.size)


def _spot(row: Row, colour: int, by: str) -> Spot:
    """A row; over seeds its interval is a deviation to either side."""
    value, size = row.values[by], row.values["result_bytes"]
    low, high = value.low, value.high
    if value.deviation is not None:
        low, high = value.value - value.deviation, value.value + value.deviation
    label = f"{short(row.name)}: {measures.written(by, value)}, {measures.written('result_bytes', size)}"
    return Spot(short(row.name), label, colour, size.value, value.value, low, high)
