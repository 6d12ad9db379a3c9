"""Autograd keeps parameters, not what was gathered into them.

Many operations save a view of a weight for the backward pass: a matrix product its transpose, a mixture of
experts the stack turned round. Under ZeRO-3 such a view keeps the gathered weight alive, in every layer,
until the backward pass is through, and the memory is that of the whole model. So a view of a sharded
parameter is saved as the parameter and the view's geometry, and made again when the backward pass, which
gathers the parameter anew, asks for it.

Rejected: DeepSpeed's exchange of `torch.nn.functional.linear`, which knows that one operation, holds it in
Python in both passes, and stays exchanged for the whole process.

Knows nothing of models.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class _View:
    parameter: Any
    size: torch.Size
    stride: tuple[int, ...]
    offset: int  # from where the parameter begins


def saving_parameters() -> AbstractContextManager[None]:
    """For a forward pass: what it saves keeps no gathered parameter alive."""
    return torch.autograd.graph.saved_tensors_hooks(_packed, _unpacked)


def _packed(tensor: Tensor) -> Tensor | _View:
    base = tensor._base
    if base is None or not hasattr(base, "ds_id"):
        return tensor
    offset = int(tensor.storage_offset() - base.storage_offset())
    return _View(base, tensor.size(), tensor.stride(), offset)


def _unpacked(saved: Tensor | _View) -> Tensor:
    if not isinstance(saved, _View):
        return saved
    parameter = saved.parameter
    assert parameter.numel() == parameter.ds_numel, f"{parameter.ds_summary()} is not gathered"
    whole: Tensor = parameter.detach()
    return whole.as_strided(saved.size, saved.stride, whole.storage_offset() + saved.offset)
