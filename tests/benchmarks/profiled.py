"""Where the time of some work goes, as torch's profiler sees it: operators, kernels, and what lies between."""

from dataclasses import dataclass

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from tests.benchmarks.made import seconds

_ATTENTION = ("scaled_dot_product", "flash", "fmha", "efficient_attention", "varlen")


@dataclass(frozen=True)
class Profile:
    """Rows of (name, calls, part of the time): the longest, and the rest as one. `attention`: (name, calls).
    `gaps`: milliseconds in which the device had nothing to do, the kernel before, and the one after."""

    operators: list
    attention: list
    gaps: list
    idle: float  # part of the time


def profiled(work, told=14):
    """Of one call, on a GPU where there is one."""
    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as seen:
        total = seconds(work) * 1e6
    averages = seen.key_averages()
    kernels = sorted((e for e in seen.events() if e.device_type == DeviceType.CUDA), key=_start)
    gaps = sorted(_gaps(kernels), key=lambda gap: -gap[0])
    return Profile(
        _longest(averages, total, told, on_gpu),
        [(e.key, e.count) for e in averages if any(part in e.key for part in _ATTENTION)],
        gaps[:5],
        sum(gap[0] for gap in gaps) * 1e3 / total,
    )


def _longest(averages, total, told, on_gpu):
    def own(event):
        return event.self_device_time_total if on_gpu else event.self_cpu_time_total

    wanted = [e for e in averages if not on_gpu or e.device_type == DeviceType.CUDA]
    events = sorted(wanted, key=own, reverse=True)
    rest = events[told:]
    rows = [(e.key, e.count, own(e) / total) for e in events[:told]]
    return [*rows, ("all others", sum(e.count for e in rest), sum(map(own, rest)) / total)]


def _start(event):
    return event.time_range.start


def _gaps(kernels):
    """(milliseconds, kernel before, kernel after), wherever none runs."""
    end, before = None, ""
    for kernel in kernels:
        if end is not None and _start(kernel) > end:
            yield (_start(kernel) - end) / 1e3, before, kernel.name
        if end is None or kernel.time_range.end > end:
            end, before = kernel.time_range.end, kernel.name
