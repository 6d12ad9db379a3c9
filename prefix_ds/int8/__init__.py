"""Frozen weights stored in 8 bits, as parameters that ZeRO-3 can shard and gather as they are.

`stored_in_8_bits` exchanges the modules of a base whose weights are still promises; `quantised` is the
arithmetic; `Watched` finds layers that use such weights as if they were ordinary ones.
"""

from prefix_ds.int8.exchange import stored_in_8_bits
from prefix_ds.int8.experts import stacks_of
from prefix_ds.int8.misuse import Watched
from prefix_ds.int8.product import tiles_as_on
from prefix_ds.int8.quantise import quantised

__all__ = ["Watched", "quantised", "stacks_of", "stored_in_8_bits", "tiles_as_on"]
