"""A run as it was found, in a folder or in MLflow: the value that both give.

Knows nothing of where runs are found, and of no other run.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Value:
    """A number, and what is known of how sure it is."""

    value: float
    low: float | None = None  # the interval that an evaluation gives
    high: float | None = None
    deviation: float | None = None  # over seeds
    count: int = 1  # of runs it is the mean of


Values = Mapping[str, Value]  # by measure (see `measures`)
Reading = tuple[str, str]  # of an evaluation: its split, and "" (trained), "base" or "instruction"


@dataclass(frozen=True)
class DataSet:
    """What a split was: where it was read, and a digest of its content if that was noted."""

    source: str
    digest: str = ""


@dataclass(frozen=True)
class Seen:
    """One run; `untrained` was measured without its training: of the "base", of the "instruction"."""

    name: str
    place: str  # its folder, or its id in MLflow
    status: str  # in MLflow's words; RUNNING while nobody said how it ended
    params: Mapping[str, str]  # every key of run.yaml that has a value, as text
    data: Mapping[str, DataSet]  # by split, as training has them
    values: Values
    untrained: Mapping[str, Values] = field(default_factory=dict)
    evaluated: Mapping[Reading, DataSet] = field(default_factory=dict)  # what evaluations read
    result_is_gone: bool = False
