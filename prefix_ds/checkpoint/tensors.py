"""Named tensors in one safetensors file, and the digest that tells whether it is still what was written.

safetensors rather than torch.save: no pickle, so opening somebody's file runs nobody's code.

Knows nothing of runs, steps or prefixes.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save_file
from torch import Tensor

from prefix_ds.errors import RunError
from prefix_ds.files import sync, telling_disk_errors


@dataclass(frozen=True)
class FileDigest:
    """A file's name, size in bytes and SHA-256."""

    name: str
    size: int
    sha256: str


def digest_of(path: Path) -> FileDigest:
    """Reads the whole file. Raises OSError."""
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return FileDigest(path.name, file.tell(), sha256)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], text: str = "") -> FileDigest:
    """Writes tensors of any device, and a text in the file's header, and waits for the disk.

    Raises RunError; nothing is left at `path` then.
    """
    plain = {name: t.detach().to("cpu").contiguous() for name, t in tensors.items()}
    with telling_disk_errors(path):
        try:
            save_file(plain, path, _metadata(text))
        except SafetensorError as error:  # how a full disk looks from safetensors
            raise RunError(f"{path}: cannot be written: {error}") from error
        sync(path)
        return digest_of(path)


def read_tensors(path: Path, like: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The tensors of a file, on the CPU.

    `like` says which names, shapes and dtypes are expected. Raises RunError naming the tensor that differs.
    """
    with _telling_damage(path), safe_open(path, "pt") as file:
        # Cloned: a mapped tensor would read from a file that pruning may remove.
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    if like is not None:
        _check(path, tensors, like)
    return tensors


def read_tensors_and_text(path: Path) -> tuple[dict[str, Tensor], str]:
    """The tensors and the text that were written together, also while a writer replaces the file.

    Read in one go: safetensors opens a path once for the header and once more for the numbers, and the two
    may be of different files then. Raises RunError.
    """
    with _telling_damage(path):
        content = path.read_bytes()
        tensors = load(content)
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    metadata = header.get("__metadata__", {})
    text = metadata.get("prefix_ds", "")
    earlier = {"format": "pt", "prefix_ds": text}  # until commit cc532e8
    if text and metadata not in (_metadata(text), earlier):
        raise RunError(f"{path}: damaged: its header is not what was written")
    return tensors, text


def _metadata(text: str) -> dict[str, str]:
    """One entry, never two: safetensors writes them in an order that changes from process to process."""
    return {"prefix_ds": text} if text else {"format": "pt"}


@contextlib.contextmanager
def _telling_damage(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path}: cannot be read: {error}") from error


def _check(path: Path, tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> None:
    for name, expected in like.items():
        if name not in tensors:
            raise RunError(
                f"{path}: tensor {name!r} is missing; found {', '.join(sorted(tensors)) or 'none'}"
            )
        if _form(tensors[name]) != _form(expected):
            raise RunError(f"{path}: tensor {name!r} is {_form(tensors[name])}, expected {_form(expected)}")
    for name in tensors:
        if name not in like:
            raise RunError(f"{path}: tensor {name!r} is not of this run; expected {', '.join(sorted(like))}")


def _form(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
