"""What evaluations of a run came to, as its folder keeps them: a file for each, `evaluate/NAME.json`.

    test.json               the trained run on the split `test`
    test.bare.json          the base with nothing in front
    test.instruction.json   the written instruction, untrained

`prefix-ds evaluate` writes them; the comparison, the card of an export and MLflow's tags read them. A run may
go on after it was evaluated, so a verdict bears the mark of what was trained: its step, and the digest that a
prefix has in its file.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from prefix_ds.errors import RunError

_Count = Annotated[int, Field(ge=0)]
# What numbers come from, by what stood in front of the texts: sections, and of the prefix its places.
_READ = {"": ("model.", "data.", "prefix.layers"), "instruction": ("model.", "data.", "prefix.")}
_UNREAD = {f"model.{name}" for name in ("recompute", "attention")}  # change nothing without training
_UNREAD |= {f"data.{name}" for name in ("train", "valid", "test", "task", "packing", "workers")}
_LONGEST_HEADER = 100_000_000  # bytes, as safetensors has it; a damaged file may claim any number


class _Kept(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True)


class Interval(_Kept):
    """A score over all records, and the ends of its 95 % interval by bootstrap."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Mark:
    """Which result of a run it is; None: that is not known."""

    step: int | None = None
    sha256: str | None = None  # of a prefix: its facts and its numbers

    def is_other_than(self, other: "Mark") -> bool:
        """Whether the two are known to be different results."""
        if self.sha256 and other.sha256:
            return self.sha256 != other.sha256
        return None not in (self.step, other.step) and self.step != other.step


class Verdict(_Kept):
    """Of one split. `loss` is in nats a target token."""

    split: str
    step: int | None = None  # this and the digest: of what was trained; None as well in older files
    sha256: str | None = None
    data: str | list[str] | None = None  # as run.yaml has it
    changed: Mapping[str, str | None] = Field(default_factory=dict)  # of `keys_read`, from those of run.yaml
    records: _Count
    targets: _Count
    loss: float
    perplexity: float
    scores: Mapping[str, Interval] = Field(default_factory=dict)
    signatures: Mapping[str, str] = Field(default_factory=dict)
    generate: Mapping[str, Any] = Field(default_factory=dict)
    seconds: float

    @property
    def mark(self) -> Mark:
        """What was evaluated."""
        return Mark(self.step, self.sha256)


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


def present_verdicts(run: Path) -> dict[str, Verdict]:
    """As `read_verdicts`, without those of another prefix than is there now. Raises RunError."""
    found, now = read_verdicts(run), prefix_mark(run) or Mark()
    return {name: told for name, told in found.items() if front_of(name) or not told.mark.is_other_than(now)}


def prefix_mark(run: Path) -> Mark | None:
    """The mark of the prefix in a run folder, from its file's header; None where there is none to be read."""
    try:
        with (run / "prefix" / "prefix.safetensors").open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(size, _LONGEST_HEADER)))
        facts = json.loads(header["__metadata__"]["prefix_ds"])
        return Mark(int(facts["step"]), str(facts["sha256"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def keys_read(params: Mapping[str, str], front: str) -> dict[str, str]:
    """The keys that numbers come from with this in front, but for the data and how outputs are written."""
    sections = _READ.get(front, ("model.", "data."))
    return {key: text for key, text in params.items() if key.startswith(sections) and key not in _UNREAD}


def front_of(name: str) -> str:
    """What stood in front of the texts: `bare` of test.bare; empty for what was trained."""
    return name.partition(".")[2]
