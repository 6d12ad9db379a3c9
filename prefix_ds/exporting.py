"""`prefix-ds export`: a run's prefix as a PEFT adapter with its card, several as one, or as an MLflow model.

Knows nothing of formats.
"""

import importlib.util
import logging
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from prefix_ds.card import Part, card, lost_behind
from prefix_ds.checkpoint import SavedPrefix, read_prefix
from prefix_ds.config import MlflowKeys, RunConfig
from prefix_ds.engine.settings import deepspeed_settings, preset_names
from prefix_ds.errors import ConfigError, PrefixError, RunError
from prefix_ds.export import export_prefix
from prefix_ds.files import telling_disk_errors
from prefix_ds.loading import load_tokenizer
from prefix_ds.logs import configure_logging
from prefix_ds.merging import MEANING, merged
from prefix_ds.run_folder import RunFolder, open_run, write_config
from prefix_ds.tracking import log_model, resolved_uri
from prefix_ds.verdicts import present_verdicts

log = logging.getLogger(__name__)

ENGINE_FILE = "engine.json"  # the DeepSpeed file of a registered run that names none of our presets


def export_runs(paths: Sequence[Path], *, merge: bool) -> None:
    """Writes the prefix of the first path, with `merge` those of all but the last, to the last.

    Raises PrefixError.
    """
    configure_logging()
    *runs, out = paths
    if len(runs) != 1 and not merge:
        raise ConfigError("export: expected RUN OUT, or --merge RUN RUN... OUT")
    if merge and len(runs) < 2:
        raise ConfigError("export --merge: expected RUN RUN... OUT")
    parts, prefixes = zip(*map(_part, runs), strict=True)
    end = _end_of_turn(parts[0].config)
    if window := prefixes[0].facts.window:
        log.warning("%s", lost_behind(window))
    if merge:
        export_prefix(merged(prefixes), out, card(parts, end, MEANING))
        log.warning("%s", MEANING)
    else:
        export_prefix(prefixes[0], out, card(parts, end))
    log.info("wrote %s: adapter and card (README.md)", out)


def export_to_mlflow(run: Path, name: str, uri: str | None, overrides: Sequence[str] = ()) -> str:
    """Registers a run's prefix as a model of MLflow; its address. Raises PrefixError.

    The model is the code that runs it, run.yaml (with `overrides`, for where it will run) and the prefix; the
    base stays where run.yaml says it is.
    """
    configure_logging()
    part, _ = _part(run, overrides)
    own = part.config.mlflow.uri
    where = uri or (own and resolved_uri(own, run))
    spec = importlib.util.find_spec("prefix_ds.served")
    assert spec is not None
    assert spec.origin is not None
    with TemporaryDirectory() as place:
        copy = _slim_copy(run, part.config, Path(place))
        return log_model(run, name, code=Path(spec.origin), files=copy, uri=where)


def _part(run: Path, overrides: Sequence[str] = ()) -> tuple[Part, SavedPrefix]:
    folder, config = open_run(run, overrides)
    if config.train.method != "prefix":
        raise RunError(f"{run}: train.method is {config.train.method}: there is no prefix, only model/")
    config = _found_from_anywhere(config)
    prefix = read_prefix(folder.prefix)
    prefix = replace(prefix, facts=replace(prefix.facts, base=_whole(prefix.facts.base)))
    return Part(config, prefix.facts, prefix.length, present_verdicts(run)), prefix


def _end_of_turn(config: RunConfig) -> str | None:
    """The token that ends an answer in a chat; None for texts, and where the tokenizer is not at hand."""
    if not config.data.is_chat:
        return None
    try:
        return str(load_tokenizer(config.model, config.data).eos_token)
    except PrefixError as error:
        log.warning("the card does not say where an answer ends: %s", error)
        return None


def _slim_copy(run: Path, config: RunConfig, place: Path) -> Path:
    """What a run folder needs to be written with: its configuration without secrets, its prefix, and the
    DeepSpeed file, if it has one of its own. Raises PrefixError."""
    slim = RunFolder(place / "run")
    slim.prefix.mkdir(parents=True)
    unread = config.data.model_copy(update=dict.fromkeys(("train", "valid", "test")))
    write_config(slim, config.model_copy(update={"mlflow": MlflowKeys(uri=None), "data": unread}))
    deepspeed_settings(config, world_size=1)  # else nobody could open it
    with telling_disk_errors(slim.path):
        if config.engine.deepspeed not in preset_names():
            shutil.copyfile(config.engine.deepspeed, slim.path / ENGINE_FILE)
        for file in RunFolder(run).prefix.glob("prefix.*"):
            shutil.copyfile(file, slim.prefix / file.name)
    return slim.path


def open_slim(path: Path) -> tuple[RunFolder, RunConfig]:
    """A copy of a run that was registered, wherever it lies now. Raises RunError or ConfigError."""
    file = path / ENGINE_FILE
    return open_run(path, [f"engine.deepspeed={file.absolute()}"] if file.exists() else [])


def _found_from_anywhere(config: RunConfig) -> RunConfig:
    """The configuration with whole paths of base and tokenizer."""
    names = {key: getattr(config.model, key) for key in ("name", "tokenizer")}
    whole = {key: _whole(name) for key, name in names.items() if name}
    return config.model_copy(update={"model": config.model.model_copy(update=whole)})


def _whole(name: str) -> str:
    """A folder's path from the root; a name on the hub as it is."""
    return str(Path(name).resolve()) if Path(name).is_dir() else name
