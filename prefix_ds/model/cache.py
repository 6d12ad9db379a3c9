"""Keys and values of what was read and written so far, with room in front for the prefix.

Attention wants the keys of prefix and text as one tensor. transformers' cache makes a new tensor for every
token, and putting the prefix in front of it makes another: both copy all keys and values of a layer, which
for a few rows is more than the layer's weights. Here they lie in a buffer that has places in front, which the
prefix is written into once, and behind, where the next token goes. What attention gets is a view of it. The
numbers are the same ones.

A key tensor that the cache hands out bears a mark, by which attention finds the room in front. A model that
does something to keys first (DeepSeek keeps small latent ones, widened for each token) hands on another
tensor, and the prefix is joined to that by a copy, as in training; so is that of a layer that attends to
another layer's keys.

Layers of other kinds (windows, recurrent states) keep what transformers gives them. Knows nothing of how a
token is chosen.
"""

from functools import partial
from typing import Any

from torch import Tensor
from transformers.cache_utils import (
    DummyLayer,
    DynamicCache,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

_MARK = "_prefix_room"
_LEAST_GROWTH = 64  # positions


class Room:
    """Keys, or values, of one layer: [B, N, front + T, H], and places behind."""

    def __init__(self, front: int) -> None:
        """Nothing yet; `front` positions are kept free."""
        self._front = front
        self._used = front
        self._buffer: Tensor | None = None
        self._filled_by: Tensor | None = None

    def with_more(self, more_BNTH: Tensor) -> Tensor:
        """All of the text so far [B, N, T, H], a view that bears the mark."""
        start, self._used = self._used, self._used + more_BNTH.shape[2]
        if self._buffer is None or self._used > self._buffer.shape[2]:
            self._grow(more_BNTH, start)
        assert self._buffer is not None
        self._buffer[:, :, start : self._used] = more_BNTH
        return self.text()

    def text(self) -> Tensor:
        """The text so far [B, N, T, H]."""
        assert self._buffer is not None
        text_BNTH = self._buffer[:, :, self._front : self._used]
        setattr(text_BNTH, _MARK, self)
        return text_BNTH

    def behind(self, front_NPH: Tensor) -> Tensor | None:
        """This front and the text [B, N, P + T, H], a view; None where the room is another's."""
        assert self._buffer is not None
        if self._filled_by is None and front_NPH.shape[1] == self._front:
            self._buffer[:, :, : self._front] = front_NPH
            self._filled_by = front_NPH
        return self._buffer[:, :, : self._used] if self._filled_by is front_NPH else None

    def keep(self, index_B: Tensor) -> None:
        """Only these rows stay."""
        assert self._buffer is not None
        self._buffer = self._buffer[index_B]

    def _grow(self, like_BNTH: Tensor, used: int) -> None:
        size = self._used + max(_LEAST_GROWTH, self._used // 4)
        larger = like_BNTH.new_empty(*like_BNTH.shape[:2], size, like_BNTH.shape[3])
        if self._buffer is not None:
            larger[:, :, :used] = self._buffer[:, :, :used]
        self._buffer = larger


class RoomyLayer(DynamicLayer):  # type: ignore[misc]
    """transformers' layer of a cache, in such rooms."""

    def __init__(self, front: int) -> None:
        """Keeps `front` positions free."""
        super().__init__()
        self._rooms = Room(front), Room(front)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Adds keys and values; all that are there now."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        key_room, value_room = self._rooms
        self.keys, self.values = key_room.with_more(key_states), value_room.with_more(value_states)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only these rows stay."""
        if self.get_seq_length():
            for room in self._rooms:
                room.keep(indices)
            self.keys, self.values = (room.text() for room in self._rooms)


_IN_ROWS = {RoomyLayer, DynamicLayer, DynamicSlidingWindowLayer, DynamicIndexedLayer, DummyLayer}


def make_room(cache: Any, front: int) -> None:
    """Exchanges the plain layers of a cache that is still empty."""
    if type(cache) is not DynamicCache or cache.offloading:
        return
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = partial(RoomyLayer, front)
    cache.layers = [RoomyLayer(front) if type(layer) is DynamicLayer else layer for layer in cache.layers]


def may_leave(cache: Any) -> bool:
    """Whether single rows can be taken out of this cache: not where it may have recurrent states."""
    return type(cache) is DynamicCache and all(type(layer) in _IN_ROWS for layer in cache.layers)


def joined_in_place(front_NPH: Tensor, text_BNTH: Tensor) -> Tensor | None:
    """Front and text as one tensor [B, N, P + T, H] without a copy, where the text came from a room."""
    room: Room | None = getattr(text_BNTH, _MARK, None)
    return None if room is None else room.behind(front_NPH)
