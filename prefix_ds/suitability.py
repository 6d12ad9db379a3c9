"""Whether a base can be what a run wants of it, as far as that is found out without its weights.

Asked before the run folder is touched: what is refused here leaves nothing behind. The rest is found out by a
trial, once the base stands in its shards.

Knows nothing of data or engines.
"""

from prefix_ds.config import RunConfig
from prefix_ds.loading import check_new, vetted_config
from prefix_ds.model.families import check_family
from prefix_ds.model.skeleton import check_skeleton


def check_base(config: RunConfig) -> None:
    """Raises ConfigError or ModelError. Quick; makes no collective call."""
    if config.train.method == "pretrain":
        check_new(config.model)
        return
    base_config = vetted_config(config.model)
    if config.train.method == "prefix":
        for part in (base_config, base_config.get_text_config(decoder=True)):
            check_family(str(part.model_type))
        keys = config.model
        check_skeleton(base_config, keys.attention, trust_remote_code=keys.trust_remote_code)
