"""Mixtures of experts whose weights, stacked in one tensor, are stored in 8 bits.

transformers lets the function that runs a layer's experts be registered under a name, and marks every layer
that asks for it with what the function must know (gate or not, bias or not, which way the weights lie). Ours
multiplies by the experts that are hit one by one. Activation and gate are modules: they are called once for
all experts, as ZeRO-3 fetches ahead only while the order of modules is the same in every step, wherever the
tokens go. Experts of a family with code of its own stay in 16 bits.

Knows nothing of how a model is taken apart.
"""

from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from prefix_ds.int8.product import times_columns, times_rows

NAME = "prefix_ds_int8"
SCALE = "_scale"  # a stack's scales are beside it, under its name and this


def stacks_of(module: Any) -> list[str]:
    """The names of a module's stacked expert weights, if it runs them through transformers' registry."""
    if "is_transposed" not in vars(module) or "has_gate" not in vars(module):
        return []
    names = ["gate_up_proj" if module.has_gate else "up_proj", "down_proj"]
    return [name for name in names if getattr(module, name).dim() == 3]


def _run(module: Any, hidden_TE: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Each token's experts, weighted and summed. [tokens, E] to [tokens, E]."""
    expert_S, order = index_TK.flatten().sort(stable=True)
    token_S = order // index_TK.shape[1]
    counts = {n: count for n, count in enumerate(expert_S.bincount().tolist()) if n < module.num_experts}
    inner_SI = _projected(
        module, "gate_up_proj" if module.has_gate else "up_proj", hidden_TE[token_S], counts
    )
    inner_SI = module._apply_gate(inner_SI) if module.has_gate else module.act_fn(inner_SI)
    output_SE = _projected(module, "down_proj", inner_SI, counts)
    if module.has_post_expert_norm:
        output_SE = module.post_expert_norm(output_SE)
    weighted = output_SE * weights_TK.flatten()[order][: len(output_SE), None]
    total_TE = torch.zeros_like(hidden_TE, dtype=torch.float32)
    return total_TE.index_add(0, token_S[: len(output_SE)], weighted.float()).to(hidden_TE.dtype)


def _projected(module: Any, name: str, x_SK: Tensor, counts: dict[int, int]) -> Tensor:
    """Rows, sorted by expert, times their expert's weight; rows of no expert are left out."""
    times = times_columns if module.is_transposed else times_rows
    stack, scale = getattr(module, name), getattr(module, name + SCALE)
    left = len(x_SK) - sum(counts.values())
    *rows, _ = x_SK.split_with_sizes([*counts.values(), left])  # a slice's gradient would be as large as x
    parts = []
    for (expert, count), x_MK in zip(counts.items(), rows, strict=True):
        if count:
            y = times(x_MK, stack, scale, expert)
            parts.append(y + getattr(module, name + "_bias")[expert] if module.has_bias else y)
    return torch.cat(parts)


def switch_experts(module: nn.Module) -> None:
    """The module runs its experts through ours; those of other layers may be in 16 bits still."""
    config: Any = copy(module.config)
    config._experts_implementation = NAME
    module.config = config


ALL_EXPERTS_FUNCTIONS.register(NAME, _run)
