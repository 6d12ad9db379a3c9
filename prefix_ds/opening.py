"""Opens what a run produced, to use it: the base in shards, the prefix in front of it, the tokenizer.

For `prefix` runs that is the base of run.yaml and the best prefix; for runs that trained all weights their
own model folder, with nothing in front. Knows nothing of what it is used for.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from prefix_ds.checkpoint import SavedPrefix, read_prefix
from prefix_ds.config import ModelKeys, RunConfig
from prefix_ds.dist import World, check_same, first_here_first, together
from prefix_ds.engine.filling import in_shards
from prefix_ds.engine.settings import deepspeed_settings
from prefix_ds.engine.sharding import Sharded, sharded
from prefix_ds.errors import ConfigError, RunError
from prefix_ds.initial import chosen_slots
from prefix_ds.loading import check_folder, load_base, load_tokenizer
from prefix_ds.model import PrefixLM
from prefix_ds.prefix import Slot, table_of
from prefix_ds.result import config_digest, num_layers
from prefix_ds.run_folder import RunFolder
from prefix_ds.verdicts import Mark

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Opened:
    """A trained run, ready to run."""

    lm: PrefixLM
    table_PD: Tensor | None  # None: nothing in front
    slots: Sequence[Slot]
    tokenizer: Any
    sharded: Sharded  # keeps DeepSpeed's engine alive
    mark: Mark = field(default_factory=Mark)  # of the prefix that was read


def open_trained(folder: RunFolder, config: RunConfig, world: World, *, with_prefix: bool = True) -> Opened:
    """The model of a run, with its best prefix or without. Raises PrefixError. Every rank calls this."""
    keys = model_of(folder, config)
    settings = deepspeed_settings(config, world.size)
    tokenizer = together(lambda: tokenizer_of(folder, config))
    is_prefix = config.train.method == "prefix" and with_prefix
    saved = _saved_of(folder) if is_prefix else None
    base = first_here_first(world, lambda: load_base(keys))  # the others find what it downloaded
    shards = sharded(in_shards(base, settings), settings)
    lm = PrefixLM(shards.module, attention=keys.attention, device=world.device)
    if saved is None:
        return Opened(lm, None, (), tokenizer, shards)
    table_PD, slots = together(lambda: _table_on(saved, config, lm))
    mark = Mark(saved.facts.step, saved.sha256)
    return Opened(lm, table_PD.to(world.device), slots, tokenizer, shards, mark)


def _saved_of(folder: RunFolder) -> SavedPrefix:
    """The same on all ranks: a run that trains meanwhile replaces its prefix. Every rank calls this."""
    saved = together(lambda: read_prefix(folder.prefix))
    check_same(
        saved.sha256,
        lambda others, first: RunError(
            f"{saved.path}: {others}: another prefix than on {first}: copy the run's folder there, or start "
            "again if it was being written"
        ),
    )
    return saved


def check_is_prefix(config: RunConfig) -> None:
    """Raises ConfigError for a run that has nothing to be left out or exchanged."""
    if (method := config.train.method) != "prefix":
        raise ConfigError(
            f"train.method: {method}: all weights were trained; there is no prefix to leave out"
        )


def tokenizer_of(folder: RunFolder, config: RunConfig) -> Any:
    """That of the model a run's result runs on. Raises PrefixError."""
    keys = model_of(folder, config)
    check_folder(keys)
    return load_tokenizer(keys, config.data)


def model_of(folder: RunFolder, config: RunConfig) -> ModelKeys:
    """The model a run's result runs on: its base, or the model it trained."""
    if config.train.method == "prefix":
        return config.model
    own: dict[str, Any] = {"name": str(folder.model), "revision": None, "tokenizer": None, "config": {}}
    return config.model.model_copy(update=own)


def _table_on(saved: SavedPrefix, config: RunConfig, lm: PrefixLM) -> tuple[Tensor, tuple[Slot, ...]]:
    saved.check_base(lm.family, num_layers(lm))
    slots = chosen_slots(lm.slots, config.prefix)
    table_PD = table_of(saved.keys_values(slots))
    if saved.facts.base_config_sha256 != config_digest(lm.base.config):
        log.warning(
            "%s: the configuration of %s is not the one this prefix was trained with: another base of these "
            "sizes, or another version of transformers",
            saved.path,
            config.model.name,
        )
    return table_PD, slots
