"""The modules that hold 8-bit weights, in place of torch's and transformers'.

Each has its weight as `weight` (int8) and `scale` (float32, one a row), both frozen parameters.

Knows nothing of a model's structure.
"""

from torch import Tensor, nn
from torch.nn import functional

from prefix_ds.int8.misuse import scales_known
from prefix_ds.int8.product import Product


class Int8Linear(nn.Module):
    """x times the weight, plus the bias, if there is one.

    By rows is `nn.Linear` (weight [out, in]), by columns GPT-2's `Conv1D` (weight [in, out]).
    """

    def __init__(
        self, weight: nn.Parameter, scale: nn.Parameter, bias: nn.Parameter | None, product: Product
    ) -> None:
        super().__init__()
        self.weight, self.scale, self.bias = weight, scale, bias
        self.product = product

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        y = self.product(x, self.weight, self.scale)
        return y if self.bias is None else y + self.bias


class Int8Embedding(nn.Module):
    """Rows of the weight by number."""

    def __init__(self, weight: nn.Parameter, scale: nn.Parameter, like: Tensor) -> None:
        """`like` has the type of the rows that come out."""
        super().__init__()
        self.weight, self.scale, self.dtype = weight, scale, like.dtype

    def forward(self, ids: Tensor) -> Tensor:
        """[...] to [..., width]."""
        with scales_known():
            rows = functional.embedding(ids, self.weight)
            return (rows * self.scale[ids][..., None]).to(self.dtype)
