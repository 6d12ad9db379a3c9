"""From run.yaml and overrides to a RunConfig, or one clear line.

Overrides are `section.key=value` words of the command line; their values are YAML. A mistake is told with the
file, the line where the key stands, the value found and what was expected; an unknown key names the nearest
right one.

Knows nothing of what the keys mean.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from prefix_ds.config.keys import RunConfig
from prefix_ds.config.tasks import with_defaults
from prefix_ds.errors import ConfigError, is_unicode

Place = tuple[str | int, ...]

# What is told of a mistake, by the name that pydantic has for it; of the others its words, with these put in.
_EXPECTED = {
    "model_type": "a section with keys",
    "string_type": "text",
    "string_too_short": "some text",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "list_type": "a list, as [a, b]",
    "tuple_type": "two numbers",
    "missing": "two numbers",
    "too_long": "two numbers",
    "dict_type": "keys with values, as {a: b}",
}
_PHRASES = {
    "Input should be": "expected",
    "greater than or equal to": "at least",
    "greater than": "more than",
    "less than or equal to": "at most",
}
_SECRET_SECTIONS = ("mlflow",)  # passwords and tokens stand there: no message shows its values


def read_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The run that a YAML file and `a.b=value` words describe. Raises ConfigError."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    return parse_config(text, overrides, str(path))


def parse_config(text: str, overrides: Sequence[str] = (), source: str = "run.yaml") -> RunConfig:
    """As `read_config`, from text; `source` names it in messages."""
    tree, lines = _parse(text, source)
    for word in overrides:
        _override(tree, lines, word)
    try:
        return RunConfig.model_validate(with_defaults(tree))
    except ValidationError as error:
        raise ConfigError(*(_explain(e, source, lines) for e in error.errors())) from None


def config_text(config: RunConfig) -> str:
    """The whole configuration as YAML, every key resolved; `read_config` reads it back equal."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=110)


def fixed_keys(config: RunConfig) -> dict[str, Any]:
    """What changes what a run computes, as JSON has it, by `section.key`; not the free keys."""
    tree = config.model_dump(mode="json")
    return {f"{section}.{name}": tree[section][name] for section, name, free in _all_keys() if not free}


def differing_keys(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Lines `section.key: old -> new` for those of `fixed_keys` that both have, and not alike."""
    both = [(key, before, new[key]) for key, before in old.items() if key in new]
    return [f"{key}: {before!r} -> {after!r}" for key, before, after in both if before != after]


def _all_keys() -> Iterator[tuple[str, str, bool]]:
    for section, field in RunConfig.model_fields.items():
        keys: dict[str, Any] = field.annotation.model_fields  # type: ignore[union-attr]
        for name, info in keys.items():
            yield section, name, info.json_schema_extra["free"]


def _parse(text: str, source: str) -> tuple[dict[str, Any], dict[Place, str]]:
    """The YAML tree, and for each place in it the line it stands on."""
    try:
        node = yaml.compose(text, yaml.CSafeLoader)
        tree = yaml.load(text, yaml.CSafeLoader)
        lines: dict[Place, str] = {}
        _note_lines(node, (), source, lines)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 0
        raise ConfigError(f"{source}:{line}: not YAML: {error.problem}") from None
    except (
        yaml.YAMLError,
        ValueError,
        RecursionError,
    ) as error:  # a date of month 31, an anchor in itself
        raise ConfigError(f"{source}: not YAML: {error}") from None
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{source}: expected sections with keys, found {type(tree).__name__}")
    return {name: {} if keys is None else keys for name, keys in tree.items()}, lines


def _note_lines(node: yaml.Node | None, place: Place, source: str, lines: dict[Place, str]) -> None:
    if not isinstance(node, yaml.MappingNode):
        return
    for name, value in node.value:
        here = (*place, name.value)
        line = f"{source}:{name.start_mark.line + 1}"
        if here in lines:
            raise ConfigError(f"{line}: {_dotted(here)} is given twice (first at {lines[here]})")
        lines[here] = line
        _note_lines(value, here, source, lines)


def _override(tree: dict[str, Any], lines: dict[Place, str], word: str) -> None:
    if not is_unicode(word):
        raise ConfigError(f"{word!r}: not UTF-8")
    dotted, equals, text = word.partition("=")
    place = tuple(dotted.split("."))
    if not equals or len(place) < 2:
        raise ConfigError(f"{word!r}: expected section.key=value")
    for name in place[:-1]:
        branch = tree.get(name)
        tree[name] = tree = dict(branch) if isinstance(branch, dict) else {}
    tree[place[-1]] = _override_value(place, text)
    may_be_secret = place[0] in _SECRET_SECTIONS or place[0] not in RunConfig.model_fields  # mflow.uri
    lines[place] = repr(f"{dotted}=..." if may_be_secret else word)
    for size in range(1, len(place)):
        lines.setdefault(place[:size], lines[place])


def _yaml(text: str) -> Any:
    try:
        return yaml.load(text, yaml.CSafeLoader)
    except (yaml.YAMLError, ValueError, RecursionError):
        return text


def _override_value(place: Place, text: str) -> Any:
    """A key that takes text takes it as it is: `data.prompt={question}` is a template, not a YAML mapping.

    Only null, where it may be empty, and `[...]`, where it may be a list, are still YAML.
    """
    section = RunConfig.model_fields.get(str(place[0]))
    keys = section.annotation.model_fields if section else {}  # type: ignore[union-attr]
    annotation = keys[place[1]].annotation if len(place) == 2 and place[1] in keys else None
    kinds = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
    is_null = NoneType in kinds and text in ("", "~", "null")
    is_list = list[str] in kinds and text.startswith("[")
    return _yaml(text) if str not in kinds or is_null or is_list else text


def _explain(error: ErrorDetails, source: str, lines: dict[Place, str]) -> str:
    place = error["loc"]
    where = next((lines[place[:n]] for n in range(len(place), 0, -1) if place[:n] in lines), source)
    if error["type"] == "extra_forbidden":
        return f"{where}: unknown key {_dotted(place)}{_nearest(place)}"
    if error["type"] == "value_error":
        message = str(error["ctx"]["error"])  # ours: it begins with the key
        own = tuple(message.partition(":")[0].split("."))
        return f"{lines.get(own, source)}: {message}"
    found = "" if place[0] in _SECRET_SECTIONS else f"{error['input']!r}: "
    return f"{where}: {_dotted(place)}: {found}{_expected(error)}"


def _expected(error: ErrorDetails) -> str:
    if error["type"] in _EXPECTED:
        return f"expected {_EXPECTED[error['type']]}"
    text = error["msg"]
    for theirs, ours in _PHRASES.items():
        text = text.replace(theirs, ours)
    return text


def _dotted(place: Place) -> str:
    return ".".join(str(part) for part in place)


def _nearest(place: Place) -> str:
    """The right key the user most likely meant, looked for in the same section and then everywhere."""
    known = {f"{section}.{name}" for section, name, _ in _all_keys()}
    if len(place) == 1:
        known = set(RunConfig.model_fields)
    near = difflib.get_close_matches(_dotted(place), known, n=1, cutoff=0.6)
    by_name = sorted(k for k in known if k.rpartition(".")[2] == place[-1])
    found = by_name[:1] or near
    return f"; did you mean {found[0]}?" if found else f"; known here: {', '.join(_siblings(place))}"


def _siblings(place: Place) -> list[str]:
    field = RunConfig.model_fields.get(str(place[0])) if len(place) > 1 else None
    section: type[BaseModel] = field.annotation if field else RunConfig  # type: ignore[assignment]
    return list(section.model_fields)
