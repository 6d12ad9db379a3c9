"""What the demo's last stage found: for each way to tell a record, its loss and its outputs, as one file.

Knows nothing of how it is measured or shown; imports no torch.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from prefix_ds.files import write_text_atomically

FILE = "scores.json"


@dataclass(frozen=True)
class Scores:
    """What one way reached."""

    way: str
    valid_loss: float  # nats a target token
    outputs: tuple[str, ...]  # one a test record


@dataclass(frozen=True)
class Comparison:
    """All ways, on the same test records."""

    records: tuple[str, ...]
    references: tuple[str, ...]
    scores: tuple[Scores, ...]

    def num_exact(self, scores: Scores) -> int:
        """Outputs that are the reference, letter for letter."""
        return sum(map(str.__eq__, scores.outputs, self.references))


def write_comparison(folder: Path, comparison: Comparison) -> None:
    """Leaves it in the demo's folder."""
    write_text_atomically(folder / FILE, json.dumps(asdict(comparison), indent=2) + "\n")


def read_comparison(folder: Path) -> Comparison:
    """What `write_comparison` left."""
    told = json.loads((folder / FILE).read_text(encoding="utf-8"))
    scores = tuple(Scores(s["way"], s["valid_loss"], tuple(s["outputs"])) for s in told["scores"])
    return Comparison(tuple(told["records"]), tuple(told["references"]), scores)
