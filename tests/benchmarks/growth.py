"""Time and peak memory of a step against the length of a row, layers, ranks, and the prefix.

    python -m tests.benchmarks.growth [--quick] [FOLDER]

A Llama 512 wide, 4,096 tokens, bfloat16; unless they are what grows: 4 layers, one row of 2,048 tokens in
documents of 256, half of the tokens targets, a prefix of 30, one rank with one thread. More ranks share one
row's worth of 4,096 tokens. Printed are seconds (the median of three steps, glibc keeping what is freed) and
MiB of a rank at its peak beyond what Python and its packages take (in a step before those, glibc keeping
nothing). Beside them stands what arithmetic says: of time the operations counted by
`tests.benchmarks.arithmetic`, at the rate of the point that has most; of memory the bytes that `prefix-ds plan`
finds. Slopes are those of a line through the logarithms. A series ends early where a step takes a minute.

Plots go to FOLDER (docs/); with `--quick`, fewer points and single steps, to none unless it is named.
"""

import logging
import os
import statistics
import sys
import tempfile
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from prefix_ds.config import parse_config
from prefix_ds.dist import joined_world
from prefix_ds.plan import Job, estimator
from tests.benchmarks.arithmetic import Work
from tests.benchmarks.made import llama, made_share, new_engine, seconds, use_threads
from tests.planned import CPU
from tests.ranks import on_ranks
from tests.resident import MIB, forget_highest, give_back_what_is_free, highest, relax, resident, settle

DOCS = Path(__file__).resolve().parents[2] / "docs"
SIZES = {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8, "vocab_size": 4096}
DOCUMENT, TOO_LONG_SECONDS = 256, 60
RUN = """
model: {{name: {folder}}}
prefix: {{init: random, length: {prefix}}}
data: {{max_length: {tokens}}}
train: {{global_batch_size: {examples}, micro_batch_tokens: {tokens}}}
"""


@dataclass(frozen=True)
class Point:
    """What a rank runs."""

    tokens: int = 2048
    layers: int = 4
    ranks: int = 1
    prefix: int = 30

    @property
    def sizes(self):
        """Of the base."""
        return SIZES | {"num_hidden_layers": self.layers}

    @property
    def row(self):
        """The lengths of its documents."""
        return [DOCUMENT] * (self.tokens // DOCUMENT)


@dataclass(frozen=True)
class Series:
    """One number of a point that grows, by its values."""

    name: str
    key: str
    values: tuple[int, ...]
    quick: tuple[int, ...]

    def points(self, quick):
        """One a value; ranks share the tokens."""
        for value in self.quick if quick else self.values:
            point = replace(Point(), **{self.key: value})
            yield value, replace(point, tokens=4096 // value) if self.key == "ranks" else point


ALL = (
    Series("tokens in a row", "tokens", tuple(1024 << n for n in range(6)), (1024, 2048, 4096, 8192)),
    Series("layers", "layers", (2, 4, 8, 16, 32), (2, 4, 8)),
    Series("ranks", "ranks", (1, 2, 4), (1, 2, 4)),
    Series("prefix length", "prefix", (1, 4, 16, 64, 128, 256, 512), (1, 64, 512)),
)


def main():
    quick = "--quick" in sys.argv
    words = [word for word in sys.argv[1:] if not word.startswith("--")]
    place = Path(words[0]) if words else None if quick else DOCS
    if place:
        place.mkdir(parents=True, exist_ok=True)
    table = Table("what grows", "over", "of", "measured, first to last", "slope", "arithmetic's slope")
    for series in ALL:
        found = measured(series, quick)
        xs = [x for x, *_ in found]
        time, memory = ([row[n] for row in found] for n in (1, 2))
        times, bytes_ = predicted_times(series, found), [planned(point) for *_, point in found]
        for what, ys, told in (("seconds", time, times), ("MiB", memory, bytes_)):
            span = f"{ys[0]:.2f} to {ys[-1]:.2f}" if what == "seconds" else f"{ys[0]:.0f} to {ys[-1]:.0f}"
            slopes = (f"{slope(xs, numbers):.2f}" for numbers in (ys, told))
            table.add_row(series.name, f"{xs[0]:,} to {xs[-1]:,}", what, span, *slopes)
        if place:
            draw(place / f"growth_{series.key}.svg", series.name, xs, (time, times), (memory, bytes_))
    Console(width=120).print(table)


def measured(series, quick):
    """(value, seconds, MiB, point) of each point, up to the first that takes too long."""
    found = []
    for value, point in series.points(quick):
        answers = on_ranks(point.ranks, step_of, point, 1 if quick else 3, timeout_seconds=900)
        time, memory = map(max, zip(*answers, strict=True))
        print(f"{series.name} {value:,}: {time:.2f} s, {memory:.0f} MiB", flush=True)
        found.append((value, time, memory, point))
        if time > TOO_LONG_SECONDS:
            print(f"{series.name}: what comes after {value:,} is left out", flush=True)
            break
    return found


def step_of(point, steps):
    """Of a rank: median seconds of a step, MiB at its peak."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    settle()
    use_threads(1)
    with joined_world() as world:
        give_back_what_is_free()
        own = resident()
        engine = new_engine(point.sizes, world, point.prefix)
        share = made_share(point.row, SIZES["vocab_size"], world, point.tokens)
        engine.step(share, 1e-3)
        give_back_what_is_free()
        forget_highest()
        engine.step(share, 1e-3)
        peak = highest() - own
        relax()
        return statistics.median(seconds(lambda: engine.step(share, 1e-3)) for _ in range(steps)), peak


def predicted_times(series, found):
    """Seconds by the operations, at the rate of the point with most; ranks beyond the cores wait."""
    cores = len(os.sched_getaffinity(0))
    loads = [flops(point) * max(1, point.ranks / cores) for *_, point in found]
    most = loads.index(max(loads))
    return [load * found[most][1] / loads[most] for load in loads]


def flops(point):
    """Operations of a rank."""
    return Work(point.sizes, tuple(point.row), point.tokens // 2, point.prefix).flops()


def planned(point):
    """MiB at the peak, as `prefix-ds plan` has it."""
    with tempfile.TemporaryDirectory() as folder:
        llama(point.sizes).save_pretrained(folder)
        told = {"folder": folder, "prefix": point.prefix, "tokens": point.tokens}
        config = parse_config(RUN.format(**told, examples=len(point.row) * point.ranks))
        found = estimator(CPU, point.prefix)(config, Job(1, point.ranks, DOCUMENT, 0.5))
    return found.total_bytes / MIB


def slope(xs, ys):
    """Of a line through the logarithms."""
    return np.polyfit(np.log(xs), np.log(ys), 1)[0] if len(xs) > 1 else float("nan")


def draw(path, name, xs, time, memory):
    """Two panels: points as measured, a line as arithmetic has it."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot, ticker

    mpl.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": path.stem, "font.size": 9}
    figure, panels = pyplot.subplots(1, 2, figsize=(7.2, 2.8), layout="constrained")
    for panel, what, (found, told) in zip(
        panels, ("seconds a step", "MiB of a rank"), (time, memory), strict=True
    ):
        panel.loglog(xs, told, "-", color="0.6", label=f"arithmetic, slope {slope(xs, told):.2f}")
        panel.loglog(xs, found, "o", color="C0", label=f"measured, slope {slope(xs, found):.2f}")
        panel.set(xlabel=name, ylabel=what, xticks=xs, ylim=(min(found + told) / 2, max(found + told) * 2))
        panel.set_xticks(xs, [f"{x:,}" if x < 1024 else f"{x // 1024}k" for x in xs])
        panel.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter("{x:,.6g}")
        panel.minorticks_off()
        panel.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


if __name__ == "__main__":
    main()
