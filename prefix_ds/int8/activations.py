"""Products of int8 with int8: the input is quantised too, row by row (bitsandbytes' LLM.int8(), Dettmers et
al. 2022).

Columns of the input that hold a value of at least a threshold (outliers) would coarsen the steps of all
others in their row; they are multiplied apart, in the input's own type. The gradient is that of the weight
alone, as bitsandbytes has it. Its state, which keeps a full int8 weight on every rank, is not used: only its
kernels are.

Knows nothing of modules.
"""

from functools import partial

import torch
from torch import Tensor

from prefix_ds.int8.misuse import scales_known
from prefix_ds.int8.product import Product, differentiable


def times_rows_in_int8(threshold: float) -> Product:
    """x [..., K] times the transposed weight [R, K], both as int8: [..., R].

    Outliers start at `threshold`.
    """
    import bitsandbytes  # noqa: F401 - it registers its kernels; a slow import, paid where it is asked for

    return partial(_times, threshold=threshold)


def _times(x: Tensor, weight: Tensor, scale: Tensor, threshold: float) -> Tensor:
    return differentiable(x, weight, scale, None, True, lambda: _product(x, weight, scale, threshold))


def _product(x: Tensor, weight: Tensor, scale: Tensor, threshold: float) -> Tensor:
    kernels, flat = torch.ops.bitsandbytes, x.detach().reshape(-1, x.shape[-1])
    dtype = torch.float16 if flat.is_cuda else flat.dtype  # CUDA's kernel takes nothing else
    given = flat.to(dtype, copy=True)  # the kernel writes zeros over outliers for a while
    with scales_known():
        rows, largest, outliers = kernels.int8_vectorwise_quant(given.contiguous(), threshold)
        y = kernels.int8_mixed_scaled_mm(flat, rows, weight, largest, scale * 127.0, outliers)[0]
    shape = [*x.shape[:-1], len(scale)]
    shaped: Tensor = torch.ops.aten._unsafe_view(y, shape)  # not a view: layers write into what they get
    return shaped
