"""AdamW over the trained tensors alone; the learning-rate curve as a pure function.

The rate of a step depends on the step's number and nothing else, so a run that goes on from a checkpoint, or
on other ranks, follows the same curve. Knows nothing of DeepSpeed, models or time.
"""

import math
from collections.abc import Iterable

import torch
from torch import nn

from prefix_ds.config import TrainKeys
from prefix_ds.errors import ConfigError


def check_warmup(num_steps: int, keys: TrainKeys) -> None:
    """Raises ConfigError for a run of so many steps that would end before it has reached `train.lr`."""
    if keys.warmup_steps > num_steps > 0:
        raise ConfigError(
            f"train.warmup_steps: {keys.warmup_steps}, but the run has {num_steps} steps, and would never "
            "reach train.lr; lower it, or train longer"
        )


def learning_rate(step: int, num_steps: int, keys: TrainKeys) -> float:
    """The rate of step 0 <= step < num_steps: linear warmup to `train.lr`, then the schedule's way down."""
    if step < keys.warmup_steps:
        return keys.lr * (step + 1) / keys.warmup_steps
    done = (step - keys.warmup_steps) / max(1, num_steps - keys.warmup_steps)
    if keys.schedule == "cosine":
        return keys.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    if keys.schedule == "linear":
        return keys.lr * max(0.0, 1 - done)
    return keys.lr


def adamw(parameters: Iterable[nn.Parameter], keys: TrainKeys) -> torch.optim.AdamW:
    """torch's AdamW with the run's settings; its rate is set before each step."""
    return torch.optim.AdamW(parameters, lr=keys.lr, betas=keys.betas, weight_decay=keys.weight_decay)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's memory as named tensors: `0.exp_avg` belongs to its first parameter.

    Empty before a step.
    """
    state = optimizer.state_dict()["state"]
    return {f"{index}.{name}": tensor for index, parts in state.items() for name, tensor in parts.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """Puts back what `optimizer_tensors` gave."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
