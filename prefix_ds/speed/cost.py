"""What a step must compute, whatever way it takes: the operations of the model, for its MFU (Chowdhery et al.
2022, appendix B).

Three numbers make it up: operations a token (products with weights), a target (the output layer) and a pair
of tokens of which one sees the other (attention). The first is counted, in the trial that every base goes
through when it is wrapped: a dispatch mode sees every product of every family, with the experts that were
chosen and in 8 bits too. The others follow from shapes. A backward pass takes as many operations for the
gradients of inputs, down to the first attention that has a prefix, and as many again for those of weights if
these are trained; twice as many in attention.

What is computed again, padded or computed and then hidden by a mask is work, but not the model's: it lowers
the MFU.

Rejected: counting a whole step of training (it would have to tell the second computation of a layer from the
first, and padding from tokens); a formula over the weights (each expert would count, and how many are used
has another name in each family).

Knows nothing of time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from prefix_ds.data.batch import Share
from prefix_ds.model import PrefixLM
from prefix_ds.model.attending import is_attending
from prefix_ds.model.base import text_config
from prefix_ds.model.trial import NUM_TARGETS, NUM_TOKENS
from prefix_ds.prefix import Slot

_STOCK = {f"aten.{name}" for name in ("mm", "addmm", "bmm", "baddbmm")}


class Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operations of products inside, attention's left out."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """What torch asks of every operation."""
        result = func(*args, **(kwargs or {}))
        name = str(func._overloadpacket)
        if is_attending():
            return result
        if name in _STOCK:
            self.flops += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=result)
        elif name == "aten._grouped_mm":  # each row with the weight of its group
            self.flops += 2 * args[0].numel() * args[1].shape[-1]
        elif name == "bitsandbytes.int8_mixed_scaled_mm":
            self.flops += 2 * len(args[0]) * args[2].numel()
        return result


@dataclass(frozen=True)
class Cost:
    """Floating point operations of a training step, by what they grow with."""

    per_token: float
    per_target: float
    per_pair: float  # of tokens of a document, one of which sees the other

    def of(self, share: Share) -> float:
        """Of all ranks' shares of this step together."""
        pairs = (share.global_squares + share.global_tokens) / 2
        tokens, targets = share.global_tokens * self.per_token, share.global_targets * self.per_target
        return tokens + targets + pairs * self.per_pair


def cost_of(lm: PrefixLM, tried_flops: int, slots: Sequence[Slot], prefix_length: int) -> Cost:
    """Of training a prefix in `slots` of a base, or without any, all of its weights.

    `tried_flops` are those of the products in its trial.
    """
    head = 2.0 * _head_numel(lm)
    products = (tried_flops - NUM_TARGETS * head) / NUM_TOKENS
    reached = _reached(lm.slots, slots)
    back = reached if slots else 2.0
    attention = 1 + 2 * reached
    return Cost(
        per_token=products * (1 + back) + prefix_length * _flops_of_a_pair(lm, slots) * attention,
        per_target=head * (2 if slots else 3),
        per_pair=_flops_of_a_pair(lm, lm.slots) * attention,
    )


def _head_numel(lm: PrefixLM) -> int:
    """Numbers of the output layer's weight; 0 without one, when it is counted as the rest."""
    weight: Any = getattr(lm.base.get_output_embeddings(), "weight", None)
    return 0 if weight is None else int(getattr(weight, "ds_numel", weight.numel()))


def _reached(every: Sequence[Slot], chosen: Sequence[Slot]) -> float:
    """The part of a base that lies behind its first prefix; all of it where weights are trained."""
    first = next((n for n, slot in enumerate(every) if slot in chosen), 0)
    return 1 - first / len(every)


def _flops_of_a_pair(lm: PrefixLM, slots: Sequence[Slot]) -> float:
    """Of a score and its share of the values, forward, in some attentions."""
    heads = getattr(text_config(lm.base), "num_attention_heads", None)
    return sum(2.0 * (heads or s.num_heads) * (s.key_dim + s.value_dim) for s in slots)
