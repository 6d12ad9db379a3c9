"""What ZeRO-3 gathers ahead and what it never shards, from the sizes of the model's own parameters.

A key that the DeepSpeed file leaves out gets its value here; one that it gives stays. DeepSpeed's defaults
are numbers for one size of model: of a small one they gather all at once, and of a large one hardly a layer.

*Gathered at a time* (`stage3_max_live_parameters`) is a layer and a half: while one computes, the next one's
beginning is on its way, whatever the layer's size. *A call* (`stage3_prefetch_bucket_size`) brings a quarter
of a layer: fewer would wait for latencies, and what comes together lies twice in memory until it is used.
*Whole on every rank* (`stage3_param_persistence_threshold`) are the smallest parameters, as many as make up
one part in a hundred of the model: norms and biases, whose gathering costs more than holding them. All three
have bounds, below which a device notices no saving, and above which links are busy already. *Buffers of a
disk* (`offload_param.buffer_count`) are as many as there are weights that come at once, and one.

Knows nothing of DeepSpeed but the names of its keys.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any

from torch import nn

from prefix_ds.engine.settings import Settings
from prefix_ds.model.recompute import repeatable_layers


@dataclass(frozen=True)
class Sizes:
    """Of a model, in numbers."""

    parameters: tuple[int, ...]
    layers: tuple[int, ...]  # that can be computed again; none is a base that does not tell its layers
    at_once: tuple[tuple[int, ...], ...] = ()  # the parameters of each layer, or module, that come together

    @property
    def layer(self) -> int:
        """The largest."""
        return max(self.layers, default=sum(self.parameters))


def sizes_of(base: nn.Module) -> Sizes:
    """The sizes of a base, whole or in shards."""
    by_layer = [_numbers(layer.parameters()) for layer in repeatable_layers(base)]
    by_module = [_numbers(module.parameters(recurse=False)) for module in base.modules()]
    return Sizes(_numbers(base.parameters()), tuple(map(sum, by_layer)), tuple({*by_layer, *by_module}))


def sized(settings: Settings, sizes: Sizes) -> Settings:
    """DeepSpeed's settings, in which nothing is left to its defaults that depends on the model's sizes."""
    zero: dict[str, Any] = {
        "reduce_bucket_size": _within(2**23, sizes.layer, 50_000_000),
        "stage3_prefetch_bucket_size": _within(2**23, sizes.layer // 4, 50_000_000),
        "stage3_param_persistence_threshold": _never_sharded(sizes.parameters),
        "stage3_max_live_parameters": _within(2**25, sizes.layer * 3 // 2, 1_000_000_000),
    }
    zero |= settings["zero_optimization"]
    disk = zero.get("offload_param") or {}
    if disk.get("device") == "nvme":
        most = _most_sharded(sizes.at_once, zero["stage3_param_persistence_threshold"])
        zero["offload_param"] = {"buffer_count": most + 1} | disk
    return settings | {"zero_optimization": zero}


def _numbers(parameters: Iterable[Any]) -> tuple[int, ...]:
    return tuple(getattr(p, "ds_numel", p.numel()) for p in parameters)


def _never_sharded(parameters: tuple[int, ...]) -> int:
    """The size up to which all parameters together are a small part of the model."""
    most = _within(2**22, sum(parameters) // 100, 2**25)
    sizes, totals = zip(*((size, sum(equal)) for size, equal in groupby(sorted(parameters))), strict=True)
    return max((s for s, total in zip(sizes, accumulate(totals), strict=True) if total <= most), default=0)


def _most_sharded(at_once: tuple[tuple[int, ...], ...], threshold: int) -> int:
    return max((sum(size > threshold for size in together) for together in at_once), default=0)


def _within(least: int, value: int, most: int) -> int:
    return max(least, min(value, most))
