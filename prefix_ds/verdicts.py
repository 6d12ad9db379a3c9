"""What evaluations of a run came to, as its folder keeps them: a file for each, `evaluate/NAME.json`.

    test.json               the trained run on the split `test`
    test.bare.json          the base with nothing in front
    test.instruction.json   the written instruction, untrained

`prefix-ds evaluate` writes them; the comparison, the card of an export and MLflow's tags read them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from prefix_ds.errors import RunError

_Count = Annotated[int, Field(ge=0)]


class _Kept(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True)


class Interval(_Kept):
    """A score over all records, and the ends of its 95 % interval by bootstrap."""

    value: float
    low: float | None = None
    high: float | None = None


class Verdict(_Kept):
    """Of one split. `loss` is in nats a target token."""

    split: str
    data: str | list[str] | None = None  # as run.yaml has it
    records: _Count
    targets: _Count
    loss: float
    perplexity: float
    scores: Mapping[str, Interval] = Field(default_factory=dict)
    signatures: Mapping[str, str] = Field(default_factory=dict)
    generate: Mapping[str, Any] = Field(default_factory=dict)
    without_prefix: bool = False
    seconds: float


def verdict_files(run: Path) -> dict[str, Path]:
    """By name (test, test.bare), in the order of names."""
    found = sorted((run / "evaluate").glob("[!.]*.json"))  # a dot: one that is being written, or was left
    return {path.name.removesuffix(".json"): path for path in found}


def read_verdicts(run: Path) -> dict[str, Verdict]:
    """All of a run folder, by name. Raises RunError for a file that is none."""
    return {name: read_verdict(path) for name, path in verdict_files(run).items()}


def read_verdict(path: Path) -> Verdict:
    """One file. Raises RunError."""
    try:
        return Verdict.model_validate_json(path.read_bytes())
    except OSError as error:
        reason = error.strerror or str(error)
    except ValidationError as error:
        first = error.errors()[0]
        reason = ": ".join(filter(None, (".".join(map(str, first["loc"])), first["msg"])))
    raise RunError(f"{path}: is no evaluation: {reason}; evaluate again, or remove it")


def front_of(name: str) -> str:
    """What stood in front of the texts: `bare` of test.bare; empty for what was trained."""
    return name.partition(".")[2]
