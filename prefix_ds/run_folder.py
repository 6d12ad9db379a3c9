"""The folder of a run: where everything lies, and whether it belongs to this configuration.

    run.yaml  deepspeed.json     the resolved configuration
    recompute.json               model.recompute: auto: what was decided
    metrics.jsonl  mlflow.json   every number, and how far MLflow has them
    checkpoints/step-00000200/   what the run goes on from
    prefix/  model/              the best result: keys and values, or (full, pretrain) a Hugging Face folder
    tokenizer/                   pretrain: the trained tokenizer
    evaluate/test.json(l)        what `prefix-ds evaluate` found, and a line a record

Starting the same run again goes on in its folder; another run's folder is refused with the keys that differ,
and so is one with a run.yaml that somebody wrote. Our copy has a first line of its own.
Knows nothing of what the files hold.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefix_ds.config import RunConfig, config_text, differing_keys, fixed_keys, read_config
from prefix_ds.errors import RunError
from prefix_ds.files import hold_alone, remove, restore_folder, telling_disk_errors, write_text_atomically
from prefix_ds.tracking import masked, without_secrets

_LOCK = ".lock"
_HEAD = "# Written by prefix-ds, for the run in this folder: every key, resolved. It is written over.\n"


@dataclass(frozen=True)
class RunFolder:
    """The places in a run folder."""

    path: Path

    @property
    def config_file(self) -> Path:
        """The resolved configuration."""
        return self.path / "run.yaml"

    @property
    def has_begun(self) -> bool:
        """Whether there are results; a start that failed before leaves only the configuration."""
        return any((self.path / name).exists() for name in ("metrics.jsonl", "checkpoints"))

    @property
    def deepspeed_file(self) -> Path:
        """The resolved DeepSpeed settings."""
        return self.path / "deepspeed.json"

    @property
    def recompute_file(self) -> Path:
        """What `model.recompute: auto` came to."""
        return self.path / "recompute.json"

    @property
    def prefix(self) -> Path:
        """The best prefix."""
        return self.path / "prefix"

    @property
    def model(self) -> Path:
        """The best model of a run that trains all weights."""
        return self.path / "model"

    @property
    def tokenizer(self) -> Path:
        """The tokenizer a pretraining made."""
        return self.path / "tokenizer"

    @property
    def evaluate(self) -> Path:
        """What evaluations found."""
        return self.path / "evaluate"


def claim(config: RunConfig) -> RunFolder:
    """The folder of this run, made if it is new.

    Raises RunError if it is another run's or cannot be written.
    """
    folder = RunFolder(Path(config.run.folder))
    if folder.config_file.exists():
        if folder.has_begun:
            refuse_another(folder, fixed_keys(read_config(folder.config_file)), fixed_keys(config))
        elif not _is_ours(folder.config_file):
            raise RunError(
                f"run.folder: {folder.path}: its run.yaml is not the copy that a run keeps, and would be "
                f"written over; choose another folder, such as {folder.path / 'run'}"
            )
    elif folder.path.is_dir() and any(path.name != _LOCK for path in folder.path.iterdir()):
        raise RunError(
            f"run.folder: {folder.path}: the folder has files in it and no run.yaml; choose another"
        )
    with telling_disk_errors(f"run.folder: {folder.path}"):
        folder.path.mkdir(parents=True, exist_ok=True)
        if hold_alone(folder.path / _LOCK) is False:
            raise RunError(f"run.folder: {folder.path}: another process is training in it")
    if not folder.has_begun:
        remove(folder.tokenizer)  # of a start that failed, maybe on other data
    restore_folder(folder.model)
    write_config(folder, config)
    return folder


def write_config(folder: RunFolder, config: RunConfig) -> None:
    """Keeps the resolved configuration, without its secrets, in an existing folder. Raises RunError."""
    write_text_atomically(folder.config_file, _HEAD + config_text(publishable(config)))


def _is_ours(file: Path) -> bool:
    try:
        return file.read_bytes().startswith(_HEAD.encode())
    except OSError:
        return False


def publishable(config: RunConfig) -> RunConfig:
    """What may stand in a file: no password of mlflow.uri, no token in mlflow.tags. Both keys are free."""
    uri, tags = config.mlflow.uri, config.mlflow.tags
    clean = {"uri": uri and masked(uri, uri), "tags": without_secrets(tags)}
    return config.model_copy(update={"mlflow": config.mlflow.model_copy(update=clean)})


def open_run(path: str | Path, overrides: Sequence[str] = ()) -> tuple[RunFolder, RunConfig]:
    """An existing run and its configuration, some keys of it changed. Raises RunError or ConfigError."""
    folder = RunFolder(Path(path))
    if not folder.config_file.is_file():
        raise RunError(f"{path}: is no run folder: it has no run.yaml")
    return folder, read_config(folder.config_file, overrides)


def refuse_another(folder: RunFolder, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Raises RunError where a run with the `fixed_keys` of `old` is asked to go on with those of `new`."""
    if differing := differing_keys(old, new):
        raise RunError(
            f"run.folder: {folder.path}: belongs to another run: {'; '.join(differing)}. "
            "Choose another run.folder, remove this one, or go back to its values"
        )
