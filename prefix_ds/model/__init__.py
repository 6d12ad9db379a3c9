"""A frozen causal language model that sees a prefix: `PrefixLM`.

Knows nothing of sharding, optimizers or files.
"""

from prefix_ds.model.lm import PrefixLM

__all__ = ["PrefixLM"]
