"""A micro-batch of a run, forward and backward, on torch's meta device: a base of any size has shapes there
and no numbers.

The real code runs: the base's own, our attention, loss and recomputation. A meter counts what is allocated
and computed, and hooks write down when DeepSpeed would fetch a module's parameters and when it would let them
go, in the order of its own hooks (`DeepSpeedZeRoOffload`, 0.19): before a forward pass and when the first
gradient reaches a module's outputs; after a forward pass and when the last gradient has left its inputs.

Knows nothing of ranks or files.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from prefix_ds.config import ModelKeys
from prefix_ds.data.batch import Batch, Document
from prefix_ds.engine.sizing import Sizes, sizes_of
from prefix_ds.errors import ModelError
from prefix_ds.int8 import tiles_as_on
from prefix_ds.model import PrefixLM
from prefix_ds.model.recompute import repeatable_layers, repeated_layers
from prefix_ds.model.standing import meta_stands_for
from prefix_ds.plan.depth import IrregularError, Stack, laid_out, shortened
from prefix_ds.plan.experts import balance_experts
from prefix_ds.plan.marks import Alive, Mark, Moment
from prefix_ds.plan.meter import Meter, fused_attention
from prefix_ds.prefix import Slot


@dataclass(frozen=True)
class Weights:
    """A parameter of the base."""

    numel: int
    itemsize: int  # bytes

    @property
    def num_bytes(self) -> int:
        """Of the whole parameter."""
        return self.numel * self.itemsize


@dataclass(frozen=True)
class Shape:
    """A micro-batch: rows of so many tokens, so many of all of them targets, behind a prefix."""

    rows: int
    length: int
    targets: int
    prefix_length: int  # 0: no prefix, and all weights are trained

    @property
    def tokens(self) -> int:
        """Of all rows."""
        return self.rows * self.length


@dataclass(frozen=True, eq=False)
class Course:
    """What happens whatever the number of rows."""

    weights: tuple[Weights, ...]  # in the order in which a run makes them
    held: Mapping[str, tuple[int, ...]]  # for each module, the numbers of the weights of its own
    moments: tuple[Moment, ...]


@dataclass(frozen=True, eq=False)
class Rehearsal:
    """What happened."""

    course: Course
    buffer_bytes: int
    highest: tuple[Alive, ...]  # from each moment to the next
    flops: int  # of both passes
    slots: tuple[Slot, ...]  # that have a prefix
    sizes: Sizes


Chosen = Callable[[tuple[Slot, ...]], tuple[Slot, ...]]


class Stage:
    """A base with its parameters on the meta device. It is rehearsed on copies, and stays as it is."""

    def __init__(self, base: Any) -> None:
        number = {weight: n for n, weight in enumerate(_in_order(base))}
        self._base = base
        self._weights = tuple(Weights(w.numel(), w.element_size()) for w in number)
        self._held = {
            name: tuple(number[w] for w in module.parameters(recurse=is_one))
            for name, module, is_one in _hooked(base)
        }
        self._buffer_bytes = sum(b.numel() * b.element_size() for b in base.buffers())
        self._sizes = sizes_of(base)

    def rehearsed(
        self, keys: ModelKeys, shape: Shape, device_type: str, chosen: Chosen | None = None
    ) -> Rehearsal:
        """One micro-batch of training.

        `chosen` picks the slots that get a prefix; None: all. Raises ModelError for a base that goes a way
        which depends on numbers.
        """
        marks, slots = self._performed(keys, shape, device_type, chosen)
        return Rehearsal(
            Course(self._weights, self._held, tuple(mark.moment for mark in marks)),
            self._buffer_bytes,
            tuple(mark.highest for mark in marks),
            sum(mark.flops for mark in marks),
            slots,
            self._sizes,
        )

    def _performed(
        self, keys: ModelKeys, shape: Shape, device_type: str, chosen: Chosen | None
    ) -> tuple[list[Mark], tuple[Slot, ...]]:
        assert keys.recompute != "auto"
        again = set(repeated_layers(self._base, keys.recompute))
        short = shortened(self._base, again) if chosen is None else None
        if short is not None:
            base, stack = short
            kept = keys.model_copy(update={"recompute": stack.again})
            with suppress(IrregularError, ModelError):
                marks, slots = _performed(base, kept, shape, device_type, None)
                return laid_out(marks, stack), _all_slots(slots, stack)
        return _performed(copy.deepcopy(self._base), keys, shape, device_type, chosen)


def between(few: Rehearsal, many: Rehearsal, part: float) -> Rehearsal:
    """The rehearsal with a number of rows between those of two others: all that is counted grows in line."""

    def mixed(one: int, other: int) -> int:
        return round(one + (other - one) * part)

    assert few.course.moments == many.course.moments
    highest = (
        Alive(mixed(one.total, other.total), mixed(one.logits, other.logits))
        for one, other in zip(few.highest, many.highest, strict=True)
    )
    return replace(many, highest=tuple(highest), flops=mixed(few.flops, many.flops))


def _in_order(base: nn.Module) -> list[nn.Parameter]:
    """Each parameter once, as modules come."""
    every = (w for module in base.modules() for w in module._parameters.values() if w is not None)
    return list(dict.fromkeys(every))


def _all_slots(slots: tuple[Slot, ...], stack: Stack) -> tuple[Slot, ...]:
    by_layer = {
        position: [s for s in slots if stack.layer_of(s.name) == position] for position in stack.stands
    }
    return tuple(
        Slot(stack.renamed(slot.name, layer), slot.num_heads, slot.key_dim, slot.value_dim)
        for layer, position in enumerate(stack.stands)
        for slot in by_layer[position]
    )


def _performed(
    base: Any, keys: ModelKeys, shape: Shape, device_type: str, chosen: Chosen | None
) -> tuple[list[Mark], tuple[Slot, ...]]:
    weights = list(base.parameters())
    meter = Meter([*weights, *base.buffers()], base.config.get_text_config(decoder=True).vocab_size)
    balance_experts(base)
    with _told_by(base), meter, _as_on(device_type, meter):
        assert keys.recompute != "auto"
        lm = PrefixLM(base, attention=keys.attention, recompute=keys.recompute, device=torch.device("meta"))
        slots = chosen(lm.slots) if chosen else lm.slots
        notes = _Notes(base, meter)
        _run(lm, shape, slots, weights)
        return notes.marks(), slots


@contextmanager
def _as_on(device_type: str, meter: Meter) -> Iterator[None]:
    with tiles_as_on(device_type), meta_stands_for(device_type), fused_attention(meter, device_type):
        yield


@contextmanager
def _told_by(base: Any) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, NotImplementedError, IndexError, TypeError, ValueError, AttributeError) as error:
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"{base.config.model_type} cannot be planned for: its code depends on numbers, and a plan has "
            f"none ({first})"
        ) from error


def _run(lm: PrefixLM, shape: Shape, slots: tuple[Slot, ...], weights: list[nn.Parameter]) -> None:
    table_PD = None
    if shape.prefix_length:
        width = sum(slot.width for slot in slots)
        table_PD = torch.empty(shape.prefix_length, width, device="meta").requires_grad_()
    else:
        for weight in weights:
            weight.requires_grad_().register_post_accumulate_grad_hook(_take_away)  # type: ignore[no-untyped-call]
    torch.autograd.backward(lm.loss(_batch(shape), table_PD, slots))
    lm.detach()


def _take_away(weight: Tensor) -> None:
    """DeepSpeed does so with a gradient as soon as it is there."""
    weight.grad = None


def _batch(shape: Shape) -> Batch:
    ids_BT = torch.empty(shape.rows, shape.length, dtype=torch.long, device="meta")
    index_M = torch.empty(shape.targets, dtype=torch.long, device="meta")
    documents = tuple(Document(row, 0, shape.length) for row in range(shape.rows))
    return Batch(ids_BT, torch.empty_like(ids_BT), index_M, index_M.clone(), shape.tokens, documents)


# Mixtures of experts that DeepSpeed takes as one module, with all below (its DEFAULT_LEAF_MODULE_CLASSES).
LEAVES = {
    f"transformers.models.{family}.modeling_{family}.{name}SparseMoeBlock"
    for family, name in (("mixtral", "Mixtral"), ("qwen2_moe", "Qwen2Moe"), ("qwen3_moe", "Qwen3Moe"))
}


def _hooked(base: nn.Module) -> Iterator[tuple[str, nn.Module, bool]]:
    """The modules that DeepSpeed looks at, by name, and whether one stands for all below it."""
    layers = set(repeatable_layers(base))

    def below(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module, bool]]:
        is_one = module in layers or f"{type(module).__module__}.{type(module).__name__}" in LEAVES
        yield name, module, is_one
        for child, inner in () if is_one else module.named_children():
            yield from below(inner, f"{name}.{child}" if name else child)

    return below(base, "")


class _Notes:
    """Hooks on every module, in DeepSpeed's order, and what they have seen."""

    def __init__(self, base: nn.Module, meter: Meter) -> None:
        self._meter = meter
        self._seen: list[tuple[Moment, Alive, Alive, int]] = []
        for name, module, _ in _hooked(base):
            _hook(module, name, self._mark)

    def _mark(self, module: str, is_fetch: bool, is_forward: bool) -> None:
        again = is_forward and torch._C._current_graph_task_id() != -1
        self._seen.append((Moment(module, is_fetch, is_forward, again), *self._look()))

    def _look(self) -> tuple[Alive, Alive, int]:
        return self._meter.now(), self._meter.highest(), self._meter.flops

    def marks(self) -> list[Mark]:
        """All of them; what was seen at the next mark tells what happened after one."""
        ends = [seen[1:] for seen in self._seen[1:]] + [self._look()]
        return [
            Mark(moment, before, highest, flops_after - flops)
            for (moment, before, _, flops), (_, highest, flops_after) in zip(self._seen, ends, strict=True)
        ]


def _hook(module: nn.Module, name: str, mark: Callable[[str, bool, bool], None]) -> None:
    left = [0]  # inputs whose gradient is not known yet

    def before(_: nn.Module, inputs: Any) -> Any:
        mark(name, True, True)
        left[0] = 0
        return _tapped(inputs, entered)

    def entered(tensor: Tensor) -> Tensor:
        left[0] += tensor.requires_grad
        return _through(tensor, passed)

    def passed() -> None:
        left[0] -= 1
        if left[0] == 0:
            mark(name, False, False)

    def after(_: nn.Module, inputs: Any, output: Any) -> Any:
        mark(name, False, True)
        fresh = [True]

        def reached() -> None:
            if fresh[0]:
                fresh[0] = False
                mark(name, True, False)

        return _tapped(output, lambda tensor: _through(tensor, reached))

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after)


def _tapped(value: Any, tap: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return tap(value)
    if isinstance(value, dict):
        for name in value:
            value[name] = _tapped(value[name], tap)
    elif isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
        return type(value)(_tapped(part, tap) for part in value)
    return value


def _through(tensor: Tensor, told: Callable[[], None]) -> Tensor:
    result: Tensor = _Tap.apply(tensor, told)  # type: ignore[no-untyped-call]
    return result


class _Tap(torch.autograd.Function):
    """Gives a tensor on, and tells when its gradient passes."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, told: Callable[[], None]) -> Tensor:
        ctx.told = told
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, None]:
        ctx.told()
        return grads[0], None
