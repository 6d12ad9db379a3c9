"""What to change when a run does not fit, or wastes what it has.

The ways to need less memory are tried one by one and then together, each with the fewest devices it would do
with. Knows nothing of how an estimate is made.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import inf

from prefix_ds.config import RunConfig
from prefix_ds.devices import Device
from prefix_ds.plan.choice import Choice, chosen
from prefix_ds.plan.estimate import Estimate, Job

_MOST_DEVICES = 4096

Estimated = Callable[[RunConfig, Job], Estimate]


@dataclass(frozen=True)
class Way:
    """A variant of a run: the keys that differ, its bytes a device, and the fewest devices it fits on."""

    overrides: tuple[str, ...]
    total_bytes: int
    fits: bool
    fewest: int | None  # None: not on any number that was tried


def ways(config: RunConfig, job: Job, device: Device, estimated: Estimated) -> list[Way]:
    """The run as it is, and what would make it smaller."""
    least = least_recomputed(config, job, device, estimated)
    return [
        _way(changed(config, overrides), overrides, job, device, estimated)
        for overrides in _changes(config, least.again, least.plain.num_layers)
    ]


def _changes(config: RunConfig, least: bool | int, num_layers: int) -> Iterator[tuple[str, ...]]:
    yield ()
    recompute = ("model.recompute=true",) if num_layers and config.model.recompute is not True else ()
    eight = ("model.bits=8",) if _may_take_8_bits(config) else ()
    offload = ("engine.deepspeed=zero3_offload",) if config.engine.deepspeed == "zero3" else ()
    if recompute:
        yield recompute
        if not isinstance(least, bool) and least != config.model.recompute:
            yield (f"model.recompute={least}",)
    if eight:
        yield (*recompute, *eight)
    if offload:
        yield (*recompute, *eight, *offload)


def _may_take_8_bits(config: RunConfig) -> bool:
    """Whether it has not, and they are not refused: with weights that are trained, and on disks."""
    on_disk = config.engine.nvme_folder is not None
    return config.model.bits == 16 and config.train.method == "prefix" and not on_disk


def changed(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """The configuration with some keys given anew."""
    for override in overrides:
        path, _, value = override.partition("=")
        section, _, key = path.partition(".")
        typed: object = {"true": True, "false": False}.get(value, int(value) if value.isdigit() else value)
        part = getattr(config, section).model_copy(update={key: typed})
        config = config.model_copy(update={section: part})
    return config


def recomputed(config: RunConfig, again: bool | int) -> RunConfig:
    """The configuration with so many layers computed again."""
    return changed(config, [f"model.recompute={str(again).lower()}"])


def least_recomputed(
    config: RunConfig, job: Job, device: Device, estimated: Estimated, had: bool | int | None = None
) -> Choice:
    """What `model.recompute: auto` comes to on a device; what it came to before is kept if it fits."""
    return chosen(lambda again: estimated(recomputed(config, again), job), device.usable_bytes, had)


def _way(
    config: RunConfig, overrides: tuple[str, ...], job: Job, device: Device, estimated: Estimated
) -> Way:
    limit = device.usable_bytes
    total = estimated(config, job).total_bytes
    fewest = _fewest(job, lambda other: estimated(config, other).total_bytes <= limit)
    return Way(overrides, total, total <= limit, fewest)


def _fewest(job: Job, fits: Callable[[Job], bool]) -> int | None:
    """The smallest number of devices: within a node any, beyond it whole nodes."""
    inside = [replace(job, nodes=1, devices_per_node=n) for n in range(1, job.devices_per_node + 1)]
    most = _MOST_DEVICES // job.devices_per_node
    beyond = [replace(job, nodes=n) for n in range(2, most + 1)]
    every = [*inside, *beyond]
    asked = min(job.devices_per_node + job.nodes - 2, len(every) - 1)  # it is known already, and divides
    low, high = (0, asked) if fits(every[asked]) else (asked + 1, len(every))
    fewest = bisect_left(every, True, low, high, key=fits)  # more devices never need more memory each
    return every[fewest].num_devices if fewest < len(every) else None


def warnings(config: RunConfig, job: Job, device: Device, found: Estimate) -> Iterator[str]:
    """What is wasted, a line each."""
    idle = job.num_devices - config.train.global_batch_size
    if idle > 0:
        yield (
            f"train.global_batch_size: {config.train.global_batch_size} leaves {idle:,} of "
            f"{job.num_devices:,} devices without an example: use fewer devices, or raise it"
        )
    if config.model.dtype == "float32" and device.kind != "cpu":
        yield (
            "model.dtype: float32: the times are those of bfloat16, and products in float32 take many times "
            "longer on a GPU: use bfloat16"
        )
    if config.engine.nvme_folder:
        yield "how fast the disks are is not in this plan, and they may be slower than all the rest"
    if found.traffic.copied_bytes and device.host_gbs == inf:
        yield "how fast the link to the host is is not in this plan: give --link-gbps"
    room = found.seconds["arithmetic"]
    if found.step_seconds > 1.5 * room and not idle > 0:
        halved = ", and model.bits=8 halves what is gathered" if _may_take_8_bits(config) else ""
        verb = "take" if found.limit.startswith("links") else "takes"
        yield (
            f"the {found.limit} {verb} {found.step_seconds / room:.1f} times as long as the arithmetic: a "
            "higher train.micro_batch_tokens, and as many more examples in train.global_batch_size, gather "
            f"the base less often a token; so do fewer devices{halved}"
        )
