"""The summed negative log-likelihood of targets, some of them at a time.

`cross_entropy` of logits in bfloat16 wants them in float32: for a vocabulary of 128,000 that copy and its
gradient take more memory than a layer. Here the float32 numbers exist for a few targets at a time, in the
forward pass and again in the backward pass.

Where only the hidden states in front of the output layer have a gradient, the logits themselves exist for one
chunk of targets at a time, and once: their gradient is computed along with the loss, in their place, and what
becomes of it in the hidden states waits for the backward pass (as in Hsu et al. 2024, "Liger Kernel").

On CPUs the sizes matter: a block of float32 numbers that stays in the cache is ten times faster than one that
does not, and a chunk of logits beyond 32 MiB comes from the kernel, page by page, whenever it is made.

Knows nothing of models or batches.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from prefix_ds.model.standing import device_type

_BLOCK_NUMBERS = {"cpu": 2**20, "meta": 2**26, "cuda": 2**26}  # float32: 4 MiB, 256 MiB
_CHUNK_BYTES = {"cpu": 2**25 - 2**12, "meta": 2**27, "cuda": 2**27}  # of logits

LogitsOf = Callable[[Tensor], Tensor]  # [1, C, V] of hidden states [C, D], and no view of anything


def summed_nll(logits_MV: Tensor, ids_M: Tensor) -> Tensor:
    """Minus the sum of the log-probabilities of `ids_M`: a float64 scalar."""
    total: Tensor = _SummedNLL.apply(logits_MV, ids_M)  # type: ignore[no-untyped-call]
    return total


class _SummedNLL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_MV: Tensor, ids_M: Tensor) -> Tensor:
        norms, total = [], logits_MV.new_zeros((), dtype=torch.float64)
        for block_CV, ids_C in _blocks(logits_MV, ids_M):
            norms.append(block_CV.to(_wide(block_CV)).logsumexp(dim=-1))
            total += (norms[-1] - _at(block_CV, ids_C)).sum(dtype=torch.float64)
        ctx.save_for_backward(logits_MV, ids_M, torch.cat(norms))
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        logits_MV, ids_M, norm_M = ctx.saved_tensors
        grad_MV = torch.empty_like(logits_MV)
        start = 0
        for block_CV, ids_C in _blocks(logits_MV, ids_M):
            rows = slice(start, start + len(ids_C))
            grad_CV = _less_one((block_CV - norm_M[rows, None]).exp_(), ids_C)
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
        wanted = ctx.needs_input_grad[0]
        total = hidden_MD.new_zeros((), dtype=torch.float64)
        grads: list[Tensor] = []
        for part_CD, ids_C in _chunks(hidden_MD, ids_M, vocab_size):
            hidden_CD = part_CD.detach().requires_grad_(wanted)
            with torch.set_grad_enabled(wanted):
                logits_1CV = logits_of(hidden_CD)
            total += _turned_into_gradient(logits_1CV.detach()[0], ids_C, wanted)
            if wanted:
                grads += torch.autograd.grad(logits_1CV, hidden_CD, logits_1CV.detach())
        ctx.save_for_backward(*([torch.cat(grads)] if grads else []))
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None, None]:
        (grad_MD,) = ctx.saved_tensors
        return grad_MD * grads[0].to(grad_MD.dtype), None, None, None


@torch.no_grad()
def nll_of_each(logits_MV: Tensor, ids_M: Tensor) -> Tensor:
    """Minus the log-probability of each of `ids_M`: [M] in float64, without a gradient."""
    found = [
        (block_CV.to(_wide(block_CV)).logsumexp(dim=-1) - _at(block_CV, ids_C)).double()
        for block_CV, ids_C in _blocks(logits_MV, ids_M)
    ]
    return torch.cat(found)


@torch.no_grad()
def nll_of_each_behind(hidden_MD: Tensor, ids_M: Tensor, logits_of: LogitsOf, vocab_size: int) -> Tensor:
    """The same of logits that `logits_of` makes of hidden states."""
    chunks = _chunks(hidden_MD, ids_M, vocab_size)
    return torch.cat([nll_of_each(logits_of(part_CD)[0], ids_C) for part_CD, ids_C in chunks])


def _turned_into_gradient(logits_CV: Tensor, ids_C: Tensor, wanted: bool) -> Tensor:
    """The summed loss; where it is wanted, the gradient to the logits stands in their place."""
    total = logits_CV.new_zeros((), dtype=torch.float64)
    for block_CV, ids_B in _blocks(logits_CV, ids_C):
        probability_CV = torch.softmax(block_CV, dim=-1, dtype=_wide(block_CV))
        norm_C = block_CV.amax(dim=-1) - probability_CV.amax(dim=-1).log()  # the greatest is at least 1 / V
        total += (norm_C - _at(block_CV, ids_B)).sum(dtype=torch.float64)
        if wanted:
            block_CV.copy_(_less_one(probability_CV, ids_B))
    return total


def _less_one(probability_CV: Tensor, ids_C: Tensor) -> Tensor:
    """The gradient of the negative log-likelihoods to the logits, in place of the probabilities."""
    return probability_CV.scatter_add_(1, ids_C[:, None], probability_CV.new_full((len(ids_C), 1), -1.0))


def _at(values_CV: Tensor, ids_C: Tensor) -> Tensor:
    return values_CV.gather(1, ids_C[:, None])[:, 0]


def _wide(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _blocks(logits_MV: Tensor, ids_M: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """So few that float32 numbers of them are no burden."""
    return _split(logits_MV, ids_M, _BLOCK_NUMBERS[device_type(logits_MV)] // logits_MV.shape[1])


def _chunks(hidden_MD: Tensor, ids_M: Tensor, vocab_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """So few that logits of them are none."""
    size = _CHUNK_BYTES[device_type(hidden_MD)] // (vocab_size * hidden_MD.element_size())
    return _split(hidden_MD, ids_M, size)


def _split(values_MX: Tensor, ids_M: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    size = max(1, size)
    return zip(torch.split(values_MX, size), torch.split(ids_M, size), strict=True)
