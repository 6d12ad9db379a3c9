"""A base under ZeRO-3: its parameters are shards, gathered layer by layer while it runs.

For a frozen base `deepspeed.initialize` is given no optimizer, which yields DeepSpeed's parameter-offload
engine: it shards, gathers and frees, in the forward and the backward pass, and has no opinion about
gradients. Its module is called directly (the engine's own `forward` would refuse a plain `loss.backward()`).
Rejected: training the prefix as a ZeRO-3 parameter, which makes saving, resuming and sampling collective
operations and cannot restore an indivisible shard.

Knows nothing of prefixes.
"""

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prefix_ds.dist import has_gpu
from prefix_ds.engine.pace import keep_pace
from prefix_ds.engine.settings import Settings
from prefix_ds.engine.sizing import sized, sizes_of
from prefix_ds.model.recompute import repeatable_layers


@dataclass(frozen=True)
class Sharded:
    """A module whose parameters live in shards; `engine` is DeepSpeed's and must outlive its use."""

    module: nn.Module
    engine: Any
    settings: Settings  # resolved: those that DeepSpeed got

    def num_parameters(self) -> int:
        """Elements of the whole model."""
        return sum(getattr(p, "ds_numel", p.numel()) for p in self.module.parameters())

    def num_in_8_bits(self) -> int:
        """Elements stored as int8."""
        return sum(p.ds_numel for p in self.module.parameters() if p.dtype == torch.int8)  # type: ignore[attr-defined]

    def resident_bytes(self, device: torch.device | None = None) -> int:
        """Bytes of parameters and buffers that this rank holds between two steps, in all or on a device."""
        whole = [*self.module.parameters(), *self.module.buffers()]  # a shard's parameter is empty
        held = [t for t in [*self._shards(), *whole] if device is None or t.device.type == device.type]
        return sum(t.numel() * t.element_size() for t in held)

    def bytes_on_disk(self) -> int:
        """Bytes of this rank's shards that lie on a disk."""
        return sum(s.ds_numel * s.element_size() for s in self._shards() if s.final_location == "nvme")

    def let_go(self) -> None:
        """Ends a backward pass: gives back what modules gathered below which nothing has a gradient.

        DeepSpeed does not learn that it is through with them. Its own optimizers do this too.
        """
        self.engine.optimizer.release_backward_leftovers()

    def _shards(self) -> list[Any]:
        return [p.ds_tensor for p in self.module.parameters() if hasattr(p, "ds_tensor")]


def start_deepspeed() -> Any:
    """The package, which is told of the device before it is imported, with its process group."""
    has_gpu()
    import deepspeed
    import deepspeed.ops

    # Which of DeepSpeed's C++ operators could be compiled here: none is asked for but an all-reduce for CPUs,
    # compiled on first use for 40 s, that ZeRO-3 never calls; to find out the answers takes half a second.
    deepspeed.ops.__compatible_ops__ = {}
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    deepspeed.init_distributed(verbose=False)
    return deepspeed


@contextlib.contextmanager
def no_modules_left() -> Iterator[None]:
    """Inside, forward passes may be left in the middle, as that of a layer which is computed again is.

    DeepSpeed would keep the modules they were in for ever.
    """
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK

    length = len(FWD_MODULE_STACK)
    yield
    del FWD_MODULE_STACK[length:]


@contextlib.contextmanager
def sharded_construction(settings: Settings) -> Iterator[None]:
    """Within this block transformers builds new models in shards. Every rank calls this."""
    from transformers.integrations import HfDeepSpeedConfig

    start_deepspeed()
    held = HfDeepSpeedConfig(settings)  # transformers keeps a weak reference only
    yield
    del held


def sharded(base: nn.Module, settings: Settings) -> Sharded:
    """A base whose parameters are shards, ready to run and frozen. Every rank calls this."""
    return _initialised(base.requires_grad_(False), settings)


def sharded_with_optimizer(base: nn.Module, settings: Settings, optimizer: torch.optim.Optimizer) -> Sharded:
    """A base whose parameters are shards, all of it trained by DeepSpeed. Every rank calls this."""
    return _initialised(base, settings, optimizer)


def _initialised(
    base: nn.Module, settings: Settings, optimizer: torch.optim.Optimizer | None = None
) -> Sharded:
    settings = sized(settings, sizes_of(base))
    _fetch_at_once(base)
    if has_gpu():
        keep_pace(repeatable_layers(base), partial(torch.cuda.Event, blocking=True))
    engine, *_ = start_deepspeed().initialize(model=base, config=settings, optimizer=optimizer)
    return Sharded(engine.module, engine, settings)


def _fetch_at_once(base: nn.Module) -> None:
    """Layers are one module to ZeRO-3, and so are experts in a loop of their own, over those that tokens hit.

    Module by module ZeRO-3 lets go of most of a layer that is computed again, and gathers it once more for
    the backward pass: 2.7 layers instead of 2; and its hooks take twice the time. As for the experts, it
    fetches ahead in the order of modules, which must be the same on all ranks; transformers' own, which call
    theirs once for all, and the classes DeepSpeed knows need no help.
    """
    from deepspeed.utils import set_z3_leaf_module

    for layer in repeatable_layers(base):
        set_z3_leaf_module(layer, flag=True)
    for module in base.modules():
        has_own_loop = type(module).__name__.endswith("Experts") and "has_gate" not in vars(module)
        if has_own_loop or isinstance(getattr(module, "experts", None), nn.ModuleList):
            set_z3_leaf_module(module, flag=True)


def whole_tensors(module: nn.Module, keep: bool) -> dict[str, Tensor]:
    """All parameters and saved buffers on the CPU, gathered one at a time; empty where `keep` is False.

    Names of one parameter have one tensor. Every rank calls this; rank 0 usually is the one that keeps.
    """
    deepspeed = start_deepspeed()
    whole: dict[str, Tensor] = {}
    copies: dict[nn.Parameter, Tensor] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if parameter not in copies:
            with deepspeed.zero.GatheredParameters([parameter]):
                copies[parameter] = parameter.detach().to("cpu", copy=True) if keep else parameter
        whole[name] = copies[parameter]
    if not keep:
        return {}
    return whole | {name: t.cpu() for name, t in module.state_dict().items() if name not in whole}
