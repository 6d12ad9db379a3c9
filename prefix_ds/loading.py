"""From a hub id or a folder to a model and its tokenizer.

Called within the engine's construction context, transformers builds the model in shards and fills them.
Whatever it leaves at random (a tensor the files lack) is refused: a frozen base with one random layer trains
without complaint. What can be found out without weights is found out first, by `vetted_config`, since an
error of one rank in the middle of a loading leaves the others waiting.

Knows nothing of training, sharding or prefixes.
"""

import contextlib
import difflib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import nn

from prefix_ds.config import ModelKeys
from prefix_ds.dist import together
from prefix_ds.errors import ConfigError, ModelError

# What transformers reports of a loading, in words.
_GAPS = {"missing_keys": "missing tensors", "mismatched_keys": "other shapes", "error_msgs": "errors"}
_LONGEST_REASON = 300  # characters; some libraries list all they know


def load_tokenizer(keys: ModelKeys) -> Any:
    """The tokenizer of the base, or the one `model.tokenizer` names. Raises ModelError."""
    from transformers import AutoTokenizer

    name = str(keys.tokenizer or keys.name)
    place = _place("model.tokenizer" if keys.tokenizer else "model.name", name)
    with _library_errors(f"{place}: has no tokenizer that can be loaded (model.tokenizer can name another)"):
        return AutoTokenizer.from_pretrained(
            name, revision=keys.revision, trust_remote_code=keys.trust_remote_code
        )


def load_base(keys: ModelKeys) -> nn.Module:
    """The base with its weights. Raises ModelError. Every rank calls this."""
    from transformers import AutoModelForCausalLM

    where = _place("model.name", str(keys.name))
    base: nn.Module | None = None
    report: dict[str, Any] = {}
    try:
        with _library_errors(where):
            base, report = AutoModelForCausalLM.from_pretrained(
                keys.name,
                revision=keys.revision,
                trust_remote_code=keys.trust_remote_code,
                dtype=getattr(torch, keys.dtype),
                use_safetensors=True,  # never a pickle
                output_loading_info=True,
            )
    except RuntimeError as error:
        report = {"error_msgs": [m for m in str(error).split("\n\t")[1:] if "mismatched_sizes" not in m]}
        if "loading state_dict" not in str(error) or not report["error_msgs"]:
            raise
    together(lambda: _refuse_gaps(report, where))  # of some gaps only rank 0 knows
    assert base is not None
    return base


def new_base(keys: ModelKeys, tokenizer: Any) -> nn.Module:
    """A base of the architecture in `model.config`, of the tokenizer's size, with random weights.

    Raises ConfigError. Every rank calls this.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    sizes = special | keys.config | {"vocab_size": len(tokenizer)}
    with _config_errors():
        config = AutoConfig.for_model(**sizes)
        base: nn.Module = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, keys.dtype))
    return base


def check_new(keys: ModelKeys) -> None:
    """Raises ConfigError where `model.config` names no architecture, or a size that it does not have.

    transformers takes a mistyped size without a word, and its own default for the right one.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    family = str(keys.config["model_type"])
    if family not in CONFIG_MAPPING:
        near = difflib.get_close_matches(family, CONFIG_MAPPING, n=1)
        raise ConfigError(f"model.config.model_type: {family}: unknown" + _did_you_mean(near))
    known = {*CONFIG_MAPPING[family]().to_dict(), *CONFIG_MAPPING[family].attribute_map}
    for name in keys.config:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise ConfigError(f"model.config.{name}: {family} has no such size" + _did_you_mean(near))
    with _config_errors():
        AutoConfig.for_model(**keys.config)


def vetted_config(keys: ModelKeys) -> Any:
    """The transformers configuration of the base, whose files are there and whole as far as a look tells.

    Quick; reads no weights. Raises ModelError.
    """
    from transformers import AutoConfig

    check_folder(keys)
    with _library_errors(_place("model.name", str(keys.name))):
        return AutoConfig.from_pretrained(
            keys.name, revision=keys.revision, trust_remote_code=keys.trust_remote_code
        )


def check_folder(keys: ModelKeys) -> None:
    """Raises ModelError when `model.name` looks like a folder and is not a usable one.

    Quick; of the weights it reads the files' headers.
    """
    name = keys.name or ""
    folder = Path(name)
    if not folder.is_dir():
        if name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise ModelError(f"model.name: {name}: there is no such folder")
        return
    if not (folder / "config.json").is_file():
        raise ModelError(f"model.name: {name}: the folder has no config.json")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(
            f"model.name: {name}: the folder has no .safetensors file (pickled weights are not loaded)"
        )
    for file in files:
        _check_header(file)


def _check_header(file: Path) -> None:
    """A header tells where each tensor lies, so a file that was cut short does not fit its own."""
    try:
        with safe_open(file, framework="np"):
            pass
    except (OSError, SafetensorError) as error:
        raise ModelError(f"model.name: {file}: damaged or cut short: {_one_line(error)}") from None


def _refuse_gaps(report: dict[str, Any], where: str) -> None:
    for kind, words in _GAPS.items():
        if gaps := sorted(map(str, report.get(kind, ()))):
            shown = _one_line(", ".join(gaps[:3]))
            raise ModelError(
                f"{where}: its weights do not fit its config.json: {words} ({len(gaps)}): {shown}"
            )


def _place(key: str, name: str) -> str:
    """Key and name, and where the name was looked for: a mistyped folder is taken for a hub id."""
    return f"{key}: {name}" + ("" if Path(name).is_dir() else " (no such folder, so a hub id)")


@contextlib.contextmanager
def _config_errors() -> Iterator[None]:
    """What transformers says of sizes that do not go together, as a ConfigError of one line."""
    try:
        yield
    except (ValueError, TypeError, KeyError, StrictDataclassError) as error:
        raise ConfigError(f"model.config: {_one_line(error)}") from None


@contextlib.contextmanager
def _library_errors(where: str) -> Iterator[None]:
    """What the libraries say of a user's mistake, as one line that begins with the place."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        yield
    except (OSError, ValueError, KeyError, SafetensorError, StrictDataclassError) as error:
        raise ModelError(f"{where}: {_one_line(error)}") from error


def _one_line(error: BaseException | str) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON]}..."


def _did_you_mean(near: list[str]) -> str:
    return f"; did you mean {near[0]}?" if near else ""
