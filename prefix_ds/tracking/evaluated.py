"""What each evaluation of a run was of, as tags of the run's counterpart in MLflow: metrics cannot say it.

    evaluate.test.data           the data it read: `prefix-ds evaluate` may be told others than run.yaml has
    evaluate.test.step           the step of what was evaluated: a run may go on afterwards
    evaluate.test.records        how many there were; and the tokens that the loss is a mean over (targets)
    evaluate.test.generate       how outputs were written, where there are scores of them
    evaluate.test.scores         which there are: metrics of earlier evaluations of the split stay beside them
    evaluate.test.changed        the keys that it was told otherwise than run.yaml has them, as JSON
    evaluate.test.bare.data      the same of the base with nothing in front

Knows nothing of MLflow or of scores.
"""

import contextlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from prefix_ds.errors import RunError
from prefix_ds.tracking.facts import cut
from prefix_ds.tracking.masking import masked
from prefix_ds.verdicts import Mark, Verdict, read_verdict, verdict_files

_HEAD = "evaluate."
_LONGEST = 1000  # characters of a changed key: templates and a text together are no longer than a tag


@dataclass(frozen=True)
class Told:
    """What an evaluation was of; empty, 0 and None stand for what is not known."""

    data: str = ""  # without secrets
    step: int | None = None
    records: int = 0
    targets: int = 0
    generate: str = ""
    scores: str | None = None  # their names
    changed: Mapping[str, str | None] = field(default_factory=dict)  # without secrets

    @property
    def mark(self) -> Mark:
        """Of what was evaluated, without its digest."""
        return Mark(self.step)


def told_of(verdict: Verdict) -> Told:
    """What a verdict was of."""
    data = verdict.data or ""
    source = masked(data if isinstance(data, str) else json.dumps(data))
    scores = " ".join(verdict.scores)
    return Told(
        source, verdict.step, verdict.records, verdict.targets, _written(verdict), scores, verdict.changed
    )


def evaluation_tags(run: Path) -> dict[str, str]:
    """The tags of a run folder; none of an evaluation that cannot be read."""
    found: dict[str, str] = {}
    for name, path in verdict_files(run).items():
        try:
            told = asdict(told_of(read_verdict(path)))
        except RunError:
            continue
        found |= {f"{_HEAD}{name}.{fact}": _text(value) for fact, value in told.items()}
    return found


def tagged_evaluations(tags: Mapping[str, str]) -> dict[str, Told]:
    """What the evaluations (test, test.bare) were of, from a run's tags."""
    found: dict[str, dict[str, Any]] = {}
    for tag, text in tags.items():
        name, _, fact = tag.removeprefix(_HEAD).rpartition(".")
        if tag.startswith(_HEAD) and name and (value := _value(fact, text)) is not None:
            found.setdefault(name, {})[fact] = value
    return {name: Told(**facts) for name, facts in found.items()}


def _text(value: str | int | Mapping[str, str | None] | None) -> str:
    """An empty one too: what an earlier evaluation told must not stay."""
    if isinstance(value, Mapping):
        short = {key: text and cut(text, _LONGEST) for key, text in value.items()}
        return json.dumps(short, ensure_ascii=False) if value else ""
    return "" if value is None else str(value)


def _value(fact: str, text: str) -> str | int | dict[str, str | None] | None:
    if fact == "changed":
        with contextlib.suppress(ValueError, TypeError):
            return dict(json.loads(text))
        return None
    if fact in ("data", "generate", "scores"):
        return text
    return int(text) if fact in ("step", "records", "targets") and text.isdecimal() else None


def _written(verdict: Verdict) -> str:
    """The keys that outputs depend on: greedy and beams draw nothing, and batches change nothing."""
    keys = verdict.generate if verdict.scores else {}
    names = ["num_beams", "max_new_tokens"]
    if keys.get("temperature"):
        names += ["temperature", "top_p", "seed"]
    return ", ".join(f"{name} {keys[name]}" for name in names if name in keys)
