"""How long the rows may be in which a base is given its documents.

Knows nothing of what is in them.
"""

import logging

from prefix_ds.config import RunConfig
from prefix_ds.data.packing import Limits
from prefix_ds.model import PrefixLM

log = logging.getLogger(__name__)


def limits_for(lm: PrefixLM, config: RunConfig) -> Limits:
    """What bounds rows and micro-batches of a run.

    Packing is off for a base whose layers carry state from one document to the next.
    """
    data, micro_batch_tokens = config.data, config.train.micro_batch_tokens
    if data.packing and not lm.can_pack:
        log.warning("data.packing is off: %s cannot keep documents of one row apart", lm.family)
    if not data.packing or not lm.can_pack:
        return Limits(None, micro_batch_tokens)
    return Limits(max(data.max_length, micro_batch_tokens if lm.attends_alone else 0), micro_batch_tokens)
