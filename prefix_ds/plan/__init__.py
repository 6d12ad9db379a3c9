"""`prefix-ds plan`: memory of a device, traffic and time of a step, before anything is booked.

A base of any size is built without numbers, and one micro-batch of the run is rehearsed on it (`rehearsal`);
DeepSpeed's gathering is replayed on what was seen (`gathering`); the rest is sums (`estimate`, `advice`).
Rejected: formulas for activations, which would be written for one family and be wrong for the next.

Knows nothing of a run's data: how long examples are is said on the command line.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache

from rich.console import Console

from prefix_ds.config import ModelKeys, RunConfig
from prefix_ds.devices import Device, device_named
from prefix_ds.engine.settings import deepspeed_settings
from prefix_ds.initial import chosen_slots
from prefix_ds.plan.advice import changed, least_recomputed, recomputed, warnings, ways
from prefix_ds.plan.base import bare_base, prefix_length
from prefix_ds.plan.estimate import Estimate, Job, check_job, estimate, step_of
from prefix_ds.plan.rehearsal import Rehearsal, Shape, Stage, between
from prefix_ds.plan.report import Plan, as_data, show
from prefix_ds.prefix import Slot

__all__ = ["Device", "Job", "device_named", "estimator", "least_recomputed", "plan", "recomputed"]


def plan(config: RunConfig, job: Job, device: Device, console: Console, *, as_json: bool = False) -> None:
    """Prints the plan of a run. Raises PrefixError."""
    check_job(job)
    length = prefix_length(config)
    estimated = estimator(device, length)
    notes = []
    if config.model.recompute == "auto":
        choice = least_recomputed(config, job, device, estimated)
        config, notes = recomputed(config, choice.again), [choice.line()]
    columns: dict[tuple[str, ...], Estimate] = {(): estimated(config, job)}
    if columns[()].num_layers:  # that can be computed again
        other = (f"model.recompute={'true' if config.model.recompute is False else 'false'}",)
        columns[other] = estimated(changed(config, other), job)
    made = Plan(
        config,
        job,
        device,
        step_of(config, job, length),
        columns,
        ways(config, job, device, estimated),
        [*notes, *warnings(config, job, device, columns[()])],
    )
    if as_json:
        console.print_json(data=as_data(made))
    else:
        show(console, made)


def estimator(device: Device, length: int) -> Callable[[RunConfig, Job], Estimate]:
    """Estimates of variants of a run on a kind of device; what is alike is rehearsed once."""

    @cache
    def stage(dumped: str) -> Stage:
        return Stage(bare_base(ModelKeys.model_validate_json(dumped)))

    @cache
    def rehearsal_of(dumped: str, shape: Shape) -> Rehearsal:
        config = RunConfig.model_validate_json(dumped)
        alike = config.model.model_copy(update={"recompute": False})

        def chosen(slots: tuple[Slot, ...]) -> tuple[Slot, ...]:
            return chosen_slots(slots, config.prefix)

        some = chosen if config.prefix.layers != "all" else None
        return stage(alike.model_dump_json()).rehearsed(config.model, shape, device.kind, some)

    @cache
    def seen(dumped: str, shape: Shape, most_rows: int) -> Rehearsal:
        if shape.rows == most_rows:
            return rehearsal_of(dumped, shape)
        few, many = (
            rehearsal_of(dumped, replace(shape, rows=rows, targets=shape.targets * rows // shape.rows))
            for rows in (1, most_rows)
        )
        return between(few, many, (shape.rows - 1) / (most_rows - 1))

    def estimated(config: RunConfig, job: Job) -> Estimate:
        step = step_of(config, job, length)
        alike = config.model_copy(update={"engine": config.engine.model_copy(update={"deepspeed": "zero3"})})
        settings = deepspeed_settings(config, job.num_devices)
        rehearsal = seen(alike.model_dump_json(), step.shape, step.most_rows)
        return estimate(rehearsal, step, config, settings, job, device)

    return estimated
