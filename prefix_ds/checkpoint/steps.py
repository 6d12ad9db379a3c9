"""Checkpoints of a run: `RUN/checkpoints/step-00000200/`, each there whole or not at all.

A checkpoint is a folder of safetensors files and a `state.json` with the step, JSON-able facts and the size
and SHA-256 of every other file (and of itself). It is built in a `.tmp-` sibling, fsynced and renamed, so a
writer killed at any moment leaves the earlier checkpoints as they were and a `.tmp-` folder that the next
writer removes.

What a disk or a copy damaged later is found by the digests: `latest` says what is wrong with a folder and
takes the one before.

One file by one rank is `save_checkpoint`. With a file a rank: rank 0 calls `begin`, every rank
`write_tensors` into `pending_folder`, rank 0 `seal`s with everyone's digests; the barriers between are the
caller's.

Knows nothing of engines, ranks or what the tensors mean.
"""

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from prefix_ds.checkpoint.tensors import FileDigest, digest_of, read_tensors, write_tensors
from prefix_ds.errors import RunError
from prefix_ds.files import TEMPORARY, remove, sync, telling_disk_errors

log = logging.getLogger(__name__)

FORMAT = 1
TENSORS = "tensors.safetensors"
_STATE = "state.json"
_NAME = re.compile(r"step-(\d{8,})(\.replaced)?")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: its folder, the step it was taken after, and its JSON-able facts."""

    folder: Path
    step: int
    state: dict[str, Any]

    def tensors(self, like: Mapping[str, Tensor] | None = None, name: str = TENSORS) -> dict[str, Tensor]:
        """The tensors of one file, on the CPU. Raises RunError naming the first that is not as in `like`."""
        return read_tensors(self.folder / name, like)


def save_checkpoint(run: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Path:
    """Writes a checkpoint of one file and returns its folder. Raises RunError and leaves nothing behind."""
    folder = begin(run, step)
    try:
        return seal(run, step, [write_tensors(folder / TENSORS, tensors)], state)
    except BaseException:
        discard(run, step)
        raise


def begin(run: Path, step: int) -> Path:
    """An empty folder for the files of a new checkpoint; what killed writers left is removed."""
    folder = pending_folder(run, step)
    with telling_disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        for left in folder.parent.glob(f"{TEMPORARY}*"):
            remove(left)
        folder.mkdir()
    return folder


def pending_folder(run: Path, step: int) -> Path:
    """Where `begin` made the folder: where the other ranks write."""
    return _folder(run, step, TEMPORARY)


def seal(run: Path, step: int, files: Iterable[FileDigest], state: Mapping[str, Any]) -> Path:
    """Makes the pending folder the checkpoint of `step`; one that was there before is replaced.

    `files` are the digests that `write_tensors` returned, of all ranks.
    """
    pending, final = pending_folder(run, step), _folder(run, step)
    replaced = final.with_name(f"{final.name}.replaced")
    with telling_disk_errors(final):
        (pending / _STATE).write_text(_state_text(step, files, state), encoding="utf-8")
        sync(pending / _STATE)
        sync(pending)
        if final.exists():  # `latest` finds it under either name, so there is always one
            remove(replaced)
            final.rename(replaced)
        pending.rename(final)
        sync(final.parent)
    remove(replaced)
    return final


def discard(run: Path, step: int) -> None:
    """Removes the pending folder of a checkpoint that will not be sealed."""
    remove(pending_folder(run, step))


def latest(run: Path) -> Checkpoint | None:
    """The newest checkpoint that is complete; None if the run has none yet.

    A damaged one is skipped with a warning. Raises RunError if all are, for one that cannot be read and for
    one of another format. Reads every byte of the one it returns, so call it on one rank.
    """
    folders = _folders(run)
    for folder in reversed(folders):
        try:
            return _opened(folder)
        except (FileNotFoundError, NotADirectoryError, ValueError) as error:
            log.warning("%s is damaged and skipped: %s", folder, error)
        except OSError as error:  # rights, or a network's disk: it may be whole
            raise RunError(f"{folder}: cannot be read: {error.strerror or error}") from None
    if folders:
        raise RunError(f"{run / 'checkpoints'}: every checkpoint is damaged; remove the folder to start anew")
    return None


def prune(run: Path, keep: int, step: int) -> None:
    """Removes all but `keep` checkpoints up to that of `step`, which has just been saved and is good.

    Later ones are damaged, or the run would have gone on from there; they are replaced when it gets there.
    """
    until = [folder for folder in _folders(run) if _step_of(folder) <= step]
    for folder in until[: -max(1, keep)]:
        doomed = folder.with_name(TEMPORARY + folder.name)
        with telling_disk_errors(folder):
            folder.rename(doomed)  # first, so that a kill in between leaves no damaged checkpoint
        remove(doomed)


def _folder(run: Path, step: int, before: str = "") -> Path:
    return run / "checkpoints" / f"{before}step-{step:08d}"


def _folders(run: Path) -> list[Path]:
    """Oldest first; of one step, a replaced checkpoint before the one that replaced it. Raises RunError."""
    parent = run / "checkpoints"
    try:
        names = [path.name for path in parent.iterdir()]  # glob takes what may not be read for empty
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RunError(f"{parent}: cannot be read: {error.strerror or error}") from None
    found = [match for name in names if (match := _NAME.fullmatch(name))]
    return [parent / m[0] for m in sorted(found, key=lambda match: (int(match[1]), match[2] is None))]


def _step_of(folder: Path) -> int:
    name = _NAME.fullmatch(folder.name)
    return int(name[1]) if name else -1


def _state_text(step: int, files: Iterable[FileDigest], state: Mapping[str, Any]) -> str:
    body = {"format": FORMAT, "step": step, "files": [asdict(f) for f in files], "state": dict(state)}
    return json.dumps(body | {"sha256": _digest(body)}, indent=1) + "\n"


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(json.loads(json.dumps(body)), sort_keys=True).encode()).hexdigest()


def _opened(folder: Path) -> Checkpoint:
    """Raises OSError or ValueError that says what is wrong with the folder; RunError for another format."""
    body = json.loads((folder / _STATE).read_text(encoding="utf-8"))
    if not isinstance(body, dict) or body.pop("sha256", None) != _digest(body):
        raise ValueError(f"{_STATE} is not as it was written")
    if body["format"] != FORMAT:
        raise RunError(f"{folder}: has format {body['format']}, this version of prefix-ds reads {FORMAT}")
    for expected in (FileDigest(**fields) for fields in body["files"]):
        _check_file(folder / expected.name, expected)
    if _step_of(folder) != body["step"]:
        raise ValueError(f"it is the checkpoint of step {body['step']}")
    return Checkpoint(folder, body["step"], body["state"])


def _check_file(path: Path, expected: FileDigest) -> None:
    if not path.is_file():
        raise ValueError(f"{path.name} is missing")
    if (size := path.stat().st_size) != expected.size:
        raise ValueError(f"{path.name} has {size} bytes, written were {expected.size}")
    if digest_of(path) != expected:
        raise ValueError(f"{path.name} is not as it was written (SHA-256 differs)")
