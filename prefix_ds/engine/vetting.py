"""What DeepSpeed itself says of its settings, asked before anything is built or written.

Otherwise a mistyped key would come to light deep in the construction of a model. DeepSpeed's own page of keys
is used, so nothing here ages. It vets `zero_optimization`; of the top level DeepSpeed ignores what it does
not know.

Knows nothing of run.yaml but the key that names the file.
"""

import difflib
from typing import Any

from prefix_ds.dist import has_gpu
from prefix_ds.engine.settings import Settings
from prefix_ds.errors import ConfigError


def vet(settings: Settings, name: str) -> None:
    """Raises ConfigError for keys of zero_optimization that DeepSpeed does not know or cannot take.

    `name` is what `engine.deepspeed` names.
    """
    has_gpu()  # before the import
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    fields = DeepSpeedZeroConfig.model_fields
    known = [name for key, field in fields.items() for name in (key, field.alias) if name]
    try:
        DeepSpeedZeroConfig(**settings["zero_optimization"])
    except ValidationError as error:
        mistakes = [_told(mistake, known) for mistake in error.errors()]
        raise ConfigError(*(f"engine.deepspeed: {name}: {mistake}" for mistake in mistakes)) from None


def _told(mistake: Any, known: list[str]) -> str:
    key = ".".join(["zero_optimization", *map(str, mistake["loc"])])
    if mistake["type"] != "extra_forbidden":
        return f"{key}: {mistake['input']!r}: {mistake['msg']}"
    near = difflib.get_close_matches(str(mistake["loc"][-1]), known, n=1)
    return f"unknown key {key}" + (f"; did you mean {near[0]}?" if near else "")
