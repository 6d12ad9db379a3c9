"""Mixtures of experts without numbers: which expert a token goes to is unknown, how many each goes to is not.

All copies of all tokens go through one expert, whose products have the shapes that those of all together
have. Knows nothing of what is counted.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from prefix_ds.int8 import stacks_of
from prefix_ds.int8.experts import SCALE
from prefix_ds.int8.product import times_columns, times_rows

_NAME = "prefix_ds_plan"


def balance_experts(base: Any) -> None:
    """All layers of a base that run their experts through transformers' registry run them this way."""
    for module in base.modules():
        if stacks_of(module):
            module.config._experts_implementation = _NAME


def _run(module: Any, hidden_TE: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
    token_S = index_TK.flatten()
    inner = _projected(module, "gate_up_proj" if module.has_gate else "up_proj", hidden_TE[token_S])
    inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
    output_SE = _projected(module, "down_proj", inner)
    if module.has_post_expert_norm:
        output_SE = module.post_expert_norm(output_SE)
    weighted = output_SE * weights_TK.flatten()[:, None]
    total_TE = torch.zeros_like(hidden_TE, dtype=torch.float32)
    return total_TE.index_add(0, token_S, weighted.float()).to(hidden_TE.dtype)


def _projected(module: Any, name: str, x: Tensor) -> Tensor:
    stack = getattr(module, name)
    if stack.dtype == torch.int8:
        times = times_columns if module.is_transposed else times_rows
        y = times(x, stack, getattr(module, name + SCALE), 0)
    else:
        y = x @ (stack[0] if module.is_transposed else stack[0].t())
    return y + getattr(module, name + "_bias")[0] if module.has_bias else y


ALL_EXPERTS_FUNCTIONS.register(_NAME, _run)
