"""Run folders to compare, written by the tracker itself: no training, but everything that one leaves."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from prefix_ds.config import config_text, parse_config
from prefix_ds.tracking import DatasetFacts, Facts, flattened, open_tracker

RUN = """
model: {name: acme/base}
prefix: {text: "Say it in short:"}
data: {train: train.jsonl, valid: valid.jsonl, test: test.jsonl, prompt: "{text}", target: " {goal}"}
run: {folder: none}
"""
FULL = ("train.method=full", "train.lr=1e-5")
BASE_LOSS, INSTRUCTION_LOSS = 3.0, 2.5


def made_run(
    folder: Path,
    name: str,
    *overrides: str,
    loss: float = 2.0,
    steps: int = 40,
    status: str = "FINISHED",
    size: int = 1000,
    digests: Mapping[str, str] | None = None,
    experiment: str = "compared",
    more: Sequence[tuple[int, Mapping[str, float]]] = (),
    targets: int = 0,
) -> Path:
    """A run that ends at a loss; `more` are records at its end, as `evaluate` would add them; `targets` are
    those of its validation data."""
    config = parse_config(
        RUN, [f"run.folder={folder / 'run'}", f"mlflow.experiment={experiment}", *overrides]
    )
    run = folder / f"{len(list(folder.iterdir())):04d}"
    run.mkdir()
    (run / "run.yaml").write_text(config_text(config))
    told = digests or {"train": "a" * 32, "valid": "b" * 32}
    sizes = {"valid": (targets // 10, targets)}
    data = tuple(
        DatasetFacts(f"{split}.jsonl", digest, split, "x", *sizes.get(split, ()))
        for split, digest in told.items()
    )
    facts = Facts(experiment, name, flattened(config.model_dump(mode="json")), {"team": "tests"}, data)
    tracker = open_tracker(run, facts, uri=None, resume_step=None)
    start = BASE_LOSS if config.train.method == "full" else INSTRUCTION_LOSS
    for step in range(0, steps + 1, 10):
        if step:
            tracker.metrics(step, step_values(step, 1 + start))
        tracker.metrics(step, {"valid/loss": curve(start, loss, step / max(1, steps))})
    for step, values in more:
        tracker.metrics(step, values)
    tracker.close(status)  # type: ignore[arg-type]
    if size:
        result = run / ("model" if config.train.method == "full" else "prefix")
        result.mkdir()
        (result / "weights.safetensors").write_bytes(bytes(size))
    return run


def step_values(step: int, loss: float) -> dict[str, float]:
    return {
        "train/loss": loss / math.sqrt(step),
        "time/step_seconds": 0.5,
        "time/tokens_per_second": 1000.0 + step,
        "time/mfu": 0.4,
        "memory/peak_gib": 1.0 + step / 1000,
    }


def curve(start: float, end: float, part: float) -> float:
    return end + (start - end) * (1 - part) ** 2


def evaluated(
    run: Path,
    name: str,
    loss: float,
    scores: Mapping[str, tuple[float, float, float]],
    data: str = "",
    **more: object,
) -> None:
    """An evaluation as `prefix-ds evaluate` writes it, on `data` or on what run.yaml names."""
    split = name.partition(".")[0]
    intervals = {s: dict(zip(("value", "low", "high"), told, strict=True)) for s, told in scores.items()}
    told = {"split": split, "data": data or f"{split}.jsonl", "records": 630, "targets": 12345}
    told |= {"loss": loss, "perplexity": math.exp(loss), "scores": intervals, "signatures": {}}
    told |= {"generate": {}, "seconds": 12.3} | more
    (run / "evaluate").mkdir(exist_ok=True)
    (run / "evaluate" / f"{name}.json").write_text(json.dumps(told))


def with_prefix(run: Path, step: int, sha256: str) -> None:
    """Gives a run the file of a prefix, without numbers."""
    text = json.dumps({"__metadata__": {"prefix_ds": json.dumps({"step": step, "sha256": sha256})}})
    header = text.encode()
    (run / "prefix" / "prefix.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)


def evaluation_metrics(
    name: str, loss: float, scores: Mapping[str, tuple[float, float, float]]
) -> dict[str, float]:
    """The same as `prefix-ds evaluate` tells it to MLflow."""
    found = {f"evaluate/{name}/loss": loss, f"evaluate/{name}/perplexity": math.exp(loss)}
    for score, told in scores.items():
        ends = ("", "/low", "/high")
        found |= {f"evaluate/{name}/{score}{end}": value for end, value in zip(ends, told, strict=True)}
    return found


def a_sweep(folder: Path, **facts: str) -> list[Path]:
    """Two rates of a prefix with three seeds each, and all weights once."""
    folder.mkdir(exist_ok=True)
    runs = [
        made_run(
            folder, f"prefix-{rate}-s{seed}", f"train.lr={rate}", f"train.seed={seed}", loss=loss, **facts
        )
        for rate, losses in ((0.1, (1.5, 1.52, 1.54)), (0.3, (1.4, 1.41, 1.45)))
        for seed, loss in enumerate(losses)
    ]
    return [*runs, made_run(folder, "full", *FULL, loss=1.3, size=500_000, **facts)]
