"""prefix-ds trains prefixes for large language models that stay frozen and sharded."""

__version__ = "0.1.0"
