"""A run as it was found, in a folder or in MLflow: the value that both give.

Knows nothing of where runs are found, and of no other run.
"""

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field


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
    """What a split was, as far as it was noted: where it was read, a digest of its content, its records, and
    what a tokenizer and the longest example made of them."""

    source: str
    digest: str = ""
    records: int = 0
    examples: int = 0
    targets: int = 0  # tokens that a loss is a mean over
    changed: tuple[tuple[str, str | None], ...] = ()  # keys that an evaluation had otherwise than the run

    def may_be(self, other: "DataSet") -> bool:
        """Whether nothing that is known of both differs."""
        return self.changed == other.changed and all(
            mine == its for mine, its in zip(astuple(self), astuple(other), strict=True) if mine and its
        )


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
    written: Mapping[Reading, str] = field(default_factory=dict)  # how the outputs were that they scored
    outdated: Sequence[str] = ()  # measures of an earlier result than the run has now
    damaged: Sequence[str] = ()  # what is wrong with evaluations that cannot be read
    started: float = 0  # unix seconds
    result_is_gone: bool = False

    def params_for(self, data: DataSet | None) -> dict[str, str]:
        """Its keys, as they were where this was read."""
        told = {**self.params, **dict(data.changed if data else ())}
        return {key: text for key, text in told.items() if text is not None}
