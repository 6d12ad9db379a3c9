"""A tensor that is not read yet: it has a shape and a type, and any range of its numbers can be asked for.

A checkpoint is seldom what a model wants: experts must be stacked, projections joined, names changed.
transformers knows all that, as code over tensors. A `Promise` is a tensor on the meta device that goes
through this code and remembers what was done to it. Its numbers are then read piece by piece: moving
operations (stack, cat, chunk, the transpose of a matrix, a change of type) are followed back to the pieces
they came from; any other operation is done for real, on whole tensors, when a piece of its result is asked
for.

Ranges are flat: `read(start, stop)` gives elements [start, stop) of the tensor laid out in rows.

Knows nothing of files, models or devices.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor

_PIECE_NUMBERS = 2**22  # compared at once


class Source(Protocol):
    """Numbers that can be read in part."""

    @property
    def shape(self) -> tuple[int, ...]:
        """As a tensor's."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Of what `read` gives."""
        ...

    def read(self, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened tensor, on the CPU."""
        ...


class Promise(torch.Tensor):
    """A tensor on the meta device whose numbers come from a source."""

    source: Source

    @classmethod
    def of(cls, source: Source) -> "Promise":
        """The promise of a source's numbers."""
        meta = torch.empty(source.shape, dtype=source.dtype, device="meta")
        promise: Promise = torch.Tensor._make_subclass(cls, meta)
        promise.source = source
        return promise

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """What torch asks of every operation on a promise: its result, here another promise.

        What would change it in its place is lost: that is how families initialise weights, after these have
        been loaded. No conversion of transformers does it; a test loads every family.
        """
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if rule := _RULES.get(func):
                return rule(*args, **kwargs)
            result = func(*args, **kwargs)
        if isinstance(result, Tensor) and not any(result is arg for arg in args):
            return cls.of(Computed(func, args, kwargs, None, tuple(result.shape), result.dtype))
        if isinstance(result, (tuple, list)) and any(isinstance(part, Tensor) for part in result):
            return type(result)(
                cls.of(Computed(func, args, kwargs, n, tuple(part.shape), part.dtype))
                for n, part in enumerate(result)
            )
        return result


def read(tensor: Tensor, start: int, stop: int) -> Tensor:
    """Elements [start, stop) of a flattened tensor, be it a promise or there already."""
    if isinstance(tensor, Promise):
        return tensor.source.read(start, stop)
    return tensor.detach().reshape(-1)[start:stop]


def kept(tensor: Tensor) -> Tensor:
    """The whole tensor a promise stands for, read now; any other as it is."""
    return tensor.source.read(0, tensor.numel()).view(tensor.shape) if isinstance(tensor, Promise) else tensor


def same_numbers(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal; reads them piece by piece, up to the first difference."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    starts = range(0, one.numel(), _PIECE_NUMBERS)
    return all(
        torch.equal(read(one, start, stop), read(other, start, stop))
        for start, stop in ((start, min(start + _PIECE_NUMBERS, one.numel())) for start in starts)
    )


@dataclass(frozen=True)
class Cast:
    """The same numbers in another type."""

    inner: Source
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the inner source."""
        return self.inner.shape

    def read(self, start: int, stop: int) -> Tensor:
        """As the source's, converted."""
        return self.inner.read(start, stop).to(self.dtype)


@dataclass(frozen=True)
class Joined:
    """Parts one after the other along a dimension, which they have in common or (stacked) get new."""

    parts: Sequence[Source]
    dim: int
    shape: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        """The type all parts have."""
        return self.parts[0].dtype

    def read(self, start: int, stop: int) -> Tensor:
        """Piece by piece; along a late dimension there are many."""
        blocks = [prod(part.shape[self.dim :]) for part in self.parts]
        pieces = [self.parts[n].read(begin, end) for n, begin, end in _pieces(start, stop, blocks)]
        return torch.cat(pieces) if len(pieces) != 1 else pieces[0]


def _pieces(start: int, stop: int, blocks: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(part, begin, end): where the range lies in parts of which every turn takes a block each."""
    ends = list(accumulate(blocks))
    while start < stop:
        turn, place = divmod(start, ends[-1])
        part = next(n for n, end in enumerate(ends) if place < end)
        length = min(stop - start, ends[part] - place)
        begin = turn * blocks[part] + place - (ends[part] - blocks[part])
        yield part, begin, begin + length
        start += length


@dataclass(frozen=True)
class Narrowed:
    """A stretch of a dimension."""

    inner: Source
    dim: int
    first: int
    shape: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        """That of the inner source."""
        return self.inner.dtype

    def read(self, start: int, stop: int) -> Tensor:
        """Piece by piece; along a late dimension there are many."""
        mine, all_of_it = prod(self.shape[self.dim :]), prod(self.inner.shape[self.dim :])
        before = self.first * prod(self.shape[self.dim + 1 :])
        pieces = []
        while start < stop:
            turn, place = divmod(start, mine)
            length = min(stop - start, mine - place)
            begin = turn * all_of_it + before + place
            pieces.append(self.inner.read(begin, begin + length))
            start += length
        return torch.cat(pieces) if len(pieces) != 1 else pieces[0]


@dataclass(frozen=True)
class Turned:
    """A matrix with rows and columns exchanged."""

    inner: Source

    @property
    def shape(self) -> tuple[int, ...]:
        """The inner one's, backwards."""
        return self.inner.shape[::-1]

    @property
    def dtype(self) -> torch.dtype:
        """That of the inner source."""
        return self.inner.dtype

    def read(self, start: int, stop: int) -> Tensor:
        """Reads the columns that the range touches, whole."""
        num_rows = self.inner.shape[0]
        first, last = start // num_rows, -(-stop // num_rows)
        columns = Narrowed(self.inner, 1, first, (num_rows, last - first))
        turned = columns.read(0, num_rows * (last - first)).view(num_rows, last - first).t()
        return turned.reshape(-1)[start - first * num_rows : stop - first * num_rows]


@dataclass(frozen=True)
class Computed:
    """What an operation makes of whole tensors; `number` tells which of its results."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    options: dict[str, Any]
    number: int | None
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self, start: int, stop: int) -> Tensor:
        """Reads all that the operation takes, and does it."""
        result = self.function(*_kept_all(self.args), **_kept_all(self.options))
        whole: Tensor = result if self.number is None else result[self.number]
        return whole.reshape(-1)[start:stop].clone()


def _kept_all(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(map(_kept_all, value))
    if isinstance(value, dict):
        return {name: _kept_all(one) for name, one in value.items()}
    return kept(value) if isinstance(value, Tensor) else value


def _same(promise: Promise, *_: Any, **__: Any) -> Promise:
    return Promise.of(promise.source)


def _converted(promise: Promise, *args: Any, **options: Any) -> Promise:
    """Where a promise is sent does not matter; to which type does."""
    given = (a.dtype if isinstance(a, Tensor) else a for a in (*args, *options.values()))
    dtype = next((a for a in given if isinstance(a, torch.dtype)), promise.source.dtype)
    same = dtype == promise.source.dtype
    return Promise.of(promise.source if same else Cast(promise.source, dtype))


def _indexed(promise: Promise, index: Any) -> Promise:
    if index is Ellipsis:
        return _same(promise)
    result = torch.Tensor.__getitem__(promise, index)
    return Promise.of(
        Computed(torch.Tensor.__getitem__, (promise, index), {}, None, tuple(result.shape), result.dtype)
    )


def _source_of(tensor: Tensor) -> Source:
    assert isinstance(tensor, Promise), "a promise joined to a tensor that is there"
    return tensor.source


def _stacked(tensors: Sequence[Tensor], dim: int = 0) -> Promise:
    shape = list(tensors[0].shape)
    dim %= len(shape) + 1
    shape.insert(dim, len(tensors))
    return Promise.of(Joined([_source_of(t) for t in tensors], dim, tuple(shape)))


def _joined(tensors: Sequence[Tensor], dim: int = 0) -> Promise:
    dim %= tensors[0].dim()
    shape = list(tensors[0].shape)
    shape[dim] = sum(t.shape[dim] for t in tensors)
    return Promise.of(Joined([_source_of(t) for t in tensors], dim, tuple(shape)))


def _chunked(promise: Promise, chunks: int, dim: int = 0) -> tuple[Promise, ...]:
    dim %= promise.dim()
    first, made = 0, []
    for meta in torch.empty(promise.shape, device="meta").chunk(chunks, dim):
        made.append(Promise.of(Narrowed(_source_of(promise), dim, first, tuple(meta.shape))))
        first += meta.shape[dim]
    return tuple(made)


def _transposed(promise: Promise, dim0: int, dim1: int) -> Promise:
    if promise.dim() == 2 and dim0 % 2 != dim1 % 2:
        return Promise.of(Turned(_source_of(promise)))
    result = torch.transpose(promise, dim0, dim1)
    return Promise.of(
        Computed(torch.transpose, (promise, dim0, dim1), {}, None, tuple(result.shape), result.dtype)
    )


_RULES: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((Tensor.detach, Tensor.contiguous, Tensor.clone, Tensor.cpu, Tensor.cuda), _same),
    Tensor.data.__get__: _same,  # type: ignore[attr-defined]
    Tensor.to: _converted,
    Tensor.__getitem__: _indexed,
    torch.stack: _stacked,
    torch.cat: _joined,
    **dict.fromkeys((torch.chunk, Tensor.chunk), _chunked),
    **dict.fromkeys((torch.transpose, Tensor.transpose), _transposed),
    **dict.fromkeys((torch.t, Tensor.t), lambda promise: _transposed(promise, 0, 1)),
}
