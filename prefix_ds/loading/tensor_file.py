"""The tensors of a safetensors file, read in part and with `pread`.

The format (https://huggingface.co/docs/safetensors): eight bytes that say how long the header is, the header
in JSON (type, shape and place of each tensor), then the numbers. Files are not mapped into memory: a mapped
file that shrinks while it is read ends the process without a word, and mapped pages are counted as the
process's own memory.

Knows nothing of models.
"""

import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from prefix_ds.errors import ModelError

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_LONGEST_HEADER = 100_000_000  # bytes; the format's own limit


class TensorFile:
    """An open file; `tensors` can be read from it by name."""

    def __init__(self, path: Path) -> None:
        """Reads the header. Raises ModelError where it does not fit the file."""
        self.path = path
        try:
            self._file: BinaryIO = path.open("rb", buffering=0)
        except OSError as error:
            raise ModelError(f"{path}: cannot be read: {error.strerror}") from None
        self.first, entries = self._header()
        self.tensors: Mapping[str, StoredTensor] = {
            name: self._vetted(name, entry) for name, entry in entries.items() if name != "__metadata__"
        }
        self._refuse_overlaps()

    def read_into(self, buffer: Tensor, place: int, name: str) -> None:
        """Fills a one-dimensional tensor from a place among the numbers' bytes. Raises ModelError."""
        view = memoryview(buffer.view(torch.uint8).numpy())  # type: ignore[arg-type]
        while view.nbytes:
            try:
                count = os.preadv(self._file.fileno(), [view], self.first + place)
            except OSError as error:
                raise ModelError(f"{self.path}: {name}: cannot be read: {error.strerror}") from None
            if not count:
                raise ModelError(f"{self.path}: {name}: the file ends before it does; it was cut short")
            view, place = view[count:], place + count

    def _header(self) -> tuple[int, dict[str, Any]]:
        length = os.fstat(self._file.fileno()).st_size
        start = os.pread(self._file.fileno(), 8, 0)
        size = struct.unpack("<Q", start)[0] if len(start) == 8 else _LONGEST_HEADER
        if size > min(_LONGEST_HEADER, length - 8):
            raise ModelError(f"{self.path}: damaged or cut short: no header")
        try:
            entries = json.loads(os.pread(self._file.fileno(), size, 8))
        except ValueError as error:
            raise ModelError(f"{self.path}: damaged: its header is no JSON: {error}") from None
        if not isinstance(entries, dict):
            raise ModelError(f"{self.path}: damaged: its header is no JSON object")
        self._length = length - 8 - size
        return 8 + size, entries

    def _vetted(self, name: str, entry: Any) -> "StoredTensor":
        try:
            dtype, shape = _DTYPES[entry["dtype"]], tuple(map(int, entry["shape"]))
            begin, end = map(int, entry["data_offsets"])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ModelError(f"{self.path}: {name}: unknown or damaged entry: {error}") from None
        if end - begin != prod(shape) * dtype.itemsize or min(begin, *shape, 0) < 0:
            raise ModelError(f"{self.path}: {name}: {end - begin} bytes for a shape of {list(shape)}")
        if end > self._length:
            raise ModelError(f"{self.path}: damaged or cut short: it ends before {name} does")
        return StoredTensor(self, name, begin, shape, dtype)

    def _refuse_overlaps(self) -> None:
        placed = sorted((t for t in self.tensors.values() if prod(t.shape)), key=lambda t: t.begin)
        for one, other in pairwise(placed):
            if one.begin + prod(one.shape) * one.dtype.itemsize > other.begin:
                raise ModelError(f"{self.path}: damaged: {one.name} and {other.name} share bytes")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file."""

    file: TensorFile
    name: str
    begin: int  # bytes behind the header
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self, start: int, stop: int) -> Tensor:
        """Elements [start, stop). Raises ModelError for a file that ends early, and for NaN and infinity."""
        numbers = torch.empty(stop - start, dtype=self.dtype)
        if stop > start:
            self.file.read_into(numbers, self.begin + start * self.dtype.itemsize, self.name)
            self._refuse_nonsense(numbers, start)
        return numbers

    def _refuse_nonsense(self, numbers: Tensor, start: int) -> None:
        """The smallest and the largest tell, fast: both are NaN where any is."""
        if not self.dtype.is_floating_point:
            return
        if self.dtype.itemsize == 1:
            numbers = numbers.bfloat16()  # has all of their values, and torch's functions
        if not torch.stack(torch.aminmax(numbers)).isfinite().all():
            place = start + int((~numbers.isfinite()).nonzero()[0])
            raise ModelError(f"{self.file.path}: {self.name}: element {place} is no finite number")
