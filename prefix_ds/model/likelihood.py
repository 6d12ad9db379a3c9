"""The summed negative log-likelihood of targets, some of them at a time.

`cross_entropy` of logits in bfloat16 wants them in float32: for a vocabulary of 128,000 that copy and its
gradient take more memory than a layer. Here the float32 numbers exist for one chunk of targets at a time, in
the forward pass and again in the backward pass.

Where only the hidden states in front of the output layer have a gradient, the logits themselves exist for one
chunk at a time, and once: the gradient is computed along with the loss and waits for the backward pass (as
in Hsu et al. 2024, "Liger Kernel").

Knows nothing of models or batches.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

_CHUNK_NUMBERS = {"cpu": 2**23, "meta": 2**26, "cuda": 2**26}  # float32: 32 MiB, 256 MiB

LogitsOf = Callable[[Tensor], Tensor]


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
            grad_CV = _less_one((chunk_CV - norm_M[rows, None]).exp_(), ids_C)
            grad_MV[rows] = grad_CV.mul_(grads[0].to(grad_CV))
            start = rows.stop
        return grad_MV, None


def summed_nll_behind(hidden_MD: Tensor, ids_M: Tensor, logits_of: LogitsOf, vocab_size: int) -> Tensor:
    """The same of logits that `logits_of` makes of hidden states: only these get a gradient."""
    total: Tensor = _SummedNLLBehind.apply(hidden_MD, ids_M, logits_of, vocab_size)  # type: ignore[no-untyped-call]
    return total


class _SummedNLLBehind(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_MD: Tensor, ids_M: Tensor, logits_of: LogitsOf, vocab_size: int) -> Tensor:
        total = hidden_MD.new_zeros((), dtype=torch.float64)
        grads: list[Tensor] = []
        for part_CD, ids_C in _split(vocab_size, hidden_MD, ids_M):
            hidden_CD = part_CD.detach().requires_grad_(ctx.needs_input_grad[0])
            with torch.set_grad_enabled(ctx.needs_input_grad[0]):
                logits_CV = logits_of(hidden_CD)
            log_p_CV = torch.log_softmax(logits_CV.detach(), dim=-1, dtype=_wide(logits_CV))
            total -= log_p_CV.gather(1, ids_C[:, None]).sum(dtype=torch.float64)
            if ctx.needs_input_grad[0]:
                grad_CV = _less_one(log_p_CV.exp_(), ids_C).to(logits_CV.dtype)
                grads += torch.autograd.grad(logits_CV, hidden_CD, grad_CV)
        ctx.save_for_backward(*([torch.cat(grads)] if grads else []))
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None, None]:
        (grad_MD,) = ctx.saved_tensors
        return grad_MD * grads[0].to(grad_MD.dtype), None, None, None


def _less_one(probability_CV: Tensor, ids_C: Tensor) -> Tensor:
    """The gradient of the negative log-likelihoods to the logits, in place of the probabilities."""
    return probability_CV.scatter_add_(1, ids_C[:, None], probability_CV.new_full((len(ids_C), 1), -1.0))


def _wide(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _chunks(logits_MV: Tensor, ids_M: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    for chunk_CV, ids_C in _split(logits_MV.shape[1], logits_MV, ids_M):
        yield chunk_CV.to(_wide(logits_MV)), ids_C


def _split(vocab_size: int, values_MX: Tensor, ids_M: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    size = max(1, _CHUNK_NUMBERS[values_MX.device.type] // vocab_size)
    yield from zip(torch.split(values_MX, size), torch.split(ids_M, size), strict=True)
