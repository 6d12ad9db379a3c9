"""How far the host runs ahead of a GPU: two layers.

What is gathered and let go of is counted on the host's clock, and memory that the host has let go of is free
only once the device has come so far. A host that queues a dozen layers while one computes therefore has the
memory of a dozen, however few may be alive at a time: in DeepSpeed the host waits for gathers, and never for
the device's work on what they brought. Two layers are enough for the next one's gather to run while this one
computes.

Rejected: waiting for the device after each layer, which leaves it without work until the host has come round.

Knows nothing of what is gathered.
"""

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from torch import Tensor, nn

_LAYERS_AHEAD = 2


class Event(Protocol):
    """A place in a device's work."""

    def record(self) -> None:
        """It is here, behind all that is queued so far."""

    def synchronize(self) -> None:
        """Waits until the device has come to it."""


def keep_pace(layers: Iterable[nn.Module], new_event: Callable[[], Event]) -> None:
    """At each of these layers, in either pass, the host waits for the device to begin the last but one."""
    ahead: deque[Event] = deque()

    def pace(*_: Any) -> None:
        if len(ahead) == _LAYERS_AHEAD:
            ahead.popleft().synchronize()
        ahead.append(new_event())
        ahead[-1].record()

    def pace_backward(_: nn.Module, __: Any, output: Any) -> None:
        parts = output if isinstance(output, tuple) else (output,)
        for tensor in parts:
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(pace)  # type: ignore[no-untyped-call]
                return

    for layer in layers:
        layer.register_forward_pre_hook(pace)
        layer.register_forward_hook(pace_backward)
