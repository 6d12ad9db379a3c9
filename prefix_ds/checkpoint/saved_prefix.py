"""The trained prefix as a folder: `prefix.safetensors`, and `prefix.json` for people to read.

One tensor for each slot and kind, named `SLOT.key` and `SLOT.value`, float32 [N, P, H]. All facts travel in
the tensor file's own header, so replacing one file replaces everything: a reader never sees the numbers of
one prefix with the facts of another, whenever the writer dies, and a copied file still says what it belongs
to. `prefix.json` is a copy of those facts that nothing reads back.

Knows nothing of how a prefix is trained, or of the table its numbers live in meanwhile.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from prefix_ds.checkpoint.tensors import read_tensors_and_text, write_tensors
from prefix_ds.errors import RunError
from prefix_ds.files import remove, telling_disk_errors, whole_file, write_text_atomically

FORMAT = 1
FILE = "prefix.safetensors"

KeyValue = tuple[Tensor, Tensor]  # key_NPH, value_NPH


class SlotShape(Protocol):
    """What a base asks of one slot of a prefix."""

    @property
    def name(self) -> str: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def key_dim(self) -> int: ...
    @property
    def value_dim(self) -> int: ...


@dataclass(frozen=True)
class PrefixFacts:
    """Where a prefix comes from."""

    base: str  # hub id or folder
    revision: str | None
    model_type: str
    base_config_sha256: str  # of the base's config, to recognise it under another name
    base_num_layers: int  # all layers of the base, with and without a prefix
    step: int
    valid_loss: float | None
    version: str  # of prefix-ds
    window: int | None = None  # the smallest that a layer of the base attends within


@dataclass(frozen=True)
class SavedPrefix:
    """A prefix as read from a folder: (key_NPH, value_NPH) by slot name, in slot order."""

    path: Path
    slots: dict[str, KeyValue]
    facts: PrefixFacts
    sha256: str | None = None  # of facts and numbers, as its file has it

    @property
    def length(self) -> int:
        """Positions."""
        return next(iter(self.slots.values()))[0].shape[1]

    def check_base(self, model_type: str, num_layers: int) -> None:
        """Raises RunError if the prefix was trained for another family, or for another number of layers."""
        if self.facts.model_type != model_type:
            raise RunError(self._other_model(f"the base is of the family {model_type}"))
        if self.facts.base_num_layers != num_layers:
            layers = f"it was made for {self.facts.base_num_layers} layers, the base has {num_layers}"
            raise RunError(self._other_model(layers))

    def keys_values(self, expected: Sequence[SlotShape]) -> list[KeyValue]:
        """(key_NPH, value_NPH) of each expected slot. Raises RunError if the prefix has others."""
        here = [(name, *_shape(*pair)) for name, pair in self.slots.items()]
        there = [(s.name, s.num_heads, s.key_dim, s.value_dim) for s in expected]
        for mine, asked in zip(here, there, strict=False):
            if mine != asked:
                raise RunError(self._other_model(f"it has {_told(*mine)}, the base asks for {_told(*asked)}"))
        if len(here) != len(there):
            raise RunError(self._other_model(f"it has {len(here)} slots, the base asks for {len(there)}"))
        return list(self.slots.values())

    def _other_model(self, difference: str) -> str:
        made_for = f"{self.facts.base} ({self.facts.model_type})"
        return f"{self.path}: this prefix was trained for {made_for}: {difference}"


def write_prefix(folder: Path, slots: Mapping[str, KeyValue], facts: PrefixFacts) -> None:
    """Makes this the prefix of `folder`: (key_NPH, value_NPH) by slot name. Raises RunError."""
    plain = {name: (_plain(key), _plain(value)) for name, (key, value) in slots.items()}
    header = {
        "format": FORMAT,
        **asdict(facts),
        "length": next(iter(plain.values()))[0].shape[1],
        "slots": [_slot_facts(name, *pair) for name, pair in plain.items()],
    }
    text = _text(header, plain)
    with telling_disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".tmp*"):  # safetensors' own temporary files begin so too
            remove(left)
    with whole_file(folder / FILE) as temporary:
        write_tensors(temporary, _named(plain), text)
    write_text_atomically(folder / "prefix.json", text + "\n")


def read_prefix(folder: Path) -> SavedPrefix:
    """The prefix of a folder. Raises RunError if there is none, or if it is damaged."""
    path = folder / FILE
    if not path.exists():
        raise RunError(f"{path}: no such file; a folder with a trained prefix was expected")
    tensors, text = read_tensors_and_text(path)
    try:
        header = json.loads(text)
        sha256 = header.pop("sha256")
        if header["format"] != FORMAT:
            raise RunError(f"{path}: has format {header['format']}, this version reads {FORMAT}")
        names = [slot["name"] for slot in header["slots"]]
        slots = {name: (tensors[f"{name}.key"], tensors[f"{name}.value"]) for name in names}
        facts = PrefixFacts(**{f.name: header[f.name] for f in fields(PrefixFacts) if f.name in header})
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path}: not a prefix saved by prefix-ds, or damaged: {error!r}") from None
    if _text(header, slots) != text:
        raise RunError(f"{path}: damaged: it is not what was written (SHA-256 differs)")
    return SavedPrefix(path, slots, facts, sha256)


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32).contiguous()


def _named(slots: Mapping[str, KeyValue]) -> dict[str, Tensor]:
    kinds = ("key", "value")
    return {f"{name}.{kind}": t for name, pair in slots.items() for kind, t in zip(kinds, pair, strict=True)}


def _shape(key_NPH: Tensor, value_NPH: Tensor) -> tuple[int, int, int]:
    return key_NPH.shape[0], key_NPH.shape[2], value_NPH.shape[2]


def _slot_facts(name: str, key_NPH: Tensor, value_NPH: Tensor) -> dict[str, Any]:
    num_heads, key_dim, value_dim = _shape(key_NPH, value_NPH)
    return {"name": name, "num_heads": num_heads, "key_dim": key_dim, "value_dim": value_dim}


def _told(name: str, num_heads: int, key_dim: int, value_dim: int) -> str:
    return f"{name} with {num_heads} heads, keys of {key_dim} and values of {value_dim}"


def _text(header: Mapping[str, Any], slots: Mapping[str, KeyValue]) -> str:
    """The facts as they are written, with the SHA-256 of them and of the numbers."""
    total = hashlib.sha256(json.dumps(header).encode())
    for tensor in _named(slots).values():
        total.update(tensor.numpy().tobytes())
    return json.dumps({**header, "sha256": total.hexdigest()}, indent=1)
