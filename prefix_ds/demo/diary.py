"""Which stages of a demo have ended in a folder, and whether the folder is a demo's at all.

`demo.json` names the finished stages and a digest of the texts and run files they were made from: a folder
written by another version of the demo is refused, as is one that holds something else.

Knows nothing of what a stage does; imports no torch.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from prefix_ds.errors import RunError
from prefix_ds.files import telling_disk_errors, write_text_atomically

FILE = "demo.json"


@dataclass(frozen=True)
class Diary:
    """The finished stages of the demo made from some files."""

    made_from: str  # a digest
    finished: tuple[str, ...] = ()

    def with_stage(self, folder: Path, name: str) -> "Diary":
        """The diary with one more stage, written down."""
        longer = replace(self, finished=(*self.finished, name))
        write_text_atomically(folder / FILE, json.dumps(asdict(longer)) + "\n")
        return longer


def opened_diary(folder: Path, files: Mapping[str, str]) -> Diary:
    """The diary of a folder, and in it the demo's files (path and text), written if they are new.

    Raises RunError.
    """
    digest = hashlib.sha256(json.dumps(dict(files)).encode()).hexdigest()
    diary = _continued(folder, digest) if (folder / FILE).exists() else _begun(folder, digest)
    for name, text in files.items():
        with telling_disk_errors(folder / name):
            (folder / name).parent.mkdir(exist_ok=True)
        write_text_atomically(folder / name, text)
    return diary


def _begun(folder: Path, digest: str) -> Diary:
    with telling_disk_errors(folder):
        if folder.is_dir() and any(folder.iterdir()):
            raise RunError(f"{folder}: has files in it that are not the demo's; choose another folder")
        folder.mkdir(parents=True, exist_ok=True)
    write_text_atomically(folder / FILE, json.dumps(asdict(Diary(digest))) + "\n")
    return Diary(digest)


def _continued(folder: Path, digest: str) -> Diary:
    try:
        told = json.loads((folder / FILE).read_text(encoding="utf-8"))
        diary = Diary(told["made_from"], tuple(told["finished"]))
    except (OSError, ValueError, KeyError, TypeError):
        raise RunError(f"{folder / FILE}: is damaged; remove the folder, or choose another") from None
    if diary.made_from != digest:
        raise RunError(
            f"{folder}: holds another demo, made by another version or under another path; "
            "remove the folder, or choose another"
        )
    return diary
