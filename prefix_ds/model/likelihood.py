"""The summed negative log-likelihood of targets, without a second copy of their logits.

`cross_entropy` of logits in bfloat16 wants them in float32: for a vocabulary of 128,000 that copy and its
gradient take more memory than a layer. Here the float32 numbers exist for one chunk of targets at a time, in
the forward pass and again in the backward pass.

Knows nothing of models or batches.
"""

from typing import Any

import torch
from torch import Tensor

_CHUNK_NUMBERS = 2**24  # 64 MiB in float32


def summed_nll(logits_MV: Tensor, ids_M: Tensor) -> Tensor:
    """Minus the sum of the log-probabilities of `ids_M`: a float64 scalar."""
    total: Tensor = _SummedNLL.apply(logits_MV, ids_M)  # type: ignore[no-untyped-call]
    return total


class _SummedNLL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_MV: Tensor, ids_M: Tensor) -> Tensor:
        norms, total = [], logits_MV.new_zeros((), dtype=torch.float64)
        for chunk_CV, ids_C in _chunks(logits_MV, ids_M):
            norms.append(chunk_CV.logsumexp(dim=-1))
            total += (norms[-1] - chunk_CV.gather(1, ids_C[:, None])[:, 0]).sum(dtype=torch.float64)
        ctx.save_for_backward(logits_MV, ids_M, torch.cat(norms))
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        logits_MV, ids_M, norm_M = ctx.saved_tensors
        grad_MV = torch.empty_like(logits_MV)
        start = 0
        for chunk_CV, ids_C in _chunks(logits_MV, ids_M):
            rows = slice(start, start + len(ids_C))
            probability_CV = (chunk_CV - norm_M[rows, None]).exp_()
            probability_CV.scatter_add_(1, ids_C[:, None], probability_CV.new_full((len(ids_C), 1), -1.0))
            grad_MV[rows] = probability_CV.mul_(grads[0].to(probability_CV))
            start = rows.stop
        return grad_MV, None


def _wide(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _chunks(logits_MV: Tensor, ids_M: Tensor) -> Any:
    size = max(1, _CHUNK_NUMBERS // logits_MV.shape[1])
    for chunk_CV, ids_C in zip(torch.split(logits_MV, size), torch.split(ids_M, size), strict=True):
        yield chunk_CV.to(_wide(logits_MV)), ids_C
