"""What can be found out about a base without its weights.

It is found out first, since an error of one rank in the middle of a loading leaves the others waiting.

Knows nothing of training.
"""

import difflib
from pathlib import Path
from typing import Any

from prefix_ds.config import ModelKeys
from prefix_ds.errors import ConfigError, ModelError
from prefix_ds.loading.complaints import config_errors, did_you_mean, library_errors, place
from prefix_ds.loading.files import stored_tensors
from prefix_ds.loading.prequantised import check_storage


def check_new(keys: ModelKeys) -> None:
    """Raises ConfigError where `model.config` names no architecture, or a size that it does not have.

    transformers takes a mistyped size without a word, and its own default for the right one.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    family = str(keys.config["model_type"])
    if family not in CONFIG_MAPPING:
        near = difflib.get_close_matches(family, CONFIG_MAPPING, n=1)
        raise ConfigError(f"model.config.model_type: {family}: unknown" + did_you_mean(near))
    known = {*CONFIG_MAPPING[family]().to_dict(), *CONFIG_MAPPING[family].attribute_map}
    for name in keys.config:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise ConfigError(f"model.config.{name}: {family} has no such size" + did_you_mean(near))
    with config_errors():
        AutoConfig.for_model(**keys.config)


def vetted_config(keys: ModelKeys) -> Any:
    """The transformers configuration of the base, whose files are there and whole as far as a look tells.

    Quick; reads no weights. Raises ModelError.
    """
    check_folder(keys)
    config = base_config(keys)
    check_storage(config)
    return config


def base_config(keys: ModelKeys) -> Any:
    """The transformers configuration of the base; no weights need be there. Raises PrefixError."""
    from transformers import AutoConfig

    if not keys.name:
        check_new(keys)
        return AutoConfig.for_model(**keys.config)
    _check_base(keys.name)
    with library_errors(place("model.name", str(keys.name))):
        return AutoConfig.from_pretrained(
            keys.name, revision=keys.revision, trust_remote_code=keys.trust_remote_code
        )


def check_folder(keys: ModelKeys) -> None:
    """Raises ModelError when `model.name` looks like a folder and is not a usable one.

    Quick; of the weights it reads the files' headers.
    """
    name = keys.name or ""
    folder = Path(name)
    _check_base(name)
    if not folder.is_dir():
        return
    if not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"model.name: {name}: the folder has no .safetensors file (pickled weights are not loaded)"
        )
    stored_tensors(keys)


def check_place(key: str, name: str) -> None:
    """Raises ModelError for a name that means a folder, where there is none."""
    if not Path(name).is_dir() and (name.startswith((".", "/")) or name.count("/") > 1):
        raise ModelError(f"{key}: {name}: there is no such folder")


def _check_base(name: str) -> None:
    check_place("model.name", name)
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise ModelError(f"model.name: {name}: the folder has no config.json")
