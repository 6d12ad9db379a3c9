"""From a hub id or a folder to a model and its tokenizer.

Called within the engine's construction context, transformers builds the model in shards and fills them.
Whatever it leaves at random (a tensor the files lack) is refused: a frozen base with one random layer trains
without complaint.

Knows nothing of training, sharding or prefixes.
"""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prefix_ds.config import ModelKeys
from prefix_ds.errors import ConfigError, ModelError


def load_tokenizer(keys: ModelKeys) -> Any:
    """The tokenizer of the base, or the one `model.tokenizer` names. Raises ModelError."""
    from transformers import AutoTokenizer

    name = keys.tokenizer or keys.name
    with _library_errors(f"model.{'tokenizer' if keys.tokenizer else 'name'}: {name}"):
        return AutoTokenizer.from_pretrained(
            name, revision=keys.revision, trust_remote_code=keys.trust_remote_code
        )


def load_base(keys: ModelKeys) -> nn.Module:
    """The base with its weights. Raises ModelError. Every rank calls this."""
    from transformers import AutoModelForCausalLM

    where = f"model.name: {keys.name}"
    with _library_errors(where):
        base: nn.Module
        base, report = AutoModelForCausalLM.from_pretrained(
            keys.name,
            revision=keys.revision,
            trust_remote_code=keys.trust_remote_code,
            dtype=getattr(torch, keys.dtype),
            use_safetensors=True,  # never a pickle
            output_loading_info=True,
        )
    for kind in ("missing_keys", "mismatched_keys", "error_msgs"):
        if report.get(kind):
            shown = ", ".join(str(key) for key in sorted(report[kind], key=str)[:3])
            raise ModelError(f"{where}: {len(report[kind])} {kind.replace('_', ' ')} in its files: {shown}")
    return base


def new_base(keys: ModelKeys, tokenizer: Any) -> nn.Module:
    """A base of the architecture in `model.config`, of the tokenizer's size, with random weights.

    Raises ConfigError. Every rank calls this.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    sizes = special | keys.config | {"vocab_size": len(tokenizer)}
    try:
        config = AutoConfig.for_model(**sizes)
        base: nn.Module = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, keys.dtype))
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"model.config: {_first_line(error)}") from None
    return base


def check_folder(keys: ModelKeys) -> None:
    """Raises ModelError when `model.name` looks like a folder and is not a usable one.

    Quick; reads no weights.
    """
    name = keys.name or ""
    folder = Path(name)
    if not folder.is_dir():
        if name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise ModelError(f"model.name: {name}: there is no such folder")
        return
    if not (folder / "config.json").is_file():
        raise ModelError(f"model.name: {name}: the folder has no config.json")
    if not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"model.name: {name}: the folder has no .safetensors file (pickled weights are not loaded)"
        )


@contextlib.contextmanager
def _library_errors(where: str) -> Iterator[None]:
    """What the libraries say of a user's mistake, as one line that begins with the place."""
    from safetensors import SafetensorError

    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        yield
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ModelError(f"{where}: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]
