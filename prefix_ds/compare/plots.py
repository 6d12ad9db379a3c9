"""Where everything of a plot stands: curves by step or by seconds, a score against the size of what is kept.

Places are in the units of an SVG drawing of WIDTH x HEIGHT, its origin at the top left; the page's template
draws them. So a plot needs no library and no script, is part of the page, and takes the page's colours in the
light and in the dark. *Rejected:* matplotlib (an import of a second, pictures with colours of their own, one
more dependency) and JavaScript (a page that says nothing where scripts are off, as in MLflow's own frame).

Colours are numbers: 1 to COLOURS for the best rows, which also have dashes of their own, 0 for the others.

Knows nothing of runs or of HTML.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from prefix_ds.compare.axes import Axis, Tick, above, powers

WIDTH, HEIGHT = 720, 380
LEFT, RIGHT, TOP, BOTTOM = 70, 16, 14, 48  # around the area that is drawn on
COLOURS = 8
_MOST_POINTS = 300  # of a curve
_TRIMMED = 0.02  # of the highest points: a start that is far off, or a run that diverged

XY = tuple[float, float]


@dataclass(frozen=True)
class Curve:
    """A named line through points."""

    label: str
    colour: int
    points: Sequence[XY]


@dataclass(frozen=True)
class Spot:
    """A point with a name, a longer label, and the ends of its interval if it has one."""

    name: str  # as written beside it; empty where there is no room
    label: str
    colour: int
    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Level:
    """A named height without an x."""

    label: str
    y: float


@dataclass(frozen=True)
class Path:
    """A curve as it is drawn."""

    label: str
    colour: int
    points: str


@dataclass(frozen=True)
class Plot:
    """All that is drawn, in the drawing's units."""

    name: str
    title: str
    description: str
    x_title: str
    y_title: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    paths: tuple[Path, ...] = ()
    spots: tuple[Spot, ...] = ()
    levels: tuple[Level, ...] = ()


def curves_plot(
    name: str, titles: tuple[str, str, str], curves: Sequence[Curve], levels: Sequence[Level] = ()
) -> Plot | None:
    """Curves, with dashed levels; `titles`: the plot's and its axes'. None where nothing is known."""
    clean = [Curve(c.label, c.colour, _finite(c.points)) for c in curves]
    clean = [curve for curve in clean if curve.points]
    if not clean:
        return None
    xs = [x for curve in clean for x, _ in curve.points]
    ys = [y for curve in clean for _, y in curve.points]
    x = Axis(min(xs), above(min(xs), max(xs)), LEFT, WIDTH - RIGHT)
    y = _height([*_trimmed(ys), *(level.y for level in levels)])
    paths = tuple(Path(c.label, c.colour, _polyline(_thinned(c.points), x, y)) for c in reversed(clean))
    return Plot(
        name,
        titles[0],
        f"{len(clean)} curves of {titles[2]} by {titles[1]}, from {min(ys):.4g} to {max(ys):.4g}.",
        titles[1],
        titles[2],
        x.ticks(),
        y.ticks(),
        paths=paths,
        levels=_placed_levels(levels, y),
    )


def sizes_plot(
    titles: tuple[str, str, str], spots: Sequence[Spot], levels: Sequence[Level], unit: Callable[[float], str]
) -> Plot | None:
    """Spots over a logarithmic size; None where there are none."""
    known = [s for s in spots if 0 < s.x < math.inf and math.isfinite(s.y)]
    if not known:
        return None
    sizes = [s.x for s in known]
    x = Axis(min(sizes) / 2, max(sizes) * 2, LEFT, WIDTH - RIGHT, is_log=True)
    heights = [v for s in known for v in (s.y, s.low, s.high) if v is not None and math.isfinite(v)]
    y = _height([*heights, *(level.y for level in levels)])
    return Plot(
        "sizes",
        titles[0],
        f"{len(known)} rows: {titles[2]} against {titles[1]}, a point each.",
        titles[1],
        titles[2],
        tuple(Tick(x.at(value), unit(value)) for value in powers(x.low, x.high)),
        y.ticks(),
        spots=tuple(_named_where_free([_placed(spot, x, y) for spot in known])),
        levels=_placed_levels(levels, y),
    )


def _placed(spot: Spot, x: Axis, y: Axis) -> Spot:
    low, high = (None if v is None or not math.isfinite(v) else y.at(v) for v in (spot.low, spot.high))
    return Spot(spot.name, spot.label, spot.colour, x.at(spot.x), y.at(spot.y), low, high)


def _named_where_free(spots: Sequence[Spot]) -> list[Spot]:
    """The names of the first ones stay, as far as they do not run into each other; the first is on top."""
    named: list[Spot] = []
    for spot in spots:
        is_free = all(
            abs(spot.x - other.x) > 150 or abs(spot.y - other.y) > 14 for other in named if other.name
        )
        named.append(spot if is_free and spot.colour else replace(spot, name=""))
    return named[::-1]


def _placed_levels(levels: Sequence[Level], y: Axis) -> tuple[Level, ...]:
    """Those that can be told apart: of some that are as good as one, the first."""
    placed: list[Level] = []
    for level in levels:
        height = y.at(level.y)
        if all(abs(height - other.y) > 14 for other in placed):
            placed.append(Level(level.label, height))
    return tuple(placed)


def _finite(points: Iterable[XY]) -> list[XY]:
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def _thinned(points: Sequence[XY]) -> Sequence[XY]:
    """As many as can be seen, the first and the last among them."""
    if len(points) <= _MOST_POINTS:
        return points
    step = (len(points) - 1) / (_MOST_POINTS - 1)
    return [points[round(index * step)] for index in range(_MOST_POINTS)]


def _trimmed(values: Sequence[float]) -> list[float]:
    """Without the highest few, which would press all others to the ground."""
    in_order = sorted(values)
    return in_order[: max(1, math.ceil(len(in_order) * (1 - _TRIMMED)))]


def _height(values: Sequence[float]) -> Axis:
    low, high = min(values), above(min(values), max(values))
    margin = 0.06 * (high - low)
    return Axis(low - margin, high + margin, HEIGHT - BOTTOM, TOP)


def _polyline(points: Sequence[XY], x: Axis, y: Axis) -> str:
    return " ".join(f"{x.at(a)},{y.at(b)}" for a, b in points)
