"""What is compared: the name of a measure tells its title, how it is written, and whether less is better.

A measure is one of a run's summary (`valid_loss`), or a score of a split (`test/rougeL`, `test/loss`).
Knows nothing of runs.
"""

import math
from collections.abc import Callable, Iterable

from prefix_ds.compare.seen import Value
from prefix_ds.errors import RunError

DEFAULT = "valid_loss"
_VALID = "valid_"  # and the score that the best result was chosen by, of a sample of data.valid: valid_chrf
_TITLES = {
    "valid_loss": "validation loss",
    "train_loss": "training loss",
    "train_seconds": "seconds",
    "tokens_per_second": "tokens/s",
    "peak_gib": "GiB a rank",
    "result_bytes": "size",
    "mfu": "MFU",
    "steps": "steps",
}
_COSTS = ("train_loss", "train_seconds", "tokens_per_second", "peak_gib")
_SIZE = "result_bytes"
_UNSHOWN = {"first_valid_loss", "valid_step"}  # told by other rows, or of no interest side by side
_LESS_IS_BETTER = {
    "loss", "perplexity", "ter", "wer", "cer", "valid_loss", "train_loss", "train_seconds", "peak_gib",
    "result_bytes", "steps",
}  # fmt: skip


def results(names: Iterable[str], by: str) -> list[str]:
    """What runs are worth, in the order of columns; perplexity says what the loss says."""
    known = set(names)
    scores = sorted(name for name in known if is_score(name) and not name.endswith("/perplexity"))
    chosen = sorted(name for name in known if name.startswith(_VALID) and name not in _UNSHOWN)
    columns = dict.fromkeys((DEFAULT, by, *chosen, *scores, _SIZE))
    return [name for name in columns if name in known or name == by]


def costs(names: Iterable[str], by: str) -> list[str]:
    """What they took."""
    known = set(names) - {by}
    return [name for name in _COSTS if name in known]


def is_score(name: str) -> bool:
    """Whether it was measured by an evaluation of a split."""
    return "/" in name


def split_of(name: str) -> str:
    """The split whose data a measure is of: the training's for what training took."""
    return name.partition("/")[0] if is_score(name) else "valid" if name.startswith(_VALID) else "train"


def is_of_outputs(name: str) -> bool:
    """Whether it scores what a run writes, and does not depend on a tokenizer as losses do."""
    kind = name.partition("/")[2] if is_score(name) else name.removeprefix(_VALID)
    return split_of(name) != "train" and kind not in ("loss", "perplexity", "step")


def less_is_better(name: str) -> bool:
    """Known by name; of scores it is mostly more."""
    return name.rpartition("/")[2].lower() in _LESS_IS_BETTER


def title(name: str) -> str:
    """As the head of a column."""
    if name.startswith(_VALID) and name not in _TITLES:
        return f"validation {name.removeprefix(_VALID)}"
    return _TITLES.get(name, name.replace("/", " "))


def named(wish: str, names: Iterable[str]) -> str:
    """The measure that a user means: by its name, its title, or a score's name alone. Raises RunError."""
    known = [name for name in dict.fromkeys(names) if name not in _UNSHOWN]
    ways: tuple[Callable[[str], bool], ...] = (
        lambda name: name == wish,
        lambda name: title(name) == wish,
        lambda name: is_score(name) and name.rpartition("/")[2].lower() == wish.lower(),
        lambda name: name.startswith(_VALID) and wish.lower() in _called_while_training(name),
    )
    for is_meant in ways:
        found = [name for name in known if is_meant(name)]
        if len(found) == 1:
            return found[0]
        if found:
            raise RunError(f"--by {wish}: may be any of {', '.join(sorted(found))}")
    raise RunError(f"--by {wish}: none of these runs has it; known: {', '.join(sorted(known)) or 'nothing'}")


def _called_while_training(name: str) -> tuple[str, str]:
    """What metrics.jsonl calls it, and a score alone."""
    score = name.removeprefix(_VALID).lower()
    return f"valid/{score}", score


def written(name: str, value: Value | None) -> str:
    """The value with its unit, and its interval or its deviation over seeds."""
    return " ".join(filter(None, parts(name, value)))


def parts(name: str, value: Value | None) -> tuple[str, str]:
    """The same, what is behind the number apart."""
    if value is None:
        return "", ""
    text = number(name, value.value)
    if value.deviation is not None and name not in (*_COSTS, _SIZE):
        return text, f"± {number(name, value.deviation)}"
    if value.low is not None and value.high is not None:
        return text, f"[{number(name, value.low)}, {number(name, value.high)}]"
    return text, ""


def number(name: str, value: float) -> str:
    """A number with as many digits as tell anything."""
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else str(value)
    if name == "result_bytes":
        return size(value)
    if name.endswith("loss"):
        return f"{value:.4f}"
    if name == "mfu":
        return f"{value:.1%}"
    digits = 2 if is_score(name) or abs(value) < 100 else 0
    return f"{value:,.{digits}f}"


def size(num_bytes: float) -> str:
    """Bytes in the unit that fits."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(num_bytes) < 1000:
            return f"{num_bytes:.3g} {unit}" if unit != "B" else f"{num_bytes:.0f} B"
        num_bytes /= 1000
    return f"{num_bytes:,.3g} TB"
