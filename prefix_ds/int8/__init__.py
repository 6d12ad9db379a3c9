"""Frozen weights stored in 8 bits, as parameters that ZeRO-3 can shard and gather as they are.

`stored_in_8_bits` exchanges the modules of a base whose weights are still promises; `quantised` is the
arithmetic.
"""

from prefix_ds.int8.exchange import stored_in_8_bits
from prefix_ds.int8.quantise import quantised

__all__ = ["quantised", "stored_in_8_bits"]
