"""What DeepSpeed itself says of its settings, asked before anything is built or written.

Otherwise a mistyped key would come to light deep in the construction of a model, or never: most of DeepSpeed
drops what it does not know. It has no list of the names it knows, so its reading of the settings is watched,
and what it never looks up is refused. Nothing here ages.

Knows nothing of run.yaml but the key that names the file.
"""

import difflib
import logging
from collections.abc import Iterator
from typing import Any

from prefix_ds.dist import has_gpu
from prefix_ds.engine.settings import Settings
from prefix_ds.errors import ConfigError

_BATCH_SIZES = {"train_batch_size", "gradient_accumulation_steps"}  # they must fit a world, and none is here


def vet(settings: Settings, name: str) -> None:
    """Raises ConfigError for keys that DeepSpeed does not know or cannot take.

    `name` is what `engine.deepspeed` names.
    """
    if mistakes := list(_mistakes(settings)):
        raise ConfigError(*(f"engine.deepspeed: {name}: {mistake}" for mistake in mistakes))


def _mistakes(settings: Settings) -> Iterator[str]:
    has_gpu()  # before the import
    from deepspeed import DeepSpeedConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    read = _Watched(
        {
            key: _Watched(value) if isinstance(value, dict) else value
            for key, value in settings.items()
            if key not in _BATCH_SIZES
        }
    )
    try:
        DeepSpeedConfig(read)
    except ValidationError as error:
        fields = DeepSpeedZeroConfig.model_fields
        known = [name for key, field in fields.items() for name in (key, field.alias) if name]
        yield from (_told(mistake, settings, known) for mistake in error.errors())
    except Exception as error:  # assertions, removed features, what comes of a number in a section's place
        words = " ".join(str(error).split()) or type(error).__name__
        yield f"{read.asked[-1]}: DeepSpeed does not take it: {words}"
    else:
        yield from read.unknown()


class _Watched(dict[str, Any]):
    """Settings that remember what was looked up in them.

    What is deeper than a section belongs to DeepSpeed's pydantic models, which forbid what they do not know.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.asked: list[str] = []

    def __getitem__(self, key: str) -> Any:
        self.asked.append(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.append(key)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.asked.append(str(key))
        return super().__contains__(key)

    def __iter__(self) -> Iterator[str]:  # a dict with its own `__iter__` is unpacked (`**`) by looking up
        return super().__iter__()

    def unknown(self, place: str = "") -> Iterator[str]:
        """What nobody has looked up, told with the nearest name that somebody has."""
        for key, value in self.items():
            if key not in set(self.asked):
                yield _unknown(f"{place}{key}", self.asked)
            elif isinstance(value, _Watched):
                yield from value.unknown(f"{place}{key}.")


def _told(mistake: Any, settings: Settings, known: list[str]) -> str:
    first = mistake["loc"][0] if mistake["loc"] else ""
    sections = [key for key, value in settings.items() if isinstance(value, dict) and first in value]
    key = ".".join([*sections[:1], *map(str, mistake["loc"])])
    if mistake["type"] == "extra_forbidden":
        return _unknown(key, known)
    return f"{key}: {mistake['input']!r}: {mistake['msg']}"


def _unknown(key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key.rpartition(".")[2], known, n=1)
    return f"unknown key {key}" + (f"; did you mean {near[0]}?" if near else "")
