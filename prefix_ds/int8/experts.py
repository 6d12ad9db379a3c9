"""Mixtures of experts whose weights, stacked in one tensor, are stored in 8 bits.

transformers lets the function that runs a layer's experts be registered under a name, and marks every layer
that asks for it with what the function must know (gate or not, bias or not, which way the weights lie). Ours
runs the experts that are hit one by one. Experts of a family with code of its own stay in 16 bits.

Knows nothing of how a model is taken apart.
"""

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
    hit = [expert for expert in sorted(set(expert_S.tolist())) if expert < module.num_experts]
    outputs = [_one(module, expert, hidden_TE[token_S[expert_S == expert]]) for expert in hit]
    output_SE = torch.cat(outputs)
    if module.has_post_expert_norm:
        output_SE = module.post_expert_norm(output_SE)
    weighted = output_SE * weights_TK.flatten()[order][: len(output_SE), None]
    total_TE = torch.zeros_like(hidden_TE, dtype=torch.float32)
    return total_TE.index_add(0, token_S[: len(output_SE)], weighted.float()).to(hidden_TE.dtype)


def _one(module: Any, expert: int, x: Tensor) -> Tensor:
    inner = _projected(module, "gate_up_proj" if module.has_gate else "up_proj", expert, x)
    inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
    return _projected(module, "down_proj", expert, inner)


def _projected(module: Any, name: str, expert: int, x: Tensor) -> Tensor:
    times = times_columns if module.is_transposed else times_rows
    y = times(x, getattr(module, name), getattr(module, name + SCALE), expert)
    return y + getattr(module, name + "_bias")[expert] if module.has_bias else y


def switch_experts(module: nn.Module) -> None:
    """The module runs its experts through ours."""
    module.config._experts_implementation = NAME  # type: ignore[union-attr]


ALL_EXPERTS_FUNCTIONS.register(NAME, _run)
