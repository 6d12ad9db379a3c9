"""YAML that says to kubectl exactly what is in the values.

kubectl's parser is not Python's: to one of them `1e3`, `0o7` or `y` is a number or a truth value where to the
other it is text, and some line breaks are others' line ends. So all text that is not plainly a word is put in
double quotes, and only printable text of several lines stands as it is.

Knows nothing of Kubernetes.
"""

import re
from collections.abc import Iterable
from typing import Any

import yaml

_WORD = re.compile(r"(?!(?:y|n|yes|no|on|off|true|false|null)$)[A-Za-z/][A-Za-z0-9._/-]*", re.IGNORECASE)
_NO_LIMIT = 10**9  # a line is never folded


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        """Every object is written out where it stands."""
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        """Lists are indented below their key."""
        super().increase_indent(flow, False)


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    style = None if _WORD.fullmatch(value) else '"'
    lines = value.removesuffix("\n").split("\n")
    if len(lines) > 1 and all(line.isprintable() and line == line.rstrip() for line in lines):
        style = "|"
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style)


_Dumper.add_representer(str, _text)


def yaml_text(objects: Iterable[Any]) -> str:
    """One document an object."""
    return yaml.dump_all(
        objects, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=_NO_LIMIT, explicit_start=True
    )
