"""Time: step, log, validate, evaluate, save, stop.

Written out in full, without callbacks: what happens when can be read from top to bottom. The stream gives the
batch of a step from its number alone, so going on from a checkpoint is starting the loop at another number.

Knows nothing of what is in tensors, of ranks or of disks.
"""

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

from prefix_ds import tracking
from prefix_ds.config import EvaluateKeys, RunKeys, TrainKeys
from prefix_ds.data.batch import Share
from prefix_ds.engine.step import Engine, StepReport
from prefix_ds.errors import Stopped
from prefix_ds.optim import learning_rate
from prefix_ds.progress import Progress
from prefix_ds.speed import Gauge


class Stream(Protocol):
    """The training batches; those of a step depend on its number alone."""

    @property
    def num_steps(self) -> int:
        """Steps to its end."""
        ...

    def share(self, step: int) -> Share:
        """This rank's part of the global batch of a step."""
        ...


class Sample(Protocol):
    """Records to write for."""

    def scores(self) -> dict[str, float]:
        """The scores of what is written now, 0 to 100. Every rank calls this."""
        ...


class Memory(Protocol):
    """What outlives the process. Every rank calls both."""

    def save(self, engine: Engine, progress: Progress) -> None:
        """Writes a checkpoint."""
        ...

    def save_result(self, engine: Engine, progress: Progress) -> None:
        """Writes the result so far: it is the best."""
        ...


class StopQuestion(Protocol):
    """Whether to go on. Every rank asks together."""

    def agreed(self) -> bool:
        """Whether any rank was asked to stop."""
        ...


@dataclass(frozen=True)
class Run:
    """The parts of a run that the loop moves."""

    engine: Engine
    stream: Stream
    validation: Iterable[Share] | None  # this rank's parts of the whole split, in a fixed order
    sample: Sample | None  # None: no scores while training
    tracker: tracking.Tracker
    bar: tracking.Progress
    memory: Memory
    stop: StopQuestion
    gauge: Gauge


def fit(run: Run, train: TrainKeys, cadence: RunKeys, evaluate: EvaluateKeys, progress: Progress) -> Progress:
    """Trains from `progress` to the end of the stream.

    Raises Stopped, with a checkpoint written, when asked to stop.
    """
    start, progress = progress, _judged(run, cadence, evaluate, progress)
    if start.step and progress != start:  # it was due when the run was stopped
        run.memory.save(run.engine, progress)
    while progress.step < run.stream.num_steps:
        rate = learning_rate(progress.step, run.stream.num_steps, train)
        started = time.perf_counter()
        share = run.stream.share(progress.step)
        waited = time.perf_counter() - started
        report = run.engine.step(share, rate)
        seconds = time.perf_counter() - started
        speed = run.gauge.of_step(share, seconds, waited, report.waited_seconds)
        progress = replace(progress, step=progress.step + 1, valid_loss=None)
        last = progress.step == run.stream.num_steps

        tokens_per_second, mfu = speed["time/tokens_per_second"], f"{speed['time/mfu']:.0%}"
        run.bar.at(progress.step, loss=report.loss, tokens_per_second=tokens_per_second, mfu=mfu)
        if last or progress.step % cadence.log_every == 0:
            run.tracker.metrics(progress.step, _values(report, rate) | speed | run.gauge.of_memory())
        if run.stop.agreed():
            raise _stopped(run, progress)
        progress = _judged(run, cadence, evaluate, progress)
        if last or _due(cadence.save_every, progress.step):
            run.memory.save(run.engine, progress)
    return progress


def _stopped(run: Run, progress: Progress) -> Stopped:
    """Writes a checkpoint, from which what is due at this step is still due."""
    run.memory.save(run.engine, progress)
    return Stopped(f"stopped at step {progress.step} of {run.stream.num_steps}; checkpoint written")


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


def _judged(run: Run, cadence: RunKeys, keys: EvaluateKeys, progress: Progress) -> Progress:
    """Validates and scores what is due at this step, unless that was done before the run was stopped.

    Raises Stopped, with a checkpoint written, when asked to stop meanwhile.
    """
    if progress.judged_step == progress.step:
        return progress
    always = progress.step in (0, run.stream.num_steps)
    judged = progress
    try:
        if always or _due(cadence.valid_every, progress.step):
            judged = _validated(run, keys, judged)
        if always or _due(keys.every, progress.step):
            judged = _evaluated(run, keys, judged)
    except _Asked:
        raise _stopped(run, progress) from None
    return replace(judged, judged_step=progress.step)


class _Asked(Exception):  # noqa: N818 - no error either
    """To stop, in the middle of a validation."""


def _until_asked(shares: Iterable[Share], stop: StopQuestion) -> Iterator[Share]:
    """The shares; raises _Asked between two of them, on all ranks alike."""
    for share in shares:
        if stop.agreed():
            raise _Asked
        yield share


def _validated(run: Run, keys: EvaluateKeys, progress: Progress) -> Progress:
    """Validates; a result of lower loss (or any, without validation data, at the end) is kept."""
    if run.validation is None:
        if progress.step == run.stream.num_steps:
            run.memory.save_result(run.engine, progress)
        return progress
    loss = run.engine.validate(_until_asked(run.validation, run.stop))
    run.tracker.metrics(progress.step, {"valid/loss": loss})
    progress = replace(progress, valid_loss=loss)
    if keys.best_by == "loss" and _is_lower(loss, progress.best_loss):
        progress = replace(progress, best_loss=loss, best_step=progress.step)
        run.memory.save_result(run.engine, progress)
    return progress


def _is_lower(loss: float, best: float | None) -> bool:
    """Than the best so far; anything is better than what is no number."""
    return best is None or math.isnan(best) or loss < best


def _evaluated(run: Run, keys: EvaluateKeys, progress: Progress) -> Progress:
    """Scores what the run writes now; a result of a higher score, where that is what counts, is kept."""
    if run.sample is None:
        return progress
    if run.stop.agreed():
        raise _Asked
    scores = run.sample.scores()
    run.tracker.metrics(progress.step, {f"valid/{name}": value for name, value in scores.items()})
    score = scores.get(keys.best_by)
    if score is not None and (progress.best_score is None or score > progress.best_score):
        progress = replace(progress, best_score=score, best_step=progress.step)
        run.memory.save_result(run.engine, progress)
    return progress


def _values(report: StepReport, rate: float) -> dict[str, float]:
    return {
        "train/loss": report.loss,
        "train/grad_norm": report.grad_norm,
        "train/lr": rate,
        "train/tokens": report.num_tokens,
    }
