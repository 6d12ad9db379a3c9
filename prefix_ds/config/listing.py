"""The page of keys as a table: what `prefix-ds config` prints and a starter file is made from.

Everything is read off the fields in `keys`, so a new key appears here by itself. Knows nothing of values that
a user has set.
"""

import json
import types
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from pydantic.fields import FieldInfo

from prefix_ds.config.keys import RunConfig

_WORDS = {str: "text", bool: "true or false", int: "whole number", float: "number", type(None): "null"}
_BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


@dataclass(frozen=True)
class KeyRow:
    """One key of run.yaml."""

    section: str
    name: str
    type: str  # in words, with its bounds
    default: str  # as YAML
    doc: str
    has_choices: bool  # whether it takes some words only

    @property
    def key(self) -> str:
        """As messages and overrides write it: `train.lr`."""
        return f"{self.section}.{self.name}"


def key_table() -> list[KeyRow]:
    """Every key, in the order of the page."""
    return [
        KeyRow(
            section,
            name,
            _type(info),
            yaml_text(info.default),
            info.description or "",
            _has_choices(info.annotation),
        )
        for section, fields in sections().items()
        for name, info in fields.items()
    ]


def sections() -> dict[str, dict[str, FieldInfo]]:
    """The fields of each section."""
    found = {name: field.annotation for name, field in RunConfig.model_fields.items()}
    return {name: section.model_fields for name, section in found.items() if section is not None}


def section_docs() -> dict[str, str]:
    """The line that says what a section is about."""
    return {name: (field.annotation.__doc__ or "") for name, field in RunConfig.model_fields.items()}


def yaml_text(value: Any) -> str:
    """A value as YAML on one line."""
    if isinstance(value, tuple):
        value = list(value)
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=2**20)
    text = text.removesuffix("\n").removesuffix("\n...")
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) and text != value else text


def print_keys() -> None:
    """The page on the terminal, a table a section."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    rows = key_table()
    for section, doc in section_docs().items():
        console.print(Text(f"\n{section}: {doc}", style="bold"))
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        table.add_column(no_wrap=True, min_width=max(len(row.key) for row in rows))
        table.add_column(min_width=12, max_width=20)
        table.add_column()
        for row in rows:
            if row.section == section:  # as Text: brackets of a default are no markup
                table.add_row(
                    Text(row.key, "cyan"), Text(row.default), Text.assemble(row.doc, (f"; {row.type}", "dim"))
                )
        console.print(table)


def _type(info: FieldInfo) -> str:
    found = [
        f"{sign} {getattr(bound, name)}"
        for bound in info.metadata
        for name, sign in _BOUNDS.items()
        if hasattr(bound, name)
    ]
    words = _words(info.annotation)
    return " ".join([words.removesuffix(" or null"), *found]) + (
        " or null" if words.endswith(" or null") else ""
    )


def _has_choices(annotation: Any) -> bool:
    inner = get_args(annotation)
    if get_origin(annotation) is Literal:
        return any(isinstance(choice, str) for choice in inner)
    return bool not in inner and any(map(_has_choices, inner))


def _words(annotation: Any) -> str:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(str(choice) for choice in inner)
    if origin in (Union, types.UnionType):
        return " or ".join(_words(kind) for kind in inner)
    if origin is list:
        plural = "s" if inner[0] in _WORDS else ""  # not behind a list of choices
        return f"list of {_words(inner[0])}{plural}"
    if origin is tuple:
        return f"{len(inner)} {_words(inner[0])}s"
    return "mapping" if origin is dict else _WORDS[annotation]
