"""`prefix-ds init`: a run.yaml to start from, with every key explained.

Made from the page of keys: the few keys a user must set stand at the top with an example; every other one
stands below with its default, behind a `#`. Removing those changes nothing, until a value is changed.
"""

import textwrap
from pathlib import Path

from prefix_ds.config.listing import KeyRow, key_table, section_docs, yaml_text
from prefix_ds.errors import RunError
from prefix_ds.files import telling_disk_errors, write_text_atomically

_EXAMPLE = {
    "model.name": "models/base",
    "prefix.text": "Summarise the dialogue:",
    "data.train": "data/train.jsonl",
    "data.valid": "data/valid.jsonl",
    "data.prompt": "{dialogue}\nTL;DR:",
    "data.target": " {summary}",
    "train.epochs": 5.0,
    "run.folder": "runs/first",
}

_WIDTH = 100
_HEAD = """\
# A run of prefix-ds. Edit the keys that are set; the others have their defaults behind a #.
#
#   prefix-ds check run.yaml       says what is wrong, and shows examples as the model sees them
#   prefix-ds train run.yaml       trains; started again, it goes on
#
# A key may also be given on the command line: prefix-ds train run.yaml train.lr=0.001
# Relative paths begin in the folder that the command is called from.
# The run keeps a copy of its own in run.folder, so that must be another folder than this file's.
"""


def write_starter(folder: Path) -> Path:
    """Writes run.yaml into a folder, made if it is new, and returns its path.

    Raises RunError if there is one already, it cannot be written, or a file was named.
    """
    if folder.suffix.lower() in (".yaml", ".yml"):
        raise RunError(f"{folder}: expected a folder, in which run.yaml is written, such as {folder.stem}")
    path = folder / "run.yaml"
    if path.exists():
        raise RunError(f"{path}: is there already, and is left as it is; choose another folder")
    with telling_disk_errors(path):
        folder.mkdir(parents=True, exist_ok=True)
    write_text_atomically(path, starter_yaml())
    return path


def starter_yaml() -> str:
    """The text of a commented run.yaml with every key of the page."""
    rows: dict[str, list[KeyRow]] = {}
    for row in key_table():
        rows.setdefault(row.section, []).append(row)
    edited = [name for name in rows if any(row.key in _EXAMPLE for row in rows[name])]
    others = [name for name in rows if name not in edited]
    return "\n".join([_HEAD, *(_section(name, rows[name]) for name in edited + others)])


def _section(name: str, rows: list[KeyRow]) -> str:
    first = [row for row in rows if row.key in _EXAMPLE]
    rest = [row for row in rows if row.key not in _EXAMPLE]
    head = [f"# {section_docs()[name]}", f"{'' if first else '#'}{name}:"]
    return "\n".join([*head, *map(_entry, first + rest)]) + "\n"


def _entry(row: KeyRow) -> str:
    is_set = row.key in _EXAMPLE
    value = yaml_text(_EXAMPLE[row.key]) if is_set else row.default
    choices = f": {row.type}" if row.has_choices else ""
    comment = textwrap.wrap(f"{row.doc}{choices}", _WIDTH, initial_indent="  # ", subsequent_indent="  # ")
    return "\n".join([*comment, f"  {'' if is_set else '#'}{row.name}: {value}"])
