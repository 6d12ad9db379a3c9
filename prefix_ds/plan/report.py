"""A plan for people, and for programs.

Knows nothing of how it was made.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from prefix_ds.config import RunConfig
from prefix_ds.devices import Device
from prefix_ds.plan.advice import Way
from prefix_ds.plan.estimate import COMPUTE_PART, LINK_PART, Estimate, Job, Step


@dataclass(frozen=True)
class Plan:
    """All that is said of a run."""

    config: RunConfig
    job: Job
    device: Device
    step: Step
    columns: dict[tuple[str, ...], Estimate]  # by the keys that differ: none first
    ways: list[Way]
    notes: list[str]


def show(console: Console, plan: Plan) -> None:
    """The tables."""
    shape, job, device = plan.step.shape, plan.job, plan.device
    name = plan.config.model.name or plan.config.model.config.get("model_type")
    console.print(
        f"{name}: {job.num_devices:,} x {device.name} ({_many(job.nodes, 'node')} of "
        f"{job.devices_per_node}), {_many(plan.step.micro_batches, 'micro-batch', 'es')} a step, each of "
        f"{_many(shape.rows, 'row')} of {_many(shape.length, 'token')} behind "
        f"{_many(shape.prefix_length, 'prefix position')}",
        soft_wrap=True,
    )
    columns = {_label(words): estimate for words, estimate in plan.columns.items()}
    console.print(_memory(columns, device))
    console.print(_time(columns))
    console.print(_ways(plan.ways, device))
    for note in plan.notes:
        console.print(f"note: {note}", soft_wrap=True)
    console.print(
        f"Assumed: examples of {_many(job.example_tokens, 'token')}, {job.target_part:.0%} of them targets; "
        f"{COMPUTE_PART:.0%} of the peak in products, {LINK_PART:.0%} of the links; transfers overlap with "
        "arithmetic. Memory and traffic follow the run's own code and DeepSpeed's rules.",
        style="dim",
        soft_wrap=True,
    )


def _many(number: int, word: str, ending: str = "s") -> str:
    return f"{number:,} {word}{'' if number == 1 else ending}"


def _label(overrides: tuple[str, ...]) -> str:
    return ", ".join(overrides) or "as it is"


def _memory(columns: dict[str, Estimate], device: Device) -> Table:
    usable = f"a run may fill {_gib(device.usable_bytes)} of {device.memory_gib:g}"
    title = f"Memory at the peak of a step; {usable}"
    table = Table("GiB a device", *columns, title=title, title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    terms = dict.fromkeys(term for estimate in columns.values() for term in estimate.memory)
    for term in terms:
        table.add_row(term, *(_gib(estimate.memory.get(term, 0)) for estimate in columns.values()))
    table.add_section()
    table.add_row("total", *(_verdict(estimate.total_bytes, device) for estimate in columns.values()))
    if any(estimate.host_bytes for estimate in columns.values()):
        table.add_row("shards on the host", *(_gib(e.host_bytes) for e in columns.values()))
    return table


def _verdict(total: int, device: Device) -> str:
    fits = "fits" if total <= device.usable_bytes else "DOES NOT FIT"
    return f"{_gib(total)} {fits}"


def _time(columns: dict[str, Estimate]) -> Table:
    table = Table("a step", *columns, title="Traffic and time", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    estimates = list(columns.values())
    table.add_row("GiB received by a device", *(_gib(e.traffic.received_bytes) for e in estimates))
    table.add_row("collective calls", *(f"{e.traffic.calls:,}" for e in estimates))
    for name in estimates[0].seconds:
        if any(e.seconds[name] for e in estimates):
            table.add_row(f"seconds of {name}", *(f"{e.seconds[name]:.3f}" for e in estimates))
    table.add_section()
    table.add_row("seconds", *(f"{e.step_seconds:.3f}" for e in estimates))
    table.add_row("limited by", *(e.limit for e in estimates))
    table.add_row("tokens/s, all devices", *(f"{e.tokens / e.step_seconds:,.0f}" for e in estimates))
    return table


def _ways(found: list[Way], device: Device) -> Table:
    table = Table(
        "with", "GiB a device", "fits here", f"fewest {device.name}", title="Ways", title_justify="left"
    )
    for way in found:
        table.add_row(
            _label(way.overrides),
            _gib(way.total_bytes),
            "yes" if way.fits else "no",
            "none" if way.fewest is None else f"{way.fewest:,}",
        )
    return table


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:,.2f}"


def as_data(plan: Plan) -> dict[str, Any]:
    """The same as plain values; bytes, seconds and numbers, or None where one is without an end."""
    derived = ("total_bytes", "step_seconds", "limit")
    data = {
        "model": plan.config.model.name,
        "job": asdict(plan.job),
        "device": asdict(plan.device),
        "step": asdict(plan.step),
        "assumed": {"compute_part": COMPUTE_PART, "link_part": LINK_PART},
        "estimates": {
            _label(words): asdict(estimate) | {field: getattr(estimate, field) for field in derived}
            for words, estimate in plan.columns.items()
        },
        "ways": [asdict(way) for way in plan.ways],
        "notes": plan.notes,
    }
    return {name: _finite(part) for name, part in data.items()}


def _finite(tree: Any) -> Any:
    """JSON has no infinity: the rate of what a device of one's own does not tell."""
    if isinstance(tree, dict):
        return {name: _finite(part) for name, part in tree.items()}
    if isinstance(tree, list | tuple):
        return [_finite(part) for part in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree
