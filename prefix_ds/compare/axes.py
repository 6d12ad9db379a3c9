"""Axes: from values to places in a drawing, and the round numbers that stand along them.

Knows nothing of what is drawn.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Tick:
    """A mark of an axis."""

    at: float
    label: str


@dataclass(frozen=True)
class Axis:
    """From values to places along one axis."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    def at(self, value: float) -> float:
        """The place, rounded to what can be seen."""
        low, high, value = (math.log(v) if self.is_log else v for v in (self.low, self.high, value))
        return round(self.start + (value - low) / (high - low) * (self.end - self.start), 1)

    def ticks(self) -> tuple[Tick, ...]:
        """Round numbers between its ends."""
        if self.is_log:
            return tuple(Tick(self.at(value), _label(value, value)) for value in powers(self.low, self.high))
        values = _round_steps(self.low, self.high)
        apart = values[1] - values[0] if len(values) > 1 else 1.0
        return tuple(Tick(self.at(value), _label(value, apart)) for value in values)


def above(low: float, high: float) -> float:
    """An end that is not the beginning."""
    return high if high > low else low + (abs(low) or 1.0) * 0.1


def _round_steps(low: float, high: float) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten, some five of them."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def powers(low: float, high: float) -> list[float]:
    """Powers of ten; with 2 and 5 between them where they are few."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    tens = [10.0**exponent for exponent in exponents]
    inside = [value for value in tens if low <= value <= high]
    if len(inside) > 2:
        return inside
    return [value * factor for value in tens for factor in (1, 2, 5) if low <= value * factor <= high]


def _label(value: float, apart: float) -> str:
    """With as many digits as tell it from one so far apart."""
    return f"{value:,.{max(0, -math.floor(math.log10(apart) + 1e-9))}f}"
