"""Whether a run can be had of a base, as far as that is found out without its weights.

Asked before the run folder is touched: what is refused here leaves nothing behind. Which layers would call
the attention that a prefix is put in is told by a forward pass without numbers. Where the code of a base
breaks off without them nothing is learnt, and a trial decides once the base stands in its shards. Rejected: a
list of families, which knows no remote code.

Knows nothing of data or engines.
"""

from typing import Any

import torch

from prefix_ds.config import ModelKeys, RunConfig
from prefix_ds.errors import ModelError
from prefix_ds.initial import chosen_slots, text_tokens
from prefix_ds.loading import check_new, one_line, vetted_config
from prefix_ds.model.attention import Joint
from prefix_ds.model.base import no_attention_to_join, switch_attention
from prefix_ds.model.families import check_family
from prefix_ds.model.positions import beyond_training, check_length
from prefix_ds.model.skeleton import skeleton
from prefix_ds.model.trial import Trial
from prefix_ds.plan.experts import balance_experts
from prefix_ds.plan.meter import Meter
from prefix_ds.prefix import Slot


def check_base(config: RunConfig) -> Any:
    """The base's `skeleton`; None where there is none to be had.

    Raises ConfigError or ModelError for a base that this run is not for. Makes no collective call.
    """
    if config.train.method == "pretrain":
        check_new(config.model)
        return None
    base_config = vetted_config(config.model)
    if config.train.method == "prefix":
        for part in (base_config, base_config.get_text_config(decoder=True)):
            check_family(str(part.model_type))
    try:
        base = skeleton(base_config, config.model.trust_remote_code)
    except ImportError as error:
        raise ModelError(f"model.name: {config.model.name}: {one_line(error)}") from error
    except Exception:  # loading it says why
        return None
    if config.train.method == "prefix" and (slots := slots_without_weights(base, config.model)) is not None:
        chosen_slots(slots, config.prefix)
    return base


def check_lengths(config: RunConfig, tokenizer: Any, base: Any) -> str | None:
    """Raises ConfigError where a text has no room: in `prefix.length`, or in the base's table of positions.

    `base` is what `check_base` gave. The answer is a line to warn with, where the base was
    made for shorter texts.
    """
    keys, length = config.prefix, 0
    if config.train.method == "prefix":
        is_text = keys.init == "text"
        length = len(text_tokens(tokenizer, keys.text or "", keys.length)) if is_text else keys.length or 0
    if base is None:
        return None
    check_length(base, length, "prefix.length")
    check_length(base, length + config.data.max_length, "data.max_length")
    return beyond_training(base, length + config.data.max_length, "data.max_length")


def slots_without_weights(base: Any, keys: ModelKeys) -> list[Slot] | None:
    """The places for a prefix in a skeleton, in order of call; None where that cannot be told.

    Raises ModelError for a base without any.
    """
    switch_attention(base, keys.attention)
    balance_experts(base)
    trial = Trial(torch.device("meta"))
    Joint(base).source = trial
    try:
        with torch.no_grad(), Meter([*base.parameters(), *base.buffers()], vocab_size=0):
            base(input_ids=trial.ids_BT, use_cache=False)
    except Exception:  # it may not break off with numbers
        return None
    if not trial.slots:
        raise no_attention_to_join(base)
    return trial.slots
