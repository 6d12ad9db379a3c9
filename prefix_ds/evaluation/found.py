"""What an evaluation found: as two files of the run folder, as a table, and as metrics.

    evaluate/test.json    the verdict: loss, perplexity, scores with their intervals and signatures
    evaluate/test.jsonl   a line a record: prompt, output, references, its loss and its scores

Knows nothing of models.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.table import Table
from rich.text import Text

from prefix_ds.config import GenerateKeys
from prefix_ds.data.prompts import Prompt
from prefix_ds.errors import printable
from prefix_ds.evaluation.losses import RecordLosses
from prefix_ds.files import sync, telling_disk_errors, whole_file
from prefix_ds.scores import Scored
from prefix_ds.verdicts import Interval, Mark, Verdict

Front = Literal["trained", "bare", "instruction"]


@dataclass(frozen=True)
class Evaluation:
    """One split, read and written for."""

    split: str
    front: Front  # what stood in front of the texts
    mark: Mark  # of what was trained; nothing is known where it was left out
    data: str | list[str]  # as run.yaml has it
    changed: Mapping[str, str | None]  # the keys that numbers come from, where they are not those of run.yaml
    prompts: Sequence[Prompt]
    losses: RecordLosses
    outputs: Sequence[str] | None  # None: there was nothing to score them by
    scored: Scored
    generate: GenerateKeys
    seconds: float

    @property
    def name(self) -> str:
        """Of its files and metrics."""
        return self.split if self.front == "trained" else f"{self.split}.{self.front}"

    def metrics(self) -> dict[str, float]:
        """All numbers, as a run's metrics name them."""
        plain = {"loss": self.losses.loss, "perplexity": self.losses.perplexity}
        for score in self.scored.scores:
            plain |= {
                score.name: score.value,
                f"{score.name}/low": score.low,
                f"{score.name}/high": score.high,
            }
        return {f"evaluate/{self.name}/{name}": value for name, value in plain.items()}

    def verdict(self) -> Verdict:
        """What `NAME.json` holds."""
        return Verdict(
            split=self.split,
            step=self.mark.step,
            sha256=self.mark.sha256,
            data=self.data,
            changed=self.changed,
            records=len(self.prompts),
            targets=self.losses.num_targets,
            loss=self.losses.loss,
            perplexity=self.losses.perplexity,
            scores={s.name: Interval(value=s.value, low=s.low, high=s.high) for s in self.scored.scores},
            signatures=self.scored.signatures,
            generate=self.generate.model_dump(mode="json"),
            seconds=round(self.seconds, 3),
        )

    def rows(self) -> Iterator[dict[str, Any]]:
        """What `NAME.jsonl` holds, a record a line."""
        for number, prompt in enumerate(self.prompts):
            yield {
                "prompt": prompt.text,
                "output": self.outputs[number] if self.outputs is not None else None,
                "references": list(prompt.references),
                "nll": float(self.losses.nll_R[number]),
                "num_targets": int(self.losses.num_targets_R[number]),
                "scores": self.scored.of_records[number] if self.scored.of_records else {},
            }


def write_evaluation(folder: Path, found: Evaluation) -> None:
    """Writes both files into `folder`, of the run folder, or on a full disk neither. Raises RunError.

    Killed between the two renames, it leaves new lines beside the verdict of before.
    """
    with telling_disk_errors(folder):
        folder.mkdir(exist_ok=True)
    lines, verdict = folder / f"{found.name}.jsonl", folder / f"{found.name}.json"
    with whole_file(verdict) as new_verdict, whole_file(lines) as new_lines:  # the lines are there first
        with telling_disk_errors(lines), new_lines.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in found.rows())
        told = json.dumps(found.verdict().model_dump(), indent=1, ensure_ascii=False)
        new_verdict.write_text(told + "\n", encoding="utf-8")
        sync(new_verdict)  # a disk that is full says so now, while both old files are there


def table_of(found: Evaluation) -> Table:
    """The numbers, for a terminal."""
    losses = found.losses
    title = f"{found.name}: {len(found.prompts):,} records, {losses.num_targets:,} target tokens"
    table = Table(title=Text(printable(title)), title_justify="left")
    table.add_column("measure")
    table.add_column("value", justify="right")
    table.add_column("95 % interval", justify="right")
    table.add_row("loss (nats a token)", f"{losses.loss:.4f}", "")
    table.add_row("perplexity", f"{losses.perplexity:.4g}", "")
    for score in found.scored.scores:
        table.add_row(score.name, f"{score.value:.2f}", f"{score.low:.2f} to {score.high:.2f}")
    return table
