"""A base's weights are exchanged for 8-bit ones while they are still promises.

Every `nn.Linear` and GPT-2's `Conv1D` but the output layer, and stacked experts; embeddings and output layer
if they are asked for. Classes derived from these are left alone: what they add is not known. So are layers
that others reach into, by name: the known ones here, and the user's. Tensors that are one and the same before
are so afterwards.

Knows nothing of files or shards.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from prefix_ds.errors import ModelError
from prefix_ds.int8 import experts
from prefix_ds.int8.activations import times_rows_in_int8
from prefix_ds.int8.modules import Int8Embedding, Int8Linear
from prefix_ds.int8.product import Product, times_columns, times_rows
from prefix_ds.int8.quantise import QuantisedRows
from prefix_ds.promise import Promise

_LINEAR, _CONV1D = "torch.nn.modules.linear.Linear", "transformers.pytorch_utils.Conv1D"
_EMBEDDING = "torch.nn.modules.sparse.Embedding"
_REACHED_INTO = ("dt_proj", "weights_proj", "router.classifier")  # of Mamba, DeepSeek 3.2, LongCat

Pair = tuple[nn.Parameter, nn.Parameter]


def stored_in_8_bits(
    base: Any, vocabulary: bool, left: Sequence[str] = (), outliers: float | None = None
) -> None:
    """Exchanges modules of a transformers base whose parameters are promises, in place.

    Those of which a name in `left` is the end of theirs stay as they are. With `outliers` the inputs of
    linear layers are quantised too, but for columns that reach it. Raises ModelError.
    """
    by_rows = times_rows if outliers is None else times_rows_in_int8(outliers)
    _refuse_unknown(base, left)
    if vocabulary and _kind(base.get_input_embeddings()) != _EMBEDDING:
        raise ModelError(
            f"model.vocabulary_bits: 8: the embedding of {base.config.model_type} "
            f"({type(base.get_input_embeddings()).__name__}) does more than look up rows; use 16"
        )
    pairs: dict[Tensor, Pair] = {}
    ends = {base.get_input_embeddings(), base.get_output_embeddings()}
    for name, module in list(base.named_modules()):
        if (module in ends and not vocabulary) or _ends_with(name, (*_REACHED_INTO, *left)):
            continue
        if new := _exchanged(module, pairs, module in ends, by_rows):
            base.set_submodule(name, new)
        for stack in experts.stacks_of(module):
            _store_stack(module, stack, pairs)


def _exchanged(module: Any, pairs: dict[Tensor, Pair], is_end: bool, by_rows: Product) -> nn.Module | None:
    kind = _kind(module)
    if kind in (_LINEAR, _CONV1D):
        values, scales = _pair(module.weight, pairs)
        return Int8Linear(values, scales, module.bias, by_rows if kind == _LINEAR else times_columns)
    if is_end and kind == _EMBEDDING:
        return Int8Embedding(*_pair(module.weight, pairs), like=module.weight)
    return None


def _kind(module: object) -> str:
    return f"{type(module).__module__}.{type(module).__name__}"


def _ends_with(name: str, ends: Sequence[str]) -> bool:
    return any(f".{name}".endswith(f".{end}") for end in ends)


def _refuse_unknown(base: nn.Module, left: Sequence[str]) -> None:
    names = [name for name, _ in base.named_modules()]
    for end in left:
        if not any(_ends_with(name, [end]) for name in names):
            raise ModelError(f"model.in_16_bits: {end}: no layer of the base has a name that ends so")


def _store_stack(module: nn.Module, name: str, pairs: dict[Tensor, Pair]) -> None:
    values, scales = _pair(getattr(module, name), pairs)
    setattr(module, name, values)
    module.register_parameter(name + experts.SCALE, scales)
    experts.switch_experts(module)


def _pair(weight: Tensor, pairs: dict[Tensor, Pair]) -> Pair:
    """The weight's numbers and scales as parameters; a tensor that is tied has one pair."""
    if weight not in pairs:
        assert isinstance(weight, Promise)
        rows = QuantisedRows(weight.source)
        pairs[weight] = _frozen(rows.values), _frozen(rows.scales)
    return pairs[weight]


def _frozen(source: Any) -> nn.Parameter:
    return nn.Parameter(Promise.of(source), requires_grad=False)
