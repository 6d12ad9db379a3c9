"""Counts what torch would allocate and compute, on its meta device, where nothing is allocated or computed.

Every operation of a forward and a backward pass goes through a dispatch mode. A storage that is new is alive
from then on until Python and autograd have let go of it, exactly as on a real device, so what a layer saves
for its backward pass, what recomputation gives back and what a long expression holds in between are not
modelled but observed. Attention in torch's kernels is the one operation that differs: on the meta device
torch would write all scores down, where the kernels of real devices keep one number a query. It is replaced
by a function that allocates what those kernels do (Dao et al. 2022).

Knows nothing of models.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import varlen  # noqa: F401 - registers the kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from prefix_ds.plan.marks import Alive

_aten = torch.ops.aten
_WINDOWS = {  # which arguments are the longest sequence of keys, and the window
    torch.ops.torch_attn._varlen_attn: (6, 9),
    torch.ops.torch_attn._varlen_attn_backward: (9, 13),
}


class Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts bytes alive and floating point operations. What stands before it is not counted."""

    def __init__(self, standing: Iterable[Tensor], vocab_size: int) -> None:
        """`standing`: tensors that views will be made of, parameters above all."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0
        self._vocab_size = vocab_size
        self._total = self._logits = 0
        self._highest = Alive()
        self._seen: dict[int, Any] = {tensor.untyped_storage()._cdata: None for tensor in standing}

    def highest(self) -> Alive:
        """The most bytes alive since this was asked last."""
        highest, self._highest = self._highest, self.now()
        return highest

    def now(self) -> Alive:
        """Bytes alive now."""
        return Alive(self._total, self._logits)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """What torch asks of every operation."""
        if func is _aten._local_scalar_dense.default:  # a branch on a number that nobody has: "they differ"
            return args[0].dtype.is_floating_point and 1.0
        result = func(*args, **(kwargs or {}))
        if rule := flop_registry.get(func._overloadpacket):
            self.flops += int(rule(*args, **(kwargs or {}), out_val=result) * _seen_part(func, args))
        self._note(result)
        return result

    def _note(self, result: Any) -> None:
        if isinstance(result, Tensor):
            self._note_tensor(result)
        elif isinstance(result, (tuple, list)):
            for part in result:
                self._note(part)

    def _note_tensor(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return
        size = storage.nbytes()
        is_logits = tensor.dim() > 1 and tensor.shape[-1] == self._vocab_size
        self._seen[key] = weakref.ref(storage, self._forgetting(key, size, is_logits))
        self._add(size, is_logits)
        if self._total > self._highest.total:
            self._highest = self.now()

    def _forgetting(self, key: int, size: int, is_logits: bool) -> Callable[[Any], None]:
        def forget(_: Any) -> None:
            del self._seen[key]
            self._add(-size, is_logits)

        return forget

    def _add(self, size: int, is_logits: bool) -> None:
        self._total += size
        self._logits += size * is_logits


@contextmanager
def fused_attention(meter: Meter, device_type: str) -> Iterator[None]:
    """Inside, attention in torch's kernels keeps no scores.

    On a CPU such kernels want keys and values of one size; others are left to torch, which writes scores
    down.
    """
    stock = functional.scaled_dot_product_attention

    def attend(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *rest: Any, **options: Any
    ) -> Tensor:
        if device_type == "cpu" and key.shape[-1] != value.shape[-1]:
            return stock(query, key, value, attn_mask, *rest, **options)
        is_bool = attn_mask is not None and attn_mask.dtype == torch.bool
        bias = attn_mask.to(query.dtype) if is_bool else attn_mask  # type: ignore[union-attr]
        result: Tensor = _Fused.apply(query, key, value, bias, meter)  # type: ignore[no-untyped-call]
        return result

    functional.scaled_dot_product_attention = attend
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = stock


class _Fused(torch.autograd.Function):
    """Two products forward, five backward."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, meter: Meter) -> Tensor:
        result = query.new_empty(*query.shape[:-1], value.shape[-1])
        norms = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, bias, result, norms)
        ctx.meter = meter
        meter.flops += _product_flops(query, key, query.shape[-1]) + _product_flops(
            query, key, value.shape[-1]
        )
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, *_ = ctx.saved_tensors
        ctx.meter.flops += 3 * _product_flops(query, key, query.shape[-1])
        ctx.meter.flops += 2 * _product_flops(query, key, value.shape[-1])
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None, None


def _seen_part(func: Any, args: Sequence[Any]) -> float:
    """Of the keys that torch counts for a kernel, those that its window shows to a query."""
    if func._overloadpacket not in _WINDOWS:
        return 1.0
    longest, window = (args[number] for number in _WINDOWS[func._overloadpacket])
    return min(1.0, (window[0] + 1) / longest) if window[0] >= 0 else 1.0


def _product_flops(query: Tensor, key: Tensor, size: int) -> int:
    return 2 * query.shape[:-1].numel() * key.shape[-2] * size
