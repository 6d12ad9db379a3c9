"""Whether a run's prefix can start on its base, as far as that is told without weights.

Which layers attend is told by a pass without numbers. Where the code of a base depends on numbers the pass
breaks off, and the loaded base will tell.

Knows nothing of memory or time.
"""

from typing import Any

import torch

from prefix_ds.config import ModelKeys, PrefixKeys, RunConfig
from prefix_ds.initial import chosen_slots, text_tokens
from prefix_ds.loading import base_config
from prefix_ds.model.attention import Joint
from prefix_ds.model.base import switch_attention
from prefix_ds.model.skeleton import skeleton
from prefix_ds.model.trial import Trial
from prefix_ds.plan.experts import balance_experts
from prefix_ds.plan.meter import Meter
from prefix_ds.prefix import Slot


def check_start(config: RunConfig, tokenizer: Any) -> None:
    """Raises ConfigError for a prefix that could not start. Reads no weights, makes no collective call."""
    if config.train.method == "prefix":
        check_layers(config)
        check_text(config.prefix, tokenizer)


def check_text(keys: PrefixKeys, tokenizer: Any) -> None:
    """Raises ConfigError for a text that `prefix.length` does not hold."""
    if keys.init == "text":
        text_tokens(tokenizer, keys.text or "", keys.length)


def check_layers(config: RunConfig) -> None:
    """Raises ConfigError for a layer that the base has not; ModelError as `base_config` does."""
    if config.prefix.layers != "all" and (slots := slots_without_weights(config.model)):
        chosen_slots(slots, config.prefix)


def slots_without_weights(keys: ModelKeys) -> list[Slot]:
    """The places for a prefix, in order of call; none where they cannot be told. Raises ModelError."""
    config, trial = base_config(keys), Trial(torch.device("meta"))
    try:
        base = skeleton(config, keys.trust_remote_code)
        switch_attention(base, keys.attention)
        Joint(base).source = trial
        balance_experts(base)
        with torch.no_grad(), Meter([*base.parameters(), *base.buffers()], vocab_size=0):
            base(input_ids=trial.ids_BT, use_cache=False)
    except Exception:  # loading it says why, or it does not break off with numbers
        return []
    return trial.slots
