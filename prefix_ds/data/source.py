"""Reads data.train, data.valid or data.test into one table of records on disk.

A source is a file, a glob, a list of them, or a hub id. Whatever it was, it becomes a `datasets` table with
three columns, memory-mapped from the cache: `record` (the record as JSON text), `file` and `number` (where it
stands, for messages). One form for all sources means that the rest of the room knows no formats, that kinds
may be mixed, and that every complaint about a record can name its line. The cache is keyed by path, size and
time of change of the files.

Knows nothing of templates and tokens.
"""

import glob
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefix_ds.data import formats, hub
from prefix_ds.data.cache import code_fingerprint, fingerprint, quiet_library, telling_cache_errors
from prefix_ds.data.formats import FORMATS
from prefix_ds.errors import DataError

Source = str | list[str]

# What a name ends in when a file was meant, not a data set of the hub.
_FILE_LIKE = (
    *FORMATS,
    ".json",
    ".tsv",
    ".parq",
    ".arrow",
    ".xlsx",
    ".gz",
    ".zip",
    ".zst",
    ".xz",
    ".md",
    ".yaml",
)


@dataclass(frozen=True, eq=False)
class Records:
    """The records of one split, in the order of their files."""

    key: str  # of run.yaml: data.train
    table: Any  # datasets.Dataset
    names: tuple[str, ...]  # of the files, as the user wrote them, or the hub id
    hub_fingerprint: str | None = None  # what `datasets` calls so, of a data set of the hub

    def __len__(self) -> int:
        return len(self.table)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (json.loads(row["record"]) for row in self.table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record: dict[str, Any] = json.loads(self.table[index]["record"])
        return record

    def place(self, index: int) -> str:
        """Where record `index` stands, for a message."""
        row = self.table[index]
        return place(self.names[row["file"]], row["number"])

    def identity(self) -> str:
        """32 hex digits that name the content: the same for the same files under other folders.

        Reads every file once. For a hub id it is that of its fingerprint.
        """
        if self.hub_fingerprint:
            return fingerprint(self.names, self.hub_fingerprint)
        return fingerprint(*(_content(Path(name)) for name in self.names))


def place(name: str, number: int) -> str:
    """`file:line` where a file has lines, else the number of the record (both from 1)."""
    lines = Path(name).suffix.lower() in FORMATS and not name.lower().endswith(".parquet")
    return f"{name}:{number}" if lines else f"{name}: record {number}"


def _content(path: Path) -> tuple[str, int, str]:
    with path.open("rb") as file:
        return path.name, path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()


def read_records(source: Source, key: str) -> Records:
    """The records of a source; `key` is where run.yaml names it (data.train), for messages.

    Raises DataError, of one line, for a file that is missing, empty, of an unknown kind, broken or named
    twice, for a hub id that cannot be had, and for no records at all.
    """
    items = [source] if isinstance(source, str) else source
    hub_id = _hub_id(items, key)
    if hub_id:
        dataset = hub.load_from_hub(hub_id, key)
        names, theirs = (str(hub_id),), dataset._fingerprint
        return Records(key, _cached(key, theirs, names=names, dataset=dataset), names, theirs)
    paths = tuple(path for item in items for path in named_files(item, key))
    _refuse_twice(paths, key)
    return Records(key, _cached(key, [_stamp(path) for path in paths], names=paths), paths)


def named_files(item: str, key: str) -> list[str]:
    """The files one item of a source names, in order; none for a hub id. Reads nothing.

    Raises DataError, of one line, for a file that is missing, empty or of an unknown kind.
    """
    if not _names_files(item) and hub.parse_hub_id(item, key, "train"):
        return []
    paths = _files(item, key)
    for path in paths:
        _check_file(path, key)
    return paths


def _hub_id(items: list[str], key: str) -> hub.HubId | None:
    """The hub id, where the source is one; a list may hold files only."""
    ids = [hub.parse_hub_id(item, key, key.rpartition(".")[2]) for item in items if not _names_files(item)]
    if len(items) > 1 and any(ids):
        raise DataError(
            f"{key}: {next(filter(None, ids))}: a list may hold files only; a hub id stands alone"
        )
    return ids[0] if ids else None


def _names_files(item: str) -> bool:
    """Whether an item is meant for this machine, so that a mistyped path is not looked for on the hub."""
    name, _, query = item.partition("?")
    path = item if "=" not in query else name
    looks_so = path.lower().endswith(_FILE_LIKE) or path.startswith((".", "/", "~")) or glob.has_magic(path)
    return looks_so or Path(item).exists() or ("/" in path and Path(path).parent.is_dir())


def _files(item: str, key: str) -> list[str]:
    """The files an item names: itself, or in order of name what a glob finds."""
    path = Path(item).expanduser()
    if path.is_dir():
        raise DataError(f"{key}: {item}: is a folder; name its files, for example {item.rstrip('/')}/*.jsonl")
    if path.exists():
        return [str(path)]
    matches = glob.glob(str(path), recursive=True)  # noqa: PTH207 - Path.glob takes no absolute pattern
    found = sorted(match for match in matches if Path(match).is_file())
    if not found:
        what = "no file matches" if glob.has_magic(item) else "no such file"
        raise DataError(f"{key}: {item}: {what} (looked in {Path.cwd()})")
    return found


def _refuse_twice(paths: Sequence[str], key: str) -> None:
    seen: dict[Path, str] = {}
    for path in paths:
        real = Path(path).resolve()
        if real in seen:
            also = "" if seen[real] == path else f" (also as {seen[real]})"
            raise DataError(f"{key}: {path}: is named twice{also}; its records would be read twice")
        seen[real] = path


def _check_file(path: str, key: str) -> None:
    if Path(path).suffix.lower() not in FORMATS:
        raise DataError(
            f"{key}: {path}: unknown extension {Path(path).suffix or '(none)'}; known: {', '.join(FORMATS)}"
        )
    if not Path(path).stat().st_size:
        raise DataError(f"{key}: {path}: the file is empty")


def _stamp(path: str) -> tuple[str, int, int]:
    state = Path(path).stat()
    return str(Path(path).resolve()), state.st_size, state.st_mtime_ns


def _cached(key: str, content: object, **arguments: Any) -> Any:
    """The table of the records, made now or found in the cache of `datasets`."""
    import datasets

    columns = {"record": "large_string", "file": "int32", "number": "int64"}
    try:
        with quiet_library(), telling_cache_errors(key):
            return datasets.Dataset.from_generator(
                _rows,
                features=datasets.Features({name: datasets.Value(kind) for name, kind in columns.items()}),
                gen_kwargs=arguments,
                split=datasets.NamedSplit(key.rpartition(".")[2].strip("-")),
                fingerprint=fingerprint(key, content, code_fingerprint(sys.modules[__name__], formats, hub)),
            )
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, DataError | OSError):  # OSError: no permission, a disk that fails
            raise DataError(f"{key}: {error.__cause__}") from None
        raise


def _rows(names: tuple[str, ...], dataset: Any = None) -> Iterator[dict[str, Any]]:
    readers = [hub.hub_rows(dataset)] if dataset is not None else [_read(name) for name in names]
    number = 0
    for file, rows in enumerate(readers):
        for number, record in rows:
            yield {"record": record, "file": file, "number": number}
    if not number:
        raise DataError(f"{', '.join(names)}: no records")


def _read(path: str) -> formats.Rows:
    return FORMATS[Path(path).suffix.lower()](path)
