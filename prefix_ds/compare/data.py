"""A comparison as plain values, for programs: `--json`.

Knows nothing of files.
"""

import math
from typing import Any

from prefix_ds.compare.comparison import Comparison
from prefix_ds.compare.rows import Row
from prefix_ds.compare.seen import Value


def as_data(comparison: Comparison) -> dict[str, Any]:
    """Numbers as they are (null for what is none), measures by their names."""
    return {
        "source": comparison.source,
        "by": comparison.by,
        "less_is_better": comparison.less_is_better,
        "differing_keys": list(comparison.keys),
        "rows": [_row(row) for row in comparison.rows],
        "runs": [_row(row) for row in comparison.runs],
        "warnings": list(comparison.warnings),
    }


def _row(row: Row) -> dict[str, Any]:
    return {
        "name": row.name,
        "kind": row.kind,
        "best": row.is_best,
        "data": row.data,
        "seeds": row.seeds,
        "places": [run.place for run in row.members],
        "notes": row.notes,
        "keys": dict(row.keys),
        "values": {name: _value(value) for name, value in row.values.items()},
    }


def _value(value: Value) -> dict[str, float | None]:
    numbers = {"low": value.low, "high": value.high, "deviation": value.deviation}
    known = {name: _number(number) for name, number in numbers.items() if number is not None}
    return {"value": _number(value.value), "count": value.count} | known


def _number(number: float) -> float | None:
    """JSON has no NaN."""
    return number if math.isfinite(number) else None
